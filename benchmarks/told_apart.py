"""How well a straight line tells subjects apart by what each layer reads where an answer begins.

    python benchmarks/told_apart.py                    # the last eight blocks of SmolLM2-135M
    python benchmarks/told_apart.py --model FOLDER --blocks 12

An edit is one matrix per layer, so a paraphrase carries it where its key is nearer to the keys of
its own fact's prompt than to those of the others.  Of the project's own test facts each paraphrase
looks for the nearest prompt, by the cosine of the two keys after the spread of wordings is made
round: with C the mean of e e^T over e = (key in one wording) - (their mean) of training facts, keys
are multiplied by (C + a hundredth of its mean diagonal)^(-1/2).  Printed is the share that find
their own fact, of all facts and of those of the relation.

Shape letters: F facts, W wordings of a fact, K key width.
"""

from __future__ import annotations

import argparse
import random
from itertools import accumulate

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import malmend
from malmend.facts.fact import Fact, Question
from malmend.models.capture import keys_of, token_counts
from malmend.models.forms import find_stacks
from malmend.models.sites import around, find_sites
from malmend.workbench import Workbench, lay_out, shipped

WORDINGS = 4  # of a fact: its prompt and three paraphrases


def keys(bench: Workbench, facts: list[Fact]) -> list[Tensor]:
    """By site F x W x K in float64: what it reads where the answer begins."""
    prompts = [p for fact in facts for p in (fact.prompt, *fact.paraphrases[: WORDINGS - 1])]
    answers = [fact.answer for fact in facts for _ in range(WORDINGS)]
    asked = [Question(*pair) for pair in zip(prompts, answers, strict=True)]
    questions = bench.encoder.encode_all(asked)
    starts = [0, *accumulate(token_counts(questions, "answer", False))][:-1]
    found = keys_of(bench.trunk, questions, "answer")
    return [one[starts].double().reshape(len(facts), WORDINGS, -1) for one in found]


def rounded(known_FWK: Tensor) -> Tensor:
    """(C + a hundredth of its mean diagonal)^(-1/2), K x K."""
    apart = (known_FWK - known_FWK.mean(1, keepdim=True)).flatten(0, 1)
    moment_KK = apart.T @ apart / len(apart)
    moment_KK.diagonal().add_(0.01 * moment_KK.diagonal().mean())
    sizes, vectors = torch.linalg.eigh(moment_KK)
    return vectors * sizes.rsqrt() @ vectors.T


def found(keys_FWK: Tensor, metric_KK: Tensor, relations: list[str]) -> tuple[float, float]:
    """The shares of paraphrases that find their own prompt: of all, and of the relation's."""
    seen_FWK = keys_FWK @ metric_KK
    seen_FWK = torch.nn.functional.normalize(seen_FWK - seen_FWK.mean((0, 1)), dim=-1)
    own_F = torch.arange(len(relations))
    other_FF = torch.tensor([[one != two for two in relations] for one in relations])
    near = [seen_FWK[:, wording] @ seen_FWK[:, 0].T for wording in range(1, WORDINGS)]
    inside = [one.masked_fill(other_FF, -2.0) for one in near]
    shares = [
        torch.stack([(one.argmax(1) == own_F).double().mean() for one in some]).mean().item()
        for some in (near, inside)
    ]
    return shares[0], shares[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=8, help="the last so many (default: 8)")
    parser.add_argument("--train", type=int, default=800, help="facts for the metric")
    parser.add_argument("--test", type=int, default=512, help="facts that are looked for")
    given = parser.parse_args()
    loaded = malmend.load_model(given.model)
    blocks = min(given.blocks, len(find_stacks(loaded.model)[-1].blocks))
    sites = around(loaded.model, find_sites(loaded.model, max(blocks - 1, 1)))
    bench = lay_out(loaded, sites)
    known = list(malmend.read_facts(shipped("facts.jsonl")))
    random.Random(0).shuffle(known)
    known = [fact for fact in known if len(fact.paraphrases) >= WORDINGS - 1]
    train = [fact for fact in known if "train" in fact.tags][: given.train]
    test = [fact for fact in known if "test" in fact.tags][: given.test]
    relations = [str(fact.relation) for fact in test]
    table = Table("layer", "of all", "of the relation", title=f"{given.model}, {len(test)} facts")
    for site, known_FWK, keys_FWK in zip(sites, keys(bench, train), keys(bench, test), strict=True):
        share, inside = found(keys_FWK, rounded(known_FWK), relations)
        table.add_row(site.name, f"{share:.3f}", f"{inside:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
