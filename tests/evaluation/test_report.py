from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from command_support import files_in
from malmend.errors import MalmendError
from malmend.evaluation.protocols import Asked, Kind, Replies
from malmend.evaluation.report import PROTOCOLS, Report, rows_of, scores
from malmend.facts.fact import Fact, Question

FACTS = [
    Fact("one", "In Mars is", "Lima", paraphrases=("Mars?", "Mars has")),
    Fact("two", "In Ora is", "Chilé"),
]


class Examined:
    """Stands in for an examiner: retention is the only thing that scores ask of it."""

    def retention(self, replies: Replies) -> tuple[float, float]:
        return 0.75, 2.5


def asked(kind: Kind, fact: int, ratio: float | None, prompt: str = "p", **more: object) -> Asked:
    exact = None if ratio is None else float(ratio == 1)
    return Asked(kind, fact, Question(prompt, "a"), ratio, exact, **more)  # type: ignore[arg-type]


def replies() -> Replies:
    return Replies(
        [
            asked("ES", 0, 1.0, generated=1.0, text="Lima"),
            asked("GS", 0, 0.5, generated=0.0, text="the"),
            asked("GS", 0, 1.0, generated=1.0, text="Lima"),
            asked("LS", 0, 0.25, "far", kl=(1.0, 2.0)),
            asked("LS", 0, 1.0, "near", kl=(0.5,)),
            asked("ES", 1, 0.0, generated=0.0, text="Peru"),
            asked("LS", 1, 0.25, "far", kl=(1.0, 2.0)),
            asked("LS", 1, None, "open", kl=(0.1,)),
        ]
    )


def report(edited: bool = True) -> Report:
    examined = Examined()
    return Report(
        facts=2,
        about={"model": "tiny", "patch": None},
        unedited=scores(examined, replies(), edited=False),  # type: ignore[arg-type]
        edited=scores(examined, replies(), edited=True) if edited else {},  # type: ignore[arg-type]
        rows=rows_of(FACTS, replies(), replies() if edited else None),
    )


def test_scores_by_hand():
    found = scores(Examined(), replies(), edited=True)  # type: ignore[arg-type]
    assert (found["ES"].token_ratio, found["ES"].exact, found["ES"].generated) == (0.5, 0.5, 0.5)
    assert (found["GS"].token_ratio, found["GS"].exact, found["GS"].generated) == (0.75, 0.5, 0.5)
    # The first fact's mean is 0.625, the second's 0.25.
    assert (found["LS"].token_ratio, found["LS"].exact) == (0.4375, 0.25)
    assert (found["LS"].generated, found["LS"].retention, found["LS"].kl) == (None, 0.75, 2.5)
    before = scores(Examined(), replies(), edited=False)  # type: ignore[arg-type]
    assert (before["LS"].retention, before["LS"].kl) == (None, None)


def test_intervals_by_hand():
    found = scores(Examined(), replies(), edited=True)  # type: ignore[arg-type]
    # Two clusters of one: mean 0.5, residuals +-0.5; variance 2 * 0.5 / 4 = 0.25.
    assert found["ES"].interval == pytest.approx(1.96 * 0.5)
    assert found["GS"].interval is None  # one cluster only
    # The mean is 0.4375.  near weighs 1/4; far weighs 1/4 beside the first fact, 1/2 beside the
    # second; so the two questions' weighted residuals are +-0.25 * 0.5625.
    assert found["LS"].interval == pytest.approx(1.96 * math.sqrt(2 * 2 * 0.140625**2))


def test_json_has_the_promised_fields():
    shown = report().to_json()
    assert list(shown) == ["facts", "unedited", "edited", "about", "protocols", "rows"]
    for model in ("unedited", "edited"):
        assert list(shown[model]) == ["ES", "GS", "LS"]
        for kind in ("ES", "GS"):
            assert set(shown[model][kind]) == {"token_ratio", "exact", "interval", "generated"}
    assert set(shown["unedited"]["LS"]) == {"token_ratio", "exact", "interval"}
    ls = {"token_ratio", "exact", "interval", "retention", "kl"}
    assert set(shown["edited"]["LS"]) == ls
    assert set(shown["protocols"]) == ls | {"generated"} == set(PROTOCOLS)
    with_text = replace(report(), perplexity={"unedited": 9.0, "edited": 10.0}).to_json()
    assert with_text["perplexity"] == {"unedited": 9.0, "edited": 10.0}


def test_json_rows_hold_every_reply():
    first, second = report().to_json()["rows"]
    assert (first["id"], first["prompt"], first["answer"]) == ("one", "In Mars is", "Lima")
    assert first["unedited"] == first["edited"]
    assert [one["kind"] for one in first["edited"]] == ["ES", "GS", "GS", "LS", "LS"]
    assert first["edited"][0] == {
        "kind": "ES",
        "prompt": "p",
        "gold": "a",
        "token_ratio": 1.0,
        "exact": 1.0,
        "generated": 1.0,
        "text": "Lima",
    }
    assert first["edited"][3]["kl"] == 1.5
    assert second["edited"][2] == {"kind": "LS", "prompt": "open", "gold": "a", "kl": 0.1}
    assert report(edited=False).to_json()["rows"][0]["edited"] == []


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
    with pytest.raises(ValueError, match="not JSON compliant"):
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
