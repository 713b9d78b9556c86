"""Shifts cut to a rank that serving engines accept, in the metric of the keys.

    C = C_text + C_facts + floor * mean(diag) * I                                              (S4)

C_text is the mean of k k^T over general text, C_facts the same over the answer tokens of the edit
prompts, where facts are given: the text says where a cut must not be felt, the facts where the
shift is needed.  The floor lets plain distance decide where neither has a key.

Shape letters: K key width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.keymoments import asked_moment, passages_of, text_moment
from malmend.errors import MalmendError, ModelError
from malmend.facts.fact import Fact
from malmend.models.blocks import check_runs, run_matrices
from malmend.models.forms import find_stacks
from malmend.models.sites import stack_of
from malmend.numerics.truncation import Spectrum, truncated
from malmend.progress import Progress, silent
from malmend.workbench import Workbench

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
FLOOR = 1e-6


def check_rank(rank: int) -> None:
    """Raises MalmendError for a rank that vLLM does not take."""
    if rank not in VLLM_RANKS:
        close = min(VLLM_RANKS, key=lambda one: abs(one - rank))
        raise MalmendError(
            f"--rank is {rank}, expected one that vLLM accepts ({', '.join(map(str, VLLM_RANKS))}; "
            f"the nearest is {close}); or leave it out, and nothing is cut off."
        )


def served_rank(rank: int) -> int | None:
    """The ``--max-lora-rank`` that vLLM needs for an adapter; None where it takes none so large."""
    return next((one for one in VLLM_RANKS if one >= rank), None)


def key_metric(
    bench: Workbench, text: str, facts: Sequence[Fact] = (), progress: Progress = silent
) -> dict[str, Tensor]:
    """Equation (S4) of every site by its name, K x K, float64.

    Args:
        bench: the unedited model, cut at the patch's sites.
        text: general text, a passage per line.
        facts: whose edit prompts and answers count too; paraphrases are for measuring only.
        progress: called with stage and share done.

    Raises:
        MalmendError: a layer does not see every token once, so that its keys are not known.
    """
    _check_sees_all(bench)
    passages = passages_of(bench.encoder, text)
    moments = text_moment(bench.trunk, passages, CalibrationSettings().text_tokens, progress)
    if facts:
        questions = bench.encoder.encode_all(fact.question for fact in facts)
        asked = asked_moment(bench.trunk, questions)
        moments = [one + other for one, other in zip(moments, asked, strict=True)]
    return {
        site.name: moment_KK
        + FLOOR * moment_KK.diagonal().mean() * torch.eye(len(moment_KK), dtype=torch.float64)
        for site, moment_KK in zip(bench.trunk.sites, moments, strict=True)
    }


def _check_sees_all(bench: Workbench) -> None:
    model = bench.loaded.model
    runs = run_matrices(model, find_stacks(model))
    for site in bench.trunk.sites:
        try:
            check_runs(model, site.name, stack_of(model, site.name), runs)
        except ModelError as error:
            raise MalmendError(
                f"{site.name} does not see every token once (it may be an expert of a mixture), so "
                "that there are no keys to cut its shift by; leave --rank out, or merge."
            ) from error


def cut(
    spectra: Mapping[str, Spectrum], metric: Mapping[str, Tensor], rank: int
) -> dict[str, Spectrum]:
    """Every shift at the rank, or less, by equation (S2)."""
    return {name: truncated(one, metric[name], rank) for name, one in spectra.items()}
