"""fp8_e4m3: DeepSeek-V3's own weights, 8-bit floats with a float32 scale for 128 columns.

In its files a scale serves 128 x 128 weights and lies in a tensor of its own (`weight_scale_inv`);
here each row carries its copies, 4 bytes for 128, so that rows stand alone as in every format.
Source: DeepSeek-V3 (arXiv 2412.19437) 3.3.2; E4M3 without infinities: OCP 8-bit floating point
specification 1.0.
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.quantization.kquants import by_groups, divide

GROUP = 128
"""Columns of a scale, and rows where DeepSeek writes them."""
BLOCK_BYTES = 4 + GROUP
LARGEST = 448.0


def _table() -> NDArray[np.float32]:
    codes = np.arange(128)
    exponents, fractions = codes >> 3, codes & 7
    normal = (1 + fractions / 8) * np.exp2(exponents - 7.0)
    positive = np.where(exponents == 0, fractions / 8 * 2.0**-6, normal)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


E4M3 = _table()
"""The value of each of the 256 codes; 127 and 255 are NaN."""
_BORDERS = (E4M3[:126] + E4M3[1:127]) / 2


def quantize_fp8(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """x ~ scale * value of code; the largest magnitude of 128 becomes 448."""
    return by_groups(rows, GROUP, _encode)


def _encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(LARGEST)
    codes = np.searchsorted(_BORDERS, np.abs(divide(x, scale))).astype(np.uint8)
    codes |= np.signbit(x).astype(np.uint8) << np.uint8(7)
    return np.concatenate([scale.astype(np.float32).view(np.uint8), codes], axis=1)


def dequantize_fp8(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of blocks of a scale and 128 codes -> (rows, K)."""
    blocks = rows.reshape(len(rows), -1, BLOCK_BYTES)
    scale = np.ascontiguousarray(blocks[..., :4]).view(np.float32)
    return (scale * E4M3[blocks[..., 4:]]).reshape(len(rows), -1)


def join_scales(codes_NK: NDArray[np.uint8], scale_NG: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes (N, K) and the scales of each row's groups (N, K / 128) as rows of the format."""
    rows, groups = scale_NG.shape
    blocks = np.empty((rows, groups, BLOCK_BYTES), np.uint8)
    blocks[..., :4] = np.ascontiguousarray(scale_NG)[..., None].view(np.uint8)
    blocks[..., 4:] = codes_NK.reshape(rows, groups, GROUP)
    return blocks.reshape(rows, -1)
