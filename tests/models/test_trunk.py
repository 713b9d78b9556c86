"""The cut model against the whole model, which knows no trunk, no hook and no padding."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps

import pytest
import torch

import tiny
from malmend.facts.encoded import Encoded
from malmend.models import ending as ending_module
from malmend.models import forms as forms_module
from malmend.models.cut import Cut
from malmend.models.forms import find_stacks
from malmend.models.sites import Site, find_sites
from malmend.models.trunk import Trunk, TrunkSettings

FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)
QUESTIONS = tiny.questions(7)
CLOSE = dict.fromkeys(tiny.FAMILIES, 1e-11) | dict.fromkeys(tiny.FLOAT32_INSIDE, 1e-5)


def cut(model, layers=2, pattern=None, batch_tokens=1024, folder=None):
    sites = find_sites(model, layers, pattern)
    return Trunk(model, sites, TrunkSettings(batch_tokens), folder)


def head_logits(trunk, questions=QUESTIONS):
    """Logits of all questions, in their order, batch by batch."""
    rows = [torch.empty(0)] * len(questions)
    with torch.no_grad():
        for indices, batch in trunk.batches(questions):
            logits = trunk.logits(batch)
            assert logits.shape[0] == len(batch.tokens.labels_A)
            parts = logits.split([len(questions[i].sources) for i in indices])
            for index, part in zip(indices, parts, strict=True):
                rows[index] = part
    return torch.cat(rows)


def differ(left, right):
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def edit(trunk, seed=0):
    """Other weights at every site, and the earlier ones."""
    generator = torch.Generator().manual_seed(seed)
    kept = [site.weight.data for site in trunk.sites]
    for site in trunk.sites:
        noise = torch.randn(site.weight.shape, generator=generator, dtype=torch.float64)
        site.weight.data = site.weight.data + 0.3 * noise.to(site.weight.dtype)
    return kept


# --- the same logits


@FAMILY
def test_where_the_cut_lies(family):
    trunk = cut(tiny.model_of(family))
    assert (trunk.cut.place == "site") == (
        family != "gemma2"
    )  # its norm stands between layer and residual
    for dtype in (torch.bfloat16, torch.float16):
        assert cut(tiny.model_of(family, dtype)).cut.place == "block"
    width = tiny.HIDDEN + (tiny.INNER if trunk.cut.place == "site" else 0)
    batch = trunk.batch(QUESTIONS)
    assert batch.stored_BTF.shape == (7, max(len(q.ids) for q in QUESTIONS), width)


@FAMILY
def test_without_sites_nothing_lies_below_the_cut(family):
    model = tiny.model_of(family)
    trunk = Trunk(model, ())
    assert (trunk.cut.place, trunk.cut.below) == ("block", [])
    assert differ(head_logits(trunk), tiny.logits_alone(model, QUESTIONS)) < CLOSE[family]


@FAMILY
@pytest.mark.parametrize("layers", [1, 2, tiny.BLOCKS])
def test_logits_are_the_whole_models(family, layers):
    model = tiny.model_of(family)
    expected = tiny.logits_alone(model, QUESTIONS)
    assert expected.std() > 0.1
    for batch_tokens in (1, 24, 1024):
        assert differ(head_logits(cut(model, layers, None, batch_tokens)), expected) < CLOSE[family]


@FAMILY
def test_logits_after_an_edit_are_the_edited_models(family):
    model = tiny.model_of(family)
    trunk = cut(model)
    before = head_logits(trunk)
    batch = trunk.batch(QUESTIONS)  # made before the edit, used after it
    edit(trunk)
    expected = tiny.logits_alone(model, QUESTIONS)
    assert differ(expected, before) > 0.1
    assert differ(head_logits(trunk), expected) < CLOSE[family]
    with torch.no_grad():
        assert differ(trunk.logits(batch), expected) < CLOSE[family]


@FAMILY
def test_cut_at_the_block_gives_the_same(family, monkeypatch):
    monkeypatch.setattr(Cut, "_adds_plainly", lambda cut: False)
    model = tiny.model_of(family)
    trunk = cut(model)
    edit(trunk)
    assert trunk.batch(QUESTIONS).stored_BTF.shape[-1] == tiny.HIDDEN
    assert differ(head_logits(trunk), tiny.logits_alone(model, QUESTIONS)) < CLOSE[family]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_low_precision(family):
    model = tiny.model_of(family, torch.bfloat16)
    trunk = cut(model)
    edit(trunk)
    # One question at a time: padding may choose another kernel, which rounds otherwise.
    for question in QUESTIONS:
        expected = tiny.logits_alone(model, [question])
        assert torch.equal(head_logits(trunk, [question]), expected)


def test_float32_cut_inside_is_close():
    model = tiny.model_of("llama", torch.float32)
    trunk = cut(model)
    assert trunk.cut.place == "site"
    assert trunk.wide == torch.float32
    edit(trunk)
    assert differ(head_logits(trunk), tiny.logits_alone(model, QUESTIONS)) < 1e-4


def test_what_tensors_are_kept_in():
    kept = {torch.float64: torch.float64, torch.float32: torch.float32}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert cut(tiny.model_of("llama", dtype)).wide == kept.get(dtype, torch.float32)


INNER = {"gpt2": "*.h.{}.mlp.c_fc", "llama": "*.{}.mlp.up_proj", "gptj": "*.h.{}.mlp.fc_in"}


@pytest.mark.parametrize(
    ("family", "pattern", "inside"),
    [
        ("llama", "*.3.self_attn.o_proj", False),  # the feed-forward reads it too
        ("gpt_neox", "*.3.attention.dense", True),  # but not where it runs in parallel
        ("llama", "*.[13].mlp.down_proj", True),
        ("llama", "*.[23].mlp.*_proj", False),
        ("llama", "*.1.self_attn.?_proj", False),
        ("gpt_neox", "*.3.*dense*", False),  # the first would do, but it is not alone
        ("gptj", "*.[23].mlp.*", False),
        *[(family, name.format("3"), False) for family, name in INNER.items()],
    ],
)
def test_layers_chosen_by_name(family, pattern, inside):
    model = tiny.model_of(family)
    trunk = cut(model, pattern=pattern)
    assert (trunk.cut.place == "site") == inside
    edit(trunk)
    expected = tiny.logits_alone(model, QUESTIONS)
    assert differ(head_logits(trunk), expected) < CLOSE[family]
    with torch.no_grad():
        states = trunk.final_states(trunk.batch(QUESTIONS))
        assert differ(trunk.logits_of(states), expected) < CLOSE[family]


def test_blocks_that_return_tuples_with_many_below():
    # Two layers of the lowest edited block, and more blocks below it than a tensor has dimensions.
    model = tiny.model_of("gptj", num_hidden_layers=6)
    trunk = cut(model, pattern="*.h.5.mlp.*")
    expected = tiny.logits_alone(model, QUESTIONS)
    assert differ(head_logits(trunk), expected) < CLOSE["gptj"]
    with torch.no_grad():
        states = trunk.final_states(trunk.batch(QUESTIONS))
        assert differ(trunk.logits_of(states), expected) < CLOSE["gptj"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_sites_in_any_order(family):
    model = tiny.model_of(family)
    sites = find_sites(model, 3)
    trunk = Trunk(model, [sites[1], sites[2], sites[0]])
    assert trunk.cut.first is sites[0]
    assert len(trunk.cut.below) == 1
    assert differ(head_logits(trunk), tiny.logits_alone(model, QUESTIONS)) < CLOSE[family]


def test_question_without_an_answer_has_its_last_position():
    model = tiny.model_of("llama")
    asked = [Encoded((5, 6, 7), 3, 3), QUESTIONS[0]]
    expected = torch.cat(
        [
            model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1:],
            tiny.logits_alone(model, [QUESTIONS[0]]),
        ]
    )
    assert differ(head_logits(cut(model), asked), expected) < 1e-11


def test_padding_is_masked_by_length_not_by_id():
    model = tiny.model_of("llama")  # ids of 0 inside a question are ordinary tokens
    asked = [Encoded((0, 0, 3, 0, 0), 3, 4), *QUESTIONS]
    assert differ(head_logits(cut(model), asked), tiny.logits_alone(model, asked)) < 1e-11


# --- batches


@pytest.mark.parametrize("batch_tokens", [1, 12, 30, 1024])
def test_batches_hold_every_question_once_within_the_limit(batch_tokens):
    questions = tiny.questions(20)
    trunk = cut(tiny.model_of("llama"), batch_tokens=batch_tokens)
    seen = []
    for indices, batch in trunk.batches(questions):
        seen += indices
        assert batch.tokens.lengths == tuple(len(questions[i].ids) for i in indices)
        assert batch.tokens.ids_BT.numel() <= batch_tokens or len(indices) == 1
        assert list(batch.tokens.lengths) == sorted(batch.tokens.lengths, reverse=True)
    assert sorted(seen) == list(range(20))
    lengths = [len(questions[i].ids) for i in seen]
    assert lengths == sorted(lengths, reverse=True)


def test_no_questions():
    trunk = cut(tiny.model_of("llama"))
    assert list(trunk.batches([])) == []
    assert trunk.unedited_states([]) == []


# --- final states


@FAMILY
def test_logits_of_final_states_are_the_logits(family):
    model = tiny.model_of(family)
    trunk = cut(model)
    edit(trunk)
    with torch.no_grad():
        batch = trunk.batch(QUESTIONS)
        states = trunk.final_states(batch)
        assert states.shape == (len(batch.tokens.labels_A), tiny.HIDDEN)
        assert differ(trunk.logits_of(states), tiny.logits_alone(model, QUESTIONS)) < CLOSE[family]
        assert torch.allclose(trunk.logits_of(states), trunk.logits(batch), atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_unedited_states_are_the_final_states(family):
    model = tiny.model_of(family)
    trunk = cut(model, batch_tokens=24)
    states = trunk.unedited_states(QUESTIONS)
    assert [tuple(rows.shape) for rows in states] == [
        (len(question.sources), tiny.HIDDEN) for question in QUESTIONS
    ]
    with torch.no_grad():
        final = trunk.final_states(trunk.batch(QUESTIONS))
        assert differ(torch.cat(states), final) < CLOSE[family]
        together = trunk.logits_of(torch.cat(states))
    assert differ(together, tiny.logits_alone(model, QUESTIONS)) < CLOSE[family]


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("opt", {"word_embed_proj_dim": 8})]
)
def test_unedited_states_are_asked_once(family, changes, monkeypatch, tmp_path):
    # An OPT may project its states to another width before the output layer reads them.
    model = tiny.model_of(family, **changes)
    trunk = cut(model, folder=tmp_path)
    asked = []
    original = Trunk.final_states
    monkeypatch.setattr(
        Trunk, "final_states", lambda self, batch: asked.append(1) or original(self, batch)
    )
    first = trunk.unedited_states([*QUESTIONS[:4], QUESTIONS[0]])
    assert len(asked) == 1
    assert torch.equal(first[0], first[4])
    with torch.no_grad():
        logits = trunk.logits_of(torch.cat(first[:4]))
    assert differ(logits, tiny.logits_alone(model, QUESTIONS[:4])) < 1e-11
    edit(trunk)  # what was asked before is that of the unedited weights, for another cut as well
    for known in (trunk, cut(model, 1, folder=tmp_path)):
        again = known.unedited_states(QUESTIONS[3::-1])
        assert len(asked) == 1
        assert all(torch.equal(one, two) for one, two in zip(first[:4], again[::-1], strict=True))


@pytest.mark.parametrize("kept", [True, False])
def test_same_ids_with_another_answer_start_are_two_questions(kept, tmp_path):
    # "A B: C" and "A: B C" are the same text, asked at other positions.
    model = tiny.model_of("llama")
    trunk = cut(model, folder=tmp_path if kept else None)
    pair = [Encoded((5, 6, 7, 0), 2, 3), Encoded((5, 6, 7, 0), 1, 3)]
    for asked in (pair, pair[:1], pair[1:]):
        states = trunk.unedited_states(asked)
        assert [len(rows) for rows in states] == [len(question.sources) for question in asked]
        with torch.no_grad():
            logits = trunk.logits_of(torch.cat(states))
        assert differ(logits, tiny.logits_alone(model, asked)) < 1e-11


# --- what is kept on disk


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kept_activations_are_used_and_are_the_same(family, dtype, tmp_path, monkeypatch):
    model = tiny.model_of(family, dtype)
    first = head_logits(cut(model, folder=tmp_path))
    assert list(tmp_path.rglob("*.bin"))
    computed = []
    original = Cut.activations
    monkeypatch.setattr(
        Cut, "activations", lambda self, batch: computed.append(1) or original(self, batch)
    )
    trunk = cut(model, folder=tmp_path)
    computed.clear()  # the cut tries itself out
    assert torch.equal(head_logits(trunk), first)
    assert computed == []
    # Half known, half new: rows keep their questions.
    asked = [
        question for pair in zip(tiny.questions(7, 5), QUESTIONS, strict=True) for question in pair
    ]
    trunk = cut(model, folder=tmp_path)
    computed.clear()
    close = CLOSE[family] if dtype == torch.float64 else 0.2
    assert differ(head_logits(trunk, asked), tiny.logits_alone(model, asked)) < close
    assert len(computed) == 1


def test_another_cut_has_a_folder_of_its_own(tmp_path):
    model = tiny.model_of("llama")
    expected = tiny.logits_alone(model, QUESTIONS)
    for chosen in (
        {"layers": 1},
        {"layers": 2},
        {"pattern": "*.3.mlp.*"},
        {"pattern": "*.3.*.?_proj"},
    ):
        for _ in range(2):
            assert differ(head_logits(cut(model, folder=tmp_path, **chosen)), expected) < 1e-11


# --- nothing is left behind


def state_of(model):
    modules = dict(model.named_modules())
    return {
        "forwards": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "hooks": [
            (name, kind)
            for name, module in modules.items()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            if getattr(module, kind)
        ],
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad is None for name, p in model.named_parameters()},
        "weights": {name: p.data_ptr() for name, p in model.named_parameters()},
    }


class Fault(Exception):
    pass


@FAMILY
def test_model_is_as_it_was_after_use(family, tmp_path):
    model = tiny.model_of(family)
    before = state_of(model)
    assert set(before["forwards"].values()) == {None}
    trunk = cut(model, folder=tmp_path)
    with torch.no_grad():
        batch = trunk.batch(QUESTIONS)
        trunk.logits_of(trunk.final_states(batch))
    trunk.logits(batch)
    trunk.unedited_states(QUESTIONS)
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
@pytest.mark.parametrize("where", ["below", "first site", "above", "output"])
def test_model_is_as_it_was_after_an_exception(family, where):
    model = tiny.model_of(family)
    trunk = cut(model)
    batch = trunk.batch(QUESTIONS)
    states = torch.zeros(3, tiny.HIDDEN, dtype=torch.float64)
    before = state_of(model)
    broken = {
        "below": model.get_input_embeddings(),
        "first site": trunk.cut.first.module,
        "above": find_stacks(model)[0].blocks[3],
        "output": model.get_output_embeddings(),
    }[where]

    def fail(*_args, **_keywords):
        raise Fault

    raised = 0
    broken.forward = fail
    try:
        for call in (
            lambda: trunk.logits(batch),
            lambda: trunk.final_states(batch),
            lambda: trunk.logits_of(states),
            lambda: trunk.batch(tiny.questions(3, 9)),
            lambda: trunk.unedited_states(QUESTIONS),
            lambda: Trunk(model, trunk.sites),
        ):
            try:
                call()
            except Fault:
                raised += 1
    finally:
        del broken.forward
    assert raised >= 2
    assert state_of(model) == before
    expected = tiny.logits_alone(model, QUESTIONS)
    assert differ(head_logits(trunk), expected) < CLOSE[family]


def test_a_forward_that_was_replaced_before_stays_replaced():
    # As device placement does it: modules whose forward is wrapped on the instance.
    model = tiny.model_of("llama")
    calls = []
    blocks = find_stacks(model)[0].blocks
    for block in blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **keywords: (
            calls.append(1) or inner(*args, **keywords)
        )
    before = state_of(model)
    trunk = cut(model)
    assert differ(head_logits(trunk), tiny.logits_alone(model, QUESTIONS)) < 1e-11
    assert state_of(model) == before
    calls.clear()
    model(input_ids=torch.tensor([[1, 2]]))
    assert len(calls) == len(blocks)


def test_replaced_and_hooks_end_in_a_fault():
    model = tiny.model_of("llama")
    before = state_of(model)
    with suppress(Fault), ending_module.replaced(model, lambda: None):
        raise Fault
    with suppress(Fault), forms_module.output_reads(model, lambda states: states):
        raise Fault
    assert state_of(model) == before


@FAMILY
def test_no_block_below_the_cut_runs_again(family):
    model = tiny.model_of(family)
    trunk = cut(model)
    batch = trunk.batch(QUESTIONS)
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if Site(name, module).name.startswith(f"{find_stacks(model)[0].prefix}.")
    ]
    with torch.no_grad():
        trunk.logits(batch)
    for handle in handles:
        handle.remove()
    prefix = find_stacks(model)[0].prefix
    inside = [name for name in ran if name.startswith((f"{prefix}.0.", f"{prefix}.1."))]
    assert inside == []
    first_block = [name for name in ran if name.startswith(f"{prefix}.2.")]
    if trunk.cut.place == "site":
        assert first_block == [trunk.cut.first.name]
    else:
        assert trunk.cut.first.name in first_block
    assert any(name.startswith(f"{prefix}.3.") for name in ran)


def test_logits_are_taken_only_where_an_answer_needs_them():
    model = tiny.model_of("llama")
    trunk = cut(model)
    batch = trunk.batch(QUESTIONS)
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, out: rows.append(out.shape[:-1].numel())
    )
    trunk.logits(batch)
    handle.remove()
    assert rows == [len(batch.tokens.labels_A)]


# --- without room


def test_no_room_in_a_trial_is_said_as_such(monkeypatch):
    """Whichever pass has none: the model was said to be unfit, or run another way."""
    model = tiny.model_of("llama")
    sites, forward = find_sites(model, 2), model.forward
    passes, full = 0, None

    @wraps(forward)
    def counted(*args, **kwargs):
        nonlocal passes
        passes += 1
        if passes == full:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    assert Trunk(model, sites)._splits
    for full in range(1, passes + 1):  # noqa: B007 read by `counted`
        passes = 0
        with pytest.raises(torch.OutOfMemoryError):
            _ = Trunk(model, sites)._splits
