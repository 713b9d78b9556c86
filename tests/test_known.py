"""What a model surely says of other subjects, which an edit that settles leaves as it is."""

from __future__ import annotations

import pytest
import torch

import malmend
from malmend import known as module
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.known import SURE, known_facts
from malmend.models.sites import find_sites
from malmend.workbench import Workbench, lay_out, shipped


@pytest.fixture(scope="module")
def bench() -> Workbench:
    loaded = malmend.load_model("smollm2-135m")
    return lay_out(loaded, find_sites(loaded.model, 2))


@pytest.fixture(autouse=True)
def some_facts(monkeypatch, tmp_path) -> list[Fact]:
    """Of the project's own every fortieth of the training facts, and all of the others."""
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
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
