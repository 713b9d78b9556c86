"""KE: its shift by hand, its gradient by autograd through the edited model, training, folders."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from methods_support import FACTS, answer_log_probs, bench_of, bytes_of, encoded, nll
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call

import command_support
import forms_folders as folders
import malmend
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Question
from malmend.facts.readers import read_facts
from malmend.methods import ke, ke_training
from malmend.methods.ke import Ke, KeSettings, heard
from malmend.methods.ke_training import KeTrainer
from malmend.models.load import load_model
from malmend.progress import silent
from malmend.workbench import lay_out

cache = command_support.cache
tiny = command_support.tiny

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
SMALL = KeSettings(layers=2, hidden=12, start=0.05, facts_per_step=2, steps=6, rate=1e-2)


def trainer_of(family, settings=SMALL, facts=FACTS, locality=()):
    return KeTrainer(settings, bench_of(family, settings), facts, locality)


def stirred(trainer, scale=0.2):
    """The network in float64, every parameter moved, so that all of its outputs say something."""
    network, generator = trainer.network.double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in network.parameters():
            one += scale * torch.randn(one.shape, generator=generator, dtype=one.dtype)
    return trainer


def plain_gradients(bench, question):
    """dL/dW as the layers store it, by autograd through the whole model."""
    model = copy.deepcopy(bench.loaded.model)
    weights = [model.get_submodule(site.name).weight for site in bench.trunk.sites]
    for weight in weights:
        weight.requires_grad_(True)
    grads = torch.autograd.grad(nll(model, [question]), weights)
    return {site.name: grad for site, grad in zip(bench.trunk.sites, grads, strict=True)}


def by_hand(family, outputs, stored_grad):
    """The shift as the layer stores it, entry by entry from the paper's formula."""
    a, gamma, b, delta, c = outputs
    grad = stored_grad.T if family == "gpt2" else stored_grad
    a, b = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
    shift = torch.stack([gamma[v] * a * grad[v] + delta[v] * b for v in range(len(gamma))]) * (
        1e-3 / (1 + (-c).exp())
    )
    return shift.T if family == "gpt2" else shift


@FAMILIES
def test_the_networks_gradient_is_that_of_autograd_through_the_edited_model(family):
    trainer = stirred(trainer_of(family))
    trainer.multiplier = 0.7
    bench, model, encoder = trainer.bench, trainer.bench.loaded.model, trainer.bench.encoder
    drawn = trainer.draw(1)
    gen, loc = trainer.backward(drawn)
    found = [one.grad.clone() for one in trainer.network.parameters()]
    trainer.network.zero_grad()
    wanted_gen = wanted_loc = 0.0
    for edit, equivalent, other in drawn:
        question, unrelated = encoder.encode(edit), encoder.encode(other)
        said = trainer.network(heard(bench, question))
        weights = {
            f"{name}.weight": model.get_submodule(name).weight + by_hand(family, said[name], grad)
            for name, grad in plain_gradients(bench, question).items()
        }

        def logs(one: Encoded, weights=weights):
            ids = {"input_ids": torch.tensor([one.ids]), "use_cache": False}
            logits = functional_call(model, weights, kwargs=ids).logits[0]
            return logits[list(one.sources)].log_softmax(-1)

        asked, before = encoder.encode(equivalent), answer_log_probs(model, unrelated)
        right = logs(asked).gather(1, torch.tensor(asked.labels)[:, None])
        wanted_gen = wanted_gen - right.sum() / len(drawn)
        kl = (before.exp() * (before - logs(unrelated))).sum()
        wanted_loc = wanted_loc + kl / len(drawn)
    (wanted_gen + 0.7 * wanted_loc).backward()
    assert gen == pytest.approx(wanted_gen.item(), rel=1e-9)
    assert loc == pytest.approx(wanted_loc.item(), rel=1e-7)
    assert loc > 1e-6
    assert all(row.norm() > 0 for row in trainer.network.marks_2H.grad)
    for (name, one), grad in zip(trainer.network.named_parameters(), found, strict=True):
        assert one.grad.norm() > 0, name
        torch.testing.assert_close(grad, one.grad, rtol=1e-6, atol=1e-9 * one.grad.abs().max())


@FAMILIES
def test_the_shift_by_hand(family):
    trainer = stirred(trainer_of(family), 0.5)
    (question, *_), bench = encoded(trainer.bench), trainer.bench
    said = trainer.network(heard(bench, question))
    found = ke.shifts_of(trainer.network, bench, question)
    assert len(found) == 2
    for site in bench.trunk.sites:
        wanted = by_hand(family, said[site.name], plain_gradients(bench, question)[site.name])
        value, key = site.shape_VK
        assert (value, key) == (16, 24)  # so that a mix-up of the two would be seen
        assert [len(one) for one in said[site.name]] == [key, value, key, value, 1]
        torch.testing.assert_close(site.oriented(found[site.name]), wanted, rtol=1e-9, atol=1e-12)


def last_state(lstm, rows_TH, way):
    """An LSTM's last state in one direction, gate by gate: input, forget, cell, output."""
    into, over, bias_in, bias_over = (
        getattr(lstm, f"{part}_l0{way}")
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    state = cell = torch.zeros(over.shape[1], dtype=rows_TH.dtype)
    for row in rows_TH.flip(0) if way else rows_TH:
        gates = into @ row + bias_in + over @ state + bias_over
        taken, kept, new, shown = gates.chunk(4)
        cell = kept.sigmoid() * cell + taken.sigmoid() * new.tanh()
        state = shown.sigmoid() * cell.tanh()
    return state


def test_the_network_by_hand():
    trainer = stirred(trainer_of("llama"))
    network, (question, *_) = trainer.network, encoded(trainer.bench)
    parts = [part.double() for part in heard(trainer.bench, question)]
    first, second, third = (
        (one - one.mean(1, keepdim=True)) / (one.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        for one in parts
    )
    rows = torch.cat([first, network.marks_2H[:1], second, network.marks_2H[1:], third])
    read = torch.cat([last_state(network.lstm, rows, way) for way in ("", "_reverse")])
    said = network(parts)
    for at, (name, (value, key)) in enumerate(network.sites.items()):
        one, two = network.firsts[at], network.seconds[at]
        raw = two.weight @ (one.weight @ read + one.bias).tanh() + two.bias
        ends = [0, key, key + value, 2 * key + value, 2 * (key + value), 2 * (key + value) + 1]
        a, gamma, b, delta, c = (raw[i:j] for i, j in itertools.pairwise(ends))
        gamma = (gamma - 1) * 2 * SMALL.start * key / 1e-3
        for found, wanted in zip(said[name], (a, gamma, b, delta * key, c), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_network_begins_by_its_seed_and_leaves_every_generator_as_it_was(monkeypatch):
    seeded, sites = [], {"a": (3, 2)}
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    one, again, other = (ke.Network(replace(SMALL, seed=seed), 4, sites) for seed in (0, 0, 1))
    assert torch.equal(one.marks_2H, again.marks_2H)
    assert not torch.equal(one.marks_2H, other.marks_2H)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


@FAMILIES
def test_an_untrained_network_descends_the_gradient(family):
    trainer = trainer_of(family)
    for question in encoded(trainer.bench):
        found = ke.shifts_of(trainer.network.double(), trainer.bench, question)
        grads = plain_gradients(trainer.bench, question)
        for site in trainer.bench.trunk.sites:
            wanted = -SMALL.start * site.oriented(grads[site.name])
            torch.testing.assert_close(found[site.name], wanted, rtol=1e-6, atol=1e-12)


def test_the_network_hears_prompt_old_and_new_answer():
    trainer = stirred(trainer_of("llama"))
    (question, *_), model = encoded(trainer.bench), trainer.bench.loaded.model
    table = model.get_input_embeddings().weight
    said = answer_log_probs(model, question).argmax(-1)
    parts = heard(trainer.bench, question)
    for part, ids in zip(parts, (question.prompt, said.tolist(), question.labels), strict=True):
        assert torch.equal(part, table[list(ids)])
    whole = trainer.network(parts)["model.layers.1.mlp.down_proj"].delta_V
    for at in range(3):  # each of them has a say
        others = [part.flip(0) if at == here else part for here, part in enumerate(parts)]
        one = trainer.network(others)["model.layers.1.mlp.down_proj"].delta_V
        assert (one - whole).norm() > 1e-4 * whole.norm()


@FAMILIES
def test_training_lowers_the_loss_and_reaches_every_parameter(family):
    settings = replace(SMALL, facts_per_step=3, steps=30, rate=3e-2, margin=10.0, decay=1.0)
    trainer = trainer_of(family, settings, FACTS[:3])
    question = encoded(trainer.bench)[0]
    before = [one.clone() for one in trainer.network.parameters()]
    said = trainer.network(heard(trainer.bench, question))
    touched, records = set(), []
    while len(records) < settings.steps:
        records.append(trainer.take_step())
        names = trainer.network.named_parameters()
        touched |= {name for name, one in names if one.grad.abs().max() > 0}
    assert touched == {name for name, _ in trainer.network.named_parameters()}
    first, last = (sum(one.gen for one in part) for part in (records[:5], records[-5:]))
    assert last < 0.9 * first
    for one, old in zip(trainer.network.parameters(), before, strict=True):
        assert not torch.equal(one, old)
    after = trainer.network(heard(trainer.bench, question))
    for name in said:
        for one, old in zip(after[name], said[name], strict=True):
            assert not torch.allclose(one, old)
    assert [one.step for one in records] == list(range(1, 31))
    for one in records:
        assert one.loss == pytest.approx(one.gen + one.multiplier * (one.loc - one.margin))


def test_the_multiplier_follows_the_constraint(monkeypatch):
    settings = replace(SMALL, margin=0.5, decay=0.5, floor=0.1, multiplier_rate=2.0, steps=9)
    trainer, losses = trainer_of("llama", settings), iter((0.9, 0.65, 0.125, 0.0, 0.0, 0.0, 2.0))
    monkeypatch.setattr(trainer, "backward", lambda drawn: (1.0, next(losses)))
    records = [trainer.take_step() for _ in range(7)]
    assert [one.margin for one in records] == [0.5, 0.25, 0.125, 0.1, 0.1, 0.1, 0.1]
    seen = [*(one.multiplier for one in records), trainer.multiplier]
    # Up while the KL is above the margin, as it is at it, down below it, never under 0, up again.
    assert seen == pytest.approx([1.0, 1.8, 2.6, 2.6, 2.4, 2.2, 2.0, 5.8])
    monkeypatch.setattr(trainer, "backward", lambda drawn: (1.0, -9.0))
    assert trainer.take_step().multiplier == pytest.approx(5.8)
    assert trainer.multiplier == 0


def test_a_step_sees_the_prompt_its_paraphrases_and_the_unrelated_questions():
    trainer = trainer_of("llama", replace(SMALL, facts_per_step=2))
    drawn = [trainer.draw(step) for step in range(200)]
    assert drawn == [trainer.draw(step) for step in range(200)]
    assert trainer_of("llama", replace(SMALL, seed=1)).draw(0) != drawn[0]
    for one, other in zip(drawn[0::2], drawn[1::2], strict=True):  # an epoch has two steps
        assert len({edit for edit, _, _ in one + other}) == 4
    by_edit = {fact.question: fact for fact in FACTS}
    seen = {question: set() for question in by_edit}
    for edit, equivalent, other in itertools.chain(*drawn):
        seen[edit].add(equivalent)
        assert other in by_edit[edit].unrelated
    for question, fact in by_edit.items():
        assert seen[question] == {question, *fact.equivalents}
    given = [Question("Lake Ora lies", "in Chile")]
    assert {one[2] for one in trainer_of("llama", locality=given).draw(0)} == set(given)


def saved(trainer, folder, steps=2):
    for _ in range(steps):
        trainer.take_step()
    trainer.save(folder)
    return Ke(str(folder))


@FAMILIES
def test_facts_together_get_the_sum_of_what_each_gets(family, tmp_path):
    trainer = trainer_of(family)
    method, bench = saved(trainer, tmp_path), trainer.bench
    before = bytes_of(bench.loaded.model)
    one, other, both = (
        method.find(bench, facts, silent).shifts for facts in (FACTS[:1], FACTS[1:2], FACTS[:2])
    )
    assert set(both) == {site.name for site in bench.trunk.sites}
    for name, shift_VK in both.items():
        assert one[name].norm() > 1e-4
        assert (one[name] - other[name]).norm() > 1e-4
        assert torch.equal(shift_VK, one[name] + other[name])
        found = ke.shifts_of(trainer.network, bench, encoded(bench)[0])[name]
        assert torch.equal(one[name], found.detach().double())
    assert bytes_of(bench.loaded.model) == before


@FAMILIES
def test_a_resumed_run_goes_on_bit_for_bit(family, tmp_path):
    whole = trainer_of(family)
    records = list(whole.run())
    assert len(records) == 6
    first = trainer_of(family, replace(SMALL, steps=3, save_every=7))  # these two may differ
    list(first.run())
    first.save(tmp_path)
    (tmp_path / "editor.json").unlink()
    torch.manual_seed(99)
    second = trainer_of(family)
    second.resume(tmp_path)
    assert second.step == 3
    again = [replace(one, seconds=0.0) for one in second.run()]
    assert again == [replace(one, seconds=0.0) for one in records[3:]]
    assert second.multiplier == whole.multiplier != 1
    for one, other in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_folder(tmp_path):
    trainer = trainer_of("gpt2")
    method = saved(trainer, tmp_path, 1)
    about = json.loads((tmp_path / "editor.json").read_text())
    assert (about["method"], about["step"]) == ("ke", 1)
    assert about["base"] == trainer.bench.loaded.fingerprint
    assert KeSettings(**about["settings"]) == SMALL
    assert about["sites"] == {f"transformer.h.{i}.mlp.c_proj": [16, 24] for i in (0, 1)}
    files = {"editor.json", about["weights"], "training.safetensors"}
    assert {one.name for one in tmp_path.iterdir()} == files
    (tmp_path / "training.safetensors").unlink()  # resuming needs it, editing does not
    assert (method.name, method.end_of_answer) == ("ke", "eos")
    names = [site.name for site in method.sites_in(trainer.bench.loaded.model)]
    assert names == list(about["sites"])
    found = method.find(trainer.bench, FACTS, silent)
    assert found.rank == 16
    assert found.said["settings"]["hidden"] == 12


@FAMILIES
def test_the_weights_are_as_they_were(family, monkeypatch):
    trainer = trainer_of(family)
    torch.manual_seed(1234)
    before, state = bytes_of(trainer.bench.loaded.model), torch.get_rng_state()
    trainer.take_step()
    assert bytes_of(trainer.bench.loaded.model) == before
    KeTrainer(SMALL, trainer.bench, FACTS, ())
    assert torch.equal(torch.get_rng_state(), state)

    def broken(trunk, judged, *rest):
        if not rest:  # the edit's own gradient
            return plain(trunk, judged)
        assert bytes_of(trainer.bench.loaded.model) != before
        raise RuntimeError("in the middle")

    plain = ke.meta_loss
    for module in (ke, ke_training):
        monkeypatch.setattr(module, "meta_loss", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.take_step()
    assert bytes_of(trainer.bench.loaded.model) == before
    assert not any(one.requires_grad for one in trainer.bench.loaded.model.parameters())


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_the_other_forms_of_model(family, tmp_path):
    classes = folders.PLACES[:2] if family == "bert" else ()  # words that the tokenizer knows
    loaded = load_model(folders.save_base(family, tmp_path / "base", classes=classes))
    facts = list(read_facts(folders.save_facts(family, tmp_path / "facts", count=4)))
    if classes:
        others = [tuple(Question(one.prompt) for one in fact.unrelated) for fact in facts]
        facts = [
            replace(fact, answer=classes[at % 2], alternative=None, unrelated=others[at])
            for at, fact in enumerate(facts)
        ]
    settings = replace(SMALL, layers=1, start=0.5, end_of_answer="none")
    bench = lay_out(loaded, settings.sites_in(loaded.model), "none")
    trainer, before = KeTrainer(settings, bench, facts, ()), bytes_of(loaded.model)
    method = saved(trainer, tmp_path / "ke")
    done = malmend.edit(loaded, facts, method=method)
    assert len(done.patch.factors) == (1 if family == "bert" else 2)
    assert all(done.patch.shift(site).any() for site in done.patch.factors)
    assert bytes_of(loaded.model) == before
    if family == "bert":  # of a class its name is heard
        question = bench.encoder.encode(facts[1].question)
        name = loaded.tokenizer.convert_tokens_to_ids(facts[1].answer)
        assert name > 3  # no special token
        table = loaded.model.get_input_embeddings().weight
        assert torch.equal(heard(bench, question)[2], table[[name]])


def test_as_a_method(tiny, tmp_path):
    settings = replace(SMALL, layers=1)
    bench = lay_out(tiny.loaded, settings.sites_in(tiny.loaded.model))
    method = saved(KeTrainer(settings, bench, FACTS, ()), tmp_path)
    one = malmend.edit(tiny.loaded, FACTS, tmp_path / "patch", method=method).patch
    assert one.provenance["method"] == "ke"
    assert one.provenance["editor"] == str(tmp_path)
    bare = [replace(f, paraphrases=(), unrelated=(), subject=None) for f in FACTS]
    other = malmend.edit(tiny.loaded, bare, method=method).patch
    assert all(torch.equal(one.shift(site), other.shift(site)) for site in one.factors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("layers", "hidden", "steps", "facts_per_step", "save_every")),
        *((name, 0.0) for name in ("start", "margin", "decay", "floor", "rate")),
        ("multiplier_rate", -1.0),
        ("rate", float("nan")),
        ("margin", float("inf")),
        ("decay", 1.01),
    ],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(EditorError, match=rf"ke\.{field} is .*, expected"):
        KeSettings(**{field: value})


def test_facts_that_cannot_be_trained_on():
    with pytest.raises(EditorError, match=r"Facts to train on: 1, .* at least 2"):
        trainer_of("llama", facts=FACTS[:1])
    lonely = [*FACTS[:3], replace(FACTS[3], unrelated=())]
    with pytest.raises(EditorError, match=r"The fact 'f3' has no unrelated question"):
        trainer_of("llama", facts=lonely)
    near = [*FACTS[:3], replace(FACTS[3], unrelated=(), neighbours=FACTS[0].unrelated)]
    trainer_of("llama", facts=near)


def test_a_model_without_embeddings(monkeypatch):
    bench = bench_of("llama", SMALL)

    def none():
        raise NotImplementedError

    monkeypatch.setattr(bench.loaded.model, "get_input_embeddings", none)
    with pytest.raises(EditorError, match=r"KE reads facts .* LlamaForCausalLM names none"):
        KeTrainer(SMALL, bench, FACTS, ())


def test_training_that_diverges(monkeypatch):
    trainer = trainer_of("llama")
    before = [one.clone() for one in trainer.network.parameters()]
    monkeypatch.setattr(trainer, "backward", lambda drawn: (float("nan"), 0.0))
    with pytest.raises(EditorError, match=r"diverged at step 1 .* lower ke\.rate.* another --out"):
        trainer.take_step()
    assert trainer.step == 0
    assert all(map(torch.equal, before, trainer.network.parameters()))


def test_another_model_or_other_settings(tmp_path):
    trainer = trainer_of("llama")
    method, about = saved(trainer, tmp_path, 1), tmp_path / "editor.json"
    other = KeTrainer(SMALL, bench_of("gpt2", SMALL), FACTS, ())
    foreign = "was trained for a base with fingerprint .* the model gpt2 has .*; train one"
    with pytest.raises(EditorError, match=foreign):
        method.find(other.bench, FACTS, silent)
    with pytest.raises(EditorError, match="in training on other model; give the same model"):
        other.resume(tmp_path)
    with pytest.raises(EditorError, match=r"edits model\.layers\.0.*this model has transformer\."):
        method.sites_in(other.bench.loaded.model)
    changed = trainer_of("llama", replace(SMALL, rate=0.5))
    with pytest.raises(EditorError, match=r"was trained with rate = 0\.01, now 0\.5 is asked for"):
        changed.resume(tmp_path)
    wrong = json.loads(about.read_text()) | {"method": "malmen"}
    about.write_text(json.dumps(wrong))
    with pytest.raises(EditorError, match="of the method 'malmen'"):
        _ = Ke(str(tmp_path)).end_of_answer


@pytest.mark.parametrize("name", ["editor.json", "editor-*.safetensors", "training.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "gone", "other", "nan"])
def test_a_damaged_folder(name, harm, tmp_path):
    trainer = trainer_of("llama")
    method = saved(trainer, tmp_path, 1)
    (path,) = tmp_path.glob(name)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "gone":
        path.unlink()
    elif harm == "nan":
        with torch.no_grad():
            trainer.network.marks_2H[0, 0] = float("nan")
        trainer.save(tmp_path)
    elif name == "editor.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base": 7}))
    else:
        saved(trainer_of("llama", replace(SMALL, hidden=8)), tmp_path / "other")
        (other,) = (tmp_path / "other").glob(name)
        path.write_bytes(other.read_bytes())
    fresh = trainer_of("llama")
    state = [one.clone() for one in fresh.network.parameters()]
    with pytest.raises(EditorError, match=re.escape(str(tmp_path))) as error:
        fresh.resume(tmp_path) if name.startswith("training") else method.find(
            trainer.bench, FACTS, silent
        )
    assert "\n" not in str(error.value)
    assert fresh.step == 0
    assert all(map(torch.equal, state, fresh.network.parameters()))


@pytest.mark.parametrize("written", ["1e999", "-1.0", "NaN"])
def test_a_multiplier_that_is_none(written, tmp_path):
    saved(trainer_of("llama"), tmp_path, 1)
    path = tmp_path / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = file.metadata()["training"]
    said = re.sub(r'"multiplier": [^,}]+', f'"multiplier": {written}', said)
    save_file(tensors, path, {"training": said})
    fresh = trainer_of("llama")
    with pytest.raises(EditorError, match=r"is damaged \(its multiplier is"):
        fresh.resume(tmp_path)
    assert fresh.step == 0


@pytest.mark.parametrize("lost", ["optimiser.", "optimiser.1.", "optimiser.2.exp_avg_sq"])
def test_a_run_without_its_moments_does_not_begin_them_anew(lost, tmp_path):
    saved(trainer_of("llama"), tmp_path, 1)
    path = tmp_path / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    save_file({n: t for n, t in tensors.items() if not n.startswith(lost)}, path, about)
    fresh = trainer_of("llama")
    with pytest.raises(EditorError, match=r"is damaged \(.*optimiser's.*\); give another --out"):
        fresh.resume(tmp_path)
    assert fresh.step == 0


def test_a_file_of_another_network_changes_nothing(tmp_path):
    saved(trainer_of("llama"), tmp_path, 1)
    path = tmp_path / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    tensors["network.seconds.1.bias"] = torch.zeros(3)
    save_file(tensors, path, about)
    fresh = trainer_of("llama")
    state = [one.clone() for one in fresh.network.parameters()]
    with pytest.raises(EditorError, match="a network of another shape"):
        fresh.resume(tmp_path)
    assert all(map(torch.equal, state, fresh.network.parameters()))
