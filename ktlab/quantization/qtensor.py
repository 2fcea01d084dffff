"""QTensor: a weight as it lies in memory, in whatever format, with its error measurable.

Shapes are NumPy's (row-major; the reverse of ggml's `ne`): experts are (E, F, D).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ktlab.errors import FormatError
from ktlab.html import byte_size, card, mimebundle, pairs, wrapped
from ktlab.quantization.formats import Format, get_format

CHUNK_ELEMENTS = 1 << 22
"""At most about this many elements are held in float32 while an error is measured."""


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """How far one encoding of a tensor is from another, over all its elements."""

    name: str
    reference: str
    """Format that the error is measured against."""
    format: str
    rmse: float
    """Root of the mean squared difference, in the tensor's own unit."""
    relative_rmse: float
    """rmse over the root mean square of the reference."""
    max_abs: float
    snr_db: float
    """Signal to noise, -20 log10(relative_rmse), in decibel; inf where nothing differs."""
    bytes: int
    bits_per_weight: float

    def __repr__(self) -> str:
        return wrapped(
            f"QuantizationError({self.name}: {self.format} against {self.reference}, "
            f"relative rmse {self.relative_rmse:.3g}, {self.snr_db:.1f} dB, "
            f"max {self.max_abs:.3g}, {self.bits_per_weight:.3g} bits/weight)"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QTensor:
    """A tensor of encoded rows: `blocks` is uint8 of shape `shape[:-1] + (row_bytes,)`."""

    name: str
    format: Format
    shape: tuple[int, ...]
    blocks: NDArray[np.uint8]
    """May be a read-only view of a memory-mapped file."""
    source: str = "memory"
    """"tiny.gguf", "requantized from q8_0", "memory"."""

    def __post_init__(self) -> None:
        if not self.shape:
            raise FormatError(f"{self.name}: a tensor needs at least one axis")
        expected = self.shape[:-1] + (self.format.row_bytes(self.shape[-1]),)
        if self.blocks.dtype != np.uint8 or self.blocks.shape != expected:
            raise FormatError(
                f"{self.name}: {self.format.name} of shape {self.shape} needs uint8 {expected}, "
                f"found {self.blocks.dtype} {self.blocks.shape}"
            )

    @classmethod
    def from_array(cls, name: str, array: ArrayLike, format: str | Format = "f32") -> "QTensor":
        """Encode an array; FormatError if its rows do not fit the format."""
        format = get_format(format)
        values = np.asarray(array, dtype=np.float32)
        return cls(name=name, format=format, shape=values.shape, blocks=format.quantize(values))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])

    @property
    def bits_per_weight(self) -> float:
        """All bytes counted, also those that belong to whole rows."""
        return 8 * self.nbytes / self.size if self.size else self.format.bits_per_weight

    def dequantize(self) -> NDArray[np.float32]:
        """The values, float32, of `shape`. A view of the bytes where the format is f32."""
        return self.format.dequantize(self.blocks)

    def matrices(self) -> Iterator["QTensor"]:
        """Its matrices (N, K), one after the other: a stack's, or itself alone."""
        if len(self.shape) < 3:
            yield self
            return
        for index in range(len(self)):
            yield from self[index].matrices()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: "int | slice | NDArray[np.integer]") -> "QTensor":
        """Along the first axis; an int drops that axis: `experts[3]` is one expert's matrix."""
        if len(self.shape) < 2:
            raise FormatError(f"{self.name} has one axis {self.shape}; dequantize() it to index")
        blocks = self.blocks[index]
        label = f"{self.name}[{index}]" if isinstance(index, int | np.integer) else self.name
        return QTensor(
            name=label,
            format=self.format,
            shape=blocks.shape[:-1] + self.shape[-1:],
            blocks=blocks,
            source=self.source,
        )

    def requantize(self, format: str | Format) -> "QTensor":
        """The same tensor in another format; itself where the format is the same already."""
        format = get_format(format)
        if format == self.format:
            return self
        blocks = np.empty(self.shape[:-1] + (format.row_bytes(self.shape[-1]),), np.uint8)
        for rows, part in self._chunks():
            blocks.reshape(-1, blocks.shape[-1])[rows] = format.quantize(part)
        source = f"requantized from {self.format.name}"
        return QTensor(
            name=self.name, format=format, shape=self.shape, blocks=blocks, source=source
        )

    def error(self, other: "str | Format | QTensor") -> QuantizationError:
        """What is lost by taking `other` (a format to requantize to, or a tensor) for this."""
        changed = other if isinstance(other, QTensor) else self.requantize(other)
        if changed.shape != self.shape:
            raise FormatError(f"{self.name} is {self.shape}, {changed.name} is {changed.shape}")
        squares = noise = largest = 0.0
        other_rows = changed.blocks.reshape(-1, changed.blocks.shape[-1])
        for rows, part in self._chunks():
            difference = part.astype(np.float64) - changed.format.dequantize(other_rows[rows])
            squares += float(np.square(part, dtype=np.float64).sum())
            noise += float(np.square(difference).sum())
            largest = max(largest, float(np.abs(difference).max(initial=0.0)))
        relative = math.sqrt(noise / squares) if squares else (math.inf if noise else 0.0)
        return QuantizationError(
            name=self.name,
            reference=self.format.name,
            format=changed.format.name,
            rmse=math.sqrt(noise / self.size) if self.size else 0.0,
            relative_rmse=relative,
            max_abs=largest,
            snr_db=-20 * math.log10(relative) if relative else math.inf,
            bytes=changed.nbytes,
            bits_per_weight=changed.bits_per_weight,
        )

    def _chunks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Decoded rows in pieces of a bounded size: (rows, (n, row_length) float32)."""
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape[-1]))
        first = 0
        for row_bytes in self._byte_rows():
            for start in range(0, len(row_bytes), step):
                part = self.format.dequantize(row_bytes[start : start + step])
                yield slice(first, first + len(part)), part
                first += len(part)

    def _byte_rows(self) -> Iterator[NDArray[np.uint8]]:
        """The encoded rows, (n, row_bytes) in one or several pieces."""
        yield self.blocks.reshape(-1, self.blocks.shape[-1])

    def __repr__(self) -> str:
        shape = "×".join(str(n) for n in self.shape)
        return (
            f"QTensor({self.name}, {self.format.name}, {shape}, {byte_size(self.nbytes)}, "
            f"{self.source})"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        head = self.blocks.reshape(-1, self.blocks.shape[-1])[:1]
        first = self.format.dequantize(head).ravel()[:6]
        rows = {
            "format": f"{self.format.name}, {self.bits_per_weight:g} bits a weight",
            "shape": " × ".join(str(n) for n in self.shape),
            "bytes": byte_size(self.nbytes),
            "from": self.source,
            "first values": ", ".join(f"{value:.4g}" for value in first),
        }
        return mimebundle(repr(self), card(self.name, pairs(rows)))
