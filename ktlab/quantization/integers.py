"""Plain integers with one scale: the formats that are made at load, for kernels, not for files.

int8_channel is what KTransformers 0.3 computes experts in on the CPU; int4 by groups is its INT4.
Layouts are this kit's own (ktlab_ext/csrc/ktl.h); GGUF has no such types.
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.quantization.kquants import by_groups, divide

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

INT8_LARGEST = 127
INT4_ZERO = 8


def quantize_int8_channel(rows: Floats) -> Bytes:
    """x ~ scale * code: a float32 scale for the whole row (output channel), then int8 codes."""
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    scale = largest / np.float32(INT8_LARGEST)
    codes = np.rint(divide(rows, scale))
    codes = np.clip(codes, -INT8_LARGEST, INT8_LARGEST).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def dequantize_int8_channel(rows: Bytes) -> Floats:
    """Rows of 4 + K bytes -> (rows, K)."""
    scale = np.ascontiguousarray(rows[:, :4]).view(np.float32)
    return scale * np.ascontiguousarray(rows[:, 4:]).view(np.int8)


def quantize_int4_group(rows: Floats, group: int) -> Bytes:
    """x ~ d * (code - 8): the element of the largest magnitude gets code 0, which reaches -8."""
    return by_groups(rows, group, _encode_int4)


def _encode_int4(x: Floats) -> Bytes:
    index = np.abs(x).argmax(axis=-1)[:, None]
    d16 = (np.take_along_axis(x, index, axis=-1) / np.float32(-INT4_ZERO)).astype(np.float16)
    codes = np.floor(divide(x, d16.astype(np.float32)) + np.float32(INT4_ZERO + 0.5))
    codes = np.clip(codes, 0, 15).astype(np.uint8)
    half = x.shape[-1] // 2
    packed = codes[:, :half] | codes[:, half:] << np.uint8(4)
    return np.concatenate([d16.view(np.uint8), packed], axis=1)


def dequantize_int4_group(rows: Bytes, group: int) -> Floats:
    """Rows of blocks of 2 + group / 2 bytes -> (rows, K)."""
    blocks = rows.reshape(len(rows), -1, 2 + group // 2)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    nibbles = blocks[..., 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int8) - INT4_ZERO
    return (scale * codes).reshape(len(rows), -1)
