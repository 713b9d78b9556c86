"""No model is run by cuDNN's attention, whose flag is afterwards what it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

import forms_support as forms
import helpers
import tiny
from malmend.evaluation.generate import generate
from malmend.facts.encoded import collate
from malmend.facts.tokens import Encoder
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.forms import run, without_cudnn
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk

QUESTIONS = tiny.questions(3)


@pytest.fixture(autouse=True)
def back():
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(True)
    yield
    assert cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(before)


def noted(monkeypatch, module):
    """Whether cuDNN's attention is on, at every run of a module."""
    seen, forward = [], module.forward

    @wraps(forward)
    def forwarded(*args, **kwargs):
        seen.append(cuda.cudnn_sdp_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", forwarded)
    return seen


def test_off_in_every_run_of_a_decoder(monkeypatch):
    model = tiny.model_of("llama")
    seen = noted(monkeypatch, model.model)
    trunk = Trunk(model, find_sites(model, 2))
    capture(trunk, QUESTIONS, "answer", Descent(steps=2))  # by suffixes too
    assert trunk._splits
    assert seen
    assert not any(seen)


def test_off_in_every_run_of_an_encoder(monkeypatch):
    model = forms.model_of("t5")
    seen = noted(monkeypatch, model.get_encoder())
    trunk = Trunk(model, find_sites(model, 1, None, "second", "decoder"))
    assert trunk.cut.place == "encoder"
    capture(trunk, forms.questions("t5", 3))
    assert seen
    assert not any(seen)


def test_off_where_answers_are_decoded(monkeypatch):
    words = [f"w{index}" for index in range(9)]
    loaded = prepared(helpers.tiny_llama(len(words) + 4), helpers.words(words), "tiny")
    seen = noted(monkeypatch, loaded.model.model)
    generate(loaded, Encoder(loaded.tokenizer), ["w1 w2", "w3"], 3)
    assert seen
    assert not any(seen)


def test_on_again_after_an_exception(monkeypatch):
    model = tiny.model_of("llama")

    def fails(*_args, **_kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(RuntimeError):
        run(model, collate(QUESTIONS))


def test_two_threads_that_overlap():
    """The first one out switched it on for the other."""
    first, second = without_cudnn(), without_cudnn()
    first.__enter__()
    with ThreadPoolExecutor(1) as other:
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert not cuda.cudnn_sdp_enabled()
        other.submit(second.__exit__, None, None, None).result()
    assert cuda.cudnn_sdp_enabled()


def test_inside_another_and_beside_a_choice_of_kernel():
    with sdpa_kernel(SDPBackend.MATH):
        with without_cudnn():
            with without_cudnn():
                assert not cuda.cudnn_sdp_enabled()
            assert not cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
            assert not cuda.flash_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()
