"""Contenders take turns at one number of tokens, and the ceilings with them."""

import math
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ktlab import hardware
from ktlab.kernels import ceilings, native
from ktlab.measurement.contenders import Contender
from ktlab.measurement.peers.client import PeerError
from ktlab.measurement.roofline import measure_machine

ROUND_S = 0.1
"""A round repeats a contender for about so long, once at least."""
MOST_REPEATS = 20
HOPELESS = 1.5
"""A layout that takes so many times longer than its group's best in the warm-up is let go."""
CACHES = 4
"""Reading is measured on a buffer of so many times the last-level cache."""
LEAST_BUFFER, LARGEST_BUFFER = 256 << 20, 1 << 30
LEAST_ROUNDS = 3
"""With fewer, quartiles say nothing."""
LOADING = ", tile loads included"
"""Of a rate's name: what AMX can give at most in any product of matrices."""

Progress = Callable[[str], None]


class Rates:
    """The ceilings of this process, measured again in every round.

    A case is a median of rounds, and so is what it is held against: the ceiling's median over the
    same rounds (`bound`). On a shared machine the best moment of a ceiling says more of the
    neighbours than of the kernel; `best` keeps it, as the machine's.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.best: dict[str, float] = {}
        self._rounds: dict[str, list[float]] = {}
        wanted = max(LEAST_BUFFER, CACHES * (hardware.cache_bytes() or 0))
        self._buffer_bytes = min(wanted, LARGEST_BUFFER)
        self._buffer: NDArray[np.uint8] | None = None

    def begin(self) -> None:
        """New rounds: what was measured before bounds nothing of theirs."""
        self._rounds = {}

    def measure(self, contenders: Sequence[Contender]) -> None:
        """Once more: reading, and the arithmetic of every contender."""
        if native.unavailable():
            machine = measure_machine(refresh=True)
            self._note("read", machine.read_bandwidth)
            self._note("float32", machine.gemm_flops)
            return
        if self._buffer is None:
            self._buffer = np.ones(self._buffer_bytes, np.uint8)
        self._note("read", ceilings.reading(self._buffer, self.threads))
        self._note("float32", ceilings.float32(self.threads))
        for isa in sorted({c.peak_isa for c in contenders} - {""}):
            if ceilings.usable(isa):
                self._note(isa, ceilings.operations(isa, self.threads))
                if f"{isa}{LOADING}" not in self.best:  # said beside the ceiling: once will do
                    rate = ceilings.operations(isa, self.threads, loading=True)
                    self._note(f"{isa}{LOADING}", rate)

    def _note(self, name: str, rate: float) -> None:
        if rate:
            self.best[name] = max(rate, self.best.get(name, 0.0))
            self._rounds.setdefault(name, []).append(rate)

    def bound(
        self, nbytes: float, operations: float, isa: str, measured_s: float = math.inf
    ) -> tuple[float, str]:
        """(least seconds, the ceiling in words) of so much work, by the medians of these rounds.

        On a noisy machine a time may be shorter than that; then the best of the rounds bounds it.
        """
        least_s, name, rate = self._least(median, nbytes, operations, isa)
        if beaten := least_s > measured_s:
            least_s, name, rate = self._least(max, nbytes, operations, isa)
        unit = "GB/s" if name == "read" else "GFLOP/s"
        digits = 3 if name == "read" else 4
        return least_s, f"{name} {rate / 1e9:.{digits}g} {unit}" + (" at best" if beaten else "")

    def _least(
        self, of: Callable[[list[float]], float], nbytes: float, operations: float, isa: str
    ) -> tuple[float, str, float]:
        """(seconds, name and rate of what bounds); `of` makes one rate of those of the rounds."""
        rates = {name: of(found) for name, found in self._rounds.items()}
        name = isa if isa in rates else "float32"
        times = (nbytes / rates["read"], "read"), (operations / rates[name], name)
        least_s, bounding = max(times, key=lambda time: time[0])
        return least_s, bounding, rates[bounding]


def scatter(spread: float, rounds: int) -> str:
    """How far apart rounds lie, for printing: half the distance of their quartiles over the median
    (`spread` is the whole), or how few they are. `rounds` 0: not known, as of a case read from a
    file."""
    if 0 < rounds < LEAST_ROUNDS:
        return "(one round)" if rounds == 1 else f"({rounds} rounds)"
    return f"± {50 * spread:.0f} %"


def take_turns(
    contenders: Sequence[Contender],
    tokens: int,
    rounds: int,
    rates: Rates,
    skipped: dict[str, str],
    say: Progress,
) -> list[tuple[Contender, list[float]]]:
    """One sample a round of the best contender of each group; who fails lands in `skipped`."""
    rates.begin()
    first_s: dict[str, float] = {}
    for contender in contenders:
        if contender.label not in skipped:
            say(f"{tokens} tokens: {contender.label} warms up")
            # The first call packs, compiles and allocates; the second tells how long one takes.
            seconds = _run(contender, tokens, 2, skipped)
            first_s |= {contender.label: seconds[-1]} if seconds else {}
    running = [
        c for c in contenders if c.label in first_s and not _hopeless(c, contenders, first_s)
    ]
    samples: dict[str, list[float]] = {c.label: [] for c in running}
    for number in range(rounds):
        say(f"{tokens} tokens: round {number + 1} of {rounds}")
        rates.measure(running)
        for contender in running:
            repeats = max(1, min(MOST_REPEATS, round(ROUND_S / first_s[contender.label])))
            warm = 1 if repeats > 1 else 0
            if contender.label not in skipped:
                seconds = _run(contender, tokens, warm + repeats, skipped)[warm:]
                samples[contender.label] += [median(seconds)] if seconds else []
    best: dict[str, Contender] = {}
    for contender in running:
        if contender.label in skipped:
            continue
        other = best.setdefault(contender.group, contender)
        if median(samples[contender.label]) < median(samples[other.label]):
            best[contender.group] = contender
    return [(c, samples[c.label]) for c in best.values()]


def _run(contender: Contender, tokens: int, repeats: int, skipped: dict[str, str]) -> list[float]:
    try:
        return contender.run(tokens, repeats)
    except PeerError as error:
        skipped[contender.label] = str(error)
        return []


def _hopeless(
    contender: Contender, contenders: Sequence[Contender], first_s: dict[str, float]
) -> bool:
    group = [
        first_s[c.label] for c in contenders if c.group == contender.group and c.label in first_s
    ]
    return first_s[contender.label] > HOPELESS * min(group)
