"""Answers' tokens behind prompts that are kept, against the whole model one question at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from malmend.facts.encoded import collate
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.sites import find_sites
from malmend.models.suffix import Suffix, splits
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import shifted

FAMILY = pytest.mark.parametrize("family", tiny.EVERY)
QUESTIONS = tiny.questions(7, longest=20)


def cut(family, **settings):
    model = tiny.model_of(family)
    return Trunk(model, find_sites(model, 2), TrunkSettings(**settings))


def random_shifts(sites):
    torch.manual_seed(0)
    return {site.name: 0.3 * torch.randn(site.shape_VK, dtype=torch.float64) for site in sites}


@FAMILY
@torch.no_grad()
def test_suffixes_say_what_whole_questions_do(family):
    trunk = cut(family)
    assert splits(trunk.cut)
    suffix = trunk.suffix(trunk.batch(QUESTIONS))
    close = 1e-4 if family in tiny.FLOAT32_INSIDE else 1e-10
    expected = tiny.logits_alone(trunk.model, QUESTIONS)
    torch.testing.assert_close(suffix.logits(), expected, rtol=0, atol=close)
    some = [QUESTIONS[5], QUESTIONS[2]]
    found = suffix.subset([5, 2], collate(some)).logits()
    expected = tiny.logits_alone(trunk.model, some)
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    once_more = suffix.logits()  # what a step adds to the cache is gone again
    torch.testing.assert_close(
        once_more, tiny.logits_alone(trunk.model, QUESTIONS), rtol=0, atol=close
    )


def test_a_model_that_cannot_run_longer_answers_behind_prompts_is_run_whole(monkeypatch):
    """The trial's questions are short: of longer ones a mask may be of another length."""
    trunk = cut("llama")
    wanted = capture(cut("llama"), QUESTIONS, "answer", Descent(steps=2))
    assert trunk._splits  # the trial passes

    def broken(_suffix):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (5)")

    monkeypatch.setattr(Suffix, "logits", broken)
    for found, other in zip(
        capture(trunk, QUESTIONS, "answer", Descent(steps=2)), wanted, strict=True
    ):
        torch.testing.assert_close(found.value_grads_NV, other.value_grads_NV, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_behind_prompts_of_the_edited_model(family):
    trunk = cut(family)
    with shifted(list(trunk.sites), random_shifts(trunk.sites)), torch.no_grad():
        found = trunk.suffix(trunk.batch(QUESTIONS)).logits()
        expected = tiny.logits_alone(trunk.model, QUESTIONS)
    assert (expected - tiny.logits_alone(trunk.model, QUESTIONS)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("descent", [None, Descent(steps=4)])
def test_what_is_captured_is_that_of_whole_questions(family, descent, monkeypatch):
    trunk = cut(family, batch_tokens=60)
    found = capture(trunk, QUESTIONS, "answer", descent)
    monkeypatch.setattr(Trunk, "suffix", lambda _trunk, _batch: None)
    expected = capture(trunk, QUESTIONS, "answer", descent)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.keys_NK, theirs.keys_NK, rtol=0, atol=1e-10)
        torch.testing.assert_close(mine.value_grads_NV, theirs.value_grads_NV, rtol=0, atol=1e-8)


def test_a_prompt_of_one_token_has_nothing_before_its_suffix():
    trunk = cut("llama")
    short = replace(QUESTIONS[0], answer_start=1)
    asked = [*QUESTIONS[1:], short]
    assert trunk.suffix(trunk.batch(asked)) is None
    whole = capture(trunk, asked)
    alone = capture(trunk, [short])
    count = len(short.sources)
    for all_pairs, pair in zip(whole, alone, strict=True):
        torch.testing.assert_close(all_pairs.keys_NK[-count:], pair.keys_NK, rtol=0, atol=1e-10)


def test_a_model_whose_cache_says_something_else_is_run_whole(monkeypatch):
    """What the trial is for: a prefix that is forgotten changes the answers, and is no error."""
    forgetful = cut("llama")
    attend = torch.nn.functional.scaled_dot_product_attention

    def forgets(query, key, value, *args, **more):
        if key.shape[-2] > query.shape[-2]:
            value = value * 0.5
        return attend(query, key, value, *args, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forgets)
    assert not splits(forgetful.cut)
    assert forgetful.suffix(forgetful.batch(QUESTIONS)) is None


def test_a_suffix_that_fails_on_longer_questions_is_found_out(monkeypatch):
    """A trial is short; a window that a cache keeps and a model does not have is not seen in it."""
    trunk = cut("llama", batch_tokens=60)
    expected = capture(trunk, QUESTIONS)
    said = Suffix.logits

    def forgets(suffix):
        return said(suffix) + float(suffix.kept > 4)

    monkeypatch.setattr(Suffix, "logits", forgets)
    assert splits(trunk.cut)
    assert max(one.sources[0] for one in QUESTIONS) > 4
    for mine, theirs in zip(capture(trunk, QUESTIONS), expected, strict=True):
        torch.testing.assert_close(mine.keys_NK, theirs.keys_NK, rtol=0, atol=1e-10)
        torch.testing.assert_close(mine.value_grads_NV, theirs.value_grads_NV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", ["logits", "subset"])
@pytest.mark.parametrize("error", [AssertionError, RuntimeError, KeyError])
def test_whatever_a_cache_raises_the_model_is_run_whole(monkeypatch, at, error):
    trunk = cut("llama")

    def fails(*_args):
        raise error("no such cache")

    monkeypatch.setattr(Suffix, at, fails)
    assert trunk.suffix(trunk.batch(QUESTIONS)) is None
    assert len(capture(trunk, QUESTIONS)) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, NameError])
def test_what_is_no_caches_is_raised(monkeypatch, error):
    """Without room a model was once run whole, which is slow, and nothing said so."""
    trunk = cut("llama")

    def fails(*_args):
        raise error("no room")

    monkeypatch.setattr(Suffix, "logits", fails)
    with pytest.raises(error):
        trunk.suffix(trunk.batch(QUESTIONS))


def test_the_trial_asks_a_part_of_its_batch_too(monkeypatch):
    part = Suffix.subset

    def wrong(suffix, rows, tokens):
        other = part(suffix, rows, tokens)
        other._stored_BSF = other._stored_BSF + 1
        return other

    trunk = cut("llama")
    monkeypatch.setattr(Suffix, "subset", wrong)
    assert not splits(trunk.cut)
