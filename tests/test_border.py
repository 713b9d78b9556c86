"""Python's arguments of other types than they are annotated with: one sentence, before any work."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_type_hints

import numpy
import pytest

import command_support
import malmend
from command_support import make_facts
from malmend.bench.results import Results
from malmend.bench.run import bench
from malmend.commands.continuations import continuations
from malmend.commands.finetune import finetune
from malmend.commands.learn import learn
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.settings import EditorSettings
from malmend.editors.train_settings import TrainSettings
from malmend.errors import MalmendError
from malmend.facts.fact import Fact
from malmend.facts.lint import default_id, skip_repeats
from malmend.files import writable
from malmend.given import checked
from malmend.methods.editor_choice import choose
from malmend.methods.ft import FineTuning
from malmend.methods.ultraedit import UltraEdit
from malmend.models.descent import Descent

if TYPE_CHECKING:
    from fractions import Fraction

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(2)
ledger = malmend.ledger
# What is called, with what of it is wrong, and what is said of that.
WRONG: list[tuple[Callable[..., Any], Sequence[object], Mapping[str, object], str]] = [
    (malmend.cache, (), {"clear": "no"}, "clear is 'no', expected True or False; "),
    (malmend.cache, (), {"clear": 1}, "clear is 1, expected True or False; "),
    (malmend.ask, ("M", "P"), {"force": "no"}, "force is 'no', expected True or False"),
    (malmend.ask, ("M",), {"prompt": 5}, "prompt is 5, expected a text"),
    (malmend.ask, ("M", "P"), {"max_new_tokens": "3"}, "max_new_tokens is '3', expected a whole"),
    (malmend.ask, ("M", "P"), {"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole"),
    (malmend.ask, (5, "P"), {}, "model is 5, expected a text or LoadedModel"),
    (malmend.edit, ("M", FEW), {"refine": {"passes": 1}}, "refine is {'passes': 1}, expected Ref"),
    (malmend.edit, ("M", FEW), {"settings": {"layers": 1}}, "settings is {'layers': 1}, expected "),
    (malmend.edit, ("M", FEW), {"trunk": {"batch_tokens": 9}}, "trunk is {'batch_tokens': 9}, exp"),
    (malmend.edit, ("M", FEW), {"calibration": {}}, "calibration is {}, expected Calibration"),
    (malmend.edit, ("M", FEW), {"memory": 4}, "memory is 4, expected a text or None"),
    (malmend.edit, ("M", FEW), {"out": 5}, "out is 5, expected a text or a Path or None"),
    (malmend.edit, ("M", FEW, 5), {}, "out is 5, expected a text or a Path or None"),
    (malmend.edit, ("M", FEW), {"limit": True}, "limit is True, expected a whole number or None"),
    (malmend.edit, ("M", FEW), {"progress": "bar"}, "progress is 'bar', expected a function"),
    (malmend.train, ("M", FEW), {"out": "o", "training": {"steps": 1}}, "training is {'steps': 1}"),
    (malmend.train, ("M", FEW, None), {}, "out is None, expected a text or a Path"),
    (malmend.train, ("M", FEW, "o"), {"locality": 5}, "locality is 5, expected a text or a Path"),
    (malmend.eval, ("M", FEW), {"limit": 2.5}, "limit is 2.5, expected a whole number or None"),
    (malmend.eval, ("M", FEW), {"decode_facts": "2"}, "decode_facts is '2', expected a whole"),
    (malmend.eval, ("M", FEW), {"text": 5}, "text is 5, expected a text or a Path or None"),
    (malmend.eval, ("M", FEW), {"report": 5}, "report is 5, expected a text or a Path or None"),
    (malmend.export, ("P", "F"), {"rank": True}, "rank is True, expected a whole number or None"),
    (malmend.export, ("P", "F"), {"rank": "8"}, "rank is '8', expected a whole number or None"),
    (malmend.export, ("P", "F"), {"to": None}, "to is None, expected 'lora' or 'merged'"),
    (malmend.export, ("P", "F"), {"to": "lore"}, "to is 'lore'; did you mean 'lora'? expected"),
    (malmend.conflicts, ("M", ["P", 5]), {}, "patches is ['P', 5], expected several, each a text"),
    (
        malmend.conflicts,
        ("M", "PQ"),
        {},
        "patches is 'PQ', expected several, each a text or a Path",
    ),
    (malmend.diff, ("M", "N"), {"out": 5}, "out is 5, expected a text or a Path or None"),
    (malmend.inspect, (5,), {}, "thing is 5, expected a text or a Path"),
    (malmend.load_patch, (None,), {}, "path is None, expected a text or a Path"),
    (malmend.push, (5, "org/name"), {}, "folder is 5, expected a text or a Path"),
    (malmend.demo, (), {"facts": "9"}, "facts is '9', expected a whole number"),
    (finetune, ("M", "F", "o"), {"limit": "2"}, "limit is '2', expected a whole number or None"),
    (learn, ("M", FEW, "o", 5), {}, "method is 5, expected a text"),
    (continuations, ("M", "T", "o"), {"tokens": "2"}, "tokens is '2', expected a whole number"),
    (ledger.rollback, ("L", True), {}, "generation is True, expected a whole number"),
    (ledger.rollback, ("L", 1.0), {}, "generation is 1.0, expected a whole number"),
    (ledger.rollback, ("L", "1"), {}, "generation is '1', expected a whole number"),
    (ledger.revoke, ("L", 5), {}, "ids is 5, expected a text or several, each a text"),
    (ledger.add, ("L", FEW), {"limit": "2"}, "limit is '2', expected a whole number or None"),
    (ledger.replace, ("L", FEW), {"strict": 0}, "strict is 0, expected True or False"),
    (ledger.init, ("L", "M"), {"author": 5}, "author is 5, expected a text or None"),
    (ledger.patch, ("L", 5), {}, "out is 5, expected a text or a Path or None"),
    (ledger.list_facts, (5,), {}, "ledger is 5, expected a text or a Path"),
    (ledger.history, (5,), {}, "ledger is 5, expected a text or a Path"),
    (ledger.verify, ("L",), {"wait": "1"}, "wait is '1', expected a number"),
]


@pytest.mark.parametrize(("function", "given", "named", "said"), WRONG)
def test_it_is_refused_in_one_sentence(function, given, named, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MalmendError) as refused:
        function(*given, **named)
    assert said in str(refused.value)
    assert str(refused.value).endswith(f"; see help({function.__name__}).")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_not_to_be_cleared_stays(cache):
    (cache / "spill").mkdir(parents=True)
    (cache / "spill" / "held").write_text("x")
    with pytest.raises(MalmendError):
        malmend.cache(clear="no")
    assert (cache / "spill" / "held").read_text() == "x"


class Kind(Protocol):
    """Nothing can be asked of it at run time."""

    size: int


@dataclass(frozen=True)
class Sized:
    """Does not look at its field."""

    size: int = 1


@checked()
def taken(
    count: int,
    share: float = 0.5,
    each: Sequence[str] = (),
    called: Callable[[int], None] | None = None,
    kind: Kind | None = None,
    any_of: Iterable[int] | Mapping[str, int] | None = None,
    one: Fraction | None = None,
    word: Literal["a", "b"] = "a",
    sized: Sized | None = None,
    further: object = None,
    untyped=None,
) -> str:
    """Says what it was given."""
    return f"{count} {share} {list(each)}"


def test_what_is_right_or_cannot_be_judged_is_taken():
    assert taken(numpy.int64(3), numpy.float32(0.5)) == "3 0.5 []"
    assert taken(3, 1, ("a", "b")) == "3 1 ['a', 'b']"
    assert taken(count=3, each=numpy.array(["a"])) == taken(3, each=[numpy.str_("a")])
    unjudged = {"called": print, "kind": 3, "any_of": "x", "one": 3, "untyped": "y"}
    for name, value in unjudged.items():
        assert taken(3, **{name: value})
    for wrong in ({"word": "c"}, {"each": ["a", 1]}, {"each": "a"}, {"called": 3}):
        with pytest.raises(MalmendError, match=f"{next(iter(wrong))} is "):
            taken(3, **wrong)
    with pytest.raises(MalmendError, match=r"sized\.size is 2\.5, expected a whole number; see"):
        taken(3, sized=Sized(2.5))
    with pytest.raises(TypeError, match=r"missing a required argument: 'count'"):
        taken()
    with pytest.raises(TypeError, match="nothing"):
        malmend.cache(nothing=1)


def test_a_models_folder_may_be_a_path(tiny, tmp_path):
    there = Path(tiny.model)
    asked = (malmend.ask(one, "The capital of", max_new_tokens=2) for one in (there, tiny.model))
    first, second = asked
    assert first == second
    out = tmp_path / "patch"
    malmend.edit(there, FEW, editor="none", calibrate=tiny.calibrate, text=tiny.text, out=out)
    assert malmend.load_patch(out).base == malmend.load_model(tiny.model).fingerprint


def test_what_a_function_judges_itself_is_left_to_it():
    @checked("facts")
    def judging(facts: Sequence[str], limit: int = 1) -> object:
        return facts

    assert judging(5) == 5
    with pytest.raises(MalmendError):
        judging(5, "1")


def test_help_and_types_are_the_functions_own():
    assert inspect.signature(malmend.ask).parameters["max_new_tokens"].default == 32
    assert get_type_hints(malmend.ask)["max_new_tokens"] is int
    assert malmend.ask.__doc__ == malmend.ask.__wrapped__.__doc__
    assert malmend.ask.__doc__.startswith("Lets the model answer")
    assert (malmend.ask.__name__, malmend.ask.__module__) == ("ask", "malmend.commands.ask")


def test_every_function_of_the_package_checks_what_it_is_given():
    """A new command is not forgotten."""
    words = [getattr(malmend, name) for name in malmend.__all__]
    words += [getattr(ledger, name) for name in ledger.__all__]
    plain = {"published", "training_free", "published_training", "prepared", "save_patch"}
    plain |= {"applied", "load_model", "read_facts"}
    for word in words:
        if inspect.isfunction(word) and word.__name__ not in plain:
            assert hasattr(word, "__wrapped__"), word.__name__


@pytest.mark.parametrize(
    ("function", "given", "name"),
    [
        (malmend.edit, ("M", FEW, ""), "out"),
        (malmend.edit, ("M", ""), "facts"),
        (malmend.eval, ("M", FEW, ""), "patch"),
        (malmend.train, ("M", FEW, ""), "out"),
        (malmend.export, ("P", ""), "folder"),
        (ledger.init, ("", "M"), "ledger"),
        (bench, ("P", ""), "out"),
        (malmend.load_patch, ("",), "path"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(function, given, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MalmendError, match=f"{name} is empty, expected a path; give one"):
        function(*given)
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_a_name_is_refused_on_the_command_line(tiny, capsys):
    assert command_support.malmend("eval", tiny.model, tiny.facts, "--report", "") == 2
    assert "report is empty, expected a path" in capsys.readouterr().err
    for path, said in (("", "empty"), ("nosuch/", "nosuch/ ends like a folder")):
        with pytest.raises(MalmendError, match=said):
            writable(path)


def test_an_editor_is_found_by_the_name_that_patches_say(tiny):
    with pytest.raises(MalmendError, match="did you mean 'none'"):
        malmend.edit(tiny.loaded, FEW, editor="non")
    assert choose("shipped:smollm2-135m").name == "shipped:smollm2-135m"
    assert choose("shipped:smollm2-135m").saved is not None
    with pytest.raises(MalmendError, match="did you mean 'shipped:smollm2-135m'"):
        choose("shipped:smollm-135m")
    for outside in ("shipped:..", "shipped:", "shipped:/"):
        with pytest.raises(MalmendError, match="carries no editor"):
            choose(outside)


@pytest.mark.parametrize("much", [1e300, 1e308, 1e13])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (EditorSettings, "eta"),
        (EditorSettings, "end_weight"),
        (FineTuning, "rate"),
        (FineTuning, "decay"),
        (FineTuning, "locality"),
        (UltraEdit, "eta"),
        (UltraEdit, "ridge"),
        (CalibrationSettings, "ridge"),
        (CalibrationSettings, "asked"),
        (TrainSettings, "network_rate"),
        (TrainSettings, "clip"),
        (Descent, "rate"),
        (Descent, "end_nll"),
    ],
)
def test_a_number_that_single_precision_does_not_hold_is_refused(kind, name, much):
    """Whole edits once ended in a traceback of torch's."""
    with pytest.raises(MalmendError, match=rf"{name} .*expected .*\b1e\+12"):
        kind(**{name: much})
    kind(**{name: 1e12})


def test_so_is_one_that_is_zero_there():
    for name in ("eta", "end_weight"):
        with pytest.raises(MalmendError, match=f"{name} is 1e-300, expected a number above 0"):
            EditorSettings(**{name: 1e-300})
    with pytest.raises(MalmendError, match="seed"):
        FineTuning(seed=10**30)


def test_one_prompt_spelt_in_two_ways_is_one_prompt():
    """Of characters with accents: composed, or letter and accent apart."""
    here, there = Fact("a", "Zoë lives in", "Köln"), Fact("b", "Zoe\u0308 lives in", "Rom")
    [skipped] = skip_repeats([here, there])[1]
    assert skipped.kind == "contradiction"
    [skipped] = skip_repeats([here, Fact("b", "Zoe\u0308 lives in", "Ko\u0308ln")])[1]
    assert skipped.kind == "duplicate"
    assert default_id("Zoë") != default_id("Zoe\u0308")  # as ledgers have kept them


def test_a_full_disk_under_a_bench_names_its_file(tmp_path, monkeypatch):
    """As of every other command: 2, with the file; it once was 1, without."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("malmend.bench.results.os.fsync", full)
    with pytest.raises(MalmendError, match=r"cells.jsonl cannot be written \(No space left on"):
        Results(tmp_path).add("key", {"m": 1})
