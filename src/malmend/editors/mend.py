"""MEND for many edits: the shifts of all tokens, summed (Mitchell et al., ICLR 2022).

    S = sum over j of S_j = -sum over j of g~_j u~_j^T                              (10)

with the editor's pseudo key and pseudo gradient (eta inside g~_j).  Backwards, with G = dL/dS, the
editor is reached through the proxy <G, S>, chunk by chunk.  There is no prior.  What each token
asks of its value (9) is kept too, to say how far the sum misses it (MALMEN, section 5.2).

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malmend.editors.pseudo import Pseudo, Received, value_diffs
from malmend.numerics.prior import Prior, PriorGrads
from malmend.numerics.ridge import Summed


class Mend:
    """One site's aggregation; the same calls as :class:`malmend.editors.malmen.Malmen`."""

    def __init__(
        self,
        keys_NK: Tensor,
        diffs_NV: Tensor,
        prior: Prior,
        weights_N: Tensor | None = None,
        summed: Summed | None = None,
    ):
        del weights_N  # a sum has none, nor a prior
        self.summed = summed
        self.keys_NK, self.diffs_NV = keys_NK, diffs_NV
        shape = diffs_NV.shape[1], keys_NK.shape[1]
        self._shift_VK = torch.zeros(shape, dtype=torch.float64, device=prior.device)
        self._shift_grad_VK: Tensor | None = None

    def add(self, rows: slice, pseudo: Pseudo) -> None:
        """Takes the editor's output for a chunk of tokens."""
        self.diffs_NV[rows] = value_diffs(self.keys_NK[rows], pseudo)
        self._shift_VK -= pseudo.grads_NV.double().T @ pseudo.keys_NK.double()

    def shift(self) -> Tensor:
        """S in float64, V x K."""
        whole_VK = self._shift_VK if self.summed is None else self.summed(self._shift_VK)
        return whole_VK.to(self.keys_NK.device)

    def receive(self, shift_grad_VK: Tensor) -> Received:
        """Takes G = dL/dS; a sum has neither a prior nor weights, so nothing else depends on it."""
        self._shift_grad_VK = shift_grad_VK
        return Received(PriorGrads((), 0.0), None)

    def proxy(self, rows: slice, pseudo: Pseudo) -> Tensor:
        """A scalar whose gradient is the meta-gradient of this chunk of tokens."""
        del rows
        assert self._shift_grad_VK is not None, "receive comes first"
        grad_VK = self._shift_grad_VK.to(pseudo.grads_NV)
        return -((pseudo.grads_NV @ grad_VK) * pseudo.keys_NK).sum()
