"""What holds of every method of the table, and of one that a user wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from methods_support import bytes_of

import command_support
import forms_folders as folders
import malmend
from command_support import malmend as command
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Fact
from malmend.methods.method import Found
from malmend.methods.table import METHODS
from malmend.models.load import load_model
from malmend.models.sites import Site, find_sites
from malmend.patch_file import load_patch

tiny = command_support.tiny
cache = command_support.cache

FEW = [
    replace(fact, subject=fact.prompt.split()[3]) for fact in command_support.make_facts(3, seed=5)
]
# Small and quick, and strong enough to be seen.
QUICK = {
    "ft": {"epochs": 2, "layers": 1, "rate": 1e-2},
    "ft-kl": {"epochs": 1, "layers": 1, "rate": 1e-2},
    "lora": {"epochs": 2, "rate": 1e-2},
    "ultraedit": {"eta": 0.01},
    "memit": {"steps": 3, "alpha": 1.0},
}
ALL = pytest.mark.parametrize("name", METHODS)


def quick(name: str):
    return METHODS[name](**QUICK[name])


def test_every_method_is_tried_here():
    assert set(QUICK) == set(METHODS)
    assert {name: kind().name for name, kind in METHODS.items()} == {name: name for name in METHODS}


@ALL
def test_the_patch_is_found_twice_alike_and_nothing_else_changes(name, tiny):
    before, state = bytes_of(tiny.loaded.model), torch.get_rng_state()
    one = malmend.edit(tiny.loaded, FEW, method=quick(name)).patch
    torch.manual_seed(1234)
    other = malmend.edit(tiny.loaded, FEW, method=quick(name)).patch
    torch.set_rng_state(state)
    assert bytes_of(tiny.loaded.model) == before
    assert list(one.factors) == list(other.factors)
    for site in one.factors:
        assert one.shift(site).any()
        assert torch.equal(one.shift(site), other.shift(site))
    assert not any(parameter.requires_grad for parameter in tiny.loaded.model.parameters())


@pytest.mark.parametrize("name", [*METHODS, "ultraedit, fact by fact"])
def test_the_patch_holds_all_of_what_was_found(name, tiny, monkeypatch):
    """A rank that is said too small would cut a shift in silence."""
    method = METHODS["ultraedit"](0.01, batch=1) if "," in name else quick(name)
    find, found = type(method).find, []
    monkeypatch.setattr(
        type(method), "find", lambda *given: found.append(find(*given)) or found[-1]
    )
    patch = malmend.edit(tiny.loaded, FEW, method=method).patch
    (done,) = found
    assert patch.factors.keys() == done.shifts.keys()
    for site, wanted in done.shifts.items():
        assert torch.linalg.matrix_rank(wanted) > 1
        # The factors are float32, each rounded once: some 1e-7 of the largest entry.
        least = 1e-6 * wanted.abs().max().item()
        torch.testing.assert_close(patch.shift(site).double(), wanted, rtol=1e-5, atol=least)


@ALL
def test_an_edit_reads_prompts_answers_and_subjects_only(name, tiny):
    bare = [Fact(f.id, f.prompt, f.answer, f.subject, line=f.line) for f in FEW]
    one = malmend.edit(tiny.loaded, FEW, method=quick(name)).patch
    other = malmend.edit(tiny.loaded, bare, method=quick(name)).patch
    assert all(torch.equal(one.shift(site), other.shift(site)) for site in one.factors)


@ALL
def test_the_header_says_method_and_settings(name, tiny, tmp_path):
    done = malmend.edit(tiny.loaded, FEW, tmp_path / "patch.safetensors", method=quick(name))
    said = load_patch(tmp_path / "patch.safetensors").provenance
    assert said["method"] == name
    assert QUICK[name].items() <= said["settings"].items()
    assert said["settings"]["end_of_answer"] == "eos"
    assert said["facts"] == 3
    assert done.edited == said["metrics"]["ES"]["token_ratio"]["edited"]


@ALL
def test_as_a_command(name, tiny, tmp_path, capsys):
    if name == "memit":
        pytest.skip("the facts of this folder name no subjects")
    options = [
        part for field, value in QUICK[name].items() for part in (f"--{name}.{field}", value)
    ]
    patch = tmp_path / "patch.safetensors"
    assert command("edit", tiny.model, tiny.facts, "--out", patch, "--method", name, *options) == 0
    assert f"Method: {name}." in capsys.readouterr().err
    assert command("eval", tiny.model, tiny.facts, "--patch", patch, "--text", "none") == 0
    assert load_patch(patch).provenance["method"] == name


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
@pytest.mark.parametrize("name", ["ft", "ft-kl", "lora", "ultraedit"])
def test_the_other_forms_of_model(name, family, tmp_path):
    model = load_model(
        folders.save_base(
            family, tmp_path / "base", classes=folders.CLASSES if family == "bert" else ()
        )
    )
    facts, before = folders.save_facts(family, tmp_path / "facts", count=4), bytes_of(model.model)
    done = malmend.edit(model, facts, method=quick(name), away=family == "bert")
    assert all(done.patch.shift(site).any() for site in done.patch.factors)
    assert bytes_of(model.model) == before


def test_settings_of_another_method_are_refused(tiny, tmp_path, capsys):
    patch = tmp_path / "patch.safetensors"
    edit = ("edit", tiny.model, tiny.facts, "--out", patch)
    assert command(*edit, "--method", "lora", "--ft.rate", 1) == 2
    assert "--ft.* are settings of the method ft, and the method is lora" in capsys.readouterr().err
    assert command(*edit, "--ultraedit.eta", 1) == 2
    assert "and the method is malmen; give --method ultraedit" in capsys.readouterr().err
    for option in (
        ["--editor", "none"],
        ["--layers", 2],
        ["--calibrate", tiny.calibrate],
        ["--refine.passes", 1],
    ):
        assert command(*edit, "--method", "ft", *option) == 2
        assert "The method ft takes neither an editor" in capsys.readouterr().err
    assert command(*edit, "--method", "lorra") == 2
    assert (
        "--method is 'lorra' (did you mean 'lora'?), expected 'malmen', 'mend', 'mend-single', 'ft'"
        in capsys.readouterr().err
    )
    for name in ("enn", "ke", "mend-single"):
        assert command(*edit, "--method", name) == 2
        said = f"{name} is trained before it edits; run `malmend train --method {name}`"
        assert said in " ".join(capsys.readouterr().err.split())
    assert not patch.exists()


@dataclass(frozen=True)
class Mine:
    """A method of a user's own: the weight shrinks."""

    share: float = 0.5
    name: str = "mine"
    end_of_answer: str = "eos"

    def sites_in(self, model) -> tuple[Site, ...]:
        return find_sites(model, 1)

    def find(self, bench, facts: Sequence[Fact], progress) -> Found:
        shifts = {
            site.name: -self.share * site.oriented(site.weight.detach()).double()
            for site in bench.trunk.sites
        }
        return Found(shifts, rank=10_000, said={"shrunk": True})


def test_a_method_of_ones_own(tiny):
    done = malmend.edit(tiny.loaded, FEW, method=Mine())
    (name,) = done.patch.factors
    weight = dict(tiny.loaded.model.named_parameters())[f"{name}.weight"]
    torch.testing.assert_close(done.patch.shift(name), -0.5 * weight.detach())
    said = done.patch.provenance
    assert (said["method"], said["shrunk"], said["settings"]["share"]) == ("mine", True, 0.5)
    report = malmend.eval(tiny.loaded, FEW, done.patch, decode_facts=0, text="none")
    assert report.edited["ES"].token_ratio == done.edited


def test_a_method_that_diverges_writes_nothing(tiny, tmp_path):
    patch = tmp_path / "patch.safetensors"
    with pytest.raises(EditorError, match=r"holds NaN or infinity, .* lower the rate of mine"):
        malmend.edit(tiny.loaded, FEW, patch, method=Mine(share=float("nan")))
    assert not patch.exists()


def test_settings_of_an_editor_beside_a_method(tiny):
    with pytest.raises(MalmendError, match="The method mine takes neither an editor"):
        malmend.edit(tiny.loaded, FEW, method=Mine(), settings=malmend.training_free())
