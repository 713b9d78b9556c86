"""MEMIT against the plain model: hooks of the tests' own, solve and Adam of torch, float64.

Shape letters: M facts, V value width, K key width.
"""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import forms_support
import helpers
import tiny
from malmend import material
from malmend.errors import EditorError, ModelError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder
from malmend.methods import moments
from malmend.methods.memit import ENOUGH, FLOOR, Memit
from malmend.models.load import LoadedModel
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.progress import silent
from malmend.workbench import Workbench, lay_out
from tiny import bits

KNOWN = sorted({word for line in helpers.CORPUS for word in re.findall(r"\w+|[^\w\s]", line)})
PLAIN = helpers.words(KNOWN, "<s> $A")
MODULE = sys.modules["malmend.methods.memit"]
PIECES = [helpers.byte_level(), helpers.metaspace()]
BENCHES: dict[object, Workbench] = {}
TEXT = "\n".join(helpers.CORPUS * 2 + ["Peru has moons, and France is Paris."] * 3)
FACTS = [
    Fact("a", "The capital of France", "Lima", "France", line=3),
    Fact("b", "In which country is Lake Ora?", "Peru", "Lake Ora", line=5),
    Fact("c", "Venus has two", "moons in Chile", "Venus", line=7),
    Fact("d", "Chile is in Peru", "Mars", "Peru", line=8),
]
FAST = Memit(blocks=(0, 1, 2), alpha=2.0, rate=0.1, steps=6, prefixes=2, text_tokens=60)


@pytest.fixture(autouse=True)
def short_text(monkeypatch, own_cache):
    monkeypatch.setattr(material, "read_text", lambda _path: TEXT)


def bench_of(method: Memit, family: str = "llama", tokenizer=None, batch_tokens=1024) -> Workbench:
    """A model on the bench: always the same one, for no method may change it."""
    tokenizer = tokenizer or PLAIN
    key = (method.blocks, method.end_of_answer, family, tokenizer, batch_tokens)
    if key not in BENCHES:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
        model = tiny.model_of(family, **sizes)
        loaded = LoadedModel("tiny", model, tokenizer, "0" * 64)
        settings = TrunkSettings(batch_tokens, 0 if batch_tokens < 100 else 10**8)
        sites = method.sites_in(model)
        BENCHES[key] = lay_out(loaded, sites, method.end_of_answer, trunk=settings)
    return BENCHES[key]


def block_of(model, number: int):
    stems = (name.split("{}")[0] + str(number) for name in tiny.SECOND.values())
    modules = dict(model.named_modules())
    return next(modules[stem] for stem in stems if stem in modules)


def run(model, question: Encoded, watched=(), block=None, at=0, delta=None):
    """Logits of one question alone, the inputs of modules and the output of a block at ``at``."""
    inputs, output = {}, []

    def keep(module, args, _out):
        # Some families flatten batch and positions.
        inputs[module] = args[0].reshape(-1, args[0].shape[-1])[at].detach().clone()

    def end(_module, _args, out):
        states = out[0] if isinstance(out, tuple) else out
        output.append(states[0, at].detach().clone())
        if delta is None:
            return None
        place = torch.zeros(states.shape[1], 1, dtype=states.dtype)
        place[at] = 1
        states = states + place * delta
        return (states, *out[1:]) if isinstance(out, tuple) else states

    handles = [module.register_forward_hook(keep) for module in watched]
    handles += [block.register_forward_hook(end)] if block is not None else []
    logits = model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, [inputs[module] for module in watched], output[0] if output else None


def nll(logits: Tensor, question: Encoded) -> Tensor:
    wanted = torch.tensor(question.labels)
    return functional.cross_entropy(logits[list(question.sources)], wanted, reduction="sum")


def mean_state(model, block, prompts) -> Tensor:
    return torch.stack([run(model, q, (), block, at)[2] for q, at in prompts]).mean(0)


def kl_behind(model, block, essence, delta: Tensor) -> Tensor:
    question, at = essence
    before = run(model, question)[0][-1].log_softmax(-1).detach()
    after = run(model, question, (), block, at, delta)[0][-1].log_softmax(-1)
    return (before.exp() * (before - after)).sum()


def loss_of(model, block, prompts, delta: Tensor | None) -> Tensor:
    every = [nll(run(model, q, (), block, at, delta)[0], q) for q, at in prompts]
    return torch.stack(every).mean()


def moved_by_hand(
    model, block, asked, method: Memit, enough: float = ENOUGH
) -> tuple[Tensor, float]:
    """Delta by torch's Adam, on the whole model, and the loss before the last step."""
    prompts, essence = asked
    state = mean_state(model, block, prompts)
    delta = torch.zeros_like(state, requires_grad=True)
    optimiser, last = torch.optim.Adam([delta], method.rate), 0.0
    for _ in range(method.steps):
        optimiser.zero_grad()
        fitted = loss_of(model, block, prompts, delta)
        last = fitted.item()
        if last < enough:
            break
        share = (delta / state.norm()).square().sum()
        held = method.kl * kl_behind(model, block, essence, delta) + method.decay * share
        (fitted + held).backward()
        optimiser.step()
        with torch.no_grad():
            most = method.clamp * state.norm()
            if delta.norm() > most:
                delta *= most / delta.norm()
    return delta.detach(), last


def moment_by_hand(bench: Workbench, module, most: int) -> Tensor:
    """C over the first lines of the text, until they have so many tokens but their first."""
    total, count = 0.0, 0
    for line in TEXT.splitlines():
        ids = torch.tensor([bench.encoder.passage_ids(line)])
        seen = []
        handle = module.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0]))
        bench.loaded.model(input_ids=ids, use_cache=False)
        handle.remove()
        keys = seen[0].reshape(-1, seen[0].shape[-1])[1:]
        total, count = total + keys.T @ keys, count + len(keys)
        if count >= most:
            break
    return total / count


def edited(model, sites, shifts):
    other = copy.deepcopy(model)
    for site in sites:
        if site.name in shifts:
            other.get_submodule(site.name).weight.data += site.oriented(shifts[site.name])
    return other


@pytest.mark.parametrize(
    ("family", "blocks", "prefixes"),
    [("llama", (0, 1, 2), 2), ("gpt2", (1, 3), 0), ("gptj", (1, 2), 1), ("opt", (2,), 2)],
)
def test_the_shifts_are_those_of_the_formula(family, blocks, prefixes):
    method = Memit(blocks, 4, 0.1, alpha=2.0, prefixes=prefixes, text_tokens=60)
    bench = bench_of(method, family)
    model, sites = bench.loaded.model, bench.trunk.sites
    assert [site.name for site in sites] == [tiny.SECOND[family].format(n) for n in blocks]
    asked = method.asked(bench, FACTS)
    goals_MV, deltas_MV, _ = method.goals(bench, asked, silent)
    found = method.find(bench, FACTS, silent)
    by_hand: dict[str, Tensor] = {}
    for done, (number, site) in enumerate(zip(blocks, sites, strict=True)):
        now = edited(model, sites, by_hand)
        module, block = now.get_submodule(site.name), block_of(now, blocks[-1])
        keys, rests = [], []
        for (prompts, _), goal in zip(asked, goals_MV, strict=True):
            seen = [run(now, q, [module], block, at) for q, at in prompts]
            keys.append(torch.stack([one[1][0] for one in seen]).mean(0))
            state = torch.stack([one[2] for one in seen]).mean(0)
            rests.append((goal - state) / (len(blocks) - done))
        if done == 0:
            torch.testing.assert_close(
                torch.stack(rests) * len(blocks), deltas_MV, rtol=1e-6, atol=1e-9
            )
        K, R = torch.stack(keys).T, torch.stack(rests).T
        C = moment_by_hand(bench, model.get_submodule(site.name), 60)
        P = 2.0 * (C + FLOOR * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype))
        by_hand[site.name] = torch.linalg.solve(P + K @ K.T, K @ R.T).T
        torch.testing.assert_close(
            found.shifts[site.name], by_hand[site.name], rtol=1e-6, atol=1e-9, msg=f"block {number}"
        )
    assert found.rank == len(FACTS)
    assert all(shift.dtype == torch.float64 for shift in found.shifts.values())


@pytest.mark.parametrize(("prefixes", "family"), [(0, "llama"), (2, "gpt2")])
def test_a_fact_alone_is_brought_to_its_goal_where_C_hardly_weighs(prefixes, family):
    method = Memit((0, 1, 2), 6, 0.1, alpha=1e-9, prefixes=prefixes, text_tokens=60)
    bench = bench_of(method, family)
    asked = method.asked(bench, FACTS[:1])
    goals_MV, deltas_MV, _ = method.goals(bench, asked, silent)
    shifts = method.find(bench, FACTS[:1], silent).shifts
    now = edited(bench.loaded.model, bench.trunk.sites, shifts)
    prompts = asked[0][0]
    assert len(prompts) == prefixes + 1
    state = mean_state(now, block_of(now, 2), prompts)
    torch.testing.assert_close(state, goals_MV[0], rtol=1e-6, atol=1e-7)
    assert deltas_MV.norm() > 0.1
    assert (
        loss_of(now, None, prompts, None) < loss_of(bench.loaded.model, None, prompts, None) - 0.3
    )


@pytest.mark.parametrize(
    "method",
    [
        Memit((0, 2), 7, 0.1, prefixes=0, text_tokens=60),
        Memit((0, 2), 7, 0.3, prefixes=2, clamp=0.3, text_tokens=60),
        Memit((0, 2), 7, 0.3, kl=3.0, decay=0.0, clamp=9.0, prefixes=1, text_tokens=60),
        Memit((0, 2), 7, 0.3, kl=0.0, decay=9.0, clamp=9.0, prefixes=1, text_tokens=60),
    ],
)
def test_the_move_is_that_of_adam_on_the_whole_model(method):
    bench = bench_of(method)
    asked = method.asked(bench, FACTS[:2])
    _, deltas_MV, nll_M = method.goals(bench, asked, silent)
    block = block_of(bench.loaded.model, 2)
    for fact, delta, last in zip(asked, deltas_MV, nll_M, strict=True):
        wanted, loss = moved_by_hand(bench.loaded.model, block, fact, method)
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-7)
        assert last.item() == pytest.approx(loss, rel=1e-6)
        before = loss_of(bench.loaded.model, None, fact[0], None)
        assert loss_of(bench.loaded.model, block, fact[0], delta) < before - 0.005


@pytest.mark.parametrize("clamp", [0.01, 0.2])
def test_no_move_is_longer_than_the_clamp(clamp):
    method = Memit((0, 1), 6, 0.5, clamp=clamp, prefixes=0, text_tokens=60)
    bench = bench_of(method)
    goals_MV, deltas_MV, _ = method.goals(bench, method.asked(bench, FACTS), silent)
    share_M = deltas_MV.norm(dim=1) / (goals_MV - deltas_MV).norm(dim=1)
    torch.testing.assert_close(share_M, torch.full_like(share_M, clamp))


@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_a_move_does_not_depend_on_the_other_facts(batch_tokens, monkeypatch):
    monkeypatch.setattr(MODULE, "ENOUGH", 2.0)
    method = Memit((0, 2), 10, 0.5, 0.1, 9.0, 0.0, 2.0, 1, 60, end_of_answer="none")
    bench = bench_of(method, "gpt2", batch_tokens=batch_tokens)
    _, deltas_MV, nll_M = method.goals(bench, method.asked(bench, FACTS), silent)
    assert 0 < (nll_M < 2.0).sum() < len(FACTS)  # some leave their batch early
    model = bench.loaded.model
    for fact, delta, last in zip(FACTS, deltas_MV, nll_M, strict=True):
        alone = method.asked(bench, [fact])
        _, delta_1V, nll_1 = method.goals(bench, alone, silent)
        torch.testing.assert_close(delta_1V[0], delta, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(nll_1[0], last, rtol=1e-5, atol=1e-7)
        if last < 2.0:
            wanted, _ = moved_by_hand(model, block_of(model, 2), alone[0], method, 2.0)
            torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-7)


def test_the_kl_holds_what_the_subject_is():
    found = []
    for kl in (0.0, 30.0):
        method = Memit((0, 2), 8, 0.3, kl, 9.0, prefixes=1, text_tokens=60)
        bench = bench_of(method)
        asked = method.asked(bench, FACTS)
        deltas_MV = method.goals(bench, asked, silent)[1]
        block = block_of(bench.loaded.model, 2)
        pairs = zip(asked, deltas_MV, strict=True)
        found.append([kl_behind(bench.loaded.model, block, a[1], d).item() for a, d in pairs])
    assert all(held < free / 2 for free, held in zip(*found, strict=True))


WORDS = [
    "The",
    "capital",
    "Lake",
    "Ora",
    "is",
    "in",
    "where",
    "?",
    "Oral",
    "Chile",
    "a",
    ".",
    "Every",
    "Eve",
    "asks",
]

NAMED = {template: helpers.words(WORDS, template) for template in (None, "<s> $A")}


@pytest.mark.parametrize(
    ("prompt", "subject", "last"),
    [
        ("Lake Ora is in", "Lake Ora", 1),
        ("where is Lake Ora in ?", "Lake Ora", 3),
        ("where is Lake Ora", "Lake Ora", 3),
        ("where is Lake Ora ", " Lake Ora ", 3),
        ("Lake Ora is where Lake Ora is", "Lake Ora", 5),  # of two the last
        ("Eve asks Every", "Eve", 0),  # no part of a word
        ("Every asks", "Eve", 0),  # unless there is no other
    ],
)
@pytest.mark.parametrize("template", [None, "<s> $A"])
def test_where_the_subject_ends(prompt, subject, last, template):
    method = Memit((0,), prefixes=0)
    bench = bench_of(method, tokenizer=NAMED[template])
    ((((question, at),), (essence, essence_at)),) = method.asked(
        bench, [Fact("a", prompt, "Chile", subject)]
    )
    assert question == bench.encoder.encode(Fact("a", prompt, "Chile").question)
    assert at == max(last + (template is not None), 1)  # never the very first
    words = bench.encoder.tokenizer.convert_ids_to_tokens(essence.ids[template is not None :])
    assert words == [*subject.split(), "is", "a"]
    assert essence_at == max(len(essence.ids) - 3, 1)
    assert essence.labels == ()


@pytest.mark.parametrize("tokenizer", PIECES, ids=["byte_level", "metaspace"])
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_where_the_subject_ends_among_pieces_of_words(tokenizer, fact):
    method = Memit((0,), prefixes=2, text_tokens=60)
    bench = bench_of(method, tokenizer=tokenizer)
    ((prompts, essence),) = method.asked(bench, [fact])
    read = bench.encoder.tokenizer.decode
    assert len({question for question, _ in prompts}) == 3
    for question, at in (*prompts, essence):
        assert read(question.ids[: at + 1]).endswith(fact.subject)
        assert not read(question.ids[:at]).endswith(fact.subject)
    for question, _ in prompts[1:]:
        behind = read(question.prompt).removesuffix(fact.prompt)
        assert behind != read(question.prompt)
        start = behind.removeprefix("<s>").strip().removesuffix(".")
        assert any(line.startswith(start) and start for line in TEXT.splitlines())


def test_a_subject_that_is_the_first_token_is_moved_at_the_next():
    """The first is an attention sink: a move there is of every prompt."""
    fact = Fact("a", "Chile is in", "Lake", "Chile")
    for template, prefixes in ((None, 0), (None, 2), ("<s> $A", 2)):
        method = Memit((0,), prefixes=prefixes)
        bench = bench_of(method, tokenizer=NAMED[template])
        ((prompts, essence),) = method.asked(bench, [fact])
        assert len(prompts) == 1 + prefixes
        assert [prompts[0][1], essence[1]] == [1, 1]
        read = bench.encoder.tokenizer.decode
        for question, at in prompts[1:]:
            assert read(question.ids[: at + 1]).endswith("Chile")


def test_a_prompt_of_one_token_is_refused():
    fact = Fact("a", "Chile", "Lake", "Chile")
    method = Memit((0,))
    bench = bench_of(method, tokenizer=NAMED[None])
    with pytest.raises(EditorError, match=r"1 of 1 fact.* one token"):
        method.asked(bench, [fact])


def test_a_prompt_too_long_behind_a_prefix_is_left_out_there_alone():
    bench = bench_of(FAST, tokenizer=PIECES[0])
    longest = len(bench.encoder.encode(FACTS[0].question).ids)
    encoder = Encoder(bench.encoder.tokenizer, "eos", longest)
    prompts, _ = FAST.asked(Workbench(bench.loaded, bench.trunk, encoder), FACTS[:1])[0]
    assert [question for question, _ in prompts] == [encoder.encode(FACTS[0].question)]


def test_facts_without_a_subject_in_the_prompt_are_refused_by_line():
    bench = bench_of(FAST)
    bad = [
        Fact("x", "Mars has", "moons", None, at="f:11"),
        Fact("y", "Mars has", "two", " ", at="f:12"),
    ]
    bad += [Fact("z", "Mars has", "two", "Venus", at=f"f:{number}") for number in range(13, 25)]
    with pytest.raises(EditorError) as caught:
        FAST.find(bench, [*FACTS, *bad], silent)
    said = str(caught.value)
    assert "14 of 18 facts" in said
    named = ", ".join(f"f:{number}" for number in range(11, 21))
    assert f"({named} and 4 more)" in said
    with pytest.raises(EditorError, match=r"1 of 1 fact has .*\(f:11\)"):
        FAST.find(bench, bad[:1], silent)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_is_no_decoder_is_refused(family):
    model = forms_support.model_of(family)
    with pytest.raises(EditorError, match="edits decoders alone"):
        FAST.sites_in(model)
    bench = Workbench(None, Trunk(model, find_sites(model, 1)), Encoder(helpers.metaspace()))
    with pytest.raises(EditorError, match="edits decoders alone"):
        FAST.find(bench, FACTS, silent)


@pytest.mark.parametrize("blocks", [(), (-1, 2), (3, 4)])
def test_blocks_that_are_not_there_are_refused(blocks):
    with pytest.raises(ModelError, match="from 0 to 3"):
        Memit(blocks).sites_in(tiny.model_of("llama"))


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (4, [1]), (30, [10, 11, 12, 13, 14])])
def test_the_usual_blocks(count, expected):
    sites = Memit().sites_in(tiny.model_of("llama", num_hidden_layers=count))
    assert [site.name for site in sites] == [tiny.SECOND["llama"].format(n) for n in expected]


def test_blocks_are_edited_lowest_first_and_once():
    sites = Memit((3, 1, 3)).sites_in(tiny.model_of("gpt2"))
    assert [site.name for site in sites] == [tiny.SECOND["gpt2"].format(n) for n in (1, 3)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"text_tokens": 0}, "text_tokens is 0"),
        ({"prefixes": -1}, "prefixes is -1"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"clamp": float("inf")}, "clamp is inf"),
        ({"kl": -1.0}, "kl is -1"),
        ({"decay": float("inf")}, "decay is inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(EditorError, match=f"memit.{said}"):
        Memit(**wrong)


def state_of(model) -> tuple[list[Tensor], int]:
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return [bits(parameter) for parameter in model.parameters()], hooks


def test_the_weights_and_hooks_are_as_before_also_after_an_exception(monkeypatch):
    bench = bench_of(FAST)
    model = bench.loaded.model
    before, hooks = state_of(model)
    seen = []

    def check() -> None:
        after, left = state_of(model)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert left == hooks
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    FAST.find(bench, FACTS, silent)
    check()

    def broken(batch):
        after, _ = state_of(model)
        if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            seen.append(batch)
            raise KeyboardInterrupt
        return Trunk.final_states(bench.trunk, batch)

    monkeypatch.setattr(bench.trunk, "final_states", broken)
    with pytest.raises(KeyboardInterrupt):
        FAST.find(bench, FACTS, silent)
    assert seen  # while a shift was on
    check()


def test_two_runs_are_equal_and_another_seed_reads_other_prefixes():
    bench = bench_of(FAST)
    one, two = (FAST.find(bench, FACTS, silent) for _ in range(2))
    assert one.shifts.keys() == two.shifts.keys()
    assert all(torch.equal(one.shifts[name], two.shifts[name]) for name in one.shifts)
    others = [replace(FAST, seed=seed).asked(bench, FACTS) for seed in range(1, 5)]
    assert any(other != FAST.asked(bench, FACTS) for other in others)


def test_an_edit_says_how_far_the_answers_came_and_what_is_done_once():
    bench = bench_of(FAST)
    found = FAST.find(bench, FACTS, silent)
    nll_M = FAST.goals(bench, FAST.asked(bench, FACTS), silent)[2]
    assert found.said["nll"] == pytest.approx(nll_M.mean().item())
    assert 0 < found.once < 20


def test_moments_of_text_are_kept_and_found_bit_for_bit(monkeypatch):
    bench = bench_of(FAST)
    first = FAST.find(bench, FACTS, silent).shifts
    with monkeypatch.context() as patch:
        patch.setattr(moments, "text_moment", lambda *_: pytest.fail("made anew"))
        again = FAST.find(bench, FACTS, silent).shifts
        assert all(torch.equal(first[name], again[name]) for name in first)
        for other in (replace(FAST, text_tokens=20), replace(FAST, blocks=(0, 1))):
            with pytest.raises(pytest.fail.Exception, match="made anew"):
                other.find(bench_of(other), FACTS, silent)
    (kept,) = moments.cached("calibrations").glob("moments-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    found = FAST.find(bench, FACTS, silent).shifts
    assert all(torch.equal(first[name], found[name]) for name in first)
