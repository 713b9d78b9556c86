"""The prior of layers that settle beside an editor's own, against sums by hand, float64."""

from __future__ import annotations

import pytest
import torch

from malmend.editors.around import Around, load_around, save_around
from malmend.editors.calibration import CalibrationSettings

CPU = torch.device("cpu")
GIVEN = CalibrationSettings(alphas=(2.0,), asked=5.0, wording=0.5, ridge=0.25)


def moments(*terms: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(terms))
    keys = [torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in terms]
    return {term: rows.T @ rows / 9 for term, rows in zip(terms, keys, strict=True)}


def test_the_prior_is_what_an_editor_without_a_network_starts_from():
    known = moments("text", "asked", "wording")
    found = Around({"a": known}).prior("a", 50, CPU).add_to(torch.zeros(4, 4).double())
    text, asked, wording = known.values()
    wanted = 10 * text + 30 * asked + 0.03 * 50 * wording
    wanted += 0.01 * 10 * text.diagonal().mean() * torch.eye(4).double()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_the_weights_are_those_of_the_calibration_that_was_given():
    """A user's own were once left out."""
    known = moments("text", "asked", "wording")
    found = Around({"a": known}, GIVEN).prior("a", 7, CPU).add_to(torch.zeros(4, 4).double())
    text, asked, wording = known.values()
    wanted = 2 * text + 10 * asked + 0.5 * 7 * wording
    wanted += 0.25 * 2 * text.diagonal().mean() * torch.eye(4).double()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_of_text_alone_and_of_nothing():
    known = moments("text")
    found = Around({"a": known}).prior("a", 50, CPU).add_to(torch.zeros(4, 4).double())
    wanted = 10 * known["text"] + 0.1 * known["text"].diagonal().mean() * torch.eye(4).double()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert Around({"a": {}}).prior("a", 50, CPU).is_identity


def test_it_is_read_as_it_was_written(tmp_path):
    around = Around({"a": moments("text", "asked"), "b": moments("text", "asked")})
    save_around(around, tmp_path / "a.safetensors")
    found = load_around(tmp_path / "a.safetensors", ["a", "b"], ("text", "asked"), GIVEN)
    for name, known in around.moments.items():
        assert list(found.moments[name]) == ["text", "asked"]
        assert all(torch.equal(found.moments[name][term], one) for term, one in known.items())
    with pytest.raises(KeyError):
        load_around(tmp_path / "a.safetensors", ["a", "c"], ("text", "asked"), GIVEN)
