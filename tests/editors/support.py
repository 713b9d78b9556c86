"""Editors away from their start, on tiny models, random facts to edit, and processes as threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import helpers
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.keymoments import key_moments
from malmend.editors.settings import EditorSettings
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.capture import Captured, capture
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.numerics.moments import RunningMoments
from malmend.processes import Processes

# Threads of a busy machine wait for one another; these matrices are too small to share.
torch.set_num_threads(1)

WORDS = [f"w{index}" for index in range(56)]
INNER = 32
# The terms of each prior, in the order of their weights.
TERMS = {"wording": ("text", "asked", "wording"), "text": ("text",), "identity": ()}


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


def random_questions(generator: random.Random, count: int) -> tuple[Question, ...]:
    return tuple(
        Question(some_words(generator, 2, 5), some_words(generator, 1, 3)) for _ in range(count)
    )


def random_facts(
    count: int, seed: int = 0, paraphrases: int = 2, unrelated: int = 2, neighbours: int = 0
) -> list[Fact]:
    """Facts with answers of one to three tokens; questions of unlike length."""
    generator = random.Random(seed)
    facts = []
    for index in range(count):
        answer = some_words(generator, 1, 3)
        asked = tuple(some_words(generator, 2, 5) for _ in range(paraphrases))
        others = random_questions(generator, unrelated)
        prompt = some_words(generator, 2, 5)
        near = random_questions(generator, neighbours)
        fact = Fact(f"f{index}", prompt, answer, None, asked, others, (), index + 1)
        facts.append(replace(fact, neighbours=near))
    return facts


def random_text(lines: int, seed: int = 0) -> str:
    generator = random.Random(f"text {seed}")
    return "\n".join(some_words(generator, 2, 9) for _ in range(lines))


def passages_of(text: str) -> list[Encoded]:
    """Each line as it is read for statistics: no answer, no end token."""
    lines = [encoder().passage_ids(line) for line in text.splitlines()]
    return [Encoded(ids, len(ids), len(ids)) for ids in lines]


def statistics_of(trunk: Trunk, captured: Sequence[Captured]) -> dict[str, SiteStatistics]:
    """Moments of what was captured, and every term of a prior, of a random text and facts."""
    others = random_facts(12, seed=77, neighbours=1)
    moments = key_moments(trunk, encoder(), TERMS["wording"], others, random_text(30), 10_000)
    known = {}
    for index, (site, pair) in enumerate(zip(trunk.sites, captured, strict=True)):
        value_width, key_width = site.shape_VK
        one = SiteStatistics(
            RunningMoments(key_width),
            RunningMoments(value_width),
            {term: found[index] for term, found in moments.items()},
        )
        one.keys.add(pair.keys_NK)
        one.value_grads.add(pair.value_grads_NV)
        known[site.name] = one
    return known


def captured_of(trunk: Trunk, facts: Sequence[Fact], settings: EditorSettings) -> list[Captured]:
    questions = encoder(settings.end_of_answer).encode_all(fact.question for fact in facts)
    return capture(trunk, questions, settings.tokens, settings.descent)


def start_weights(settings: EditorSettings) -> list[float]:
    """One weight per term of the editor's prior, no two alike."""
    known = {"text": 3.0, "asked": 1.5, "wording": 0.2}
    return [known[term] for term in TERMS[settings.prior] if settings.method == "malmen"]


def random_editor(
    settings: EditorSettings,
    trunk: Trunk,
    captured: Sequence[Captured],
    eta: float = 1.0,
    ridge: float = 0.1,
    seed: int = 0,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Editor:
    """An editor away from its start: random network, other scalars at every site."""
    editor = Editor(
        settings,
        {site.name: site.shape_VK for site in trunk.sites},
        statistics_of(trunk, captured) if statistics is None else statistics,
        eta,
        start_weights(settings),
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


class Pair(Processes):
    """One of two processes, as threads that meet in every sum."""

    def __init__(self, rank: int, meeting: Meeting):
        super().__init__(rank, 2)
        object.__setattr__(self, "meeting", meeting)

    def summed(self, tensor):
        return self.meeting.sum(self.rank, tensor)


class Meeting:
    """Where the two add what they have."""

    def __init__(self):
        self.barrier, self.parts = threading.Barrier(2, timeout=60), {}

    def sum(self, rank, tensor):
        self.parts[rank] = tensor.detach().clone()
        self.barrier.wait()
        whole = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return whole


def together(run: Callable[[int], None]) -> None:
    """Runs both."""
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
