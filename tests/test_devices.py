"""Whole commands with the model on devices that are not there, one and two of them.

The patch is that of the CPU bit for bit: so nothing was computed where it does not lie, and what
crosses is moved (devices_support.py says what would raise).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import command_support
import devices_support
import helpers
import malmend
from command_support import CALIBRATION, Tiny, as_lines, make_facts, make_model
from devices_support import KIND, device, devices, spread
from malmend.commands.conflicts import conflicts
from malmend.commands.diff import diff
from malmend.commands.export import export
from malmend.commands.learn import learn
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.network import EditorNetwork, NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.editors.train_settings import TrainSettings
from malmend.methods.table import METHODS
from malmend.methods.trained import TRAINED
from malmend.models.load import LoadedModel, prepared
from malmend.numerics.moments import RunningMoments
from malmend.patch import Patch

tiny = command_support.tiny
cache = command_support.cache

FEW = [replace(fact, subject=fact.prompt.split()[3]) for fact in make_facts(3, seed=5)]
TWO = replace(training_free(), layers=2)
QUICK = {
    "ft": {"epochs": 2, "layers": 2, "rate": 1e-2},
    "ft-kl": {"epochs": 1, "layers": 2, "rate": 1e-2},
    "lora": {"epochs": 2, "rate": 1e-2},
    "ultraedit": {"eta": 0.01},
    "memit": {"steps": 3, "alpha": 1.0},
}
LEARNED: dict[str, dict[str, Any]] = {
    "enn": {"steps": 2, "layers": 2, "inner_steps": 1, "rate": 1e-3},
    "ke": {"steps": 2, "layers": 2, "hidden": 4, "facts_per_step": 2},
}
ONCE, FREE = RefineSettings(passes=1, rounds=0), RefineSettings()
EDITS: dict[str, dict[str, Any]] = {
    "solved again": {"refine": RefineSettings(passes=2, rounds=0)},
    "settled": {"refine": RefineSettings(passes=1, rounds=1, steps=2)},
}


def there(second: int) -> LoadedModel:
    """The model of ``tiny``, from block ``second`` on with all that follows on another device."""
    tokenizer = helpers.byte_level()
    model = spread(make_model(tokenizer), second)
    return prepared(model, tokenizer, "there")


def same(one: Patch, other: Patch) -> bool:
    assert all(one.shift(site).any() for site in one.factors)
    return list(one.factors) == list(other.factors) and all(
        torch.equal(one.shift(site), other.shift(site)) for site in one.factors
    )


# Of six blocks the last, which is edited, or none.
SECOND = pytest.mark.parametrize(
    "second",
    [pytest.param(5, id="two"), pytest.param(6, id="one device", marks=pytest.mark.slow)],
)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda one, _: one + torch.ones(2, 2),
        lambda one, _: torch.ones(2, 2) @ one,
        lambda one, other: one * other,
        lambda one, other: torch.stack([one, other]),
        lambda one, _: one[torch.tensor([0], device=device(1))],
        lambda one, _: one.gather(0, torch.zeros(1, 2, dtype=torch.long)),
        lambda one, _: one.index_copy(0, torch.tensor([0], device=device(0)), torch.ones(1, 2)),
        lambda one, _: one.numpy(),
    ],
)
def test_what_lies_elsewhere_is_refused(mixed):
    with devices():
        one, other = (torch.ones(2, 2, device=device(number)) for number in (0, 1))
        with pytest.raises((RuntimeError, TypeError), match=r"xla:0"):
            mixed(one, other)


def test_what_a_device_takes_is_taken():
    with devices():
        one = torch.ones(2, 2, device=device(0), requires_grad=True)
        other = (2 * one).to(device(1))
        loss = (other @ torch.eye(2).to(other) + torch.tensor(1.0))[torch.tensor([0])].sum()
        assert loss.device == device(1)
        assert loss.item() == 6.0
        loss.backward()
        assert one.grad is not None
        assert one.grad.device == device(0)
        assert one.grad.tolist() == [[2.0, 2.0], [0.0, 0.0]]
        assert other.detach().cpu().numpy().sum() == 8.0


@pytest.fixture
def crossings(monkeypatch):
    """Shape, dtype and destination of every tensor that goes from one device to another."""
    found, forward = [], devices_support._Moved.forward

    def moved(ctx: Any, source: torch.Tensor, place: torch.device) -> torch.Tensor:
        found.append((tuple(source.shape), source.dtype, place))
        return forward(ctx, source, place)

    monkeypatch.setattr(devices_support._Moved, "forward", staticmethod(moved))
    return found


def test_the_matrices_of_a_prior_stay_where_they_are(crossings):
    settings = training_free()
    moments = [RunningMoments(width) for width in (9, 5)]
    for one in moments:
        one.add(torch.randn(20, len(one.mean_F)))
    priors = {term: torch.eye(9) for term in settings.terms}
    editor = Editor(settings, {"site": (5, 9)}, {"site": SiteStatistics(*moments, priors)})
    order, kept = list(editor.state_dict()), editor.prior(0, 7).matrices_KK
    with devices():
        prior = editor.on(device(0)).prior(0, 7)
        assert prior.device == editor.key_mean_0.device == device(0)
        assert (9, 9) not in [shape for shape, *_ in crossings]
        assert [one.data_ptr() for one in prior.matrices_KK] == [one.data_ptr() for one in kept]
        prior.factor()
    assert list(editor.state_dict()) == order
    assert crossings.count(((9, 9), torch.float32, device(0))) == len(priors)
    assert ((9, 9), torch.float64, device(0)) not in crossings  # which is twice as much


@SECOND
@pytest.mark.parametrize("how", EDITS)
def test_an_edit(how, second, tiny):
    asked = {"settings": TWO, "calibration": CALIBRATION, **EDITS[how]}
    asked |= {"calibrate": tiny.calibrate, "text": tiny.text}
    here = malmend.edit(tiny.loaded, FEW, **asked).patch
    with devices():
        found = malmend.edit(there(second), FEW, **asked).patch
    assert same(here, found)


SOLVED = {"malmen": "factor network", "mend": "network"} | dict.fromkeys(
    [*EDITS, "ultraedit", "memit"], "factor"
)


@pytest.mark.parametrize("how", SOLVED)
def test_networks_and_systems_are_where_the_model_is(how, tiny, tmp_path, monkeypatch):
    places: dict[str, set[str]] = {}

    def watch(what: str, module: Any, name: str, at: int) -> None:
        real = getattr(module, name)

        def watched(*given: Any, **more: Any) -> Any:
            places.setdefault(what, set()).add(given[at].device.type)
            return real(*given, **more)

        monkeypatch.setattr(module, name, watched)

    watch("factor", torch.linalg, "cholesky_ex", 0)
    watch("network", EditorNetwork, "forward", 1)
    data = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    with devices():
        if how in ("malmen", "mend"):
            trained_on(there(6), how, tiny, tmp_path)
        elif how in EDITS:
            malmend.edit(there(6), FEW, settings=TWO, **data, **EDITS[how])
        else:
            malmend.edit(there(6), FEW, method=METHODS[how](**QUICK[how]))
    assert places == {what: {KIND} for what in SOLVED[how].split()}


@SECOND
@pytest.mark.parametrize("name", METHODS)
def test_other_methods(name, second, tiny):
    here = malmend.edit(tiny.loaded, FEW, method=METHODS[name](**QUICK[name])).patch
    with devices():
        found = malmend.edit(there(second), FEW, method=METHODS[name](**QUICK[name])).patch
    assert same(here, found)


@SECOND
def test_evaluation(second, tiny, tmp_path):
    patch = malmend.edit(tiny.loaded, FEW, method=METHODS["ft"](**QUICK["ft"])).patch
    here = malmend.evaluate(tiny.loaded, FEW, patch)
    with devices():
        found = malmend.evaluate(there(second), FEW, patch)
    assert replace(here, about={}) == replace(found, about={})


def trained_on(loaded: LoadedModel, name: str, tiny: Tiny, folder: Path) -> Patch:
    """Of an editor or another trained method, after two steps, what it makes of the facts."""
    facts = make_facts(6, seed=5)
    if name in LEARNED:
        settings = TRAINED[name].settings(**LEARNED[name])
        learn(loaded, facts, folder, name, settings)
    else:
        short = TrainSettings(facts_per_step=3, steps=1, network_rate=1e-3, chunk=9)
        editor = EditorSettings(method=name, layers=2, network=NetworkSettings(rank=4))
        data = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
        for settings in (short, replace(short, steps=2)):  # the second goes on with the first
            malmend.train(loaded, facts, folder, None, editor, settings, **data)
    return malmend.edit(loaded, FEW, editor=folder, refine=ONCE if name == "malmen" else FREE).patch


@SECOND
@pytest.mark.parametrize("name", ["malmen", "mend", *LEARNED])
def test_trained_methods(name, second, tiny, tmp_path):
    here = trained_on(tiny.loaded, name, tiny, tmp_path / "here")
    with devices():
        found = trained_on(there(second), name, tiny, tmp_path / "there")
    assert same(here, found)


def ledger_of(loaded: LoadedModel, tiny: Tiny, folder: Path) -> tuple[Patch, Any]:
    """The patch of a ledger that facts came to and went from; what verify says."""
    data = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    rule = malmend.ledger.StopRule(questions=8)
    malmend.ledger.init(folder, loaded, "none", TWO, rule=rule, author="me", **data)
    malmend.ledger.add(folder, FEW, model=loaded, author="me")
    malmend.ledger.revoke(folder, [FEW[0].id], author="me")
    rows = malmend.ledger.verify(folder, loaded).rows
    return malmend.ledger.patch(folder, f"{folder}.patch"), [one.reply for one in rows]


@SECOND
def test_a_ledger(second, tiny, tmp_path):
    here, said = ledger_of(tiny.loaded, tiny, tmp_path / "here")
    with devices():
        found, said_there = ledger_of(there(second), tiny, tmp_path / "there")
    assert same(here, found)
    assert said == said_there


@SECOND
@pytest.mark.parametrize("to", ["merged", "lora"])
def test_exports_and_conflicts(to, second, tiny, tmp_path):
    paths = [tmp_path / name for name in ("one", "two")]
    for path, name in zip(paths, ("ft", "ultraedit"), strict=True):
        malmend.edit(tiny.loaded, FEW, method=METHODS[name](**QUICK[name]), out=path)
    (facts := tmp_path / "facts.jsonl").write_text(as_lines(FEW))

    def asked(loaded: LoadedModel, folder: Path) -> tuple[Any, ...]:
        exported = export(paths[0], folder, to=to, model=loaded, facts=facts)
        met = conflicts(loaded, paths, [facts, facts])
        moved = diff(loaded, tiny.loaded)
        return exported.metrics, met.meetings, met.metrics, moved.comparison

    here = asked(tiny.loaded, tmp_path / "here")
    with devices():
        assert asked(there(second), tmp_path / "there") == here
