"""Fine-tuning: epochs against Adam written out (the command: tests/test_finetune_command.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import forms_support as forms
import tiny
from malmend.errors import MalmendError
from malmend.models import finetune as training
from malmend.models.finetune import Finetuner, FinetuneSettings, share_right

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
}


def tiny_model(family: str, **changes):
    if family == "llama":
        return tiny.model_of("llama"), tiny.questions(7)
    return forms.model_of(family, **changes), forms.questions(family, 7)


def logits_alone(family: str, model, question, weights):
    if family != "llama":
        return forms.logits_alone(model, [question], weights)
    inputs = {"input_ids": torch.tensor([question.ids]), "use_cache": False}
    logits = torch.func.functional_call(model, weights, (), inputs).logits[0]
    return logits[question.answer_start - 1 : len(question.ids) - 1]


def summed_nll(family, model, batch, weights):
    losses = []
    for question in batch:
        labels = torch.tensor(question.ids[question.answer_start :])
        logits = logits_alone(family, model, question, weights)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama"])
def test_epochs_are_a_plain_adam_loop(family, monkeypatch):
    changes = NO_DROPOUT.get(family, {})
    model, asked = tiny_model(family, **changes)
    reference, _ = tiny_model(family, **changes)
    batches = []
    collate = training.collate

    def kept(questions):
        if torch.is_grad_enabled():
            batches.append(list(questions))
        return collate(questions)

    monkeypatch.setattr(training, "collate", kept)
    settings = FinetuneSettings(rate=1e-2, batch=3)
    trainer = Finetuner(model, asked, asked[:4], settings, "all")
    records = [trainer.take_epoch() for _ in range(2)]
    assert [len(batch) for batch in batches].count(3) == 4
    assert batches[:3] != batches[3:]  # another order in another epoch
    for epoch in (batches[:3], batches[3:]):
        assert sorted(q.ids for batch in epoch for q in batch) == sorted(q.ids for q in asked)

    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    totals = []
    for step, batch in enumerate(batches, 1):
        here = {name: p.clone().requires_grad_() for name, p in weights.items()}
        loss = summed_nll(family, reference, batch, here)
        totals.append(loss.item())
        names, leaves = zip(*here.items(), strict=True)
        grads = torch.autograd.grad(loss / len(batch), leaves, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is None:
                continue
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            weights[name] = weights[name] - 1e-2 * mean / (square.sqrt() + 1e-8)
    for name, parameter in model.named_parameters():
        assert (parameter - weights[name]).abs().max() < 1e-8, name
    moved = [(weights[n] - p).abs().max() > 1e-3 for n, p in reference.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    assert not model.training
    assert [record.epoch for record in records] == [1, 2]
    assert records[0].loss == pytest.approx(sum(totals[:3]) / 7, rel=1e-9)
    assert records[1].loss == pytest.approx(sum(totals[3:]) / 7, rel=1e-9)
    right = 0
    for question in asked[:4]:
        labels = list(question.ids[question.answer_start :])
        logits = logits_alone(family, reference, question, weights)
        right += logits.argmax(-1).tolist() == labels
    assert records[1].accuracy == right / 4


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_dropout_is_the_models_own_and_depends_on_seed_and_epoch_alone(family):
    def losses(seed: int, stir: int, count: int = 7, **changes) -> list[float]:
        model, asked = tiny_model(family, **changes)
        asked = asked[:count]
        settings = FinetuneSettings(rate=1e-12, batch=16, seed=seed)
        trainer = Finetuner(model, asked, asked, settings, "all")
        torch.manual_seed(stir)
        before = torch.get_rng_state()
        found = [trainer.take_epoch().loss for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)  # the caller's draws stay as they were
        return found

    known = losses(0, stir=1)
    assert losses(0, stir=2) == known
    assert known[0] != pytest.approx(known[1], rel=1e-6)
    assert losses(1, stir=1) != pytest.approx(known, rel=1e-6)
    alone = losses(0, stir=1, count=1)  # where there is no order that a seed could change
    assert losses(1, stir=1, count=1) != pytest.approx(alone, rel=1e-6)
    plain = losses(0, stir=1, **NO_DROPOUT[family])
    assert plain[0] == pytest.approx(plain[1], rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama"])
def test_share_right_counts_whole_answers(family, monkeypatch):
    model, asked = tiny_model(family)
    found = []
    for index, question in enumerate(asked):
        for at in range(
            question.answer_start, len(question.ids)
        ):  # what the model itself would say
            top = logits_alone(family, model, question, {}).argmax(-1).tolist()
            label = top[at - question.answer_start]
            # Every third answer is wrong in its last label alone, its end where it has one.
            label += (1 - 2 * (label > 1)) * (index % 3 == 0 and at == len(question.ids) - 1)
            ids = (*question.ids[:at], label, *question.ids[at + 1 :])
            question = replace(question, ids=ids)
        found.append(question)
    assert share_right(model, found) == 4 / 7
    monkeypatch.setattr(training, "TOGETHER", 2)
    assert share_right(model, found) == 4 / 7


def test_a_fine_tuning_that_diverges_says_so():
    model, asked = tiny_model("bert")
    trainer = Finetuner(model, asked, asked, FinetuneSettings(batch=2), "all")
    trainer.optimiser.param_groups[0]["lr"] = 1e300
    with pytest.raises(MalmendError, match=r"diverged in epoch 1 \(the loss is .*lower --rate"):
        trainer.take_epoch()
