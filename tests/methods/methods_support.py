"""A tiny float64 model on a bench with facts, for the tests of methods.

bench_of("llama")   nn.Linear, gated feed-forward
bench_of("gpt2")    Conv1D, weights stored K x V
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import helpers
from command_support import make_facts
from malmend.facts.encoded import Encoded
from malmend.methods.method import Method
from malmend.models.load import prepared
from malmend.models.trunk import Trunk
from malmend.workbench import Workbench, encoder_for

BUILD = {"llama": helpers.tiny_llama, "gpt2": helpers.tiny_gpt2}
FACTS = make_facts(5, seed=7)


def bench_of(family: str, method: Method) -> Workbench:
    """The model's own sites for the method; nothing is kept on disk."""
    tokenizer = helpers.byte_level()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = BUILD[family](len(tokenizer), 0, initializer_range=0.2, **ends).requires_grad_(False)
    loaded = prepared(model, tokenizer, family)
    trunk = Trunk(model, method.sites_in(model))
    return Workbench(loaded, trunk, encoder_for(loaded, method.end_of_answer))


def encoded(bench: Workbench) -> list[Encoded]:
    return bench.encoder.encode_all(fact.question for fact in FACTS)


def answer_log_probs(model: PreTrainedModel, question: Encoded) -> Tensor:
    """log p at every label, A x W, through the model's own forward, unpadded."""
    logits = model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0]
    return logits[list(question.sources)].log_softmax(-1)


def nll(model: PreTrainedModel, questions: Sequence[Encoded]) -> Tensor:
    """Mean over questions of the summed negative log-likelihood of the labels."""
    losses = [
        -answer_log_probs(model, one).gather(1, torch.tensor(one.labels)[:, None]).sum()
        for one in questions
    ]
    return torch.stack(losses).mean()


def with_shifts(bench: Workbench, shifts: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of the model with W + S written into its weights."""
    model = copy.deepcopy(bench.loaded.model)
    modules = dict(model.named_modules())
    for site in bench.trunk.sites:
        modules[site.name].weight.data += site.oriented(shifts[site.name])
    return model


def bytes_of(model: PreTrainedModel) -> dict[str, bytes]:
    return {
        name: one.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, one in model.state_dict().items()
    }
