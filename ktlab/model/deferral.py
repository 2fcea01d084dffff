"""Expert deferral: the lightest experts of each token join the residual stream one layer later.

With n deferred in layer i, where x is what the experts of a layer see and h what attention left:

    out_i = h_i + shared_i(x_i) + heavy_i(x_i) + light_{i-1}(x_{i-1})

`light` are a token's n experts of least weight, `heavy` the others. The next layer's attention does
not need what is still being computed, so a CPU can compute it meanwhile; the model is changed by
that, a little. The last layer with experts defers nothing. Source: KTransformers (SOSP 2025,
"Expert Deferral"); which experts are the light ones as in kt-kernel's `select_deferred_experts`.

B batch, T tokens, D hidden, K selected.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ktlab.kernels.seat import Seat


def split(ids_TK: Tensor, weights_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids to compute at once and ids to defer, (T, K) each, -1 where the other one has the expert.

    Of the experts that a token selected (id not -1) the `count` lightest are deferred, all where
    there are fewer; of equally light ones the later choice.
    """
    nobody_TK = ids_TK < 0
    worth_TK = weights_TK.masked_fill(nobody_TK, torch.inf).flip(-1)
    lightest_TN = worth_TK.argsort(dim=-1, stable=True)[:, :count]
    light_TK = torch.zeros_like(nobody_TK).scatter_(-1, lightest_TN, True).flip(-1)
    return ids_TK.masked_fill(light_TK, -1), ids_TK.masked_fill(~light_TK, -1)


class Later:
    """What a layer leaves for the next one, during one pass."""

    def __init__(self) -> None:
        self._work: Callable[[Seat], Tensor] | None = None

    def leave(self, work: Callable[[Seat], Tensor]) -> None:
        """`work(seat)` gives there what is to be added at the end of the next layer, (T, D)."""
        assert self._work is None, "what was left before has been taken by now"
        self._work = work

    def take(self) -> Callable[[Seat], Tensor] | None:
        """What the layer before left; it is gone then."""
        work, self._work = self._work, None
        return work
