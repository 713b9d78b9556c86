from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from command_support import files_in
from malmend.errors import MalmendError
from malmend.evaluation.protocols import PROTOCOLS, Scores, groups_of, scores
from malmend.evaluation.replies import FactRow, Kind, Replies, Reply, rows_of
from malmend.evaluation.report import Report
from malmend.facts.fact import Fact, Question

FACTS = [
    Fact(
        "one",
        "In Mars is",
        "Lima",
        subject="Mars",
        paraphrases=("Mars?", "Mars has"),
        relation="capital",
    ),
    Fact("two", "In Ora is", "Chilé"),
]


def asked(kind: Kind, fact: int, ratio: float | None, prompt: str = "p", **more: object) -> Reply:
    exact = None if ratio is None else float(ratio == 1)
    return Reply(kind, fact, Question(prompt, "a"), ratio, exact, **more)  # type: ignore[arg-type]


def before() -> Replies:
    return Replies(
        [
            asked("ES", 0, 0.0, generated=0.0, text="Oslo", cut=True, predicted=(7, 8)),
            asked("GS", 0, 0.0, generated=0.0, text="Oslo"),
            asked("GS", 0, 0.0, generated=0.0, text="Oslo"),
            asked("NS", 0, 1.0, "beside", predicted=(1,), top="A"),
            asked("LS", 0, 1.0, "far", predicted=(1, 2), top="A B"),
            asked("LS", 0, 1.0, "near", predicted=(3,), top="C"),
            asked("ES", 1, 0.0, generated=0.0, text="Oslo", predicted=(7,)),
            asked("LS", 1, 1.0, "far", predicted=(1, 2), top="A B"),
            asked("LS", 1, None, "open", predicted=(4,), top="D"),
            asked("RS", 1, 0.5, "back", generated=0.0, text="it"),
        ]
    )


def replies() -> Replies:
    moved = {"kl": (1.0, 2.0), "predicted": (1, 5), "top": "A E", "moved": True}
    return Replies(
        [
            asked("ES", 0, 1.0, generated=1.0, text="Lima", generated_chat=1.0, text_chat="Lima"),
            asked("GS", 0, 0.5, generated=0.0, text="the", generated_chat=0.0, text_chat="A"),
            asked("GS", 0, 1.0, generated=1.0, text="Lima", generated_chat=0.0, text_chat="B"),
            asked("NS", 0, 0.0, "beside", kl=(3.0,), predicted=(2,), top="B", moved=True),
            asked("LS", 0, 0.25, "far", **moved),
            asked("LS", 0, 1.0, "near", kl=(0.5,), predicted=(3,), top="C", moved=False),
            asked("ES", 1, 0.0, generated=0.0, text="Peru"),
            asked("LS", 1, 0.25, "far", **moved),
            asked("LS", 1, None, "open", kl=(0.1,), predicted=(4,), top="D", moved=False),
            asked("RS", 1, 1.0, "back", generated=1.0, text="Ora"),
        ]
    )


def report(edited: bool = True) -> Report:
    rows = rows_of(FACTS, before(), replies() if edited else None)
    return Report(
        facts=2,
        about={"model": "tiny", "patch": None},
        unedited=scores(before()),
        edited=scores(replies(), before()) if edited else {},
        rows=rows,
        groups=groups_of(rows),
    )


def test_scores_by_hand():
    found = scores(replies(), before())
    assert list(found) == ["ES", "GS", "NS", "LS", "RS"]
    assert [one.questions for one in found.values()] == [2, 2, 1, 4, 1]
    assert (found["ES"].generated_chat, found["GS"].generated_chat) == (1.0, 0.0)
    assert (found["RS"].token_ratio, found["RS"].generated) == (1.0, 1.0)
    assert (found["ES"].token_ratio, found["ES"].exact, found["ES"].generated) == (0.5, 0.5, 0.5)
    assert (found["GS"].token_ratio, found["GS"].exact, found["GS"].generated) == (0.75, 0.5, 0.5)
    # The first fact's mean is 0.625, the second's 0.25.
    assert (found["LS"].token_ratio, found["LS"].exact) == (0.4375, 0.25)
    # Of six tokens the last of "far" moved, twice; of three answers right before, "near" is left.
    left = found["LS"]
    assert left.generated is None
    assert (left.retention, left.kept) == (pytest.approx(4 / 6), pytest.approx(1 / 3))
    assert (left.kept_of, left.kept_count) == (3, "1 of 3")
    assert left.kl == pytest.approx((2 * 3.0 + 0.5 + 0.1) / 6)
    beside = found["NS"]
    assert (beside.token_ratio, beside.retention, beside.kl, beside.kept) == (0.0, 0.0, 3.0, 0.0)
    unedited = scores(before())
    assert (unedited["LS"].retention, unedited["LS"].kl, unedited["LS"].kept) == (None, None, None)


def test_nothing_right_before_cannot_be_kept():
    wrong = Replies([asked("NS", 0, 0.0, predicted=(1,))])
    right = Replies([asked("NS", 0, 1.0, predicted=(2,))])
    found = scores(right, wrong)["NS"]
    assert (found.kept, found.kept_of, found.kept_count) == (None, 0, "none was right before")
    found = scores(wrong, right)["NS"]
    assert (found.kept, found.kept_of, found.kept_count) == (0.0, 1, "0 of 1")
    assert (found.questions, scores(wrong, right)["LS"].kept_count) == (1, "")


def test_what_has_no_answer_cannot_have_been_right():
    """ "None was right before" was said of questions that were given without an answer."""
    bare = Replies([replace(asked("NS", 0, None, predicted=(1,)), exact=None)])
    found = scores(bare, bare)["NS"]
    assert (found.kept, found.kept_of, found.kept_count) == (None, None, "")
    assert found.retention == 1.0


def test_intervals_by_hand():
    found = scores(replies(), before())
    # Two clusters of one: mean 0.5, residuals +-0.5; variance 2 * 0.5 / 4 = 0.25.
    assert found["ES"].interval == pytest.approx(1.96 * 0.5)
    assert found["GS"].interval is None  # one cluster only
    # The mean is 0.4375.  near weighs 1/4; far weighs 1/4 beside the first fact, 1/2 beside the
    # second; so the two questions' weighted residuals are +-0.25 * 0.5625.
    assert found["LS"].interval == pytest.approx(1.96 * math.sqrt(2 * 2 * 0.140625**2))


def test_json_has_the_promised_fields():
    shown = report().to_json()
    assert list(shown) == [
        "facts",
        "unedited",
        "edited",
        "about",
        "leaks",
        "unseen",
        "protocols",
        "groups",
        "rows",
    ]
    always = {"token_ratio", "exact", "interval", "questions"}
    for model in ("unedited", "edited"):
        assert list(shown[model]) == ["ES", "GS", "NS", "LS", "RS"]
        assert set(shown[model]["RS"]) == always | {"generated"}
    for kind in ("ES", "GS"):
        assert set(shown["unedited"][kind]) == always | {"generated"}  # not asked in chat
        assert set(shown["edited"][kind]) == always | {"generated", "generated_chat"}
    held = always | {"retention", "kl", "kept", "kept_of"}
    for kind in ("NS", "LS"):
        assert set(shown["unedited"][kind]) == always
        assert set(shown["edited"][kind]) == held
    metrics = held | {"generated", "generated_chat"}
    assert set(shown["protocols"]) == set(PROTOCOLS) == metrics - {"questions", "kept_of"}
    assert metrics == set(Scores.__dataclass_fields__)
    with_text = replace(report(), perplexity={"unedited": 9.0, "edited": 10.0}).to_json()
    assert with_text["perplexity"] == {"unedited": 9.0, "edited": 10.0}


def test_json_rows_hold_every_reply():
    first, second = report().to_json()["rows"]
    assert (first["id"], first["prompt"], first["answer"]) == ("one", "In Mars is", "Lima")
    assert (first["relation"], first["subject"], first["answer_tokens"]) == ("capital", "Mars", 2)
    assert (second["relation"], second["subject"], second["answer_tokens"]) == (None, None, 1)
    for rows in (first["unedited"], first["edited"]):
        assert [one["kind"] for one in rows] == ["ES", "GS", "GS", "NS", "LS", "LS"]
    assert first["edited"][0] == {
        "kind": "ES",
        "prompt": "p",
        "gold": "a",
        "token_ratio": 1.0,
        "exact": 1.0,
        "generated": 1.0,
        "text": "Lima",
        "generated_chat": 1.0,
        "text_chat": "Lima",
    }
    assert first["unedited"][0]["cut"] is True
    assert first["edited"][4]["kl"] == 1.5
    assert (first["unedited"][4]["top"], first["edited"][4]["top"]) == ("A B", "A E")
    assert [one.get("moved") for one in first["edited"]] == [None, None, None, True, True, False]
    assert "moved" not in first["unedited"][4]
    open_one = {"kind": "LS", "prompt": "open", "gold": "a", "top": "D", "moved": False, "kl": 0.1}
    assert second["edited"][2] == open_one
    assert report(edited=False).to_json()["rows"][0]["edited"] == []


def row(index: int, relation: str | None, tokens: int, ratio: float) -> FactRow:
    """A fact with a wrong answer before and one of the ratio after."""
    unedited = asked("ES", index, 0.0, generated=0.0, predicted=(1,) * tokens)
    edited = asked("ES", index, ratio, generated=float(ratio == 1), predicted=(2,) * tokens)
    beside = asked("NS", index, 1.0, f"n{index}", predicted=(1,))
    now = asked("NS", index, ratio, f"n{index}", predicted=(1,), kl=(0.5,), moved=False)
    replies = {"unedited": (unedited, beside), "edited": (edited, now)}
    return FactRow(str(index), "p", "a", **replies, relation=relation, answer_tokens=tokens)


def test_no_divergence_is_below_zero():
    """Rounding makes one of an unmoved token -1e-9, which report.json and its page said apart."""
    assert asked("LS", 0, 1.0, kl=(-1e-9, -1e-9)).mean_kl == 0.0
    assert asked("LS", 0, 1.0, kl=(0.1, 0.2, 0.3)).mean_kl == pytest.approx(0.2, rel=1e-15)
    assert asked("LS", 0, 1.0).mean_kl is None


def test_groups_by_hand():
    rows = [row(0, "b", 10, 1.0), row(1, "a", 2, 0.5), row(2, "b", 2, 0.0), row(3, None, 2, 1.0)]
    found = groups_of(rows)
    assert [list(groups) for groups in found.values()] == [["a", "b"], ["2", "10"]]
    by_relation, by_length = found["relation"], found["answer_tokens"]
    assert [group.facts for group in (*by_relation.values(), *by_length.values())] == [1, 2, 3, 1]
    group = by_relation["b"]
    assert (group.unedited["ES"].token_ratio, group.edited["ES"].token_ratio) == (0.0, 0.5)
    assert (group.unedited["ES"].generated, group.edited["ES"].generated) == (0.0, 0.5)
    assert (group.edited["NS"].kept, group.edited["NS"].kl) == (0.5, 0.5)
    assert by_length["2"].edited["NS"].token_ratio == 0.5
    assert by_length["10"].edited["ES"].token_ratio == 1.0
    shown = replace(report(), groups=found).to_json()["groups"]["relation"]["b"]
    assert shown["facts"] == 2
    assert [list(shown[model]) for model in ("unedited", "edited")] == [["ES", "NS"]] * 2
    assert shown["edited"]["ES"]["token_ratio"] == 0.5


def test_groups_without_a_patch_or_a_relation():
    alone = [replace(one, edited=(), relation=None) for one in (row(0, "a", 1, 1.0),)]
    found = groups_of(alone)
    assert found["relation"] == {}
    assert found["answer_tokens"]["1"].edited == {}
    assert groups_of([]) == {"relation": {}, "answer_tokens": {}}


def test_saved_json_is_the_same_utf8_and_whole(tmp_path):
    report().save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "Chilé" in text
    assert json.loads(text) == json.loads(json.dumps(report().to_json()))
    assert files_in(tmp_path) == {"report.json"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_ever_written(tmp_path, bad):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(MalmendError, match=r"holds NaN or infinity, so .*report.json was not"):
        replace(report(), perplexity={"unedited": bad}).save(path)
    assert path.read_text() == "old"
    assert files_in(tmp_path) == {"report.json"}


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(self: Path, text: str, **_keywords: object) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MalmendError, match=r"report.json cannot be written \(No space left"):
        report().save(path)
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == {"report.json"}


def test_a_path_that_is_no_utf8_is_written_escaped(tmp_path):
    odd = "facts\udcff.jsonl"  # as Python names the byte 0xff
    known = replace(report(), about={"facts_source": odd})
    known.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["about"]["facts_source"] == odd
    assert "Chilé" in text  # the rest stays as it is read
