"""Encoders for the k-quants (q2_k ... q6_k), which the `gguf` package can only decode.

A super-block holds 256 elements in sub-blocks of 16 or 32. Each sub-block has a small integer
scale (and, in q2_k, q4_k, q5_k, a small integer minimum); the super-block has one float16 that
turns those integers into numbers. Two steps, both over all super-blocks at once:
1. per sub-block, search the real scale (and minimum) with the least weighted squared error;
2. round scales and minima to integers, then round every element against the rounded ones.
`kernels.numba_encode` does the same compiled, with the same bytes, so the order of sums is fixed.
Letters: N super-blocks, J sub-blocks of one, I elements of a sub-block.

Method: k-quants by I. Kawrakow, llama.cpp PR 1684. Byte layout: ggml src/ggml-common.h.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Codes = NDArray[np.integer[Any]]

SUPER = 256
GROUP = 65536
"""Elements encoded at once: 256 KiB of float32, so that the search stays in cache."""


def _symmetric_grid(low: int) -> Floats:
    return np.array([low + 0.1 * step for step in range(-9, 10)], np.float32)


def _affine_grid(high: int, start: float, steps: int) -> Floats:
    return np.float32(high) + np.linspace(start, 1.0, steps, dtype=np.float32)


GRIDS = {
    "q6_k": _symmetric_grid(-32),
    "q5_k": _affine_grid(31, -0.5, 16),
    "q4_k": _affine_grid(15, -1.0, 11),
    "q3_k": _symmetric_grid(-4),
    "q2_k": _affine_grid(3, -0.5, 16),
}
"""The search tries each: the code, not rounded, that the element furthest out shall have."""


def quantize_q6_k(rows: Floats) -> Bytes:
    """x ~ d * scale * q, q in -32..31, scale int8 for each 16 elements."""
    return by_groups(rows, SUPER, _encode_q6_k)


def quantize_q5_k(rows: Floats) -> Bytes:
    """x ~ d * scale * q - dmin * minimum, q in 0..31, 6-bit scale and minimum for each 32."""
    return by_groups(rows, SUPER, _encode_q5_k)


def quantize_q4_k(rows: Floats) -> Bytes:
    """As q5_k, with q in 0..15."""
    return by_groups(rows, SUPER, _encode_q4_k)


def quantize_q3_k(rows: Floats) -> Bytes:
    """x ~ d * scale * q, q in -4..3, 6-bit signed scale for each 16 elements."""
    return by_groups(rows, SUPER, _encode_q3_k)


def quantize_q2_k(rows: Floats) -> Bytes:
    """x ~ d * scale * q - dmin * minimum, q in 0..3, 4-bit scale and minimum for each 16."""
    return by_groups(rows, SUPER, _encode_q2_k)


def by_groups(rows: Floats, block_size: int, encode: Callable[[Floats], Bytes]) -> Bytes:
    """Encode blocks of `block_size` elements, some thousand at a time: (rows, row_bytes)."""
    blocks = rows.reshape(-1, block_size)
    step = GROUP // block_size
    parts = [encode(blocks[i : i + step]) for i in range(0, len(blocks), step)]
    return np.concatenate(parts).reshape(len(rows), -1)


# ---------------------------------------------------------------- search, for each sub-block
def _search_symmetric(x_NJI: Floats, low: int, high: int, grid: Floats) -> Floats:
    """Scales (N, J) such that x ~ scale * q with q in low..high, weighted by x squared.

    The scale's sign is free: `low` reaches one step further than `high`, so the element of the
    largest magnitude is put on that side.
    """
    weight = np.square(x_NJI)
    weight_x = weight * x_NJI
    index = np.abs(x_NJI).argmax(axis=-1)[..., None]
    extreme_NJ = np.take_along_axis(x_NJI, index, axis=-1)[..., 0]
    best_gain = np.zeros_like(extreme_NJ)
    best_scale = np.zeros_like(extreme_NJ)
    for furthest in grid:
        q = _codes(x_NJI, divide(furthest, extreme_NJ), low, high)
        product, power = dot(weight_x, q), dot(weight * q, q)
        gain = divide(np.square(product), power)
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, divide(product, power), where=better)
    return best_scale


def _search_affine(x_NJI: Floats, high: int, grid: Floats) -> tuple[Floats, Floats]:
    """Scales and minima (N, J), both >= 0, such that x ~ scale * q - minimum, q in 0..high.

    Weighted by |x| + rms: large weights matter more, small ones are not ignored. Each step tries
    one grid of codes q, for which the best scale and minimum follow by least squares.
    """
    weight = np.abs(x_NJI)
    weight += np.sqrt(np.square(x_NJI).mean(axis=-1, keepdims=True))
    weight_x = weight * x_NJI
    lowest = np.minimum(x_NJI.min(axis=-1), 0)
    width = np.maximum(x_NJI.max(axis=-1), 0) - lowest
    raised = x_NJI - lowest[..., None]
    w, wx, wxx = weight.sum(axis=-1), weight_x.sum(axis=-1), dot(weight_x, x_NJI)

    best_scale, best_minimum = width / np.float32(high), -lowest
    best_cost = np.full_like(width, np.inf)
    for furthest in grid:
        q = _codes(raised, divide(furthest, width), 0, high)
        weight_q = weight * q
        wq, wqq, wqx = weight_q.sum(axis=-1), dot(weight_q, q), dot(weight_q, x_NJI)
        determinant = w * wqq - wq * wq
        scale = divide(w * wqx - wx * wq, determinant)
        minimum = divide(wq * wqx - wqq * wx, determinant)
        # Fit the scale alone where the minimum would be negative, which cannot be stored, or
        # where all codes are nearly equal: float32 cannot tell the determinant from 0 there.
        alone = (minimum < 0) | (determinant < 1e-3 * w * wqq)
        scale = np.where(alone, divide(wqx, wqq), scale)
        minimum = np.where(alone, 0, minimum)
        # The sum of weight * (scale * q - minimum - x)**2, from the sums at hand.
        cost = scale * (scale * wqq - 2 * (minimum * wq + wqx)) + minimum * (minimum * w + 2 * wx)
        cost += wxx
        better = (cost < best_cost) & (scale > 0)
        np.copyto(best_cost, cost, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_minimum, minimum, where=better)
    return best_scale, best_minimum + 0  # no -0: bytes must not depend on which zero is the larger


def _codes(x_NJI: Floats, inverse_NJ: Floats, low: int, high: int) -> Floats:
    q = x_NJI * inverse_NJ[..., None]
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def dot(a_NJI: Floats, b_NJI: Floats) -> Floats:
    """Sums of products over I, in one order on every machine: elements 0, 4, 8 ... go to the first
    of four sums, 1, 5, 9 ... to the second, and so on; of each 16 the last four come first.
    """
    products_INJ = np.ascontiguousarray(np.moveaxis(a_NJI * b_NJI, -1, 0))
    sums = np.zeros((4, *products_INJ.shape[1:]), np.float32)
    for first in range(0, len(products_INJ), 16):
        for four in (12, 8, 4, 0):
            sums += products_INJ[first + four : first + four + 4]
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


# ---------------------------------------------------------------- rounding and packing
def _round_symmetric(
    x_NJI: Floats, low: int, high: int, scale_low: int, grid: Floats
) -> tuple[NDArray[np.int8], NDArray[np.int8], Bytes]:
    """q (N, 256) in low..high, integer scales (N, J), and d as float16 bytes (N, 2)."""
    scale_NJ = _search_symmetric(x_NJI, low, high, grid)
    index = np.abs(scale_NJ).argmax(axis=-1)[:, None]
    d16 = _float16(np.take_along_axis(scale_NJ, index, axis=-1) / np.float32(scale_low))
    d = d16.astype(np.float32)
    scales = np.clip(np.rint(divide(scale_NJ, d)), scale_low, -scale_low - 1)
    q = _codes(x_NJI, divide(1, d * scales), low, high).astype(np.int8)
    return q.reshape(len(q), SUPER), scales.astype(np.int8), d16.view(np.uint8)


def _round_affine(
    x_NJI: Floats, high: int, integer_high: int, grid: Floats
) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """q (N, 256) in 0..high, integer scales and minima (N, J), and d, dmin as bytes (N, 4)."""
    scale_NJ, minimum_NJ = _search_affine(x_NJI, high, grid)
    d16 = _float16(scale_NJ.max(axis=-1, keepdims=True) / np.float32(integer_high))
    dmin16 = _float16(minimum_NJ.max(axis=-1, keepdims=True) / np.float32(integer_high))
    d, dmin = d16.astype(np.float32), dmin16.astype(np.float32)
    scales = np.clip(np.rint(divide(scale_NJ, d)), 0, integer_high)
    minima = np.clip(np.rint(divide(minimum_NJ, dmin)), 0, integer_high)
    raised = x_NJI + (dmin * minima)[..., None]
    q = _codes(raised, divide(1, d * scales), 0, high).astype(np.uint8)
    heads = np.concatenate([d16, dmin16], axis=1).view(np.uint8)
    return q.reshape(len(q), SUPER), scales.astype(np.uint8), minima.astype(np.uint8), heads


def _encode_q6_k(x: Floats) -> Bytes:
    q, scales, d = _round_symmetric(x.reshape(-1, 16, 16), -32, 31, -128, GRIDS["q6_k"])
    codes = (q + 32).astype(np.uint8)
    ql = _pack((codes & 15).reshape(-1, 2, 2, 64), 4)
    qh = _pack((codes >> 4).reshape(-1, 2, 4, 32), 2)
    return np.concatenate([ql, qh, scales.view(np.uint8), d], axis=1)


def _encode_q5_k(x: Floats) -> Bytes:
    codes, scales, minima, heads = _round_affine(x.reshape(-1, 8, 32), 31, 63, GRIDS["q5_k"])
    high = _pack((codes >> 4).reshape(-1, 1, 8, 32), 1)
    low = _pack((codes & 15).reshape(-1, 4, 2, 32), 4)
    return np.concatenate([heads, _pack_6_bit(scales, minima), high, low], axis=1)


def _encode_q4_k(x: Floats) -> Bytes:
    codes, scales, minima, heads = _round_affine(x.reshape(-1, 8, 32), 15, 63, GRIDS["q4_k"])
    packed = _pack(codes.reshape(-1, 4, 2, 32), 4)
    return np.concatenate([heads, _pack_6_bit(scales, minima), packed], axis=1)


def _encode_q3_k(x: Floats) -> Bytes:
    q, signed_scales, d = _round_symmetric(x.reshape(-1, 16, 16), -4, 3, -32, GRIDS["q3_k"])
    codes = (q + 4).astype(np.uint8)
    scales = (signed_scales + 32).astype(np.uint8)
    mask = _pack((codes >> 2).reshape(-1, 1, 8, 32), 1)
    low = _pack((codes & 3).reshape(-1, 2, 4, 32), 2)
    scales_low = _pack((scales & 15).reshape(-1, 1, 2, 8), 4)
    scales_high = _pack((scales >> 4).reshape(-1, 1, 4, 4), 2)
    return np.concatenate([mask, low, scales_low, scales_high, d], axis=1)


def _encode_q2_k(x: Floats) -> Bytes:
    codes, scales, minima, heads = _round_affine(x.reshape(-1, 16, 16), 3, 15, GRIDS["q2_k"])
    both = _pack(np.stack([scales, minima], axis=1)[:, None], 4)
    return np.concatenate([both, _pack(codes.reshape(-1, 2, 4, 32), 2), heads], axis=1)


def _pack(codes_NXKI: Codes, bits: int) -> Bytes:
    """Values below 2**bits, (N, X, K, I) -> (N, X * I): K values to a byte, the first lowest."""
    shifts = np.arange(codes_NXKI.shape[2], dtype=np.uint8) * np.uint8(bits)
    packed = np.bitwise_or.reduce(codes_NXKI << shifts[:, None], axis=2)
    return packed.reshape(len(packed), -1)


def _pack_6_bit(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of 6 bits -> 12 bytes (ggml `get_scale_min_k4`, inverted).

    The first four keep their six bits; the last four lend their upper two to the first four.
    """
    both = np.stack([scales, minima], axis=1)  # (N, 2, 8)
    first = both[:, :, :4] | np.left_shift(both[:, :, 4:] >> 4, np.uint8(6))
    last = _pack((both[:, :, 4:] & 15)[:, None], 4)
    return np.concatenate([first.reshape(len(first), 8), last], axis=1)


def _float16(values: Floats) -> NDArray[np.float16]:
    return values.astype(np.float16)


def divide(a: "Floats | float", b: Floats) -> Floats:
    """a / b in float32, and 0 where b is 0."""
    out = np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32)
    return np.divide(a, b, out=out, where=b != 0, dtype=np.float32)
