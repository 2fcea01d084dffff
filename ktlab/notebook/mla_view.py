"""The live view of notebook 04: naive and absorbed attention side by side.

T tokens of a call, S cached positions.
"""

import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from ktlab import figures, html
from ktlab.attention.cache import FORMS
from ktlab.measurement.pace import pace
from ktlab.measurement.roofline import measure_machine
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, TextSource, live, numbers
from ktlab.notebook.mla_tables import check_latent
from ktlab.notebook.mla_timing import (
    Agreement,
    AttentionTime,
    affordable,
    agreement,
    cache_bytes,
    default_contexts,
    exact_agreement,
    in_memory,
    measure,
    times_faster,
    work,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

COLOR = {"naive": figures.ORANGE, "absorbed": figures.BLUE}
DASH = {"naive": "dash", "absorbed": "solid"}
MOST_TOKENS, READ_S = 512, 5.0
"""Both forms read so many tokens, or as many as this model reads in so many seconds."""
MEASURE_S = 20.0
CALLS = (1, 16, 128)


class MLAView(Instrument):
    """Pick how many tokens a call has: 1 is decoding, more is prefill. `points` are the timings."""

    title = "One set of weights, two ways to attend"

    def __init__(self, model: "Model", texts: Mapping[str, str]) -> None:
        check_latent(model)
        super().__init__(model)
        self.agreement: Agreement | None = None
        self.exact: Agreement | None = None
        """The same with exact products, where the kernels here round."""
        self.points: list[dict[Any, AttentionTime]] = []
        self.contexts = default_contexts(min(4096, model.config.context_length))
        self.source = TextSource(texts, self.refresh)
        self.calls = widgets.ToggleButtons(
            options=[("1 (decoding)", 1), *((f"{n} (prefill)", n) for n in CALLS[1:])],
            description="tokens a call",
            style={"button_width": "110px", "description_width": "90px"},
        )
        self.calls.observe(lambda _: self.refresh(), "value")
        self.again = widgets.Button(description="measure again", icon="refresh")
        self.again.on_click(lambda _: self.refresh())
        self.summary = widgets.HTML()
        self.charts = {
            "time": live(_lines("time", "attention, ms", measured=True)),
            "work": live(_lines("work", "attention, MFLOP", measured=False)),
            "cache": live(_lines("cache", "MiB", measured=False)),
        }
        top = widgets.HBox([self.source.choice, self.calls, self.again])
        top.add_class("kt-controls")
        row = widgets.HBox(list(self.charts.values()))
        row.add_class("kt-row")
        row.add_class("kt-thirds")
        self.body.children = [top, self.source.area, self.summary, row]
        self.refresh()

    # Working ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Counts at once; then agreement on the text; then the clock, context after context."""
        with self.worker.lock:
            self.points = []
            self.summary.value = numbers(self.figures(), preliminary=True)
            self._draw_counts()
            self._draw_times()
        self.submit(self._measure, "comparing and timing")

    def _measure(self, cancel: threading.Event) -> None:
        tokens = int(self.calls.value)
        quick = pace(self.model)
        ids = self.model.tokenizer.encode(self.source.text)
        ids = ids[: quick.read(READ_S, MOST_TOKENS, least=64)]
        found = agreement(self.model, ids)
        if not self.publish(cancel, lambda: self._show_agreement(found, None)):
            return
        if found.rounded and not found.equal:
            exact = exact_agreement(self.model, ids)
            if not self.publish(cancel, lambda: self._show_agreement(found, exact)):
                return
        ceilings = measure_machine()
        fitting = in_memory(self.model, [n for n in self.contexts if n >= tokens])
        contexts, repeats = affordable(quick.seconds(tokens), fitting, MEASURE_S)
        points = measure(
            self.model,
            tokens=tokens,
            contexts=contexts,
            repeats=repeats,
            ceilings=ceilings,
            cancel=cancel,
        )
        for point in points:
            if not self.publish(cancel, partial(self._show_point, point)):
                return

    # Showing ---------------------------------------------------------------------------------

    def _show_agreement(self, found: Agreement, exact: Agreement | None) -> None:
        self.agreement, self.exact = found, exact
        self.summary.value = numbers(self.figures())

    def _show_point(self, point: dict[Any, AttentionTime]) -> None:
        self.points.append(point)
        first = next(iter(point.values()))
        self.note = (
            f"median of {len(first.seconds)} repeats in alternation, bars: quartiles; dotted: the "
            "least time that this machine's measured ceilings allow"
        )
        self.summary.value = numbers(self.figures())
        self._draw_times()

    def figures(self) -> dict[str, Any]:
        """Agreement, cache and the clock in numbers."""
        found: dict[str, Any] = {}
        if self.agreement is not None:
            a = self.agreement
            if a.rounded and not a.equal:
                if self.exact is not None:
                    found["logits, exact products"] = _verdict(self.exact)
                found["logits, the kernels here (activations in 8 or 16 bits)"] = (
                    f"apart by up to {a.max_difference:.2g}, where a router's near tie tips"
                )
            else:
                found["logits"] = _verdict(a)
            found["KL divergence"] = a.kl
            found[f"same top-1 of {a.tokens:,} tokens"] = a.same_top1
        per_token = {form: cache_bytes(self.model, form, 1) for form in FORMS}
        ratio = per_token["naive"] / per_token["absorbed"]
        found["cache a token"] = (
            f"{per_token['absorbed']:,} B absorbed, {per_token['naive']:,} B naive (×{ratio:.1f})"
        )
        if self.points:
            last = self.points[-1]
            found[f"absorbed faster, at context {last['absorbed'].context:,}"] = (
                f"×{times_faster(last)}"
            )
        return found

    def _draw_counts(self) -> None:
        tokens = int(self.calls.value)
        contexts = [n for n in self.contexts if n >= tokens]
        for number, form in enumerate(FORMS):
            sizes = [cache_bytes(self.model, form, n) / 2**20 for n in contexts]
            flops = [work(self.model, form, tokens, n)[0] / 1e6 for n in contexts]
            for name, values in (("cache", sizes), ("work", flops)):
                with self.charts[name].batch_update():
                    line = self.charts[name].data[number]
                    line.x, line.y = contexts, values

    def _draw_times(self) -> None:
        chart = self.charts["time"]
        with chart.batch_update():
            # While nothing is measured: the axes that will be there, not Plotly's guess.
            ends = np.log10([self.contexts[0], self.contexts[-1]])
            chart.layout.xaxis.range = [float(ends[0]) - 0.1, float(ends[1]) + 0.1]
            chart.layout.yaxis.range = None if self.points else [0, 2]
            chart.layout.yaxis.autorange = True if self.points else None
            for number, form in enumerate(FORMS):
                points = [p[form] for p in self.points]
                contexts = [p.context for p in points]
                line, floor = chart.data[2 * number], chart.data[2 * number + 1]
                line.x, line.y = contexts, [1e3 * p.median_s for p in points]
                line.error_y.array = [1e3 * (p.spread_s[1] - p.median_s) for p in points]
                line.error_y.arrayminus = [1e3 * (p.median_s - p.spread_s[0]) for p in points]
                floor.x = contexts
                floor.y = [1e3 * p.bound.floor_s if p.bound else np.nan for p in points]

    def table(self) -> str:
        """The timings as an HTML table."""
        rows = [
            (
                f"{p.context:,}",
                form,
                f"{1e3 * p.median_s:.3g} [{1e3 * p.spread_s[0]:.3g}, {1e3 * p.spread_s[1]:.3g}]",
                html.quantity(p.flop, "FLOP"),
                html.byte_size(p.bytes),
                str(p.bound) if p.bound else "",
            )
            for point in self.points
            for form, p in point.items()
        ]
        headers = ("context", "form", "ms, quartiles", "work", "moved", "of what is possible")
        return html.table(rows, headers)

    def to_html(self) -> str:
        with self.worker.lock:
            tokens = int(self.calls.value)
            each = f"{tokens} token{'s' * (tokens > 1)} a call"
            title = f"{self.title}: {each}, {self.source.name}"
            return html.card(
                title,
                html.Raw(style("instrument") + numbers(self.figures())),
                html.Raw(self.table()),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )

    def snapshot(self) -> Snapshot:
        import plotly.graph_objects as go

        self.wait()
        plots = [go.Figure(self.charts[name].to_dict()) for name in self.charts]
        return Snapshot(self.to_html(), *plots, plain=repr(self))


def _verdict(found: Agreement) -> str:
    if found.equal:
        return f"equal within {found.max_difference:.2g}"
    return f"DIFFERENT, by {found.max_difference:.2g} at most"


def _lines(title: str, unit: str, *, measured: bool) -> "Figure":
    """An empty chart over context, both axes logarithmic: a line for each form and its floor."""
    fig = figures.figure(title, x="context, tokens", y=unit, height=300)
    for form in FORMS:
        line = {"color": COLOR[form], "dash": DASH[form], "width": 2}
        fig.add_scatter(
            x=[], y=[], name=form, mode="lines+markers", line=line, marker={"color": COLOR[form]},
            hovertemplate=f"{form} at %{{x:,}}: %{{y:.3g}} {unit.split()[-1]}<extra></extra>",
            error_y={"array": [], "arrayminus": [], "color": figures.INK, "thickness": 1.2},
        )  # fmt: skip
        if measured:
            fig.add_scatter(
                x=[], y=[], name=f"{form}, least", mode="lines", showlegend=False,
                line={"color": COLOR[form], "dash": "dot", "width": 1.2},
                hovertemplate=f"{form}, least possible: %{{y:.3g}} ms<extra></extra>",
            )  # fmt: skip
    ticks = default_contexts(1 << 14)
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{n:,}" for n in ticks])
    steps = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
    fig.update_yaxes(type="log", tickvals=steps, ticktext=[f"{step:g}" for step in steps])
    return fig.update_layout(showlegend=measured)
