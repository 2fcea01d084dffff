"""Live views of notebook 06: kernels under the roofline, and the border of few and many tokens."""

import math
import threading
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ktlab import figures, html
from ktlab.errors import SettingError
from ktlab.interval import median
from ktlab.kernels.switch_measurement import SwitchCurve
from ktlab.measurement.kernel_points import CEILINGS, ERROR, TOKENS, KernelRoofline, stream_points
from ktlab.model.block import MoEBlock
from ktlab.model.copies import passing
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, live
from ktlab.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

SHAPES = ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3")
FORMATS = ("q4_k_m", "q8_0", "int8_channel", "q4_0", "bf16")
LARGE_TOKENS, LARGE_S = 6, 45.0
"""Of a large model: tokens that each setting runs, and seconds after which none begins any more."""
COMPARED_WEIGHTS = 6e8
"""Of experts, which the slowest kernels compute within seconds."""
FORMAT_WORDS = ("quantize", "format")
"""Switches that change the weights' values, and not only how they are multiplied."""
BORDER_WORDS = 0.35
"""Of the axis: a border nearer to its beginning has its words on the right."""
SLOTS = 32
"""Curves that the live figure has room for: it keeps its traces."""


class RooflineView(Instrument):
    """Every usable kernel as measured points; `result` has them. Options go to `stream_points`."""

    title = "Every kernel under this machine's roofline"

    def __init__(self, model: "Model", **options: Any) -> None:
        super().__init__(model)
        self.result: KernelRoofline | None = None
        self._options = options
        self.shape_choice = widgets.Dropdown(options=SHAPES, description="layer of")
        self.format_choice = widgets.Dropdown(options=FORMATS, description="weights as")
        self.again = widgets.Button(description="measure again", icon="refresh")
        self.stop_button = widgets.Button(description="stop", icon="stop")
        for control in (self.shape_choice, self.format_choice):
            control.layout.width = "240px"
            control.style.description_width = "76px"
            control.observe(lambda _: self.refresh(), "value")
        for button, action in ((self.again, self.refresh), (self.stop_button, self.stop)):
            button.layout.width = "auto"
            button.on_click(lambda _, action=action: action())
        self.chart = live(_slots(None))
        self.table = widgets.HTML()
        controls = [self.shape_choice, self.format_choice, self.again, self.stop_button]
        row = widgets.HBox(controls)
        row.add_class("kt-controls")
        self.body.children = [row, self.chart, self.table]
        self.refresh()

    def refresh(self) -> None:
        """Measure what is chosen, one number of tokens after the other."""
        shape, format = self.shape_choice.value, self.format_choice.value

        def job(cancel: threading.Event) -> None:
            def say(text: str) -> None:
                self.publish(cancel, lambda: self._tell(text))

            options = {"progress": say, **self._options}
            for result in stream_points(shape, format, cancel=cancel, **options):
                if not self.publish(cancel, lambda r=result: self._keep(r)):  # type: ignore[misc]
                    return

        self.submit(job, f"measuring {format} at {shape}'s widths")

    def stop(self) -> None:
        """Stop measuring; the points so far stay."""
        self.worker.cancel()

    def _tell(self, text: str) -> None:
        self._doing = text
        self._on_busy(True)

    def _keep(self, result: KernelRoofline) -> None:
        self.result = result
        self.note = result.what + ("" if result.done else "; more tokens follow")
        fig = _slots(result)
        with self.chart.batch_update():
            for old, new in zip(self.chart.data, fig.data, strict=True):
                for name in ("x", "y", "text", "name", "mode", "visible", "showlegend",
                             "line", "marker", "hovertemplate", "hoverinfo"):  # fmt: skip
                    setattr(old, name, getattr(new, name))
            self.chart.layout.annotations = fig.layout.annotations
        self.table.value = result_table(result)

    def figures(self) -> dict[str, Any]:
        """The best kernel at each number of tokens."""
        if self.result is None:
            return {}
        best: dict[str, Any] = {}
        for count in dict.fromkeys(c.tokens for c in self.result.cases):
            case = min((c for c in self.result.cases if c.tokens == count), key=_seconds)
            name = f"{case.backend} {case.isa} {case.layout}"
            best[f"{count} tokens"] = f"{name}, {100 * case.ceiling_share:.0f} % of {case.ceiling}"
        return best

    def to_html(self) -> str:
        with self.worker.lock:
            table = result_table(self.result) if self.result else "nothing measured yet"
            return html.card(
                self.title, html.Raw(style("instrument")), html.Raw(table),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )  # fmt: skip

    def snapshot(self) -> Snapshot:
        self.wait(None)
        chart = [self.result.plot()] if self.result else []
        return Snapshot(self.to_html(), *chart, plain=repr(self))


def _seconds(case: Any) -> float:
    return float(case.median_s)


def result_table(result: KernelRoofline) -> str:
    """The best of each number of tokens; everything else behind a click, with what is missing."""
    headers = ("tokens", "kernel", "median", "GFLOP/s", "GB/s", "of the ceiling", "error")
    rows = result.rows()
    first = [next(r for r in rows if r[0] == t) for t in dict.fromkeys(r[0] for r in rows)]
    parts = [html.Raw("<b>the fastest at each number of tokens</b>"), html.table(first, headers)]
    parts.append(html.Raw(f'<div class="s">{html.text(CEILINGS)}. {html.text(ERROR)}</div>'))
    parts.append(html.details(f"all {len(rows)} points", html.table(rows, headers)))
    if result.left_out:
        parts.append(html.details(f"{len(result.left_out)} not measured: why",
                                  html.pairs(result.left_out)))  # fmt: skip
    return html.card("", *parts)


def _slots(result: KernelRoofline | None) -> "Figure":
    """The roofline with a fixed number of traces, the unused ones empty and invisible."""
    fig = result.plot() if result else figures.roofline({}, read=0, peaks={})
    fig.update_traces(visible=True)
    while len(fig.data) < SLOTS:
        fig.add_scatter(x=[], y=[], visible=False, showlegend=False, mode="markers")
    if result is None:
        fig.add_annotation(
            text="the first points come in a few seconds", showarrow=False, x=0.5, y=0.5,
            xref="paper", yref="paper", font={"color": figures.INK, "size": 14},
        )  # fmt: skip
    return fig


def switch_figure(curve: SwitchCurve) -> "Figure":
    """Both paths over the number of tokens; the measured border, and the one in force."""
    fig = curve.plot()
    fig.layout.annotations = ()
    fig.layout.shapes = ()
    fig.update_layout(margin_t=58)
    largest = max(p.tokens for p in curve.points)
    told = any(p.faster != "either" for p in curve.points)
    lines = (
        (curve.default_few, f"in force: few = {curve.default_few}", figures.VERMILION, "solid", 1),
        (told and curve.few, f"measured here: few = {curve.few}", figures.INK, "dot", 0.9),
    )
    for few, words, color, dash, height in lines:
        if few:
            x = min(few, largest)
            fig.add_shape(
                type="line", x0=x, x1=x, y0=0, y1=1, yref="paper",
                line={"color": color, "dash": dash, "width": 2},
            )  # fmt: skip
            # On a logarithmic axis a shape stands at the value, an annotation at its logarithm.
            left = math.log10(x) < BORDER_WORDS * math.log10(largest)
            fig.add_annotation(
                x=math.log10(x), y=height, yref="paper", text=words, showarrow=False,
                xanchor="left" if left else "right",
                xshift=5 if left else -5, yanchor="top", font={"color": color},
            )  # fmt: skip
    if not told:
        fig.add_annotation(
            x=0.5, y=1, xref="paper", yref="paper", yanchor="bottom", showarrow=False,
            text="measured here: no border told apart", font={"color": figures.INK},
        )  # fmt: skip
    counts = [p.tokens for p in curve.points]
    fig.update_xaxes(tickvals=counts, ticktext=[str(count) for count in counts])
    fig.update_xaxes(range=[-0.08, math.log10(largest) + 0.1])
    return fig


def beginning(model: "Model", weights: float = COMPARED_WEIGHTS) -> "Model":
    """A clone with the first layers only: as many as have no more than `weights` weights in their
    experts, and at least one with experts."""
    twin, total = model.clone(), 0
    for number, block in enumerate(twin.layers):
        stacks = block.experts.stacks if isinstance(block, MoEBlock) else ()
        size = sum(stack.size for stack in stacks)
        if total and total + size > weights:
            twin.layers = twin.layers[:number]
            break
        total += size
    return twin


def kernel_frame(
    model: "Model", settings: dict[str, dict[str, Any]], ids: list[int]
) -> "pd.DataFrame":
    """Each setting's kernel and its error: relative distance of a token's output of the experts of
    the first layer that has some (of tokens that went to the same ones), and of its logits, from
    float32 products of the same weights in the same format. Medians over the tokens, with 95 %
    intervals between order statistics (of fewer than 6 tokens: the smallest and the largest).

    A setting that cannot compute this model says why. Of a large model only the first layers run,
    with the settings on the experts alone; the column says how many layers. Copies are let go
    again after each setting, and those that come after `LARGE_S` seconds, or after an interrupt,
    are not measured."""
    import numpy as np
    import pandas as pd

    from ktlab.probe import Recorder

    layer = f"layers.{model.moe_blocks[0].index}"
    name, chosen = f"{layer}.experts.output", f"{layer}.router.ids"
    every, model = len(model.layers), beginning(model)
    count, of_logits, what = len(model.layers), "logits, %", "experts' output, %"
    large, start = count < every, monotonic()
    if large:  # serial code takes seconds a token, and a layout is a copy of what it is set on
        ids, of_logits = ids[:LARGE_TOKENS], f"logits of the first {count} layers, %"
    tell = ProgressBar("kernels", shown=None if large else False)

    def outputs(words: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        recorder = Recorder((name, chosen))
        on = {word: {"experts": value} for word, value in words.items()} if large else words
        with passing(model) if large else nullcontext(), model.override(**on):
            logits = model.forward(ids, probe=recorder).numpy()
            kernel = str(model.moe_blocks[0].experts.kernel)
        found = recorder.joined()
        return found[name].numpy(), np.sort(found[chosen].numpy()), logits, kernel

    references: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, str]] = {}

    def reference(words: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """What another format loses is not the kernel's: each is held against itself."""
        formats = {word: words[word] for word in FORMAT_WORDS if word in words}
        if repr(formats) not in references:
            # NumPy holds one expert's floats at a time, torch all of them.
            references[repr(formats)] = outputs({"backend": "numpy", **formats})
        return references[repr(formats)]

    rows, stopped = [], ""
    for number, (label, words) in enumerate(settings.items(), 1):
        if large and not stopped and monotonic() - start > LARGE_S:
            stopped = f"not measured: {LARGE_S:.0f} s are over"
        why = stopped
        try:
            if not why:
                exact, exact_ids_TK, exact_logits, _ = reference(words)
                found, ids_TK, logits, kernel = outputs(words)
        except SettingError as error:
            why = str(error).split(";")[0]
        except KeyboardInterrupt:
            why = stopped = "not measured: interrupted"
        tell(number, len(settings))
        if why:
            rows.append({"setting": label, "kernel": why, what: "", of_logits: ""})
            continue
        # Where two experts are nearly equal, rounding before the router lets it take the other one.
        same_T = (ids_TK == exact_ids_TK).all(-1)
        rows.append(
            {
                "setting": label,
                "kernel": kernel,
                what: _relative(found[same_T], exact[same_T]) if same_T.any() else "other experts",
                of_logits: _relative(logits, exact_logits),
            }
        )
    return pd.DataFrame(rows).set_index("setting")


def _relative(found_TD: Any, exact_TD: Any) -> str:
    """Median over tokens of |found - exact| / |exact|, in per cent, with its interval: two digits
    of each, which leave room for two such columns on a narrow page."""
    import numpy as np

    error_T = np.linalg.norm(found_TD - exact_TD, axis=-1) / np.linalg.norm(exact_TD, axis=-1)
    found = median((100 * error_T).tolist())
    if found.low == found.high or len(error_T) == 1:
        return _two_digits(found.value)
    return f"{_two_digits(found.value)} [{_two_digits(found.low)}, {_two_digits(found.high)}]"


def _two_digits(value: float) -> str:
    return f"{value:#.2g}" if value else "0"


assert TOKENS
