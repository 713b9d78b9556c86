"""What malmend does of itself with each form of model: which tokens, and how many solves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from forms_support import ENCODERS, model_of, pairs_alone, places, questions
from malmend.editors.keymoments import asked_moment
from malmend.editors.refine import RefineSettings
from malmend.facts.encoded import resolved
from malmend.facts.tokens import Reading
from malmend.models.capture import capture
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk

FORMS = [(family, True) for family in ENCODERS] + [("t5", False), ("bart", False)]


@pytest.mark.parametrize(("family", "takes_all"), FORMS)
def test_auto_is_every_token_of_a_classifier_and_the_answers_of_another(family, takes_all):
    model = model_of(family)
    sites = find_sites(model)
    trunk, asked = Trunk(model, sites), questions(family)
    for site, pair in zip(sites, capture(trunk, asked), strict=True):
        wanted = sum(len(places(site, one, "all" if takes_all else "answer")) for one in asked)
        assert len(pair.keys_NK) == wanted
    assert resolved("auto", asked[0].form) == ("all" if takes_all else "answer")
    assert resolved("answer", "classes") == "answer"
    assert resolved("all", "causal") == "all"


@pytest.mark.parametrize("tokens", ["auto", "all", "answer"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_asked_is_the_mean_over_the_tokens_that_an_edit_has_rows_of(family, tokens):
    """A classifier's prior once knew the first token's keys alone, where all were edited."""
    model = model_of(family)
    sites = find_sites(model)
    trunk, asked = Trunk(model, sites), questions(family)
    found = asked_moment(trunk, asked, tokens)
    chosen = resolved(tokens, asked[0].form)
    for index, site in enumerate(sites):
        rows = [
            pairs_alone(model, sites, one)[0][index][places(site, one, chosen)] for one in asked
        ]
        keys = torch.cat(rows)
        torch.testing.assert_close(found[index], keys.T @ keys / len(keys), rtol=1e-9, atol=1e-12)


def solves(refine: RefineSettings, form: str, missed: list[float]) -> int:
    """How many there are if each misses that share of the tokens."""
    done, encoder = 1, SimpleNamespace(reading=Reading(form))
    while refine.goes_on(encoder, done, missed[done - 1]):
        done += 1
    return done


NEVER, LATE = [0.0101] * 9, [0.2, 0.1] + [0.01] * 7


@pytest.mark.parametrize("form", ["causal", "seq2seq"])
def test_a_decoder_is_solved_three_times_and_again_while_much_is_missed(form):
    default = RefineSettings()
    assert [solves(default, form, missed) for missed in ([0.0] * 9, LATE, NEVER)] == [3, 3, 4]


@pytest.mark.parametrize("missed", [NEVER, LATE])
def test_a_classifier_is_solved_four_times_and_what_is_asked_for_is_done(missed):
    assert solves(RefineSettings(), "classes", missed) == 4
    for form in ("causal", "seq2seq", "classes"):
        assert [solves(RefineSettings(passes=n), form, missed) for n in (1, 2, 6)] == [1, 2, 6]
