"""Free-running answers of an encoder-decoder, whose answers have positions of their own."""

from __future__ import annotations

import pytest
import torch

import forms_support
import helpers
from malmend.evaluation.generate import generate
from malmend.facts.tokens import Encoder, Reading
from malmend.models.load import LoadedModel, prepared

WORDS = [f"w{index}" for index in range(forms_support.VOCABULARY - 4)]
POSITIONS = 40


def bart() -> LoadedModel:
    """One that never ends an answer, and says words only."""
    model = forms_support.model_of("bart", torch.float32)
    model.final_logits_bias[:, :4] = -1e4
    return prepared(model, helpers.words(WORDS, template="<s> $A </s>"), "tiny")


@torch.no_grad()
def said(loaded: LoadedModel, prompt: str, prefix: tuple[int, ...], count: int) -> list[str]:
    """Greedy decoding by plain passes of the whole model."""
    ids, new = loaded.tokenizer(prompt)["input_ids"], list(prefix)
    for _ in range(count):
        logits = loaded.model(
            input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([new]), use_cache=False
        ).logits
        new.append(int(logits[0, -1].argmax()))
    return [WORDS[token - 4] for token in new[len(prefix) :]]


@pytest.mark.parametrize(("limit", "count"), [(12, 12), (100, POSITIONS - 2)])
def test_a_long_prompt_takes_no_position_from_the_answer(limit, count):
    loaded = bart()
    assert loaded.positions == POSITIONS
    reading = Reading("seq2seq", start=loaded.model.config.decoder_start_token_id)
    encoder = Encoder(loaded.tokenizer, "eos", POSITIONS, reading=reading)
    assert len(encoder.prefix) == 2
    prompts = [" ".join(WORDS[:size]) for size in (POSITIONS - 3, 5)]  # two tokens frame each
    answers = generate(loaded, encoder, prompts, limit)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.text.split() == said(loaded, prompt, encoder.prefix, count)
        assert answer.cut
