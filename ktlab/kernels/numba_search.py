"""The search for scales and minima of `quantization.kquants`, compiled: 16 sub-blocks side by side.

A lane is a sub-block, so every operation of the reference is one here, in the same order, and
results have the same bits. x is [element][16 sub-blocks] float32; `count` elements (16 or 32).
`x`, `work`, `grid` are addresses; sums over elements are those of NumPy (`_sum`) and of
`kquants.dot`.
"""

from typing import Any

import numpy as np

from ktlab.kernels.numba_jit import folded, inner
from ktlab.kernels.numba_rounding import (
    magnitude,
    nearest_whole,
    over,
    root,
    where_less,
)
from ktlab.kernels.numba_vectors import add, load_f32, load_f32x16, minus, splat, store, times

ROW = 64
"""Bytes of one element of all lanes."""
MOST = 32
# What the search keeps in a worker's scratch: four arrays like x.
WEIGHT = 0
WEIGHT_X = WEIGHT + MOST * ROW
RAISED = WEIGHT_X
"""The affine search uses one of the two, the symmetric the other."""
Q = RAISED + MOST * ROW
WEIGHT_Q = Q + MOST * ROW
SEARCH = WEIGHT_Q + MOST * ROW
"""Bytes of all."""


@inner
def _sum(a: Any, count: Any) -> Any:
    """Over elements, in the order of NumPy's pairwise summation of up to 128 numbers."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(np.float32(0.0))
    for p in range(a, a + ROW * count, 8 * ROW):
        s0, s1 = add(s0, load_f32x16(p)), add(s1, load_f32x16(p + ROW))
        s2, s3 = add(s2, load_f32x16(p + 2 * ROW)), add(s3, load_f32x16(p + 3 * ROW))
        s4, s5 = add(s4, load_f32x16(p + 4 * ROW)), add(s5, load_f32x16(p + 5 * ROW))
        s6, s7 = add(s6, load_f32x16(p + 6 * ROW)), add(s7, load_f32x16(p + 7 * ROW))
    return add(add(add(s0, s1), add(s2, s3)), add(add(s4, s5), add(s6, s7)))


@folded
def _with_product(found: Any, a: Any, b: Any) -> Any:
    return add(found, times(load_f32x16(a), load_f32x16(b)))


@folded
def _every_fourth(found: Any, a: Any, b: Any) -> Any:
    """Of 16 elements the products of number 12, 8, 4 and 0, added in this order."""
    found = _with_product(found, a + 12 * ROW, b + 12 * ROW)
    found = _with_product(found, a + 8 * ROW, b + 8 * ROW)
    found = _with_product(found, a + 4 * ROW, b + 4 * ROW)
    return _with_product(found, a, b)


@inner
def _dot(a: Any, b: Any, count: Any) -> Any:
    """Sum of products over elements, in the order of `kquants.dot`."""
    s0 = s1 = s2 = s3 = splat(np.float32(0.0))
    for p in range(0, ROW * count, 16 * ROW):
        s0 = _every_fourth(s0, a + p, b + p)
        s1 = _every_fourth(s1, a + p + ROW, b + p + ROW)
        s2 = _every_fourth(s2, a + p + 2 * ROW, b + p + 2 * ROW)
        s3 = _every_fourth(s3, a + p + 3 * ROW, b + p + 3 * ROW)
    return add(add(s0, s1), add(s2, s3))


@inner
def codes(x: Any, offset: Any, inverse: Any, low: Any, high: Any, count: Any, q: Any) -> Any:
    """(x + offset) * inverse rounded to whole numbers in low..high, as floats at q."""
    low16, high16 = splat(low), splat(high)
    for i in range(count):
        value = times(add(load_f32x16(x + ROW * i), offset), inverse)
        value = where_less(value, low16, low16, value)
        value = where_less(high16, value, high16, value)
        store(q + ROW * i, nearest_whole(value))


@folded
def _weigh(work: Any, count: Any) -> Any:
    for i in range(count):
        value = times(load_f32x16(work + WEIGHT + ROW * i), load_f32x16(work + Q + ROW * i))
        store(work + WEIGHT_Q + ROW * i, value)


@inner
def extremes(x: Any, count: Any) -> Any:
    """Of each sub-block the element of the largest magnitude, the first of equals."""
    found = load_f32x16(x)
    for i in range(1, count):
        value = load_f32x16(x + ROW * i)
        found = where_less(magnitude(found), magnitude(value), value, found)
    return found


@inner
def search_symmetric(
    x: Any, count: Any, low: Any, high: Any, grid: Any, steps: Any, work: Any
) -> Any:
    """Scales such that x ~ scale * q with q in low..high (`kquants._search_symmetric`)."""
    none = splat(np.float32(0.0))
    for i in range(count):
        value = load_f32x16(x + ROW * i)
        weight = times(value, value)
        store(work + WEIGHT + ROW * i, weight)
        store(work + WEIGHT_X + ROW * i, times(weight, value))
    extreme = extremes(x, count)
    best_gain, best_scale = none, none
    for step in range(steps):
        inverse = over(splat(load_f32(grid + 4 * step)), extreme)
        codes(x, none, inverse, low, high, count, work + Q)
        _weigh(work, count)
        product = _dot(work + WEIGHT_X, work + Q, count)
        power = _dot(work + WEIGHT_Q, work + Q, count)
        gain = over(times(product, product), power)
        best_scale = where_less(best_gain, gain, over(product, power), best_scale)
        best_gain = where_less(best_gain, gain, gain, best_gain)
    return best_scale


@inner
def search_affine(x: Any, count: Any, high: Any, grid: Any, steps: Any, work: Any) -> Any:
    """Scales, returned, and minima, at `work` + `WEIGHT`, such that x ~ scale * q - minimum with q
    in 0..high (`kquants._search_affine`)."""
    none, two = splat(np.float32(0.0)), splat(np.float32(2.0))
    lowest, top = none, none
    for i in range(count):
        value = load_f32x16(x + ROW * i)
        lowest = where_less(value, lowest, value, lowest)
        top = where_less(top, value, value, top)
        store(work + WEIGHT_Q + ROW * i, times(value, value))
    mean = times(_sum(work + WEIGHT_Q, count), splat(np.float32(1.0) / np.float32(count)))
    rms = root(mean)
    for i in range(count):
        value = load_f32x16(x + ROW * i)
        weight = add(magnitude(value), rms)
        store(work + WEIGHT + ROW * i, weight)
        store(work + WEIGHT_Q + ROW * i, times(weight, value))
        store(work + RAISED + ROW * i, minus(value, lowest))
    w, wx = _sum(work + WEIGHT, count), _sum(work + WEIGHT_Q, count)
    wxx = _dot(work + WEIGHT_Q, x, count)
    width = minus(top, lowest)

    best_scale, best_minimum = over(width, splat(high)), minus(none, lowest)
    best_cost = splat(np.float32(np.inf))
    for step in range(steps):
        inverse = over(splat(load_f32(grid + 4 * step)), width)
        codes(work + RAISED, none, inverse, np.float32(0.0), high, count, work + Q)
        _weigh(work, count)
        wq = _sum(work + WEIGHT_Q, count)
        wqq = _dot(work + WEIGHT_Q, work + Q, count)
        wqx = _dot(work + WEIGHT_Q, x, count)
        determinant = minus(times(w, wqq), times(wq, wq))
        scale = over(minus(times(w, wqx), times(wx, wq)), determinant)
        minimum = over(minus(times(wq, wqx), times(wqq, wx)), determinant)
        alone = over(wqx, wqq)
        least = times(times(splat(np.float32(1e-3)), w), wqq)
        scale = where_less(minimum, none, alone, where_less(determinant, least, alone, scale))
        minimum = where_less(minimum, none, none, where_less(determinant, least, none, minimum))
        inside = minus(times(scale, wqq), times(two, add(times(minimum, wq), wqx)))
        outside = add(times(minimum, w), times(two, wx))
        cost = add(add(times(scale, inside), times(minimum, outside)), wxx)
        # A scale that is not above 0 is none.
        cost = where_less(none, scale, cost, best_cost)
        best_scale = where_less(cost, best_cost, scale, best_scale)
        best_minimum = where_less(cost, best_cost, minimum, best_minimum)
        best_cost = where_less(cost, best_cost, cost, best_cost)
    store(work + WEIGHT, best_minimum)
    return best_scale
