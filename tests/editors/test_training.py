from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import (
    captured_of,
    copies,
    encoder,
    random_facts,
    same,
    start_weights,
    statistics_of,
    tiny_model,
    tiny_trunk,
)

from malmend.editors import pairs, training
from malmend.editors.editor import Editor
from malmend.editors.metaloss import meta_loss
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, published_mend
from malmend.editors.train_settings import (
    TrainSettings,
    published_mend_training,
    published_training,
)
from malmend.editors.training import Trainer, estimate_seconds
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Fact, Question
from malmend.memory import Room
from malmend.models import output
from malmend.models.descent import Descent
from malmend.models.store import ActivationStore
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

SETTINGS = TrainSettings(
    facts_per_step=8, steps=6, network_rate=3e-3, scalar_rate=0.03, chunk=7, seed=5, save_every=2
)
EDITOR = EditorSettings(
    layers=2, descent=Descent(steps=3), network=NetworkSettings(rank=8, placement="after")
)
FACTS = random_facts(24, seed=10)


def trainer_of(
    settings: TrainSettings = SETTINGS,
    editor_settings: EditorSettings = EDITOR,
    facts: Sequence[Fact] = FACTS,
    locality: Sequence[Question] = (),
    folder: Path | None = None,
    batch_tokens: int = 60,
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
) -> Trainer:
    model = tiny_model(dtype=dtype)
    captured = captured_of(tiny_trunk(model), FACTS, editor_settings)
    kept = None if folder is None else folder / "trunk"
    trunk = tiny_trunk(model, batch_tokens=batch_tokens, store=kept)
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    known = statistics_of(tiny_trunk(model), captured)
    weights = start_weights(editor_settings)
    editor = Editor(editor_settings, shapes, known, 0.8, weights, 0.1, settings.seed)
    store = ActivationStore(folder and folder / "pairs", 1, trunk.wide, 10**7)
    ending = encoder(editor_settings.end_of_answer)
    editor = editor.to(dtype)
    return Trainer(editor, trunk, ending, facts, locality, settings, store, processes)


def loss_over_all(trainer: Trainer) -> float:
    pairs = [(fact.equivalents[0], fact.unrelated[0]) for fact in trainer.facts]
    judged = trainer.judged(pairs)
    shifts = trainer.editor.shifts(trainer.pairs.of(trainer.facts))
    with shifted(list(trainer.trunk.sites), shifts):
        return meta_loss(trainer.trunk, judged, trainer.settings.locality_weight, grads=False).total


@pytest.mark.parametrize("method", ["malmen", "mend"])
def test_training_lowers_the_loss_and_moves_every_parameter(method):
    editor_settings = replace(EDITOR, method=method)
    settings = replace(SETTINGS, facts_per_step=12, steps=10, network_rate=0.02, scalar_rate=0.1)
    settings = replace(settings, locality_weight=0.5)
    trainer = trainer_of(settings, editor_settings)
    start, before = copies(trainer.editor.state_dict()), loss_over_all(trainer)
    records = list(trainer.run())
    assert [record.step for record in records] == list(range(1, 11))
    assert loss_over_all(trainer) < 0.95 * before
    fixed = dict(trainer.editor.named_buffers())
    for name, tensor in trainer.editor.state_dict().items():
        moved = not torch.equal(tensor, start[name])
        prior = name.startswith(("log_", "powers_")) and name != "log_eta_S"
        assert moved == (name not in fixed and not (prior and method == "mend")), name
    assert records[0].eta == pytest.approx(0.8)
    assert records[0].weights == pytest.approx(tuple(start_weights(editor_settings)))
    assert records[1].eta != records[0].eta
    assert all(
        before != after
        for before, after in zip(records[0].weights, records[1].weights, strict=True)
    )
    assert records[0].loss == pytest.approx(records[0].gen + 0.5 * records[0].loc)
    for record in records:
        assert record.gen > 0
        assert record.loc > 0
        assert record.grad_norm > 0


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_which_rows_end_is_known_whether_pairs_were_kept_or_not(tokens):
    trainer = trainer_of(editor_settings=replace(EDITOR, tokens=tokens))
    some = FACTS[3:9]
    trainer.pairs.of(some[2:4])  # these come from the store, the others are captured
    for facts in (some, some, some[::-1]):
        plain = captured_of(trainer.trunk, facts, trainer.editor.settings)
        for mine, wanted in zip(trainer.pairs.of(facts), plain, strict=True):
            assert torch.equal(mine.ends_N, wanted.ends_N)
            assert mine.ends_N.sum() == len(facts)
            # float32 in batches of another size: some roundings of 1e-7 of the largest key.
            most = 1e-6 * wanted.keys_NK.abs().max().item()
            torch.testing.assert_close(mine.keys_NK, wanted.keys_NK, rtol=0, atol=most)


def test_a_training_free_editor_trains_its_scalars():
    trainer = trainer_of(editor_settings=replace(EDITOR, network=NetworkSettings(blocks=0)))
    before = trainer.editor.log_eta_S.detach().clone()
    trainer.take_step()
    moved = (trainer.editor.log_eta_S - before).abs()
    torch.testing.assert_close(
        moved, torch.full_like(moved, SETTINGS.scalar_rate), rtol=1e-3, atol=0
    )


def test_each_group_has_its_rate_and_the_gradient_is_clipped():
    trainer = trainer_of(replace(SETTINGS, network_rate=0.0, scalar_rate=0.01, clip=1e-3))
    before = copies(trainer.editor.state_dict())
    record = trainer.take_step()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in trainer.editor.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert record.grad_norm > 1e-2
    for name, tensor in trainer.editor.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith(("log_", "powers_"))), name


def test_a_steps_gradient_is_of_its_facts_and_its_questions(monkeypatch):
    """What draw() names is what is edited, and what is asked of the edited model."""
    trainer, asked = trainer_of(), []

    def noted(trunk, judged, *rest, **named):
        asked.extend((one.equivalent.ids, one.unrelated.ids) for one in judged)
        return meta_loss(trunk, judged, *rest, **named)

    monkeypatch.setattr(training, "meta_loss", noted)
    facts, questions = trainer.draw(0)
    captured = captured_of(trainer.trunk, facts, EDITOR)
    wanted = trainer.editor.aggregate(captured)
    trainer.take_step()
    encode = trainer.encoder.encode
    assert asked == [(encode(a).ids, encode(b).ids) for a, b in questions]
    assert len(asked) == SETTINGS.facts_per_step
    assert wanted[0].shift().norm() > 0


def test_the_same_seed_gives_the_same_bits():
    states = []
    for seed in (5, 5, 6):
        trainer = trainer_of(replace(SETTINGS, seed=seed, steps=3))
        records = list(trainer.run())
        states.append((copies(trainer.editor.state_dict()), [(r.gen, r.loc) for r in records]))
    assert same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    assert not same(states[0][0], states[2][0])


@pytest.mark.parametrize("kept", [False, True], ids=["no store", "store"])
@pytest.mark.parametrize(
    "network", [EDITOR.network, NetworkSettings(blocks=0)], ids=["net", "none"]
)
@pytest.mark.parametrize(
    ("cut", "steps"), [pytest.param(1, 3, marks=pytest.mark.slow), (2, 3), (4, 6)]
)
def test_resuming_is_as_if_never_interrupted(tmp_path, network, kept, cut, steps):
    """An epoch has three steps; after it, facts and questions come again."""
    editor_settings, settings = replace(EDITOR, network=network), replace(SETTINGS, steps=steps)
    stores = [tmp_path / "whole", tmp_path / "parts"] if kept else [None, None]
    whole = trainer_of(settings, editor_settings, folder=stores[0])
    records = list(whole.run())
    first = trainer_of(replace(settings, steps=cut), editor_settings, folder=stores[1])
    list(first.run())
    first.save(tmp_path, {"curve": [1.5], "base": "b"})
    second = trainer_of(settings, editor_settings, folder=stores[1])
    about = second.resume(tmp_path)
    assert (about["curve"], about["base"], about["step"]) == ([1.5], "b", cut)
    rest = list(second.run())
    assert [record.step for record in rest] == list(range(cut + 1, steps + 1))
    assert [(r.gen, r.loc, r.grad_norm) for r in rest] == [
        (r.gen, r.loc, r.grad_norm) for r in records[cut:]
    ]
    assert same(second.editor.state_dict(), whole.editor.state_dict())
    mine, theirs = (one.optimiser.state_dict()["state"] for one in (second, whole))
    assert mine.keys() == theirs.keys()
    assert all(same(mine[index], theirs[index]) for index in mine)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"facts_per_step": 12}, "facts_per_step = 8, now 12"),
        ({"network_rate": 0.5}, r"network_rate = 0\.003, now 0\.5"),
        ({"seed": 6}, "seed = 5, now 6"),
        ({"chunk": 8}, "chunk = 7, now 8"),
        ({"near": 0.9}, r"near = [\d.]+, now 0\.9"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, change, named):
    first = trainer_of(replace(SETTINGS, steps=1))
    first.take_step()
    first.save(tmp_path, {})
    other = trainer_of(replace(SETTINGS, **change))
    before = copies(other.editor.state_dict())
    with pytest.raises(EditorError, match=named + r" is asked for; give the same settings, or"):
        other.resume(tmp_path)
    assert other.step == 0
    assert same(other.editor.state_dict(), before)


def test_resuming_another_editor_is_refused(tmp_path):
    trainer_of().save(tmp_path, {})
    for change, named in (
        ({"method": "mend"}, "method = 'malmen', now 'mend'"),
        ({"network": NetworkSettings(rank=4)}, "network = .*'rank': 8.* now .*'rank': 4"),
        ({"descent": None}, "descent = .* now None"),
    ):
        with pytest.raises(EditorError, match=named):
            trainer_of(editor_settings=replace(EDITOR, **change)).resume(tmp_path)


def test_resuming_for_more_steps_is_allowed(tmp_path):
    first = trainer_of(replace(SETTINGS, steps=1, save_every=1))
    list(first.run())
    first.save(tmp_path, {})
    longer = trainer_of(replace(SETTINGS, steps=2, save_every=7))
    longer.resume(tmp_path)
    assert [record.step for record in longer.run()] == [2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header", "text"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    trainer_of().save(tmp_path, {})
    path = tmp_path / "training.safetensors"
    raw = path.read_bytes()
    if damage == "cut":
        path.write_bytes(raw[:-10])
    elif damage == "flipped":
        path.write_bytes(raw[:20] + b"\xff" + raw[21:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no header":
        save_file(load_file(path), path)
    else:
        path.write_text("no checkpoint")
    with pytest.raises(EditorError, match=r"training\.safetensors is damaged \(.+\); give another"):
        trainer_of().resume(tmp_path)


def test_a_checkpoint_says_what_it_is(tmp_path):
    trainer = trainer_of()
    trainer.take_step()
    trainer.save(tmp_path, {"more": "here"})
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]
    with safe_open(tmp_path / "training.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    assert about["step"] == 1
    assert about["settings"]["seed"] == 5
    assert about["editor"]["network"]["rank"] == 8
    assert about["threads"] == torch.get_num_threads()
    assert about["more"] == "here"


def test_too_few_facts_are_refused():
    trainer_of(replace(SETTINGS, facts_per_step=24))
    with pytest.raises(
        MalmendError, match=r"Facts to train on: 24, .* at least 25, .* lower --facts-"
    ):
        trainer_of(replace(SETTINGS, facts_per_step=25))


def test_facts_without_unrelated_questions_need_neighbours_or_locality():
    facts = [*FACTS[:20], replace(FACTS[20], unrelated=()), *FACTS[21:]]
    with pytest.raises(
        MalmendError,
        match=r"'f20' has no unrelated question and no neighbour, .* give --locality",
    ):
        trainer_of(facts=facts)
    lone = [*facts[:20], replace(facts[20], at="f.json:41: entry 21"), *facts[21:]]
    with pytest.raises(MalmendError, match=r"'f20' \(f\.json:41: entry 21\) has no unrelated"):
        trainer_of(facts=lone)
    near = (Question("w8 w9", "w1"),)
    trainer_of(facts=[*facts[:20], replace(facts[20], neighbours=near), *facts[21:]])
    others = [Question("w1 w2", "w3"), Question("w4 w5", "w6 w7")]
    trainer = trainer_of(facts=facts, locality=others)
    asked = {other for step in range(6) for _, other in trainer.draw(step)[1]}
    assert asked == set(others), "--locality takes the place of each fact's own"
    assert math.isfinite(trainer.take_step().loc)


def test_facts_without_paraphrases_are_asked_by_their_own_prompt():
    facts = [replace(fact, paraphrases=()) for fact in FACTS]
    trainer = trainer_of(facts=facts)
    drawn, questions = trainer.draw(0)
    assert [equivalent for equivalent, _ in questions] == [fact.question for fact in drawn]
    assert math.isfinite(trainer.take_step().gen)


@pytest.mark.parametrize(
    ("rates", "named"),
    [
        ({"network_rate": 1e12}, "the meta-loss is nan"),
        ({"scalar_rate": 1e12}, r"(?:eta|the prior's weight of \w+) is inf"),
    ],
)
def test_divergence_ends_training(rates, named):
    trainer = trainer_of(replace(SETTINGS, steps=50, **rates))
    with pytest.raises(
        MalmendError, match=rf"diverged at step 2 \({named}\); .* start again in another"
    ):
        list(trainer.run())


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters(monkeypatch):
    """The loss may be finite where its gradient is not."""
    trainer = trainer_of()
    trainer.take_step()

    def broken(*rest, **named):
        loss = meta_loss(*rest, **named)
        next(iter(loss.shift_grads.values()))[0, 0] = math.inf
        return loss

    monkeypatch.setattr(training, "meta_loss", broken)
    before = copies(trainer.editor.state_dict())
    with pytest.raises(
        MalmendError, match=r"diverged at step 2 .* lower --network-rate .* another --out"
    ):
        trainer.take_step()
    assert same(trainer.editor.state_dict(), before)
    assert trainer.step == 1


def test_a_loss_that_is_not_finite_never_reaches_the_parameters(monkeypatch):
    trainer = trainer_of()

    def broken(*rest, **named):
        return replace(meta_loss(*rest, **named), gen=math.nan)

    monkeypatch.setattr(training, "meta_loss", broken)
    before = copies(trainer.editor.state_dict())
    with pytest.raises(MalmendError, match=r"diverged at step 1 \(the meta-loss is nan\)"):
        trainer.take_step()
    assert same(trainer.editor.state_dict(), before)
    assert all(p.grad is None for p in trainer.editor.parameters())


def test_draw_goes_round_all_facts():
    trainer = trainer_of()
    orders = []
    for epoch in range(3):
        steps = range(3 * epoch, 3 * epoch + 3)
        drawn = [fact.id for step in steps for fact in trainer.draw(step)[0]]
        assert sorted(drawn) == sorted(fact.id for fact in FACTS)
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]
    assert [trainer.draw(step) for step in (4, 0, 4)] == [
        trainer_of().draw(step) for step in (4, 0, 4)
    ]
    other = trainer_of(replace(SETTINGS, seed=6))
    assert [fact.id for fact in trainer.draw(0)[0]] != [fact.id for fact in other.draw(0)[0]]
    assert _chosen(trainer) == _chosen(trainer_of())
    assert _chosen(trainer) != _chosen(other)
    assert _chosen(trainer)[:8] != _chosen(trainer)[8:16], "each step draws anew"


def _chosen(trainer: Trainer) -> list[int]:
    """Which paraphrase was drawn at each place of the first epoch."""
    drawn = [pair for step in range(3) for pair in zip(*trainer.draw(step), strict=True)]
    return [fact.equivalents.index(asked) for fact, (asked, _) in drawn]


def test_draw_leaves_out_a_short_rest_and_another_one_each_time():
    trainer = trainer_of(replace(SETTINGS, facts_per_step=10))
    seen = set()
    for epoch in range(6):
        drawn = [f.id for step in (2 * epoch, 2 * epoch + 1) for f in trainer.draw(step)[0]]
        assert len(drawn) == len(set(drawn)) == 20
        seen |= set(drawn)
    assert len(seen) == 24


def test_draw_asks_every_paraphrase_and_unrelated_question_in_time():
    trainer, asked, others = trainer_of(), set(), set()
    for step in range(60):
        facts, questions = trainer.draw(step)
        for fact, (equivalent, other) in zip(facts, questions, strict=True):
            assert equivalent in fact.equivalents
            assert other in fact.unrelated
            asked.add(equivalent)
            others.add(other)
    assert asked == {question for fact in FACTS for question in fact.equivalents}
    assert others == {question for fact in FACTS for question in fact.unrelated}


NEAR = random_facts(24, seed=11, neighbours=2)
FILE = [Question("w1 w2", "w3"), Question("w4 w5", "w6 w7")]


def drawn_from(trainer: Trainer, steps: int = 90) -> dict[str, int]:
    """How often a question was drawn from each place, over many steps."""
    counts = {"neighbours": 0, "unrelated": 0, "file": 0}
    for step in range(steps):
        facts, questions = trainer.draw(step)
        for fact, (_, other) in zip(facts, questions, strict=True):
            places = {"neighbours": fact.neighbours, "unrelated": fact.unrelated, "file": FILE}
            (place,) = (name for name, known in places.items() if other in known)
            counts[place] += 1
    return counts


@pytest.mark.parametrize("locality", [(), FILE], ids=["own", "file"])
@pytest.mark.parametrize("near", [0.0, 0.2, 0.5, 1.0])
def test_draw_takes_the_share_of_neighbours_that_is_asked_for(near, locality):
    counts = drawn_from(trainer_of(replace(SETTINGS, near=near), facts=NEAR, locality=locality))
    far, other = ("file", "unrelated") if locality else ("unrelated", "file")
    total = 90 * SETTINGS.facts_per_step
    assert counts["neighbours"] + counts[far] == total
    assert counts[other] == 0, "--locality takes the place of each fact's own unrelated questions"
    # Four standard deviations of the share of so many draws; none where it is 0 or 1.
    slack = 4 * math.sqrt(near * (1 - near) / total)
    assert abs(counts["neighbours"] / total - near) <= slack


@pytest.mark.parametrize("near", [0.0, 0.5, 1.0])
def test_draw_takes_what_a_fact_has(near):
    only_near = [replace(fact, unrelated=()) for fact in NEAR[:12]]
    only_far = [replace(fact, neighbours=()) for fact in NEAR[12:]]
    trainer = trainer_of(replace(SETTINGS, near=near), facts=[*only_near, *only_far])
    counts = drawn_from(trainer, steps=9)  # three epochs: every fact three times
    assert counts == {"neighbours": 36, "unrelated": 36, "file": 0}
    with_file = trainer_of(
        replace(SETTINGS, near=near), facts=[*only_near, *only_far], locality=FILE
    )
    counts = drawn_from(with_file, steps=9)
    assert counts["unrelated"] == 0
    assert counts["file"] >= 36, "a fact without a neighbour is asked from the file"
    assert (counts["file"] == 72) == (near == 0)
    assert (counts["neighbours"] == 36) == (near == 1)


def test_draw_asks_every_neighbour_in_time():
    trainer, asked = trainer_of(facts=NEAR), set()
    for step in range(60):
        asked |= {other for _, other in trainer.draw(step)[1]}
    assert asked >= {question for fact in NEAR for question in fact.neighbours}
    assert asked >= {question for fact in NEAR for question in fact.unrelated}
    assert math.isfinite(trainer.take_step().loc)


def test_training_leaves_the_model_bit_for_bit():
    trainer = trainer_of()
    model = trainer.trunk.model
    before, places = (
        copies(model.state_dict()),
        {n: p.data_ptr() for n, p in model.named_parameters()},
    )
    list(trainer.run())
    assert same(model.state_dict(), before)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == places[name]
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_the_model_comes_back_after_an_interrupted_step(monkeypatch):
    trainer = trainer_of()
    model = trainer.trunk.model
    before = copies(model.state_dict())

    def broken(trunk, judged, *rest, **named):
        meta_loss(trunk, judged[:2], *rest, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "meta_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.take_step()
    assert same(model.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("together", [256, 3])
def test_pairs_from_the_store_are_the_fresh_ones(tmp_path, together, monkeypatch):
    monkeypatch.setattr(pairs, "TOGETHER", together)
    near = 0 if together > len(FACTS) else 1e-5  # float32, and other company rounds otherwise
    trainer = trainer_of(folder=tmp_path)
    fresh = trainer.pairs.of(FACTS)
    direct = captured_of(trainer.trunk, FACTS, EDITOR)
    again = trainer_of(folder=tmp_path)
    again.pairs._packed = None  # whatever is not in the store would call it
    stored = again.pairs.of(FACTS[::-1])[0:2]
    counts = [len(one.sources) for one in again.encoder.encode_all(f.question for f in FACTS)]
    for mine, theirs, kept in zip(fresh, direct, stored, strict=True):
        for part in ("keys_NK", "value_grads_NV"):
            rows = getattr(mine, part)
            torch.testing.assert_close(rows, getattr(theirs, part), rtol=10 * near, atol=near)
            backwards = torch.cat(list(rows.split(counts))[::-1])
            assert torch.equal(getattr(kept, part), backwards)


def test_what_a_step_takes_beside_grows_with_its_facts():
    """dL/dD in float64 of every token, and pairs on their way of so many facts at most."""
    trainer = trainer_of()
    questions = trainer.encoder.encode_all(fact.question for fact in FACTS)
    many = 200 * questions[:1] + 200 * questions[1:2]  # of a few facts over and over
    longest = max(questions[:2], key=lambda one: len(one.ids))
    shapes = [site.shape_VK for site in trainer.trunk.sites]
    took = [
        training.step_bytes(
            trainer.editor, trainer.trunk, replace(SETTINGS, facts_per_step=m), many
        )
        for m in (50, 100, 200)
    ]
    each = len(longest.sources) * (8 + 2 * 4) * sum(v for v, _ in shapes)  # float64, and float32
    each += len(longest.sources) * 2 * 4 * sum(k for _, k in shapes)
    assert took[1] - took[0] == 50 * each
    assert took[2] - took[1] == 100 * each


def test_of_a_step_on_an_accelerator_the_rows_alone_are_planned(monkeypatch):
    trainer = trainer_of()
    given = (trainer.trunk, replace(SETTINGS, facts_per_step=2))
    few, none = trainer.encoder.encode_all(fact.question for fact in FACTS[:2]), ()
    monkeypatch.setattr(training, "rows_of", lambda _trunk, asked, _tokens: len(asked))
    here, nothing = (training.step_bytes(trainer.editor, *given, of) for of in (few, none))
    monkeypatch.setattr(type(trainer.editor), "device", torch.device("meta"))
    assert training.step_bytes(trainer.editor, *given, few) == here - nothing
    assert nothing > 3 * sum(one.numel() for one in trainer.editor.parameters())


def test_a_store_changes_no_bit_of_training(tmp_path):
    settings = replace(SETTINGS, steps=5)  # into the second epoch
    without, filling = trainer_of(settings), trainer_of(settings, folder=tmp_path)
    list(without.run())
    list(filling.run())
    assert any(tmp_path.iterdir())
    filled = trainer_of(settings, folder=tmp_path)
    list(filled.run())
    assert same(filling.editor.state_dict(), filled.editor.state_dict())
    # Batches of another size round gradients by 1e-7 of their largest part; Adam divides by each
    # part, so that one of a thousandth moves by 1e-4 of a rate otherwise, in each of five steps.
    most = 5e-4 * max(settings.network_rate, settings.scalar_rate)
    for name, tensor in without.editor.state_dict().items():
        torch.testing.assert_close(tensor, filled.editor.state_dict()[name], rtol=1e-6, atol=most)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_facts_of_one_wording_split_elsewhere_are_kept_apart(tmp_path, tokens):
    """The same ids with another boundary between prompt and answer are another fact."""
    texts = [("w1 w2 w3", "w4 w5"), ("w1 w2", "w3 w4 w5"), ("w1 w2 w3 w4", "w5")]
    facts = [
        replace(fact, prompt=prompt, answer=answer)
        for fact, (prompt, answer) in zip(FACTS, texts, strict=False)
    ]
    settings = replace(EDITOR, tokens=tokens)
    trainer = trainer_of(replace(SETTINGS, facts_per_step=3), settings, facts, folder=tmp_path)
    wanted = captured_of(trainer.trunk, facts, settings)
    for _ in range(2):
        for fact in facts:
            alone = captured_of(trainer.trunk, [fact], settings)
            for mine, theirs in zip(trainer.pairs.of([fact]), alone, strict=True):
                torch.testing.assert_close(mine.keys_NK, theirs.keys_NK)
                torch.testing.assert_close(mine.value_grads_NV, theirs.value_grads_NV)
        for mine, theirs in zip(trainer.pairs.of(facts), wanted, strict=True):
            torch.testing.assert_close(mine.value_grads_NV, theirs.value_grads_NV)


def test_the_estimate_changes_nothing_that_is_trained():
    trainer, plain = trainer_of(), trainer_of()
    before = copies(trainer.editor.state_dict())
    model = copies(trainer.trunk.model.state_dict())
    assert estimate_seconds(trainer, sample=4) > 0
    assert same(trainer.editor.state_dict(), before)
    assert same(trainer.trunk.model.state_dict(), model)
    assert not any(parameter.requires_grad for parameter in trainer.trunk.model.parameters())
    assert trainer.step == 0
    list(trainer.run())
    list(plain.run())
    assert same(trainer.editor.state_dict(), plain.editor.state_dict())
    assert estimate_seconds(trainer) == 0


def test_the_estimate_knows_that_steps_are_halved(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(ticks)))
    whole, halved = (
        estimate_seconds(trainer_of(replace(SETTINGS, facts_per_step=4, halvings=one)), sample=1)
        for one in (0, 2)
    )
    assert halved / whole == pytest.approx((4 + 2 + 1) / 3 / 4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"facts_per_step": 0}, "--facts-per-step"),
        ({"steps": 0}, "--steps"),
        ({"chunk": 0}, "--chunk"),
        ({"save_every": 0}, "--save-every"),
        ({"network_rate": -1.0}, "--network-rate"),
        ({"scalar_rate": math.nan}, "--scalar-rate"),
        ({"clip": math.inf}, "--clip"),
        ({"locality_weight": -0.1}, "--locality-weight"),
        ({"near": -0.1}, "--near"),
        ({"near": 1.1}, "--near"),
        ({"near": math.nan}, "--near"),
    ],
)
def test_settings_that_cannot_train_are_refused(wrong, named):
    with pytest.raises(MalmendError, match=rf"expected .*; change {named}\.$"):
        TrainSettings(**wrong)


def test_published_training():
    settings = published_training()
    assert settings.network_rate == settings.scalar_rate == 1e-5
    assert settings.locality_weight == settings.clip == 1.0


def test_mend_as_published_edits_each_fact_of_a_step_alone():
    """The step's gradient is the mean of those of its facts, each edited and asked by itself."""
    single = replace(EDITOR, method="mend-single", prior="identity")
    settings = replace(SETTINGS, clip=1e9, facts_per_step=3, locality_weight=10.0)
    trainer, other = (trainer_of(settings, single) for _ in range(2))
    facts, questions = trainer.draw(0)
    record = trainer.take_step()
    editor, losses = other.editor, []
    for fact, one in zip(facts, other.judged(questions), strict=True):
        captured = captured_of(other.trunk, [fact], single)
        done = editor.aggregate(captured)
        shifts = {name: part.shift() for name, part in zip(editor.names, done, strict=True)}
        with shifted(list(other.trunk.sites), shifts):
            loss = meta_loss(other.trunk, [one], 10.0)
        losses.append(loss.total)
        editor.backward(captured, done, loss.shift_grads)
    assert record.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    pairs = zip(trainer.editor.named_parameters(), editor.parameters(), strict=True)
    moved = 0
    for (name, mine), wanted in pairs:
        if wanted.grad is None:
            continue
        # float32: some roundings of 1e-7 of the largest part.
        most = 1e-6 * wanted.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, wanted.grad / 3, rtol=0, atol=most, msg=name)
        moved += bool(mine.grad.any())
    assert moved > 3
    # Together it is another gradient: the shifts of the others disturb each fact.
    together = trainer_of(settings, replace(single, method="mend"))
    together.take_step()
    apart = [
        (one.grad - two.grad).norm() > 1e-2 * two.grad.norm()
        for one, two in zip(trainer.editor.parameters(), together.editor.parameters(), strict=True)
        if one.grad is not None and two.grad.any()
    ]
    assert any(apart)


def test_published_mend():
    settings, editor = published_mend_training(), published_mend()
    assert (settings.facts_per_step, settings.locality_weight) == (10, 1 / 0.1)
    assert (settings.network_rate, settings.scalar_rate) == (1e-6, 1e-4)
    assert (editor.method, editor.layers, editor.linear) == ("mend-single", 3, "both")
    assert (editor.form, editor.tokens, editor.descent) == ("published", "all", None)
    assert (editor.end_of_answer, editor.eta) == ("none", 1e-4)
    network = editor.network
    assert (network.placement, network.start) == ("before", "xavier")
    assert (network.rank, network.blocks, network.identity, network.normalise) == (
        1920,
        2,
        True,
        True,
    )
    assert editor.terms == ()


def test_pairs_stand_where_the_budget_lets_them(tmp_path):
    plain = trainer_of(folder=tmp_path / "one")
    spilled = trainer_of(folder=tmp_path / "other")
    spilled.trunk.room = Room(0, tmp_path)
    for again in range(2):  # captured, then from the store
        for mine, theirs in zip(spilled.pairs.of(FACTS), plain.pairs.of(FACTS), strict=True):
            assert torch.equal(mine.keys_NK, theirs.keys_NK)
            assert torch.equal(mine.value_grads_NV, theirs.value_grads_NV)
            assert mine.room is spilled.trunk.room
        assert spilled.trunk.room.on_disk > 0 == spilled.trunk.room.in_memory, again


@pytest.mark.parametrize("rows", [1, 2])
def test_the_loss_in_parts_of_the_vocabularys_product_is_the_whole_one(rows, monkeypatch):
    trainer = trainer_of(SETTINGS, dtype=torch.float64)
    judged = trainer.judged(trainer.draw(0)[1])
    shifts = trainer.editor.shifts(trainer.pairs.of(trainer.facts))
    found = []
    for size in (10**9, rows * trainer.trunk.words):
        monkeypatch.setattr(output, "LOGITS", size)
        with shifted(list(trainer.trunk.sites), shifts):
            found.append(meta_loss(trainer.trunk, judged, 0.7))
    whole, parts = found
    assert (parts.gen, parts.loc) == pytest.approx((whole.gen, whole.loc), rel=1e-12)
    for name, grad in whole.shift_grads.items():
        torch.testing.assert_close(parts.shift_grads[name], grad, rtol=1e-9, atol=1e-12)


def _rewritten(path, change) -> None:
    """The same checkpoint with other words in its header, or other tensors."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, {"training": json.dumps(about)})


def _without(tensors, part):
    for name in [name for name in tensors if part in name]:
        del tensors[name]


DAMAGE = {
    "no optimiser state": lambda about, tensors: _without(tensors, "optimiser."),
    "one moment gone": lambda about, tensors: _without(tensors, "optimiser.0.exp_avg_sq"),
    "a parameter's moments gone": lambda about, tensors: _without(tensors, "optimiser.1."),
    "another shape": lambda about, t: t.update({"optimiser.0.exp_avg": torch.zeros(3)}),
    "a negative square": lambda about, t: t["optimiser.0.exp_avg_sq"].sub_(1.0),
    "a weight that is none": lambda about, t: t["editor.log_eta_S"].fill_(torch.nan),
    "a moment that is none": lambda about, t: t["optimiser.0.exp_avg"].fill_(torch.inf),
    "no settings": lambda about, tensors: about.pop("settings"),
    "settings that are a list": lambda about, tensors: about.update(settings=[]),
    "a step in words": lambda about, tensors: about.update(step="two"),
    "a step that is true": lambda about, tensors: about.update(step=True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_lacks_a_part_is_refused_and_nothing_changes(tmp_path, damage):
    trainer = trainer_of(SETTINGS)
    trainer.take_step()
    trainer.save(tmp_path, {})
    trainer_of(SETTINGS).resume(tmp_path)  # whole, it is taken
    _rewritten(tmp_path / "training.safetensors", DAMAGE[damage])
    other = trainer_of(SETTINGS)
    before = copies(other.editor.state_dict())
    with pytest.raises(MalmendError, match="is damaged"):
        other.resume(tmp_path)
    assert other.step == 0
    assert all(torch.equal(one, before[name]) for name, one in other.editor.state_dict().items())
