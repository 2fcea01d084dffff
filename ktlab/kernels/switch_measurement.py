"""The border between few and many tokens, measured: both paths over 1, 2, 4, ... tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ktlab import figures, html
from ktlab.errors import SettingError
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


@dataclass(frozen=True, kw_only=True)
class SwitchPoint(Record):
    """Both paths at one number of tokens; medians over the repeats."""

    tokens: int
    few_s: float
    many_s: float
    intensity: float
    """Operations (a multiply and an add are two) for each byte of weights."""

    @property
    def faster(self) -> str:
        """ "few" or "many"."""
        return "few" if self.few_s <= self.many_s else "many"


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
        decide.
        """

        def cost(border: int) -> float:
            return sum(
                (p.few_s if p.tokens <= border else p.many_s) / min(p.few_s, p.many_s)
                for p in self.points
            )

        return min((0, *(p.tokens for p in self.points)), key=cost)

    @property
    def intensity(self) -> float:
        """Operations per byte of weights at the border; 0 if the path for many always wins."""
        return max((p.intensity for p in self.points if p.tokens <= self.few), default=0.0)

    def to_dataframe(self) -> "pd.DataFrame":
        """A row a number of tokens."""
        import pandas as pd

        return pd.DataFrame([{**p.to_dict(), "faster": p.faster} for p in self.points])

    def plot(self) -> "Figure":
        """Time for each token, both paths, and the border."""
        title = f"{self.format} {self.rows} x {self.cols}, {self.isa}, {self.layout}"
        fig = figures.figure(title, x="tokens of one expert", y="µs a token")
        tokens = [p.tokens for p in self.points]
        for name in ("few", "many"):
            seconds = [getattr(p, f"{name}_s") for p in self.points]
            fig.add_scatter(
                x=tokens,
                y=[1e6 * s / t for s, t in zip(seconds, tokens, strict=True)],
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

    def __repr__(self) -> str:
        what = f"{self.backend} {self.isa}, {self.layout}, {self.format} {self.rows} x {self.cols}"
        lines = [
            f"SwitchCurve({what}, {self.threads} threads: few = {self.few} at "
            f"{self.intensity:.3g} operations a byte; by default {self.default_few})"
        ]
        lines += [
            f"  {p.tokens:3} tokens  few {1e6 * p.few_s:9.1f} µs  many {1e6 * p.many_s:9.1f} µs  "
            f"{p.intensity:6.1f} op/byte  {p.faster}"
            for p in self.points
        ]
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = [
            (p.tokens, f"{1e6 * p.few_s:.1f}", f"{1e6 * p.many_s:.1f}", f"{p.intensity:.1f}",
             p.faster)
            for p in self.points
        ]  # fmt: skip
        headers = ("tokens", "few, µs", "many, µs", "op/byte", "faster")
        title = repr(self).splitlines()[0]
        return html.mimebundle(repr(self), html.card(title, html.table(rows, headers)))


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
                few_s=median(seconds["few"]),
                many_s=median(seconds["many"]),
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
