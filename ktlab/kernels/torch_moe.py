"""Experts with torch: tokens sorted by expert, one product per expert, on float32 copies.

T tokens, D hidden, E experts, K selected, F expert width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.quantization.qtensor import QTensor


def float_tensor(weight: QTensor) -> Tensor:
    """The weight as float32. A copy where it would be a view of a read-only file, which torch
    takes for writable."""
    return torch.from_numpy(np.require(weight.dequantize(), requirements="W"))


def moe(
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D) float32; id -1 is nobody."""
    tokens, top_k = ids_TK.shape
    experts = down_EDF.shape[0]
    flat_ids = ids_TK.reshape(-1)
    order = flat_ids.argsort(stable=True)
    token_of_row = order // top_k
    weight_of_row = weights_TK.reshape(-1)[order]
    counts = torch.bincount(flat_ids + 1, minlength=experts + 1).tolist()

    rows_PD = hidden_TD.index_select(0, token_of_row)
    output_PD = torch.zeros_like(rows_PD)  # rows of id -1 stay zero
    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if not count:
            continue
        rows = slice(start, start + count)
        inner = F.silu(F.linear(rows_PD[rows], gate_EFD[expert]))
        inner.mul_(F.linear(rows_PD[rows], up_EFD[expert]))
        # The routing weight goes on the narrow side of `down`, which is linear.
        inner.mul_(weight_of_row[rows, None])
        torch.mm(inner, down_EDF[expert].T, out=output_PD[rows])
        start += count
    # Back to token order by gathering, which adds in the same order on every run.
    return output_PD.index_select(0, order.argsort()).view(tokens, top_k, -1).sum(1)
