"""The lines of Wikipedia are what their card says, and those that their script makes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from malmend.editors.calibration import CalibrationSettings
from malmend.workbench import encoder_for, shipped

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_wikipedia.py"
LINES = shipped("wikipedia.txt").read_text(encoding="utf-8").splitlines()


def test_each_line_is_prose_of_its_own():
    assert len(LINES) == 1895
    assert [line for line, count in Counter(LINES).items() if count > 1] == []
    for line in LINES:
        assert line.isprintable()
        assert line == line.strip()
        assert not any(mark in line for mark in ("{", "}", "[", "]", "|", "http", "''", "ISBN"))
        assert len(line.replace("<unk>", "").split()) >= 30


def test_every_second_has_its_marks_apart():
    assert all(line.endswith((" .", " !", " ?", ' . "', ' ? "', ' ! "')) for line in LINES[1::2])
    assert not any("@-@" in line or "<unk>" in line for line in LINES[::2])
    assert not any("," in word and len(word) > 1 and "@" not in word
                   for line in LINES[1::2] for word in line.split())  # fmt: skip


def test_every_article_is_named_with_its_revision():
    rows = [
        line.split("\t")
        for line in shipped("wikipedia-articles.tsv").read_text("utf-8").splitlines()
    ]
    assert len(rows) == len({title for title, _ in rows}) == 97
    for _, address in rows:
        start, _, number = address.partition("?oldid=")
        assert start == "https://en.wikipedia.org/w/index.php"
        assert number.isdigit()


def test_there_is_enough_of_it_to_hold():
    """Six times what a prior reads of the project's own text."""
    encoder = encoder_for("smollm2-135m")
    tokens = sum(len(encoder.passage_ids(line)) for line in LINES)
    assert tokens > 6 * CalibrationSettings.text_tokens


@pytest.mark.skipif(
    find_spec("gensim") is None or find_spec("mwparserfromhell") is None,
    reason="needs what the script reads: pip install --group text",
)
def test_the_script_makes_the_same():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
