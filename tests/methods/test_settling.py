"""Where settling is kept: any change of what the solves and it depend on is another place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import command_support
import malmend
from malmend.editors import draws
from malmend.editors.refine import RefineSettings
from malmend.methods import by_editor, settling

tiny = command_support.tiny
cache = command_support.cache

FACTS = command_support.make_facts(3)


@pytest.fixture
def settled(tiny, monkeypatch):
    """What an edit of two solves and some steps settles, and in what metric it would."""
    given = []

    def stopped(*all_of_it) -> None:
        given.extend(all_of_it)
        raise KeyboardInterrupt

    monkeypatch.setattr(draws, "FEWEST", 4)
    monkeypatch.setattr(by_editor.Settling, "settled", stopped)
    refine = RefineSettings(passes=2, frames=("Well: {prompt}",), rounds=1.0, hold=4.0)
    with pytest.raises(KeyboardInterrupt):
        malmend.edit(
            tiny.loaded,
            FACTS,
            refine=refine,
            calibrate=tiny.calibrate,
            text=tiny.text,
            calibration=command_support.CALIBRATION,
        )
    one, _, priors, keeping, held = given
    return one, priors, keeping, held


def moved(editor, name):
    """The editor with one of its numbers a little greater."""
    found = copy.deepcopy(editor)
    with torch.no_grad():
        found.state_dict()[name].view(-1)[0] += 1e-3
    return found


def test_everything_that_the_solves_and_it_depend_on_names_the_place(settled, monkeypatch):
    one, priors, keeping, held = settled
    assert held is not None
    assert keeping
    bench, editor, refine = one.bench, one.editor, one.refine
    other = replace(one.questions[0], ids=(*one.questions[0].ids[:-1], 5))

    def place(one=one, priors=priors, keeping=keeping, held=held):
        return one.halfway(priors, keeping, held).path

    def of(name, **changes):
        return place(priors={**priors, name: replace(priors[name], **changes)})

    twin = replace(bench.loaded)
    vars(twin)["digest"] = "f" * 64
    found = {
        "model": place(replace(one, bench=replace(bench, loaded=twin))),
        "sites": place(replace(one, whole=one.whole.at(editor.names))),
        "question": place(replace(one, questions=[other, *one.questions[1:]])),
        "frames": place(replace(one, frames={n: [None] * 3 for n in one.frames})),
        "wordings": place(replace(one, worded=[*one.worded[1:], []])),
        "nothing held": place(held=None),
        "held": place(held=replace(held, questions=held.questions[1:])),
        "nothing kept": place(keeping=[]),
        "each kept": place(keeping=[replace(keeping[0], each=3), *keeping[1:]]),
        "weight": place(keeping=[replace(keeping[0], weight=5.0), *keeping[1:]]),
        "kept": place(keeping=[replace(keeping[0], held=held), *keeping[1:]]),
    }
    for name, value in {"gain": 1.5, "chat_gain": 2.0, "restore": 0.5, "rounds": 2.0}.items():
        found[name] = place(replace(one, refine=replace(refine, **{name: value})))
    for name in editor.state_dict():
        found[f"editor {name}"] = place(replace(one, editor=moved(editor, name)))
    changed = copy.deepcopy(editor)
    changed.settings = replace(editor.settings, descent=replace(editor.settings.descent, steps=1))
    found["settings"] = place(replace(one, editor=changed))
    beside = next(name for name in priors if name not in editor.names)
    matrices = priors[beside].matrices_KK
    tiny_bit = torch.zeros_like(matrices[0])
    tiny_bit[0, 0] = 1e-9
    found["moments"] = of(beside, matrices_KK=(matrices[0] + tiny_bit, *matrices[1:]))
    found["prior's weight"] = of(beside, weights=(7.0, *priors[beside].weights[1:]))
    found["ridge"] = of(beside, ridge=7.0)
    for name in ("UNSAID", "SETTLING"):
        with monkeypatch.context() as patch:
            patch.setattr(settling, name, [*getattr(settling, name), 1])
            found[name] = place()
    elsewhere = {"dtype": "bfloat16", "places_of": lambda _model: "cuda:0", "versions": dict}
    for name, value in elsewhere.items():
        with monkeypatch.context() as patch:
            patch.setattr(*(type(twin), name) if name == "dtype" else (settling, name), value)
            found[name] = place()
    assert place() == place()
    twice = [name for name, one in found.items() if [*found.values(), place()].count(one) > 1]
    assert not twice
