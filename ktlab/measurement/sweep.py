"""Many settings against one baseline: a table, and which of them nothing else beats."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import SettingError
from ktlab.measurement.pace import readable
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.quality import Quality, measure_quality
from ktlab.measurement.speed import Speed, measure_speed
from ktlab.measurement.tokens import BaselineCache
from ktlab.measurement.windows import Text, label, settings_of
from ktlab.progress import PATIENCE_S, ProgressBar
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model


@dataclass(frozen=True, kw_only=True)
class SweepRow(Record):
    """One setting: its quality, its speed, and whether it lies on the Pareto front."""

    label: str
    settings: dict[str, Any]
    quality: Quality
    speed: Speed | None
    flop_per_token: float
    """Work of one decoded token, from shapes."""
    bytes_per_token: float
    front: bool
    """No other row is at least as good in KL divergence and in decode speed (in bytes a token
    where speed was not measured), and better in one of them."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Record):
    """The rows in the order asked for."""

    rows: tuple[SweepRow, ...]
    baseline: str
    axis: str
    """What the front trades the KL divergence against."""
    provenance: Provenance

    def __iter__(self) -> Iterator[SweepRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SweepRow:
        return self.rows[index]

    @property
    def front(self) -> tuple[SweepRow, ...]:
        """The rows that nothing else beats."""
        return tuple(row for row in self.rows if row.front)

    def to_frame(self) -> "pd.DataFrame":
        """One row a setting; value, low and high of every figure."""
        import pandas as pd

        table = []
        for row in self.rows:
            figures = dict(row.quality.figures)
            if row.speed:
                figures["prefill_tokens_per_s"] = row.speed.prefill.tokens_per_s
                figures["decode_tokens_per_s"] = row.speed.decode.tokens_per_s
            line: dict[str, Any] = {"settings": row.label, "front": row.front}
            for name, interval in figures.items():
                line |= {name: interval.value, f"{name}_low": interval.low}
                line[f"{name}_high"] = interval.high
            line |= {"flop_per_token": row.flop_per_token, "bytes_per_token": row.bytes_per_token}
            table.append(line)
        return pd.DataFrame(table)

    @property
    def _title(self) -> str:
        tokens = self.rows[0].quality.tokens if self.rows else 0
        return f"against {self.baseline} on {tokens:,} tokens; front: KL divergence and {self.axis}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        lines: list[tuple[str, ...]] = []
        timed = all(row.speed for row in self.rows)
        last = "decode" if timed else "a token reads"
        headers = ("settings", "mean KL, nats", "same top-1", "perplexity ratio", last, "front")
        for row in self.rows:
            q = row.quality
            decode = (
                str(row.speed.decode.tokens_per_s)
                if timed and row.speed
                else html.byte_size(row.bytes_per_token)
            )
            lines.append(
                (
                    row.label,
                    str(replace(q.kl_mean, unit="")),
                    str(q.top1_agreement),
                    f"×{q.perplexity_ratio}",
                    decode,
                    "●" if row.front else "·",
                )
            )
        return headers, lines

    def __str__(self) -> str:
        headers, lines = self._table()
        widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (headers, *lines)
        ]
        return "\n".join([f"Sweep {self._title}", *text])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers, lines = self._table()
        body = html.card(
            f"sweep {self._title}", html.table(lines, headers), self.provenance.to_html()
        )
        return html.mimebundle(str(self), body)


def sweep(
    model: "Model",
    text: Text | Mapping[str, Text],
    settings: Sequence[Mapping[str, Any]],
    *,
    baseline: Mapping[str, Any] | None = None,
    max_tokens: int | None = 8192,
    window: int = 256,
    speed: bool = True,
    repeats: int = 6,
    seed: int = 0,
    seconds: float | None = None,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Measure each of `settings` against `baseline` (default: the model as it is set).

    >>> ktlab.sweep(model, text, [dict(top_k=k) for k in range(1, 13)], baseline=dict(top_k=8))

    The baseline's predictions are computed once; speeds are measured with all settings in one
    alternation. Of a slow model only as much text is read as fits in `seconds`, all settings
    together. `progress(done, total)` is called after every window of text; without it a bar is
    drawn where it takes long. Cancelled, it returns the rows that are complete.
    """
    if not settings:
        raise SettingError("no settings: expected a list such as [dict(top_k=4), dict(top_k=6)]")
    if seconds is not None:
        max_tokens = readable(model, seconds, len(settings) + 1, max_tokens)
    tell = progress or ProgressBar("sweep", after_s=PATIENCE_S)
    origin = dict(baseline or {})
    cache = BaselineCache()
    measured: list[tuple[Mapping[str, Any], Quality]] = []

    def told(number: int, done: int, total: int) -> None:
        tell(number * total + done, len(settings) * total)

    for number, change in enumerate(settings):
        quality = measure_quality(
            model,
            text,
            a=origin,
            b=change,
            window=window,
            max_tokens=max_tokens,
            cancel=cancel,
            baseline=cache,
            progress=partial(told, number),
        )
        if quality is None or not quality[0].done:
            break
        measured.append((change, quality[0]))
    names = [f"{i}" for i in range(len(measured))]
    timed = None
    if speed and measured:
        timed = measure_speed(
            model,
            {"baseline": origin, **dict(zip(names, (c for c, _ in measured), strict=True))},
            repeats=repeats,
            seed=seed,
            cancel=cancel,
        )
    costs = []
    for change, _ in measured:
        with model.clone().override(**change) as clone:
            costs.append(clone.cost(1, min(512, model.config.context_length)))
    gains = [
        timed[n].decode.tokens_per_s.value if timed else -cost.bytes
        for n, cost in zip(names, costs, strict=True)
    ]
    front = pareto([(q.kl_mean.value, -gain) for (_, q), gain in zip(measured, gains, strict=True)])
    return Sweep(
        rows=tuple(
            SweepRow(
                label=label(change),
                settings=settings_of(model, change),
                quality=quality,
                speed=timed[name] if timed else None,
                flop_per_token=cost.flop,
                bytes_per_token=cost.bytes,
                front=on_front,
            )
            for name, (change, quality), cost, on_front in zip(
                names, measured, costs, front, strict=True
            )
        ),
        baseline=label(origin),
        axis="decode speed" if timed else "bytes a token",
        provenance=Provenance.collect(model=model.name, seed=seed),
    )


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other one dominates; smaller is better in every coordinate."""

    def dominates(p: tuple[float, ...], q: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(p, q, strict=True)) and p != q

    return [not any(dominates(other, point) for other in points) for point in points]
