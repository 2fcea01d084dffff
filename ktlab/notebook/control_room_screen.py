"""What the control room shows: panels of HTML, two live Plotly figures, and the same as a picture.

Whoever calls holds the room's lock. Traits are set, nothing is printed.
"""

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from ktlab import hardware
from ktlab.html import text
from ktlab.measurement.twin import Twin
from ktlab.model.model import Model
from ktlab.notebook import control_room_plane as plane
from ktlab.notebook import control_room_router as router
from ktlab.notebook import control_room_speed as speed
from ktlab.notebook import control_room_twin as twins
from ktlab.notebook.control_room_controls import Controls, State
from ktlab.notebook.control_room_elsewhere import elsewhere, elsewhere_title
from ktlab.notebook.control_room_html import header, panel_title
from ktlab.notebook.control_room_kernels import OFF, kernel_line
from ktlab.notebook.control_room_quality import quality
from ktlab.notebook.control_room_results import Point, Results
from ktlab.notebook.control_room_text import generated
from ktlab.notebook.css import style
from ktlab.notebook.live_figure import LiveFigure

PANELS = (
    "kernel", "quality", "speed", "stages", "twin_title", "twin", "elsewhere_title", "elsewhere",
    "router_title", "router", "text", "plane_title",
)  # fmt: skip
PHASES = {
    "first answer": "first answer from a few tokens",
    "pictures": "first answer from a few tokens",
    "stages": "timing the stages, counting the router's choices",
    "quality": "reading",
    "text": "writing",
    "speed": "measuring speed, baseline and setting in turn",
    "twin": "true-size twin",
    "done": "done",
    "stopped": "stopped; press resume to go on",
    "failed": "failed",
    "closed": "closed",
}


class Screen:
    """The widgets that show; `widget` is the whole view."""

    def __init__(self, model: Model, controls: Controls) -> None:
        self._controls = controls
        self._model = model
        self._header = header(
            model,
            hardware.cpu_name(),
            ", ".join(hardware.widest_isa()) or "instruction sets unknown",
            torch.get_num_threads(),
        )
        self.html = {name: widgets.HTML() for name in PANELS}
        self.message_html = widgets.HTML()
        self.message_html.add_class("cr-message")
        self.status_html = widgets.HTML()
        self._experts = model.config.num_experts
        self.live = {name: _live(fig) for name, fig in self.figures(None, (), None).items()}
        layer, phase, shape, machine = (
            controls.all[name] for name in ("layer", "phase", "twin", "machine")
        )
        html, live = self.html, self.live
        self.panels = {
            "quality": _panel(html["quality"]),
            "speed": _panel(html["speed"], html["stages"]),
            "router": _panel(_head(html["router_title"], layer), live["router"], html["router"]),
            "plane": _panel(_head(html["plane_title"], phase), live["plane"]),
            "text": _panel(html["text"]),
            "twin": _panel(_head(html["twin_title"], shape), html["twin"]),
            "elsewhere": _panel(_head(html["elsewhere_title"], machine), html["elsewhere"]),
        }
        for name, panel in self.panels.items():
            panel.add_class(f"cr-panel-{name}")
        self.grid = widgets.VBox(list(self.panels.values()))
        self.grid.add_class("cr-grid")
        bar = widgets.HBox([self.status_html, controls.stop])
        bar.add_class("cr-statusline")
        self.widget = widgets.VBox(
            [
                widgets.HTML(style("control_room") + self._header),
                controls.box,
                self.html["kernel"],
                self.message_html,
                bar,
                self.grid,
            ]
        )
        self.widget.add_class("ktlab-room")
        self._shown: dict[str, Any] = {}

    def first(self, results: Results | None) -> None:
        """The quality of a setting, before all else; without it, what was shown is dimmed."""
        if results is None:
            self.grid.add_class("cr-stale")
        else:
            self.html["quality"].value = quality(results)
            self.grid.remove_class("cr-stale")

    def show(
        self,
        results: Results | None,
        points: Sequence[Point],
        state: State,
        twin: Twin | str | None = None,
        doing: str = "",
    ) -> None:
        """Everything that is known of a setting; while that is nothing, the last one, dimmed.

        `twin` may be why there is none; `doing` is what it is at.
        """
        self.show_switches(state)
        if results is None and self._shown:
            self.first(None)
            return
        for name, value in self._html(results, state, twin, doing).items():
            self.html[name].value = value
        keys: dict[str, tuple[Any, Any]] = {
            "router": (results.histogram if results else None, state.layer),
            "plane": (tuple(points), state.phase),
        }
        stale = {name for name, key in keys.items() if self._shown.get(name) != key}
        self._shown.update(keys)
        if "router" in stale:
            router.redraw(self.live["router"], keys["router"][0], state.layer)
        if "plane" in stale:
            _redraw(self.live["plane"], plane.figure(points, state.phase))

    def show_switches(self, state: State) -> None:
        """The kernel that a setting runs on and why: known at once, nothing is measured for it."""
        self.html["kernel"].value = kernel_line(self._model, state.choice)
        for name, panel in self.panels.items():
            (panel.add_class if name in _wide(state) else panel.remove_class)("cr-wide")

    def _html(
        self, results: Results | None, state: State, twin: Twin | str | None, doing: str
    ) -> dict[str, str]:
        histogram = results.histogram if results else None
        return {
            "twin_title": twins.twin_title(twin, state.twin),
            "twin": twins.twin(twin, state.twin, doing),
            "elsewhere_title": elsewhere_title(state.machine),
            "elsewhere": elsewhere(self._model, results, state.choice, state.machine, state.twin),
            "quality": quality(results),
            "speed": speed.speed(results),
            "stages": panel_title("where the time goes", "by stage") + speed.stage_bars(results),
            "router_title": router.router_title(results, state.layer),
            "router": router.router(histogram, state.layer),
            "text": generated(results),
            "plane_title": plane.plane_title(results, state.text, state.baseline.label),
        }

    def message(self, message: str, *, error: bool = False) -> None:
        """A line between the buttons and the panels; "" removes it."""
        kind, role = ("cr-error", ' role="alert"') if error else ("cr-hint", "")
        self.message_html.value = (
            f'<div class="{kind}"{role}>{text(message)}</div>' if message else ""
        )

    def status(
        self, phase: str, state: State, results: Results | None, doing: str = "", *, busy: bool
    ) -> None:
        """What is going on, and whether it can be stopped."""
        twin, doing = doing, PHASES.get(phase, phase)
        quality = results.quality if results else None
        if phase == "first answer" and quality is None and state.choice.other_weights:
            doing = f"weights made ready, then a {doing}"
        elif phase == "quality" and quality is not None:
            doing = f"reading, {quality.tokens:,} of {quality.total_tokens:,} tokens"
        elif phase == "speed" and results is not None and results.speed is not None:
            doing += f", {results.speed.repeats} of {results.speed.total_repeats}"
        elif phase == "twin" and twin:
            doing += f", {twin}"
        elif phase == "done" and results is not None:
            doing = f"measured in {results.seconds:.1f} s"
        kind = "busy" if busy else "done" if phase == "done" else ""
        self.status_html.value = (
            f'<div class="cr-status {kind}" data-phase="{text(phase)}"><i></i>'
            f"{text(state.choice.label)} against {text(state.baseline.label)} on "
            f"{text(state.text)}: {text(doing)}</div>"
        )
        self._controls.stop.description = "resume" if phase in ("stopped", "failed") else "stop"
        self._controls.stop.disabled = phase in ("done", "closed")

    # Figures and the static picture --------------------------------------------------------------

    def figures(
        self, results: Results | None, points: Sequence[Point], state: State | None
    ) -> dict[str, go.Figure]:
        """The figures as plain Plotly objects."""
        histogram = results.histogram if results else None
        layer, phase = (state.layer, state.phase) if state else (0, "decode")
        return {
            "router": router.figure(histogram, layer, self._experts),
            "plane": plane.figure(points, phase),
        }

    def static(
        self,
        results: Results | None,
        points: Sequence[Point],
        state: State,
        twin: Twin | str | None = None,
    ) -> str:
        """The same panels with small SVG pictures in the place of the Plotly figures."""
        found = self._html(results, state, twin, "")
        histogram = results.histogram if results else None
        bodies = {
            "quality": found["quality"],
            "speed": found["speed"] + found["stages"],
            "router": found["router_title"] + router.bars(histogram, state.layer) + found["router"],
            "plane": found["plane_title"] + plane.plane(points, state.phase),
            "text": found["text"],
            "twin": found["twin_title"] + found["twin"],
            "elsewhere": found["elsewhere_title"] + found["elsewhere"],
        }
        inner = "".join(
            f'<div class="cr-panel{" cr-wide" * (name in _wide(state))}">{body}</div>'
            for name, body in bodies.items()
        )
        grid = f'<div class="cr-grid">{inner}</div>'
        kernel = kernel_line(self._model, state.choice)
        return f'{style("control_room")}<div class="ktlab-room">{self._header}{kernel}{grid}</div>'


def _wide(state: State) -> set[str]:
    """Panels over both columns; what is switched off has one sentence, for which half is enough."""
    switches = {"twin": state.twin, "elsewhere": state.machine}
    return {"text", *(name for name, value in switches.items() if value != OFF)}


def _panel(*children: widgets.Widget) -> widgets.VBox:
    box = widgets.VBox(list(children))
    box.add_class("cr-panel")
    return box


def _head(title: widgets.HTML, control: widgets.Widget) -> widgets.HBox:
    box = widgets.HBox([title, control])
    box.add_class("cr-head")
    return box


def _live(fig: go.Figure) -> LiveFigure:
    live = LiveFigure(fig)
    live._config = {"responsive": True, "displayModeBar": False}
    live.update_layout(autosize=True)
    return live


def _redraw(live: LiveFigure, fig: go.Figure) -> None:
    """Give the live figure what changes of `fig`, which has the same traces; quicker than all."""
    with live.batch_update():
        for old, new in zip(live.data, fig.data, strict=True):
            for name in ("x", "y", "text", "marker", "error_x", "error_y"):
                value = getattr(new, name, None)
                if value is not None:
                    setattr(old, name, value)
        for axis in ("xaxis", "yaxis"):
            live.layout[axis].title.text = fig.layout[axis].title.text
            live.layout[axis].range = fig.layout[axis].range
            live.layout[axis].tickvals = fig.layout[axis].tickvals
