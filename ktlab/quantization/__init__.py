"""How numbers are encoded: formats, quantized tensors, and what an encoding costs in error."""

from ktlab.quantization.formats import FORMATS, Format, fallback_format, get_format
from ktlab.quantization.qtensor import QTensor, QuantizationError

__all__ = [
    "FORMATS",
    "Format",
    "QTensor",
    "QuantizationError",
    "fallback_format",
    "get_format",
]
