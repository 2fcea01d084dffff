"""`ktlab.predict`: what speed to expect of a model on a machine, and what bounds it.

>>> ktlab.predict("deepseek-v3", machine="2x6454s+4090d", engine="ktransformers-0.2", top_k=6)

Seconds come from `stage_times`, what runs beside what from a `Timeline`, bytes from `ktlab.plan`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.embedded import EMBEDDED_MODELS, data_path
from ktlab.errors import SettingError
from ktlab.placement import prediction_view
from ktlab.placement.case import Case, Pass, StageTime, on_gpu
from ktlab.placement.engine_plan import config_of, engine_plan, format_word
from ktlab.placement.engines import KTLAB, Efficiency, Engine, efficiencies
from ktlab.placement.engines import engine as engine_of
from ktlab.placement.machine import THIS, Machine, get_machine
from ktlab.placement.placement import kind_of
from ktlab.placement.plan import Plan
from ktlab.placement.stage_times import stage_times
from ktlab.placement.timeline import Task, Timeline, schedule
from ktlab.placement.touched import Load
from ktlab.record import Record, unsaved

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.trace import Trace
    from ktlab.placement.placement import Placement

PHASES = ("prefill", "decode")
BEFORE_EXPERTS = ("launch", "attention", "scores", "router")
FEED = ("dense", "experts", "experts on the GPU", "shared")
"""What runs side by side on what attention gives."""


@dataclass(frozen=True, kw_only=True)
class Prediction(Record):
    """Speeds of one prompt and its answer, with where the time goes."""

    model: str
    machine: str
    engine: str
    format: str
    top_k: int
    prompt: int
    generate: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    """At the mean context of the answer."""
    memory: Mapping[str, int]
    """{device: bytes}, as `ktlab.plan` counts them."""
    fits: bool | None
    """Whether every device has room; speeds are of a machine that has it."""
    stages: Mapping[str, tuple[StageTime, ...]]
    """{"prefill": of the whole prompt, "decode": of one token}: all layers of a stage together."""
    efficiencies: Mapping[str, Efficiency]
    notes: tuple[str, ...] = ()
    plan: Plan = unsaved()
    timelines: Mapping[str, Timeline] = unsaved()
    """{"prefill", "decode"}: layer by layer, on CPU, GPU and link."""

    @property
    def times(self) -> dict[str, dict[str, float]]:
        """{phase: {stage: seconds}}; stages on different lanes may overlap."""
        return {
            phase: {stage.stage: stage.seconds for stage in stages}
            for phase, stages in self.stages.items()
        }

    def bound(self, phase: str) -> str:
        """What the phase waits for most: its longest stage and that stage's bound."""
        longest = max(self.stages[phase], key=lambda stage: stage.seconds)
        return (
            longest.stage if longest.stage == longest.bound else f"{longest.stage}, {longest.bound}"
        )

    def to_dict(self) -> dict[str, Any]:
        """With `times`, which `from_dict` finds again in `stages`."""
        return {**super().to_dict(), "times": self.times}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Prediction":
        """What `to_dict` wrote, without plan and timelines."""
        return super().from_dict({k: v for k, v in data.items() if k != "times"})

    def to_frame(self) -> "pd.DataFrame":
        """One row for each stage of each phase."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"phase": phase, **stage.to_dict()}
                for phase, stages in self.stages.items()
                for stage in stages
            ]
        ).drop(columns=["layer", "parts"])

    def plot(self, phase: str = "decode") -> "Figure":
        """The first layers' timeline of a phase."""
        return prediction_view.figure(self, phase)

    def __str__(self) -> str:
        return prediction_view.text(self)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return prediction_view.bundle(self)


def predict(
    model: "str | PathLike[str]" = "deepseek-v3",
    *,
    machine: "str | Machine" = "this",
    engine: str = KTLAB,
    format: str | None = None,
    top_k: int | None = None,
    prompt: int = 512,
    generate: int = 128,
    placement: "Placement | Plan | None" = None,
    loads: "Mapping[int, Load] | Trace | None" = None,
    changes: Mapping[str, float] | None = None,
) -> Prediction:
    """What speed to expect of one prompt of `prompt` tokens and `generate` tokens of answer.

    `model` and `format` are those of `ktlab.plan`; without a format a published model has the
    engine's usual one. `machine` is a listed name ("2x6454s+4090d"), "this", or a `Machine`.
    `engine` is "ktransformers-0.2", "ktransformers-0.2.1", "ktransformers-0.3", "llama.cpp" or
    "ktlab". `placement` says what lies where, by default the engine's own rule; a `Plan` says in
    which formats, too, and a `format` beside it must be its own. `loads` are {layer: each expert's
    share of choices} or a trace; layers that are missing are even. `changes` gives efficiencies
    other values. Raises SettingError for what is unknown, with the nearest name, and for an engine
    that cannot run on the machine; CheckpointError and FormatError as `ktlab.plan` does.
    """
    case, planned = prepare(
        model,
        machine=machine,
        engine=engine,
        format=format,
        top_k=top_k,
        prompt=prompt,
        generate=generate,
        placement=placement,
        loads=loads,
        changes=changes,
    )
    how, where = case.engine, case.machine
    passes = {phase: stages_of(case, phase, prompt, generate) for phase in PHASES}
    method = f"predicted for {how.name} on {where.name}"
    timelines = {
        phase: timeline(stages, title=f"{planned.model}, {phase}", method=method)
        for phase, stages in passes.items()
    }
    return Prediction(
        model=planned.model,
        machine=where.name,
        engine=how.name,
        format=format or format_word(str(model), how, placement),
        top_k=case.top_k,
        prompt=prompt,
        generate=generate,
        prefill_tokens_per_s=prompt / timelines["prefill"].seconds,
        decode_tokens_per_s=1 / timelines["decode"].seconds,
        memory={one.device: one.needed for one in planned.ledgers},
        fits=planned.fits,
        stages={phase: added(stages) for phase, stages in passes.items()},
        efficiencies=case.shares,
        notes=tuple(_notes(planned, case)),
        plan=planned,
        timelines=timelines,
    )


def prepare(
    model: "str | PathLike[str]",
    *,
    machine: "str | Machine",
    engine: str,
    format: str | None = None,
    top_k: int | None = None,
    prompt: int,
    generate: int,
    placement: "Placement | Plan | None" = None,
    loads: "Mapping[int, Load] | Trace | None" = None,
    changes: Mapping[str, float] | None = None,
) -> tuple[Case, Plan]:
    """What `predict` computes on: checked, planned. Its arguments and errors."""
    how = engine_of(engine)
    shares = efficiencies(changes)
    config = config_of(fspath(model))
    k = config.top_k if top_k is None else top_k
    _check_numbers(config, k, prompt, generate)  # before a machine is measured, which takes a while
    where = Machine.measure() if machine == THIS else get_machine(machine)
    given = () if placement is None else placement.placement.devices
    _check(how, where, given)
    planned = engine_plan(fspath(model), how, where, format, prompt + generate, placement)
    case = Case(
        config=config,
        rows=planned.rows,
        machine=where,
        engine=how,
        shares=shares,
        top_k=k,
        loads=_loads(loads, str(model)),
    )
    return case, planned


def stages_of(case: Case, phase: str, prompt: int, generate: int) -> list[StageTime]:
    """Every stage of every layer of the whole prompt, or of one token at the mean context."""
    tokens, context = (prompt, 0) if phase == "prefill" else (1, prompt + generate // 2)
    one = Pass(phase=phase, tokens=tokens, context=context, room=prompt + generate)
    return list(stage_times(case, one))


def timeline(stages: Iterable[StageTime], *, title: str = "", method: str = "") -> Timeline:
    """What runs beside what; its `seconds` are those of the pass."""
    return schedule(_tasks(stages), title=title, method=method)


def _check_numbers(config: ModelConfig, top_k: int, prompt: int, generate: int) -> None:
    """All of what cannot be on any machine, together."""
    problems = [
        f"{word}={value!r}, expected a whole number from 1"
        for word, value in (("prompt", prompt), ("generate", generate))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if not 1 <= top_k <= config.selectable_experts:
        problems.append(f"top_k={top_k}: {config.name} has 1 to {config.selectable_experts}")
    if problems:
        raise SettingError("predict: " + "; ".join(problems))


def _check(how: Engine, where: Machine, devices: Iterable[str]) -> None:
    """All of what cannot be there, together."""
    problems = how.problems(where)
    there = [device.name for device in where.devices]
    asked = [name for name in devices if kind_of(name) == "cuda"]
    for name in asked:
        if name not in there:
            problems.append(
                f"the placement has parts on {name}, and {where.name} has {', '.join(there)}"
            )
        elif int(name.partition(":")[2]) >= len(where.gpus):
            problems.append(f"{where.name} gives the size of {name} and not its rates (gpus)")
    if (asked or how.gpu) and where.gpus and "pcie" not in where.links:
        problems.append(f'{where.name} gives no rate of its link (links: {{"pcie": bytes/s}})')
    if problems:
        raise SettingError("predict: " + "; ".join(problems))


def _loads(loads: "Mapping[int, Load] | Trace | None", model: str) -> Mapping[int, Load]:
    """Each expert's share of choices, by layer: as given, out of a trace, or as measured for the
    embedded model on its held-out texts."""
    if loads is None:
        return _tiny_loads() if model in EMBEDDED_MODELS else {}
    if isinstance(loads, Mapping):
        return loads
    return {layer: loads.routing.load(layer) for layer in loads.routing.layers}


@lru_cache(maxsize=1)
def _tiny_loads() -> Mapping[int, Load]:
    said = json.loads(data_path("measurements", "tiny_load.json").read_text(encoding="utf-8"))
    return {int(layer): counts for layer, counts in said["counts"].items()}


def _tasks(stages: Iterable[StageTime]) -> list[Task]:
    """A layer after another; in it attention, then side by side what takes its result: on the same
    device at once, elsewhere after the link and back over it."""
    layers: dict[int | None, dict[str, StageTime]] = {}
    for stage in stages:
        found = layers.setdefault(stage.layer, {})
        before = found.get(stage.stage)  # of other experts in another node's memory
        found[stage.stage] = stage if before is None else added((before, stage))[0]
    tasks: list[Task] = []
    ends: tuple[str, ...] = ()

    def add(
        stage: StageTime, after: tuple[str, ...], share: float = 1.0, more: str = ""
    ) -> tuple[str, ...]:
        where = "" if stage.layer is None else f"layer {stage.layer} "
        name = f"{where}{stage.stage}{more}"
        tasks.append(
            Task(
                name=name,
                lane=stage.lane,
                label=name,
                seconds=share * stage.seconds,
                kind=stage.stage,
                after=after,
            )  # fmt: skip
        )
        return (name,)

    for found in layers.values():
        for name in ("handover", *BEFORE_EXPERTS, "output"):
            if name in found:
                ends = add(found[name], ends)
        feed = [found[name] for name in FEED if name in found]
        link, start, away, done = found.get("transfer"), ends, ends, ends
        if link is not None:
            away = add(link, start, 0.5, " there")
            home = found["attention"].lane
            far = [add(one, away) for one in feed if one.lane != home]
            done = add(link, sum(far, ()) or away, 0.5, " back")
            feed = [one for one in feed if one.lane == home]
        near = [add(one, start) for one in feed]
        ends = sum(near, () if near and link is None else done)
    return tasks


def added(stages: Iterable[StageTime]) -> tuple[StageTime, ...]:
    """The layers of each stage added up, in the order in which a token meets them."""
    found: dict[str, list[StageTime]] = {}
    for stage in stages:
        found.setdefault(stage.stage, []).append(stage)
    added = []
    for name, layers in found.items():
        parts: dict[str, float] = {}
        for layer in layers:
            for bound, seconds in layer.parts.items():
                parts[bound] = parts.get(bound, 0.0) + seconds
        added.append(
            StageTime(
                layer=layers[0].layer if len({one.layer for one in layers}) == 1 else None,
                stage=name,
                lane=layers[0].lane,
                seconds=sum(layer.seconds for layer in layers),
                flop=sum(layer.flop for layer in layers),
                bytes=sum(layer.bytes for layer in layers),
                bound=max(parts, key=lambda bound: parts[bound]),
                parts=parts,
            )
        )
    return tuple(added)


def _notes(planned: Plan, case: Case) -> Iterator[str]:
    how, there = case.engine, any(kind_of(d) == "cuda" for d in planned.placement.devices)
    if how.experts is not None:
        yield f"{how.name} makes {how.experts} of the experts, whatever the file has"
    if there and not how.gpu:
        names = {"gpu_bytes_share", "gpu_flop_share", how.link}
        names.update(name for phase in PHASES for name in how.launch[phase])
        yield (
            f"no speed of {how.name} with a GPU was measured or published here: "
            f"{', '.join(sorted(names))} are usual or counted values"
        )
    elif how.gpu and (apart := _kept_from_gpu(planned)):
        yield (
            f"{', '.join(apart)} on the CPU: no published speed of {how.name} has them there; "
            "they are taken at the rate of its experts"
        )
    if planned.fits is False:
        yield "does not fit: the speeds are those of the same machine with enough memory"


def _kept_from_gpu(planned: Plan) -> list[str]:
    """Components that a GPU engine usually has there, and this plan on the CPU."""
    usual = ("attention", "router", "shared", "dense", "output")
    found = (row.part.component for row in planned.rows if not on_gpu(row))
    return sorted(set(found) & set(usual), key=usual.index)
