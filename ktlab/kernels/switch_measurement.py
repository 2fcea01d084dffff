"""The border between few and many tokens, measured: both paths over 1, 2, 4, ... tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ktlab import figures, html
from ktlab.errors import SettingError
from ktlab.interval import Interval, median
from ktlab.kernels import dispatch, products, switch
from ktlab.kernels.request import Kernel, Request
from ktlab.kernels.stack import Stack
from ktlab.quantization import QTensor
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
NEVER_FEW, ALWAYS_FEW = 0, 1 << 30
HEADERS = ("tokens", "few, µs", "many, µs", "op/byte", "faster")


@dataclass(frozen=True, kw_only=True)
class SwitchPoint(Record):
    """Both paths at one number of tokens, in seconds: medians over the repeats."""

    tokens: int
    few: Interval
    many: Interval
    ratio: Interval
    """Time of the path for few over the other's, repeat by repeat."""
    intensity: float
    """Operations (a multiply and an add are two) for each byte of weights: counted."""

    @property
    def faster(self) -> str:
        """ "few" or "many"; "either" where the repeats do not tell."""
        if not self.ratio.changed:
            return "either"
        return "few" if self.ratio.value < 1 else "many"


@dataclass(frozen=True, kw_only=True)
class SwitchCurve(Record):
    """Where the path for many tokens overtakes the one for few."""

    backend: str
    isa: str
    layout: str
    format: str
    rows: int
    cols: int
    threads: int
    repeats: int
    points: tuple[SwitchPoint, ...]
    default_few: int
    """What the dispatch table says without a measurement."""

    @property
    def few(self) -> int:
        """The border to set (`few=`): the tokens up to which the path for few costs least in all.

        The one that makes the sum of relative times smallest, so that one noisy point does not
        decide. It is one of the points; where `faster` says "either", another would do as well.
        """

        def cost(border: int) -> float:
            return sum(
                (p.few if p.tokens <= border else p.many).value / min(p.few.value, p.many.value)
                for p in self.points
            )

        return min((0, *(p.tokens for p in self.points)), key=cost)

    @property
    def intensity(self) -> float:
        """Operations per byte of weights at the border; 0 if the path for many always wins."""
        return max((p.intensity for p in self.points if p.tokens <= self.few), default=0.0)

    def to_dataframe(self) -> "pd.DataFrame":
        """A row a number of tokens: tokens, few_s, many_s and ratio with their ends (few_low_s,
        ...), intensity, faster."""
        import pandas as pd

        rows = [
            {
                "tokens": p.tokens,
                **{f"few{end}_s": value for end, value in _ends(p.few)},
                **{f"many{end}_s": value for end, value in _ends(p.many)},
                **{f"ratio{end}": value for end, value in _ends(p.ratio)},
                "intensity": p.intensity,
                "faster": p.faster,
            }
            for p in self.points
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """Time for each token, both paths with the intervals of their medians, and the border."""
        title = f"{self.format} {self.rows} x {self.cols}, {self.isa}, {self.layout}"
        fig = figures.figure(title, x="tokens of one expert", y="µs a token")
        tokens = [p.tokens for p in self.points]
        for name in ("few", "many"):
            each = [getattr(p, name).mapped(lambda s, t=p.tokens: 1e6 * s / t) for p in self.points]
            fig.add_scatter(
                x=tokens,
                y=[t.value for t in each],
                error_y={
                    "array": [t.high - t.value for t in each],
                    "arrayminus": [t.value - t.low for t in each],
                    "thickness": 1,
                    "width": 3,
                },
                name=f"path for {name}",
                mode="lines+markers",
            )
        fig.update_xaxes(type="log").update_yaxes(type="log")
        if self.few:
            fig.add_vline(x=self.few, line_dash="dot")
            # On a logarithmic axis a line stands at the value, an annotation at its logarithm.
            fig.add_annotation(
                x=math.log10(self.few), y=1, yref="paper", text=f"few = {self.few}", showarrow=False
            )
        return fig

    def _title(self) -> str:
        what = f"{self.backend} {self.isa}, {self.layout}, {self.format} {self.rows} x {self.cols}"
        return (
            f"SwitchCurve({what}, {self.threads} threads: few = {self.few} at "
            f"{self.intensity:.3g} operations a byte; by default {self.default_few})"
        )

    def __repr__(self) -> str:
        cells = [HEADERS, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  " + "  ".join(map(str.rjust, row, widths)).rstrip() for row in cells]
        return "\n".join([html.wrapped(self._title()), *lines, html.wrapped(self._method())])

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        note = html.Raw(f'<div class="s">{html.text(self._method())}</div>')
        table = html.table(self._rows(), HEADERS)
        return html.mimebundle(repr(self), html.card(self._title(), table, note))

    def _method(self) -> str:
        level = min((p.few.level for p in self.points), default=0.0)
        return (
            f"medians of {self.repeats} alternated repeats, {100 * level:.3g} % intervals; "
            '"either": the ratio of the two, repeat by repeat, may as well be 1'
        )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (str(p.tokens), *(str(t.mapped(lambda s: 1e6 * s)) for t in (p.few, p.many)),
             f"{p.intensity:.1f}", p.faster)
            for p in self.points
        ]  # fmt: skip


def _ends(interval: Interval) -> tuple[tuple[str, float], ...]:
    return ("", interval.value), ("_low", interval.low), ("_high", interval.high)


def measure_switch(
    weight: QTensor | Stack,
    request: Request | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 7,
) -> SwitchCurve:
    """Time both paths of one matrix (N, K), in alternation, and find where they cross.

    `request` says which kernel (default: what `auto` chooses). Raises `SettingError` where the
    kernel has one path only. Choose a matrix larger than the caches, as an expert's use of it is.
    """
    stack = weight if isinstance(weight, Stack) else Stack(weight)
    experts, rows, cols = stack.matrices
    if experts != 1 or not tokens or min(tokens) < 1 or repeats < 1:
        raise SettingError(
            f"expected one matrix (N, K), found {stack.shape}; tokens {list(tokens)} and repeats "
            f"{repeats} of at least 1"
        )
    kernel = dispatch.choose(request or Request(), (stack.format.name,))
    if kernel.backend not in ("native", "numba"):
        raise SettingError(
            f"{kernel} has one path for any number of tokens; choose native or numba"
        )
    paths = {
        name: dispatch.choose((request or Request()).with_(few=few), (stack.format.name,))
        for name, few in (("few", ALWAYS_FEW), ("many", NEVER_FEW))
    }
    ordered = sorted(set(tokens))
    x = torch.randn(max(ordered), cols, generator=torch.Generator().manual_seed(0))
    points = []
    for count in ordered:
        seconds = _alternate(paths, stack, x[:count], repeats)
        points.append(
            SwitchPoint(
                tokens=count,
                few=median(seconds["few"], unit="s"),
                many=median(seconds["many"], unit="s"),
                ratio=median(
                    [few / many for few, many in zip(*seconds.values(), strict=True)],
                    no_change=1.0,
                ),
                intensity=2 * count * stack.size / stack.nbytes,
            )
        )
    return SwitchCurve(
        backend=kernel.backend,
        isa=kernel.isa,
        layout=kernel.layout,
        format=stack.format.name,
        rows=rows,
        cols=cols,
        threads=kernel.threads,
        repeats=repeats,
        points=tuple(points),
        default_few=switch.threshold(kernel.isa, kernel.layout, (stack.format.name,)).few,
    )


def _alternate(
    paths: dict[str, Kernel], stack: Stack, x: torch.Tensor, repeats: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, kernel in paths.items():
            start = perf_counter()
            products.linear(kernel, stack, x)
            if repeat:  # the first one packs, compiles and wakes threads
                seconds[name].append(perf_counter() - start)
    return seconds
