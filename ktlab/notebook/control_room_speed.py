"""The panel that says what a setting buys: speed over the baseline's, and where the time goes."""

from collections.abc import Mapping

from ktlab.figures import COLORS, INK
from ktlab.html import Raw, text
from ktlab.interval import Interval
from ktlab.measurement.speed import Speed
from ktlab.notebook.control_room_html import EMPTY, expression, number, panel_title, tile
from ktlab.notebook.control_room_results import STAGES, WHICH, Results, StageTimes

ENOUGH = 0.9
"""Level that the interval of a few repeats must hold before a ratio is called a change."""


def speed(results: Results | None) -> str:
    """Ratio to the baseline, and in grey what has no baseline: tokens a second."""
    found = results.speed if results else None
    if results is None or found is None:
        waits = "measured after the text: baseline and setting in alternation"
        tiles = "".join(tile(p, p, EMPTY, "") for p in ("prefill", "decode"))
        return (
            f'<div class="cr-speed">{panel_title("speed", "this machine")}'
            f'<div class="cr-tiles">{tiles}</div><div class="cr-grey">{waits}</div></div>'
        )
    base, now = list(found.speeds.values())[0], list(found.speeds.values())[-1]
    source = expression(results)
    rows = "".join(
        _ratio(phase, base, now, found.method, source) for phase in ("prefill", "decode")
    )
    progress = "" if found.done else f"repeat {found.repeats} of {found.total_repeats}"
    note = f"{results.choice.label} against {results.baseline.label}, this machine"
    attributes = f'data-setting="{text(results.choice.label)}" data-repeats="{found.repeats}"'
    return (
        f'<div class="cr-speed" {attributes}>{panel_title("speed", note, progress)}'
        f'<div class="cr-tiles">{rows}</div></div>'
    )


def _ratio(phase: str, base: Speed, now: Speed, method: str, source: str) -> str:
    ratio: Interval = getattr(now, f"{phase}_ratio")
    mine, theirs = getattr(now, phase), getattr(base, phase)
    bound = mine.bound
    title = (
        f"Ratio of {phase} speeds, paired repeat by repeat: {ratio.method}, "
        f"{100 * ratio.level:.3g} % interval. {method}. Seed: none, the text itself. Ceiling: "
        f"{bound.floor_s * 1e3:.3g} ms for {mine.tokens} tokens would be the least here, "
        f"{bound.name} bound. Here: room.results.speed_ratio({phase!r}). "
        f"Anywhere: {source}.speed['b'].{phase}_ratio"
    )
    tone = "cr-same"
    if ratio.changed and ratio.level >= ENOUGH:
        tone = "cr-better" if ratio.value > 1 else "cr-worse"
    absolute = (
        f'<div class="cr-grey" title="{text(title)}">now {text(mine.tokens_per_s)}<br>'
        f"baseline {text(theirs.tokens_per_s)}<br>{text(bound)}</div>"
    )
    body = Raw(number(ratio, prefix="×") + absolute)
    return tile(phase, f"{phase}, × baseline", body, title, tone)


def stage_bars(results: Results | None) -> str:
    """Time by stage: baseline above setting, prefill and decode each to its own scale."""
    found = results.stages if results else None
    if results is None or found is None:
        return '<div class="cr-grey">measured after the first windows of text</div>'
    names = {"before": results.baseline.label, "after": results.choice.label}
    notes = {"prefill": f"{found.prefill_tokens} tokens", "decode": f"context {found.context}"}
    rows = "".join(_phase(phase, found, names, note) for phase, note in notes.items())
    used = [s for s in STAGES if s in found.prefill["before"] or s in found.prefill["after"]]
    legend = "".join(
        f'<span><i style="background:{_color(stage)}"></i>{"dense" if stage == "mlp" else stage}'
        "</span>"
        for stage in used
    )
    return f'<div class="cr-stages">{rows}<div class="cr-legend">{legend}</div></div>'


def _phase(phase: str, found: StageTimes, names: Mapping[str, str], note: str) -> str:
    """A bar for each setting with the interval of its whole; below, what the two have in common."""
    shown = WHICH if names["before"] != names["after"] else WHICH[1:]
    totals = {which: found.total(phase, which) for which in shown}
    longest = max(total.value for total in totals.values()) or 1.0
    # An interval far beyond the bars must not press them together: it is cut and told in numbers.
    scale = 100 / min(2 * longest, max(min(t.high, 2 * longest) for t in totals.values()))
    rows = "".join(
        f'<span class="cr-row">{text(names[which])}</span>'
        f"{_stack(phase, which, found, total, scale)}"
        f'<span class="cr-ms">{text(total)}</span>'
        for which, total in totals.items()
    )
    head = f"<b>{phase}</b>, ms a token ({note})"
    if len(shown) > 1:
        head += f": {text(names['after'])} takes ×{text(found.ratio(phase))} of the time"
    level = totals[shown[0]].level
    title = (
        f"Medians of {found.repeats} repeats in alternation, {100 * level:.3g} % intervals between "
        f"order statistics, timed stage by stage, which costs time itself: the speed above is "
        f"timed without. Here: room.results.stages.total({phase!r}, 'after'), .ratio({phase!r})"
    )
    return (
        f'<div class="cr-grey" title="{text(title)}">{head}</div><div class="cr-bars">{rows}</div>'
    )


def _stack(phase: str, which: str, found: StageTimes, total: Interval, scale: float) -> str:
    """The stages side by side, as long together as the whole; a whisker from low to high."""
    stages = getattr(found, phase)[which]
    stretch = scale * total.value / (sum(stages.values()) or 1.0)
    parts = "".join(
        f'<i style="width:{stretch * ms:.2f}%;background:{_color(stage)}" '
        f'title="{stage}: {text(found.stage(phase, which, stage))} a token, '
        f"{100 * stretch * ms / (scale * total.value):.0f} % of {phase}; median of "
        f"{found.repeats} repeats, in alternation. Here: room.results.stages.stage({phase!r}, "
        f'{which!r}, {stage!r})"></i>'
        for stage, ms in stages.items()
    )
    low, high = (min(100.0, max(0.0, scale * end)) for end in (total.low, total.high))
    whisker = f'<u style="left:{low:.2f}%;width:{high - low:.2f}%"></u>'
    return f'<span class="cr-stack">{parts}{whisker}</span>'


def _color(stage: str) -> str:
    return INK if stage == "other" else COLORS[STAGES.index(stage) % len(COLORS)]
