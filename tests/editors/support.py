"""Editors away from their start, on tiny models, and random facts to edit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import helpers
from malmend.editors.calibration import covariance
from malmend.editors.editor import Editor, EditorSettings, SiteStatistics
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoded, Encoder, EndOfAnswer
from malmend.models.capture import Captured, capture
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.numerics.moments import RunningMoments

# Threads of a busy machine wait for one another; these matrices are too small to share.
torch.set_num_threads(1)

WORDS = [f"w{index}" for index in range(56)]
INNER = 32


def encoder(end_of_answer: EndOfAnswer = "eos") -> Encoder:
    """One token per word; no beginning-of-text token."""
    return Encoder(helpers.words(WORDS), end_of_answer, 64)


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A random model of three blocks whose predictions are far from uniform."""
    vocabulary = len(WORDS) + 4
    if family == "gpt2":
        model = helpers.tiny_gpt2(vocabulary, seed, n_layer=3, n_inner=INNER, initializer_range=0.3)
    else:
        model = helpers.tiny_llama(
            vocabulary, seed, num_hidden_layers=3, intermediate_size=INNER, initializer_range=0.3
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # else zero, and a lost bias would not be seen
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).requires_grad_(False)


def tiny_trunk(
    model: PreTrainedModel,
    layers: int = 2,
    pattern: str | None = None,
    batch_tokens: int = 4096,
    store: Path | None = None,
) -> Trunk:
    return Trunk(model, find_sites(model, layers, pattern), TrunkSettings(batch_tokens), store)


def some_words(generator: random.Random, least: int, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


def random_facts(count: int, seed: int = 0, paraphrases: int = 2, unrelated: int = 2) -> list[Fact]:
    """Facts with answers of one to three tokens; questions of unlike length."""
    generator = random.Random(seed)
    facts = []
    for index in range(count):
        answer = some_words(generator, 1, 3)
        asked = tuple(some_words(generator, 2, 5) for _ in range(paraphrases))
        others = tuple(
            Question(some_words(generator, 2, 5), some_words(generator, 1, 3))
            for _ in range(unrelated)
        )
        prompt = some_words(generator, 2, 5)
        facts.append(Fact(f"f{index}", prompt, answer, None, asked, others, line=index + 1))
    return facts


def random_text(lines: int, seed: int = 0) -> str:
    generator = random.Random(f"text {seed}")
    return "\n".join(some_words(generator, 2, 9) for _ in range(lines))


def statistics_of(
    trunk: Trunk, captured: Sequence[Captured], with_covariance: bool = True
) -> dict[str, SiteStatistics]:
    """Moments of what was captured, and C of a random text."""
    passages = []
    for line in random_text(30).splitlines():
        ids = encoder().passage_ids(line)
        passages.append(Encoded(ids, len(ids), len(ids)))
    known = {}
    for site, pair, found in zip(
        trunk.sites, captured, covariance(trunk, passages, 10_000), strict=True
    ):
        value_width, key_width = site.shape_VK
        one = SiteStatistics(
            RunningMoments(key_width),
            RunningMoments(value_width),
            found if with_covariance else None,
        )
        one.keys.add(pair.keys_NK)
        one.value_grads.add(pair.value_grads_NV)
        known[site.name] = one
    return known


def captured_of(trunk: Trunk, facts: Sequence[Fact], settings: EditorSettings) -> list[Captured]:
    questions = encoder(settings.end_of_answer).encode_all(fact.question for fact in facts)
    return capture(trunk, questions, settings.tokens, settings.descent)


def random_editor(
    settings: EditorSettings,
    trunk: Trunk,
    captured: Sequence[Captured],
    with_covariance: bool = True,
    eta: float = 1.0,
    alpha: float = 1.0,
    ridge: float = 0.1,
    seed: int = 0,
) -> Editor:
    """An editor away from its start: random network, other scalars at every site."""
    editor = Editor(
        settings,
        {site.name: site.shape_VK for site in trunk.sites},
        statistics_of(trunk, captured, with_covariance),
        eta,
        alpha,
        ridge,
        seed,
    )
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in editor.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("down_RF"):
                continue
            size = 0.1 if name.endswith(("up_FR", "bias_F", "offset_SF")) else 0.3
            parameter += size * noise
    return editor


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
