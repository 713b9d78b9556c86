"""One prompt, free-running, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from malmend.errors import MalmendError
from malmend.evaluation.classes import classes_of
from malmend.evaluation.generate import Answer, generate, no_numbers
from malmend.given import checked
from malmend.models.load import LoadedModel
from malmend.models.trunk import Trunk
from malmend.patch import Patch, applied, by_one_thread, check_bare
from malmend.shipping.adapter import based_on, read_patch
from malmend.workbench import encoder_for, opened


@dataclass(frozen=True)
class AskResult:
    """What the model says; ``edited`` is None where no patch was given.

    ``unedited_cut`` and ``edited_cut`` say whether the answer was cut at the token limit.
    """

    prompt: str
    unedited: str
    edited: str | None = None
    unedited_cut: bool = False
    edited_cut: bool = False


@by_one_thread
@checked("patch")
def ask(
    model: str | LoadedModel,
    prompt: str,
    patch: str | Path | Patch | None = None,
    chat: bool = False,
    max_new_tokens: int = 32,
    force: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> AskResult:
    """Lets the model answer in its own words (greedy), with and without the patch.

    A classifier says its class, with the probability of it.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        prompt: what to ask.
        patch: a patch, its file, or a LoRA adapter's folder.
        chat: ask through the model's chat template.
        max_new_tokens: where the answer is cut at the latest.
        force: accept a patch that was made for another base.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
    """
    if not prompt.strip():
        raise MalmendError("The prompt is empty, expected a question or the start of a sentence.")
    if max_new_tokens < 1:
        raise MalmendError(f"max_new_tokens is {max_new_tokens}, expected 1 or more.")
    patch = None if patch is None else read_patch(patch)
    loaded = opened(model, dtype, device)
    patch = None if patch is None else based_on(patch, loaded)
    encoder = encoder_for(loaded, "none", chat)
    # Made of the unedited model: its trials compare numbers, which an edited one may not give.
    trunk = Trunk(loaded.model, ()) if encoder.reading.form == "classes" else None

    def answer() -> Answer:
        if trunk is not None:
            [(name, share)] = classes_of(trunk, encoder, [prompt])
            if math.isnan(share):
                raise no_numbers(loaded.name)
            return Answer(f"{name} ({share:.3f})")
        return generate(loaded, encoder, [prompt], max_new_tokens, whole=True)[0]

    if patch is not None:
        check_bare(loaded)  # else what is said without it would be said with another
    before = answer()
    if patch is None:
        return AskResult(prompt, before.text, unedited_cut=before.cut)
    with applied(loaded, patch, force):
        after = answer()
    return AskResult(prompt, before.text, after.text, before.cut, after.cut)
