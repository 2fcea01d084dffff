"""Matrix products and expert banks with Numba: every format, both layouts, no compiler needed.

T tokens, D hidden, E experts, K selected (or columns of one matrix), N rows, F expert width; P
rows of work: a token at one of its experts, sorted by expert.

Up to `few` tokens of an expert are computed fused, straight from the codes; more share one decoding
of its weights. Activations stay float32: errors are those of float32 sums, 1e-6 relative.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.kernels import codings
from ktlab.kernels.codings import GROUP
from ktlab.kernels.numba_formats import RUN, spec
from ktlab.kernels.numba_plan import BATCH, COUNT, SIZE, START, cut, plan
from ktlab.kernels.numba_products import products, scratch
from ktlab.kernels.numba_rows import NOBODY, add_rows, lay_out, swiglu
from ktlab.kernels.numba_workers import share
from ktlab.kernels.threads import default_threads
from ktlab.kernels.weights import PACKED, Weights, aligned_bytes

FORMATS = codings.FORMATS

FEW = 2
"""Up to so many tokens of an expert the fused product is the faster one, or as fast.

Measured on one core of a Sapphire Rapids Xeon, weights in its cache, rows of 7168: two tokens take,
in ns for 256 weights, packed Q4_K 61 fused and 62 decoded, Q8_0 47 and 52; in blocks Q4_K 65 and
67, Q8_0 64 and 72. Fused time grows with each token, decoded time hardly: eight take 60 to 80.
"""
SERIAL = 1 << 21
"""Below so many products (weights times tokens) one thread does everything: waking another takes
some 50 us."""
TASKS = 8
"""Tasks for each thread, so that none waits long for the last one."""
ROWS_AT_ONCE = 1024
"""Rows P in flight at most, unless one expert alone has more: 30 MB of activations at D = 7168."""
Table = NDArray[np.int64]
"""Groups of `numba_plan`, one row an expert that has tokens."""


def linear(
    weight: Weights,
    x_TK: NDArray[np.float32],
    few: int = FEW,
    threads: int | None = None,
    expert: int = 0,
) -> NDArray[np.float32]:
    """x W^T, (T, N) float32, for matrix `expert` of the stack.

    `threads`: None is one a core.
    """
    x_TK = _activations(x_TK, weight.cols)
    tokens = len(x_TK)
    weight.expert(expert)  # complains if there is none
    y_TN = np.empty((tokens, weight.rows), np.float32)
    if not y_TN.size:
        return y_TN
    ids = np.full((tokens, 1), expert, np.int64)
    groups, token_P, _, _, _ = plan(
        ids, np.ones((tokens, 1), np.float32), weight.experts, few, tokens
    )
    y_PN = y_TN if len(token_P) == tokens else np.empty((len(token_P), weight.rows), np.float32)
    _multiply((weight,), groups, x_TK, token_P, y_PN, _threads(threads))
    return y_PN[:tokens]


def moe(
    gate: Weights,
    up: Weights,
    down: Weights,
    hidden_TD: NDArray[np.float32],
    ids_TK: NDArray[np.int64],
    weights_TK: NDArray[np.float32],
    few: int = FEW,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """sum over k of weights[t, k] * down(silu(gate(x)) * up(x)) of expert ids[t, k], as float32.

    `gate` and `up` are E x (F x D), `down` is E x (D x F), in any formats and layouts; an id of -1
    is nobody, a repeated one counts again. `threads` as in `linear`.
    """
    hidden_TD = _activations(hidden_TD, gate.cols)
    _check_bank(gate, up, down)
    ids_TK, weights_TK = _routing(ids_TK, weights_TK, len(hidden_TD))
    threads = _threads(threads)
    groups, token_P, weight_P, lowest, highest = plan(
        ids_TK, weights_TK, gate.experts, few, ROWS_AT_ONCE
    )
    if lowest < -1 or highest >= gate.experts:
        raise SettingError(
            f"expected expert ids from -1 (nobody) to {gate.experts - 1}, found "
            f"{lowest if lowest < -1 else highest}"
        )
    out_TD = np.zeros((len(hidden_TD), down.rows), np.float32)
    for first, last in _batches(groups):
        own = groups[first:last]
        rows = slice(own[0, BATCH], own[0, BATCH] + own[-1, START] + own[-1, SIZE])
        bank = (gate, up, down)
        _experts(bank, own, hidden_TD, token_P[rows], weight_P[rows], out_TD, threads)
    return out_TD


def _experts(
    bank: tuple[Weights, Weights, Weights], groups: Table, hidden_TD: NDArray[np.float32],
    token_P: NDArray[np.int64], weight_P: NDArray[np.float32], out_TD: NDArray[np.float32],
    threads: int,
) -> None:  # fmt: skip
    """Some experts for all their tokens, added to `out_TD`."""
    gate, up, down = bank
    rows, width, hidden = len(token_P), gate.rows, down.rows
    both_P2F = np.empty((rows, 2 * width), np.float32)
    _multiply((gate, up), groups, hidden_TD, token_P, both_P2F, threads)
    # An exponential and a division cost about as much as eight products.
    workers = threads if 8 * rows * width > SERIAL else 1
    _split(workers, rows, 1, lambda a, b: swiglu(both_P2F, weight_P, a, b))
    row_P = np.where(token_P == NOBODY, NOBODY, np.arange(rows))
    y_PD = np.empty((rows, hidden), np.float32)
    _multiply((down,), groups, both_P2F, row_P, y_PD, threads)
    workers = threads if rows * hidden > SERIAL else 1
    _split(workers, hidden, RUN, lambda a, b: add_rows(y_PD, token_P, out_TD, a, b))


def _multiply(
    matrices: tuple[Weights, ...], groups: Table, source: NDArray[np.float32],
    source_P: NDArray[np.int64], y: NDArray[np.float32], threads: int,
) -> None:  # fmt: skip
    """y = x W^T for one matrix or two side by side, x being rows `source_P` of `source`."""
    cols, rows = matrices[0].cols, len(y)
    padded = -(-cols // GROUP) * GROUP
    x = aligned_bytes(4 * rows * padded).view(np.float32).reshape(rows, padded)
    formats = tuple(m.format for m in matrices)
    with_sums = any(map(_has_minima, formats))
    sums = np.empty(rows * padded // RUN if with_sums else 1, np.float32)
    counts = groups[:, COUNT]
    amount = cols * sum(m.rows for m in matrices) * int(counts.sum())
    threads = threads if amount > SERIAL else 1
    # Uncut for one thread: no product has more than `amount`.
    size = amount // (threads * TASKS) if threads > 1 else amount
    tasks = cut(groups, _table(matrices), size)
    specs, largest = _specs(formats, cols), int(counts.max())
    at, stride = source.ctypes.data, source.strides[0]

    def compute(pieces: Iterator[tuple[int, int]]) -> None:
        work = scratch(largest)
        first, last = matrices[0].address, matrices[-1].address
        for a, b in pieces:
            products(tasks, a, b, specs, first, last, cols, x, sums, y, work)

    _split(
        threads, len(groups), 1,
        lambda a, b: lay_out(at, stride, cols, source_P, groups, a, b, x, padded, sums, with_sums),
    )  # fmt: skip
    pieces = [(0, len(tasks))] if threads == 1 else [(i, i + 1) for i in range(len(tasks))]
    share(threads, pieces, compute)


def _batches(groups: Table) -> list[tuple[int, int]]:
    """[first, last) groups of each batch."""
    if not len(groups) or not groups[-1, BATCH]:
        return [(0, len(groups))] if len(groups) else []
    starts = np.flatnonzero(np.diff(groups[:, BATCH], prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _split(threads: int, count: int, unit: int, work: Callable[[int, int], object]) -> None:
    """work(first, last) for [0, count), shared in pieces of a multiple of `unit`."""
    if threads == 1:
        work(0, count)
        return
    step = max(unit, -(-count // (threads * TASKS) // unit) * unit)

    def worker(starts: Iterator[int]) -> None:
        for start in starts:
            work(start, min(start + step, count))

    share(threads, range(0, count, step), worker)


def _table(matrices: tuple[Weights, ...]) -> Table:
    """Matrices side by side, as `numba_plan` takes them."""
    rows, column = [], 0
    for m in matrices:
        rows.append((m.rows, m.cols, m.expert_stride, m.layout == PACKED, column))
        column += m.rows
    return np.array(rows, np.int64)


def _has_minima(format: str) -> bool:
    return format in codings.CODINGS and codings.CODINGS[format].dmin_offset >= 0


@lru_cache(maxsize=256)
def _specs(formats: tuple[str, ...], cols: int) -> NDArray[np.int64]:
    return np.stack([spec(format, cols) for format in formats])


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads


def _activations(x: NDArray[np.float32], cols: int) -> NDArray[np.float32]:
    if x.ndim != 2 or x.shape[1] != cols:
        raise SettingError(f"expected activations of (tokens, {cols}), found {x.shape}")
    return np.ascontiguousarray(x, np.float32)


def _check_bank(gate: Weights, up: Weights, down: Weights) -> None:
    shapes = [(m.experts, m.rows, m.cols) for m in (gate, up, down)]
    experts, width, hidden = shapes[0]
    if shapes[1:] != [(experts, width, hidden), (experts, hidden, width)]:
        raise SettingError(
            "expected gate and up of (experts, width, hidden) and down of (experts, hidden, width),"
            f" found {', '.join(map(str, shapes))}"
        )


def _routing(
    ids_TK: NDArray[np.int64], weights_TK: NDArray[np.float32], tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Checked copies, so that compiled code sees one kind of array only."""
    if ids_TK.ndim != 2 or len(ids_TK) != tokens or weights_TK.shape != ids_TK.shape:
        raise SettingError(
            f"expected ids and weights of ({tokens}, selected), found {ids_TK.shape} and "
            f"{weights_TK.shape}"
        )
    return np.array(ids_TK, np.int64, order="C"), np.array(weights_TK, np.float32, order="C")
