"""`ktlab.plan`: will it fit, and where would it go? From headers alone.

The plan is a value: frozen, comparable, to JSON and back. Where a component goes is decided in
`placed`, what it takes is counted in `ledger`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.converted import Quantization
from ktlab.checkpoint.facts import ModelFacts, read_facts
from ktlab.errors import PlacementError, SettingError, nearest, short
from ktlab.html import decimal_bytes
from ktlab.model.byte_ledger import host_copy_words
from ktlab.model.from_disk import FromDisk, from_disk
from ktlab.placement import view
from ktlab.placement.known import Known, known
from ktlab.placement.ledger import CACHE_FORMATS, ELEMENT_BYTES, Ledger, ledgers
from ktlab.placement.machine import CPU, GPU, Machine, Size, get_machine
from ktlab.placement.measured import PlanMeasured, measured
from ktlab.placement.parts import COMPONENTS, cache_part
from ktlab.placement.placed import Placed, host_copy, place, usual
from ktlab.placement.placement import Placement, kind_of
from ktlab.quantization import get_format
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

CONTEXT = 8192
"""Planned for where nobody says: what people run, not what a model could hold."""
CHUNK = 512
"""Tokens of a prefill that pass at a time (`Model.forward`)."""


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """What goes where, what it takes there, and whether it fits."""

    model: str
    source: str
    machine: Machine
    parameters: int
    active_parameters: int
    """Of one token, with the output matrix and one row of the embedding."""
    stored_bytes: int
    context: int
    attention: str
    """The form of attention whose cache is planned."""
    cache_bytes: Mapping[str, int]
    """{form: bytes of the cache at this context}, each form that the model has."""
    chunk: int
    numa_copies: int
    placement: Placement
    """Where everything goes."""
    rows: tuple[Placed, ...]
    """Component by layer, a row for each device that has some of it."""
    ledgers: tuple[Ledger, ...]
    """One for each device."""
    known: tuple[Known, ...] = ()
    """What others measured for this model, beside what is planned."""
    disk: FromDisk | None = None
    """What decode would do from disk, where host memory cannot hold the file's weights."""
    notes: tuple[str, ...] = ()

    def __getitem__(self, device: str) -> Ledger:
        """The ledger of a device."""
        for one in self.ledgers:
            if one.device == device:
                return one
        raise SettingError(
            f"the plan has no device {device!r}{nearest(device, [x.device for x in self.ledgers])};"
            f" there are {', '.join(x.device for x in self.ledgers)}"
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read back what `to_json` wrote; SettingError where `text` is something else."""
        try:
            return super().from_json(text)
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingError(
                f"expected a plan as Plan.to_json writes it, found {short(text)}: {error}; "
                "make it anew: ktlab.plan(...).to_json()"
            ) from error

    @property
    def fits(self) -> bool | None:
        """Whether every device has room; None where no size was given."""
        answers = [one.fits for one in self.ledgers]
        return None if all(a is None for a in answers) else all(a is not False for a in answers)

    @property
    def largest_context(self) -> int | None:
        """The longest context that fits everywhere; None where no size was given."""
        found = [one.largest_context for one in self.ledgers if one.largest_context is not None]
        return min(found, default=None)

    @property
    def verdict(self) -> tuple[str, ...]:
        """A line for each device, then what else should be known."""
        lines = [one.verdict for one in self.ledgers]
        lines += [str(self.disk)] if self.disk is not None else []
        return (*lines, *map(str, self.known), *self.notes)

    def check(self) -> None:
        """PlacementError where a device is too small for what must be there: by how much, and how
        much of it are routed experts, which could go elsewhere."""
        problems = []
        for one in self.ledgers:
            if one.fits is not False or one.headroom is None or one.capacity is None:
                continue
            experts = sum(
                row.bytes
                for row in self.rows
                if row.device == one.device and row.part.component == "experts"
            )
            short = decimal_bytes(-one.headroom)
            line = f"{one.device} needs {decimal_bytes(one.needed)} and has "
            line += f"{decimal_bytes(one.capacity)}: {short} too little"
            if experts:
                line += f"; {decimal_bytes(experts)} of it are routed experts"
                if experts + one.headroom < 0:
                    rest = decimal_bytes(-one.headroom - experts)
                    line += f", and without any of them it would still be {rest} too little"
            problems.append(line)
        if problems:
            raise PlacementError(f"{self.model}, context {self.context:,}: " + "; ".join(problems))

    @property
    def flop_per_token(self) -> float:
        """Of decode at this context."""
        return sum(row.part.flop_per_token for row in self.rows)

    def by_component(self) -> dict[str, view.Total]:
        """The layers of each component added up."""
        found = view.totals(self.rows)
        return {name: found[name] for name in COMPONENTS if name in found}

    def to_frame(self) -> "pd.DataFrame":
        """One row for each component of each layer."""
        import pandas as pd

        return pd.DataFrame([view.record(row) for row in self.rows])

    def ledger_frame(self) -> "pd.DataFrame":
        """One row for each device."""
        import pandas as pd

        return pd.DataFrame(
            [
                {**one.to_dict(), "needed": one.needed, "headroom": one.headroom, "fits": one.fits}
                for one in self.ledgers
            ]
        )

    def diff(self, other: "Plan") -> "pd.DataFrame":
        """Components that lie elsewhere, in another format or in another size in `other`."""
        return view.diff(self, other)

    def measured(self, model: "Model") -> PlanMeasured:
        """This plan's bytes beside those of a loaded model that is placed so: each difference with
        what explains it, or flagged. PlacementError where the model is placed otherwise."""
        return measured(self, model)

    def plot(self) -> "Figure":
        """Bytes of each device by what they are for, under its capacity."""
        return view.plot(self)

    def __str__(self) -> str:
        return view.text(self)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return view.bundle(self)


def plan(
    path_or_name: "str | PathLike[str]",
    *,
    placement: "Placement | Plan | None" = None,
    format: str | None = None,
    ram: Size | None = None,
    vram: Size | None = None,
    machine: "str | Machine | None" = None,
    context: int | None = None,
    attention: str | None = None,
    convert: Mapping[str, str] | None = None,
    quantize: Quantization | None = None,
    gpu_formats: str | Mapping[str, str] | None = None,
    numa_copies: int = 1,
    chunk: int = CHUNK,
) -> Plan:
    """What a model needs and where it would go, from its header alone.

    `path_or_name` is a .gguf file, any shard, a folder, "tiny", or a published model such as
    "deepseek-v3" with `format="q4_k_m"`. `placement` says what goes where, by default by
    KTransformers' rule; without a machine any device may be named. `ram` and `vram` are sizes
    ("382GB", "24GiB", bytes); `machine="this"` measures. `context` in tokens, by default 8,192 or
    what the model has. `attention` is the form whose cache counts. `convert` and `quantize` are
    those of `load`; `gpu_formats` overrides the 4 bits of a GPU, for all or by component,
    {"attention": "bf16"}. `numa_copies` copies of the experts exist in host memory, on a
    machine that is named no more than it has nodes. Raises
    CheckpointError for a bad file, SettingError or FormatError for a bad argument, PlacementError
    for a placement of another model or on devices that are not there.
    """
    facts = read_facts(fspath(path_or_name), format=format)
    config = facts.config
    where = get_machine(machine, ram=ram, vram=vram)
    positions = _context(config, context)
    form = _form(config, attention)
    if isinstance(gpu_formats, str):
        gpu_formats = dict.fromkeys(COMPONENTS, gpu_formats)
    _check(config, numa_copies, chunk, gpu_formats or {})
    if machine is not None:
        _check_nodes(where, numa_copies)
    rule = usual(config, where)
    chosen = rule if placement is None else placement.placement
    there = _devices(where, chosen, anything=machine is None and vram is None)
    chosen.check(config, there)
    globs = {"*": quantize} if isinstance(quantize, str) else quantize or {}
    by_format = {get_format(found): get_format(made) for found, made in (convert or {}).items()}
    by_name = {glob: get_format(made) for glob, made in globs.items()}
    weights = place(
        facts, chosen, convert=by_format, quantize=by_name, gpu_formats=gpu_formats or {}
    )
    still_there = host_copy(facts, chosen, convert=by_format, quantize=by_name)
    rows = [*weights, *_caches(config, chosen, form, positions)]
    counted = ledgers(
        config,
        where,
        chosen,
        weights,
        form=form,
        context=positions,
        chunk=chunk,
        copies=numa_copies,
    )
    forms = config.attention.cache_elements
    return Plan(
        model=facts.name,
        source=facts.source,
        machine=where,
        parameters=facts.size,
        active_parameters=_active(rows),
        stored_bytes=facts.nbytes,
        context=positions,
        attention=form,
        cache_bytes={name: _cached(config, chosen, name, positions) for name in forms},
        chunk=chunk,
        numa_copies=numa_copies,
        placement=chosen,
        rows=tuple(sorted(rows, key=_order)),
        ledgers=tuple(counted),
        known=tuple(known(config, weights, counted, numa_copies)) if chosen == rule else (),
        disk=_disk(facts, counted, rows),
        notes=(
            *_notes(facts, where, rows, counted, numa_copies),
            *filter(None, [host_copy_words(*still_there)]),
        ),
    )


def _devices(machine: Machine, placement: Placement, *, anything: bool) -> list[str]:
    """The device words that a placement may use on a machine; all, where none was given."""
    nodes = [f"numa:{node}" for node in range(machine.numa_nodes)]
    return [*(d.name for d in machine.devices), *nodes, *(placement.devices if anything else ())]


def _cached(config: ModelConfig, placement: Placement, form: str, context: int) -> int:
    """Bytes of the cache of all layers in a form, each where it is."""
    return sum(row.bytes for row in _caches(config, placement, form, context))


def _context(config: ModelConfig, context: int | None) -> int:
    if context is None:
        return min(CONTEXT, config.context_length)
    whole = isinstance(context, int) and not isinstance(context, bool)
    if not whole or not 1 <= context <= config.context_length:
        raise SettingError(
            f"context={context!r}: expected a whole number of tokens, {config.name} has 1 to "
            f"{config.context_length} positions"
        )
    return context


def _form(config: ModelConfig, attention: str | None) -> str:
    forms = list(config.attention.cache_elements)
    if attention is None:
        return forms[0]
    if attention not in forms:
        raise SettingError(
            f"attention={attention!r}{nearest(attention, forms)}: {config.name} has "
            f"{', '.join(forms)}"
        )
    return attention


def _check(
    config: ModelConfig,
    numa_copies: int,
    chunk: int,
    gpu_formats: Mapping[str, str],
) -> None:
    """Arguments whose faults can be told together."""
    problems = []
    for word, value in (("numa_copies", numa_copies), ("chunk", chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{word}={value!r}, expected a whole number from 1")
    for name in gpu_formats:
        if name not in COMPONENTS:
            problems.append(
                f"gpu_formats has no component {name!r}{nearest(name, COMPONENTS)}; there are "
                f"{', '.join(COMPONENTS)}"
            )
    if problems:
        raise SettingError(f"plan of {config.name}: " + "; ".join(problems))
    for format in gpu_formats.values():
        get_format(format)  # FormatError with the nearest name


def _check_nodes(machine: Machine, numa_copies: int) -> None:
    """A machine that is named has no more copies than memories of its own for them."""
    nodes = max(machine.numa_nodes, machine.sockets)
    if numa_copies > nodes:
        raise SettingError(
            f"numa_copies={numa_copies}: expected 1 to {nodes}, {machine.name} has {nodes} NUMA "
            f"node{'s' * (nodes > 1)}; name a machine with more, or leave it out and give ram="
        )


def _caches(config: ModelConfig, placement: Placement, form: str, context: int) -> list[Placed]:
    found = []
    for layer in range(config.num_layers):
        device = placement.device("cache", layer=layer)
        kind = kind_of(device)
        part = cache_part(
            config,
            layer,
            form=form,
            context=context,
            element_bytes=ELEMENT_BYTES[kind],
            format=CACHE_FORMATS[kind],
        )
        found.append(
            Placed(part=part, device=device, formats=part.formats, in_place=0, converted=part.bytes)
        )
    return found


def _order(row: Placed) -> tuple[bool, int, int]:
    """Embedding, then layer by layer, then the output."""
    last = row.part.layer is None and row.part.component != "embedding"
    layer = -1 if row.part.layer is None else row.part.layer
    return last, layer, COMPONENTS.index(row.part.component)


def _active(rows: list[Placed]) -> int:
    used = sum(
        row.part.flop_per_token / 2 for row in rows if row.part.component not in ("cache", "nextn")
    )
    return round(used)


def _disk(facts: ModelFacts, ledgers: list[Ledger], rows: list[Placed]) -> FromDisk | None:
    """Only where the weights are used in place: what was made while loading cannot be dropped."""
    host = next(one for one in ledgers if one.device == CPU)
    if host.fits is not False or host.capacity is None:
        return None
    return from_disk(
        facts.files,
        capacity=host.capacity - (host.needed - host.weights),
        experts=sum(
            row.in_place for row in rows if row.device == CPU and row.part.component == "experts"
        ),
        others=sum(
            row.in_place
            for row in rows
            if row.device == CPU and row.part.component not in ("experts", "embedding")
        ),
        experts_per_token=sum(
            row.part.bytes_per_token for row in rows if row.part.component == "experts"
        ),
    )


def _notes(
    facts: ModelFacts, machine: Machine, rows: list[Placed], ledgers: list[Ledger], copies: int
) -> list[str]:
    notes = []
    nextn = sum(row.part.bytes for row in rows if row.part.component == "nextn")
    if nextn:
        count = facts.config.num_nextn_layers
        notes.append(f"{count} layers for next-token prediction stay on disk: they are not run")
    if facts.unused:
        size = decimal_bytes(sum(tensor.nbytes for tensor in facts.unused))
        first, more = facts.unused[0].name, len(facts.unused) - 1
        also = f" and {more} more" if more else ""
        notes.append(f"tensors that the model does not use, {size}, are not read: {first}{also}")
    floats = sum(
        row.converted
        for row in rows
        if row.device == CPU and any(made.endswith("-> f32") for made in row.conversions)
    )
    if floats:
        made = sorted(
            {m for row in rows if row.device == CPU for m in row.conversions if m.endswith("f32")}
        )
        notes.append(f"float32 copies in host memory, {decimal_bytes(floats)}: {', '.join(made)}")
        if any(
            row.part.component == "experts" and "f32" in row.formats and row.conversions
            for row in rows
            if row.device == CPU
        ):
            notes.append(
                "no kernel computes the experts' format on its encoded values: "
                'quantize="int8_channel" (or convert=) makes one while loading that has kernels'
            )
    if copies > 1:
        more = sum(one.copies for one in ledgers)
        notes.append(f"{copies} copies of the experts: {decimal_bytes(more)} more than one takes")
    if GPU in machine:
        notes.append("the GPU's part is made anew while loading; its file pages can be dropped")
        spare = sum(one.headroom or 0 for one in ledgers if one.device == GPU)
        layer = max((r.bytes for r in rows if r.part.component == "experts"), default=0)
        if layer and spare >= layer:
            layers = min(len(facts.config.moe_layers), spare // layer)
            counted = f"{layers} layer{'s' * (layers > 1)}"
            notes.append(f"the GPU's headroom would hold the experts of {counted} as stored")
    return notes
