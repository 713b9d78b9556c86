"""Begins a ledger: what is fixed for good, and which editors may keep one."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.editor import Editor
from malmend.editors.refine import CHAT, RefineSettings, framing
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError, LedgerError
from malmend.facts.tokens import Encoder
from malmend.files import listing_synced, new_folder, synced, writable_folder
from malmend.given import checked
from malmend.ledgers.about import About
from malmend.ledgers.entries import Generation, insert_about, insert_generation
from malmend.ledgers.ledger import EDITOR, Signed
from malmend.ledgers.tables import FILE, created, holds_tables
from malmend.ledgers.watch import StopRule
from malmend.methods.editor_choice import Choice, choose
from malmend.methods.trained import TRAINED, method_in
from malmend.models.identity import bits, configuration_of, tokens_digest
from malmend.models.load import LoadedModel
from malmend.models.source import lasting
from malmend.models.trunk import TrunkSettings
from malmend.patch import by_one_thread, now
from malmend.progress import Progress, silent
from malmend.workbench import (
    SHIPPED,
    Workbench,
    check_calibration,
    encoder_for,
    lay_out,
    opened,
    shipped,
)

# Why a fact that such a method edits in cannot be taken out again.
NOT_ADDITIVE = {
    "mend": "it sums shifts, and a ledger keeps the sums of least squares",
    "mend-single": "it sums shifts, and a ledger keeps the sums of least squares",
    "ft": "it trains on all facts together, so no part of the shift is one fact's",
    "ft-kl": "it trains on all facts together, so no part of the shift is one fact's",
    "lora": "it trains on all facts together, so no part of the shift is one fact's",
    "memit": "its upper layers are solved on keys that all facts have moved in the lower ones",
    "ultraedit": "its normalisation goes on, so what a fact asks depends on the others",
    "enn": "it takes gradient steps on all facts together",
    "ke": "its shift is of the gradient on the model as it is, and no least squares",
}


@by_one_thread
@checked()
def init(
    ledger: str | Path,
    model: str | LoadedModel,
    editor: str | Path | Editor = "auto",
    settings: EditorSettings | None = None,
    method: str = "malmen",
    calibrate: str | Path | None = None,
    text: str | Path | None = None,
    calibration: CalibrationSettings = CalibrationSettings(),
    frames: tuple[str, ...] = (),
    rule: StopRule = StopRule(),
    trunk: TrunkSettings = TrunkSettings(),
    dtype: str = "float32",
    device: str = "cpu",
    author: str | None = None,
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> Generation:
    """Begins a ledger: fixes the model, the editor with its calibration, and the rule.

    Args:
        ledger: a folder, which is made.
        model: a name, a folder, a GGUF file, or a loaded model.
        editor: as of ``malmend edit``; of least squares, for nothing else can be added to.
        settings: of the editor without a network; a trained editor brings its own.
        method: "malmen"; any other is refused with the reason.
        calibrate: calibration facts in place of the project's own.
        text: calibration text in place of the project's own.
        calibration: how the model is calibrated.
        frames: in which each fact is solved beside its plain prompt, for good, as of
            ``malmend edit --refine.frames``; "chat" is the model's chat template, where next to
            nothing holds that was solved plainly.  It costs other answers, see docs/ledger.md.
        rule: when the ledger warns that its model degrades.
        trunk: grouping of questions and the disk budget for trunk activations.
        dtype: in which the model is loaded, now and ever after.
        device: where the model is put now: "cpu", "cuda" or another accelerator, one of
            several as "cuda:1", or "auto" for spread over all.
        author: who does this; null for the user's name.
        progress: called with stage and share done.
        told: called with a line about the editor, once it is known and before the work.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    signed, folder = signed_by(author), Path(ledger)
    refuse(method)
    named = method_in(editor) if isinstance(editor, str | Path) else None
    refuse(named if named in TRAINED else "malmen")
    _check_rule(rule)
    _check_folder(folder)
    own_data = (calibrate, text, calibration) != (None, None, CalibrationSettings())
    chosen = choose(editor, settings, own_data)
    refuse(chosen.settings.method)
    encoder = encoder_for(model, chosen.settings.end_of_answer)
    check_calibration(encoder, calibrate, text)
    _check_frames(encoder, frames)
    loaded = opened(model, dtype, device)
    chosen = chosen.on(loaded)
    refuse(chosen.settings.method)
    told(chosen.said())
    if encoder.in_chat() and CHAT not in frames:
        told("In a chat next to nothing will hold; --frames '[chat]' solves for it too.")
    ends = chosen.settings.end_of_answer
    bench = lay_out(loaded, chosen.settings.sites_in(loaded.model), ends, trunk=trunk)
    ready = chosen.editor(bench, calibrate, text, calibration, progress)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise LedgerError(f"{folder} cannot be made ({error.strerror}); give another.") from error
    first = Generation(0, "init", signed.author, signed.time, 0, None, 0.0, None)
    with created(folder) as db:
        identity = _keep(ready, chosen, folder / EDITOR, loaded.fingerprint)
        insert_about(db, _about(bench, chosen, identity, frames, rule, signed).values())
        insert_generation(db, first)
        listing_synced(folder)
    return first


def _check_rule(rule: StopRule) -> None:
    """Raises LedgerError about one that never refuses; earlier versions began ledgers with it."""
    if rule.refuse and not rule.questions:
        raise LedgerError(
            "--rule.questions 0 measures nothing, so that --rule.refuse never refuses; ask some "
            "questions, or leave --rule.refuse out."
        )


def signed_by(author: str | None) -> Signed:
    """The author, who is the user where none is given, and the time."""
    if author is None:
        try:
            author = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a container may know no name
            author = "unknown"
    author = author.strip()
    if not author or not author.isprintable():
        raise LedgerError(f"The author is {author!r}, expected a name; change --author.")
    return Signed(author, now())


def refuse(method: str | None) -> None:
    """Raises EditorError for a method whose facts cannot be added and taken away."""
    if method == "malmen":
        return
    reason = NOT_ADDITIVE.get(str(method), "it is not known to add up")
    raise EditorError(
        f"A ledger cannot be kept by the method {method}: {reason}. Leave --method out, or give an "
        "editor of the method malmen."
    )


def _check_frames(encoder: Encoder, frames: tuple[str, ...]) -> None:
    """Raises EditorError unless the model can be asked in each of them."""
    for frame in RefineSettings(frames=frames).frames_for(encoder):
        framing(encoder, frame)


def _check_folder(folder: Path) -> None:
    """Raises MalmendError unless a ledger can begin there."""
    if not folder.is_dir():
        new_folder(folder)
        return
    if holds_tables(folder):
        raise LedgerError(f"{folder} holds a ledger already; give another folder.")
    # What an `init` that was killed left is written over; it begins with the file.
    own = (FILE, f"{FILE}-journal", EDITOR) if (folder / FILE).is_file() else ()
    other = [path.name for path in folder.glob("*") if path.name not in own]
    if other:
        raise LedgerError(f"{folder} is not empty (it holds {other[0]}); give another folder.")
    writable_folder(folder)


def _keep(ready: Editor, chosen: Choice, folder: Path, base: str) -> str:
    """Copies the editor into the ledger, byte for byte where it has a folder; its identity."""
    if chosen.saved is None:
        save_editor(ready, {"base": base, "editor": chosen.name}, folder)
    else:
        is_shipped = chosen.name.startswith(SHIPPED)
        short = chosen.name.removeprefix(SHIPPED)
        source = shipped("editors") / short if is_shipped else Path(chosen.name)
        folder.mkdir(exist_ok=True)
        for name in ("editor.json", str(chosen.saved.about["weights"])):
            shutil.copyfile(source / name, folder / name)
    identity = load_editor(folder).identity
    if chosen.saved is not None and identity != chosen.saved.identity:
        raise EditorError(f"The editor {chosen.name} changed while it was copied; try again.")
    synced(folder)
    listing_synced(folder)
    return identity


def _about(
    bench: Workbench,
    chosen: Choice,
    identity: str,
    frames: Sequence[str],
    rule: StopRule,
    signed: Signed,
) -> About:
    square = sum(
        site.weight.detach().cpu().double().square().sum().item() for site in bench.trunk.sites
    )
    loaded = bench.loaded
    return About(
        model=lasting(loaded.name),
        base=loaded.fingerprint,
        dtype=loaded.dtype,
        form=loaded.reading.form,
        editor=chosen.provenance(),
        identity=identity,
        weight_norm=square**0.5,
        rule=rule,
        created=signed.time,
        malmend=version("malmend"),
        bits=bits(loaded.model),
        settings=configuration_of(loaded.model),
        frames=list(frames),
        tokenizer=tokens_digest(loaded.tokenizer, in_chat=bool(frames)),
    )
