"""A ledger, and an edit of one solve, whose facts are solved in the chat template too."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import ledger_support
import pytest
import torch
from ledger_support import QUIET, added, apart, assert_same, own

import command_support
import malmend
from command_support import CALIBRATION, Tiny, make_facts
from malmend.cli import ledger as ledger_command
from malmend.editors.editor import log_size
from malmend.editors.refine import CHAT, RefineSettings, framed
from malmend.errors import EditorError, LedgerError
from malmend.evaluation.matching import matches
from malmend.facts.encoded import Encoded
from malmend.methods.editor_choice import choose
from malmend.methods.editor_method import ByEditor
from malmend.models.capture import capture
from malmend.workbench import lay_out

tiny = command_support.tiny
cache = command_support.cache

FACTS = ledger_support.HELD
TEMPLATE = "User: {{ messages[0]['content'] }} Assistant: "
WELL = "Well: {prompt}"
FRAMES = (CHAT, WELL)


@pytest.fixture
def chatting(tiny: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    monkeypatch.setattr(tiny.loaded.tokenizer, "chat_template", TEMPLATE, raising=False)
    return tiny


def begun(tiny: Tiny, folder: Path, frames: tuple[str, ...]) -> Path:
    malmend.ledger.init(folder, tiny.loaded, frames=frames, rule=QUIET, **own(tiny))
    return folder


def at_once(tiny: Tiny, facts, frames: tuple[str, ...] | None):
    refine = RefineSettings(passes=1, frames=frames)
    return malmend.edit(tiny.loaded, facts, refine=refine, **own(tiny)).patch


@pytest.mark.parametrize("count", [8, 24], ids=["rows", "sums"])
def test_whatever_its_history_it_is_one_edit_in_the_same_frames(chatting, tmp_path, count):
    ledger = begun(chatting, tmp_path / "ledger", FRAMES)
    added(chatting, ledger, FACTS[: count - 3])
    added(chatting, ledger, FACTS[count - 3 : count])
    malmend.ledger.revoke(ledger, [FACTS[1].id])
    rest = [FACTS[0], *FACTS[2:count]]
    found, wanted = malmend.ledger.patch(ledger), at_once(chatting, rest, FRAMES)
    assert bool(list(ledger.glob("sums-*"))) == (count == 24)
    assert_same(found, wanted)
    for name in ("frames", "passes", "tokens"):
        assert found.provenance[name] == wanted.provenance[name]
    assert apart(found, at_once(chatting, rest, (CHAT,))) > 1e-2
    assert apart(found, at_once(chatting, rest, None)) > 1e-2


def test_the_shift_in_frames_against_the_formula_in_float64(chatting):
    """(14) over the rows of every frame, each question captured by itself, by another solver."""
    facts = FACTS[:5]
    found = at_once(chatting, facts, FRAMES)
    chosen = choose("none", own_data=True)
    bench = lay_out(chatting.loaded, chosen.settings.sites_in(chatting.loaded.model))
    editor, plain = chosen.editor(bench, **own(chatting)), [fact.question for fact in facts]
    every = [bench.encoder.encode(one) for one in plain]
    every += [bench.encoder.encode(type(q)(f"Well: {q.prompt}", q.answer)) for q in plain]
    for one in plain:
        [chat] = framed(bench.encoder, [one], CHAT)
        assert isinstance(chat, Encoded)
        said = chatting.loaded.tokenizer.decode(chat.prompt)
        assert said.strip() == f"User: {one.prompt} Assistant:"
        every.append(chat)
    pairs = [capture(bench.trunk, [one], "answer", editor.settings.descent) for one in every]
    for site, name in enumerate(editor.names):
        u_KN = torch.cat([pair[site].keys_NK for pair in pairs]).double().T
        g_VN = torch.cat([pair[site].value_grads_NV for pair in pairs]).double().T
        ends_N = torch.cat([pair[site].ends_N for pair in pairs])
        end = editor.log_end_weight_S[site].double().exp()
        w_N = torch.where(ends_N, end, torch.ones_like(end))
        n, ridge = u_KN.shape[1], editor.log_ridge_S[site].exp()
        a_KK = (u_KN * w_N) @ u_KN.T + ridge * torch.eye(len(u_KN))
        for index, term in enumerate(editor.terms):
            power = editor.powers_SP[site, index] * log_size(n)
            weight = (editor.log_weights_SP[site, index] + power).double().exp()
            times = n if term == "wording" else 1
            a_KK += times * weight * getattr(editor, f"prior_{term}_{site}")
        d_VN = -editor.log_eta_S[site].double().exp() * g_VN
        wanted = torch.linalg.solve(a_KK, (u_KN * w_N) @ d_VN.T).T
        # Captured in other micro-batches, in float32.
        assert (found.shift(name).double() - wanted).norm() < 5e-5 * wanted.norm()


def test_in_a_chat_is_solved_only_where_that_is_asked(chatting, tmp_path):
    told: list[str] = []
    kept = {"rule": QUIET, "told": told.append, **own(chatting)}
    malmend.ledger.init(tmp_path / "plain", chatting.loaded, **kept)
    assert "In a chat next to nothing will hold; --frames '[chat]' solves for it too." in told
    added(chatting, tmp_path / "plain", FACTS[:2])
    found = malmend.ledger.patch(tmp_path / "plain")
    assert found.provenance["frames"] == []
    assert_same(found, at_once(chatting, FACTS[:2], None))
    rows = malmend.ledger.verify(tmp_path / "plain", chatting.loaded).rows
    assert all(row.holds_in_chat is None for row in rows)
    told.clear()
    malmend.ledger.init(tmp_path / "chat", chatting.loaded, frames=(CHAT,), **kept)
    assert not any("chat" in line for line in told)


def test_chat_without_a_template_is_refused_before_anything_is_made(tiny, cache, tmp_path):
    with pytest.raises(EditorError, match="no chat template"):
        begun(tiny, tmp_path / "ledger", (CHAT,))
    assert not (tmp_path / "ledger").exists()


def test_a_frame_without_a_place_for_the_prompt_is_refused(chatting, tmp_path):
    with pytest.raises(EditorError, match=r"'Well:' has no place for the prompt"):
        begun(chatting, tmp_path / "ledger", ("Well:",))
    assert not (tmp_path / "ledger").exists()


def test_what_is_too_long_in_a_frame_has_rows_of_the_others_alone(
    tiny, cache, monkeypatch, tmp_path
):
    longer = "{{ 'word ' * 600 }}{{ messages[0]['content'] }} "
    monkeypatch.setattr(tiny.loaded.tokenizer, "chat_template", longer, raising=False)
    ledger = begun(tiny, tmp_path / "ledger", FRAMES)
    added(tiny, ledger, FACTS[:3])
    assert_same(malmend.ledger.patch(ledger), at_once(tiny, FACTS[:3], (WELL,)))


def test_verify_says_which_facts_hold_in_a_chat(chatting, tmp_path):
    holding = replace(CALIBRATION, etas=(1.0,), alphas=(10.0,))  # by which some do
    ledger, given = tmp_path / "ledger", own(chatting) | {"calibration": holding}
    malmend.ledger.init(ledger, chatting.loaded, frames=(CHAT,), rule=QUIET, **given)
    added(chatting, ledger, FACTS[:4])
    found = malmend.ledger.verify(ledger, chatting.loaded)
    patch = malmend.ledger.patch(ledger)
    asked = [malmend.ask(chatting.loaded, one.prompt, patch, chat=True) for one in FACTS[:4]]
    wanted = [matches(one.edited, fact.answer) for one, fact in zip(asked, FACTS, strict=False)]
    assert [row.holds_in_chat for row in found.rows] == wanted
    assert any(wanted)


def test_the_command_line_names_what_does_not_hold_in_a_chat(
    chatting, tmp_path, monkeypatch, capsys
):
    ledger = begun(chatting, tmp_path / "ledger", (CHAT,))
    added(chatting, ledger, FACTS[:2])
    found = malmend.ledger.verify(ledger, chatting.loaded)
    rows = [
        replace(row, reply=replace(row.reply, generated_chat=told, text_chat="Oslo"))
        for row, told in zip(found.rows, (1.0, 0.0), strict=True)
    ]
    monkeypatch.setattr(malmend.ledger, "verify", lambda **_given: replace(found, rows=rows))
    ledger_command.ledger(["verify", str(ledger)], "")
    said = capsys.readouterr().out
    assert "In a chat 1 of 2 facts hold.\n" in said
    assert (
        f"{FACTS[1].id}: {FACTS[1].prompt!r} should give {FACTS[1].answer!r}, gives 'Oslo'" in said
    )


@pytest.mark.parametrize("spoilt", [["Well:"], 7, "chat", [7]])
def test_frames_that_are_none_are_a_fault_of_the_table(chatting, tmp_path, spoilt):
    ledger = begun(chatting, tmp_path / "ledger", (CHAT,))
    with sqlite3.connect(ledger / "ledger.sqlite") as db:
        db.execute("UPDATE about SET value = ? WHERE name = 'frames'", [json.dumps(spoilt)])
    with pytest.raises(LedgerError, match="its table 'about'"):
        malmend.ledger.list_facts(ledger)


def test_a_ledger_of_before_has_no_frames(chatting, tmp_path):
    ledger = begun(chatting, tmp_path / "ledger", ())
    with sqlite3.connect(ledger / "ledger.sqlite") as db:
        db.execute("DELETE FROM about WHERE name = 'frames'")
    added(chatting, ledger, FACTS[:2])
    assert malmend.ledger.patch(ledger).provenance["frames"] == []


@pytest.mark.parametrize(
    ("refine", "read"),
    [
        (RefineSettings(passes=1), False),
        (RefineSettings(passes=1, frames=()), False),
        (RefineSettings(passes=1, frames=(WELL,)), True),
        (RefineSettings(passes=2), True),
    ],
)
def test_frames_that_are_read_are_not_said_to_be_unread(tiny, refine, read):
    work = ByEditor(choose("none"), refine=refine)
    assert work.reads_frames == read
    assert not any("--refine.frames" in line for line in work.said())


def test_a_plan_counts_the_rows_of_frames(chatting):
    chosen = choose("none")
    bench = lay_out(chatting.loaded, chosen.settings.sites_in(chatting.loaded.model))
    facts = make_facts(3)
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    plain, framed_too = (
        ByEditor(chosen, refine=RefineSettings(passes=1, frames=frames)).rows(
            bench, facts, questions
        )
        for frames in ((), FRAMES)
    )
    assert framed_too > 2 * plain
