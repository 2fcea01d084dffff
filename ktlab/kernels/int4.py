"""Matrices of 4 bits on a torch device: kept as codes and scales, made 16-bit for each product.

For room, not for speed: torch has fast 4-bit products of its own, each for one kind of device and
with a packing of its own; these few operations are the same on any. The values are those of the
format int4_group128 (or int4_group32, where rows do not divide), rounded to 16 bits.
N rows, K columns, G groups of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ktlab.quantization import QTensor

ZERO = 8
GROUPED = ("int4_group128", "int4_group32")


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4:
    """x ~ scale * (code - 8): codes (N, G, group / 2), two a byte, scales (N, G, 1) float16."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    """What it is multiplied as."""

    @property
    def nbytes(self) -> int:
        """Codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """(N, K) of `dtype`; gone again after the product."""
        low, high = self.codes & 15, self.codes >> 4
        centred = torch.cat((low, high), dim=-1).to(torch.float16) - ZERO
        return (centred * self.scales).to(self.dtype).flatten(-2)


Values = Tensor | Int4


def dense(values: Values) -> Tensor:
    """What a product takes."""
    return values.dense() if isinstance(values, Int4) else values


def parts(tensor: QTensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor in one of `GROUPED`, on the host."""
    group = tensor.format.block_size
    blocks = torch.from_numpy(tensor.blocks.copy()).unflatten(-1, (-1, 2 + group // 2))
    scales = blocks[..., :2].contiguous().view(torch.float16)
    return blocks[..., 2:].contiguous(), scales
