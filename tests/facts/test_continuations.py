"""Passages of plain text as facts: prompt, and just so many tokens that follow it."""

from __future__ import annotations

import pytest

import helpers
from malmend.cli import show
from malmend.commands.continuations import continuations as command
from malmend.errors import FactsError, MalmendError
from malmend.facts.continuations import continuations
from malmend.facts.readers import read_facts
from malmend.facts.tokens import Encoder

WORDS = [f"w{index}" for index in range(30)]
LINE = " ".join(WORDS[:12])
TEXT = "\n".join(["", "w1 w2", LINE, LINE, "  " + " ".join(WORDS[5:25]) + "  ", "w3"])


def words():
    return Encoder(helpers.words(WORDS), "none", 64)


def test_lines_part_at_the_asked_token():
    found, skipped = continuations(words(), TEXT, tokens=3, prompt_tokens=4)
    assert [(fact.prompt, fact.answer, fact.line) for fact in found] == [
        ("w0 w1 w2 w3", "w4 w5 w6", 3),  # the same line again is no second fact
        ("w5 w6 w7 w8", "w9 w10 w11", 5),
    ]
    assert len({fact.id for fact in found}) == 2
    assert [(one.fact.line, one.earlier.line) for one in skipped] == [(4, 3)]
    assert len(continuations(words(), TEXT, 3, 4, limit=1)[0]) == 1


def test_lines_that_part_alike_but_for_blanks_are_one():
    found, skipped = continuations(words(), f"{LINE}\n{LINE.replace(' ', '  ', 1)}", 3, 4)
    assert [fact.line for fact in found] == [1]
    assert [one.kind for one in skipped] == ["duplicate"]


@pytest.mark.parametrize("make", [helpers.byte_level, helpers.metaspace])
@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_answers_have_just_so_many_tokens_and_read_as_the_text(make, tokens):
    encoder = Encoder(make(), "none", 256)
    text = "\n".join(["The capital of France is Paris. " * 4, "Lake Ora, größer als Ora?! " * 3])
    found, _ = continuations(encoder, text, tokens, prompt_tokens=5)
    assert found
    for fact in found:
        asked = encoder.encode(fact.question)
        assert asked.counted == len(asked.labels) == tokens
        assert asked.answer_start >= 5
        assert f"{fact.prompt} {fact.answer}" in text


def test_a_prompt_never_ends_within_a_word():
    encoder = Encoder(helpers.byte_level(), "none", 256)
    line = "incomprehensibilities antidisestablishmentarianism incomprehensibilities " * 2
    for fact in continuations(encoder, line, 8, 24)[0]:
        assert line[len(fact.prompt)] == " "


def test_a_text_without_a_long_line_is_refused():
    with pytest.raises(FactsError, match=r"No line of the text has 42 tokens.*--prompt-tokens"):
        continuations(words(), TEXT)


@pytest.mark.parametrize("name", ["tokens", "prompt_tokens"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(MalmendError, match=f"{name} is 0.*--{name.replace('_', '-')}"):
        continuations(words(), TEXT, **{name: 0})


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_below_one_is_refused(limit):
    """Of 0 no line was long enough once, and -2 was no limit."""
    with pytest.raises(MalmendError, match=f"limit is {limit}; give 1 or more"):
        continuations(words(), TEXT, 3, 4, limit=limit)


def test_the_command_writes_facts_that_are_read_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("malmend.commands.continuations.encoder_for", lambda *_: words())
    text, out = tmp_path / "text.txt", tmp_path / "facts.jsonl"
    text.write_text(TEXT)
    result = command("any", text, out, tokens=3, prompt_tokens=4)
    assert [(f.prompt, f.answer) for f in read_facts(out)] == [
        (f.prompt, f.answer) for f in result.facts
    ]
    show.continued(result)
    said = capsys.readouterr().out
    assert said.startswith("2 passages and what follows them: ")
    assert "\nLeft out 1 passage that begins as an earlier one does.\n" in said
    show.continued(command("any", text, out, tokens=3, prompt_tokens=4, limit=1))
    said = capsys.readouterr().out
    assert said.startswith("1 passage and what follows it: ")
    assert "Left out" not in said
    with pytest.raises(MalmendError):
        command("any", text, text)  # never over the input
