"""Facts in the prompt: what many would try before any edit.  The weights stay as they are.

Before each question stand the edited facts that are most like it, as "PROMPT ANSWER" lines, the
likest last.  Likeness is the cosine of the prompts' token counts, each count weighed by how rare
the token is among the facts (idf = log(m / facts that hold it) + 1).  Nothing is known of which
fact a question belongs to, so unrelated questions have facts before them too.

Shape letters: M facts, R tokens that some fact's prompt holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder
from malmend.given import check_fields, check_range


@dataclass(frozen=True)
class InContext:
    """Facts in the prompt.

    Attributes:
        shown: facts before each question.
    """

    shown: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("shown",), 1, prefix="context.")


class ContextEncoder(Encoder):
    """Frames each prompt behind the facts that are most like it.

    Args:
        plain: the encoder that prompts have without facts.
        facts: that may be shown.
        shown: how many of them.

    Raises:
        MalmendError: a question of the facts becomes too long behind others.
    """

    def __init__(self, plain: Encoder, facts: Sequence[Fact], shown: int):
        super().__init__(
            plain.tokenizer, plain.end_of_answer, plain.max_tokens, reading=plain.reading
        )
        self._plain, self._shown = plain, min(shown, len(facts))
        self._lines = [f"{fact.prompt.rstrip()} {fact.answer}" for fact in facts]
        prompts = [self._ids(fact.prompt) for fact in facts]
        self._known_R = torch.cat(prompts).unique()
        counts_RM = torch.stack([self._counts(ids) for ids in prompts], dim=1)
        self._idf_R = (len(facts) / (counts_RM > 0).sum(1)).log() + 1
        self._facts_RM = torch.nn.functional.normalize(counts_RM * self._idf_R[:, None], dim=0)
        if faults := self.faults(facts):
            raise MalmendError(f"Behind {shown} facts a question does not fit: {faults[0]}.")

    def framed(self, prompt: str) -> str:
        """The likest facts, then the prompt, each in a line."""
        chosen = self.likest(prompt)
        return "\n".join([*(self._lines[index] for index in chosen), super().framed(prompt)])

    def likest(self, prompt: str) -> list[int]:
        """The facts that are shown before a prompt, the likest last."""
        counts_R = self._counts(self._ids(prompt))
        held = counts_R.nonzero().squeeze(1)  # a few rows of thousands
        likeness_M = (counts_R * self._idf_R)[held] @ self._facts_RM[held]
        likeness_M = (1e5 * likeness_M / likeness_M.max().clamp(min=1e-9)).round()
        order = likeness_M.argsort(descending=True, stable=True)  # of equal ones the earlier
        return order[: self._shown].tolist()[::-1]

    def _ids(self, prompt: str) -> Tensor:
        return torch.tensor(self._plain.prompt_ids(prompt))

    def _counts(self, ids: Tensor) -> Tensor:
        """How often each known token is among these."""
        known = ids[torch.isin(ids, self._known_R)]
        rows = torch.searchsorted(self._known_R, known)
        return torch.bincount(rows, minlength=len(self._known_R)).float()
