"""A tiny model that says articles, marks and ends often, facts for it, and an examiner.

facts()      24 facts, some of whose answers the model says, near misses, neighbours, reversed ones
patch()      a random shift of its last two blocks
examiner()   asks it
"""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

import helpers
from command_support import greedy
from malmend.evaluation.examiner import Examiner
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.load import LoadedModel, prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import Patch

WORDS = ["the", "a", "an", ".", ",", "\n", *(f"w{index}" for index in range(44))]
END, NEWLINE = 2, 9
CHAT = "{{ messages[0]['content'] }} w1 w2 "  # a chat template


@functools.cache
def model() -> LoadedModel:
    """Random, in float64, four blocks; says articles, marks and both ends often."""
    keywords = {"hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.5}
    made = helpers.tiny_llama(len(WORDS) + 4, seed=2, **keywords)
    with torch.no_grad():
        made.get_output_embeddings().weight[[END, *range(4, 10)]] *= 1.4
        made.get_output_embeddings().weight[[END, NEWLINE]] *= 1.6
    made.generation_config.eos_token_id = END
    return prepared(made, helpers.words(WORDS), "tiny")


def patch(size: float = 0.3, seed: int = 0) -> Patch:
    """A random shift of the last two blocks."""
    facts()  # made of what the unedited model says, so before this is on
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model().model, 2)
    factors = {s.name: (size * torch.randn(s.shape_VK, generator=generator),) for s in sites}
    return Patch(factors, {"base": model().fingerprint})


def examiner(end: EndOfAnswer = "eos", batch_tokens: int = 60) -> Examiner:
    loaded = model()
    trunk = Trunk(loaded.model, find_sites(loaded.model, 2), TrunkSettings(batch_tokens))
    return Examiner(loaded, trunk, Encoder(loaded.tokenizer, end, 64))


def ids_of(text: str) -> list[int]:
    return model().tokenizer(text)["input_ids"]


def greedy_answer(prompt: str, limit: int = 8) -> str:
    return greedy(model(), ids_of(prompt), {END}, limit)


def some_words(generator: random.Random, most: int = 6) -> str:
    return " ".join(generator.choices(WORDS[6:], k=generator.randint(1, most)))


def near_miss(generator: random.Random, prompt: str) -> str:
    """What the model says, at times with one word changed, an article or a mark left out."""
    words = [word for word in greedy_answer(prompt).split() if word in WORDS]
    change = generator.choice(["none", "word", "bare"])
    if change == "bare":
        words = [word for word in words if word not in ("the", "a", "an", ".", ",")]
    words = words[:8] or ["w3"]
    if change == "word":
        words[-1] = generator.choice(WORDS[6:])
    return " ".join(words)


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Facts with none to three paraphrases; unrelated questions repeated, and without answers.

    Neighbours are of the same pool; every fourth fact has a reversed prompt.
    """
    generator = random.Random(5)
    others = []
    for index in range(6):
        prompt = some_words(generator)
        others.append(Question(prompt, None if index % 3 == 2 else near_miss(generator, prompt)))
    made = []
    for index in range(24):
        prompt = some_words(generator)
        answer = near_miss(generator, prompt)
        paraphrases = tuple(some_words(generator) for _ in range(index % 4))
        unrelated = tuple(generator.choices(others, k=index % 3))
        made.append(
            Fact(
                id=f"f{index}",
                prompt=prompt,
                answer=answer,
                paraphrases=paraphrases,
                unrelated=unrelated,
                neighbours=tuple(others[(index + at) % len(others)] for at in range(index % 2 + 1)),
                reversed=Question(answer, prompt) if index % 4 == 0 else None,
            )
        )
    return tuple(made)


@torch.no_grad()
def logits_at(question: Question) -> tuple[Tensor, list[int]]:
    """One plain forward pass: logits that predict the answer (or the next token), and its ids."""
    start, answer = ids_of(question.prompt), ids_of(question.answer or "")
    logits = model().model(input_ids=torch.tensor([start + answer]), use_cache=False).logits[0]
    return logits[len(start) - 1 : len(start) - 1 + max(1, len(answer))], answer
