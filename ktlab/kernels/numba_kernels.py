"""Matrix products and expert banks with Numba: every format, both layouts, no compiler needed.

T tokens, D hidden, E experts, K selected (or columns of one matrix), N rows, F expert width; P
rows of work: a token at one of its experts, sorted by expert.

Up to `few` tokens of an expert are computed fused, straight from the codes; more share one decoding
of its weights. Activations stay float32: errors are those of float32 sums, 1e-6 relative.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.kernels import codings
from ktlab.kernels.codings import GROUP
from ktlab.kernels.numba_formats import RUN, spec
from ktlab.kernels.numba_products import PANELS, products, scratch
from ktlab.kernels.numba_rows import NOBODY, add_rows, lay_out, swiglu
from ktlab.kernels.numba_tiles import NARROW
from ktlab.kernels.numba_workers import share
from ktlab.kernels.weights import PACKED, Weights, aligned_bytes

FORMATS = codings.FORMATS

FEW = 2
"""Up to so many tokens of an expert the fused product is the faster one.

Measured, Q4_K and Q8_0 of 2048 x 7168, one core: two tokens take 91 and 85 ns per 256 weights
fused, 86 and 91 decoded (packed); 106 and 114 fused, 139 and 137 decoded (blocks).
"""
SERIAL = 1 << 21
"""Below so many products (weights times tokens) one thread does everything: waking another takes
some 50 us."""
TASKS = 8
"""Tasks for each thread, so that none waits long for the last one."""
ROWS_AT_ONCE = 1024
"""Rows P in flight at most, unless one expert alone has more: 30 MB of activations at D = 7168."""
BLOCK = PANELS * codings.PANEL
"""Rows of a task are a multiple of this where weights are decoded, of 16 where they are not."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The rows of one expert: [first, first + size) of which `tokens` are real."""

    expert: int
    first: int
    size: int
    tokens: int
    fused: bool


def linear(
    weight: Weights,
    x_TK: NDArray[np.float32],
    few: int = FEW,
    threads: int | None = None,
    expert: int = 0,
) -> NDArray[np.float32]:
    """x W^T, (T, N) float32, for matrix `expert` of the stack.

    `threads`: None takes Numba's own setting (`numba.set_num_threads`).
    """
    x_TK = _activations(x_TK, weight.cols)
    tokens = len(x_TK)
    weight.expert(expert)  # complains if there is none
    y_TN = np.empty((tokens, weight.rows), np.float32)
    if not y_TN.size:
        return y_TN
    group = _group(expert, 0, tokens, few)
    source_P = np.full(group.size, NOBODY, np.int64)
    source_P[:tokens] = np.arange(tokens)
    y_PN = y_TN if group.size == tokens else np.empty((group.size, weight.rows), np.float32)
    _multiply([weight], [group], x_TK, source_P, y_PN, _threads(threads))
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
    ids_TK, weights_TK = _check_routing(ids_TK, weights_TK, len(hidden_TD), gate.experts)
    threads = _threads(threads)
    out_TD = np.zeros((len(hidden_TD), down.rows), np.float32)
    flat_ids = ids_TK.reshape(-1)
    order = np.argsort(flat_ids, kind="stable")
    order = order[np.count_nonzero(flat_ids < 0) :]
    counts_E = np.bincount(flat_ids[order], minlength=gate.experts)
    token_of_row = order // max(1, ids_TK.shape[1])
    weight_of_row = weights_TK.reshape(-1)[order]
    taken = 0
    for groups in _batches(counts_E, few):
        rows = groups[-1].first + groups[-1].size
        token_P = np.full(rows, NOBODY, np.int64)
        weight_P = np.zeros(rows, np.float32)
        for group in groups:
            own = slice(group.first, group.first + group.tokens)
            token_P[own] = token_of_row[taken : taken + group.tokens]
            weight_P[own] = weight_of_row[taken : taken + group.tokens]
            taken += group.tokens
        _experts(gate, up, down, groups, hidden_TD, token_P, weight_P, out_TD, threads)
    return out_TD


def _experts(
    gate: Weights, up: Weights, down: Weights, groups: list[_Group],
    hidden_TD: NDArray[np.float32], token_P: NDArray[np.int64], weight_P: NDArray[np.float32],
    out_TD: NDArray[np.float32], threads: int,
) -> None:  # fmt: skip
    """Some experts for all their tokens, added to `out_TD`."""
    rows, width, hidden = len(token_P), gate.rows, down.rows
    both_P2F = np.empty((rows, 2 * width), np.float32)
    _multiply([gate, up], groups, hidden_TD, token_P, both_P2F, threads)
    both, out = both_P2F.ctypes.data, out_TD.ctypes.data
    # An exponential and a division cost about as much as eight products.
    workers = threads if 8 * rows * width > SERIAL else 1

    def activate(pieces: Iterator[tuple[int, int]]) -> None:
        for first, last in pieces:
            swiglu(both, width, weight_P, first, last)

    share(workers, _ranges(rows, workers, 1), activate)
    row_P = np.where(token_P == NOBODY, NOBODY, np.arange(rows))
    y_PD = np.empty((rows, hidden), np.float32)
    _multiply([down], groups, both_P2F, row_P, y_PD, threads)
    y = y_PD.ctypes.data

    def collect(pieces: Iterator[tuple[int, int]]) -> None:
        for first, last in pieces:
            add_rows(y, hidden, token_P, out, first, last)

    workers = threads if rows * hidden > SERIAL else 1
    share(workers, _ranges(hidden, workers, RUN), collect)


def _multiply(
    matrices: list[Weights], groups: list[_Group], source: NDArray[np.float32],
    source_P: NDArray[np.int64], y: NDArray[np.float32], threads: int,
) -> None:  # fmt: skip
    """y = x W^T for one matrix or two side by side, x being rows `source_P` of `source`."""
    cols = matrices[0].cols
    padded = -(-cols // GROUP) * GROUP
    rows = len(y)
    x = aligned_bytes(4 * rows * padded).view(np.float32).reshape(rows, padded)
    minima = any(
        m.format in codings.CODINGS and codings.CODINGS[m.format].dmin_offset >= 0 for m in matrices
    )
    sums = np.empty(rows * padded // RUN if minima else 1, np.float32)
    specs = _specs(tuple(m.format for m in matrices), cols)
    work_amount = cols * sum(m.rows for m in matrices) * sum(g.tokens for g in groups)
    threads = threads if work_amount > SERIAL else 1
    tasks = _tasks(matrices, groups, work_amount // (threads * TASKS) if threads > 1 else 0)
    first, last = matrices[0].data.ctypes.data, matrices[-1].data.ctypes.data
    largest = max(g.tokens for g in groups)

    def prepare(pieces: Iterator[_Group]) -> None:
        sums_at = sums.ctypes.data if minima else 0
        for g in pieces:
            lay_out(
                source.ctypes.data, source.strides[0], cols, source_P,
                (g.first, g.size, int(g.fused)), x.ctypes.data, padded, sums_at,
            )  # fmt: skip

    def compute(pieces: Iterator[tuple[int, int]]) -> None:
        work = scratch(largest)
        for start, end in pieces:
            products(tasks, start, end, specs, first, last, cols, x, sums, y, work)

    share(threads if len(groups) > 1 else 1, groups, prepare)
    whole = [(0, len(tasks))]
    share(threads, whole if threads == 1 else ((i, i + 1) for i in range(len(tasks))), compute)


def _tasks(matrices: list[Weights], groups: list[_Group], size: int) -> NDArray[np.int64]:
    """Rows of matrices times groups, cut into about `size` products each; 0: not cut."""
    found = []
    for g in groups:
        unit = codings.PANEL if g.fused else BLOCK
        column = 0
        for i, m in enumerate(matrices):
            step = -(-size // max(1, m.cols * g.tokens) // unit) * unit if size else m.rows
            base = g.expert * m.expert_stride
            for row in range(0, m.rows, max(step, unit)):
                last = min(row + max(step, unit), m.rows)
                found.append(
                    (i, base, row, last, g.first, g.tokens, column, m.layout == PACKED, g.fused)
                )
            column += m.rows
    return np.array(found, np.int64)


def _group(expert: int, first: int, tokens: int, few: int) -> _Group:
    fused = tokens <= few
    size = tokens if fused else -(-tokens // NARROW) * NARROW
    return _Group(expert=expert, first=first, size=size, tokens=tokens, fused=fused)


def _batches(counts_E: NDArray[np.int64], few: int) -> Iterator[list[_Group]]:
    """The experts that have tokens, in order, in portions of at most `ROWS_AT_ONCE` rows."""
    groups: list[_Group] = []
    first = 0
    for expert in np.flatnonzero(counts_E).tolist():
        group = _group(expert, first, int(counts_E[expert]), few)
        if groups and first + group.size > ROWS_AT_ONCE:
            yield groups
            groups, first = [], 0
            group = _group(expert, 0, group.tokens, few)
        groups.append(group)
        first += group.size
    if groups:
        yield groups


def _ranges(count: int, parts: int, unit: int) -> list[tuple[int, int]]:
    """[0, count) in about `parts` pieces of a multiple of `unit`."""
    step = max(unit, -(-count // parts // unit) * unit)
    return [(i, min(i + step, count)) for i in range(0, count, step)]


@lru_cache(maxsize=256)
def _specs(formats: tuple[str, ...], cols: int) -> NDArray[np.int64]:
    return np.stack([spec(format, cols) for format in formats])


def _threads(threads: int | None) -> int:
    return numba.get_num_threads() if threads is None else threads


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


def _check_routing(
    ids_TK: NDArray[np.int64], weights_TK: NDArray[np.float32], tokens: int, experts: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if ids_TK.ndim != 2 or len(ids_TK) != tokens or weights_TK.shape != ids_TK.shape:
        raise SettingError(
            f"expected ids and weights of ({tokens}, selected), found {ids_TK.shape} and "
            f"{weights_TK.shape}"
        )
    if ids_TK.size and not -1 <= ids_TK.min() <= ids_TK.max() < experts:
        raise SettingError(
            f"expected expert ids from -1 (nobody) to {experts - 1}, found {ids_TK.min()} to "
            f"{ids_TK.max()}"
        )
    return np.asarray(ids_TK, np.int64), np.asarray(weights_TK, np.float32)
