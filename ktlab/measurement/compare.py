"""Two settings of a loaded model side by side: quality with intervals, speed with its ceiling."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import KtlabError
from ktlab.interval import Interval
from ktlab.measurement.pace import readable
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.quality import Quality, measure_quality
from ktlab.measurement.speed import SpeedComparison, measure_speed
from ktlab.measurement.sweep import sweep
from ktlab.measurement.tokens import BaselineCache
from ktlab.measurement.windows import Text, label, settings_of
from ktlab.progress import PATIENCE_S, ProgressBar
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model

__all__ = ["Comparison", "compare", "sweep"]


class Cancelled(KtlabError):
    """A measurement was cancelled before it had anything to show."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """What b costs and buys against a."""

    a: dict[str, Any]
    """All settings of a, as plain values."""
    b: dict[str, Any]
    label_a: str
    label_b: str
    quality: Quality
    """All texts together."""
    domains: dict[str, Quality]
    """Each text by itself, where there were several."""
    speed: SpeedComparison | None
    provenance: Provenance

    def to_frame(self) -> "pd.DataFrame":
        """One row a figure: domain ("all" for the texts together), value, interval, verdict."""
        import pandas as pd

        rows = [
            {"domain": domain, "figure": figure, **_row(interval)}
            for domain, quality in {"all": self.quality, **self.domains}.items()
            for figure, interval in quality.figures.items()
        ]
        for name, speed in self.speed.speeds.items() if self.speed else ():
            for phase in ("prefill", "decode"):
                for figure, interval in (
                    (f"{phase}_{name}", getattr(speed, phase).tokens_per_s),
                    (f"{phase}_ratio_{name}", getattr(speed, f"{phase}_ratio")),
                ):
                    rows.append({"domain": "speed", "figure": figure, **_row(interval)})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        parts = [str(self.quality)]
        parts += [f"  {name:12} {_short(quality)}" for name, quality in self.domains.items()]
        parts += [str(self.speed)] if self.speed else []
        return "\n".join([*parts, str(self.provenance)])

    def to_html(self) -> str:
        """Quality, then the domains, then speed; where it comes from folded below."""
        domains = html.table(
            [
                (name, str(q.kl_mean), f"×{q.perplexity_ratio}", str(q.top1_agreement))
                for name, q in self.domains.items()
            ],
            ("text", "KL divergence, mean", "perplexity ratio", "same top-1"),
        )
        parts = [html.Raw(self.quality.to_html())]
        parts += [domains] if self.domains else []
        parts += [html.Raw(self.speed.to_html())] if self.speed else []
        return html.card("", *parts, self.provenance.to_html())

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


def compare(
    model: "Model",
    text: Text | Mapping[str, Text],
    *,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    max_tokens: int | None = 8192,
    window: int = 256,
    speed: bool = True,
    repeats: int = 6,
    seed: int = 0,
    seconds: float | None = None,
    cancel: threading.Event | None = None,
    baseline: BaselineCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure what `b` costs in quality and buys in speed against the baseline `a`.

    >>> ktlab.compare(model, ktlab.domain_texts(), a=dict(top_k=8), b=dict(top_k=6))

    `text`: one text, or several by name, which then are strata of the intervals and get a row
    each. `a`, `b`: what `model.override` takes; `model` is not touched. `max_tokens` in all
    (None: everything), of a slow model as many as it reads in `seconds`. `progress(done, total)` is
    called after every window of text; without it a bar is drawn where it takes long. `seed` draws
    nothing in the quality part, which reads all windows in order. Raises ContextError, SettingError
    on impossible input, and `Cancelled` if `cancel` was set before the first window was done;
    later, what was measured so far comes back (`.quality.done` is False).
    """
    if seconds is not None:
        max_tokens = readable(model, seconds, 2, max_tokens)
    tell = progress or ProgressBar("compare", after_s=PATIENCE_S)
    quality = measure_quality(
        model,
        text,
        a=a,
        b=b,
        window=window,
        max_tokens=max_tokens,
        cancel=cancel,
        baseline=baseline,
        progress=tell,
    )
    if quality is None:
        raise Cancelled("the comparison was cancelled before its first window; nothing to show")
    pooled, domains = quality
    measured = None
    if speed:
        settings = {"a": a, "b": b}
        measured = measure_speed(model, settings, repeats=repeats, seed=seed, cancel=cancel)
    return Comparison(
        a=settings_of(model, a),
        b=settings_of(model, b),
        label_a=label(a),
        label_b=label(b),
        quality=pooled,
        domains=domains if len(domains) > 1 else {},
        speed=measured,
        provenance=Provenance.collect(model=model.name, seed=seed),
    )


def _row(interval: Interval) -> dict[str, Any]:
    names = ("value", "low", "high", "level", "n", "unit", "method")
    significant = None if interval.no_change is None else interval.changed
    return {**{name: getattr(interval, name) for name in names}, "significant": significant}


def _short(quality: Quality) -> str:
    return (
        f"KL {quality.kl_mean}, perplexity ×{quality.perplexity_ratio}, "
        f"same top-1 {quality.top1_agreement}"
    )
