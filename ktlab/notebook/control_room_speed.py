"""The panel that says what a setting buys: speed over the baseline's, and where the time goes."""

from collections.abc import Mapping

from ktlab.figures import COLORS, INK
from ktlab.html import Raw, text
from ktlab.interval import Interval
from ktlab.measurement.speed import Speed
from ktlab.notebook.control_room_html import EMPTY, expression, number, panel_title, tile
from ktlab.notebook.control_room_results import STAGES, Results, StageTimes

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
    rows = [
        _phase("prefill", found.prefill, names, f"{found.prefill_tokens} tokens", found),
        _phase("decode", found.decode, names, f"context {found.context}", found),
    ]
    used = [s for s in STAGES if any(s in t for t in (*found.prefill.values(),))]
    legend = "".join(
        f'<span><i style="background:{_color(stage)}"></i>{"dense" if stage == "mlp" else stage}'
        "</span>"
        for stage in used
    )
    return f'<div class="cr-stages">{"".join(rows)}<div class="cr-legend">{legend}</div></div>'


def _phase(
    phase: str,
    times: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    note: str,
    found: StageTimes,
) -> str:
    longest = max(sum(stages.values()) for stages in times.values()) or 1.0
    rows = []
    for which in ("before", "after") if names["before"] != names["after"] else ("after",):
        total = sum(times[which].values())
        parts = "".join(
            f'<i style="width:{100 * ms / longest:.2f}%;background:{_color(stage)}" '
            f'title="{stage}: {ms:.3g} ms a token, {100 * ms / total:.0f} % of {phase}; median of '
            f"{found.repeats} repeats, in alternation. Here: room.results.stages.{phase}"
            f'[{text(repr(which))}][{text(repr(stage))}]"></i>'
            for stage, ms in times[which].items()
        )
        rows.append(
            f'<span class="cr-row">{text(names[which])}</span>'
            f'<span class="cr-stack">{parts}</span><span class="cr-ms">{total:.3g} ms</span>'
        )
    return (
        f'<div class="cr-grey"><b>{phase}</b>, ms a token ({note})</div>'
        f'<div class="cr-bars">{"".join(rows)}</div>'
    )


def _color(stage: str) -> str:
    return INK if stage == "other" else COLORS[STAGES.index(stage) % len(COLORS)]
