"""Numbers as people write them: "0-7, 12"."""

import re
from collections.abc import Iterable

_RUN = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
LIMIT = 1 << 16
"""No model has so many layers or experts; a longer run is a slip, not a list to be built."""


def write_ranges(numbers: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5": in ascending order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def read_ranges(text: object) -> tuple[int, ...]:
    """ "0-2, 5" -> (0, 1, 2, 5), as written; ValueError that says what was expected."""
    expected = f'expected numbers and ranges such as "0-7, 12", found {text!r}'
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(expected)
    found: list[int] = []
    for part in str(text).split(","):
        run = _RUN.fullmatch(part)
        if run is None:
            raise ValueError(expected)
        first, last = int(run[1]), int(run[2] or run[1])
        if last < first or last >= LIMIT:
            raise ValueError(f"{expected}; {part.strip()} is no range of layers or experts")
        found.extend(range(first, last + 1))
        if len(found) > LIMIT:
            raise ValueError(f"{expected[:200]}: more than {LIMIT:,} numbers")
    return tuple(found)
