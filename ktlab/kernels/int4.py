"""Matrices of 4 bits on a torch device, with the values of the format int4_group128 (or
int4_group32, where rows do not divide).

torch has products of 4 bits, packed for one kind of device each (ATen, `_weight_int4pack_mm`): they
read a quarter of what 16 bits read. One is used where it passes a check on the device itself;
anywhere else codes and scales are kept as they are, and made 16-bit for each product.
N rows, K columns, G groups of a row, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.quantization import QTensor

ZERO = 8
GROUPED = ("int4_group128", "int4_group32")

Keep = Callable[[Tensor], Tensor]
"""Takes note of a tensor that stays on a device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4:
    """x ~ scale * (code - 8): codes (N, G, group / 2), two a byte, scales (N, G, 1) float16."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    """What it is multiplied as."""

    @property
    def rows(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """(N, K) of `dtype`."""
        centred = _columns(self.codes).to(torch.float16) - ZERO
        return (centred * self.scales).to(self.dtype).flatten(-2)

    def product(self, x_TK: Tensor) -> Tensor:
        """(T, N); the 16-bit copy is gone again afterwards."""
        return F.linear(x_TK, self.dense())


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedInt4:
    """The same for torch's product: its packing; scales (G, N, 2) of `dtype`, each with a zero."""

    codes: Tensor
    scales: Tensor
    group: int
    columns: int

    @property
    def dtype(self) -> torch.dtype:
        """What activations are, and results."""
        return self.scales.dtype

    @property
    def rows(self) -> int:
        """N."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """(N, K) of `dtype`: the product with one column after the other, for who looks at it."""
        one = torch.eye(self.columns, dtype=self.dtype, device=self.codes.device)
        return self.product(one.as_subclass(type(self.codes))).T

    def product(self, x_TK: Tensor) -> Tensor:
        """(T, N); sums are float32."""
        multiply = torch._weight_int4pack_mm
        if self.codes.device.type == "cpu":
            multiply = torch._weight_int4pack_mm_for_cpu
        return multiply(x_TK, self.codes, self.group, self.scales)


Values = Tensor | Int4 | PackedInt4


def dense(values: Values) -> Tensor:
    """(N, K), or with leading axes, in 16 bits or more."""
    return values if isinstance(values, Tensor) else values.dense()


def product(x: Tensor, values: Values) -> Tensor:
    """x W^T in the number format of `values`; x (..., K) of it, on the same device."""
    if isinstance(values, Tensor):
        return F.linear(x, values)
    if not x.numel():  # torch's kernels want a token
        return x.new_empty(*x.shape[:-1], values.rows)
    return values.product(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


def on_device(tensor: QTensor, device: torch.device, dtype: torch.dtype, keep: Keep) -> Values:
    """A tensor in one of `GROUPED`, as the device multiplies it."""
    codes, scales = _parts(tensor)
    if reason(device, dtype, tensor.format.block_size) or _refused(device, tensor.shape):
        codes, scales = keep(codes.to(device, copy=True)), keep(scales.to(device, copy=True))
        return Int4(codes=codes, scales=scales, dtype=dtype)
    made = _packed(codes, scales, device, dtype)
    return PackedInt4(
        codes=keep(made.codes), scales=keep(made.scales), group=made.group, columns=made.columns
    )


def nbytes(shape: tuple[int, int], group: int, device: torch.device, dtype: torch.dtype) -> int:
    """What `on_device` will take of a matrix (N, K)."""
    rows, columns = shape
    as_it_is = reason(device, dtype, group) or _refused(device, shape)
    return rows * (columns // 2 + columns // group * (2 if as_it_is else 2 * dtype.itemsize))


@lru_cache
def reason(device: torch.device, dtype: torch.dtype, group: int) -> str:
    """Why torch's product is not used on a device; "" where it is: a small one was the same as with
    16 bits there."""
    noise = torch.Generator().manual_seed(0)
    groups = 256 // group
    codes = torch.randint(256, (64, groups, group // 2), generator=noise, dtype=torch.uint8)
    scales = torch.rand(64, groups, 1, generator=noise).to(torch.float16)
    x_TK = torch.randn(3, 256, generator=noise).to(dtype)
    wanted = F.linear(x_TK.float(), Int4(codes=codes, scales=scales, dtype=dtype).dense().float())
    try:
        found = _packed(codes, scales, device, dtype).product(x_TK.to(device)).float().cpu()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # about this moment, not about the product: nothing to keep
    except RuntimeError as error:  # NotImplementedError too: an operator that is not there
        return str(error).partition("\n")[0]
    lost = float((found - wanted).norm() / wanted.norm())
    return "" if lost < 0.01 else f"it gave other results there: {lost:.1%} of their norm"


def _refused(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Shapes that torch's packing has no place for."""
    rows, columns = shape
    return bool(rows % 16) if device.type == "cpu" else bool(rows % 8 or columns % 32)


def _packed(codes: Tensor, scales: Tensor, device: torch.device, dtype: torch.dtype) -> PackedInt4:
    groups, group = codes.shape[1], codes.shape[2] * 2
    columns_NK = _columns(codes.to(device)).flatten(-2)
    columns = columns_NK.shape[1]
    if device.type == "cpu":
        there = torch._convert_weight_to_int4pack_for_cpu(columns_NK.to(torch.int32), 1)
    else:
        # Two a byte, the even column above; tiles of 16 columns, as many together as divide a row.
        two_a_byte = columns_NK[:, ::2] << 4 | columns_NK[:, 1::2]
        tiles = next(n for n in (8, 4, 2) if columns % (16 * n) == 0)
        there = torch._convert_weight_to_int4pack(two_a_byte.contiguous(), tiles)
    scales_GN = scales.to(device, dtype).view(-1, groups).T
    both = torch.stack((scales_GN, torch.zeros_like(scales_GN)), dim=-1)
    return PackedInt4(codes=there, scales=both.contiguous(), group=group, columns=columns)


def _columns(codes: Tensor) -> Tensor:
    """Codes (N, G, group) of bytes (N, G, group / 2): the first half of a group is below."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _parts(tensor: QTensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of `Int4`, on the host."""
    group = tensor.format.block_size
    blocks = torch.from_numpy(tensor.blocks.copy()).unflatten(-1, (-1, 2 + group // 2))
    scales = blocks[..., :2].contiguous().view(torch.float16)
    return blocks[..., 2:].contiguous(), scales
