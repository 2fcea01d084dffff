"""The panel that says what a setting costs: differences to the baseline, with their intervals."""

from collections.abc import Sequence
from math import isfinite

from ktlab.figures import BLUE
from ktlab.html import Raw, text
from ktlab.interval import Interval
from ktlab.measurement.quality import Quality
from ktlab.notebook.control_room_html import EMPTY, expression, number, panel_title, tile
from ktlab.notebook.control_room_results import Progress, Results

TILES = (
    ("kl_mean", "KL divergence", "", "lower"),
    ("perplexity_ratio", "perplexity ratio", "×", "lower"),
    ("top1_agreement", "same top-1", "", "higher"),
    ("bits_per_byte_change", "bits per byte", "", "lower"),
    ("target_probability_change", "p of the text's token", "", "higher"),
    ("kl_p99", "KL, 99th percentile", "", "lower"),
)
"""(figure of Quality, its name on the tile, prefix, which way is better)."""
SIGNED = ("bits_per_byte_change", "target_probability_change")


def quality(results: Results | None) -> str:
    """Tiles of the differences to the baseline, the verdict, the narrowing interval."""
    found = results.quality if results else None
    if results is None or found is None:
        tiles = "".join(tile(name, label, EMPTY, "") for name, label, _, _ in TILES)
        return f'{panel_title("quality")}<div class="cr-tiles">{tiles}</div>'
    source = expression(results)
    tiles = "".join(
        _figure(name, label, prefix, better, interval, found, source)
        for name, label, prefix, better in TILES
        if (interval := found.figures.get(name)) is not None
    )
    note = f"{results.choice.label} against {results.baseline.label}, on {results.text}"
    title = panel_title("quality", note, "preliminary" if results.preliminary else "")
    total = found.total_tokens
    progress = f"{found.tokens:,} of {total:,} tokens"
    if results.preliminary:
        progress = f"first {found.tokens} tokens; the evaluation follows"
    if results.limits:
        progress += f"; {results.limits}"
    grey = " · ".join(
        f'{label} <b title="{text(_how(interval, found, source, name))}">{text(interval)}</b>'
        for name, label in (("perplexity_b", "perplexity"), ("bits_per_byte_b", ""))
        if (interval := found.figures.get(name)) is not None
    )
    attributes = (
        f'data-setting="{text(results.choice.label)}" data-tokens="{found.tokens}" '
        f'data-text="{text(results.text)}" '
        f'data-preliminary="{str(results.preliminary).lower()}"'
    )
    return (
        f'<div class="cr-quality" {attributes}>{title}<div class="cr-tiles">{tiles}</div>'
        f'<div class="cr-verdict">{text(verdict(results))}</div>'
        f'<div class="cr-grey">{text(results.choice.label)} by itself: {grey}</div>'
        f'{narrowing(results.history, total)}<div class="cr-grey">{text(progress)}</div></div>'
    )


def verdict(results: Results) -> str:
    """One sentence, in the names on the buttons."""
    found = results.quality
    if found is None:
        return ""
    name, base = results.choice.label, results.baseline.label
    if found.identical:
        return f"{name} is the baseline: no change"
    if not isfinite(found.kl_mean.high):
        return f"{name} against {base}: too few tokens yet for a verdict"
    ratio = found.perplexity_ratio
    if not found.significant("kl_mean"):
        said = f"no change: {name} and {base} differ by rounding at most"
    elif not ratio.changed:
        said = f"{name} predicts differently, but not measurably worse than {base}"
    else:
        said = f"{name} is {'worse' if ratio.value > 1 else 'better'} than {base}"
    return said if found.tokens >= found.total_tokens else f"so far: {said}"


def _figure(
    name: str,
    label: str,
    prefix: str,
    better: str,
    interval: Interval,
    found: Quality,
    source: str,
) -> str:
    worse = interval.no_change is not None and (
        interval.value > interval.no_change
        if better == "lower"
        else interval.value < interval.no_change
    )
    tone = "" if interval.no_change is None else "cr-same"
    if interval.changed:
        tone = "cr-worse" if worse else "cr-better"
    sign = "+" if name in SIGNED and interval.value > 0 else ""
    body = Raw(number(interval, prefix=prefix + sign))
    return tile(name, label, body, _how(interval, found, source, name), tone)


def _how(interval: Interval, found: Quality, source: str, name: str) -> str:
    return (
        f"{100 * interval.level:.0f} % interval over {interval.n:,} tokens in {found.windows} "
        f"windows: {interval.method}. {found.method}. No seed: every window in order. "
        f"Here: room.results.quality.{name}. Anywhere: {source}.quality.{name}"
    )


def narrowing(history: Sequence[Progress], total: int) -> str:
    """The interval of the mean KL divergence against the tokens read so far."""
    known = [step for step in history if isfinite(step.high)]
    if len(known) < 2 or known[-1].high <= 0:
        return '<div class="cr-narrowing"></div>'
    width, height = 400.0, 44.0
    top = min(max(step.high for step in known), 3 * known[-1].high)

    def place(tokens: float, value: float) -> str:
        return f"{width * tokens / total:.1f},{height * (1 - min(value, top) / top):.1f}"

    band = [place(s.tokens, s.high) for s in known] + [
        place(s.tokens, s.low) for s in reversed(known)
    ]
    line = " ".join(place(s.tokens, s.value) for s in known)
    title = f"KL divergence, mean and 95 % interval, after each window; the top is {top:.3g} nats"
    return (
        f'<svg class="cr-narrowing" viewBox="0 0 400 44" preserveAspectRatio="none">'
        f"<title>{title}</title>"
        f'<polygon points="{" ".join(band)}" fill="{BLUE}" fill-opacity=".25"/>'
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5" '
        f'vector-effect="non-scaling-stroke"/></svg>'
    )
