"""Fine-tuning of a low-rank adapter (LoRA) by PEFT: what many would try first.

    W = W_0 + (alpha / rank) B A,   minimise over A, B   mean over facts of -log p(answer | prompt)

by AdamW (decay 0.01), beside every linear layer of every block, as PEFT's "all-linear" does.  The
adapter is then taken off the model and becomes the patch, of its rank.  Not a system of the papers.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.editors.training_facts import batches
from malmend.facts.encoded import collate
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range, check_seed
from malmend.methods.method import Found
from malmend.models.forms import answer_logits, find_stacks
from malmend.models.sites import Site, linear_sites, put_back
from malmend.numerics.losses import answer_nll
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

MOST_RANK = 100_000  # more than any layer has
DECAY = 0.01  # of A and B, as AdamW has it of itself
ADAPTER = "default"  # PEFT's name for an adapter without one


@dataclass(frozen=True)
class Lora:
    """The adapter and how it is trained.

    Attributes:
        rank: of A and B.
        alpha: scale of the adapter, in multiples of 1 / rank.
        rate: AdamW's learning rate.
        epochs: how often each fact is seen.
        batch: facts per step.
        sites: name or shell pattern of the layers; null for every linear layer of every block.
        seed: of A and of the order.
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    rank: int = 8
    alpha: int = 16
    rate: float = 1e-3
    epochs: int = 10
    batch: int = 8
    sites: str | None = None
    seed: int = 0
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("alpha", "epochs", "batch"), 1, prefix="lora.")
        check_range(self, ("rank",), 1, MOST_RANK, "lora.")
        check_range(self, ("rate",), prefix="lora.")
        check_seed(self, "lora.")

    @property
    def name(self) -> Literal["lora"]:
        """As tables and patches call it."""
        return "lora"

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Every linear layer of every block, or those of the pattern."""
        if self.sites is not None:
            return linear_sites(model, self.sites)
        patterns = [f"{stack.prefix}.*" for stack in find_stacks(model)]
        return tuple(site for one in patterns for site in linear_sites(model, one))

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """Every fact ``epochs`` times, through the whole model."""
        model, sites = bench.loaded.model, bench.trunk.sites
        questions = bench.encoder.encode_all(fact.question for fact in facts)
        count = counting(progress, "training the adapter", self.epochs * len(questions))
        losses = []
        with self._adapted(model, sites), torch.enable_grad():
            learned = [one for one in model.parameters() if one.requires_grad]
            optimiser = torch.optim.AdamW(learned, self.rate, weight_decay=DECAY)
            for batch in batches(len(questions), self.batch, self.epochs, self.seed):
                tokens = collate([questions[index] for index in batch])
                labels_A = tokens.labels_A.to(model.device)
                loss = answer_nll(answer_logits(model, tokens), labels_A).sum() / len(batch)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                count(len(batch))
            shifts = _deltas(model, sites)
        return Found(shifts, self.rank, {"losses": losses})

    @contextmanager
    def _adapted(self, model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[None]:
        """The adapter beside the layers inside the block, the model itself afterwards."""
        from peft import LoraConfig, get_peft_model  # takes seconds, which only this method owes

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[site.name for site in sites],
            fan_in_fan_out=any(site.is_transposed for site in sites),
        )
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        inside = [(module, dict(module._modules)) for module in model.modules()]
        own = set(vars(model))

        def back() -> None:
            for module, kept in inside:
                module._modules.update(kept)
            for name in set(vars(model)) - own:
                delattr(model, name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

        # All that PEFT puts in is taken out here: stopped half-way it hands out no adapter.
        with put_back(back):
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # PEFT asks transformers by an old name.
                warnings.simplefilter("ignore", FutureWarning)
                # No accelerator's: it begins on the CPU.
                torch.default_generator.manual_seed(self.seed)
                get_peft_model(model, config)
            yield


def _deltas(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """What the adapter adds to each layer, V x K, float64."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)
    }
    deltas = {}
    for site in sites:
        layer = layers[site.name]
        # In float64 from the factors, so that the shift's rank is theirs.
        left_VR = layer.lora_B[ADAPTER].weight.detach().cpu().double()
        right_RK = layer.lora_A[ADAPTER].weight.detach().cpu().double()
        deltas[site.name] = layer.scaling[ADAPTER] * left_VR @ right_RK
    return deltas
