"""Ledgers of a classifier, and of an encoder-decoder, whose halves see different tokens."""

from __future__ import annotations

import pytest
from ledger_support import assert_same

import forms_folders as folders
import malmend
from command_support import CALIBRATION
from malmend.editors.refine import RefineSettings
from malmend.ledgers.access import reading
from malmend.ledgers.watch import StopRule


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_added_in_parts_and_revoked(family, tmp_path, own_cache):
    classes = folders.CLASSES if family == "bert" else ()
    loaded = malmend.load_model(folders.save_base(family, tmp_path / "base", classes=classes))
    facts = malmend.read_facts(folders.save_facts(family, tmp_path / "facts"))
    aim = {"away" if family == "bert" else "alternative": True}
    own = {
        "calibrate": folders.save_facts(family, tmp_path / "others", first=folders.COUNT),
        "text": folders.save_text(tmp_path / "text"),
        "calibration": CALIBRATION,
    }
    ledger = tmp_path / "ledger"
    malmend.ledger.init(ledger, loaded, rule=StopRule(questions=5), **own)
    malmend.ledger.add(ledger, facts[:5], model=loaded, **aim)
    malmend.ledger.add(ledger, facts, model=loaded, **aim)
    malmend.ledger.revoke(ledger, [facts[2].id])
    rest = [fact for fact in facts if fact is not facts[2]]
    wanted = malmend.edit(loaded, rest, refine=RefineSettings(passes=1), **aim, **own).patch
    found = malmend.ledger.patch(ledger)
    assert_same(found, wanted)
    assert found.provenance["tokens"] == wanted.provenance["tokens"]
    with reading(ledger) as held:
        summed = set(held.sums())
    # An encoder's sites see every token, a decoder's the answers: too few for sums here.
    assert summed == {name for name in wanted.factors if family == "bert" or "encoder" in name}
    rows = malmend.ledger.verify(ledger, loaded).rows
    assert len(rows) == len(rest)
    for row in rows:  # what the model gives, in its own words or by its class
        said = row.reply.text if family == "t5" else row.reply.top
        assert said in classes if classes else said is not None
    # One short fact has fewer tokens than its layers are wide, so that its patch is of their rank.
    (ids, one) = [fact.id for fact in rest[1:]], rest[:1]
    malmend.ledger.revoke(ledger, ids)
    found = malmend.ledger.patch(ledger)
    wanted = malmend.edit(loaded, one, refine=RefineSettings(passes=1), **aim, **own).patch
    assert all(len(factors) == 2 for factors in wanted.factors.values())
    assert found.provenance["tokens"] == wanted.provenance["tokens"]
    assert_same(found, wanted)
