"""What the terminal says of results: plain objects in, text out; no model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from malmend.cli import show, show_report
from malmend.commands.ask import AskResult
from malmend.commands.inspect import Inspection
from malmend.evaluation.protocols import Group, scores
from malmend.evaluation.replies import Replies, Reply
from malmend.evaluation.report import Report
from malmend.facts.fact import Fact, Question, subject_hashes


def replies(*rights: float, edited: bool = False) -> Replies:
    kl = (0.5,) if edited else ()
    asked = [
        ("NS", index, Question(str(index), "a"), right, right) for index, right in enumerate(rights)
    ]
    return Replies([Reply(*one, predicted=(int(one[3]),), kl=kl) for one in asked])


def report(before: Replies, after: Replies, **more: object) -> Report:
    kinds = {"unedited": scores(before), "edited": scores(after, before)}
    return Report(len(after.rows), {"model": "tiny"}, **kinds, **more)


@pytest.mark.parametrize(
    ("before", "wanted"),
    [((1.0, 1.0, 0.0), r"50\.0% \(1 of 2\)"), ((0.0, 0.0, 0.0), "none was right before")],
)
def test_what_was_kept_is_shown_with_what_it_is_a_share_of(before, wanted, capsys):
    show_report.report(report(replies(*before), replies(1.0, 0.0, 1.0, edited=True)))
    assert re.search(rf"kept +│ +│ +{wanted} │", capsys.readouterr().out)


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_that_was_cut_at_the_limit_ends_in_a_mark(cut, capsys):
    show.asked(AskResult("In Ora [b] is", "Lima\n or", unedited_cut=cut))
    assert capsys.readouterr().out == "In Ora [b] is\nLima\n or" + " …" * cut + "\n"
    show.asked(AskResult("In Ora is", " "))
    assert capsys.readouterr().out == "In Ora is\n(nothing)\n"
    show.asked(AskResult("In Ora is", "", "[i] Lima\n or", False, cut))
    shown = capsys.readouterr().out
    assert "unedited: (nothing)\n" in shown
    assert f"edited:   [i] Lima / or{' …' * cut}\n" in shown


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_names_of_groups_fold_where_a_word_ends(width, capsys, monkeypatch):
    """Once "airport_c" stood over "ity", and over "ountry" in the next row."""
    names = ["airport_city", "airport_country", "state_abbreviation", "spoken or written", "x" * 30]
    figures = scores(replies(1.0))["NS"]
    both = {kind: replace(figures, generated=1.0) for kind in ("ES", "GS", "NS")}
    groups = {"relation": {name: Group(3, both, both) for name in names}}
    monkeypatch.setattr(show_report.OUT, "_width", width)
    show_report.report(report(replies(1.0), replies(1.0, edited=True), groups=groups))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    table = shown[shown.index("by relation") :]
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert "".join(rows).replace(" ", "") == "".join(names).replace(" ", "")  # nothing is cut
    if width >= 80:
        words = {"airport_", "city", "country", "state_", "abbreviation", "spoken", "or", "written"}
        parts = [part for row in rows for part in re.findall("[a-z]+_?", row) if "xx" not in part]
        assert set(parts) == words
    assert ("airport_country" in rows) == (width >= 100)


def test_one_fact_is_one(capsys):
    show_report.report(report(replies(1.0), replies(1.0, edited=True)))
    shown = capsys.readouterr().out
    assert "1 fact, tiny" in shown
    assert "1 facts" not in shown


@pytest.mark.parametrize("order", ["\x1b[2J", "\x07", "\x9b", "\x08", "\u202e", "\u2066"])
def test_what_is_shown_gives_the_terminal_no_orders(order, capsys):
    show.asked(AskResult(f"In {order} is", f"Li{order}ma", f"O{order}ra"))
    show.inspected(Inspection("patch", f"a{order}", {f"b{order}": f"c{order}", "d": {"e": order}}))
    show.plain(f"f{order}\n")
    about = {"model": f"h{order}"}
    show_report.report(replace(report(replies(1.0), replies(1.0, edited=True)), about=about))
    shown = capsys.readouterr().out
    assert order not in shown
    assert shown.count(ascii(order)[1:-1]) == 9


def test_what_is_long_is_counted_or_cut_in_an_inspection(capsys):
    long = "Ora " * 100
    entries = {"subjects": subject_hashes([Fact("a", "In Ora is", "Lima"), Fact("b", "P", "x")])}
    show.inspected(Inspection("editor", "e", entries))
    assert capsys.readouterr().out == "editor e\n  subjects: 2\n"
    show.inspected(Inspection("facts", "f", {"skipped": [], "first": {"prompt": long}}))
    shown = capsys.readouterr().out
    assert "  skipped: 0\n" in shown
    assert " ".join(shown.split()).endswith(f"prompt: {long[:299]} … (400 characters)")
    show.inspected(Inspection("facts", "f", {"skipped": [f"line {at}" for at in range(23)]}))
    assert capsys.readouterr().out.endswith("    line 19\n    and 3 more\n")


def test_the_text_of_perplexity_and_what_leaked_are_named(capsys):
    same = replies(1.0), replies(1.0, edited=True)
    show_report.report(report(*same))
    plain = capsys.readouterr().out
    assert "perplexity" not in plain
    assert "beside facts" not in plain
    shown = report(*same, perplexity={"unedited": 9.0}, leaks=[f"leak {at} [i]" for at in range(5)])
    show_report.report(replace(shown, about={"model": "tiny", "text": "some [b] text"}))
    said = capsys.readouterr().out
    assert "perplexity: of some [b] text; lower is better" in said
    assert "5 questions beside facts are edited or answered otherwise too" in said
    assert "leak 2 [i]\n  and 2 more (--json has all)" in said
    assert "leak 3" not in said
    show_report.report(report(*same, leaks=["leak"]))
    assert "1 question beside facts is edited or answered otherwise" in capsys.readouterr().out


def test_an_interval_is_shown_inside_the_range_and_explained(capsys):
    figures = replace(scores(replies(1.0))["NS"], token_ratio=0.125, interval=0.245)
    same = replies(1.0), replies(1.0, edited=True)
    shown = replace(report(*same), unedited={"ES": figures}, edited={})
    show_report.report(shown)
    said = capsys.readouterr().out
    assert "12.5% (2.0–49.5)" in said
    assert "(from–to): a 95% interval" in said
    show_report.report(replace(shown, unedited={"ES": replace(figures, interval=None)}))
    assert "95%" not in capsys.readouterr().out


def test_a_name_that_is_no_utf8_is_shown_escaped(capsys):
    show.inspected(Inspection("facts", "f\udcfc.jsonl", {"first": "g\udcfc"}))
    assert capsys.readouterr().out == "facts f\\udcfc.jsonl\n  first: g\\udcfc\n"
