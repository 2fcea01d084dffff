"""Encoder for iq4_nl: 4-bit codes into a fixed table of 16 uneven steps, a scale for 32 elements.

The table is denser near 0, where weights are; `gguf` can only decode the format. llama.cpp falls
back to it where rows are too short for q2_k and q3_k.
Method and layout: llama.cpp PR 5590, ggml src/ggml-common.h block_iq4_nl.
"""

import numpy as np
from gguf.quants import IQ4_NL
from numpy.typing import NDArray

from ktlab.quantization.kquants import by_groups, divide

TABLE = np.array(IQ4_NL.kvalues, dtype=np.float32)
REACH = 160
"""Beyond this every value is nearest to one of the table's ends, -127 and 113."""
# The nearest code of every half-integer interval; all borders between codes are half-integers.
_CENTRES = np.arange(-REACH, REACH, 0.5) + 0.25
_NEAREST = np.abs(_CENTRES[:, None] - TABLE).argmin(axis=1).astype(np.uint8)


def quantize_iq4_nl(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """x ~ d * TABLE[code]; d by search for the least squared error, weighted by x squared."""
    return by_groups(rows, 32, _encode)


def _encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
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
    d16 = best_scale.astype(np.float16)
    codes = _codes(x, divide(1, d16.astype(np.float32)))
    packed = codes[:, :16] | codes[:, 16:] << np.uint8(4)
    return np.concatenate([d16.view(np.uint8), packed], axis=1)


def _codes(x: NDArray[np.float32], inverse: NDArray[np.float32]) -> NDArray[np.uint8]:
    steps = np.clip(x * inverse, -REACH, REACH - 1)
    return _NEAREST[((steps + REACH) * 2).astype(np.int32)]
