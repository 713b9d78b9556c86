"""MEMIT (Meng et al., 2023): facts written at their subjects' last tokens, over several blocks.

With h the highest edited block's output at that token, a move is found by Adam,

    delta = argmin    mean over prompts of -log p(answer | prompt, h + delta)
                      + kl * KL(unedited || moved) behind "SUBJECT is a"
                      + decay * (|delta| / |h|)^2,        |delta| <= clamp * |h|
    z     = h + delta

Then block after block, lowest first, with the shifts so far on the model,

    S = R K^T (alpha C + K K^T)^-1,   a fact's column of R: (z - h) / (number of blocks left)

with K the layer's inputs at those tokens and h as it is by now, and C the unedited model's mean of
k k^T over general text.

Deviations: h and k are means over the same prompts, plain and prefixed, so that z is met where it
was sought.  A subject that ends with the prompt's very first token is written at the one behind it:
that token is an attention sink, whose moves of a hundred times the length are of all prompts, so
that one such fact spoilt two others.  Prefixes are starts of lines of the package's own text,
not the model's samples, and C is taken over that text and kept, with a millionth of its mean
diagonal added.  The answer's loss is summed over its tokens, as in the paper's formula (its code
takes the mean).  Four things of the move are otherwise than published: there the KL is KL(moved ||
unedited), as in ROME's equation (4), and of what is said at the subject's last token, not behind
"is a"; the decay is decay * |delta| / |h|^2; and Adam stops where the whole loss is below 0.05, not
the answer's.  The figures are of the forms here.  The move is added to the layer's output, which is
the block's where it is added to a plain residual.  alpha, blocks and prefixes are by 24 facts on
SmolLM2-135M: of alpha 15,000, 5,000, 1,500 and 150 ES was 0.22, 0.55, 1.00 and 1.00, retention
0.99, 0.97, 0.97 and 0.96; of blocks 10-14, 12-16 and 14-18 (alpha 150) GS was 0.69, 0.70 and 0.73,
retention 0.96, 0.97 and 0.85, with less GS of 3-8, 5-9, 8-12 and 16-20 on 16 facts; with two
prefixes ES was 0.71.  A rate of 0.2 is too slow.

Shape letters: M facts, R prompts, A answer tokens, V value and hidden width, K key width.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.errors import EditorError, MalmendError, ModelError, counted
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.given import check_fields, check_range, check_seed
from malmend.material import general_text
from malmend.methods.method import Found
from malmend.methods.moments import general_moments
from malmend.models.device import wide_device
from malmend.models.forms import find_stacks, form_of
from malmend.models.sites import Site, find_sites, stack_of
from malmend.models.tracing import tracing
from malmend.models.trunk import Trunk
from malmend.numerics.losses import answer_nll, kl_per_token
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor
from malmend.patch import shifted
from malmend.progress import Progress, counting
from malmend.workbench import Workbench, trunk_folder

ENOUGH = 0.05  # nats below which a fact's answer is likely enough
START = 8  # tokens of a line that make a prefix
FLOOR = 1e-6  # of C's mean diagonal
NAMED = 10  # places that an error names

Placed = tuple[Encoded, int]  # a question, and the position of its subject's last token
Asked = tuple[list[Placed], Placed]  # a fact's prompts, and its essence prompt
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Memit:
    """MEMIT.

    Attributes:
        blocks: the edited ones, from 0; null for those from a third to half of the depth.
        steps: of Adam, at most, for each fact.
        rate: Adam's learning rate.
        kl: weight of the KL behind "SUBJECT is a".
        clamp: the longest move, as a share of the hidden state's length.
        decay: weight of the square of that share.
        alpha: weight of C.
        prefixes: prompts beside the plain one, each behind the start of a line of text.
        text_tokens: tokens of text that C is taken over.
        seed: of the choice of prefixes.
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    blocks: tuple[int, ...] | None = None
    steps: int = 25
    rate: float = 0.5
    kl: float = 0.0625
    clamp: float = 0.75
    decay: float = 0.5
    alpha: float = 1500.0
    prefixes: int = 0
    text_tokens: int = 16_000
    seed: int = 0
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("steps", "text_tokens"), 1, prefix="memit.")
        check_range(self, ("prefixes",), 0, prefix="memit.")
        check_range(self, ("rate", "clamp", "alpha"), prefix="memit.")
        check_range(self, ("kl", "decay"), 0.0, prefix="memit.")
        check_seed(self, "memit.")

    @property
    def name(self) -> Literal["memit"]:
        """As tables and patches call it."""
        return "memit"

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The second feed-forward layers of the blocks, lowest first.

        Raises:
            EditorError: no decoder.
            ModelError: no such block.
        """
        _check(model)
        count = len(find_stacks(model)[0].blocks)
        usual = range(count // 3, max(count // 2, count // 3 + 1))
        blocks = sorted(set(usual if self.blocks is None else self.blocks))
        if not blocks or blocks[0] < 0 or blocks[-1] >= count:
            raise ModelError(
                f"memit.blocks is {self.blocks}, expected numbers of blocks from 0 to {count - 1}."
            )
        sites = find_sites(model, count - blocks[0])
        return tuple(sites[block - blocks[0]] for block in blocks)

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """Moves of all facts, then one shift after another.

        Raises:
            EditorError: no decoder, or facts whose prompts do not hold their subjects.
        """
        trunk, shifts = bench.trunk, dict[str, Tensor]()
        device = wide_device(trunk.model)
        asked = self.asked(bench, facts)
        goals_MV, _, nll_M = self.goals(bench, asked, progress)
        start = time.perf_counter()
        moments = general_moments(bench, self.text_tokens, progress)
        once = time.perf_counter() - start
        for at, (site, moment_KK) in enumerate(zip(trunk.sites, moments, strict=True)):
            with shifted(trunk.sites[:at], shifts):
                keys_MK, states_MV = _seen(trunk, site, asked)
            missing_MV = (goals_MV - states_MV) / (len(trunk.sites) - at)
            floor = self.alpha * FLOOR * moment_KK.diagonal().mean().item()
            factor = RidgeFactor(keys_MK, Prior(floor, (self.alpha,), (moment_KK,), device))
            shifts[site.name] = factor.shift(missing_MV)
        return Found(shifts, len(facts), {"nll": nll_M.mean().item()}, once)

    def asked(self, bench: Workbench, facts: Sequence[Fact]) -> list[Asked]:
        """The prompts of every fact; raises as :meth:`find`."""
        _check(bench.trunk.model, facts)
        # Of the lines that C is taken over: perplexity is measured on others.
        lines = general_text(bench.encoder, self.text_tokens)
        chosen = random.Random(self.seed).sample(lines, min(self.prefixes, len(lines)))
        read = bench.encoder.tokenizer.decode
        starts = [read(line.ids[:START], skip_special_tokens=True).strip() for line in chosen]
        found = [_asked(bench.encoder, fact, starts) for fact in facts]
        lone = [f.where for f, (prompts, _) in zip(facts, found, strict=True) if not prompts[0][1]]
        if lone:
            raise EditorError(
                f"MEMIT edits behind a prompt's first token, but {_some_of(lone, facts)} a prompt "
                f"of one token ({_named(lone)}); ask in more words, leave them out, or use another "
                "method."
            )
        return found

    def goals(self, bench: Workbench, asked: Sequence[Asked], progress: Progress) -> list[Tensor]:
        """Of every fact z, delta, and the last loss of its answer that was seen."""
        trunk, site = bench.trunk, bench.trunk.sites[-1]
        states_MV = _seen(trunk, site, asked)[1]
        # Cut at the highest site: a move changes nothing below it.
        top = Trunk(trunk.model, [site], trunk.settings, trunk_folder(bench.loaded))
        deltas_MV, nll_M = torch.zeros_like(states_MV), states_MV.new_zeros(len(asked))
        count = counting(progress, "moves at subjects", len(asked))
        sizes = [len(prompts) * max(len(one.read) for one, _ in prompts) for prompts, _ in asked]
        order = sorted(range(len(asked)), key=lambda index: -sizes[index])
        while order:
            most = max(1, trunk.settings.batch_tokens // sizes[order[0]])
            chosen, order = order[:most], order[most:]
            norms_M = states_MV[chosen].norm(dim=1).to(trunk.model.device, trunk.wide)
            found_MV, last_M = self._descended(top, [asked[i] for i in chosen], norms_M)
            deltas_MV[chosen], nll_M[chosen] = found_MV.to(states_MV), last_M.to(states_MV)
            count(len(chosen))
        return [states_MV + deltas_MV, deltas_MV, nll_M]

    def _descended(self, top: Trunk, asked: Sequence[Asked], norms_M: Tensor) -> Pair:
        """Delta and last loss of facts that share batches; one that is done leaves them."""
        deltas_MV = norms_M.new_zeros(len(asked), top.sites[0].shape_VK[0])
        first_MV, second_MV = torch.zeros_like(deltas_MV), torch.zeros_like(deltas_MV)
        nll_M, left = torch.zeros_like(norms_M), torch.arange(len(asked), device=norms_M.device)
        before_MW = None
        for step in range(1, self.steps + 1):
            with torch.enable_grad():
                here_MV = deltas_MV[left].requires_grad_()
                loss_M, after_MW = _losses(top, [asked[i] for i in left.tolist()], here_MV)
                nll_M[left] = loss_M.detach()
                before_MW = after_MW.detach() if before_MW is None else before_MW
                share_M = here_MV.square().sum(1) / norms_M[left].square()
                held_M = self.kl * kl_per_token(before_MW, after_MW) + self.decay * share_M
                (grad_MV,) = torch.autograd.grad((loss_M + held_M).sum(), here_MV)
            open_M = nll_M[left] >= ENOUGH
            left, grad_MV, before_MW = left[open_M], grad_MV[open_M], before_MW[open_M]
            if not len(left):
                break
            first_MV[left] = 0.9 * first_MV[left] + 0.1 * grad_MV
            second_MV[left] = 0.999 * second_MV[left] + 0.001 * grad_MV.square()
            root_MV = (second_MV[left] / (1 - 0.999**step)).sqrt() + 1e-8
            moved_MV = deltas_MV[left] - self.rate * first_MV[left] / (1 - 0.9**step) / root_MV
            longest_M = self.clamp * norms_M[left] / moved_MV.norm(dim=1).clamp(min=1e-30)
            deltas_MV[left] = moved_MV * longest_M.clamp(max=1).unsqueeze(1)
        return deltas_MV, nll_M


def _losses(top: Trunk, asked: Sequence[Asked], moves_MV: Tensor) -> Pair:
    """The answers' losses, means over prompts, and the logits behind the essences."""
    counts_M = torch.tensor([len(prompts) for prompts, _ in asked], device=moves_MV.device)
    owner_R = torch.repeat_interleave(counts_M)
    nll_R = _moved(top, [one for prompts, _ in asked for one in prompts], moves_MV[owner_R])[0]
    nll_M = moves_MV.new_zeros(len(asked)).index_add(0, owner_R, nll_R) / counts_M
    return nll_M, _moved(top, [essence for _, essence in asked], moves_MV)[1]


def _moved(top: Trunk, rows: Sequence[Placed], moves_RV: Tensor) -> Pair:
    """Loss of every question, 0 of one without an answer, and all logits."""
    batch = top.batch([question for question, _ in rows])  # of the store, after the first time
    with tracing(top.sites) as (trace,):
        added = moves_RV.new_zeros(batch.tokens.ids_BT.numel(), moves_RV.shape[1])
        flat = [row * batch.tokens.width() + at for row, (_, at) in enumerate(rows)]
        places_R = torch.tensor(flat, device=added.device)
        trace.added = added.index_copy(0, places_R, moves_RV).to(top.model.dtype)
        logits_AW = top.logits(batch)
    nll_A = answer_nll(logits_AW, batch.tokens.labels_A.to(logits_AW.device))
    rows_A = batch.tokens.source_rows_A.to(nll_A.device)
    return moves_RV.new_zeros(len(rows)).index_add(0, rows_A, nll_A), logits_AW


@torch.no_grad()
def _seen(trunk: Trunk, site: Site, asked: Sequence[Asked]) -> Pair:
    """Keys at a site and outputs of the highest block, means over each fact's prompts, float64."""
    rows = [(fact, one) for fact, (prompts, _) in enumerate(asked) for one in prompts]
    highest, outputs = trunk.sites[-1], list[Any]()
    stack = stack_of(trunk.model, highest.name)
    block = stack.blocks[stack.number_of(highest.name)]
    totals = [torch.zeros(len(asked), site.shape_VK[1], dtype=torch.float64)]
    totals += [torch.zeros(len(asked), highest.shape_VK[0], dtype=torch.float64)]
    handle = block.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    try:
        for indices, batch in trunk.batches([question for _, (question, _) in rows]):
            with tracing([site], grads=False) as (trace,):
                trunk.final_states(batch)
            out = outputs.pop()
            states = out[0] if isinstance(out, tuple | list) else out
            owners = torch.tensor([rows[index][0] for index in indices])
            flat = [n * batch.tokens.width() + rows[i][1][1] for n, i in enumerate(indices)]
            for total, every in zip(totals, (trace.keys, states.flatten(0, -2)), strict=True):
                total.index_add_(0, owners, every[flat].to("cpu", torch.float64))
    finally:
        handle.remove()
    counts = torch.tensor([[len(prompts)] for prompts, _ in asked])
    return totals[0] / counts, totals[1] / counts


def _check(model: PreTrainedModel, facts: Sequence[Fact] = ()) -> None:
    if form_of(model) != "causal":
        raise EditorError(
            f"MEMIT edits decoders alone, and {type(model).__name__} is none; use another method."
        )
    named = [(fact.where, (fact.subject or "").strip(), fact.prompt) for fact in facts]
    lost = [where for where, subject, prompt in named if not subject or subject not in prompt]
    if lost:
        raise EditorError(
            f"MEMIT edits at the subject, but {_some_of(lost, facts)} none in the prompt "
            f"({_named(lost)}); add it as the prompt spells it, leave them out, or use another "
            "method."
        )


def _some_of(some: Sequence[str], facts: Sequence[Fact]) -> str:
    has = "has" if len(some) == 1 else "have"
    return f"{len(some):,} of {counted(len(facts), 'fact')} {has}"


def _named(places: Sequence[str]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more


def _asked(encoder: Encoder, fact: Fact, starts: Sequence[str]) -> Asked:
    subject = (fact.subject or "").strip()
    prompts = [_placed(encoder, fact.question, subject)]
    for start in starts:
        try:
            question = Question(f"{start}. {fact.prompt}", fact.answer)
            prompts.append(_placed(encoder, question, subject))
        except MalmendError:  # too long behind this one
            continue
    return prompts, _placed(encoder, Question(f"{subject} is a"), subject)


def _placed(encoder: Encoder, question: Question, subject: str) -> Placed:
    """The last token of the subject, where it stands often of the last whole word.

    The one behind it, where that is the very first token.
    """
    text, encoded = encoder.framed(question.prompt), encoder.encode(question)
    whole = [one.end() for one in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    end = whole[-1] if whole else text.rindex(subject) + len(subject)
    spans = encoder.ids_of(text)[1]  # of every id, also of a BOS
    last = max(index for index, (start, _) in enumerate(spans) if start < end)
    # A token that straddles the end of the prompt is the answer's.
    return encoded, min(max(last, 1), encoded.answer_start - 1)
