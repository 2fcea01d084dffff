"""A line that says how far something long has come, and how long it will still take."""

import sys
from time import monotonic
from typing import TextIO

WIDTH = 24
EVERY_S = 0.1
PATIENCE_S = 3.0
"""What takes no longer need not say how far it is."""


class ProgressBar:
    """Called with (done, total), e.g. in bytes.

    `stream` is by default a notebook's output, elsewhere that of errors, so that results can be
    piped. `shown` says whether anything is printed; by default where `stream` is a terminal, and
    in a notebook. What is over `after_s` seconds after the bar was made prints nothing.

    The time left is judged by what was done since the first call: a resumed work does not count
    what it found.
    """

    def __init__(
        self,
        what: str,
        stream: TextIO | None = None,
        *,
        shown: bool | None = None,
        after_s: float = 0.0,
    ) -> None:
        here = sys.stdout if in_notebook() else sys.stderr
        self.what, self.stream = what, here if stream is None else stream
        self.shown = self.stream.isatty() or in_notebook() if shown is None else shown
        self._start: tuple[float, float] | None = None
        self._made = monotonic()
        self._latest = self._made + after_s - EVERY_S
        self._drawn = False

    def __call__(self, done: float, total: float) -> None:
        now = monotonic()
        if self._start is None:
            self._start = (now, done)
        over = done >= total
        if not self.shown or (now - self._latest < EVERY_S and not (over and self._drawn)):
            return
        self._drawn = True
        self._latest = now
        since = self._made if over else self._start[0]
        line = self.line(done, total, now - since, done - self._start[1])
        print(f"\r\033[K{line}", end="\n" if over else "", file=self.stream, flush=True)

    def line(self, done: float, total: float, seconds: float, gained: float) -> str:
        """The text for a state: `gained` was done within `seconds`."""
        share = min(1.0, done / total) if total else 1.0
        full = round(WIDTH * share)
        left = f", {duration((total - done) / gained * seconds)} left" if gained > 0 else ""
        left = f", took {duration(seconds)}" if done >= total else left
        return f"{self.what} [{'#' * full}{'.' * (WIDTH - full)}] {100 * share:.0f} %{left}"


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython is not None else None, "kernel")


def duration(seconds: float) -> str:
    """Seconds for reading: "8 s", "3 min 5 s", "2 h 4 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
