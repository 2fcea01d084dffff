"""The panels of the control room as HTML: pure functions from results to strings.

Every number carries a title= that says how it was measured and which expression returns it.
"""

from dataclasses import replace

from ktlab.html import Raw, byte_size, text
from ktlab.measurement.intervals import Interval
from ktlab.measurement.quality import Quality
from ktlab.measurement.speed import Speed
from ktlab.model.model import Model
from ktlab.notebook import control_room_svg as svg
from ktlab.notebook.control_room_choice import ALL, OWN
from ktlab.notebook.control_room_results import Generations, Histogram, Marked, Results

TILES = (
    ("kl_mean", "KL divergence", "", "lower"),
    ("perplexity_ratio", "perplexity", "×", "lower"),
    ("top1_agreement", "same top-1", "", "higher"),
    ("bits_per_byte_change", "bits per byte", "", "lower"),
    ("target_probability_change", "p of the text's token", "", "higher"),
    ("kl_p99", "KL, worst 1 %", "", "lower"),
)
"""(figure of Quality, its name on the tile, prefix, which way is better)."""
SIGNED = ("bits_per_byte_change", "target_probability_change")
EMPTY = Raw('<span class="cr-none">…</span>')


def header(model: Model, cpu: str, isa: str, threads: int) -> str:
    """One line about the model and the machine."""
    config = model.config
    parts = [
        f"<b>{text(config.name)}</b>",
        f"{text(config.architecture)}, {config.num_layers} layers, {config.num_experts} experts, "
        f"trained k = {config.top_k}",
        byte_size(model.nbytes),
        f"{text(cpu)}, {text(isa)}, {threads} thread{'s' if threads != 1 else ''}",
    ]
    return f'<div class="cr-header">{" · ".join(parts)}</div>'


def panel_title(title: str, note: object = "", badge: str = "") -> str:
    """The heading of a panel."""
    mark = f'<span class="cr-badge">{text(badge)}</span>' if badge else ""
    return f'<div class="cr-title">{text(title)} <span>{text(note)}</span>{mark}</div>'


def quality(results: Results | None) -> str:
    """Tiles of the differences to the baseline, the verdict, the narrowing interval."""
    found = results.quality if results else None
    if results is None or found is None:
        tiles = "".join(_tile(name, label, EMPTY, "") for name, label, _, _ in TILES)
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
    grey = " · ".join(
        f'{label} <b title="{text(_how(interval, found, source, name))}">{text(interval)}</b>'
        for name, label in (("perplexity_b", "perplexity"), ("bits_per_byte_b", ""))
        if (interval := found.figures.get(name)) is not None
    )
    attributes = (
        f'data-setting="{text(results.choice.label)}" data-tokens="{found.tokens}" '
        f'data-preliminary="{str(results.preliminary).lower()}"'
    )
    return (
        f'<div class="cr-quality" {attributes}>{title}<div class="cr-tiles">{tiles}</div>'
        f'<div class="cr-verdict">{text(verdict(results))}</div>'
        f'<div class="cr-grey">by itself: {grey}</div>'
        f'{svg.narrowing(results.history, total)}<div class="cr-grey">{text(progress)}</div></div>'
    )


def verdict(results: Results) -> str:
    """One sentence, in the names on the buttons."""
    found = results.quality
    if found is None:
        return ""
    name, base = results.choice.label, results.baseline.label
    if found.identical:
        return f"{name} is the baseline: no change"
    if not found.significant("kl_mean"):
        return f"no change: {name} and {base} differ by rounding at most"
    ratio = found.perplexity_ratio
    if not ratio.changed:
        return f"{name} predicts differently, but not measurably worse or better than {base} so far"
    return f"{name} is {'worse' if ratio.value > 1 else 'better'} than {base}"


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
        interval.value > interval.no_change if better == "lower" else interval.value < interval.no_change
    )
    tone = "" if interval.no_change is None else "cr-same"
    if interval.changed:
        tone = "cr-worse" if worse else "cr-better"
    sign = "+" if name in SIGNED and interval.value > 0 else ""
    body = Raw(number(interval, prefix=prefix + sign))
    return _tile(name, label, body, _how(interval, found, source, name), tone)


def _tile(name: str, label: str, body: object, title: str, tone: str = "") -> str:
    return (
        f'<div class="cr-tile {tone}" data-number="{name}" title="{text(title)}">'
        f'<div class="cr-label">{text(label)}</div>{text(body)}</div>'
    )


def number(interval: Interval, prefix: str = "") -> str:
    """Value large, spread and unit small, and "no change" said where the interval holds it."""
    plain = str(replace(interval, unit="", no_change=None))
    value, _, spread = plain.partition(" ")
    same = ""
    if interval.no_change is not None and not interval.changed:
        word = "no change" if interval.low == interval.high else "no change inside"
        same = f'<span class="cr-nochange">{word}</span>'
    return (
        f'<span class="cr-value">{text(prefix)}{text(value)}</span> '
        f'<span class="cr-spread">{text(spread)} {text(interval.unit)}</span>{same}'
    )


def _how(interval: Interval, found: Quality, source: str, name: str) -> str:
    return (
        f"{100 * interval.level:.0f} % interval over {interval.n:,} tokens in {found.windows} "
        f"windows: {interval.method}. {found.method}. No seed: every window in order. "
        f"Here: room.results.quality.{name}. Anywhere: {source}.quality.{name}"
    )


def expression(results: Results) -> str:
    """The call that measures the same without the room."""
    where = f"ktlab.domain_texts()[{results.text!r}]"
    where = {ALL: "ktlab.domain_texts()", OWN: "room.text"}.get(results.text, where)
    total = results.quality.total_tokens if results.quality else 8192
    return (
        f"ktlab.compare(model, {where}, a={results.baseline.expression}, "
        f"b={results.choice.expression}, max_tokens={total})"
    )


def speed(results: Results | None) -> str:
    """Ratio to the baseline, and in grey what has no baseline: tokens a second."""
    found = results.speed if results else None
    if results is None or found is None:
        waits = "measured after the text: baseline and setting in alternation"
        tiles = "".join(_tile(p, p, EMPTY, "") for p in ("prefill", "decode"))
        return (
            f'<div class="cr-speed">{panel_title("speed", "this machine")}'
            f'<div class="cr-tiles">{tiles}</div><div class="cr-grey">{waits}</div></div>'
        )
    base, now = list(found.speeds.values())[0], list(found.speeds.values())[-1]
    source = expression(results)
    rows = "".join(_phase(phase, base, now, found.method, source) for phase in ("prefill", "decode"))
    progress = "" if found.done else f"repeat {found.repeats} of {found.total_repeats}"
    note = f"{results.choice.label} against {results.baseline.label}, this machine"
    attributes = f'data-setting="{text(results.choice.label)}" data-repeats="{found.repeats}"'
    return (
        f'<div class="cr-speed" {attributes}>{panel_title("speed", note, progress)}'
        f'<div class="cr-tiles">{rows}</div></div>'
    )


def _phase(phase: str, base: Speed, now: Speed, method: str, source: str) -> str:
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
    if ratio.changed:
        tone = "cr-better" if ratio.value > 1 else "cr-worse"
    absolute = (
        f'<div class="cr-grey" title="{text(title)}">now {text(mine.tokens_per_s)}<br>'
        f"baseline {text(theirs.tokens_per_s)}<br>{text(bound)}</div>"
    )
    body = Raw(number(ratio, prefix="×") + absolute)
    return _tile(phase, f"{phase}, × baseline", body, title, tone)


def router(found: Histogram | None, layer: int) -> str:
    """What the histogram above says in numbers, and every layer's change as a strip."""
    if found is None or layer not in found.layers:
        return ""
    i = found.layers.index(layer)
    before, after = found.entropy("before")[i], found.entropy("after")[i]
    most = svg.log2(found.before_LE.shape[1])
    taken = [found.experts_a_token(which)[i] for which in ("before", "after")]
    title = (
        f"Counts over the same {found.tokens} tokens for both settings. Here: "
        f"room.results.histogram; of any text: model.trace(text).routing.histogram({layer})"
    )
    line = (
        f"experts a token {taken[0]:.2f} → {taken[1]:.2f} · entropy {before:.3f} → {after:.3f} of "
        f"{most:.3g} bits · divergence {found.divergence[i]:.4f} bits (Jensen-Shannon)"
    )
    return (
        f'<div class="cr-grey" title="{text(title)}">{line}</div>'
        f"{svg.strips(found, layer)}"
    )


def router_title(results: Results | None, layer: int) -> str:
    found = results.histogram if results else None
    if results is None or found is None:
        return panel_title("router", f"layer {layer}")
    note = f"layer {layer}, {results.baseline.label} → {results.choice.label}, {found.tokens} tokens"
    return panel_title("router", note, "preliminary" if found.preliminary else "")


def generated(results: Results | None) -> str:
    """Both continuations with the tokens that the change altered."""
    found = results.generations if results else None
    if results is None or found is None:
        note = "both settings continue the text greedily; what differs is coloured"
        return f'<div class="cr-text">{panel_title("text", note)}{EMPTY}</div>'
    note = f"greedy, after {len(found.prompt):,} characters of {results.text}"
    return (
        f'<div class="cr-text" data-setting="{text(results.choice.label)}">'
        f"{panel_title('text', note, '' if found.done else 'writing')}"
        f"{_continuation(results.baseline.label, found, found.before, _count(found, results))}"
        + (
            ""
            if results.is_baseline
            else _continuation(results.choice.label, found, found.after, "coloured: not in the above")
        )
        + "</div>"
    )


def _count(found: Generations, results: Results) -> str:
    if results.is_baseline:
        return "the baseline's own text"
    changed = sum(token.changed for token in found.before)
    return (
        f"coloured: {results.choice.label}, reading the same, would write something else here "
        f"({changed} of {len(found.before)}); stronger: larger KL"
    )


def _continuation(name: str, found: Generations, tokens: tuple[Marked, ...], note: str) -> str:
    body = "".join(_token(token) for token in tokens)
    return (
        f'<div class="cr-grey"><b>{text(name)}</b> writes ({text(note)})</div>'
        f'<div class="cr-tokens"><span class="cr-prompt">{text(found.prompt)}</span>{body}</div>'
    )


def _token(token: Marked) -> str:
    if not token.changed:
        return f'<span title="{text(token.note)}">{text(token.text)}</span>'
    strength = 100 if token.kl is None else min(100, round(35 + 65 * token.kl / 0.5))
    return (
        f'<span class="cr-changed" style="--strength:{strength}%" title="{text(token.note)}">'
        f"{text(token.text)}</span>"
    )
