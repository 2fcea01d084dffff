"""The panel of the true-size twin: pure functions from what was measured to HTML."""

from ktlab import html
from ktlab.html import Raw, text
from ktlab.measurement.rounds import scatter
from ktlab.measurement.twin import PHASES, Twin
from ktlab.notebook.control_room_html import EMPTY, number, panel_title, tile
from ktlab.notebook.control_room_kernels import OFF
from ktlab.notebook.control_room_speed import ENOUGH

WHY = (
    "A small model is no use for a clock: it lives in the cache, and calls cost more than "
    "arithmetic. Choose a real model's widths to measure one layer of its experts, with synthetic "
    "weights, under the same switches. Takes some 10 to 30 s and up to 1 GB."
)


def twin_title(found: Twin | str | None, shape: str) -> str:
    """Says on every screen what this is not."""
    badge = "" if shape == OFF else "synthetic weights, one layer"
    done = isinstance(found, Twin) and not found.done
    return panel_title("true-size twin", shape if shape != OFF else "off", badge) + (
        '<span class="cr-grey">prefill is still to come</span>' if done else ""
    )


def twin(found: Twin | str | None, shape: str, doing: str = "") -> str:
    """Ratio and absolute figures of both phases; what it waits for; or why there is none."""
    if shape == OFF:
        return f'<div class="cr-twin cr-grey">{WHY}</div>'
    if isinstance(found, str):
        return f'<div class="cr-twin cr-error" role="alert">no twin: {text(found)}</div>'
    if found is None:
        tiles = "".join(tile(f"twin_{p}", p, EMPTY, "") for p in PHASES)
        waits = doing or "measured after everything else"
        return (
            f'<div class="cr-twin"><div class="cr-tiles">{tiles}</div>'
            f'<div class="cr-grey">{text(waits)}</div></div>'
        )
    tiles = "".join(_tile(found, phase, doing) for phase in PHASES)
    return (
        f'<div class="cr-twin" data-shape="{text(found.shape)}" '
        f'data-phases="{len(found.ratios)}" data-setting="{text(found.label_b)}">'
        f'<div class="cr-tiles">{tiles}</div><div class="cr-grey">{text(found.what)}. '
        f"{text(found.method)}.</div></div>"
    )


def _tile(found: Twin, phase: str, doing: str) -> str:
    if phase not in found.ratios:
        return tile(f"twin_{phase}", phase, Raw(f"{EMPTY}<br>{text(doing)}"), "")
    ratio, a, b = found.ratios[phase], found.a[phase], found.b[phase]
    tone = "cr-same"
    if ratio.changed and ratio.level >= ENOUGH:
        tone = "cr-better" if ratio.value > 1 else "cr-worse"
    tokens = f"{b.tokens} token{'s' * (b.tokens > 1)} a call"
    title = (
        f"Ratio of {phase} speeds, {found.label_a} → {found.label_b}, paired round by round: "
        f"{ratio.method}, {100 * ratio.level:.3g} % interval. {found.what}. {found.method}. "
        f"Here: room.twin.ratios[{phase!r}], room.twin.b[{phase!r}].median_s"
    )
    rows = [
        (
            label,
            f"{1e3 * case.median_s:.3g} ms",
            scatter(case.spread, found.rounds),
            f"{100 * case.ceiling_share:.0f} % of {case.ceiling}",
            f"error {100 * case.relative_error:.2g} %",
        )
        for label, case in ((found.label_a, a), (found.label_b, b))
    ]
    kernels = "".join(
        f"<div>{text(label)}: {text(case.kernel)}, {text(case.layout)}</div>"
        for label, case in ((found.label_a, a), (found.label_b, b))
    )
    figures = f'<div class="cr-grey">{html.table(rows)}{kernels}</div>'
    body = number(ratio, prefix="×") + figures
    label = f"{phase}, {tokens}: {found.label_a} → {found.label_b}"
    return tile(f"twin_{phase}", label, Raw(body), title, tone)
