"""Tiny models of every layout of a weight with random patches on them, for the tests of shipping.

    llama          nn.Linear           gpt2   Conv1D, weights stored K x V
    t5, t5-gated   nn.Linear, both halves     bert   an encoder with a head

    patch = shipping_support.patch      (a fixture: a patch of RANK on the tiny model on disk)
    shipping_support.refusal(capsys)    what a refused command answers with

Shape letters: V value width, K key width, R rank, B questions, T positions.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import forms_support
import helpers
import malmend
import tiny as families
from command_support import Tiny
from malmend.models.load import LoadedModel, prepared
from malmend.models.sites import find_sites
from malmend.patch import Patch, make_patch
from malmend.patch_file import load_patch, save_patch

FAMILIES = ("llama", "gpt2", "t5", "t5-gated", "bert")


def loaded_of(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> LoadedModel:
    make = forms_support if family in forms_support.FAMILIES else families
    return prepared(make.model_of(family, dtype, **changes), None, family)


def low_rank(rank: int, shape: tuple[int, int], seed: int, size: float = 0.1) -> Tensor:
    """A random V x K matrix of a rank, float64."""
    generator = torch.Generator().manual_seed(seed)
    left_VR = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right_RK = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return size * left_VR @ right_RK


def patch_for(
    loaded: LoadedModel, rank: int = 3, layers: int = 2, bound: int | None = None, seed: int = 0
) -> Patch:
    """Shifts of rank ``rank``, ``rank - 1``, ... in turn; whole matrices where ``bound`` is large.

    Both layers of the last blocks, of an encoder-decoder in both halves.
    """
    sites = find_sites(loaded.model, layers, linear="both")
    shifts = {
        site.name: low_rank(max(1, rank - index % 3), site.shape_VK, seed + index)
        for index, site in enumerate(sites)
    }
    about = {"base": loaded.fingerprint, "model": loaded.name, "method": "test", "facts": 4}
    return make_patch(shifts, bound or rank, about | {"settings": {"end_of_answer": "none"}})


def batch_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Token ids that the model reads, a B x T batch."""
    generator = torch.Generator().manual_seed(9)
    ids_BT = torch.randint(3, 59, (3, 7), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids_BT, "decoder_input_ids": ids_BT[:, :4]}
    return {"input_ids": ids_BT}


@torch.no_grad()
def logits_of(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def bits_of(model: PreTrainedModel) -> dict[str, tuple[int, bool, Tensor]]:
    """Where every weight lies, whether it is trained, and its bytes."""
    return {
        name: (weight.data_ptr(), weight.requires_grad, families.bits(weight))
        for name, weight in model.named_parameters()
    }


def assert_untouched(model: PreTrainedModel, before: dict[str, tuple[int, bool, Tensor]]) -> None:
    after = bits_of(model)
    assert after.keys() == before.keys()
    for name, (place, trained, content) in before.items():
        assert after[name][:2] == (place, trained)
        assert torch.equal(after[name][2], content)


def twin(loaded: LoadedModel) -> PreTrainedModel:
    """A copy that PEFT may wrap."""
    return copy.deepcopy(loaded.model)


def save_folder(loaded: LoadedModel, folder: Path) -> str:
    """The model and a tokenizer that can say a few words."""
    known = [f"w{index}" for index in range(50)]
    loaded.model.save_pretrained(folder)
    helpers.words(known, "$A").save_pretrained(folder)
    return str(folder)


RANK = 20


@pytest.fixture(scope="module")
def patch(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch of rank 20 on two layers of the tiny model, which changes much."""
    return save_patch_of(tiny, tmp_path_factory.mktemp("patch") / "patch", RANK, seed=0)


def save_patch_of(tiny: Tiny, path: Path, rank: int, seed: int) -> Path:
    sites = find_sites(tiny.loaded.model, 2)
    shifts = {s.name: low_rank(rank, s.shape_VK, seed + i, 0.02) for i, s in enumerate(sites)}
    about = {"base": tiny.loaded.fingerprint, "model": tiny.model, "method": "test", "facts": 12}
    save_patch(make_patch(shifts, rank, about | {"settings": {"end_of_answer": "eos"}}), path)
    return path


def towards_alternatives(tiny: Tiny, patch: Path, folder: Path) -> tuple[Path, Path]:
    """The tiny model's facts with alternatives, and the patch as one that was made for these.

    An alternative is what the patched model says first, as far as that is letters.
    """
    lines = [json.loads(line) for line in Path(tiny.facts).read_text().splitlines()]
    facts, other, made = folder / "alternatives.jsonl", folder / "alternative", load_patch(patch)
    rows = []
    for one in lines:
        said = malmend.ask(tiny.loaded, one["prompt"], made, max_new_tokens=3).edited
        letters = re.match("[A-Za-z]+", said)
        rows.append(one | {"alternative": letters[0] if letters else "Kalo"})
    facts.write_text("\n".join(map(json.dumps, rows)))
    save_patch(Patch(made.factors, {**made.provenance, "alternative": True}), other)
    return facts, other


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says, without what loaders write before it."""
    shown = capsys.readouterr()
    said = shown.err[shown.err.index("malmend: ") :]
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return said
