"""MALMEN: value differences of all tokens, aggregated by ridge regression (Tan et al., ICLR 2024).

With pseudo key u~_j and pseudo gradient g~_j from the editor, token j asks for the shift
S_j = -g~_j u~_j^T (eta is inside g~_j), hence for the value difference

    d_j = S_j u_j = -(u~_j^T u_j) g~_j                                   (9; MALMEN A.2)

and the site's shift is the ridge solution S of equation (1), each row j of weight w_j:

    minimise over S    sum over j of w_j |S u_j - d_j|^2 + tr(S P S^T)                     (14)

which is (1) on the rows sqrt(w_j) u_j and sqrt(w_j) d_j.  Backwards the editor is reached through
the proxy sum over j of <dL/dd_j, d_j> (Algorithm 2).

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from torch import Tensor

from malmend.editors.pseudo import Pseudo, Received, value_diffs
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor, Summed


class Malmen:
    """One site's aggregation: add all chunks, take the shift, then (in training) go back.

    Args:
        keys_NK: keys of all tokens, from the unedited model.
        diffs_NV: room for what the tokens ask, which :meth:`add` fills.
        prior: of the ridge.
        weights_N: w_j > 0 of equation (14), float64; None for ones, as published.
        summed: the sum of a tensor over the processes that the tokens are spread over.
    """

    def __init__(
        self,
        keys_NK: Tensor,
        diffs_NV: Tensor,
        prior: Prior,
        weights_N: Tensor | None = None,
        summed: Summed | None = None,
    ):
        self.keys_NK, self.diffs_NV, self.prior = keys_NK, diffs_NV, prior
        self._weights_N, self._summed = weights_N, summed
        self._factor: RidgeFactor | None = None
        self._shift_VK: Tensor | None = None
        self._diff_grads_NV: Tensor | None = None

    @property
    def factor(self) -> RidgeFactor:
        """Made on first use; the edit and the meta-gradient share it."""
        if self._factor is None:
            self._factor = RidgeFactor(self.keys_NK, self.prior, self._weights_N, self._summed)
        return self._factor

    def add(self, rows: slice, pseudo: Pseudo) -> None:
        """Takes the editor's output for a chunk of tokens."""
        self.diffs_NV[rows] = value_diffs(self.keys_NK[rows], pseudo)

    def shift(self) -> Tensor:
        """S in float64, V x K."""
        if self._shift_VK is None:
            self._shift_VK = self.factor.shift(self.diffs_NV)
        return self._shift_VK

    def receive(self, shift_grad_VK: Tensor) -> Received:
        """Takes G = dL/dS and returns the derivatives of the prior and of the rows' weights."""
        found = self.factor.backward(shift_grad_VK, self.diffs_NV, self.shift())
        self._diff_grads_NV = found.diffs_NV
        return Received(found.prior, found.weights_N)

    def proxy(self, rows: slice, pseudo: Pseudo) -> Tensor:
        """A scalar whose gradient is the meta-gradient of this chunk of tokens."""
        assert self._diff_grads_NV is not None, "receive comes first"
        diffs_NV = value_diffs(self.keys_NK[rows], pseudo)
        return (self._diff_grads_NV[rows].to(diffs_NV) * diffs_NV).sum()
