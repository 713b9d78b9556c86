"""What the terminal says of results: plain objects in, text out; no model."""

from __future__ import annotations

import pytest

from malmend import show
from malmend.commands.ask import AskResult


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_that_was_cut_at_the_limit_ends_in_a_mark(cut, capsys):
    show.asked(AskResult("In Ora [b] is", "Lima\n or", unedited_cut=cut))
    assert capsys.readouterr().out == "In Ora [b] is\nLima\n or" + " …" * cut + "\n"
    show.asked(AskResult("In Ora is", "", "[i] Lima\n or", False, cut))
    shown = capsys.readouterr().out
    assert "unedited: (nothing)\n" in shown
    assert f"edited:   [i] Lima / or{' …' * cut}\n" in shown
