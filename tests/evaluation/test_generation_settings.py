"""A model's own generation settings change no answer: each against decoding by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

import forms_support as forms
import helpers
from malmend.evaluation.generate import generate
from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel, prepared

WORDS = [f"w{index}" for index in range(56)]
LIMIT = 8
PROMPTS = [" ".join(WORDS[at : at + 2 + at % 3]) for at in range(0, 50, 5)]
SETTINGS: dict[str, Any] = {
    "max_length": 3,
    "max_new_tokens": 2,
    "min_length": 40,
    "min_new_tokens": LIMIT,
    "early_stopping": True,
    "max_time": 1e-4,
    "stop_strings": ["w3"],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"max_cache_len": 4},
    "max_cache_len": 4,
    "temperature": 5.0,
    "top_k": 7,
    "top_p": 0.3,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "length_penalty": -5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(4, 40)],
    "renormalize_logits": True,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(4, 40)),
    "begin_suppress_tokens": list(range(4, 40)),
    "sequence_bias": [[[11], 90.0]],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=90.0),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "mtp",
    "compile_config": {"backend": "none"},
    "disable_compile": False,
    "continuous_batching_config": {},
    "low_memory": True,
    "penalty_alpha": 0.9,
    "dola_layers": "high",
    "diversity_penalty": 9.0,
    "num_beam_groups": 2,
    "constraints": [["w3"]],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 1,
}
# What the answers stand behind and end at, and what says where the settings are from.
OTHERS = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
OTHERS |= {"transformers_version", "_from_model_config"}


@functools.cache
def made(form: str) -> LoadedModel:
    tokenizer = helpers.words(WORDS)
    if form == "seq2seq":
        return prepared(forms.model_of("t5-gated", seed=2), tokenizer, form)
    keywords: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.4}
    return prepared(helpers.tiny_llama(60, seed=3, **keywords), tokenizer, form)


def encoder_of(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, reading=loaded.reading)


@functools.cache
@torch.no_grad()
def by_hand(form: str) -> list[str]:
    """Each prompt alone, the whole of it again at every token, the likeliest token taken."""
    loaded, out = made(form), []
    encoder = encoder_of(loaded)
    for prompt in PROMPTS:
        ids, new = torch.tensor([encoder.prompt_ids(prompt)]), list[int]()
        while len(new) < LIMIT and 2 not in new:
            if form == "seq2seq":
                before = torch.tensor([[*encoder.prefix, *new]])
                logits = loaded.model(input_ids=ids, decoder_input_ids=before).logits
            else:
                logits = loaded.model(torch.cat([ids, torch.tensor([new]).long()], 1)).logits
            new.append(int(logits[0, -1].argmax()))
        out.append(loaded.tokenizer.decode(new, skip_special_tokens=True).strip())
    return out


def test_the_settings_are_all_that_there_are():
    assert SETTINGS.keys() | OTHERS >= vars(GenerationConfig()).keys()


@pytest.mark.parametrize("form", ["causal", "seq2seq"])
def test_answers_by_hand_can_be_told_apart(form):
    assert len(set(by_hand(form))) > len(PROMPTS) / 2
    assert max(len(text.split()) for text in by_hand(form)) == LIMIT


@pytest.mark.parametrize("form", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_models_own_setting_changes_no_answer(name, form, monkeypatch):
    loaded = made(form)
    monkeypatch.setattr(loaded.model.generation_config, name, SETTINGS[name], raising=False)
    own = loaded.model.generation_config
    found = generate(loaded, encoder_of(loaded), PROMPTS, LIMIT, whole=True)
    assert [answer.text for answer in found] == by_hand(form)
    assert loaded.model.generation_config is own
    assert getattr(own, name) == SETTINGS[name]


def test_the_models_own_settings_are_back_after_an_error(monkeypatch):
    loaded = made("causal")
    own = loaded.model.generation_config

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(loaded.model, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate(loaded, encoder_of(loaded), PROMPTS, LIMIT)
    assert loaded.model.generation_config is own
