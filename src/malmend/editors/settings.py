"""What an editor is: settings, none of which is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from malmend.editors.network import NetworkSettings
from malmend.facts.encoded import Tokens
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range
from malmend.models.descent import Descent
from malmend.models.sites import Linear, Side, Site, find_sites

EditorMethod = Literal["malmen", "mend", "mend-single"]
# Which second moments of keys a prior holds, in the order of their weights.
PRIORS: dict[str, tuple[str, ...]] = {
    "wording": ("text", "asked", "wording"),
    "text": ("text",),
    "identity": (),
}


@dataclass(frozen=True)
class EditorSettings:
    """What an editor is; none of it is learned.

    Attributes:
        method: "malmen" aggregates by ridge regression, "mend" by summing; "mend-single" sums too,
            and is trained on one fact at a time.
        form: "residual" (equation 12) or "published" (equation 11).
        layers: edit a feed-forward layer of this many last blocks, of an encoder-decoder in each
            half; null for six, or all of fewer.
        linear: which of a block's feed-forward layers, "second", "first" or "both".
        side: which half of an encoder-decoder, "encoder", "decoder" or "both".
        sites: name or shell pattern of the layers to edit instead.
        tokens: which tokens are captured, "answer" or "all"; "auto" for a classifier's all, and
            the answer's of any other model.
        end_of_answer: what is trained after the answer: "eos", "newline" or "none".
        end_weight: start of the weight that the end-of-answer tokens have in the least squares, by
            site (14); what teaches a model to stop is alike in all facts, and needs little.
        descent: how value gradients are descended; null captures plain gradients, as published.
        prior: "wording" for general text, questions about others and the wording's spread (13),
            "text" for general text alone, "identity" for lambda I alone, as published.
        eta: start of the learning rate; null searches it (and the prior's weights) on calibration
            facts.
        network: size and start of the network; ``blocks: 0`` for an editor without one.
    """

    method: EditorMethod = "malmen"
    form: Literal["residual", "published"] = "residual"
    layers: int | None = None
    linear: Linear = "second"
    side: Side = "both"
    sites: str | None = None
    tokens: Tokens = "auto"
    end_of_answer: EndOfAnswer = "eos"
    end_weight: float = 0.1
    descent: Descent | None = field(default_factory=Descent)
    prior: Literal["wording", "text", "identity"] = "wording"
    eta: float | None = None
    network: NetworkSettings = field(default_factory=NetworkSettings)

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of the ridge's prior; a sum has none."""
        return PRIORS[self.prior] if self.method == "malmen" else ()

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The layers of a model that these settings edit.

        Raises:
            ModelError: as :func:`malmend.models.sites.find_sites`.
        """
        return find_sites(model, self.layers, self.sites, self.linear, self.side)

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("layers",), 1, prefix="--")
        check_range(self, ("eta",), advice="leave --eta out to search it")
        check_range(self, ("end_weight",), advice="give 1 to weigh every token alike")


def training_free(method: EditorMethod = "malmen") -> EditorSettings:
    """An editor without a network: any model can be edited at once."""
    return EditorSettings(method=method, network=NetworkSettings(blocks=0))


def published(method: Literal["malmen", "mend"] = "malmen") -> EditorSettings:
    """MALMEN A.6, and where it is silent the published code: plain gradients, no end token."""
    return EditorSettings(
        method=method,
        form="published",
        tokens="answer",
        end_of_answer="none",
        descent=None,
        prior="identity",
        eta=1e-6,
        network=NetworkSettings(rank=1920, placement="after", start="normal"),
    )


def published_mend() -> EditorSettings:
    """MEND as published for single edits: section 3 and appendix A; plain gradients, no end token.

    The feed-forward weights of the last three blocks, of a gated block without the gate.
    """
    return EditorSettings(
        method="mend-single",
        form="published",
        layers=3,
        linear="both",
        tokens="all",
        end_of_answer="none",
        descent=None,
        prior="identity",
        eta=1e-4,
        network=NetworkSettings(rank=1920, placement="before", start="xavier"),
    )
