"""The control room's buttons: they show a state and report what the reader asks for, no more."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from ktlab.kernels.request import AUTO
from ktlab.model.model import Model
from ktlab.notebook.control_room_choice import OWN, RULES, Choice, Library, formats
from ktlab.notebook.control_room_elsewhere import MACHINES
from ktlab.notebook.control_room_kernels import OFF, WORDS, offers, tooltip, twin_names
from ktlab.placement.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that is chosen in the room."""

    choice: Choice
    baseline: Choice
    text: str
    own_text: str = ""
    layer: int
    phase: str = "decode"
    """Which speed the plane of settings shows."""
    twin: str = OFF
    """Whose widths the true-size twin has."""
    machine: str = OFF
    """Another machine, for which speeds are predicted."""


class Controls:
    """Widgets by name in `all`; `ask(name, value)` is called for what the reader changes."""

    def __init__(
        self, model: Model, library: Library, state: State, ask: Callable[[str, Any], None]
    ) -> None:
        config = model.config
        self._ask = ask
        self._model = model
        self._showing: int | None = None
        """The thread that sets the controls itself. The reader's presses come in on others."""
        most = min(config.selectable_experts, 2 * config.top_k)
        quick = sorted({max(1, round(0.75 * config.top_k)), config.top_k})
        wide = {"description_width": "initial"}
        layers = [block.index for block in model.moe_blocks]
        make: dict[str, widgets.Widget] = {
            "quick_k": widgets.ToggleButtons(
                options=quick, value=None, tooltips=[self._tip(k, config.top_k) for k in quick]
            ),
            "top_k": widgets.IntSlider(
                min=1, max=most, value=config.top_k, continuous_update=False,
                tooltip="experts a token takes at most; beyond the trained number: extrapolation",
            ),
            "rule": widgets.Dropdown(options=list(RULES), tooltip="; ".join(RULES.values())),
            "threshold": widgets.FloatSlider(
                min=0.05, max=1.0, step=0.05, value=0.5, continuous_update=False,
                readout_format=".2f",
            ),
            "attention": widgets.ToggleButtons(
                options=list(forms := config.attention.cache_elements),
                tooltips=[f"{n:,} numbers cached a token and layer" for n in forms.values()],
            ),
            "experts": widgets.Dropdown(options=formats(model)),
            **{word: widgets.Dropdown(options=[AUTO]) for word in WORDS},
            "placement": widgets.Dropdown(
                options=list(PRESETS), tooltip="; ".join(f"{k}: {v}" for k, v in PRESETS.items())
            ),
            "text": widgets.Dropdown(options=list(library)),
            "baseline": widgets.Dropdown(options=[(state.baseline.label, state.baseline)]),
            "own_text": widgets.Textarea(
                continuous_update=False, layout={"width": "100%"},
                placeholder="Type or paste text, then press the button.",
            ),
            "layer": widgets.Dropdown(options=[(f"layer {i}", i) for i in layers]),
            "phase": widgets.ToggleButtons(options=["decode", "prefill"]),
            "twin": widgets.Dropdown(
                options=twin_names(), tooltip="measure a layer of a real model's widths as well"
            ),
            "machine": widgets.Dropdown(
                options=list(MACHINES), tooltip="predict speeds on a machine that is not here"
            ),
        }  # fmt: skip
        self.all = make
        self.stop = widgets.Button(description="stop", layout={"width": "90px"})
        self.use = widgets.Button(description="evaluate this text", layout={"width": "auto"})
        for name, widget in make.items():
            widget.style = wide
            widget.observe(lambda change, n=name: self._changed(n, change["new"]), names="value")
            widget.add_class(f"cr-c-{name.replace('_', '-')}")
        make["quick_k"].add_class("cr-k")
        self.stop.add_class("cr-stop")
        self.own = widgets.VBox([make["own_text"], self.use])
        self.own.add_class("cr-own")
        self.box = widgets.VBox([self._row(state), self.own])
        self.show(state)

    def _row(self, state: State) -> widgets.Box:
        labels = {
            "quick_k": "experts", "top_k": "", "rule": "rule", "threshold": "", "text": "text",
            "attention": "attention", "experts": "experts as", "layout": "layout",
            "backend": "backend",
            "isa": "instruction set", "placement": "placement", "baseline": "against",
        }  # fmt: skip
        cells = [
            widgets.HBox(([widgets.Label(label)] if label else []) + [self.all[name]])
            for name, label in labels.items()
        ]
        row = widgets.Box(cells)
        row.add_class("cr-controls")
        for cell in cells:
            cell.layout.overflow = "visible"
        return row

    def show(
        self, state: State, baselines: Sequence[Choice] = (), *, keep_text: bool = False
    ) -> None:
        """Set every control to the state, without asking for anything.

        `keep_text` leaves alone what the reader is typing, which the state did not accept.
        """
        showing, self._showing = self._showing, threading.get_ident()
        try:
            choice, controls = state.choice, self.all
            quick = controls["quick_k"]
            quick.value = choice.top_k if choice.top_k in quick.options else None
            controls["top_k"].max = max(controls["top_k"].max, choice.top_k)
            for word, (usable, rejected) in offers(self._model, choice).items():
                if list(controls[word].options) != usable:
                    controls[word].options = usable
                controls[word].tooltip = tooltip(word, rejected)
            for name in ("top_k", "rule", "attention", "experts", "placement", *WORDS):
                controls[name].value = getattr(choice, name)
            fixed = choice.rule == "fixed k"
            controls["threshold"].layout.display = "none" if fixed else None
            if not fixed:
                controls["threshold"].value = choice.threshold
            texts = () if keep_text else ("text", "own_text")
            for name in (*texts, "layer", "phase", "twin", "machine"):
                controls[name].value = getattr(state, name)
            if not keep_text:
                self.show_own(state.text == OWN)
            self._show_baselines(state, baselines)
        finally:
            self._showing = showing

    def show_own(self, visible: bool) -> None:
        """Open or close the box for the reader's text."""
        self.own.layout.display = None if visible else "none"

    def _show_baselines(self, state: State, baselines: Sequence[Choice]) -> None:
        control = self.all["baseline"]
        known = [choice for _, choice in control.options]
        wanted = list(dict.fromkeys([*known, *baselines, state.baseline]))
        if wanted != known:
            control.options = [(choice.label, choice) for choice in wanted]
        control.value = state.baseline

    def _changed(self, name: str, value: Any) -> None:
        if self._showing != threading.get_ident() and value is not None:
            self._ask("top_k" if name == "quick_k" else name, value)

    @staticmethod
    def _tip(k: int, trained: int) -> str:
        return "as trained" if k == trained else f"{k} of the {trained} experts a token takes"
