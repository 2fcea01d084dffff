"""Number formats: how weights are encoded in bytes, one registered instance for each.

A format cuts each row (last axis) into blocks of `block_size` elements and stores a block in
`block_bytes` bytes, after `row_head_bytes` that belong to the whole row. GGUF's formats are decoded
by the `gguf` package and encoded by it where it can, else by us (`kquants`, `codebook`); those of
`integers` and `float8` exist in memory only. A format is looked up by name: `get_format("q4_k")`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ktlab.errors import FormatError, nearest
from ktlab.quantization import codebook, float8, integers, kquants

Quantizer = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
Dequantizer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

F16_MAX = 65504.0
"""Largest finite float16; the scales of all block formats of 2 to 8 bits are float16."""
SMALLEST = np.float32(1e-30)
"""Below this a value is stored as 0, so that 1/scale stays finite."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Format:
    """One encoding.

    `source` names where it is defined (ggml = github.com/ggml-org/ggml).
    """

    name: str
    block_size: int
    """Elements in a block."""
    block_bytes: int
    source: str
    dequantizer: Dequantizer = field(compare=False)
    """(rows, row_bytes) -> (rows, row_length)."""
    quantizer: Quantizer | None = field(default=None, compare=False)
    """(rows, row_length) -> (rows, row_bytes), or None: this kit can only read the format."""
    ggml_type: GGMLQuantizationType | None = None
    """None: made in memory for kernels, no GGUF file can hold it."""
    row_head_bytes: int = 0
    """Bytes before a row's blocks, e.g. one scale for the whole row."""
    largest: float = F16_MAX
    """Largest magnitude that can be encoded; inf: NaN and infinities are kept as well."""

    @property
    def bits_per_weight(self) -> float:
        """Everything in a block: codes, scales, minima. `row_head_bytes` come on top."""
        return self.block_bytes * 8 / self.block_size

    @property
    def can_quantize(self) -> bool:
        return self.quantizer is not None

    def check_can_quantize(self) -> None:
        """FormatError if this kit can only read the format."""
        if self.quantizer is None:
            able = ", ".join(name for name, known in FORMATS.items() if known.can_quantize)
            raise FormatError(
                f"{self.name} can be read here but not written: it needs an importance matrix "
                f"or a search that this kit does not do; usable: {able}"
            )

    def row_bytes(self, row_length: int) -> int:
        """Bytes of one row; FormatError if the row does not divide into blocks."""
        if row_length % self.block_size:
            other = fallback_format(self, row_length)
            who = "llama.cpp would fall back" if self.ggml_type is not None else "fall back"
            raise FormatError(
                f"{self.name} stores blocks of {self.block_size} elements, but a row here has "
                f"{row_length}; {who} to {other.name}: "
                f"use fallback_format({self.name!r}, {row_length})"
            )
        return self.row_head_bytes + row_length // self.block_size * self.block_bytes

    def row_length(self, row_bytes: int) -> int:
        """Elements of a row of so many bytes; FormatError if there is no such row."""
        inner = row_bytes - self.row_head_bytes
        if inner < 0 or inner % self.block_bytes:
            head = f"{self.row_head_bytes} bytes and " if self.row_head_bytes else ""
            raise FormatError(
                f"{self.name} expects rows of {head}a multiple of {self.block_bytes} bytes, "
                f"found {row_bytes}"
            )
        return inner // self.block_bytes * self.block_size

    def quantize(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32 (..., row) -> bytes (..., row_bytes)."""
        self.check_can_quantize()
        assert self.quantizer is not None
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim == 0:
            raise FormatError(f"{self.name} needs rows of values, found a single number")
        row_bytes = self.row_bytes(values.shape[-1])
        self._check_range(values)
        if values.size == 0:
            return np.zeros(values.shape[:-1] + (row_bytes,), np.uint8)
        rows = values.reshape(-1, values.shape[-1])
        if self.block_size > 1 or self.row_head_bytes:
            rows = np.where(np.abs(rows) < SMALLEST, np.float32(0), rows)
        return self.quantizer(rows).reshape(values.shape[:-1] + (row_bytes,))

    def dequantize(self, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Bytes (..., row_bytes) -> float32 (..., row)."""
        if blocks.dtype != np.uint8 or blocks.ndim == 0:
            raise FormatError(
                f"{self.name} expects uint8 rows, found {blocks.dtype} {blocks.shape}"
            )
        row_length = self.row_length(blocks.shape[-1])
        if blocks.size == 0:
            return np.zeros(blocks.shape[:-1] + (row_length,), np.float32)
        rows = np.ascontiguousarray(blocks).reshape(-1, blocks.shape[-1])
        values = self.dequantizer(rows)
        return values.reshape(blocks.shape[:-1] + (row_length,))

    def _check_range(self, values: NDArray[np.float32]) -> None:
        if self.largest == np.inf or values.size == 0:
            return
        largest = float(np.abs(values).max())
        if self.name == "f16" and not np.isfinite(largest):
            return
        self.check_largest(largest)

    def check_largest(self, largest: float) -> None:
        """FormatError if values of this magnitude, or NaN, cannot be encoded."""
        if not largest <= self.largest:
            raise FormatError(
                f"{self.name} cannot hold these values: the largest magnitude is {largest:g}, "
                f"expected finite values up to {self.largest:g}; use bf16 or f32"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return get_format, (self.name,)  # pickled and copied by name: there is one of each

    def __repr__(self) -> str:
        return f"Format({self.name}, {self.bits_per_weight:g} bits/weight)"

    def __str__(self) -> str:
        return self.name


FORMATS: dict[str, Format] = {}
"""Every format that this kit can compute with, by lower-case name."""


def get_format(name: "str | Format | GGMLQuantizationType") -> Format:
    """The format of that name ("q8_0", "Q8_0"); FormatError with the nearest name otherwise."""
    if isinstance(name, Format):
        return name
    key = (name.name if isinstance(name, GGMLQuantizationType) else str(name)).lower()
    if key not in FORMATS:
        raise FormatError(
            f'unknown format "{key}"{nearest(key, FORMATS)}; usable: {", ".join(FORMATS)}'
        )
    return FORMATS[key]


def fallback_format(format: "str | Format", row_length: int) -> Format:
    """`format` itself if rows of `row_length` fit it, else what llama.cpp takes instead.

    Source: llama.cpp, src/llama-quant.cpp, `tensor_type_fallback`. Our own int4 groups fall back to
    smaller ones, then to int8_channel, which takes any row.
    """
    format = get_format(format)
    for _ in range(2):
        if row_length % format.block_size == 0:
            return format
        format = FORMATS[_FALLBACKS.get(format.name, "f16")]
    return format if row_length % format.block_size == 0 else FORMATS["f16"]


_FALLBACKS = {
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "int4_group128": "int4_group32",
    "int4_group32": "int8_channel",
    "fp8_e4m3": "bf16",
} | dict.fromkeys("iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s iq4_xs".split(), "iq4_nl")


def _by_gguf(ggml_type: GGMLQuantizationType) -> Quantizer:
    def quantize(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        return gguf.quantize(rows, ggml_type).view(np.uint8)

    return quantize


_QUANTIZERS: dict[str, Quantizer] = {
    "Q6_K": kquants.quantize_q6_k,
    "Q5_K": kquants.quantize_q5_k,
    "Q4_K": kquants.quantize_q4_k,
    "Q3_K": kquants.quantize_q3_k,
    "Q2_K": kquants.quantize_q2_k,
    "IQ4_NL": codebook.quantize_iq4_nl,
    "IQ4_XS": codebook.quantize_iq4_xs,
}
for _name in "F32 F16 BF16 Q8_0 Q5_1 Q5_0 Q4_1 Q4_0 TQ2_0 TQ1_0 MXFP4".split():
    _QUANTIZERS[_name] = _by_gguf(GGMLQuantizationType[_name])


def _register(ggml_name: str, source: str) -> None:
    ggml_type = GGMLQuantizationType[ggml_name]
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    FORMATS[ggml_name.lower()] = Format(
        name=ggml_name.lower(),
        block_size=block_size,
        block_bytes=block_bytes,
        source=source,
        ggml_type=ggml_type,
        quantizer=_QUANTIZERS.get(ggml_name),
        dequantizer=partial(gguf.dequantize, qtype=ggml_type),
        largest=np.inf if ggml_name in ("F32", "BF16") else F16_MAX,
    )


def _register_int4(group: int) -> None:
    name = f"int4_group{group}"
    FORMATS[name] = Format(
        name=name,
        block_size=group,
        block_bytes=2 + group // 2,
        source=f"ktlab_ext/csrc/ktl.h: {group} values of 4 bits and a float16 scale",
        quantizer=partial(integers.quantize_int4_group, group=group),
        dequantizer=partial(integers.dequantize_int4_group, group=group),
    )


_register("F32", "IEEE 754 binary32")
_register("F16", "IEEE 754 binary16")
_register("BF16", "bfloat16: the upper half of binary32; ggml src/ggml-impl.h")
_register("Q8_0", "ggml src/ggml-common.h block_q8_0: 32 int8 and a scale")
_register("Q6_K", "ggml block_q6_K: 16 sub-blocks of 16, int8 scales (llama.cpp PR 1684)")
_register("Q5_K", "ggml block_q5_K: 8 sub-blocks of 32, 6-bit scales and minima (PR 1684)")
_register("Q5_1", "ggml block_q5_1: 32 values of 5 bits, a scale and a minimum")
_register("Q5_0", "ggml block_q5_0: 32 values of 5 bits and a scale")
_register("Q4_K", "ggml block_q4_K: 8 sub-blocks of 32, 6-bit scales and minima (PR 1684)")
_register("Q4_1", "ggml block_q4_1: 32 values of 4 bits, a scale and a minimum")
_register("Q4_0", "ggml block_q4_0: 32 values of 4 bits and a scale")
_register("Q3_K", "ggml block_q3_K: 16 sub-blocks of 16, 6-bit scales (llama.cpp PR 1684)")
_register("Q2_K", "ggml block_q2_K: 16 sub-blocks of 16, 4-bit scales and minima (PR 1684)")
_register("IQ4_NL", "ggml block_iq4_nl: 32 codes into a table of 16 (llama.cpp PR 5590)")
_register("IQ4_XS", "ggml block_iq4_xs: iq4_nl with 6-bit scales (llama.cpp PR 5747)")
_register("IQ3_S", "ggml block_iq3_s: grid of 512 (llama.cpp PR 5676)")
_register("IQ3_XXS", "ggml block_iq3_xxs: grid of 256 (llama.cpp PR 5196)")
_register("IQ2_S", "ggml block_iq2_s: grid of 1024 (llama.cpp PR 5721)")
_register("IQ2_XS", "ggml block_iq2_xs: grid of 512 (llama.cpp PR 4856)")
_register("IQ2_XXS", "ggml block_iq2_xxs: grid of 256, after QuIP# (llama.cpp PR 4773)")
_register("IQ1_M", "ggml block_iq1_m: grid of 2048, finer scales (llama.cpp PR 6302)")
_register("IQ1_S", "ggml block_iq1_s: grid of 2048 (llama.cpp PR 5999)")
_register("TQ2_0", "ggml block_tq2_0: ternary in 2 bits (llama.cpp PR 8151)")
_register("TQ1_0", "ggml block_tq1_0: five ternary digits in a byte (llama.cpp PR 8151)")
_register("MXFP4", "OCP Microscaling Formats 1.0: 32 E2M1 values, one E8M0 scale")
_register("NVFP4", "NVIDIA NVFP4: 16 E2M1 values, one E4M3 scale; four to a ggml block")
FORMATS["int8_channel"] = Format(
    name="int8_channel",
    block_size=1,
    block_bytes=1,
    row_head_bytes=4,
    source="ktlab_ext/csrc/ktl.h: int8 and a float32 scale for each row, as KTransformers 0.3",
    quantizer=integers.quantize_int8_channel,
    dequantizer=integers.dequantize_int8_channel,
    largest=float(np.finfo(np.float32).max),
)
_register_int4(32)
_register_int4(128)
FORMATS["fp8_e4m3"] = Format(
    name="fp8_e4m3",
    block_size=float8.GROUP,
    block_bytes=float8.BLOCK_BYTES,
    source="DeepSeek-V3 (2412.19437) 3.3.2: 128 floats of 8 bits (E4M3) and a float32 scale",
    quantizer=float8.quantize_fp8,
    dequantizer=float8.dequantize_fp8,
    largest=float(np.finfo(np.float32).max),
)
