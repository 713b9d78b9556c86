"""One training step as MALMEN published it, to be compared with: nothing kept, nothing left out.

The whole model runs in every pass, on padded micro-batches, and gives logits at every position.
What is captured goes into a file per site and micro-batch, which is written once and read twice.
The same matrix is factorised twice, by LU.  Loss, network and numbers are those of malmend's own
step, so that the gradients must be equal.

Shape letters: B questions, T positions, N captured tokens, A answer tokens, K key width, V value
width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.editors.editor import Editor, chunks
from malmend.editors.pseudo import value_diffs
from malmend.facts.encoded import Encoded, TokenBatch, collate
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.capture import Captured
from malmend.models.load import LoadedModel
from malmend.models.sites import Site
from malmend.numerics.losses import answer_nll, kl_per_token


class Straightforward:
    """Algorithms 1 and 2 by their letter.

    Args:
        editor: in the published form; gradients are added to it.
        loaded: the model; its weights are as before when a step has ended.
        sites: the layers that the editor edits.
        encoder: of the questions.
        folder: for captured tensors.
        batch: questions in a micro-batch.
        chunk: tokens that pass through the network at once.
    """

    def __init__(
        self,
        editor: Editor,
        loaded: LoadedModel,
        sites: Sequence[Site],
        encoder: Encoder,
        folder: Path,
        batch: int = 32,
        chunk: int = 1024,
    ):
        self.editor, self.model, self.sites, self.encoder = editor, loaded.model, sites, encoder
        self.folder, self.batch, self.chunk = folder, batch, chunk

    def step(self, facts: Sequence[Fact], asked: Sequence[tuple[Question, Question]]) -> None:
        """One step of facts, each with an equivalent and an unrelated question."""
        edits = self.encoder.encode_all(fact.question for fact in facts)
        self.cache(edits)
        before = [self.reference(group) for group in self.groups([pair[1] for pair in asked])]
        shifts = [self.solved(site) for site in range(len(self.sites))]
        plain = [site.weight.detach().clone() for site in self.sites]
        for site, shift_VK in zip(self.sites, shifts, strict=True):
            site.weight.data += site.oriented(shift_VK)
        grads = self.judged(asked, before)
        for site, weight in zip(self.sites, plain, strict=True):
            site.weight.data.copy_(weight)
        for site, grad_VK in enumerate(grads):
            self.learned(site, shifts[site], grad_VK)

    def groups(self, questions: Sequence[Question]) -> list[TokenBatch]:
        """Micro-batches in the order given."""
        encoded: list[Encoded] = self.encoder.encode_all(questions)
        return [collate(encoded[rows]) for rows in chunks(len(encoded), self.batch)]

    def logits(self, group: TokenBatch) -> Tensor:
        """Of the whole model at every position, then those of the answers, A x W."""
        return answered(self.model, group)

    def cache(self, edits: Sequence[Encoded]) -> None:
        """Keys and value gradients of the edits, into files."""
        for part, rows in enumerate(chunks(len(edits), self.batch)):
            group = collate(edits[rows])
            seen: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}

            def keep(name: str, seen: dict[str, list[Tensor]] = seen):
                def hook(_module: object, args: tuple[Tensor], output: Tensor) -> Tensor:
                    output = output.requires_grad_(True) if not output.requires_grad else output
                    output.retain_grad()
                    seen[name] += [args[0].detach(), output]
                    return output

                return hook

            handles = [s.module.register_forward_hook(keep(s.name)) for s in self.sites]
            try:
                answer_nll(self.logits(group), group.labels_A).sum().backward()
            finally:
                for handle in handles:
                    handle.remove()
            for index, site in enumerate(self.sites):
                keys, output = seen[site.name]
                assert output.grad is not None
                pair = [one.flatten(0, 1)[group.flat_sources_A] for one in (keys, output.grad)]
                torch.save([one.clone() for one in pair], self.file(index, part))

    def file(self, site: int, part: int) -> Path:
        """Where one micro-batch of one site lies."""
        return self.folder / f"{site}-{part:04d}.pt"

    def pair(self, site: int) -> Captured:
        """All of a site's files."""
        parts = [torch.load(path) for path in sorted(self.folder.glob(f"{site}-*.pt"))]
        return Captured(torch.cat([u for u, _ in parts]), torch.cat([g for _, g in parts]))

    def normal(self, keys_NK: Tensor, site: int) -> Tensor:
        """U U^T + lambda I, in float64: in float32 the two gradients are 3e-3 apart by rounding."""
        wide_NK, ridge = keys_NK.double(), self.editor.log_ridge_S[site].detach().double().exp()
        return wide_NK.T @ wide_NK + ridge * torch.eye(keys_NK.shape[1], dtype=torch.float64)

    @torch.no_grad()
    def solved(self, site: int) -> Tensor:
        """The shift of a site, V x K."""
        pair = self.pair(site)
        diffs = [
            value_diffs(pair.keys_NK[rows], self.editor.pseudo(site, pair.rows(rows)))
            for rows in chunks(len(pair.keys_NK), self.chunk)
        ]
        gram_KK = self.normal(pair.keys_NK, site)
        asked_KV = pair.keys_NK.double().T @ torch.cat(diffs).double()
        return torch.linalg.solve(gram_KK, asked_KV).T.float()

    @torch.no_grad()
    def reference(self, group: TokenBatch) -> Tensor:
        """The unedited model's logits."""
        return self.logits(group)

    def judged(
        self, asked: Sequence[tuple[Question, Question]], before: Sequence[Tensor]
    ) -> list[Tensor]:
        """G of every site, by the weights' own gradients."""
        for site in self.sites:
            site.weight.requires_grad_(True)
        for group in self.groups([pair[0] for pair in asked]):
            (answer_nll(self.logits(group), group.labels_A).sum() / len(asked)).backward()
        for group, known_AW in zip(self.groups([pair[1] for pair in asked]), before, strict=True):
            (kl_per_token(known_AW, self.logits(group)).sum() / len(asked)).backward()
        grads = []
        for site in self.sites:
            assert site.weight.grad is not None
            grads.append(site.oriented(site.weight.grad).clone())
            site.weight.grad = None
            site.weight.requires_grad_(False)
        return grads

    def learned(self, site: int, shift_VK: Tensor, grad_VK: Tensor) -> None:
        """Theorems 1 and 2, the matrix factorised again."""
        pair = self.pair(site)
        gram_KK = self.normal(pair.keys_NK, site)
        adjoint_VK = torch.linalg.solve(gram_KK, grad_VK.double().T).T
        by_ridge = -(adjoint_VK * shift_VK).sum() * self.editor.log_ridge_S[site].exp().detach()
        ridge = self.editor.log_ridge_S
        ridge.grad = torch.zeros_like(ridge) if ridge.grad is None else ridge.grad
        ridge.grad[site] += by_ridge
        for rows in chunks(len(pair.keys_NK), self.chunk):
            chunk = pair.rows(rows)
            diffs_NV = value_diffs(chunk.keys_NK, self.editor.pseudo(site, chunk))
            # In float64, as the matrix: M u is small beside M and u, which nearly cancel.
            ((chunk.keys_NK.double() @ adjoint_VK.T) * diffs_NV).sum().backward()


def answered(model: PreTrainedModel, group: TokenBatch) -> Tensor:
    """Logits of the whole model at every position, then those of the answers, A x W."""
    out = model(input_ids=group.ids_BT, attention_mask=group.mask_BT, use_cache=False)
    return out.logits.flatten(0, 1)[group.flat_sources_A]
