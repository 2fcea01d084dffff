"""A number with its confidence interval: what every measurement and statistic returns.

How the ends were found is the business of who made it (`ktlab/routing/intervals.py`: block
bootstrap; `ktlab/measurement/intervals.py`: block jackknife; repeats of a clock: `median`, below).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ktlab.record import Record


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A number with its confidence interval.

    `n` counts what `method` says (tokens, repeats); `no_change` is the value that means "a and b
    are alike" (0, 1, 100 ...) or None where there is no such value; `tolerance` is how far from
    it rounding alone may lead.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    n: int = 0
    unit: str = ""
    method: str = ""
    no_change: float | None = None
    tolerance: float = 0.0

    @property
    def half_width(self) -> float:
        """Half of high - low; infinite where the sample cannot bound the value."""
        return (self.high - self.low) / 2

    @property
    def changed(self) -> bool:
        """True if "no change" lies outside the interval."""
        return self.no_change is not None and not self.contains(self.no_change)

    def contains(self, value: float) -> bool:
        """Whether `value` lies inside, up to the tolerance."""
        return self.low - self.tolerance <= value <= self.high + self.tolerance

    def mapped(self, function: Callable[[float], float], unit: str = "") -> "Interval":
        """What a monotone `function` makes of it: bytes of loads, tokens/s of seconds."""
        low, high = self.low, self.high
        if math.isfinite(low) or math.isfinite(high):  # else the sample bounds nothing
            low, high = sorted((function(low), function(high)))
        return replace(
            self, value=function(self.value), low=low, high=high, unit=unit,
            no_change=None, tolerance=0.0,
        )  # fmt: skip

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        text = _digits(self.value, self.half_width)
        if self.low == self.high:
            pass
        elif math.isinf(self.low) and math.isinf(self.high):
            text += " (sample too small for an interval)"
        elif math.isinf(self.high):
            least = _digits(self.low, self.value - self.low) if self.low else "0"
            text += f" (at least {least})"
        elif abs((self.high - self.value) - (self.value - self.low)) < 0.2 * self.half_width:
            text += f" ± {_digits(self.half_width, self.half_width)}"
        else:
            low, high = (_digits(end, self.half_width) for end in (self.low, self.high))
            text += f" [{low}, {high}]"
        if self.no_change is not None and not self.changed:
            unit += " (no change)" if self.low == self.high else " (no change inside)"
        return text + unit


def median(
    samples: Sequence[float], *, level: float = 0.95, unit: str = "", no_change: float | None = None
) -> Interval:
    """Median of independent repeats, between two order statistics: no assumption on their shape.

    The tightest symmetric pair that holds `level` is taken. Fewer than 6 repeats cannot hold
    95 %: then it is the smallest and the largest, and `.level` says what they hold (5: 93.75 %).
    """
    ordered, n = sorted(samples), len(samples)
    if n == 1:
        ends, attained = (0.0 if ordered[0] >= 0 else -math.inf, math.inf), level
    else:
        rank, attained = 1, 1 - 2.0 ** (1 - n)
        while 2 * (rank + 1) <= n:
            tail = sum(math.comb(n, i) for i in range(rank + 1)) / 2.0**n
            if 1 - 2 * tail < level:
                break
            rank, attained = rank + 1, 1 - 2 * tail
        ends = (ordered[rank - 1], ordered[n - rank])
    value = float(statistics.median(ordered))
    return Interval(
        value=value,
        low=ends[0],
        high=ends[1],
        level=attained,
        n=n,
        unit=unit,
        method=f"order statistics of {n} repeats",
        no_change=no_change,
    )


def _digits(value: float, width: float) -> str:
    """`value` to the second significant digit of `width`."""
    if not math.isfinite(width) or width <= 0:
        return f"{value:.4g}"
    places = 1 - math.floor(math.log10(width))
    if places > 6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, places)}f}"
