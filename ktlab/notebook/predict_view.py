"""The live view of notebook 08: a model, a machine and an engine; what speed to expect, and why."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ktlab import figures, html
from ktlab.checkpoint.published import published_models
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, live, numbers
from ktlab.placement import prediction_view
from ktlab.placement.engines import efficiencies, engines
from ktlab.placement.listed import machine_names
from ktlab.placement.machine import CPU, GPU, THIS, Machine, get_machine
from ktlab.placement.predict import PHASES, Prediction, predict
from ktlab.placement.published import Published, Speed, published
from ktlab.placement.timeline_view import seconds

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

STAGES: Mapping[str, tuple[str, str]] = {
    "launch": ("#8c8c8c", ""),
    "attention": (figures.ORANGE, ""),
    "scores": (figures.GREEN, ""),
    "router": (figures.PURPLE, ""),
    "dense": (figures.SKY, ""),
    "handover": (figures.VERMILION, "/"),
    "transfer": (figures.VERMILION, ""),
    "experts": (figures.BLUE, ""),
    "experts on the GPU": (figures.BLUE, "/"),
    "shared": (figures.SKY, "/"),
    "output": (figures.ORANGE, "/"),
}
"""{stage: colour, stripes}, in the order in which a token meets them."""
PROMPTS = (2, 32, 128, 500, 969, 1930, 3846, 7678, 16000, 32000)
MOST_GPU_LAYERS = 8
GENERATED = 300
"""Tokens of the answer, where nothing was published to compare with."""


class PredictView(Instrument):
    """Turn the machine, the model, the experts, the sockets, the prompt and what lies on the GPU;
    `prediction` has the answer, `published` the figure that somebody measured there, if any.

    `machines` are machines of one's own, by name, beside the listed ones.
    """

    title = "What would my machine do?"

    def __init__(self, model: "Model", machines: Mapping[str, Machine] | None = None) -> None:
        super().__init__(model)
        self.prediction: Prediction | None = None
        self.published: tuple[Speed, ...] = ()
        self._own = dict(machines or {})
        self._table: Published | None = None
        names = list(dict.fromkeys(m.name for m in published_models().values()))
        listed = [name for name in machine_names() if name != THIS]
        self.model_choice = _choice("model", names, "deepseek-v3", 230)
        self.machine_choice = _choice("machine", [*self._own, *listed], "2x6454s+4090d", 240)
        self.engine_choice = _choice("engine", list(engines()), "ktransformers-0.2", 240)
        self.sockets = widgets.IntSlider(value=2, min=1, max=4, description="sockets")
        self.experts = widgets.IntSlider(value=8, min=1, max=16, description="experts")
        self.prompt = widgets.SelectionSlider(options=PROMPTS, value=500, description="prompt")
        self.gpu_layers = widgets.IntSlider(
            value=0, min=0, max=MOST_GPU_LAYERS, description="GPU layers",
            tooltip="layers whose routed experts lie on the GPU",
        )  # fmt: skip
        self._filling = False
        for slider in (self.sockets, self.experts, self.prompt, self.gpu_layers):
            slider.continuous_update = False
            slider.layout.width = "290px"
            slider.style.description_width = "76px"
            slider.observe(lambda _: self.refresh(), "value")
        self.machine_choice.observe(self._machine_picked, "value")
        self.model_choice.observe(self._model_picked, "value")
        self.engine_choice.observe(lambda _: self.refresh(), "value")
        self.summary, self.beside, self.table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.bars, self.line = live(stage_bars(None)), live(lanes(None))
        rows = [
            widgets.HBox([self.model_choice, self.machine_choice, self.engine_choice]),
            widgets.HBox([self.experts, self.prompt, self.sockets, self.gpu_layers]),
        ]
        for row in rows:
            row.add_class("kt-controls")
        self.body.children = [*rows, self.summary, self.beside, self.bars, self.line, self.table]
        self.refresh()

    # What the reader does --------------------------------------------------------------------

    def set(self, **choices: Any) -> None:
        """Put choices in, as if turned: model, machine, engine, sockets, experts, prompt,
        gpu_layers."""
        for name, value in choices.items():
            control = getattr(self, f"{name}_choice", None) or getattr(self, name)
            control.value = value

    def refresh(self) -> None:
        """Predict what is chosen."""
        if not self._filling:
            self.submit(self._predict, "predicting")

    def _machine_picked(self, change: Mapping[str, Any]) -> None:
        self._fill(self.sockets, self._machine(str(change["new"])).sockets)

    def _model_picked(self, change: Mapping[str, Any]) -> None:
        config = published_models()[str(change["new"])].config
        self._filling = True
        try:
            self.experts.max = min(2 * config.top_k, config.selectable_experts)
        finally:
            self._filling = False
        self._fill(self.experts, config.top_k)

    def _fill(self, slider: widgets.IntSlider, value: int) -> None:
        """One answer for a pair of changes."""
        self._filling = True
        try:
            slider.value = value
        finally:
            self._filling = False
        self.refresh()

    def _machine(self, name: str) -> Machine:
        return self._own[name] if name in self._own else get_machine(name)

    # Working ---------------------------------------------------------------------------------

    def _predict(self, cancel: threading.Event) -> None:
        machine = with_sockets(self._machine(self.machine_choice.value), int(self.sockets.value))
        name, count = str(self.model_choice.value), int(self.gpu_layers.value)
        engine, k = str(self.engine_choice.value), int(self.experts.value)
        prompt = int(self.prompt.value)
        if self._table is None:
            self._table = published()
        known = (*self._table.fitted, *self._table.held_out, *self._table.left_out)
        setting = (name, machine.name, _line(engine), k, prompt)
        same = () if count else tuple(one for one in known if _setting(one) == setting)
        wanted: dict[str, Any] = {
            "machine": machine,
            "engine": engine,
            "top_k": k,
            "prompt": prompt,
            # What was published is of an answer as long as theirs.
            "generate": next((one.generate for one in same), GENERATED),
        }
        found = predict(name, **wanted)
        on_gpu = GPU in found.memory
        if count and on_gpu:
            layers = list(published_models()[name].config.moe_layers)[:count]
            placement = found.plan.placement.put("experts", GPU, layers=layers)
            found = predict(name, **wanted, placement=placement)
        self.publish(cancel, lambda: self._keep(found, same, on_gpu))

    def _keep(self, found: Prediction, same: tuple[Speed, ...], on_gpu: bool) -> None:
        self.prediction, self.published = found, same
        said = [f"predicted for {found.engine} on {found.machine}; nothing here was measured"]
        self.gpu_layers.disabled = not on_gpu
        if self.gpu_layers.value and not on_gpu:
            said.append(f"GPU layers change nothing: {found.engine} uses no GPU here")
        self.note = "; ".join([*said, *found.notes])
        self.summary.value = numbers(self.figures())
        self.beside.value = beside_html(same, found.fits)
        _redraw(self.bars, stage_bars(found))
        _redraw(self.line, lanes(found))
        self.table.value = tables_html(found)

    def figures(self) -> dict[str, Any]:
        """The two speeds with what bounds them, and memory."""
        found = self.prediction
        if found is None:
            return {}
        return {
            "prefill, predicted": f"{prediction_view.about(found.prefill_tokens_per_s)} tokens/s",
            "waits for": found.bound("prefill"),
            "decode, predicted": f"{prediction_view.about(found.decode_tokens_per_s)} tokens/s",
            "waits for ": found.bound("decode"),
            **self._error(found),
            **{
                f"memory of {name}": html.decimal_bytes(size) for name, size in found.memory.items()
            },
        }

    def _error(self, found: Prediction) -> dict[str, str]:
        """How far off predictions for this engine were where nothing had been fitted."""
        if self._table is None:
            return {}

        def of_engine(speeds: tuple[Speed, ...]) -> list[Speed]:
            return [one for one in speeds if _line(one.engine) == _line(found.engine)]

        errors = [abs(one.error) for one in of_engine(self._table.held_out)]
        if errors:
            name = f"error on {len(errors)} published speeds of this engine, held out"
            middle, worst = 100 * median(errors), 100 * max(errors)
            said = {name: f"median {middle:.0f} %, worst {worst:.0f} %"}
        else:
            said = {"error": "unknown: no published speed of this engine was held out"}
        return said | {
            f"left out of them: {one.model}": f"{100 * one.error:+.0f} %"
            for one in of_engine(self._table.left_out)
        }

    def to_html(self) -> str:
        with self.worker.lock:
            title = self.title
            if self.prediction is not None:
                title += f" {prediction_view.title(self.prediction)}"
            table = "" if self.prediction is None else tables_html(self.prediction)
            fits = None if self.prediction is None else self.prediction.fits
            return html.card(
                title, html.Raw(style("instrument") + numbers(self.figures())),
                html.Raw(beside_html(self.published, fits)), html.Raw(table),
                html.Raw(f'<div class="s">{html.text(self.note)}</div>'),
            )  # fmt: skip

    def snapshot(self) -> Snapshot:
        self.wait()
        charts = [stage_bars(self.prediction), lanes(self.prediction)] if self.prediction else []
        return Snapshot(self.to_html(), *charts, plain=repr(self))


def with_sockets(machine: Machine, sockets: int) -> Machine:
    """The same machine with more or fewer sockets, each with its memory."""
    if sockets == machine.sockets:
        return machine
    devices = tuple(
        replace(one, capacity=one.capacity * sockets // machine.sockets)
        if one.name == CPU and one.capacity is not None
        else one
        for one in machine.devices
    )
    name = f"{machine.name}, {sockets} socket{'s' * (sockets > 1)}"
    return replace(machine, name=name, sockets=sockets, numa_nodes=sockets, devices=devices)


def stage_bars(found: Prediction | None) -> "Figure":
    """Seconds of each stage over those of all, a bar for each phase."""
    title = "where the time goes: shares of all stages' seconds"
    fig = figures.figure(title, height=240)
    for name in STAGES:
        x, hover = [], []
        for phase in PHASES:
            stages = [] if found is None else list(found.stages[phase])
            whole = sum(stage.seconds for stage in stages)
            stage = next((one for one in stages if one.stage == name), None)
            x.append(stage.seconds / whole if stage else 0.0)
            hover.append(
                f"{phase}: {name} on {stage.lane}<br>{seconds(stage.seconds)}, "
                f"waits for {stage.bound}"
                if stage
                else ""
            )
        fig.add_bar(
            y=list(PHASES), x=x, name=name, orientation="h", showlegend=any(x),
            marker=_marker(name), hovertext=hover, hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    fig.update_layout(barmode="stack", bargap=0.3)
    fig.update_xaxes(tickformat=".0%", range=[0, 1.02])
    below = {"y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left", "traceorder": "normal"}
    return fig.update_layout(legend=below)


def lanes(found: Prediction | None) -> "Figure":
    """One token through the last layers, on CPU, GPU and link."""
    spans = [] if found is None else prediction_view.last_layers(found, "decode")
    title = "one token through the last layers: who is busy"
    fig = figures.figure(title, x="time, µs", height=230)
    for name in STAGES:
        mine = [span for span in spans if span.kind == name]
        fig.add_bar(
            y=[span.lane for span in mine],
            x=[1e6 * span.seconds for span in mine],
            base=[1e6 * span.start_s for span in mine],
            name=name, orientation="h", width=0.7, showlegend=False, marker=_marker(name),
            hovertext=[f"{s.label}<br>{seconds(s.seconds)}" for s in mine],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    fig.update_layout(barmode="overlay")
    fig.update_yaxes(categoryorder="array", categoryarray=["link", "CPU", "GPU"])
    return fig


def _marker(name: str) -> dict[str, Any]:
    color, stripes = STAGES[name]
    line = {"color": figures.INK, "width": 0.5}
    return {"color": color, "line": line, "pattern": {"shape": stripes}}


def _redraw(chart: Any, fig: "Figure") -> None:
    with chart.batch_update():
        for old, new in zip(chart.data, fig.data, strict=True):
            for name in ("x", "y", "base", "hovertext", "showlegend"):
                setattr(old, name, getattr(new, name))


def _setting(one: Speed) -> tuple[str, str, str, int, int]:
    """What a speed must share with the controls to stand beside their prediction."""
    return one.model, one.machine, _line(one.engine), one.top_k, one.prompt


def _line(engine: str) -> str:
    """0.2.0 and 0.2.1 are one line of releases."""
    return engine.removesuffix(".0") if engine.count(".") == 2 else engine


def beside_html(same: tuple[Speed, ...], fits: bool | None) -> str:
    """What was published for exactly this; and whether the model fits at all."""
    pill = "" if fits is not False else html.badge("does not fit", "bad")
    said = "our table has no published figure for this setting"
    if same:
        speeds = []
        for phase in PHASES:
            found = [f"{one.published:.4g}" for one in same if one.phase == phase]
            speeds += [f"{phase} {' and '.join(found)} tokens/s"] if found else []
        setting = f"this setting, {same[0].generate:,} tokens of answer"
        said = f"published for {setting}: {'; '.join(speeds)}"
    return f'<div class="ktlab">{pill}<span class="s">{html.text(said)}</span></div>'


def tables_html(found: Prediction) -> str:
    """Every stage with its seconds, behind a click."""
    headers = prediction_view.HEADERS[1:]
    parts = [
        html.details(
            f"{phase}: every stage",
            html.table(prediction_view.rows(found, phase), (phase, *headers)),
        )
        for phase in PHASES
    ]
    return html.card("", *parts)


def _choice(name: str, options: list[str], value: str, width: int) -> widgets.Dropdown:
    found = widgets.Dropdown(options=options, value=value, description=name)
    found.layout.width = f"{width}px"
    found.style.description_width = "62px"
    return found


def efficiency_table() -> Snapshot:
    """Every efficiency with what it means and how it was found, the fitted ones first."""
    found = sorted(efficiencies().items(), key=lambda item: not item[1].fitted)
    rows = [
        (
            html.Raw(f"{html.text(name)} {html.badge('fitted', 'warn') if one.fitted else ''}"),
            seconds(one.value) if one.unit == "s" else f"{one.value:.3g} {one.unit}",
            f"{one.meaning} ({one.how})",
        )
        for name, one in found
    ]
    headers = ("efficiency", "value", "what (how it was found)")
    plain = "\n".join(f"{name} {one.value:.4g} {one.unit}: {one.meaning}" for name, one in found)
    return Snapshot(html.card("", html.table(rows, headers)), plain=plain)
