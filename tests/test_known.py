"""What a model surely says of other subjects, which an edit that settles leaves as it is."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import helpers
import malmend
from malmend import known as module
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.known import SURE, known_facts
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.workbench import Workbench, lay_out, shipped

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    loaded = malmend.load_model("smollm2-135m")
    return lay_out(loaded, find_sites(loaded.model, 2))


@pytest.fixture
def some_facts(monkeypatch) -> list[Fact]:
    """Of the project's own every fortieth of the training facts, and all of the others."""
    own = read_facts(shipped("facts.jsonl"))
    train = [one for one in own if "train" in one.tags][::40]
    some = [*train, *(one for one in own if "train" not in one.tags)]
    monkeypatch.setattr(module, "read_facts", lambda _path: some)
    return some


def asked_one_by_one(bench: Workbench, facts: list[Fact]) -> list[tuple[Fact, tuple[int, ...]]]:
    """Against the whole model, one fact at a time."""
    found = []
    for one in (one for one in facts if "train" in one.tags):
        question = bench.encoder.encode(one.question)
        with torch.no_grad():
            logits = bench.loaded.model(torch.tensor([question.prompt])).logits[0, -1]
        chance, choice = logits.softmax(-1).max(-1)
        is_right = choice == question.labels[0]
        said = bench.loaded.tokenizer.decode([choice]).strip()
        if chance >= SURE and (is_right or (said and said[0].isupper())):
            end = question.answer_end if is_right else question.answer_start + 1
            found.append((one, question.ids[:end]))
    return found


def test_what_is_said_surely_is_held_and_to_its_end_where_it_is_right(bench, some_facts):
    kept = {name: one.clone() for name, one in bench.loaded.model.state_dict().items()}
    found = known_facts(bench, [])
    state = bench.loaded.model.state_dict()
    assert all(torch.equal(kept[name], one) for name, one in state.items())
    wanted = asked_one_by_one(bench, some_facts)
    assert [one.ids for one in found] == [ids for _, ids in wanted]
    assert all(len(one.ids) == one.answer_end > one.answer_start for one in found)
    whole = [bench.encoder.encode(fact.question) for fact, _ in wanted]
    ended = [one.ids[: one.answer_end] == ids for one, (_, ids) in zip(whole, wanted, strict=True)]
    assert 3 < sum(ended) < len(wanted) - 3
    assert [one.ids for one in known_facts(bench, [])] == [ids for _, ids in wanted]  # as kept


def test_nothing_of_an_edited_subject_nor_a_neighbour(bench, some_facts):
    found = asked_one_by_one(bench, some_facts)
    (first, ids), (second, others) = found[0], found[1]
    edited = Fact("e", f"Of {first.subject} one says", "x", first.subject)
    left = [one.ids for one in known_facts(bench, [edited])]
    assert ids not in left
    assert others in left
    neighboured = Fact("o", "Nothing of it", "x", neighbours=(second.question,))
    left = [one.ids for one in known_facts(bench, [neighboured])]
    assert (ids in left, others in left) == (True, False)


def test_what_a_prompt_names_beside_its_subject_does_not_leave_it_out(bench, some_facts):
    """An edit of the United States once took every "In the United States, ... lies in" away."""
    found = asked_one_by_one(bench, some_facts)
    naming = [ids for fact, ids in found if "United States" in fact.prompt]
    assert naming
    edited = Fact("e", "The money of the United States is", "x", "United States")
    left = [one.ids for one in known_facts(bench, [edited])]
    assert set(naming) <= set(left)


def test_a_name_that_few_subjects_have_tells_nothing_by_itself(bench, some_facts):
    """Edits of "Fort Ann" once took "Fort Bend" away."""
    found = asked_one_by_one(bench, some_facts)
    several = [(f.subject or "", ids) for f, ids in found if len((f.subject or "").split()) > 1]
    subject, ids = several[0]
    edited = Fact("e", "One says of it", "x", f"{subject.split()[0]} Nowhere")
    assert ids in [one.ids for one in known_facts(bench, [edited])]


# --- on a tiny model

NAMES, PLAIN = [f"N{index}" for index in range(40)], [f"w{index}" for index in range(20)]


@pytest.fixture(scope="module")
def tiny() -> Workbench:
    """A random model that is more or less sure of names and of other words."""
    tokenizer = helpers.words([*NAMES, *PLAIN])
    model = helpers.tiny_llama(len(tokenizer), initializer_range=0.3)
    loaded = prepared(model.requires_grad_(False), tokenizer, "tiny")
    return lay_out(loaded, find_sites(model, 1))


@pytest.fixture
def tiny_facts(tiny, monkeypatch) -> list[tuple[Fact, float, str]]:
    """Facts of two words about two names, with the model's chance and word for the first.

    It is right of every second one.  All but the last ten are for training.
    """
    generator, found = random.Random(0), []
    for index in range(160):
        subject = " ".join(generator.sample(NAMES, 2))
        prompt = f"{subject} {' '.join(generator.choices(PLAIN, k=generator.randint(1, 5)))}"
        with torch.no_grad():
            ids = torch.tensor([tiny.loaded.tokenizer(prompt)["input_ids"]])
            chance, choice = tiny.loaded.model(ids).logits[0, -1].softmax(-1).max(-1)
        said = tiny.loaded.tokenizer.decode([int(choice)])
        answer = said if index % 2 and said[0] in "Nw" else "w0" if said != "w0" else "w1"
        tags = ("train",) if index < 150 else ()
        fact = Fact(f"f{index}", prompt, f"{answer} w3", subject, tags=tags)
        found.append((fact, chance.item(), said))
    monkeypatch.setattr(module, "read_facts", lambda _path: [fact for fact, _, _ in found])
    return found


def kept_of(facts: list[tuple[Fact, float, str]]) -> list[tuple[Fact, str]]:
    """The facts that are said with a tenth of the probability, and the answer that is held."""
    return [
        (fact, fact.answer if fact.answer.split()[0] == said else fact.answer.split()[0])
        for fact, chance, said in facts
        if fact.tags and chance >= 0.1 and (fact.answer.split()[0] == said or said[0] == "N")
    ]


def ids_in(bench: Workbench, facts: list[tuple[Fact, str]]) -> list[tuple[int, ...]]:
    read = bench.loaded.tokenizer
    return [tuple(read(f"{fact.prompt} {answer}")["input_ids"]) for fact, answer in facts]


def test_a_tenth_of_the_probability_for_what_is_right_or_begins_a_name(tiny, tiny_facts):
    wanted = kept_of(tiny_facts)
    found = known_facts(tiny, [])
    assert [one.ids for one in found] == ids_in(tiny, wanted)
    assert [one.answer_end for one in found] == [len(one.ids) for one in found]
    assert [one.ids for one in known_facts(tiny, [])] == ids_in(tiny, wanted)  # as kept
    kinds = {
        (chance >= 0.1, fact.answer.split()[0] == said, said[0] == "N")
        for fact, chance, said in tiny_facts
        if fact.tags and chance > 0.02
    }
    assert len(kinds) == 8  # there are some that are left out for each reason
    assert kept_of([(replace(f, tags=("train",)), c, s) for f, c, s in tiny_facts[150:]])


def test_of_edited_subjects_and_neighbours_nothing_is_held(tiny, tiny_facts):
    wanted = kept_of(tiny_facts)
    first, second = wanted[0][0], wanted[1][0]
    edited = Fact("e", "It is said of", "w1", subject=first.subject)
    words = set(first.subject.split())
    left = [one for one in wanted if not words <= set(one[0].subject.split())]
    assert first not in [fact for fact, _ in left]
    assert [one.ids for one in known_facts(tiny, [edited])] == ids_in(tiny, left)
    # Half of a subject leaves nothing out, though nobody else has that name.
    counts = Counter(name for fact, _ in wanted for name in fact.subject.split())
    alone = next(name for name, count in counts.items() if count == 1)
    half = Fact("h", "It is said of", "w1", subject=f"{alone} Nowhere")
    assert [one.ids for one in known_facts(tiny, [half])] == ids_in(tiny, wanted)
    beside = Fact("n", "nothing of it", "w1", subject="Nowhere", neighbours=(second.question,))
    left = [one for one in wanted if one[0].prompt != second.prompt]
    assert [one.ids for one in known_facts(tiny, [beside])] == ids_in(tiny, left)
