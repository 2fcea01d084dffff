"""How a prediction is shown: text, a card of HTML, a timeline."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.placement.timeline_view import seconds

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.placement.predict import Prediction
    from ktlab.placement.timeline import Span

SHOWN_LAYERS = 3
"""Of a timeline: layers with experts look alike."""
HEADERS = ("stage", "on", "time", "share", "work", "moved", "waits for")


def title(of: "Prediction") -> str:
    """One line: what runs where."""
    return f"{of.model} in {of.format}, {of.top_k} experts, by {of.engine} on {of.machine}"


def about(value: float) -> str:
    """Two digits: more would say that a prediction knows them."""
    return f"{float(f'{value:.2g}'):,.4g}"


def text(of: "Prediction") -> str:
    """Speeds, then each phase's stages."""
    lines = [
        f"Prediction of {title(of)}",
        f"  prefill {about(of.prefill_tokens_per_s):>6} tokens/s for {of.prompt:,} tokens: "
        f"{about(of.prompt / of.prefill_tokens_per_s)} s; mostly {of.bound('prefill')}",
        f"  decode  {about(of.decode_tokens_per_s):>6} tokens/s over {of.generate:,} tokens: "
        f"{about(1e3 / of.decode_tokens_per_s)} ms a token; mostly {of.bound('decode')}",
        "  memory  "
        + ", ".join(f"{html.decimal_bytes(n)} of {name}" for name, n in of.memory.items()),
    ]
    for phase in of.stages:
        lines += ["", f"  {phase:12}" + "".join(f"{head:>11}" for head in HEADERS[1:])]
        lines += [
            f"  {name:12}" + "".join(f"{value:>11}" for value in values)
            for name, *values in rows(of, phase)
        ]
    return html.wrapped("\n".join([*lines, *of.notes]))


def rows(of: "Prediction", phase: str) -> list[tuple[str, ...]]:
    """The stages of a phase as text, longest first."""
    whole = sum(stage.seconds for stage in of.stages[phase])
    return [
        (
            stage.stage,
            stage.lane,
            seconds(stage.seconds),
            f"{100 * stage.seconds / whole:.1f} %",
            html.quantity(stage.flop, "FLOP") if stage.flop else "",
            html.decimal_bytes(int(stage.bytes)) if stage.bytes else "",
            stage.bound,
        )
        for stage in sorted(of.stages[phase], key=lambda stage: -stage.seconds)
    ]


def bundle(of: "Prediction") -> dict[str, Any]:
    """Text, and a card with a table for each phase."""
    speeds = html.table(
        [
            (
                "prefill",
                f"{about(of.prefill_tokens_per_s)} tokens/s",
                f"{of.prompt:,} tokens in {about(of.prompt / of.prefill_tokens_per_s)} s",
                of.bound("prefill"),
            ),
            (
                "decode",
                f"{about(of.decode_tokens_per_s)} tokens/s",
                f"{about(1e3 / of.decode_tokens_per_s)} ms a token",
                of.bound("decode"),
            ),
        ],
        ("predicted", "speed", "time", "waits most for"),
    )
    parts = [speeds, *(html.table(rows(of, phase), (phase, *HEADERS[1:])) for phase in of.stages)]
    parts += [html.Raw(f'<div class="s">{html.text(note)}</div>') for note in of.notes]
    return html.mimebundle(text(of), html.card(title(of), *parts))


def last_layers(of: "Prediction", phase: str) -> list["Span"]:
    """The spans of a pass' last layers, from second 0: those have experts in every model."""
    spans = [span for span in of.timelines[phase].spans if span.label.startswith("layer ")]
    last = max(int(span.label.split()[1]) for span in spans)
    kept = [span for span in spans if int(span.label.split()[1]) > last - SHOWN_LAYERS]
    start = min(span.start_s for span in kept)
    return [
        replace(span, start_s=span.start_s - start, end_s=span.end_s - start, after=())
        for span in kept
    ]


def figure(of: "Prediction", phase: str) -> "Figure":
    """The last layers of a pass on CPU, GPU and link."""
    from ktlab.placement.timeline import Timeline

    title = f"{phase}: the last {SHOWN_LAYERS} layers of {of.model}"
    return Timeline(spans=tuple(last_layers(of, phase)), title=title).plot()
