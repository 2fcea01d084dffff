"""What the control room shows: panels of HTML, two live Plotly figures, and the same as a picture.

Whoever calls holds the room's lock. Traits are set, nothing is printed.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from ktlab import figures
from ktlab.html import text
from ktlab.measurement import hardware
from ktlab.model.model import Model
from ktlab.notebook import control_room_html as panels
from ktlab.notebook import control_room_svg as svg
from ktlab.notebook.control_room_controls import Controls, State
from ktlab.notebook.control_room_results import Point, Results

PANELS = ("quality", "speed", "stages", "router_title", "router", "text", "plane_title")
PHASES = {
    "first answer": "first answer from a few tokens",
    "stages": "timing the stages, counting the router's choices",
    "quality": "reading",
    "text": "writing",
    "speed": "measuring speed, baseline and setting in turn",
    "done": "done",
    "stopped": "stopped; press resume to go on",
    "failed": "failed",
    "closed": "closed",
}


@lru_cache(maxsize=1)
def style() -> str:
    """The style sheet, inlined: nothing is fetched."""
    css = files("ktlab.notebook").joinpath("control_room.css").read_text(encoding="utf-8")
    return f"<style>{css}</style>"


class Screen:
    """The widgets that show; `widget` is the whole view."""

    def __init__(self, model: Model, controls: Controls) -> None:
        self._controls = controls
        self._header = panels.header(
            model,
            hardware.cpu_name(),
            ", ".join(hardware.isa()[-2:]) or "instruction sets unknown",
            torch.get_num_threads(),
        )
        self.html = {name: widgets.HTML() for name in PANELS}
        self.message_html = widgets.HTML()
        self.message_html.add_class("cr-message")
        self.status_html = widgets.HTML()
        experts = model.config.num_experts
        self.router = _live(figures.router_histogram([0.0] * experts, [0.0] * experts, height=200))
        self.plane = _live(figures.pareto([], [], [], x=_speed_axis("decode")), height=300)
        layer, phase = controls.all["layer"], controls.all["phase"]
        self.grid = widgets.VBox(
            [
                _panel(self.html["quality"], name="quality"),
                _panel(self.html["speed"], name="speed"),
                _panel(_head(self.html["router_title"], layer), self.router, self.html["router"],
                       name="router"),
                _panel(_head(self.html["plane_title"], phase), self.plane, name="plane"),
                _panel(self.html["stages"], name="stages"),
                _panel(self.html["text"], name="text"),
            ]
        )  # fmt: skip
        self.grid.add_class("cr-grid")
        bar = widgets.HBox([self.status_html, controls.stop])
        bar.add_class("cr-statusline")
        self.widget = widgets.VBox(
            [
                widgets.HTML(style() + self._header),
                controls.box,
                self.message_html,
                bar,
                self.grid,
            ]
        )
        self.widget.add_class("ktlab-room")
        self._shown: dict[str, Any] = {}

    def show(self, results: Results | None, points: Sequence[Point], state: State) -> None:
        """Everything that is known of a setting; dimmed numbers are the previous setting's."""
        if results is None:
            if self._shown:
                self.grid.add_class("cr-stale")
                return
        else:
            self.grid.remove_class("cr-stale")
        for name, value in self._html(results, state).items():
            self.html[name].value = value
        found = results.histogram if results else None
        self._figure("router", (found, state.layer), results, points, state)
        self._figure("plane", (tuple(points), state.phase), results, points, state)

    def _figure(
        self, name: str, key: Any, results: Results | None, points: Sequence[Point], state: State
    ) -> None:
        """Redraw one figure, if what it shows has changed."""
        if self._shown.get(name) != key:
            self._shown[name] = key
            _redraw(getattr(self, name), getattr(self, f"_{name}")(results, points, state))

    def _html(self, results: Results | None, state: State) -> dict[str, str]:
        stages = panels.panel_title("where the time goes", "by stage")
        plane = panels.panel_title("everything tried", f"on {state.text}, against {state.baseline.label}")
        return {
            "quality": panels.quality(results),
            "speed": panels.speed(results),
            "router_title": panels.router_title(results, state.layer),
            "router": panels.router(results.histogram if results else None, state.layer),
            "stages": stages + svg.stage_bars(results),
            "text": panels.generated(results),
            "plane_title": plane,
        }

    def message(self, message: str, *, error: bool = False) -> None:
        """A line between the buttons and the panels; "" removes it."""
        kind, role = ("cr-error", ' role="alert"') if error else ("cr-hint", "")
        self.message_html.value = f'<div class="{kind}"{role}>{text(message)}</div>' if message else ""

    def status(self, phase: str, state: State, results: Results | None, *, busy: bool) -> None:
        """What is going on, and whether it can be stopped."""
        doing = PHASES.get(phase, phase)
        quality = results.quality if results else None
        if phase == "quality" and quality is not None:
            doing = f"reading, {quality.tokens:,} of {quality.total_tokens:,} tokens"
        elif phase == "speed" and results is not None and results.speed is not None:
            doing += f", {results.speed.repeats} of {results.speed.total_repeats}"
        elif phase == "done" and results is not None:
            doing = f"measured in {results.seconds:.1f} s"
        kind = "busy" if busy else "done" if phase == "done" else ""
        self.status_html.value = (
            f'<div class="cr-status {kind}" data-phase="{text(phase)}"><i></i>'
            f"{text(state.choice.label)} against {text(state.baseline.label)} on "
            f"{text(state.text)}: {text(doing)}</div>"
        )
        self._controls.stop.description = "stop" if busy else "resume"
        self._controls.stop.disabled = phase in ("done", "closed")

    # Figures and the static picture --------------------------------------------------------------

    def figures(
        self, results: Results | None, points: Sequence[Point], state: State
    ) -> dict[str, go.Figure]:
        """The figures as plain Plotly objects."""
        return {
            "router": self._router(results, points, state),
            "plane": self._plane(results, points, state),
        }

    def _router(
        self, results: Results | None, points: Sequence[Point], state: State
    ) -> go.Figure:
        found = results.histogram if results else None
        if found is None:
            return go.Figure(self.router)
        i = found.layers.index(state.layer)
        return figures.router_histogram(
            found.relative("after")[i], found.relative("before")[i], height=200
        )

    def _plane(self, results: Results | None, points: Sequence[Point], state: State) -> go.Figure:
        # A single repeat has no interval yet: an error bar across the whole plane says nothing.
        bounded = [p.speed.low > 0 and p.speed.high < float("inf") for p in points]
        return figures.pareto(
            [p.speed.value for p in points],
            [p.kl.value for p in points],
            [p.label for p in points],
            speed_ends=(
                [p.speed.low if ok else p.speed.value for p, ok in zip(points, bounded, strict=True)],
                [p.speed.high if ok else p.speed.value for p, ok in zip(points, bounded, strict=True)],
            ),
            kl_ends=([p.kl.low for p in points], [p.kl.high for p in points]),
            front=[p.on_front for p in points],
            current=next((i for i, p in enumerate(points) if p.current), None),
            x=_speed_axis(state.phase),
        )

    def static(self, results: Results | None, points: Sequence[Point], state: State) -> str:
        """The same panels with small SVG pictures in the place of the Plotly figures."""
        found = self._html(results, state)
        histogram = results.histogram if results else None
        bodies = (
            found["quality"],
            found["speed"],
            found["router_title"] + svg.bars(histogram, state.layer) + found["router"],
            found["plane_title"] + svg.plane(points, state.phase),
            found["stages"],
            found["text"],
        )
        inner = "".join(f'<div class="cr-panel">{body}</div>' for body in bodies)
        return (
            f'{style()}<div class="ktlab-room">{self._header}<div class="cr-grid">{inner}</div></div>'
        )


def _speed_axis(phase: str) -> str:
    return f"{phase} speed, × baseline"


def _panel(*children: widgets.Widget, name: str) -> widgets.VBox:
    box = widgets.VBox(list(children))
    box.add_class("cr-panel")
    box.add_class(f"cr-panel-{name}")
    return box


def _head(title: widgets.HTML, control: widgets.Widget) -> widgets.HBox:
    box = widgets.HBox([title, control])
    box.add_class("cr-head")
    return box


def _live(fig: go.Figure, height: int | None = None) -> go.FigureWidget:
    live = go.FigureWidget(fig)
    live._config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    live.update_layout(autosize=True, height=height or fig.layout.height)
    return live


def _redraw(live: go.FigureWidget, fig: go.Figure) -> None:
    """Give the live figure the data of `fig`, which has the same kinds of traces, in one message."""
    with live.batch_update():
        for old, new in zip(live.data, fig.data, strict=True):
            values = new.to_plotly_json()
            values.pop("type")
            old.update(values)
        live.layout.xaxis.title.text = fig.layout.xaxis.title.text
