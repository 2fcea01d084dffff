"""Live views of notebook 06: bytes as they lie, and the walk of a tile product over them."""

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from ktlab import html
from ktlab.kernels.codings import CHUNK, PANEL
from ktlab.notebook.byte_drawing import Bytes, drawing
from ktlab.notebook.byte_maps import drawable
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, live, numbers
from ktlab.notebook.tile_walk import FORMATS as WALKED
from ktlab.notebook.tile_walk import INSTRUCTIONS, TOKENS, Walk
from ktlab.probe import Recorder
from ktlab.quantization import FORMATS, QTensor, fallback_format

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

DRAWN = "q4_k q8_0 q6_k q5_k q4_0 q5_0 q3_k q2_k int4_group32 int4_group128".split()
TEXT = "def quicksort(items):\n    return sorted(items)  # of course\n"


class BytesView(Instrument):
    """Pick a format and a row: bytes of a real expert, in blocks and packed; `shown` has them."""

    title = "The same weights, as they lie in memory"

    def __init__(
        self, model: "Model", *, layer: int | None = None, expert: int = 0, format: str = "q4_k"
    ) -> None:
        super().__init__(model)
        self.shown: Bytes | None = None
        self.tensor = _gate(model, layer, expert)
        names = [n for n in DRAWN if _fits(self.tensor, n) and FORMATS[n].can_quantize]
        self.format_choice = widgets.Dropdown(
            options=names, value=format if format in names else names[0], description="format"
        )
        rows = min(64, self.tensor.shape[0] // PANEL * PANEL)
        self.row_slider = widgets.IntSlider(
            min=0, max=rows - 1, value=3, description="row", continuous_update=False
        )
        self.picture = widgets.HTML()
        for control in (self.format_choice, self.row_slider):
            control.layout.width = "260px"
            control.style.description_width = "60px"
            control.observe(lambda _: self.refresh(), "value")
        row = widgets.HBox([self.format_choice, self.row_slider])
        row.add_class("kt-controls")
        self.body.children = [row, self.picture]
        self.refresh()

    def refresh(self) -> None:
        """Draw what is chosen."""
        name, row = self.format_choice.value, self.row_slider.value
        self.submit(partial(self._draw, name, row), f"packing {name}")

    def _draw(self, name: str, row: int, cancel: threading.Event) -> None:
        first = row // PANEL * PANEL
        panel = self.tensor[first : first + PANEL].requantize(name)
        shown = Bytes.of(panel, row - first)
        picture = drawing(shown, first)

        def write() -> None:
            self.shown, self.picture.value = shown, picture
            self.note = (
                f"{self.tensor.name}, requantized from {self.tensor.format.name} to {name}; "
                f"{8 * len(shown.block_bytes) / CHUNK:.4g} bits a weight in blocks, "
                f"{8 * len(shown.panel_bytes) / CHUNK / PANEL:.4g} packed"
            )

        self.publish(cancel, write)

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                self.title, html.Raw(style("instrument")), html.Raw(self.picture.value),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )  # fmt: skip

    def snapshot(self) -> Snapshot:
        self.wait(None)
        return Snapshot(self.to_html(), plain=repr(self))


class TileView(Instrument):
    """Step through a tile product of real codes and real activations. `walk` computes it."""

    title = "How a tile product walks the packed bytes"

    def __init__(self, model: "Model", *, layer: int | None = None, expert: int = 0) -> None:
        super().__init__(model)
        self.walk: Walk | None = None
        self.tensor = _gate(model, layer, expert)
        self._x_TK = _activations(self.model, layer)
        names = [n for n in WALKED if _fits(self.tensor, n)]
        self.instruction = widgets.ToggleButtons(
            options=[("AMX: TDPBSUD", "TDPBSUD"), ("AVX-512: VPDPBUSD", "VPDPBUSD")],
            tooltips=["16 tokens at once", "one token at a time"],
            style={"button_width": "auto"},
        )
        self.format_choice = widgets.Dropdown(options=names, description="format")
        self.step_slider = widgets.IntSlider(min=0, max=63, value=9, description="step")
        self.step_slider.layout.width = "420px"
        self.format_choice.layout.width = "220px"
        self.summary = widgets.HTML()
        self.chart: Any = None
        for control in (self.instruction, self.format_choice):
            control.observe(lambda _: self.refresh(), "value")
        self.step_slider.observe(lambda _: self.step(), "value")
        row = widgets.HBox([self.instruction, self.format_choice, self.step_slider])
        row.add_class("kt-controls")
        self._row = row
        self._make()
        self.chart = live(self._figure())
        self.body.children = [row, self.summary, self.chart]
        self.step()

    def refresh(self) -> None:
        """Another instruction or format: from the first step on the same columns."""
        self._make()
        self.step()

    def _make(self) -> None:
        weights = self.tensor[:PANEL].requantize(self.format_choice.value)
        walk = Walk.of(weights, self._x_TK, self.instruction.value)
        with self.worker.lock:
            self.walk = walk
            if self.step_slider.value >= walk.steps:
                self.step_slider.value = walk.steps - 1
            self.step_slider.max = walk.steps - 1

    def step(self) -> None:
        """Show the step under the slider."""
        with self.worker.lock:
            assert self.walk is not None
            index = min(self.step_slider.value, self.walk.steps - 1)
            self.note = self.walk.says(index)
            self.summary.value = numbers(self.figures())
            self._on_busy(False)
            if self.chart is not None:
                self._redraw(self._figure())

    def figures(self) -> dict[str, Any]:
        """One sum of C on its way."""
        assert self.walk is not None
        walk = self.walk
        step = walk.at(min(self.step_slider.value, walk.steps - 1))
        token = max(step.token, 0)
        columns = (4 * step.line + 4) // walk.sub * walk.sub
        return {
            f"C[{token}, 0], integer sum": f"{walk.sums(step)[token, 0]:,}",
            "scaled and put away so far": f"{walk.scaled(columns)[token, 0]:+.4f}",
            "after 256 columns": f"{walk.scaled(CHUNK)[token, 0]:+.4f}",
            "float64 product": f"{walk.exact[token, 0]:+.4f}",
            "lost to int8 activations": f"{100 * walk.error:.2g} %",
        }

    def _figure(self) -> "Figure":
        assert self.walk is not None
        return self.walk.figure(min(self.step_slider.value, self.walk.steps - 1))

    def _redraw(self, fig: "Figure") -> None:
        with self.chart.batch_update():
            for old, new in zip(self.chart.data, fig.data, strict=True):
                old.z = np.asarray(new.z)
                old.hovertemplate, old.zmax = new.hovertemplate, new.zmax
            self.chart.layout.shapes = fig.layout.shapes

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                self.title, html.Raw(style("instrument") + self.summary.value),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )  # fmt: skip

    def snapshot(self) -> Snapshot:
        return Snapshot(self.to_html(), self._figure(), plain=repr(self))


def _gate(model: "Model", layer: int | None, expert: int) -> QTensor:
    """One expert's gate matrix (F, D): real weights."""
    blocks = {b.index: b for b in model.moe_blocks}
    block = blocks[layer] if layer is not None else next(iter(blocks.values()))
    return block.experts.gate[expert]


def _activations(model: "Model", layer: int | None) -> np.ndarray:
    """(16, D) hidden states of a short text in front of a layer, scaled to unit size as a norm
    does."""
    index = model.moe_blocks[0].index if layer is None else layer
    name = f"layers.{index - 1}.hidden" if index else "embedding"
    recorder = Recorder((name,))
    ids = model.tokenizer.encode(TEXT * 4)[:TOKENS]
    model.forward(ids, probe=recorder)
    x_TD = recorder.joined()[name].numpy().astype(np.float64)
    return np.asarray(x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True)))


def _fits(tensor: QTensor, format: str) -> bool:
    """Whether rows of the tensor take the format, and it can be drawn or walked."""
    return tensor.shape[-1] >= CHUNK and fallback_format(format, tensor.shape[-1]).name == format


assert set(INSTRUCTIONS) == {"TDPBSUD", "VPDPBUSD"} and all(map(drawable, DRAWN))
