"""Settings that no command can use are refused in a sentence that names the field."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest

from malmend.bench.context import InContext
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings
from malmend.editors.train_settings import TrainSettings
from malmend.errors import MalmendError
from malmend.ledgers.watch import StopRule
from malmend.methods.enn import EnnSettings
from malmend.methods.ft import FineTuning
from malmend.methods.ke import KeSettings
from malmend.methods.lora import Lora
from malmend.methods.memit import Memit
from malmend.methods.ultraedit import UltraEdit
from malmend.models.descent import Descent
from malmend.models.finetune import FinetuneSettings
from malmend.models.trunk import TrunkSettings

KINDS = [CalibrationSettings, Descent, EditorSettings, EnnSettings, FineTuning, FinetuneSettings]
KINDS += [InContext, KeSettings, Lora, Memit, NetworkSettings, RefineSettings, StopRule]
KINDS += [TrainSettings, TrunkSettings, UltraEdit]
FIELDS = [(kind, one.name) for kind in KINDS for one in fields(kind)]
NUMBERS = [(kind, one.name) for kind in KINDS for one in fields(kind) if "float" in str(one.type)]
OF_MODEL = ("layers", "blocks")  # of which the model's number is the most
COUNTS = [(kind, one.name) for kind in KINDS for one in fields(kind) if "int" in str(one.type)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_value_of_another_type_is_refused_by_name(kind, name):
    for wrong in (object(), {"a": 1}, b"1"):
        with pytest.raises(MalmendError, match=name):
            kind(**{name: wrong})


@pytest.mark.parametrize(("kind", "name"), [*NUMBERS, *COUNTS])
def test_a_number_as_a_text_is_refused_by_name(kind, name):
    for wrong in ("3", "foo", True):
        with pytest.raises(MalmendError, match=name):
            kind(**{name: wrong})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_what_is_no_number_is_refused_by_name(kind, name):
    for wrong in (math.nan, math.inf, -math.inf, -1.0, 1e300, 10**400, 10**5000):
        with pytest.raises(MalmendError, match=name):
            kind(**{name: [wrong] if "tuple" in kind.__annotations__[name] else wrong})


@pytest.mark.parametrize(("kind", "name"), [one for one in COUNTS if one[1] not in OF_MODEL])
def test_a_count_that_nothing_holds_is_refused_by_name(kind, name):
    for wrong in (10**30, 10**400, 10**5000, -(10**30), 0.5):
        with pytest.raises(MalmendError, match=name):
            kind(**{name: [wrong] if "tuple" in kind.__annotations__[name] else wrong})


@pytest.mark.parametrize("kind", [kind for kind, name in NUMBERS if name == "clip"])
def test_a_clip_that_leaves_nothing_of_a_gradient_is_refused(kind):
    with pytest.raises(MalmendError, match="clip is 0, expected a number above 0"):
        kind(clip=0)


@pytest.mark.parametrize("kind", [kind for kind, name in COUNTS if name == "layers"])
def test_fewer_layers_than_one_are_refused_before_a_model_is_there(kind):
    for wrong in (0, -1, -(10**30)):
        with pytest.raises(MalmendError, match=r"layers is -?\d+, expected 1 or more"):
            kind(layers=wrong)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Lora, "rank"), (KeSettings, "hidden"), (NetworkSettings, "blocks")],
)
def test_a_size_that_no_memory_has_is_refused(kind, name):
    with pytest.raises(MalmendError, match=rf"{name} is 1000000000, expected \d to 1"):
        kind(**{name: 10**9})


def test_what_is_usual_passes():
    assert RefineSettings(passes=np.int64(2), gain=np.float32(1.5)).passes == 2
    assert Lora(rate=1).rate == 1
    assert Memit(blocks=(0, 1)).blocks == (0, 1)
