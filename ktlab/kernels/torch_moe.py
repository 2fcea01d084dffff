"""Experts with torch: tokens sorted by expert, one product per expert, on float32 copies.

T tokens, D hidden, E experts, K selected, F expert width.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.kernels.int4 import Values, product
from ktlab.quantization.qtensor import QTensor


def float_tensor(weight: QTensor) -> Tensor:
    """The weight as float32. A copy where it would be a view of a read-only file, which torch
    takes for writable."""
    return torch.from_numpy(np.require(weight.dequantize(), requirements="W"))


Experts = Mapping[int, tuple[Values, Values, Values]]
"""Expert to gate (F, D), up (F, D) and down (D, F)."""


def moe(
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D) float32; id -1 is nobody."""
    chosen = set(ids_TK.flatten().tolist()) - {-1}
    experts = {e: (gate_EFD[e], up_EFD[e], down_EDF[e]) for e in chosen}
    return some_experts(experts, hidden_TD, ids_TK, weights_TK)


def some_experts(
    experts: Experts,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    take: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """`moe` with the experts that are there, in their number format, where `hidden_TD` is; ids and
    weights are on the host, and `take` brings a host tensor to where `hidden_TD` is. Every id must
    be an expert or -1."""
    tokens, top_k = ids_TK.shape
    flat_ids = ids_TK.reshape(-1)
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids + 1, minlength=1).tolist()
    weight_of_row = take(weights_TK.reshape(-1)[order])
    rows_PD = hidden_TD.index_select(0, take(order // top_k))
    output_PD = torch.zeros_like(rows_PD)  # rows of id -1 stay zero
    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if not count:
            continue
        gate_FD, up_FD, down_DF = experts[expert]
        rows = slice(start, start + count)
        rows_nD = rows_PD[rows].to(gate_FD.dtype)
        inner = F.silu(product(rows_nD, gate_FD))
        inner.mul_(product(rows_nD, up_FD))
        # The routing weight goes on the narrow side of `down`, which is linear.
        inner.mul_(weight_of_row[rows, None])
        if isinstance(down_DF, Tensor) and inner.dtype == output_PD.dtype:
            torch.mm(inner, down_DF.T, out=output_PD[rows])
        else:
            output_PD[rows] = product(inner, down_DF).to(output_PD.dtype)
        start += count
    # Back to token order by gathering, which adds in the same order on every run.
    return (
        output_PD.index_select(0, take(order.argsort()))
        .view(tokens, top_k, hidden_TD.shape[1])
        .sum(1)
    )
