"""The main job on a real model, from facts to a patch and back, with figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from malmend.commands.ask import AskResult, ask
from malmend.commands.edit import EditResult, edit
from malmend.commands.evaluate import evaluate
from malmend.errors import MalmendError, counted
from malmend.evaluation.page import page_folder, write_page
from malmend.evaluation.report import Report
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.files import writable_folder
from malmend.given import checked
from malmend.models.device import device_of
from malmend.models.identity import bits
from malmend.models.load import load_model, load_tokenizer
from malmend.patch import applied
from malmend.progress import Progress, silent
from malmend.workbench import shipped

LEFT_OUT = "all paraphrases and neighbours of a fact but the first of each"


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Everything the demo did.

    ``page`` is the report as an HTML page.
    ``weights_before``, ``weights_during`` and ``weights_after`` are SHA-256 over every bit of all
    weights: unedited, with the patch on, and with the patch off again.
    """

    edit: EditResult
    report: Report
    page: Path
    asked: tuple[AskResult, ...]
    weights_before: str
    weights_during: str
    weights_after: str


@checked()
def demo(
    out: str | Path = "demo-out",
    model: str = "smollm2-135m",
    facts: int = 128,
    spoken: int = 64,
    device: str = "cpu",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Edits the project's own facts into a model, measures, asks, and takes the patch off again.

    Args:
        out: folder for the patch and the report.
        model: a name, a folder or a GGUF file.
        facts: how many to edit at once, 1,687 at most.
        spoken: for how many of them the model also answers free-running (the slow part).
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        progress: called with stage and share done.
        told: called with a line about what comes next.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    known = _demo_facts(facts)
    if spoken < 0:
        raise MalmendError(f"spoken is {spoken}, expected 0 or more; change --spoken.")
    device_of(device)
    load_tokenizer(model)  # a misspelt name leaves no folder behind
    folder = writable_folder(page_folder(out))  # where the patch lies too
    told(f"Loading {model}.")
    loaded = load_model(model, device=device)
    before = bits(loaded.model)
    told(f"Editing {counted(len(known), 'fact')} at once.")
    done = edit(loaded, known, folder / "patch.safetensors", progress=progress)
    told(f"Asking about all {len(known)}, before and after.")
    first = [
        replace(fact, paraphrases=fact.paraphrases[:1], neighbours=fact.neighbours[:1])
        for fact in known
    ]
    report = evaluate(loaded, first, done.patch, decode_facts=spoken, progress=progress)
    report = replace(report, about={**report.about, "left_out": LEFT_OUT})
    page = write_page(report, folder)
    told("Asking three facts in free-running text.")
    patch = done.patch
    asked = tuple(ask(loaded, prompt, patch) for prompt in _prompts(known, report))
    with applied(loaded, done.patch):
        during = bits(loaded.model)
    after = bits(loaded.model)
    return DemoResult(done, report, page, asked, before, during, after)


def _demo_facts(count: int) -> list[Fact]:
    known = [fact for fact in read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    if not 1 <= count <= len(known):
        raise MalmendError(f"facts is {count}, expected 1 to {len(known):,}; change --facts.")
    return known[:count]


def _prompts(facts: list[Fact], report: Report) -> list[str]:
    """An edit prompt and two paraphrases of facts that the unedited model got wrong."""
    wrong = [
        fact
        for fact, row in zip(facts, report.rows, strict=True)
        if not row.unedited[0].exact and fact.paraphrases
    ]
    chosen = (wrong or facts)[:: max(1, len(wrong or facts) // 3)][:3]
    return [chosen[0].prompt, *(fact.paraphrases[0] for fact in chosen[1:])]
