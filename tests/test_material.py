"""What a classifier is calibrated by."""

from __future__ import annotations

import pytest

from malmend.facts.fact import Fact
from malmend.material import _with_another

CLASSES = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


@pytest.mark.parametrize(
    ("alternative", "wanted"),
    [
        ("not enough info", "not enough info"),  # as everywhere, in any case
        ("NOT ENOUGH INFO", "NOT ENOUGH INFO"),
        ("supports", "REFUTES"),  # what it is already
        ("Ghana", "REFUTES"),
        (None, "REFUTES"),
    ],
)
def test_a_fact_is_moved_to_the_class_that_its_file_names(alternative, wanted):
    fact = Fact("1", "Accra is the capital of Ghana.", "SUPPORTS", alternative=alternative)
    assert _with_another(fact, CLASSES).alternative == wanted
