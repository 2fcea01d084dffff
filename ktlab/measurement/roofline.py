"""The ceiling of this machine, measured: float32 matrix product and reading from memory.

A time has a floor, max(operations / peak, bytes / bandwidth); a measured time is set beside it.
Bandwidth depends on where the bytes lie, so several buffer sizes are read, and a model is held
against the one it fits: a small model lives in the processor's cache.
Source: Williams, Waterman, Patterson 2009, the roofline model (CACM 52:65).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from ktlab import hardware, html
from ktlab.record import Record

MIB = 1 << 20
BUFFER_BYTES = (2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
GEMM_SIZE = 1024
OVERHEAD_SHARE = 0.10
"""Below this share of both ceilings, neither is what holds: calls and Python are."""


@dataclass(frozen=True, kw_only=True)
class Bound(Record):
    """A measured time beside its floor."""

    floor_s: float
    """Least time that the machine's ceilings allow."""
    compute_share: float
    """Time that the operations need at the peak, over the time measured; likewise for bytes."""
    bandwidth_share: float
    name: str
    """What holds it: "compute", "bandwidth", or "calls" where both shares are under 10 %."""

    @property
    def share(self) -> float:
        """Of the ceiling that is nearer, 0..1 (above 1: the model of the work is too simple)."""
        return max(self.compute_share, self.bandwidth_share)

    def __str__(self) -> str:
        share = 100 * self.share
        return f"{share:.{0 if share >= 1 else 2}f} % of the ceiling, bound: {self.name}"


@dataclass(frozen=True, kw_only=True)
class Ceilings(Record):
    """What this machine reached at best with `threads` threads of torch."""

    gemm_flops: float
    """float32 matrix product, FLOP/s (a multiply and an add count as two)."""
    bandwidth: dict[str, float]
    """Bytes/s of reading a buffer, by the buffer's bytes (as text: JSON keys)."""
    threads: int
    seconds: float
    """What measuring took."""

    @property
    def read_bandwidth(self) -> float:
        """Bytes/s from the largest buffer: memory, not cache."""
        return self.bandwidth[max(self.bandwidth, key=int)]

    def bandwidth_for(self, working_bytes: float) -> float:
        """Bytes/s of the largest buffer that is no larger than `working_bytes`."""
        fitting = [size for size in self.bandwidth if int(size) <= working_bytes]
        return self.bandwidth[max(fitting or [min(self.bandwidth, key=int)], key=int)]

    def bound(self, *, flop: float, nbytes: float, working_bytes: float, seconds: float) -> Bound:
        """`seconds` measured for `flop` operations on `nbytes` out of `working_bytes`."""
        compute_s = flop / self.gemm_flops
        bytes_s = nbytes / self.bandwidth_for(working_bytes)
        floor = max(compute_s, bytes_s)
        name = "compute" if compute_s >= bytes_s else "bandwidth"
        return Bound(
            floor_s=floor,
            compute_share=compute_s / seconds,
            bandwidth_share=bytes_s / seconds,
            name="calls" if floor / seconds < OVERHEAD_SHARE else name,
        )

    def rows(self) -> list[tuple[str, str]]:
        """(what, rate) for printing."""
        reads = sorted(self.bandwidth.items(), key=lambda item: int(item[0]))
        return [
            ("float32 matrix product", html.quantity(self.gemm_flops, "FLOP/s")),
            *(
                (f"read, {html.byte_size(int(size))} buffer", html.quantity(rate, "B/s"))
                for size, rate in reads
            ),
        ]

    def __str__(self) -> str:
        lines = [f"  {what:28} {rate}" for what, rate in self.rows()]
        return "\n".join([f"Ceilings, {self.threads} threads, best of several tries", *lines])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        title = f"ceilings of this machine, {self.threads} threads, best of several tries"
        return html.mimebundle(str(self), html.card(title, html.table(self.rows())))


_measured: dict[int, Ceilings] = {}
_lock = threading.Lock()


def measure_machine(*, refresh: bool = False) -> Ceilings:
    """Measure, about one second; kept for this process and number of threads.

    The best of several tries counts, for a ceiling is what is possible; other programs that run
    meanwhile lower it all the same. `refresh=True` measures again.
    """
    threads = torch.get_num_threads()
    with _lock:
        if refresh or threads not in _measured:
            start = perf_counter()
            flops, bandwidth = _gemm_flops(), _read_bandwidth()
            _measured[threads] = Ceilings(
                gemm_flops=flops,
                bandwidth=bandwidth,
                threads=threads,
                seconds=perf_counter() - start,
            )
        return _measured[threads]


def _best(action: Callable[[], object], budget_s: float) -> float:
    """Shortest time of `action` in seconds, over at least 3 tries and about `budget_s`."""
    action()  # warm-up
    best, spent, tries = float("inf"), 0.0, 0
    while tries < 3 or spent < budget_s:
        start = perf_counter()
        action()
        took = perf_counter() - start
        best, spent, tries = min(best, took), spent + took, tries + 1
    return best


def _gemm_flops() -> float:
    left, right = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    out = torch.empty(GEMM_SIZE, GEMM_SIZE)
    return 2 * GEMM_SIZE**3 / _best(lambda: torch.mm(left, right, out=out), 0.25)


def _read_bandwidth() -> dict[str, float]:
    """Reading as a matrix-vector product and as a sum does it; the faster of the two.

    Largest first: a smaller buffer cannot be slower to read, only its call weighs more.
    """
    available = hardware.memory().available or 1024 * MIB
    sizes = [size for size in BUFFER_BYTES if size <= available // 4] or [BUFFER_BYTES[0]]
    buffer = torch.ones(max(sizes) // 4)
    vector, rates, reached = torch.ones(1024), {}, 0.0
    for size in reversed(sizes):
        part = buffer[: size // 4]
        matrix = part.view(-1, 1024)
        fastest = min(_best(part.sum, 0.05), _best(lambda m=matrix: m @ vector, 0.05))  # type: ignore[misc]
        reached = max(reached, size / fastest)
        rates[str(size)] = reached
    return rates
