"""Encoders for iq4_nl and iq4_xs: 4-bit codes into a fixed table of 16 uneven steps, a scale for 32
elements; in iq4_xs it has 6 bits of a float16 for 256.

The table is denser near 0, where weights are; `gguf` can only decode the formats. llama.cpp falls
back to iq4_nl where rows are too short for q2_k and q3_k.
Method and layout: llama.cpp PR 5590 and 5747, ggml src/ggml-common.h block_iq4_nl, block_iq4_xs.
"""

import numpy as np
from gguf.quants import IQ4_NL
from numpy.typing import NDArray

from ktlab.quantization.kquants import SUPER, by_groups, divide

TABLE = np.array(IQ4_NL.kvalues, dtype=np.float32)
REACH = 160
"""Beyond this every value is nearest to one of the table's ends, -127 and 113."""
# The nearest code of every half-integer interval; all borders between codes are half-integers.
_CENTRES = np.arange(-REACH, REACH, 0.5) + 0.25
_NEAREST = np.abs(_CENTRES[:, None] - TABLE).argmin(axis=1).astype(np.uint8)


def quantize_iq4_nl(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """x ~ d * TABLE[code]; d by search for the least squared error, weighted by x squared."""
    return by_groups(rows, 32, _encode)


def quantize_iq4_xs(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """x ~ d * scale * TABLE[code], scale in -32..31 for each 32; searched as in iq4_nl."""
    return by_groups(rows, SUPER, _encode_super)


def _encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    d16 = _searched(x).astype(np.float16)
    packed = _packed(_codes(x, divide(1, d16.astype(np.float32))))
    return np.concatenate([d16.view(np.uint8), packed], axis=1)


def _encode_super(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    count, parts = len(x), SUPER // 32
    x_PI = x.reshape(-1, 32)
    scale_NJ = _searched(x_PI).reshape(count, parts)
    index = np.abs(scale_NJ).argmax(axis=-1)[:, None]
    # The largest scale becomes -32, the end that reaches furthest.
    d16 = (np.take_along_axis(scale_NJ, index, axis=-1) / -32).astype(np.float16)
    d = d16.astype(np.float32)
    whole_NJ = np.clip(np.rint(scale_NJ * divide(1, d)), -32, 31)
    packed = _packed(_codes(x_PI, divide(1, (d * whole_NJ).reshape(-1, 1))))
    stored_NJ = (whole_NJ + 32).astype(np.uint16)
    high = (stored_NJ >> 4) << np.arange(0, 2 * parts, 2, dtype=np.uint16)
    low = (stored_NJ & 15).astype(np.uint8)
    return np.concatenate(
        [
            d16.view(np.uint8),
            high.sum(axis=-1, keepdims=True, dtype=np.uint16).view(np.uint8),
            low[:, ::2] | low[:, 1::2] << np.uint8(4),
            packed.reshape(count, -1),
        ],
        axis=1,
    )


def _searched(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale of each row of 32, (rows, 1)."""
    weight = np.square(x)
    weight_x = weight * x
    index = np.abs(x).argmax(axis=-1)[:, None]
    extreme = np.take_along_axis(x, index, axis=-1)
    best_gain, best_scale = np.zeros_like(extreme), np.zeros_like(extreme)
    for step in range(-7, 8):
        value = TABLE[_codes(x, divide(float(TABLE[0]) + step, extreme))]
        product = (weight_x * value).sum(axis=-1, keepdims=True)
        power = (weight * value * value).sum(axis=-1, keepdims=True)
        gain = divide(np.square(product), power)
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, divide(product, power), where=better)
    return best_scale


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes in a byte, 16 apart."""
    return codes[:, :16] | codes[:, 16:] << np.uint8(4)


def _codes(x: NDArray[np.float32], inverse: NDArray[np.float32]) -> NDArray[np.uint8]:
    steps = np.clip(x * inverse, -REACH, REACH - 1)
    return _NEAREST[((steps + REACH) * 2).astype(np.int32)]
