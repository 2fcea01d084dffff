"""The live view of notebook 05: a format for each component, its size, and what the text loses."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from ktlab import figures, html
from ktlab.errors import ContextError, SettingError
from ktlab.measurement.pace import pace
from ktlab.measurement.quality import Quality, stream_quality
from ktlab.measurement.tokens import BaselineCache
from ktlab.model.components import COMPONENTS
from ktlab.model.settings import component_formats
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, TextSource, live, numbers
from ktlab.notebook.quantization_plane import AS_LOADED, Tried, empty_plane, label, label_places
from ktlab.notebook.requantizing import planned_bytes, requantize_all, some_layers
from ktlab.progress import duration
from ktlab.quantization import FORMATS

if TYPE_CHECKING:
    from ktlab.model.model import Model

FORMATS_SHOWN = "q8_0 q6_k q5_k q5_1 q5_0 q4_k q4_1 q4_0 iq4_nl mxfp4 q3_k q2_k tq2_0".split()
SWEEP = "q6_k q5_0 q4_k q4_0 q3_k q2_k".split()
LEAST_IDS = 3
MOST_TOKENS, LEAST_TOKENS, READ_S = 1024, 128, 8.0
"""Read for a setting: as many tokens as this model reads in so many seconds."""


class QuantizationView(Instrument):
    """Pick formats by component; every setting tried stays as a point. `tried` holds them all."""

    title = "How many bits does each component need?"

    def __init__(
        self, model: "Model", texts: Mapping[str, str], *, formats: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(model)
        self.tried: dict[tuple[tuple[tuple[str, str], ...], tuple[int, ...], str], Tried] = {}
        self.quality: Quality | None = None
        self._baseline = BaselineCache()
        self._size = model.nbytes
        self._setting = False
        self.source = TextSource(texts, self.refresh, characters=5000)
        loaded = component_formats(self.model)
        usable = [name for name in FORMATS_SHOWN if FORMATS[name].can_quantize]
        self.choices = {}
        for component in COMPONENTS:
            if component in loaded:
                options = [(f"{AS_LOADED} ({loaded[component]})", "")] + [(n, n) for n in usable]
                choice = widgets.Dropdown(options=options, description=component, value="")
                choice.layout.width = "238px"  # the longest label: "as loaded (q4_k+q6_k)"
                choice.style.description_width = "66px"
                choice.observe(lambda _: self.refresh(), "value")
                self.choices[component] = choice
        self._some, every = some_layers(self.model), len(self.model.moe_blocks)
        names = [f"all {every} layers", f"{len(self._some)} of {every} layers"]
        self.layers_choice = widgets.Dropdown(
            options=names if self._some else names[:1],
            index=int(bool(self._some)),
            description="experts of",
            tooltip="requantizing the experts of all layers takes minutes",
        )
        self.layers_choice.layout.width = "220px"
        if not self._some:
            self.layers_choice.layout.display = "none"
        self.layers_choice.observe(lambda _: self.refresh(), "value")
        self.sweep_button = widgets.Button(
            description="sweep the experts", icon="play", tooltip=f"{', '.join(SWEEP)} in turn"
        )
        self.stop_button = widgets.Button(description="stop", icon="stop")
        self.reset_button = widgets.Button(description="as loaded", icon="undo")
        self.sweep_button.on_click(lambda _: self.sweep())
        self.stop_button.on_click(lambda _: self.stop())
        self.reset_button.on_click(lambda _: self.set({}))
        self.summary = widgets.HTML()
        self.plane = live(empty_plane(model.nbytes))
        for button in (self.sweep_button, self.stop_button, self.reset_button):
            button.layout.width = "auto"
        top = widgets.HBox(
            [
                self.source.choice,
                self.layers_choice,
                self.sweep_button,
                self.stop_button,
                self.reset_button,
            ]
        )
        row = widgets.HBox(list(self.choices.values()))
        for controls in (top, row):
            controls.add_class("kt-controls")
        self.body.children = [top, row, self.source.area, self.summary, self.plane]
        self.set(formats or {"experts": "q4_0"})

    @property
    def formats(self) -> dict[str, str]:
        """What is chosen: component -> format, without those left as loaded."""
        return {c: str(w.value) for c, w in self.choices.items() if w.value}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose experts change their format; () for all."""
        return self._some if self.layers_choice.index else ()

    def overrides(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """`formats` as `model.override` takes them, the experts in `layers` only."""
        wanted: dict[str | int, str] = {}
        for component, format in formats.items():
            spread = self.layers if component == "experts" and self.layers else (component,)
            wanted |= dict.fromkeys(spread, format)
        return {"quantize": wanted} if wanted else {}

    def set(self, formats: Mapping[str, str]) -> None:
        """Choose formats by component (others as loaded) and measure."""
        planned_bytes(self.model, formats)  # refuses what is unknown
        self._choose(formats)
        self.refresh()

    def _choose(self, formats: Mapping[str, str]) -> None:
        """Let the controls say `formats`, without measuring."""
        self._setting = True
        try:
            for component, choice in self.choices.items():
                choice.value = formats.get(component, "")
        finally:
            self._setting = False

    # Working ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Size at once, then the copies, then quality as it narrows."""
        if self._setting:
            return
        formats = self.formats
        with self.worker.lock:
            self._size = planned_bytes(self.model, self.overrides(formats).get("quantize", {}))
            self.quality = None
            self._show()
        self.submit(
            lambda cancel: self._measure(formats, cancel),
            f"measuring {label(formats, self.layers)}",
        )

    def sweep(self, names: list[str] | None = None) -> None:
        """Try formats of the experts one after the other; each becomes a point."""
        names = names or SWEEP
        others = self.formats

        def job(cancel: threading.Event) -> None:
            refused = ""
            for name in names:
                formats = {**others, "experts": name}
                if not self.publish(cancel, partial(self._choose, formats)):
                    return
                try:
                    self._measure(formats, cancel)
                except SettingError as error:  # no room for this one; a smaller one may have it
                    refused = str(error)
            if refused:
                raise SettingError(refused)

        self.submit(job, f"sweeping the experts: {', '.join(names)}")

    def stop(self) -> None:
        """Stop what runs; what was measured stays."""
        self.worker.cancel()

    def _measure(self, formats: dict[str, str], cancel: threading.Event) -> None:
        change, layers, text = self.overrides(formats), self.layers, self.source.text
        wanted, name = change.get("quantize", {}), label(formats, layers)
        size = planned_bytes(self.model, wanted)
        most = pace(self.model).read(READ_S, MOST_TOKENS, least=LEAST_TOKENS)
        ids = self.model.tokenizer.encode(text)[: most + 1]
        if len(ids) < LEAST_IDS:
            raise ContextError(
                f"the text has {len(ids)} tokens with the one that opens it; expected at least "
                f"{LEAST_IDS}, so that a prediction can be judged; type a little more"
            )
        start = perf_counter()
        for done, count in requantize_all(self.model, wanted, cancel):
            left = duration((perf_counter() - start) / done * (count - done))
            message = f"{name}: requantized {done} of {count} stages, {left} left"

            def tell(message: str = message) -> None:
                self._doing = message
                self._on_busy(True)

            self.publish(cancel, tell)
        evaluation = stream_quality(
            self.model, ids, a={}, b=change, cancel=cancel, baseline=self._baseline
        )
        for quality in evaluation:
            tried = Tried(
                formats=tuple(formats.items()),
                layers=layers if "experts" in formats else (),
                text=text,
                nbytes=size,
                quality=quality,
            )
            if not self.publish(cancel, partial(self._keep, tried)):
                return

    def _keep(self, tried: Tried) -> None:
        self.tried[tried.formats, tried.layers, tried.text] = tried
        self.quality, self._size = tried.quality, tried.nbytes
        q = tried.quality
        self.note = f"{tried.label}: {q.tokens:,} of {q.total_tokens:,} tokens; {q.method}"
        self._show()

    # Showing ---------------------------------------------------------------------------------

    def points(self) -> list[Tried]:
        """What was tried on the present text, smallest first; without the model as loaded."""
        text = self.source.area.value
        here = [t for t in self.tried.values() if t.text == text and t.formats]
        return sorted(here, key=lambda t: t.nbytes)

    def figures(self) -> dict[str, Any]:
        """Size and quality of the last setting."""
        found: dict[str, Any] = {
            "weights": html.byte_size(self._size),
            "of what was loaded": f"{self._size / self.model.nbytes:.1%}",
        }
        if self.quality is not None:
            q = self.quality
            found["KL divergence"] = q.kl_mean
            found["perplexity"] = f"× {q.perplexity_ratio}"
            found["same top-1"] = q.top1_agreement
        return found

    def _show(self) -> None:
        preliminary = self.quality is None or not self.quality.done
        self.summary.value = numbers(self.figures(), preliminary=preliminary)
        points = self.points()
        size = [t.nbytes / 2**20 for t in points]
        kl = [t.quality.kl_mean for t in points]
        value = np.array([k.value for k in kl])
        front = figures.pareto_front(-np.array(size), value) if points else np.zeros(0, bool)
        with self.plane.batch_update():
            line, dots = self.plane.data
            line.x = [s for s, f in zip(size, front, strict=True) if f]
            line.y = value[front]
            dots.x, dots.y = size, value
            dots.text = [t.label for t in points]
            dots.textposition = label_places(size, value.tolist(), self.model.nbytes / 2**20)
            dots.error_y.array = [max(0.0, k.high - k.value) for k in kl]
            dots.error_y.arrayminus = [max(0.0, k.value - k.low) for k in kl]
            dots.marker.color = [figures.ORANGE if f else figures.INK for f in front]

    def table(self) -> str:
        """Everything tried on this text as an HTML table."""
        rows = [
            (
                t.label,
                f"{t.nbytes / 2**20:.1f} MiB",
                str(replace(t.quality.kl_mean, unit="")),
                str(t.quality.perplexity_ratio),
                str(t.quality.top1_agreement),
            )
            for t in self.points()
        ]
        headers = ("formats", "weights", "KL divergence, nats", "perplexity ×", "same top-1")
        return html.table(rows, headers)

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                f"{self.title} {self.source.name}",
                html.Raw(style("instrument") + self.table()),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )

    def snapshot(self) -> Snapshot:
        import plotly.graph_objects as go

        self.wait(None)
        return Snapshot(self.to_html(), go.Figure(self.plane.to_dict()), plain=repr(self))
