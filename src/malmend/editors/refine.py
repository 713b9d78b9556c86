"""What follows an edit's first solve: the facts again, with the shift on, and in other frames.

One solve asks each value to move by what its own fact needs.  It does not know what the shifts of
lower sites do to the keys of upper ones, and the ridge gives less than was asked.  So the facts are
captured again on the edited model: keys u' as the shift S_p leaves them, descended value gradients
g' of what is still missing there.  The next shift is one ridge solution with the same prior,

    d_j = S_p u'_j - gain * g'_j,   S_(p+1) = the solution of (14) for the rows (u'_j, d_j)   (18)

so what holds is asked to stay, what is missing is asked for on top, and the prior is paid once,
for the whole shift.  Tokens of other questions and of text at which the edited model says something
else than before have rows too, which ask that back (restore.py).  Where the shift no longer
changes, S P = -gain * sum of w_j g'_j u'_j^T: what the prior pulls back is just what is missing.
It is not sure to get there, so the caller keeps the last pass after which no more of the plain
prompts' tokens are missed (:func:`missed`) than after the best before it, or no more than a
hundredth of them.

Frames are other settings that a prompt is put in during the later passes (or in the only one, where
that is asked: :attr:`RefineSettings.frames_at_once`), each with rows of its own; a fact that holds
in several holds better in words that nobody gave.  One of them is the model's chat template: an
edit of the plain prompts alone is not there when the model is asked in a chat.  Its keys lie far
from the prompts', so its rows ask for more in a later pass (``chat_gain``).

Not in MALMEN, which solves once; ``passes: 1`` is the published form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from malmend.editors import borrowing, settle
from malmend.editors.aggregation import Aggregation
from malmend.editors.editor import Editor
from malmend.editors.malmen import Malmen
from malmend.editors.restore import NUMBERS, Held, restoring
from malmend.editors.wordings import LEFT_OUT, TURNED
from malmend.errors import EditorError, MalmendError
from malmend.facts.encoded import Encoded, Form
from malmend.facts.fact import Question
from malmend.facts.tokens import TRIED, Encoder
from malmend.given import check_fields, check_range
from malmend.models.capture import Captured, capture, token_counts
from malmend.models.descent import Descent
from malmend.models.trunk import Trunk
from malmend.numerics.chunks import chunks
from malmend.numerics.ridge import ROWS
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

PROMPT = "{prompt}"
CHAT = "chat"
USUAL, MOST, ENOUGH = 3, 4, 0.01  # solves, and the share of missed tokens that needs no more
UNSETTLED, ROUNDS = 128, 3.0  # facts at most that do not settle; the rounds of larger edits
MOST_WORDINGS = 10
MOST_PASSES = 100  # four do, and each costs as much as the first
MOST_WEIGHT = 1000  # of what is asked back: far heavier ones leave nothing of the edits
END_NLL = 0.05  # what a later solve asks of end tokens: they weigh little, and the prior pulls
IN_CHAT = 2  # readings of a fact in chat, for one in each other way: the farthest from its prompt
FRAMES = ("This is well known. {prompt}", "{prompt} (in one word):")
WITH_CHAT = (FRAMES[1], CHAT)  # of a model that has a chat template


@dataclass(frozen=True)
class RefineSettings:
    """How often an edit is solved, and what the later solves see.

    Attributes:
        passes: number of solves; 1 is the published form, and all that the sum of shifts can do.
            Null: 1 for an edit that settles; 4 for a classifier, whose shifts are of every token
            and say least at first; else 3, and a 4th while more than a hundredth of the tokens is
            missed, of the plain prompts or in chat.
        frames: settings beside the plain prompt from the second pass on, or in the only one where
            ``passes`` is 1 and these are given: a text that holds "{prompt}", or "chat" for the
            model's chat template.  Null for two that suit a decoder, the template one of them where
            there is one, and none for a model with an encoder, which has not learned to read them;
            ``frames: []`` for none of them.
        gain: how much of a still missing move a later pass asks for (equation 18).
        chat_gain: the same, of rows in the chat template.
        restore: weight of the rows that ask back what the edit moved of other questions and of
            text; 0 for none of them.  Of a decoder only.
        rounds: how many times on average each fact is read in each frame and wording, and twice
            that in chat, while the edit settles: its shift is descended after the solves, in 80
            steps at least.  0: it does not settle, and the fields below do nothing.  Null: 3 for a
            decoder's edit of more than 128 facts where ``passes`` is null too, else 0.  Of a
            decoder only.
        steps: the most steps of settling; with more facts each is read less often.
        wordings: in how many other wordings at most each fact is read besides while it settles: the
            first is in fewer words, the second is turned from a sentence to a question or back, all
            others are as the batch asks others of the relation, or turned and in fewer words;
            none is there twice.
        hold: weight of other questions and of text while the edit settles.
        around: beside the editor's layers, also settle the other feed-forward layers and the
            attention's outputs of their blocks and of the one below; not where ``sites`` names the
            layers.
    """

    passes: int | None = None
    frames: tuple[str, ...] | None = None
    gain: float = 1.6
    chat_gain: float = 3.0
    restore: float = 1.0
    rounds: float | None = None
    steps: int = 400
    wordings: int = 8
    hold: float = 150.0
    around: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        single = "give --refine.passes 1 for a single solve"
        check_range(self, ("passes",), 1, MOST_PASSES, advice=single)
        none = "change --refine.steps, or give --refine.rounds 0 for no descent"
        check_range(self, ("steps",), 1, advice=none)
        check_range(self, ("gain", "chat_gain"), prefix="--refine.")
        check_range(self, ("restore", "rounds", "hold"), 0.0, MOST_WEIGHT, prefix="--refine.")
        check_range(self, ("wordings",), 0, MOST_WORDINGS, prefix="--refine.")
        for frame in self.frames or ():
            if frame != CHAT and PROMPT not in frame:
                raise EditorError(
                    f"The frame {frame!r} has no place for the prompt, expected a text with "
                    f"{PROMPT!r} in it, or {CHAT!r}; change --refine.frames, of "
                    "a ledger --frames."
                )

    def of(self, form: Form, facts: int) -> RefineSettings:
        """The same for an edit of so many facts, with the number that a null of rounds is for."""
        many = form == "causal" and facts > UNSETTLED and self.passes is None
        rounds = self.rounds if self.rounds is not None else ROUNDS * many
        return replace(self, rounds=rounds, passes=1 if rounds and not self.passes else self.passes)

    @property
    def frames_at_once(self) -> bool:
        """Whether the first solve, which is the only one then, sees the frames."""
        return self.passes == 1 and not self.rounds and bool(self.frames)

    def goes_on(self, encoder: Encoder, done: int, missed: float) -> bool:
        """Whether another solve follows ``done`` ones that miss this share of the tokens."""
        if self.passes is not None:
            return done < self.passes
        sought = encoder.reading.form == "classes" or done < USUAL or missed > ENOUGH
        return done < MOST and sought

    def frames_for(self, encoder: Encoder) -> tuple[str, ...]:
        """The frames of a model."""
        if self.frames is not None:
            return self.frames
        if encoder.reading.form != "causal":
            return ()
        return FRAMES if encoder.in_chat() is None else WITH_CHAT


# What a null of RefineSettings stands for, and its numbers.
UNSAID: list[object] = [USUAL, MOST, ENOUGH, END_NLL, *FRAMES, *WITH_CHAT, *NUMBERS]
UNSAID += [RefineSettings.gain, RefineSettings.chat_gain, RefineSettings.restore]
# The same of what settles.
SETTLING: list[object] = [RefineSettings.hold, RefineSettings.wordings, UNSETTLED, ROUNDS]
SETTLING += [RefineSettings.steps, RefineSettings.around, IN_CHAT]
SETTLING += [LEFT_OUT, TURNED, borrowing.FORMAT, *settle.NUMBERS]


def framing(encoder: Encoder, frame: str) -> Encoder:
    """The encoder of a frame: the chat template's for "chat", else the same.

    Raises:
        EditorError: "chat" for a tokenizer without a chat template.
        MalmendError: the template cannot be filled.
    """
    if frame != CHAT:
        return encoder
    if not getattr(encoder.tokenizer, "chat_template", None):
        raise EditorError(
            "The tokenizer has no chat template, so the frame 'chat' cannot be used; leave it out "
            "of --refine.frames, of a ledger --frames."
        )
    ends, most = encoder.end_of_answer, encoder.max_tokens
    found = Encoder(encoder.tokenizer, ends, most, chat=True, reading=encoder.reading)
    found.framed(TRIED)
    return found


def framed(encoder: Encoder, questions: Sequence[Question], frame: str) -> list[Encoded | None]:
    """The questions in a frame; None for one that is too long in it.

    Raises:
        EditorError: as :func:`framing`.
    """
    used, found = framing(encoder, frame), list[Encoded | None]()
    for question in questions:
        prompt = question.prompt if frame == CHAT else frame.replace(PROMPT, question.prompt)
        try:
            found.append(used.encode(Question(prompt, question.answer)))
        except MalmendError:  # too long in this frame, or its answer read otherwise
            found.append(None)
    return found


def surer(descent: Descent | None) -> Descent | None:
    """The descent of a later solve, which settles where what is asked balances the prior.

    An end token counts as said only below :data:`END_NLL`; at 0.4, the first solve's bound, a tenth
    of 64 facts lost theirs.
    """
    return descent and replace(descent, end_nll=min(descent.end_nll, END_NLL))


def further(
    editor: Editor,
    trunk: Trunk,
    shifts: Mapping[str, Tensor],
    questions: Sequence[Encoded],
    others: Mapping[str, Sequence[Encoded]],
    refine: RefineSettings,
    held: Held | None = None,
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
) -> tuple[list[Captured], list[Aggregation]]:
    """Equation (18): one more pass.

    Args:
        editor: of the method "malmen"; its network is not asked again.
        trunk: the cut model, unedited.
        shifts: S_p by site, V x K.
        questions: the edits as they are.
        others: the same in frames, by frame.
        refine: the gains of (18) and the weight of (28).
        held: what should be said as before; None for nothing.
        progress: called with the number of questions just finished, held ones among them.
        processes: that the questions are spread over, of which these are this one's.

    Returns:
        What was captured per site, plain tokens first and held ones last, and the aggregations that
        hold S_(p+1).  The factor N of the prior's wording is the number of plain tokens.
    """
    settings = editor.settings
    everything, gains = [*questions], [refine.gain] * len(questions)
    for frame, ones in others.items():
        everything += ones
        gains += [refine.chat_gain if frame == CHAT else refine.gain] * len(ones)
    with shifted(trunk.sites, shifts):
        captured = capture(trunk, everything, settings.tokens, surer(settings.descent), progress)
        edited = len(captured[0].keys_NK)
        if held is not None:
            restored = restoring(trunk, held, edited, progress, processes)
            captured = [captured.pop(0).followed(restored.pop(0)) for _ in trunk.sites]
    tokens = [
        torch.tensor(token_counts(everything, settings.tokens, one.in_encoder), dtype=torch.long)
        for one in trunk.sites
    ]
    counts = processes.total(*[int(one[: len(questions)].sum()) for one in tokens])
    wide_gains = torch.tensor(gains, dtype=torch.float64)
    found: list[Aggregation] = []
    for site, (name, pair) in enumerate(zip(editor.names, captured, strict=True)):
        gain_N = wide_gains.repeat_interleave(tokens[site])
        weights_N = editor.row_weights(site, pair)
        if held is not None:
            gain_N = nn.functional.pad(gain_N, (0, len(pair.keys_NK) - edited), value=1.0)
            weights_N = torch.ones_like(gain_N) if weights_N is None else weights_N
            weights_N[edited:] = refine.restore
        one = Malmen(
            pair.keys_NK,
            pair.room.empty(*pair.value_grads_NV.shape, dtype=pair.keys_NK.dtype),
            editor.prior(site, int(counts[site])),
            weights_N,
            processes.summed if processes.count > 1 else None,
        )
        shift_KV = shifts[name].to(editor.device, torch.float64).T
        for rows in chunks(len(pair.keys_NK), ROWS):
            kept_NV = pair.keys_NK[rows].to(shift_KV.device).double() @ shift_KV
            missing_NV = gain_N[rows, None] * pair.value_grads_NV[rows].double()
            one.diffs_NV[rows] = (kept_NV.to(missing_NV) - missing_NV).to(one.diffs_NV)
        found.append(one)
    return captured, found


@torch.no_grad()
def missed(
    trunk: Trunk,
    questions: Sequence[Encoded],
    shifts: Mapping[str, Tensor],
    processes: Processes = ALONE,
) -> float:
    """The share of answer and end tokens that the model with the shift on does not say first."""
    wrong = count = 0
    with shifted(trunk.sites, shifts):
        for _, batch in trunk.batches(questions):
            top_A = trunk.logits(batch).argmax(-1).cpu()
            wrong += int((top_A != batch.tokens.labels_A).sum())
            count += len(top_A)
    all_wrong, everything = processes.total(wrong, count)
    return all_wrong / everything if everything else 0.0
