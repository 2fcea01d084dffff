"""The second live view of notebook 03: which experts are near, and what that is worth.

A strategy and a budget fill the map; a click moves one expert, or a part of a layer. Hits are of
held-out text, bytes of the plan. L layers with experts, E experts.
"""

import math
import threading
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np
from numpy.typing import NDArray

from ktlab import figures, html
from ktlab.errors import PlacementError
from ktlab.experts.caches import CacheReplay
from ktlab.kernels import native
from ktlab.measurement.speed import SpeedComparison, measure_speed
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, live, numbers
from ktlab.notebook.near import Cell, Routes, expert_map, part_cells, part_map, part_shades
from ktlab.placement.engines import KTLAB
from ktlab.placement.listed import machine_names
from ktlab.placement.machine import THIS
from ktlab.placement.placement import Placement, kind_of
from ktlab.placement.plan import Plan, plan
from ktlab.placement.predict import Prediction, predict
from ktlab.placement.strategies import STRATEGIES, Fixed
from ktlab.placement.strategy_placement import path_of
from ktlab.placement.strategy_scores import curves

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

BY_HAND = "by hand"
SHOWN = ("static", "lru", "lru+next", "least-stale", "oracle")
"""Curves beside the choice: one that never changes, caches, and their bound."""
LINK_BYTES_PER_S = 25e9
"""PCIe 4.0 x16, about what is reached of 31.5e9: an assumption, as in the notebook."""
PROMPT, STEPS = 32, 12
AS_USUAL: frozenset[Cell] = frozenset({("embedding", None)})
"""What is on the CPU beside experts where nobody has moved it."""
COLOURS = "orange: on the GPU; blue: on the CPU, the stronger the more used"


class PlacementView(Instrument):
    """Choose experts for the fast device: `placement`, `hit_rate`, `plan`, and `speed` where it
    can be measured.

    `trace` is the model's own: one half is what strategies learn from, on the other hits are
    counted. `stand_in` is that of `Model.place`, for a machine without a GPU. `predicted` has the
    speeds of this placement, every part of it: "there" by `engine` on the machine that is chosen,
    and "here" by ktlab where this machine has all its devices.
    """

    title = "What is near? A map of the experts"

    def __init__(
        self,
        model: "Model",
        trace: Any,
        *,
        context: int | None = None,
        link_bytes_per_s: float = LINK_BYTES_PER_S,
        stand_in: Mapping[str, str] | None = None,
        machine: str = "2x6454s+4090d",
        engine: str = "ktransformers-0.2.1",
    ) -> None:
        super().__init__(model)
        self.engine = engine
        self.routes = Routes.of(model, trace)
        self.trace = trace
        self.context, self.link_bytes_per_s = context, link_bytes_per_s
        self.stand_in = dict(stand_in or {})
        layers, experts = len(self.routes.layers), self.routes.shape.experts
        self.near_LE: NDArray[np.bool_] = np.zeros((layers, experts), bool)
        self.curves: CacheReplay | None = None
        self.plan: Plan | None = None
        self.speed: SpeedComparison | None = None
        self.predicted: Mapping[str, Prediction] = {}
        self._why_no_plan = ""
        self._filling = False
        fixed = [name for name, found in STRATEGIES.items() if isinstance(found, Fixed)]
        self.strategy_choice = widgets.Dropdown(
            options=[*fixed, BY_HAND], value="static", description="strategy"
        )
        self.strategy_choice.layout.width = "230px"
        self.budget_slider = widgets.IntSlider(
            value=layers * experts // 4, min=0, max=layers * experts, step=layers,
            description="experts near", continuous_update=False,
            style={"description_width": "initial"},
        )  # fmt: skip
        self.budget_slider.layout.width = "420px"
        self.machine_choice = widgets.Dropdown(
            options=[name for name in machine_names() if name != THIS], value=machine,
            description="predict for",
        )  # fmt: skip
        self.machine_choice.layout.width = "260px"
        self.machine_choice.observe(lambda _: self.refresh(), "value")
        self._last = "static"
        self.near_LE = self.routes.choose("static", self.budget_slider.value)
        self.strategy_choice.observe(lambda _: self._changed(), "value")
        self.budget_slider.observe(lambda _: self._changed(slid=True), "value")
        self.map = live(expert_map(self.routes, self.near_LE))
        self.map.data[0].on_click(self._expert_clicked)
        self.far: frozenset[Cell] = AS_USUAL
        self.parts = live(part_map(self.routes.shape, self.far))
        self.parts.data[0].on_click(self._part_clicked)
        blank = [0.0] * (experts + 1)
        named = {name: (blank, blank, blank) for name in SHOWN}
        chance = np.arange(experts + 1) / experts
        self.plot = live(figures.hit_rate_curves(np.arange(experts + 1), named, chance))
        self.plot.add_scatter(
            x=[0], y=[0], mode="markers", name="this choice", error_y={"array": [0]},
            marker={"symbol": "star", "size": 14, "color": figures.VERMILION,
                    "line": {"color": figures.INK, "width": 1}},
            hovertemplate="this choice: %{y:.1%}<extra></extra>",
        )  # fmt: skip
        self.summary, self.ledger_html = widgets.HTML(), widgets.HTML()
        row = widgets.HBox([self.strategy_choice, self.budget_slider, self.machine_choice])
        row.add_class("kt-controls")
        maps = [self.map, self.parts]
        self.body.children = [row, self.summary, *maps, self.ledger_html, self.plot]
        self.refresh()

    # What is chosen --------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The choice as a value, for `model.place` and `ktlab.plan`."""
        return self.routes.placement(self.near_LE, self.far)

    @property
    def hit_rate(self) -> Any:
        """Of the choice on held-out text, with its interval."""
        return self.routes.hit_rate(self.near_LE)

    def move(self, layer: int, expert: int) -> None:
        """Bring one expert near, or send it away, as a click does."""
        if layer not in self.routes.layers or not 0 <= expert < self.routes.shape.experts:
            raise PlacementError(
                f"layer {layer}, expert {expert}: expected one of layers "
                f"{list(self.routes.layers)} and 0 to {self.routes.shape.experts - 1}"
            )
        near_LE = self.near_LE.copy()
        near_LE[self.routes.layers.index(layer), expert] ^= True
        self.near_LE = near_LE
        self._fill(BY_HAND, int(near_LE.sum()))
        self.refresh()

    def move_part(self, component: str, layer: int | None = None) -> None:
        """Send a component of a layer to the other device, as a click does."""
        cells = [cell for row in part_cells(self.routes.shape) for cell in row if cell is not None]
        if (component, layer) not in cells:
            names = ", ".join(dict.fromkeys(name for name, _ in cells))
            raise PlacementError(
                f"{component!r} of layer {layer} cannot be moved here; parts are {names}"
            )
        self.far = self.far ^ {(component, layer)}
        self.refresh()

    def set(self, strategy: str, budget: int) -> None:
        """Fill the map by a strategy."""
        self._fill(strategy, budget)
        self._changed()

    def _fill(self, strategy: str, budget: int) -> None:
        self._filling = True
        try:
            self.strategy_choice.value = strategy
            self.budget_slider.value = budget
        finally:
            self._filling = False

    def _changed(self, *, slid: bool = False) -> None:
        if self._filling:
            return
        if self.strategy_choice.value == BY_HAND:
            if not slid:
                return  # nothing has moved yet
            self._fill(self._last, self.budget_slider.value)
        self._last = str(self.strategy_choice.value)
        self.near_LE = self.routes.choose(self._last, int(self.budget_slider.value))
        self.refresh()

    def _expert_clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.xs:
            self.move(int(points.ys[0]), int(points.xs[0]))

    def _part_clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.xs:
            where = points.xs[0]
            self.move_part(str(points.ys[0]), None if where == "once" else int(where))

    # Working ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Count the present choice: hits at once, then bytes and predicted speeds, then the
        measured one where its devices are there."""
        self.submit(self._count, "counting")

    def _count(self, cancel: threading.Event) -> None:
        near_LE, far = self.near_LE, self.far
        rate = self.routes.hit_rate(near_LE)
        placement = self.routes.placement(near_LE, far)

        def show_map() -> None:
            self.plan, self.speed, self.predicted = None, None, {}
            with self.map.batch_update():
                self.map.data[0].z = self.routes.shades(near_LE)
                self.map.layout.title.text = f"{COLOURS}; click to move"
            with self.parts.batch_update():
                self.parts.data[0].z = part_shades(self.routes.shape, far)
            self._show_choice(near_LE, rate)

        if not self.publish(cancel, show_map):
            return
        if self.curves is None:
            found = curves(SHOWN, self.trace)
            if not self.publish(cancel, lambda: self._show_curves(found)):
                return
        try:
            counted = plan(path_of(self.model), placement=placement, context=self.context)
        except PlacementError as error:  # a model without a file
            self._why_no_plan = str(error)
        else:
            told = self._predict(placement)
            if not self.publish(cancel, lambda: self._show_plan(counted, told)):
                return
        if not self._can_run(placement):
            return
        settings = {"cpu": {}, "placed": {"placement": placement, "stand_in": self.stand_in}}
        speed = measure_speed(
            self.model, settings, prompt_tokens=PROMPT, decode_tokens=STEPS, cancel=cancel
        )
        if speed is not None:
            self.publish(cancel, lambda: self._show_speed(speed))

    def _predict(self, placement: Placement) -> dict[str, Prediction]:
        who = {"there": (self.machine_choice.value, self.engine)}
        if _all_here(placement) and not native.unavailable():
            who["here"] = (THIS, KTLAB)
        return {
            where: predict(
                path_of(self.model),
                machine=machine,
                engine=engine,
                placement=placement,
                loads=self.routes.loads,
                top_k=self.routes.top_k,
                prompt=min(512, self.model.config.context_length // 2),
                generate=1,
            )
            for where, (machine, engine) in who.items()
        }

    def _can_run(self, placement: Placement) -> bool:
        return self._stands_in(placement) or _all_here(placement)

    def _stands_in(self, placement: Placement) -> bool:
        return bool(set(self.stand_in) & set(placement.devices))

    # Showing ---------------------------------------------------------------------------------

    def _show_choice(self, near_LE: NDArray[np.bool_], rate: Any) -> None:
        with self.plot.batch_update():
            here = self.plot.data[-1]
            here.x, here.y = [near_LE.sum() / len(near_LE)], [rate.value]
            ends = max(0.0, rate.high - rate.value), max(0.0, rate.value - rate.low)
            here.error_y = {"array": [ends[0]], "arrayminus": [ends[1]], "color": figures.INK}
        self.note = self._learnt()
        self.summary.value = numbers(self.figures())

    def _learnt(self) -> str:
        halves = self.routes.halves
        return f"hits on {halves.tokens:,} held-out tokens; {halves.method}"

    def _show_curves(self, found: CacheReplay) -> None:
        self.curves = found
        with self.plot.batch_update():
            for number, name in enumerate(SHOWN):
                curve = found.curve(name)
                band, line = self.plot.data[2 * number], self.plot.data[2 * number + 1]
                band.y = np.r_[curve.high_C, curve.low_C[::-1]]
                line.y = curve.rate_C

    def _show_plan(self, counted: Plan, told: Mapping[str, Prediction]) -> None:
        self.plan, self.predicted = counted, told
        notes = dict.fromkeys(note for one in told.values() for note in one.notes)
        self.note = "; ".join([self._learnt(), *notes])
        self.summary.value = numbers(self.figures())
        self.ledger_html.value = self._ledger()

    def _show_speed(self, speed: SpeedComparison) -> None:
        self.speed = speed
        self.summary.value = numbers(self.figures())

    def figures(self) -> dict[str, Any]:
        """What the choice is worth, as numbers."""
        near_LE, rate = self.near_LE, self.hit_rate
        banks = {block.index: block.experts for block in self.model.moe_blocks}
        sizes = [banks[layer].expert_bytes for layer in self.routes.layers]
        size = float(near_LE.sum(1) @ np.array(sizes))
        lookups, expert_bytes = self.routes.lookups_per_token, float(np.mean(sizes))
        missed = rate.mapped(lambda share: (1 - share) * lookups)
        count = f"{int(near_LE.sum()):,} of {near_LE.size:,}"
        found: dict[str, Any] = {
            "near": f"{count} experts, {html.decimal_bytes(size)}",
            "hit rate, held out": rate,
            "not near, a token": f"{missed} of {lookups:.0f}",
        }
        if missed.value:
            moved = missed.mapped(lambda count: count * expert_bytes)
            bound = moved.mapped(lambda n: self.link_bytes_per_s / n if n > 0 else math.inf)
            divisor, unit = html.decimal_unit(moved.value, "B")
            said = moved.mapped(lambda n: n / divisor, unit)
            found["if fetched instead"] = f"{said} a token, ≤ {bound} tokens/s"
        for where, told in self.predicted.items():
            place = "here" if where == "here" else f"on {told.machine}"
            for phase in ("decode", "prefill"):
                speed = html.quantity(getattr(told, f"{phase}_tokens_per_s"))
                found[f"{phase}, predicted {place}"] = f"{speed} tokens/s"
        if self.speed is not None:
            where = "stand-in" if self._stands_in(self.placement) else "measured here"
            found[f"decode, {where}"] = self.speed.speeds["placed"].decode.tokens_per_s
            found["against all on the CPU"] = f"× {self.speed.speeds['placed'].decode_ratio}"
        elif not self._can_run(self.placement):
            found["decode, measured"] = "no GPU here"
        return found

    def _ledger(self) -> str:
        if self.plan is None:
            return escape(self._why_no_plan)
        kinds = list(dict.fromkeys(kind for one in self.plan.ledgers for kind in one.by_kind))
        rows = [
            (one.device, *(html.decimal_bytes(one.by_kind.get(k, 0)) for k in kinds),
             html.decimal_bytes(one.needed))
            for one in self.plan.ledgers
        ]  # fmt: skip
        title = f"bytes on each device at a context of {self.plan.context:,} tokens"
        return html.card(title, html.table(rows, ("device", *kinds, "in all")))

    def to_html(self) -> str:
        with self.worker.lock:
            strategy = self.strategy_choice.value
            return html.card(
                f"{self.title}: {strategy}",
                html.Raw(style("instrument") + numbers(self.figures())),
                html.Raw(self._ledger()),
                html.Raw(f'<div class="s">{escape(self.note)}</div>'),
            )

    def snapshot(self) -> Snapshot:
        self.wait()
        return Snapshot(self.to_html(), *self._pictures(), plain=repr(self))

    def _pictures(self) -> "list[Figure]":
        drawn = expert_map(self.routes, self.near_LE, title=COLOURS)
        found = [drawn, part_map(self.routes.shape, self.far)]
        if self.curves is not None:
            found.append(
                self.curves.plot().add_trace(self.plot.data[-1]).update_layout(title_text="")
            )
        return found


def _all_here(placement: Placement) -> bool:
    """Whether this machine has every device that something is on."""
    import torch

    return torch.cuda.is_available() or all(kind_of(d) != "cuda" for d in placement.devices)
