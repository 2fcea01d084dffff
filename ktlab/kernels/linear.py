"""A matrix of the dense part, computed on its quantized values by the same kernels as experts."""

import copy

from torch import Tensor

from ktlab.kernels import packing, products
from ktlab.kernels.computed import Computed
from ktlab.kernels.stack import Stack
from ktlab.quantization import QTensor, fallback_format

SMALL = 1 << 17
"""Matrices by head with no more weights than this are multiplied by torch: calls would weigh more
than reading a float32 copy from the cache."""


class Linear(Computed):
    """y = x W^T with W (out, in); `weight` is the QTensor, `request` the live switch.

    A weight with leading axes (one matrix a head) is applied by `by_head`.
    """

    def __init__(self, weight: QTensor) -> None:
        super().__init__()
        self.stacks = self._stored = (Stack(weight),)

    @property
    def weight(self) -> QTensor:
        """W, encoded."""
        return self.stack.tensor

    @property
    def weight_OI(self) -> Tensor:
        """W as a float32 copy, (out, in) or with leading axes, e.g. one matrix a head."""
        return self.stack.floats

    @property
    def stack(self) -> Stack:
        """The matrix, with what kernels have made of it."""
        return self.stacks[0]

    @property
    def formats(self) -> tuple[str, ...]:
        """The format of the matrix."""
        return (self.stack.format.name,)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T as float32; x (..., in) in floats of any kind."""
        if x.ndim == 2:
            return products.linear(self.kernel, self.stack, x)
        y = products.linear(self.kernel, self.stack, x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def by_head(self, x_THK: Tensor) -> Tensor:
        """Each head's vectors through its own matrix: (T, H, K) -> (T, H, N), W (H, N, K)."""
        if self.stack.size > SMALL and self.kernel.backend == "native":
            return products.linear_by_head(self.kernel, self.stack, x_THK)
        return (x_THK.float().transpose(0, 1) @ self.weight_OI.transpose(1, 2)).transpose(0, 1)

    def clone(self) -> "Linear":
        """The same weights and operands under a switch of its own."""
        return copy.copy(self)

    def quantized(self, format: str) -> "Linear":
        """The stored matrix in another format; rows that do not fit it fall back as in llama.cpp.

        Always from the weights as loaded, so that errors do not add up; computed once."""
        (stored,) = self._stored
        fitting = fallback_format(format, stored.shape[-1])
        kept = self._requantized.get(format)
        if kept is None:
            kept = self._stored
            if fitting != stored.format:
                tensor = packing.convert(stored.tensor, fitting, self._request)
                kept = (Stack(tensor, as_loaded=False),)
            self._requantized[format] = kept
        changed = copy.copy(self)
        changed.stacks, changed._kernel = kept, None
        return changed

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return self.stack.nbytes

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.stack.shape))
        return f"Linear({shape}, {self.stack.format.name})"
