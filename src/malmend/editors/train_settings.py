"""How an editor is trained."""

from __future__ import annotations

from dataclasses import dataclass

from malmend.errors import MalmendError
from malmend.given import check_fields, check_range, check_seed


@dataclass(frozen=True)
class TrainSettings:
    """How an editor is trained.

    Attributes:
        facts_per_step: m, the facts edited at once in each step.
        halvings: each step halves m so many times or fewer, drawn evenly: an editor that has seen
            one m only fits no other.
        steps: optimiser steps.
        locality_weight: of the KL on unrelated questions in the meta-loss.
        near: share of the unrelated questions that are the fact's neighbours, where it has both.
        network_rate: Adam's learning rate for the network.
        scalar_rate: Adam's learning rate for log eta, log lambda, the logarithms of the prior's
            and of the end tokens' weights, and the powers of N.
        clip: largest norm of the meta-gradient.
        chunk: tokens that pass through the network at once.
        seed: of the network's start, the order of the facts and the questions drawn.
        save_every: steps between checkpoints.
    """

    facts_per_step: int = 512
    halvings: int = 0
    steps: int = 80
    locality_weight: float = 1.0
    near: float = 0.5
    network_rate: float = 1e-3
    scalar_rate: float = 0.03
    clip: float = 1.0
    chunk: int = 1024
    seed: int = 0
    save_every: int = 5

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("facts_per_step", "steps", "chunk", "save_every"), 1, prefix="--")
        rates = ("network_rate", "scalar_rate")
        check_range(self, ("locality_weight", *rates), 0.0, prefix="--")
        check_range(self, ("clip",), prefix="--")  # 0 would leave nothing of any gradient
        check_range(self, ("halvings",), 0, prefix="--")
        if not self.facts_per_step >> self.halvings:
            raise MalmendError(
                f"halvings is {self.halvings}, expected a number from 0 that leaves a fact of the "
                f"{self.facts_per_step} of a step; change --halvings."
            )
        check_seed(self, "--")
        check_range(self, ("near",), 0.0, 1.0, prefix="--")


def published_training() -> TrainSettings:
    """MALMEN A.6: one Adam at 1e-5 for everything, locality 1, clipped at 1."""
    return TrainSettings(near=0.0, network_rate=1e-5, scalar_rate=1e-5)


def published_mend_training() -> TrainSettings:
    """MEND, section 3.2 and appendix: gradients of ten facts, each edited alone, make a step.

    Its loss 0.1 L_e + L_loc is L_e + 10 L_loc here, which is the same to Adam.
    """
    return TrainSettings(
        facts_per_step=10, near=0.0, locality_weight=10.0, network_rate=1e-6, scalar_rate=1e-4
    )
