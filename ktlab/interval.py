"""A number with its confidence interval: what every measurement and statistic returns.

How the ends were found is the business of who made it (`ktlab/routing/intervals.py`: block
bootstrap; `ktlab/measurement/intervals.py`: block jackknife).
"""

import math
from dataclasses import dataclass

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
            text += f" (at least {_digits(self.low, self.value - self.low)})"
        elif abs((self.high - self.value) - (self.value - self.low)) < 0.2 * self.half_width:
            text += f" ± {_digits(self.half_width, self.half_width)}"
        else:
            low, high = (_digits(end, self.half_width) for end in (self.low, self.high))
            text += f" [{low}, {high}]"
        if self.no_change is not None and not self.changed:
            unit += " (no change)" if self.low == self.high else " (no change inside)"
        return text + unit


def _digits(value: float, width: float) -> str:
    """`value` to the second significant digit of `width`."""
    if not math.isfinite(width) or width <= 0:
        return f"{value:.4g}"
    places = 1 - math.floor(math.log10(width))
    if places > 6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, places)}f}"
