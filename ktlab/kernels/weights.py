"""Weights: a stack of matrices as bytes, in blocks or packed; what every expert kernel takes.

Letters: E experts, N rows (output features), K columns (input features).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import FormatError, nearest
from ktlab.kernels import codings
from ktlab.kernels.codings import FORMATS

GGML_BLOCKS, PACKED = "ggml_blocks", "packed"
LAYOUTS = (GGML_BLOCKS, PACKED)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Weights:
    """E matrices (N x K) of one format in one layout; `data` may be a read-only file mapping.

    In blocks, row n of expert e starts at byte `e * expert_stride + n * row_bytes`; packed, expert
    e starts at `e * expert_stride`, laid out as ktlab_ext/csrc/packed.h says.
    Raises `FormatError` where bytes and shape cannot belong together.
    """

    format: str
    layout: str
    experts: int
    rows: int
    cols: int
    data: NDArray[np.uint8]
    expert_stride: int
    """Bytes from one expert to the next."""

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.layout not in LAYOUTS:
            raise FormatError(
                f"layout {self.layout!r} is unknown; expected one of {', '.join(LAYOUTS)}"
                f"{nearest(self.layout, LAYOUTS)}"
            )
        if min(self.experts, self.rows, self.cols) < 0:
            raise FormatError(
                f"{self.experts} experts of {self.rows} x {self.cols}: expected no negative size"
            )
        check_cols(self.format, self.cols)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or not self.data.flags.c_contiguous:
            raise FormatError(
                f"expected contiguous uint8 data of one axis, found {self.data.dtype} of shape "
                f"{self.data.shape}; use np.ascontiguousarray(data).reshape(-1).view(np.uint8)"
            )
        if self.expert_stride < self.matrix_bytes:
            raise FormatError(
                f"a {self.format} matrix of {self.rows} x {self.cols} in {self.layout} has "
                f"{self.matrix_bytes} bytes, but the next expert starts after {self.expert_stride}"
            )
        expected = (self.experts - 1) * self.expert_stride + self.matrix_bytes
        if self.experts and self.data.size < expected:
            raise FormatError(
                f"{self.experts} {self.format} matrices of {self.rows} x {self.cols} in "
                f"{self.layout} need {expected} bytes, found {self.data.size}"
            )

    @classmethod
    def from_blocks(cls, format: str, shape: tuple[int, ...], blocks: NDArray[Any]) -> "Weights":
        """A tensor's block bytes, shape (N, K) or (E, N, K); no copy where they are contiguous."""
        *leading, rows, cols = shape
        experts = int(np.prod(leading, dtype=np.int64))
        check_cols(check_format(format), cols)
        return cls(
            format=format,
            layout=GGML_BLOCKS,
            experts=experts,
            rows=rows,
            cols=cols,
            data=np.ascontiguousarray(blocks).reshape(-1).view(np.uint8),
            expert_stride=rows * codings.row_bytes(format, cols),
        )

    @cached_property
    def matrix_bytes(self) -> int:
        """Bytes of one expert's matrix."""
        if self.layout == PACKED:
            return codings.packed_bytes(self.format, self.rows, self.cols)
        return self.rows * self.row_bytes

    @cached_property
    def address(self) -> int:
        """Where `data` begins."""
        return int(self.data.ctypes.data)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in blocks."""
        return codings.row_bytes(self.format, self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, gaps between experts not counted."""
        return self.experts * self.matrix_bytes

    def expert(self, index: int) -> NDArray[np.uint8]:
        """The bytes of one matrix, a view."""
        if not 0 <= index < self.experts:
            raise FormatError(f"expert {index} of {self.experts}: expected 0..{self.experts - 1}")
        start = index * self.expert_stride
        return self.data[start : start + self.matrix_bytes]

    def __repr__(self) -> str:
        return (
            f"Weights({self.format}, {self.layout}, {self.experts} x {self.rows} x {self.cols}, "
            f"{self.nbytes} bytes)"
        )


def check_format(format: str) -> str:
    """`format` if the expert kernels compute it, else a `FormatError` that lists what they do."""
    if format not in FORMATS:
        raise FormatError(
            f"format {format!r} is none that the expert kernels compute"
            f"{nearest(format, FORMATS)}; usable: {', '.join(sorted(FORMATS))}"
        )
    return format


def check_cols(format: str, cols: int) -> None:
    """`FormatError` where a row does not divide into the format's blocks."""
    block = codings.block_size(format)
    if cols % block:
        raise FormatError(f"{format} needs rows of a multiple of {block} columns, found {cols}")


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """`size` uninitialised bytes that start on a 64-byte border."""
    raw = np.empty(size + codings.ALIGN, np.uint8)
    start = -raw.ctypes.data % codings.ALIGN
    return raw[start : start + size]
