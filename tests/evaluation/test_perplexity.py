"""Perplexity, and the text that it is of where none is given."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch

import helpers
from malmend.editors.keymoments import passages_of, text_moment
from malmend.evaluation import figures
from malmend.evaluation import perplexity as perplexity_module
from malmend.evaluation.perplexity import HIGHEST, LEAST, MOST, perplexity, unread
from malmend.facts.tokens import Encoder
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings

WORDS = [f"w{index}" for index in range(60)]


@functools.cache
def encoder() -> Encoder:
    return Encoder(helpers.words(WORDS), "eos", 64)


def text(lines: int = 400, words: int = 10) -> str:
    """Lines that differ; some blank, some of one word, which have no key."""
    rows = []
    for index in range(lines):
        rows.append(" ".join(WORDS[(index + at * (1 + index % 7)) % 60] for at in range(words)))
        rows.append("  " if index % 2 else f"  {WORDS[index % 60]} ")
    return "\n".join(rows)


def test_it_begins_where_the_prior_ends():
    """Against the prior itself: what it read, and nothing else, is what comes before."""
    given, read = text(), 1_000
    found = unread(encoder(), given, read)
    assert found is not None
    lines = [line.strip() for line in given.splitlines() if line.strip()]
    first = lines.index(found.words.splitlines()[0])
    model = helpers.tiny_llama(len(WORDS) + 4)
    trunk = Trunk(model, find_sites(model, 1), TrunkSettings(1_000))
    prior = text_moment(trunk, passages_of(encoder(), given), read)[0]
    before = text_moment(trunk, passages_of(encoder(), "\n".join(lines[:first])), 10**9)[0]
    torch.testing.assert_close(prior, before, rtol=1e-12, atol=1e-12)
    fewer = text_moment(trunk, passages_of(encoder(), "\n".join(lines[: first - 2])), 10**9)[0]
    assert not torch.allclose(prior, fewer, rtol=1e-6)


def test_it_says_which_lines_and_how_many_tokens_they_have():
    found = unread(encoder(), text(), 1_000)
    assert found is not None
    lines = [line.strip() for line in text().splitlines() if line.strip()]
    first = lines.index(found.words.splitlines()[0]) + 1
    chosen = found.words.splitlines()
    assert chosen == lines[first - 1 : first - 1 + len(chosen)]
    tokens = sum(len(line.split()) for line in chosen)
    assert found.source == (
        f"malmend's own text, lines {first:,} to {first + len(chosen) - 1:,} ({tokens:,} tokens), "
        "which the prior has not read"
    )
    assert LEAST <= tokens < MOST


@pytest.mark.parametrize("sign", ["\u2028", "\x0c", "\x85"])
def test_a_line_break_alone_ends_a_line(sign):
    """As in facts files: what else Python takes for one may stand within a sentence."""
    given = text().replace(" ", sign, 1)
    one, plain = passages_of(encoder(), given), passages_of(encoder(), text())
    assert [len(line.ids) for line in one] == [len(line.ids) for line in plain]
    found, wanted = unread(encoder(), given, 2), unread(encoder(), text(), 2)
    assert found is not None
    assert wanted is not None
    assert found.source == wanted.source


def test_of_a_long_text_only_so_much_is_taken():
    found = unread(encoder(), text(2_000), 1_000)
    assert found is not None
    assert MOST <= len(found.words.split()) < MOST + 10


@pytest.mark.parametrize("read", [10**6, 3_000])
def test_too_little_is_no_text(read):
    assert unread(encoder(), text(), read) is None
    assert unread(encoder(), "", read) is None


def test_of_a_bfloat16_model_losses_are_taken_and_added_up_in_float32():
    """Against float64 log-softmax of the logits as the model gives them."""
    model = helpers.tiny_llama(len(WORDS) + 4, initializer_range=0.3).bfloat16()
    given = " ".join(random.Random(0).choices(WORDS, k=100))
    ids = torch.tensor([helpers.words(WORDS)(given)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].double().log_softmax(-1)
    wanted = math.exp(-logs.gather(1, ids[0, 1:, None]).mean())
    loaded = prepared(model, helpers.words(WORDS), "tiny")
    found = perplexity(loaded, Trunk(model, find_sites(model)), given)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_edited_layers_alone_read_a_text_again(tmp_path, monkeypatch):
    """And the text is then as surprising as to the whole model, whose logits another way gives."""
    model = helpers.tiny_llama(len(WORDS) + 4, initializer_range=0.3)
    loaded = prepared(model, helpers.words(WORDS), "tiny")
    trunk = Trunk(model, find_sites(model, 1), TrunkSettings(64), tmp_path)
    given = " ".join(random.Random(1).choices(WORDS, k=100))
    ran: list[int] = []
    monkeypatch.setattr(perplexity_module, "WINDOW", 16)
    unedited = perplexity(loaded, trunk, given)
    hooks = [
        block.mlp.down_proj.register_forward_hook(lambda *_, at=at: ran.append(at))
        for at, block in enumerate(model.model.layers)
    ]
    site = trunk.sites[0]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        shift = torch.randn(site.weight.shape, generator=generator, dtype=site.weight.dtype)
        site.weight.add_(3 * shift)
    edited = perplexity(loaded, trunk, given)
    assert set(ran) == {len(model.model.layers) - 1}
    for hook in hooks:
        hook.remove()
    whole = perplexity(loaded, Trunk(model, []), given)
    assert edited == pytest.approx(whole, rel=1e-9)
    assert abs(edited / unedited - 1) > 1e-3


def test_a_text_is_read_from_its_start_up_to_a_bound(monkeypatch):
    model = helpers.tiny_llama(len(WORDS) + 4, initializer_range=0.3)
    loaded, trunk = prepared(model, helpers.words(WORDS), "tiny"), Trunk(model, find_sites(model))
    words = random.Random(3).choices(WORDS, k=40)
    monkeypatch.setattr(perplexity_module, "MOST_READ", 12)
    found = perplexity(loaded, trunk, " ".join(words))
    assert found == perplexity(loaded, trunk, " ".join(words[:12]))
    assert found != perplexity(loaded, trunk, " ".join(words[:11]))


@pytest.mark.parametrize(
    ("mean", "wanted"),
    [(100.0, math.exp(100)), (231.0, HIGHEST), (800.0, HIGHEST), (math.inf, HIGHEST)],
)
def test_one_bound_stands_for_what_is_above_it(mean, wanted, monkeypatch):
    """It was 1e304, which a bench could not read back."""

    def lost(_trunk, terms, grads):
        count = sum(one.counted for one in terms[0].questions)
        return [[torch.tensor([mean * count])]]

    monkeypatch.setattr(perplexity_module, "weight_grads", lost)
    model = helpers.tiny_llama(len(WORDS) + 4)
    loaded = prepared(model, helpers.words(WORDS), "tiny")
    assert perplexity(loaded, Trunk(model, find_sites(model)), "w1 w2 w3") == wanted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (9.5, "9.50"),
        (999_999.0, "999999.00"),
        (1e6, "1.0e+06"),
        (3.2e30, "3.2e+30"),
        (HIGHEST, "over 1e+100"),
        (1e304, "over 1e+100"),
    ],
)
def test_a_large_perplexity_is_short(value, shown):
    assert figures.perplexity(value) == shown
