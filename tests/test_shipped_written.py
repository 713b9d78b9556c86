"""The lines that a model wrote are what their card says: plain text, each a whole sentence long."""

from __future__ import annotations

from collections import Counter

from malmend.editors.calibration import CalibrationSettings
from malmend.workbench import encoder_for, shipped


def test_each_line_is_plain_text_of_its_own_that_ends_with_a_sentence():
    lines = shipped("written.txt").read_text(encoding="ascii").splitlines()
    assert len(lines) == 1200
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    for line in lines:
        assert line.isprintable()
        assert line[-1] in ".!?"
        assert len(line.split()) >= 12
        assert not any(mark in line for mark in ("<", ">", "http", "www"))


def test_there_is_enough_of_it_to_hold():
    """Four times what a prior reads of the project's own text."""
    encoder = encoder_for("smollm2-135m")
    lines = shipped("written.txt").read_text(encoding="ascii").splitlines()
    assert (
        sum(len(encoder.passage_ids(line)) for line in lines) > 4 * CalibrationSettings.text_tokens
    )
