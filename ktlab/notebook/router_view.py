"""The live view of notebook 02: which experts a text is sent to, token by token and layer by layer.

L layers, E experts, T tokens, K selected.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from ktlab import figures, html
from ktlab.errors import ContextError
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, TextSource, live, numbers
from ktlab.notebook.token_view import LIMIT, token_view

if TYPE_CHECKING:
    from ktlab.model.model import Model
    from ktlab.model.trace import Trace

FIRST = 32
"""Tokens traced for the first answer; the rest follows."""
BY_GROUP = -1  # not None, which a drop-down takes for nothing chosen
NAMES = ("all domains", "this text")


class RouterView(Instrument):
    """Pick a layer, an expert, a text; hover a token. `trace` is the trace of what is shown.

    `reference` (a trace of other text, e.g. all domains) is drawn behind the loads.
    """

    title = "Which experts does a text use?"

    def __init__(
        self, model: "Model", texts: Mapping[str, str], *, reference: "Trace | None" = None
    ) -> None:
        super().__init__(model)
        self.reference = reference
        self.trace: Trace | None = None
        self.pieces: list[str] = []
        self._preliminary = False
        layers = list(model.config.moe_layers)
        self.source = TextSource(texts, self.refresh)
        self.layer_slider = widgets.SelectionSlider(
            options=layers, value=layers[len(layers) // 2], description="layer"
        )
        grouped = model.config.n_group > 1
        experts = [(f"{'by group' if grouped else 'weight'} of the heaviest", BY_GROUP)]
        experts += [(f"weight of expert {e}", e) for e in range(model.config.num_experts)]
        self.expert_choice = widgets.Dropdown(options=experts, value=BY_GROUP, description="colour")
        self.expert_choice.layout.width = "280px"
        self.summary = widgets.HTML()
        self.tokens = widgets.HTML()
        zeros_LE = np.zeros((len(layers), model.config.num_experts))
        height = 250
        before = None if reference is None else zeros_LE[0]
        self.bars = live(figures.router_histogram(zeros_LE[0], before, height=height))
        self.bars.update_layout(yaxis_rangemode="tozero")
        for trace, name in zip(self.bars.data, NAMES[-len(self.bars.data) :], strict=True):
            trace.name = name
        self.map = live(figures.load_heatmap(zeros_LE, layers, height=height))
        self.bars.data[-1].on_click(self._bar_clicked)
        self.map.data[0].on_click(self._cell_clicked)
        for control in (self.layer_slider, self.expert_choice):
            control.observe(lambda _: self._redraw(), "value")
        controls = widgets.HBox([self.source.choice, self.layer_slider, self.expert_choice])
        controls.add_class("kt-controls")
        charts = widgets.HBox([self.bars, self.map])
        charts.add_class("kt-row")
        self.body.children = [controls, self.source.area, self.summary, charts, self.tokens]
        self.refresh()

    @property
    def layer(self) -> int:
        return int(self.layer_slider.value)

    @property
    def expert(self) -> int | None:
        """The expert whose weight colours the text, or None for the groups."""
        chosen = int(self.expert_choice.value)
        return None if chosen == BY_GROUP else chosen

    # Working ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Trace the text anew: its beginning at once, then all of it."""
        self.submit(self._trace, "tracing")

    def _trace(self, cancel: threading.Event) -> None:
        ids = self.model.tokenizer.encode(self.source.text)
        longest = min(LIMIT, self.model.config.context_length)
        cut, ids = len(ids) > longest, ids[:longest]
        name = self.source.name
        for count in sorted({min(FIRST, len(ids)), len(ids)}):
            if cancel.is_set():
                return
            trace = self.model.trace(ids[:count], domain=name)
            pieces = self.model.tokenizer.pieces(ids[:count])

            def show(trace: "Trace" = trace, pieces: list[str] = pieces) -> None:
                self.trace, self.pieces = trace, pieces
                self._preliminary = len(trace) < len(ids)
                seconds = trace.stages["total"]
                self.note = f"{len(trace):,} tokens traced in {seconds:.2f} s" + (
                    f"; the text is longer, its first {longest:,} tokens are shown" if cut else ""
                )
                self._redraw()

            if not self.publish(cancel, show):
                return

    def _redraw(self) -> None:
        with self.worker.lock:
            if self.trace is None:
                return
            statistics, layer = self.trace.routing, self.layer
            relative_LE = statistics.load_LE() * statistics.num_experts
            row = statistics.layers.index(layer)
            with self.bars.batch_update():
                self.bars.data[-1].y = relative_LE[row]
                colour = [figures.BLUE] * statistics.num_experts
                if self.expert is not None:
                    colour[self.expert] = figures.VERMILION
                self.bars.data[-1].marker.color = colour
                if self.reference is not None:
                    self.bars.data[0].y = self.reference.routing.histogram(layer).relative_E
                self.bars.layout.title.text = f"layer {layer}: load, × uniform"
            with self.map.batch_update():
                self.map.data[0].z = relative_LE
                self.map.layout.title.text = "all layers (click a cell)"
            self.summary.value = self._numbers_html()
            self.tokens.value = self._tokens_html()

    def _bar_clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.xs:
            self.expert_choice.value = int(points.xs[0])

    def _cell_clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.xs:
            self.layer_slider.value = int(points.ys[0])
            self.expert_choice.value = int(points.xs[0])

    # Showing ---------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """What the text did in `layer`, as numbers."""
        if self.trace is None:
            raise ContextError("nothing is traced yet; wait() for the first answer")
        statistics, layer = self.trace.routing, self.layer
        entropy, histogram = statistics.entropy(layer), statistics.histogram(layer)
        hottest = int(histogram.relative_E.argmax())
        found = {
            "entropy of the load": entropy.interval,
            "at most": f"{entropy.maximum:.3g} bits",
            "as many as": f"{entropy.interval.mapped(lambda bits: 2.0**bits)} experts used alike",
            "hottest": f"expert {hottest}, ×{statistics.hottest(layer)} uniform",
            "unused": f"{int((histogram.counts_E == 0).sum())} of {len(histogram)}",
        }
        if len(self.trace) > 2:
            reuse = statistics.reuse(layer)
            # A share, as in the table of all texts.
            found["used again at the next token"] = f"{reuse.interval} (chance {reuse.chance:.3f})"
        return found

    def _numbers_html(self) -> str:
        return numbers(self.figures(), preliminary=self._preliminary)

    def _tokens_html(self) -> str:
        assert self.trace is not None
        layers = self.trace.routing.layers
        config = self.model.config
        return token_view(
            self.pieces,
            {i: self.trace[f"layers.{i}.router.ids"] for i in layers},
            {i: self.trace[f"layers.{i}.router.weights"] for i in layers},
            layer=self.layer,
            num_experts=config.num_experts,
            n_group=config.n_group,
            expert=self.expert,
        )

    def to_html(self) -> str:
        with self.worker.lock:
            if self.trace is None:
                return super().to_html()
            return html.card(
                f"{self.title} Layer {self.layer}, {self.source.name}, {self.note}",
                html.Raw(style("instrument")),
                html.Raw(self._numbers_html()),
                html.Raw(self._tokens_html()),
            )

    def snapshot(self) -> Snapshot:
        self.wait()
        statistics, layer = self.trace.routing, self.layer  # type: ignore[union-attr]
        before = self.reference.routing.histogram(layer) if self.reference else None
        plot = statistics.histogram(layer).plot(before=before)
        for trace, name in zip(plot.data, NAMES[-len(plot.data) :], strict=True):
            trace.name = name
        return Snapshot(self.to_html(), plot, plain=repr(self))
