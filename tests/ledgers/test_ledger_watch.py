"""What is said of a ledger's model: what it knew, what holds, what else moved, when to stop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ledger_support import added, begun, own

import command_support
import helpers
import malmend
from command_support import greedy, make_facts, make_model, teach
from malmend.commands import ledger_init
from malmend.editors.calibration import CalibrationSettings
from malmend.errors import LedgerError
from malmend.evaluation.examiner import Examiner
from malmend.facts.fact import Fact
from malmend.ledgers.watch import StopRule
from malmend.material import _calibration_data, held_out_questions
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.workbench import encoder_for, lay_out

tiny = command_support.tiny
cache = command_support.cache
whole = command_support.whole

FACTS = make_facts(6, seed=5)
KNOWN = [
    Fact("paris", "The capital of France is", "Paris"),
    Fact("lima", "The capital of Peru is", "Lima"),
]


def test_retention_is_the_share_of_first_choices_that_stay(tiny, tmp_path):
    ledger = begun(tiny, tmp_path / "ledger", StopRule(retention=0.999, questions=40))
    done = added(tiny, ledger, FACTS)
    encoder = encoder_for(tiny.loaded)
    questions = held_out_questions(encoder, 40)
    assert len(questions) == 40

    def said() -> list[int]:
        found = []
        for question in questions:
            one = encoder.encode(question)
            labels = list(one.labels[: one.counted])
            row = torch.tensor([[*one.prompt, *labels]])
            top = tiny.loaded.model(input_ids=row, use_cache=False).logits[0].argmax(-1)
            found += top[len(one.prompt) - 1 :][: max(one.counted, 1)].tolist()
        return found

    before = said()
    with malmend.applied(tiny.loaded, malmend.ledger.patch(ledger)):
        after = said()
    share = sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
    assert 0 < share < 1
    assert done.generation.retention == pytest.approx(share)
    assert f"keeps {share:.1%}" in done.warning
    assert malmend.ledger.verify(ledger, tiny.loaded).warning == done.warning


def test_a_rule_that_refuses_changes_nothing(tiny, tmp_path):
    ledger = begun(tiny, tmp_path / "ledger", StopRule(1.0, 20, refuse=True))
    with pytest.raises(LedgerError, match=r"below the ledger's bound of 100\.0%, so nothing was"):
        added(tiny, ledger, FACTS)
    assert not malmend.ledger.list_facts(ledger)
    assert not list(ledger.glob("rows-*"))
    assert StopRule(0.5).warning(0.5) is None
    assert StopRule(0.5).warning(None) is None


def test_a_rule_that_would_never_refuse_begins_no_ledger(tiny, tmp_path, monkeypatch):
    rule = StopRule(questions=0, refuse=True)
    with monkeypatch.context() as patch:
        patch.setattr("malmend.workbench.load_model", None)  # it is said before the work
        with pytest.raises(LedgerError, match=r"measures nothing, so that --rule.refuse never"):
            malmend.ledger.init(tmp_path / "ledger", tiny.model, rule=rule)
    assert not (tmp_path / "ledger").exists()
    monkeypatch.setattr(ledger_init, "_check_rule", lambda rule: None)  # as earlier versions
    ledger = begun(tiny, tmp_path / "ledger", rule)
    assert added(tiny, ledger, FACTS).generation.retention is None


def test_no_questions_no_figure(tiny, tmp_path):
    ledger = begun(tiny, tmp_path / "ledger", StopRule(1.0, 0))
    assert added(tiny, ledger, FACTS).generation.retention is None


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("facts", [256, 5_000])  # the prior of a training reads all it may
def test_general_questions_are_not_those_of_the_prior(tiny, facts):
    bench = lay_out(tiny.loaded, find_sites(tiny.loaded.model))
    settings = CalibrationSettings(prior_facts=facts)
    _, _, read, far = _calibration_data(bench, None, None, settings)
    asked = held_out_questions(bench.encoder, StopRule().questions)
    assert len(asked) == StopRule().questions
    assert not set(asked) & {*read, *far}
    assert not set(read) & set(far)
    assert len(far) == (settings.search_facts if facts == 256 else 0)


@pytest.fixture(scope="module")
def knowing():
    """A model that knows two capitals."""
    tokenizer = helpers.byte_level()
    model = make_model(tokenizer, layers=2)
    loaded = prepared(model, tokenizer, "knowing")
    encoder = encoder_for(loaded)
    encoded = [encoder.encode(fact.question) for fact in KNOWN]
    teach(model, [(one.prompt, one.labels) for one in encoded])
    return prepared(model, tokenizer, "knowing")


def test_what_the_model_knows_is_said_before_the_work(tiny, knowing, tmp_path, monkeypatch):
    ledger = tmp_path / "ledger"
    malmend.ledger.init(ledger, knowing, rule=StopRule(questions=0), **own(tiny))
    lines: list[str] = []

    def stops(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("malmend.commands.ledger_facts.taken", stops)
        with pytest.raises(KeyboardInterrupt):
            malmend.ledger.add(ledger, [*KNOWN, *FACTS], model=knowing, told=lines.append)
    assert (
        "answers 2 facts (paris, lima) right already; taken in all the same (--skip-known"
        in lines[0]
    )
    add = malmend.ledger.add
    done = add(ledger, [*KNOWN, FACTS[0]], skip_known=True, model=knowing, told=lines.append)
    assert "left out" in lines[1]
    assert list(done.known) == KNOWN
    assert [entry.id for entry in done.entered] == ["f0"]
    assert add(ledger, KNOWN, skip_known=True, model=knowing).generation.number == 1


def test_replacing_offers_no_option_that_it_lacks(knowing, tiny, tmp_path):
    ledger, lines = tmp_path / "ledger", []
    malmend.ledger.init(ledger, knowing, rule=StopRule(questions=0), **own(tiny))
    wrong = dataclasses.replace(KNOWN[0], answer="Rome")
    malmend.ledger.add(ledger, [wrong], model=knowing)
    malmend.ledger.replace(ledger, KNOWN[:1], model=knowing, told=lines.append)
    assert lines == [
        "The unedited model answers 1 fact (paris) right already; taken in all the same."
    ]


def test_verify_asks_every_fact_as_a_user_would(tiny, knowing, tmp_path):
    ledger = tmp_path / "ledger"
    malmend.ledger.init(ledger, knowing, rule=StopRule(questions=0), **own(tiny))
    done = malmend.ledger.add(ledger, [*KNOWN, FACTS[0]], model=knowing)
    found = malmend.ledger.verify(ledger, knowing)
    assert type(found) is malmend.ledger.Verification
    encoder = encoder_for(knowing)
    ends = {knowing.tokenizer.eos_token_id}
    with malmend.applied(knowing, malmend.ledger.patch(ledger)):
        for row in found.rows:
            ids = encoder.prompt_ids(row.entry.prompt)
            said = greedy(
                knowing, ids, ends, limit=len(encoder.encode(row.entry.fact.question).labels) + 7
            )
            assert row.holds == (said.casefold() == row.entry.answer.casefold())
    assert [row.holds for row in found.rows] == [entry.held for entry in done.entered]
    assert any(row.holds for row in found.rows)
    assert found.failing == [row for row in found.rows if not row.holds]


def test_verify_asks_the_edited_model_alone(tiny, tmp_path, monkeypatch):
    """What the unedited one knows is asked where facts are added."""
    ledger, asked, examine = begun(tiny, tmp_path / "ledger"), [], Examiner.examine
    added(tiny, ledger, FACTS)

    def noted(*given, **more):
        asked.append(more.get("decode_facts"))
        return examine(*given, **more)

    monkeypatch.setattr(Examiner, "examine", noted)
    malmend.ledger.verify(ledger, tiny.loaded)
    assert asked == [None]


def test_verify_of_an_empty_ledger_asks_nothing(tiny, tmp_path, monkeypatch):
    ledger = begun(tiny, tmp_path / "ledger")
    monkeypatch.setattr("malmend.workbench.load_model", None)
    assert malmend.ledger.verify(ledger).rows == []
