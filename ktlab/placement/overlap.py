"""What expert deferral gains: the same stages without it and with it, on a timeline.

Attention, router and shared experts run on one device, the routed experts on another. Without
deferral each waits for the other in every layer. With n deferred the second device still computes a
layer's n lightest experts while the first is in the next layer's attention; their sum returns with
that layer's own (`ktlab.model.deferral`; KTransformers, SOSP 2025). K experts selected.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import SettingError
from ktlab.interval import Interval, median
from ktlab.placement.predict import BEFORE_EXPERTS, prepare, stages_of
from ktlab.placement.timeline import Task, Timeline, plot_timelines, schedule
from ktlab.placement.timeline_view import seconds
from ktlab.probe import Recorder
from ktlab.record import Record

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model
    from ktlab.placement.machine import Machine


@dataclass(frozen=True, kw_only=True)
class LayerTimes(Record):
    """Seconds of a layer's stages in one call, each on the device that has it to itself."""

    layer: int
    attention_s: float
    """With norms and router: what must be known before an expert can start."""
    beside_s: float = 0.0
    """The shared expert (or a dense layer's matrices), beside attention."""
    experts_s: float = 0.0
    """All `experts` selected ones; 0 in a dense layer."""
    experts: int = 0
    call_s: float = 0.0
    """The part of `experts_s` that a call takes however few experts it has."""
    there_s: float = 0.0
    """Activations to the experts' device, and their sum back."""
    back_s: float = 0.0

    def some(self, count: int) -> float:
        """Seconds of a call with `count` of the experts: memory-bound, so by their number."""
        if not count:
            return 0.0
        return self.call_s + (self.experts_s - self.call_s) * count / self.experts


@dataclass(frozen=True, kw_only=True)
class PassTimes(Record):
    """What a decoded token takes: each layer's stages, and what follows the layers."""

    layers: tuple[LayerTimes, ...]
    output_s: float = 0.0
    tokens: tuple["PassTimes", ...] = ()
    """Where it was measured, every token whose medians these are; empty for a prediction."""


@dataclass(frozen=True, kw_only=True)
class Lanes(Record):
    """How the devices are called."""

    attention: str = "GPU"
    link: str = "link"
    experts: str = "CPU"


def timeline(
    layers: Sequence[LayerTimes],
    deferred: int = 0,
    *,
    lanes: Lanes | None = None,
    after_s: float = 0.0,
    title: str = "",
    method: str = "",
) -> Timeline:
    """One pass over `layers` with `deferred` experts put off in each but the last with experts.

    `after_s` is what follows the layers, e.g. the output matrix. SettingError where more are
    deferred than selected, or seconds are negative.
    """
    most = min((times.experts for times in layers if times.experts), default=0)
    if not 0 <= deferred <= most:
        raise SettingError(f"deferred = {deferred}: expected 0 to {most}, the experts of a token")
    named = lanes or Lanes()
    tasks = _tasks(layers, deferred, named, after_s)
    return schedule(tasks, title=title or f"{deferred} deferred", method=method)


def _tasks(
    layers: Sequence[LayerTimes], deferred: int, lanes: Lanes, after_s: float
) -> Iterator[Task]:
    last = max((times.layer for times in layers if times.experts), default=None)
    before: tuple[str, ...] = ()
    for times in layers:
        i, where = times.layer, f"layer {times.layer}"
        yield Task(
            name=f"attention {i}", lane=lanes.attention, label=f"{where}: attention and router",
            kind="attention", seconds=times.attention_s, after=before,
        )  # fmt: skip
        done, start = [f"attention {i}"], f"attention {i}"
        put_off = 0 if i == last or not times.experts else deferred
        if times.there_s:
            yield Task(
                name=f"there {i}", lane=lanes.link, label=f"{where}: activations there",
                kind="copies", seconds=times.there_s, after=(start,),
            )  # fmt: skip
            start = f"there {i}"
        if times.experts:
            yield Task(
                name=f"experts {i}", lane=lanes.experts,
                label=f"{where}: {times.experts - put_off} experts", kind="experts",
                seconds=times.some(times.experts - put_off), after=(start,),
            )  # fmt: skip
            done.append(f"experts {i}")
        if times.back_s:
            # The experts' device works in order, so what the layer before put off is in it.
            yield Task(
                name=f"back {i}", lane=lanes.link, label=f"{where}: their sum back",
                kind="copies", seconds=times.back_s, after=(done[-1],),
            )  # fmt: skip
            done.append(f"back {i}")
        if put_off:
            yield Task(
                name=f"deferred {i}", lane=lanes.experts,
                label=f"{where}: {put_off} deferred experts", kind="deferred experts",
                seconds=times.some(put_off), after=(start,),
            )  # fmt: skip
        if times.beside_s:
            yield Task(
                name=f"beside {i}", lane=lanes.attention, label=f"{where}: shared or dense",
                kind="shared, dense", seconds=times.beside_s, after=(f"attention {i}",),
            )  # fmt: skip
            done.append(f"beside {i}")
        before = tuple(done)
    if after_s:
        yield Task(
            name="output", lane=lanes.attention, label="output", kind="output", seconds=after_s,
            after=before,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class DeferralGain(Record):
    """A pass with 0, 1, ... K experts deferred, and what each gains."""

    timelines: tuple[Timeline, ...]
    """By number deferred, from 0 on."""
    seconds_by_token: tuple[tuple[float, ...], ...] = ()
    """Of each measured token, by number deferred: what the intervals are of. A prediction follows
    from its assumptions and has none; how far it errs, `placement.published` says."""
    method: str = ""

    @property
    def seconds(self) -> tuple[Interval, ...]:
        """Of a pass, by number deferred: the median over tokens, or what is predicted."""
        if not self.seconds_by_token:
            return tuple(_exactly(line.seconds) for line in self.timelines)
        return tuple(median(column) for column in zip(*self.seconds_by_token, strict=True))

    @property
    def gains(self) -> tuple[Interval, ...]:
        """Times as fast as without, by number deferred, token by token."""
        tokens = self.seconds_by_token or (tuple(line.seconds for line in self.timelines),)
        pairs = [[row[0] / s if s else 1.0 for s in row] for row in tokens]
        if not self.seconds_by_token:
            return tuple(map(_exactly, pairs[0]))
        return tuple(median(column) for column in zip(*pairs, strict=True))

    @property
    def best(self) -> int:
        """The fewest deferred that gain all that there is to gain (within a thousandth)."""
        most = max(gain.value for gain in self.gains)
        return next(i for i, gain in enumerate(self.gains) if gain.value >= most * 0.999)

    def to_frame(self) -> "pd.DataFrame":
        """By number deferred: seconds and gain with their ends, and each lane's busy share."""
        import pandas as pd

        rows = [
            {
                "deferred": count,
                "seconds": taken.value,
                "seconds_low": taken.low,
                "seconds_high": taken.high,
                "gain": gain.value,
                "gain_low": gain.low,
                "gain_high": gain.high,
                **{f"{lane} busy": line.busy(lane) / (line.seconds or 1.0) for lane in line.lanes},
            }
            for count, (line, taken, gain) in enumerate(self._by_count())
        ]
        return pd.DataFrame(rows).set_index("deferred")

    def plot(self, deferred: int | None = None) -> "Figure":
        """The timeline without deferral over the one with `deferred` (default: the best), of the
        token nearest the median where it was measured; the gain, with its interval, is said beside
        it."""
        count = self.best if deferred is None else deferred
        if not 0 <= count < len(self.timelines):
            raise SettingError(f"deferred = {count}: expected 0 to {len(self.timelines) - 1}")
        shown = {"none deferred": self.timelines[0]}
        if count:
            shown[f"{count} deferred<br>{_times(self.gains[count])}"] = self.timelines[count]
        return plot_timelines(shown)

    def _by_count(self) -> Iterator[tuple[Timeline, Interval, Interval]]:
        return zip(self.timelines, self.seconds, self.gains, strict=True)

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (count, _duration(taken), _times(gain),
             *(f"{line.busy(lane) / (line.seconds or 1.0):.0%}" for lane in line.lanes))
            for count, (line, taken, gain) in enumerate(self._by_count())
        ]  # fmt: skip

    def __repr__(self) -> str:
        lanes = ", ".join(f"{lane} busy" for lane in self.timelines[0].lanes)
        rows = ["  " + "  ".join(map(str, row)) for row in self._rows()]
        title = f"Expert deferral: deferred, time, gain, {lanes}"
        return html.wrapped("\n".join([title, *rows, self._note()]))

    def _note(self) -> str:
        if not self.seconds_by_token:
            return self.method
        how = (
            f"time and gain: medians over {len(self.seconds_by_token)} tokens, "
            f"{100 * self.seconds[0].level:.0f} % intervals; drawn: the token nearest the median"
        )
        return f"{self.method}; {how}" if self.method else how

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        lanes = [f"{lane} busy" for lane in self.timelines[0].lanes]
        table = html.table(self._rows(), ("deferred", "time", "gain", *lanes))
        return html.mimebundle(repr(self), html.card("Expert deferral", table, self._note()))


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _times(gain: Interval) -> str:
    return f"×{gain.value:.2f}" if gain.low == gain.high else f"×{gain}"


def _duration(taken: Interval) -> str:
    """Seconds in the unit that suits them; a prediction's as its timeline says them."""
    if taken.low == taken.high:
        return seconds(taken.value)
    return str(taken.mapped(lambda s: 1e3 * s, "ms"))


def deferral_gain(
    times: PassTimes, *, lanes: Lanes | None = None, method: str = ""
) -> DeferralGain:
    """`timeline` for every possible number of deferred experts; of each token that was measured,
    too, from which the gain has its interval."""
    most = min((layer.experts for layer in times.layers if layer.experts), default=0)

    def lines(one: PassTimes) -> tuple[Timeline, ...]:
        return tuple(
            timeline(one.layers, count, lanes=lanes, after_s=one.output_s, method=method)
            for count in range(most + 1)
        )

    drawn, by_token = lines(times), [lines(token) for token in times.tokens]
    if by_token:
        # Medians of the stages add up to less than the median of tokens: a token has outliers,
        # each in another stage. So a whole token is drawn, the one in the middle.
        middle = statistics.median(none.seconds for none, *_ in by_token)
        drawn = min(by_token, key=lambda found: abs(found[0].seconds - middle))
    return DeferralGain(
        timelines=drawn,
        seconds_by_token=tuple(tuple(line.seconds for line in found) for found in by_token),
        method=method,
    )


def predicted_times(
    model: "str | PathLike[str]",
    *,
    machine: "str | Machine" = "2x6454s+4090d",
    engine: str = "ktransformers-0.2.1",
    context: int = 512,
    format: str | None = None,
) -> PassTimes:
    """A decoded token's stages as `ktlab.predict` has them.

    `machine` and `engine` are those of `predict`, with attention on a GPU and all experts on the
    CPU. SettingError for an engine without a GPU.
    """
    case, _ = prepare(model, machine=machine, engine=engine, format=format, prompt=context,
        generate=1)  # fmt: skip
    if not case.engine.gpu:
        raise SettingError(f"{engine} computes all on the CPU; there is nothing to overlap")
    spent: dict[tuple[int | None, str], float] = {}
    for stage in stages_of(case, "decode", context, 1):
        spent[stage.layer, stage.stage] = spent.get((stage.layer, stage.stage), 0) + stage.seconds
    found = [
        LayerTimes(
            layer=index,
            attention_s=sum(spent.get((index, name), 0.0) for name in BEFORE_EXPERTS),
            beside_s=sum(spent.get((index, name), 0.0) for name in ("shared", "dense")),
            experts_s=spent.get((index, "experts"), 0.0),
            experts=case.top_k if "experts" in rows else 0,
            there_s=spent.get((index, "transfer"), 0.0) / 2,
            back_s=spent.get((index, "transfer"), 0.0) / 2,
        )
        for index, rows in enumerate(case.layers("decode"))
    ]
    return PassTimes(layers=tuple(found), output_s=spent.get((None, "output"), 0.0))


def measured_times(model: "Model", *, tokens: int = 32, context: int = 128) -> PassTimes:
    """A decoded token's stages, timed one after another here: medians over tokens, and each token.

    The model decodes `tokens` after a prompt of `context`, stage by stage: no native call for a
    whole layer. Nothing of it overlaps, so it says what a second device would have to hide.
    """
    total = context + tokens + 1
    if tokens < 1 or context < 1 or total > model.config.context_length:
        raise SettingError(
            f"tokens = {tokens}, context = {context}: expected at least 1 of both, and fewer than "
            f"{model.config.context_length} together"
        )
    twin = model.clone()
    twin.set(deferred=0)
    ids = [7 + i % (model.config.vocab_size - 7) for i in range(total)]
    cache = twin.new_cache(context=total)
    twin.next_logits(ids[:context], cache)
    recorders = [Recorder() for _ in range(tokens + 1)]
    for recorder, i in zip(recorders, range(context, total), strict=True):
        twin.next_logits(ids[i : i + 1], cache, probe=recorder)
    counted = recorders[1:]  # the first use of a matrix packs it
    moe = {block.index: block for block in twin.moe_blocks}

    def times(recorders: Sequence[Recorder]) -> PassTimes:
        def spent(layer: int, *stages: str) -> float:
            return sum(middle(f"layers.{layer}.{stage}") for stage in stages)

        def middle(stage: str) -> float:
            return statistics.median(recorder.seconds.get(stage, 0.0) for recorder in recorders)

        found = (
            LayerTimes(
                layer=block.index,
                attention_s=spent(block.index, "attention", "router"),
                beside_s=spent(block.index, "shared", "mlp"),
                experts_s=spent(block.index, "experts"),
                experts=moe[block.index].router.rule.k_max if block.index in moe else 0,
            )
            for block in twin.layers
        )
        return PassTimes(layers=tuple(found), output_s=middle("output"))

    return replace(times(counted), tokens=tuple(times([recorder]) for recorder in counted))
