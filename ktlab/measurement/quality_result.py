"""The result of a quality measurement, and the arithmetic from tokens to its figures.

No model runs here. Letters: T predicted tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ktlab import html
from ktlab.interval import Interval
from ktlab.measurement import intervals
from ktlab.measurement.blocks import Blocks
from ktlab.measurement.tokens import TokenComparison
from ktlab.record import Record, unsaved

ROUNDING_NATS = 1e-6
"""A mean KL divergence up to this is float32 rounding, not a change (measured: see the tests)."""
ROUNDING_RATIO = 1e-5


@dataclass(frozen=True, kw_only=True)
class Quality(Record):
    """Setting b against the baseline a. Each figure is an `Interval` that knows "no change"."""

    kl_mean: Interval
    """Mean KL(a || b) of the next-token distributions, nats."""
    kl_median: Interval
    kl_p99: Interval
    top1_agreement: Interval
    """Per cent of places where a and b put the same token first."""
    target_probability_change: Interval
    """Mean change of the probability of the text's own token, b - a, percentage points."""
    perplexity_a: Interval
    perplexity_b: Interval
    perplexity_ratio: Interval
    """Perplexity of b over that of a."""
    bits_per_byte_a: Interval | None = None
    bits_per_byte_b: Interval | None = None
    bits_per_byte_change: Interval | None = None
    tokens: int
    """Predicted tokens so far, of `total_tokens` asked for."""
    total_tokens: int
    windows: int
    identical: bool
    """The settings are equal: nothing was estimated, every difference is exactly none."""
    label_a: str
    label_b: str
    seconds: float
    method: str
    per_token: TokenComparison | None = unsaved()

    @property
    def done(self) -> bool:
        """Whether the whole text was read."""
        return self.tokens >= self.total_tokens

    @property
    def figures(self) -> dict[str, Interval]:
        """Every figure by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Interval)}

    def significant(self, figure: str) -> bool:
        """Whether "no change" lies outside the interval of `figure`."""
        return self.figures[figure].changed

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.identical:
            return "no change: a and b are the same settings"
        if not self.significant("kl_mean"):
            return "no change: the distributions differ by rounding at most"
        ratio = self.perplexity_ratio
        if not ratio.changed:
            return "the distributions differ; for the perplexity the interval includes no change"
        return f"b is {'worse' if ratio.value > 1 else 'better'}: perplexity ×{ratio}"

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, interval as text, remark) for printing."""
        return [
            (TITLES[name], str(x), "" if x.changed or x.no_change is None else "no change")
            for name, x in self.figures.items()
        ]

    def __str__(self) -> str:
        head = f"b: {self.label_b}   against a: {self.label_a}   ({self._progress()})"
        lines = [f"  {name:28} {value}" for name, value, _ in self.rows()]
        return "\n".join([head, *lines, f"  {self.verdict}"])

    __repr__ = __str__

    def _progress(self) -> str:
        of = "" if self.done else f" of {self.total_tokens:,}"
        return f"{self.tokens:,}{of} tokens, {self.windows} windows"

    def to_html(self) -> str:
        """A table of the figures with the verdict above and the method below."""
        tone = "ok" if self.verdict.startswith("no change") else "warn"
        return html.card(
            f"{self.label_b} against {self.label_a}",
            html.badge(self.verdict, tone),
            html.table([(n, v) for n, v, _ in self.rows()], ("", "95 % interval")),
            html.Raw(
                f'<div class="s">{html.text(self._progress())}; {html.text(self.method)}</div>'
            ),
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


NO_CHANGE = {
    "kl_mean": 0.0,
    "kl_median": 0.0,
    "kl_p99": 0.0,
    "top1_agreement": 100.0,
    "target_probability_change": 0.0,
    "perplexity_ratio": 1.0,
    "bits_per_byte_change": 0.0,
}

TITLES = {
    "kl_mean": "KL divergence, mean",
    "kl_median": "KL divergence, median",
    "kl_p99": "KL divergence, p99",
    "top1_agreement": "same top-1",
    "target_probability_change": "change of target probability",
    "perplexity_a": "perplexity a",
    "perplexity_b": "perplexity b",
    "perplexity_ratio": "perplexity ratio b / a",
    "bits_per_byte_a": "bits per byte a",
    "bits_per_byte_b": "bits per byte b",
    "bits_per_byte_change": "bits per byte, b - a",
}


def summarize(
    texts: Sequence[TokenComparison],
    *,
    identical: bool = False,
    level: float = 0.95,
    **known: Any,
) -> Quality:
    """Pool texts (each a stratum of its own) into a `Quality`; pure arithmetic, no model."""
    texts = [text for text in texts if len(text)]
    blocks = Blocks.cut([len(text) for text in texts])
    pooled = TokenComparison.join(texts)
    kl_T = pooled.kl_T.astype(np.float64)
    nats_a_T, nats_b_T = (
        -pooled.logprob_a_T.astype(np.float64),
        -pooled.logprob_b_T.astype(np.float64),
    )
    change_T = nats_b_T - nats_a_T
    # Median and p99 have no "no change" of their own: that most tokens stay alike is no verdict.
    figures: dict[str, Interval | None] = {
        "kl_mean": intervals.mean(
            kl_T,
            blocks,
            scale="log",
            unit="nats",
            no_change=0.0,
            tolerance=ROUNDING_NATS,
            level=level,
        ),
        "kl_median": intervals.quantile(kl_T, 0.5, blocks, unit="nats", level=level),
        "kl_p99": intervals.quantile(kl_T, 0.99, blocks, unit="nats", level=level),
        "top1_agreement": replace(
            intervals.share(pooled.same_top1_T, blocks, level=level), no_change=100.0
        ),
        "target_probability_change": intervals.mean(
            100 * pooled.probability_change_T.astype(np.float64),
            blocks,
            unit="points",
            no_change=0.0,
            tolerance=100 * ROUNDING_RATIO,
            level=level,
        ),
        "perplexity_a": intervals.mean(nats_a_T, blocks, scale="exp", level=level),
        "perplexity_b": intervals.mean(nats_b_T, blocks, scale="exp", level=level),
        "perplexity_ratio": intervals.mean(
            change_T, blocks, scale="exp", no_change=1.0, tolerance=ROUNDING_RATIO, level=level
        ),
    }
    if pooled.bytes_T.sum() > 0:
        for name, nats_T in (("a", nats_a_T), ("b", nats_b_T), ("change", change_T)):
            figures[f"bits_per_byte_{name}"] = intervals.mean(
                nats_T / math.log(2),
                blocks,
                weights_T=pooled.bytes_T,
                unit="bits/byte",
                level=level,
                no_change=0.0 if name == "change" else None,
                tolerance=ROUNDING_RATIO,
            )
    if identical:
        for name, none in NO_CHANGE.items():
            if (interval := figures.get(name)) is not None:
                figures[name] = intervals.exactly(interval, none)
    return Quality(
        **figures,  # type: ignore[arg-type]
        tokens=len(pooled),
        identical=identical,
        per_token=pooled,
        **known,
    )
