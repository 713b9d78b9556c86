from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_support import HOSTILE, KEPT, many, pair, report, row

from command_support import files_in
from malmend.errors import MalmendError
from malmend.evaluation import figures, view
from malmend.evaluation import page as page_module
from malmend.evaluation.page import _json, page, page_folder, write_page


class Read(HTMLParser):
    """Tags with their attributes, and the text of each kind of element, as a browser reads them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("script", "title", "style"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        if tag in ("script", "title", "style"):
            self.texts[tag][-1] += data
        else:
            self.texts.setdefault(tag, []).append(data)
            self.seen.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self) -> str:
        """Everything that is shown, in order, with single blanks."""
        return " ".join("".join(self.seen).split())


def test_hostile_text_in_every_field_stays_text():
    html = page(report())
    read = Read(html)
    assert [one.get("type") for one in read.of("script")] == ["application/json", None]
    assert len(re.findall("</script", html, re.IGNORECASE)) == 2
    assert not read.of("img")
    assert not [name for _, attributes in read.tags for name in attributes if name[:2] == "on"]
    assert "window.hacked" not in read.texts["script"][1]
    assert "{{ 7 * 7 }}" in read.said()
    assert " 49 " not in read.said()
    # Model, facts, text and editor twice, a value of the patch, a leak, a group; of what moved the
    # prompt, both replies, the gold answer and the fact's id.
    assert sum(HOSTILE in part for part in read.texts["bdi"]) == 16
    assert HOSTILE in read.texts["title"][0]
    assert {"value": "5"} in read.of("option")  # the first fact that has it


def test_the_facts_stand_in_the_page_as_they_are():
    facts = json.loads(Read(page(report())).texts["script"][0])
    assert [fact["id"] for fact in facts] == KEPT["all"]
    for key, kept in KEPT.items():
        if key != "all":
            assert [fact["id"] for fact in facts if key in fact["flags"]] == kept
    hostile = facts[-1]
    assert hostile["prompt"] == hostile["answer"] == hostile["subject"] == HOSTILE
    assert hostile["relation"] == HOSTILE
    assert hostile["asked"][0]["after"] == {
        "text": HOSTILE,
        "said": True,
        "chat": HOSTILE,
        "exact": True,
        "right": 2,
        "tokens": 2,
    }
    assert hostile["asked"][2]["kl"] == 0.5
    assert hostile["asked"][2]["after"]["top"] == HOSTILE
    assert "kl" not in hostile["asked"][0]


@pytest.mark.parametrize("protocol", ["exact", "generated", "generated_chat"])
def test_an_answer_that_is_lost_under_any_protocol_is_a_regression(protocol):
    before, after = pair("ES", 0, 1.0, 1.0, "In Mars is")
    right, wrong = (
        [replace(one, **{protocol: value}) for one in (before, after)] for value in (1.0, 0.0)
    )
    assert "regression" in view.flags(row("lost", [(right[0], wrong[1])]))
    for first, last in ((wrong[0], right[1]), (right[0], right[1]), (wrong[0], wrong[1])):
        assert "regression" not in view.flags(row("not lost", [(first, last)]))


def test_an_answer_that_was_cut_is_marked_and_the_mark_explained():
    read = Read(page(report()))
    after = json.loads(read.texts["script"][0])[3]["asked"][0]["after"]
    assert (after["text"], after["cut"], after["chat_cut"]) == ("the", True, True)
    assert "An answer that ends in … (stopped here) is only how it begins" in read.said()
    assert "could no longer become the gold answer" in read.said()
    assert "stopped here" not in Read(page(many(1))).said()


@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("<>&/!-\u2028\u2029")))
def test_json_in_a_script_element_is_read_as_it_was_and_cannot_end_it(text):
    shown = _json({text: [text]})
    assert json.loads(shown) == {text: [text]}
    assert not set("<>&\u2028\u2029") & set(shown)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    assert page(report()) == page(report())
    first = write_page(report(), tmp_path / "one").read_bytes()
    assert write_page(report(), tmp_path / "two").read_bytes() == first


def test_nothing_is_asked_of_any_network():
    plain = replace(many(20), about={"model": "tiny", "patch": None})
    html = page(plain)
    read = Read(html)
    assert not re.search("https?:|//[a-z]|url\\(|@import", html)
    for name in ("href", "src", "srcset", "action", "data", "poster"):
        for _, attributes in read.tags:
            assert (attributes.get(name) or "#")[0] == "#" or attributes[name] == "data:,"
    policy = next(one["content"] for one in read.of("meta") if "http-equiv" in one)
    digest = base64.b64encode(hashlib.sha256(read.texts["script"][1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write", html)


def test_what_was_edited_is_said_first():
    about = {"model": "tiny", "facts_source": "f.jsonl", "decoded_facts": 2, "alternative": True}
    about |= {"trained_on": 3}
    patch = {
        "method": "mend",
        "editor": "mine",
        "settings": {"end_of_answer": None},
    }
    said = Read(page(replace(report(), about=about | {"patch": patch}))).said()
    for words in (
        "6 facts edited into tiny",
        "With MEND, editor mine",
        "trained on the subjects of 3 of these facts",
        "alternatives, false on purpose",
        "the first 2 facts only",
        "end of answer: none",
    ):
        assert words in said


@pytest.mark.parametrize(("rounds", "is_said"), [(0.0, True), (3.0, False)])
def test_that_settling_was_discarded_is_said(rounds, is_said):
    patch = {"method": "malmen", "steps": 80, "rounds": rounds}
    said = Read(page(replace(report(), about=report().about | {"patch": patch}))).said()
    assert ("Settling was discarded; the patch is the last solve." in said) == is_said


def test_links_lead_somewhere():
    read = Read(page(report()))
    ids = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    links = {(one["href"] or "")[1:] for one in read.of("a")}
    assert {"summary", "groups", "moved", "facts", "made"} == links
    assert links <= ids


def test_figures_by_hand():
    said = Read(page(report())).said()
    lines = {
        (one.kind, one.metric): one for found in figures.lines(report()).values() for one in found
    }
    assert (lines["ES", "exact"].before, lines["ES", "exact"].after) == (0.0, 5 / 6)
    assert (lines["ES", "token_ratio"].after, lines["ES", "generated"].after) == (5.5 / 6, 2 / 3)
    assert (lines["NS", "kept"].before, lines["NS", "kept"].after) == (None, 0.5)
    assert ("RS", "exact") in lines
    assert "83.3%" in said
    assert "9.50" in said
    assert "10.25" in said
    tiles = {tile.name: (tile.before, tile.after) for tile in figures.tiles(report())}
    assert tiles == {
        "Edit prompts": ("0.0%", "83.3%"),
        "Edit prompts, free-running": ("0.0%", "66.7%"),
        "Paraphrases": ("0.0%", "66.7%"),
        "Neighbours kept": ("", "50.0%"),
        "Neighbour retention": ("", "50.0%"),
        "Unrelated kept": ("", ""),
        "Unrelated retention": ("", figures.percent(lines["LS", "retention"].after)),
        "Perplexity": ("9.50", "10.25"),
    }
    relation, length = figures.tables(report())
    assert [(one.name, one.facts) for one in relation.rows] == [("capital", 3), (HOSTILE, 1)]
    assert relation.rows[0].exact["ES"] == (0.0, 2 / 3)
    assert [(one.name, one.facts) for one in length.rows] == [("2 tokens", 6)]
    assert length.kinds == ("ES", "GS", "NS", "LS")


def test_filters_count_the_facts_that_they_keep():
    assert {one["key"]: one["facts"] for one in view.filters(report())} == {
        key: len(kept) for key, kept in KEPT.items()
    }


def test_how_far_answers_moved_by_hand():
    neighbours, unrelated = figures.spreads(report())
    # "Who?" stands beside two facts and counts once.
    assert (neighbours.kind, neighbours.questions, neighbours.changed) == ("NS", 2, 1)
    assert (unrelated.kind, unrelated.questions, unrelated.changed) == ("LS", 2, 1)
    assert (unrelated.median, unrelated.ninth, unrelated.most) == (0.02, 0.5, 0.5)
    assert (neighbours.median, neighbours.most) == (2e-9, 3.0)
    # Half decades from 1e-6: 0.02 is in [0.01, 0.0316), 0.5 in [0.316, 1), 3 in [1, 3.16).
    assert [index for index, count in enumerate(unrelated.bins) if count] == [9, 12]
    assert [index for index, count in enumerate(neighbours.bins) if count] == [0, 13]
    assert unrelated.spoken == (
        "KL of 2 questions: median 0.020, nine in ten up to 0.500, farthest 0.500; "
        "1 between 0.01 and 0.03, 1 between 0.3 and 1."
    )
    found = view.moved(report())
    assert [(one.kind, one.prompt, one.kl) for one in found] == [
        ("NS", "In Wal is", 3.0),
        ("LS", HOSTILE, 0.5),
    ]
    assert (found[0].before, found[0].gold, found[0].beside) == ("Peru", "Lima", "moved")


def test_what_was_not_asked_is_left_out():
    alone = report(edited=False, kinds=("ES",))
    read = Read(page(alone))
    assert [one["value"] for one in read.of("input") if one.get("name") == "filter"] == [
        key for key in KEPT if key not in ("paraphrase", "regression", "moved")
    ]
    said = read.said().lower().replace("unedited", "")
    for word in ("paraphrases", "neighbours", "unrelated", "reversed", "edited", "moved", "after"):
        assert word not in said.replace("after normalisation", "")
    assert {one["id"] for one in read.of("section")} == {"summary", "groups", "facts", "made"}
    assert "9.50" in read.said()
    bare = replace(alone, perplexity={}, groups={}, about={"model": "tiny"})
    read = Read(page(bare))
    assert "Perplexity was not measured, for want of a text" in read.said()
    unwanted = replace(bare, about={"model": "tiny", "text": "none"})
    said = Read(page(unwanted)).said()
    assert "Perplexity was not measured, for none was asked for" in said
    assert "for want of a text" not in said
    assert "Plain text" not in read.said()
    assert {one["id"] for one in read.of("section")} == {"summary", "facts", "made"}


def test_what_is_said_of_answers_that_moved_is_true_of_few_and_of_top_tokens():
    said = Read(page(report())).said()
    assert "nine in ten up to 0.500 farthest 0.500" in said  # not below itself
    assert "given the gold answer before it" in said
    assert "given the gold answer before it" not in Read(page(report(edited=False))).said()
    classes = replace(report(), about=report().about | {"form": "classes"})
    assert "given the gold answer before it" not in Read(page(classes)).said()


def test_a_figure_and_a_filter_of_one_name_are_of_the_same_questions():
    names = {tile.name for tile in figures.tiles(report())}
    chips = {one["name"] for one in view.filters(report())}
    assert not names & chips
    meaning = {one["key"]: one["meaning"] for one in view.filters(report())}["generated"]
    assert "edit prompt or to a paraphrase" in meaning


def test_what_was_kept_is_a_count_of_answers_and_retention_is_not_called_kept():
    found = {tile.name: (tile.after, tile.count) for tile in figures.tiles(report())}
    assert found["Neighbours kept"] == ("50.0%", "1 of 2")
    assert found["Neighbour retention"] == ("50.0%", "")
    assert found["Unrelated kept"] == ("", "none was right before")
    assert found["Unrelated retention"] == ("75.0%", "")
    said = Read(page(report())).said()
    assert "Neighbours kept 50.0% 1 of 2 right before the edit, and right after it" in said
    assert "Unrelated kept – none was right before" in said
    assert "kept – 50.0% 1 of 2" in said  # in the table


def test_the_page_says_which_questions_were_left_out():
    about = report().about | {"left_out": "all but the first"}
    assert "Not asked: all but the first." in Read(page(replace(report(), about=about))).said()
    assert "Not asked" not in Read(page(report())).said()


def test_the_page_says_which_text_perplexity_is_of():
    about = report().about | {"text": "malmend's own text, lines 1 to 2"}
    said = Read(page(replace(report(), about=about))).said()
    assert "Plain textmalmend's own text, lines 1 to 2; lower is better" in said
    assert "for want of a text" not in said


def test_questions_that_are_edited_too_are_warned_of():
    leaks = [f"fact 'f{index}': a question" for index in range(7)]
    said = Read(page(replace(report(), leaks=leaks))).said()
    assert "7 questions beside facts are edited or answered otherwise too." in said
    assert leaks[4] in said
    assert leaks[5] not in said
    assert "And 2 more; report.json has all." in said
    assert (
        "1 question beside facts is edited or answered otherwise too."
        in Read(page(report())).said()
    )
    assert "beside facts" not in Read(page(replace(report(), leaks=()))).said()


def test_every_plot_has_words():
    read = Read(page(report()))
    figures_found = read.of("figure")
    assert len(figures_found) == 6  # four protocols and two histograms
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 30 for one in figures_found)


def test_the_page_and_its_figures_are_written_whole(tmp_path):
    assert write_page(report(), tmp_path / "out") == tmp_path / "out" / "index.html"
    assert files_in(tmp_path) == {"out/index.html", "out/report.json"}
    saved = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(report().to_json()))


@pytest.mark.parametrize("name", ["index.html", "report.json"])
@pytest.mark.parametrize("step", ["write_text", "synced"])
def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch, name, step):
    for old in ("index.html", "report.json"):
        (tmp_path / old).write_text("old")

    def full(path: Path, *given: str, **keywords: str) -> int:
        if name not in path.name:
            return plain(path, *given, **keywords)
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    owner = Path if step == "write_text" else page_module
    plain = getattr(owner, step)
    monkeypatch.setattr(owner, step, full)
    with pytest.raises(MalmendError, match=rf"{name} cannot be written \(No space left"):
        write_page(report(), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "index.html": "old",
        "report.json": "old",
    }


def test_a_page_is_not_new_beside_old_figures(tmp_path):
    (tmp_path / "report.json").mkdir()  # which no file takes the name of
    with pytest.raises(MalmendError, match=r"report\.json"):
        write_page(report(), tmp_path)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("fault", ["a page", "a figure"])
def test_a_report_that_cannot_be_shown_leaves_nothing(tmp_path, monkeypatch, fault):
    known = report()
    if fault == "a page":
        monkeypatch.setattr(page_module, "page", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_page(known, tmp_path / "out")
    else:
        known = replace(known, perplexity={"unedited": float("nan")})
        with pytest.raises(MalmendError, match=r"NaN or infinity, so .*report.json was not"):
            write_page(known, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_for_the_page_is_checked_before_work(tmp_path):
    facts = tmp_path / "report.json"
    facts.write_text("{}")
    with pytest.raises(MalmendError, match="is read by this command"):
        page_folder(tmp_path, str(facts))
    with pytest.raises(MalmendError, match="is a file, expected a folder"):
        page_folder(facts)
    with pytest.raises(MalmendError, match="There is no folder"):
        page_folder(tmp_path / "no" / "page")
    assert files_in(tmp_path) == {"report.json"}
    assert page_folder(tmp_path / "page", None, facts) == tmp_path / "page"


def test_a_path_that_is_no_utf8_is_shown_escaped(tmp_path):
    known = report()
    known = replace(known, about={**known.about, "facts_source": "facts\udcff.jsonl"})
    assert r"facts\udcff.jsonl" in write_page(known, tmp_path).read_text(encoding="utf-8")


def test_one_is_one_and_an_interval_leaves_no_range():
    """It once said "1 questions", and "83.3% ± 32.7"."""
    asked = [
        pair("ES", 0, 0.0, 1.0, "In Mars is"),
        pair("NS", 0, 1.0, 0.0, "In Moon is", kl=(1.0,), moved=True, top="Lima"),
        pair("LS", 0, 1.0, 1.0, "Who?", kl=(0.1,), moved=False, top="I"),
    ]
    one = replace(report(), rows=[row("one", asked)], facts=1)
    one = replace(one, about=one.about | {"skipped": 1, "decoded_facts": 1})
    said = Read(page(one)).said()
    assert "1 question; 1 has another top answer than before" in said
    assert "1 question; 0 have another top answer than before" in said
    assert "1 repeat skipped" in said
    assert not re.search(r"\b1 (questions|facts|answers|repeats)\b", said)
    assert any(
        "KL of 1 question: " in str(a.get("aria-label")) for a in Read(page(one)).of("figure")
    )
    shares = Read(page(report())).said()
    assert "±" not in shares
    assert re.search(r"66\.7% \(\d+\.\d–\d+\.\d\)", shares)
    assert "In brackets is a 95% interval." in shares


def test_a_failure_in_chat_alone_is_a_failure():
    asked = [pair("ES", 0, 0.0, 1.0, "In Mars is", generated_after=1.0, generated_chat=0.0)]
    assert view.flags(row("f", asked)) == ["failure", "chat"]


def test_what_moved_farthest_comes_first():
    asked = [
        pair("NS", 0, 1.0, 0.0, prompt, kl=(far,), moved=True)
        for prompt, far in (("near", 0.1), ("far", 2.0), ("between", 1.0))
    ]
    found = view.moved(replace(report(), rows=[row("f", asked)]))
    assert [one.prompt for one in found] == ["far", "between", "near"]


def test_a_value_on_an_edge_is_in_the_bin_above():
    values = (figures.EDGES[3], figures.EDGES[-1])
    asked = [pair("NS", 0, 1.0, 0.0, str(far), kl=(far,), moved=True) for far in values]
    (spread,) = figures.spreads(replace(report(), rows=[row("f", asked)]))
    assert [at for at, count in enumerate(spread.bins) if count] == [4, len(figures.EDGES)]
