"""The general questions shipped with the package are what their data card says they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import malmend
from malmend.facts.readers import read_facts

DATA = Path(__file__).resolve().parent.parent / "src" / "malmend" / "data"
QUESTIONS = DATA / "questions.jsonl"
PREFIX = "nq question: "


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="ascii").splitlines()]


def words(text: str) -> str:
    """What two styles of one question share: no prefix, case or punctuation."""
    return " ".join(re.sub(r"[^a-z0-9 ]", "", text.casefold().removeprefix(PREFIX)).split())


def style(prompt: str) -> str:
    if prompt.startswith(PREFIX):
        return "query"
    return "question" if prompt.endswith("?") else "cloze"


def test_fields(questions: list[dict[str, str]]) -> None:
    assert len(questions) >= 900
    for question in questions:
        assert list(question) == ["prompt", "answer"]
        for text in question.values():
            assert text
            assert text == " ".join(text.split())
        assert len(question["answer"].split()) <= 8


def test_no_question_is_asked_twice(questions: list[dict[str, str]]) -> None:
    asked = Counter(words(question["prompt"]) for question in questions)
    assert [text for text, times in asked.items() if times > 1] == []


def test_no_prompt_holds_its_answer(questions: list[dict[str, str]]) -> None:
    for question in questions:
        prompt = words(question["prompt"])
        assert f" {words(question['answer'])} " not in f" {prompt} ", question


def test_styles(questions: list[dict[str, str]]) -> None:
    for question in questions:
        prompt = question["prompt"]
        if style(prompt) == "query":
            assert prompt == prompt.lower()
            assert "?" not in prompt
        else:
            assert prompt[0].isupper()
            assert prompt[-1] not in ".:,"
    # The first are a sample of all: a run that takes a few takes every style.
    for part in (questions, questions[:200]):
        shares = Counter(style(question["prompt"]) for question in part)
        assert shares["query"] / len(part) == pytest.approx(0.5, abs=0.06)
        assert shares["question"] / len(part) == pytest.approx(0.25, abs=0.06)
        assert shares["cloze"] / len(part) == pytest.approx(0.25, abs=0.06)


def test_answers_are_varied(questions: list[dict[str, str]]) -> None:
    answers = Counter(words(question["answer"]) for question in questions)
    assert max(answers.values()) <= 6
    assert len(answers) >= 0.85 * len(questions)
    numbers = sum(any(letter.isdigit() for letter in text) for text in answers.elements())
    assert 0.05 <= numbers / len(questions) <= 0.25


def test_no_prompt_is_one_of_the_facts(questions: list[dict[str, str]]) -> None:
    known: set[str] = set()
    for line in (DATA / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        fact = json.loads(line)
        others = [*fact["neighbours"], *([fact["reversed"]] if "reversed" in fact else [])]
        known.update(map(words, [fact["prompt"], *fact["paraphrases"]]))
        known.update(words(other["prompt"]) for other in others)
    assert [q["prompt"] for q in questions if words(q["prompt"]) in known] == []


def test_read_as_facts(questions: list[dict[str, str]]) -> None:
    facts = read_facts(QUESTIONS)
    assert [(fact.prompt, fact.answer) for fact in facts] == [
        (question["prompt"], question["answer"]) for question in questions
    ]


def test_known_answers(questions: list[dict[str, str]]) -> None:
    answers = {question["prompt"]: question["answer"] for question in questions}
    assert answers["nq question: who invented the telephone"] == "Alexander Graham Bell"
    assert answers["nq question: when did the berlin wall come down"] == "1989"
    assert answers["The largest planet of the Solar System is"] == "Jupiter"


def test_shipped_with_the_package() -> None:
    assert (Path(malmend.__file__).parent / "data" / "questions.jsonl").is_file()
