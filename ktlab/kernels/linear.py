"""A matrix of the dense part: the quantized tensor, and the float32 copy that torch multiplies."""

from functools import cached_property

from torch import Tensor
from torch.nn import functional as F

from ktlab.kernels.torch_moe import float_tensor
from ktlab.quantization import QTensor, fallback_format


class Linear:
    """y = x W^T with W (out, in); `weight` is the QTensor, dequantized when first used."""

    def __init__(self, weight: QTensor) -> None:
        self.weight = weight
        self._stored = self
        self._requantized: dict[str, Linear] = {}

    @cached_property
    def weight_OI(self) -> Tensor:
        """W as float32, (out, in) or with leading axes, e.g. one matrix a head."""
        return float_tensor(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI)

    def quantized(self, format: str) -> "Linear":
        """The stored matrix in another format; rows that do not fit it fall back as in llama.cpp.

        Always from the weights as loaded, so that errors do not add up; computed once."""
        stored = self._stored
        if format not in stored._requantized:
            fitting = fallback_format(format, stored.weight.shape[-1])
            changed = Linear(stored.weight.requantize(fitting))
            changed._stored = stored
            stored._requantized[format] = changed
        return stored._requantized[format]

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return self.weight.nbytes

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.weight.shape))
        return f"Linear({shape}, {self.weight.format.name})"
