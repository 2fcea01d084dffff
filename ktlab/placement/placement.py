"""Where each component of each layer lives and is computed: a value, changed by making another.

Experts one by one, decode and prefill apart (KTransformers' generate_device and prefill_device).
Device words: cpu, numa:n, cuda:n, and disk for what stays in the file and is read when it is used.
L layers, E experts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import PlacementError, nearest, short
from ktlab.placement.parts import COMPONENTS
from ktlab.placement.ranges import write_ranges
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

PHASES = ("decode", "prefill")
FOLLOW = {"cache": "attention", "norms": "attention", "router": "attention"}
"""Go where that goes unless somebody says otherwise; the cache always. The last norm goes with the
output."""
OUTSIDE = ("embedding", "output")
"""Are there once, not once a layer."""
PLACEABLE = tuple(name for name in COMPONENTS if name not in ("cache", "nextn"))
MAY_STAY_ON_DISK = ("embedding", "experts")
"""A token reads a small part of them; whatever else it reads whole."""
DEVICE = re.compile(r"cpu|disk|(?:numa|cuda):(?:0|[1-9]\d{0,3})")

Layers = int | Iterable[int | None] | None
Experts = Iterable[int] | Mapping[int, Iterable[int]] | None


@dataclass(frozen=True, kw_only=True)
class ModelShape(Record):
    """Which models a placement fits: those with the same layers and experts."""

    name: str
    layers: int
    dense_layers: int
    """The leading layers without experts."""
    experts: int
    shared: bool
    hidden: int

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelShape":
        """The shape of a model."""
        return cls(
            name=config.name,
            layers=config.num_layers,
            dense_layers=config.first_dense_layers,
            experts=config.num_experts,
            shared=config.num_shared_experts > 0,
            hidden=config.hidden_size,
        )

    @property
    def moe_layers(self) -> range:
        """The layers with experts."""
        return range(self.dense_layers, self.layers)

    def layers_of(self, component: str) -> tuple[int | None, ...]:
        """Where in the model a component is; None stands for outside of layers."""
        if component in OUTSIDE:
            return (None,)
        dense, every = range(self.dense_layers), range(self.layers)
        if component == "dense":
            return tuple(dense)
        if component in ("router", "experts") or (component == "shared" and self.shared):
            return tuple(self.moe_layers)
        if component == "norms":
            return (*every, None)
        return tuple(every) if component in ("attention", "cache") else ()

    def differences(self, other: "ModelShape") -> list[str]:
        """In words, with this one's figure first; names may differ."""
        words = {
            "layers": "layers",
            "dense_layers": "leading dense layers",
            "experts": "experts a layer",
            "hidden": "hidden numbers",
        }
        found = [
            f"{getattr(self, field)} {word}, not {getattr(other, field)}"
            for field, word in words.items()
            if getattr(self, field) != getattr(other, field)
        ]
        if self.shared != other.shared:
            found.append(f"{'a' if self.shared else 'no'} shared expert")
        return found


@dataclass(frozen=True, kw_only=True)
class Table:
    """The devices of one phase."""

    components: tuple[tuple[str, tuple[str | None, ...]], ...]
    """(component, device by layer, then outside of layers); None: not there, or follows."""
    experts: tuple[tuple[str, ...], ...]
    """By layer with experts, by expert."""

    def said(self, component: str, layer: int | None) -> str | None:
        """The device that somebody gave, or None."""
        devices = next(found for name, found in self.components if name == component)
        return devices[-1 if layer is None else layer]


@dataclass(frozen=True, kw_only=True, repr=False)
class Placement(Record):
    """Component x layer x device. `put` makes another; `==`, `diff`, JSON and YAML."""

    model: ModelShape
    decode: Table
    prefill: Table

    # Making one --------------------------------------------------------------------------------

    @classmethod
    def everywhere(cls, config: "ModelConfig | ModelShape", device: str = "cpu") -> "Placement":
        """Everything on one device."""
        check_device(device)
        shape = config if isinstance(config, ModelShape) else ModelShape.of(config)
        components = []
        for name in PLACEABLE:
            if name == "experts":
                continue
            there = set() if name in FOLLOW else set(shape.layers_of(name))
            row = [device if layer in there else None for layer in (*range(shape.layers), None)]
            components.append((name, tuple(row)))
        layer = (device,) * shape.experts
        table = Table(components=tuple(components), experts=(layer,) * len(shape.moe_layers))
        return cls(model=shape, decode=table, prefill=table)

    def put(
        self,
        component: str,
        device: str,
        *,
        layers: Layers = None,
        experts: Experts = None,
        phase: str | None = None,
    ) -> "Placement":
        """Another placement with one component elsewhere.

        `layers` are all that have it, one or some; `experts` of those layers, all, some, or
        {layer: some}; `phase` both, "decode" or "prefill". PlacementError with all that is wrong.
        """
        if isinstance(experts, Mapping) and layers is None:
            layers = tuple(experts)
        wanted = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
        problems = [*_device_problems(device), *self._put_problems(component, wanted, phase)]
        if experts is not None and component != "experts":
            problems.append(f"{component} is put as a whole; only 'experts' takes experts=")
        if problems:
            raise PlacementError(f"{self.model.name}: " + "; ".join(problems))
        where = self.model.layers_of(component) if wanted is None else wanted
        phases = PHASES if phase is None else (phase,)
        if component != "experts":
            there = set(where)
            return self._changed({p: self._with(p, component, there, device) for p in phases})
        chosen = self._chosen([layer for layer in where if layer is not None], experts)
        return self._changed({p: self._with_experts(p, chosen, device) for p in phases})

    def _changed(self, tables: Mapping[str, Table]) -> "Placement":
        decode, prefill = (tables.get(phase, self.table(phase)) for phase in PHASES)
        return replace(self, decode=decode, prefill=prefill)

    def _put_problems(
        self, component: str, layers: tuple[int | None, ...] | None, phase: str | None
    ) -> Iterator[str]:
        if component == "cache":
            yield "the cache is where attention is; put attention there"
        elif component == "nextn":
            yield "layers for next-token prediction are not run; they stay on disk"
        elif component not in PLACEABLE:
            yield (
                f"component {component!r} is unknown{nearest(component, PLACEABLE)}; there are "
                f"{', '.join(PLACEABLE)}"
            )
        elif layers is not None:
            there = self.model.layers_of(component)
            if outside := [layer for layer in layers if layer not in there]:
                has = write_ranges(x for x in there if x is not None)
                yield f"{component} is not in layers {outside}; it is in {has or 'no layer'}"
        if phase is not None and phase not in PHASES:
            yield f"phase {phase!r}; expected {' or '.join(map(repr, PHASES))}, or None for both"

    def _chosen(self, layers: Iterable[int], experts: Experts) -> dict[int, tuple[int, ...]]:
        """The experts meant in each layer."""
        every = range(self.model.experts)
        found, problems = {}, []
        alike = tuple(every if experts is None else experts)
        for layer in layers:
            ids = tuple(experts.get(layer, ())) if isinstance(experts, Mapping) else alike
            if outside := [i for i in ids if i not in every]:
                problems.append(
                    f"layer {layer}: experts {outside} do not exist; there are 0 to {every[-1]}"
                )
            found[layer] = ids
        if problems:
            raise PlacementError(f"{self.model.name}: " + "; ".join(problems))
        return found

    def _with(self, phase: str, component: str, layers: "set[int | None]", device: str) -> Table:
        table = self.table(phase)
        every = (*range(self.model.layers), None)

        def changed(name: str, row: tuple[str | None, ...]) -> tuple[str | None, ...]:
            if name != component:
                return row
            return tuple(
                device if layer in layers else old for layer, old in zip(every, row, strict=True)
            )

        rows = tuple((name, changed(name, row)) for name, row in table.components)
        return replace(table, components=rows)

    def _with_experts(
        self, phase: str, chosen: Mapping[int, tuple[int, ...]], device: str
    ) -> Table:
        table = self.table(phase)
        rows = list(table.experts)
        for layer, ids in chosen.items():
            index = layer - self.model.dense_layers
            row = list(rows[index])
            for expert in ids:
                row[expert] = device
            rows[index] = tuple(row)
        return replace(table, experts=tuple(rows))

    # Asking it ---------------------------------------------------------------------------------

    def table(self, phase: str = "decode") -> Table:
        """The devices of a phase."""
        if phase not in PHASES:
            raise PlacementError(f"phase {phase!r}; expected {' or '.join(map(repr, PHASES))}")
        return self.decode if phase == "decode" else self.prefill

    def device(
        self,
        component: str,
        *,
        layer: int | None = None,
        expert: int | None = None,
        phase: str = "decode",
    ) -> str:
        """Where it is computed. Of a layer's experts, all together or one."""
        if component == "nextn":
            return "disk"
        if component not in COMPONENTS or layer not in self.model.layers_of(component):
            raise PlacementError(
                f"{self.model.name} has no {component!r} in layer {layer}"
                f"{nearest(component, COMPONENTS)}"
            )
        if component != "experts" or layer is None:
            return self._device(self.table(phase), component, layer)
        row = self.experts_row(layer, phase)
        if expert is not None:
            if not 0 <= expert < len(row):
                raise PlacementError(f"expert {expert}: there are 0 to {len(row) - 1}")
            return row[expert]
        if len(set(row)) > 1:
            raise PlacementError(
                f"the experts of layer {layer} lie on {', '.join(by_kind(row))}; name one: expert="
            )
        return row[0]

    def _device(self, table: Table, component: str, layer: int | None) -> str:
        found = table.said(component, layer) if component != "cache" else None
        if found is None:
            leader = "output" if layer is None else FOLLOW[component]
            found = table.said(leader, layer)
        assert found is not None
        return found

    def experts_row(self, layer: int, phase: str = "decode") -> tuple[str, ...]:
        """The device of each expert of a layer."""
        if layer not in self.model.moe_layers:
            raise PlacementError(
                f"layer {layer} of {self.model.name} has no experts; layers "
                f"{write_ranges(self.model.moe_layers)} have"
            )
        return self.table(phase).experts[layer - self.model.dense_layers]

    def experts(self, *, layer: int, device: str, phase: str = "decode") -> tuple[int, ...]:
        """The experts of a layer that are computed on a device."""
        row = self.experts_row(layer, phase)
        return tuple(expert for expert, where in enumerate(row) if where == device)

    @property
    def devices(self) -> tuple[str, ...]:
        """Everything that something is on."""
        return by_kind(where for phase in PHASES for _, _, _, where in self.cells(phase))

    def cells(self, phase: str = "decode") -> Iterator[tuple[str, int | None, str, str]]:
        """(component, layer, experts as ranges or "", device), a row for each device."""
        table = self.table(phase)
        for component in COMPONENTS:
            for layer in self.model.layers_of(component):
                if component != "experts" or layer is None:
                    yield component, layer, "", self._device(table, component, layer)
                    continue
                row = table.experts[layer - self.model.dense_layers]
                if row.count(row[0]) == len(row):
                    yield component, layer, "", row[0]
                    continue
                for where in by_kind(row):
                    ids = write_ranges(i for i, found in enumerate(row) if found == where)
                    yield component, layer, ids, where

    def diff(self, other: "Placement") -> "pd.DataFrame":
        """What is elsewhere in `other`: component, layer, experts, phase, device_a, device_b."""
        import pandas as pd

        if problems := other.model.differences(self.model):
            raise PlacementError(
                f"{other.model.name} is not {self.model.name}: it has {'; '.join(problems)}"
            )
        rows = [
            (component, layer, experts, phase, a, b)
            for phase in PHASES
            for component, layer, experts, a, b in self._moved(other, phase)
        ]
        names = ["component", "layer", "experts", "phase", "device_a", "device_b"]
        return pd.DataFrame(rows, columns=names).astype({"layer": "Int64"})

    def _moved(
        self, other: "Placement", phase: str
    ) -> Iterator[tuple[str, int | None, str, str, str]]:
        ours, theirs = self.table(phase), other.table(phase)
        for component in COMPONENTS:
            for layer in self.model.layers_of(component):
                if component != "experts" or layer is None:
                    a = self._device(ours, component, layer)
                    b = other._device(theirs, component, layer)
                    if a != b:
                        yield component, layer, "", a, b
                    continue
                index = layer - self.model.dense_layers
                moves: dict[tuple[str, str], list[int]] = {}
                pairs = zip(ours.experts[index], theirs.experts[index], strict=True)
                for expert, (a, b) in enumerate(pairs):
                    if a != b:
                        moves.setdefault((a, b), []).append(expert)
                for (a, b), ids in moves.items():
                    yield component, layer, write_ranges(ids), a, b

    @property
    def placement(self) -> "Placement":
        """Itself: whatever takes a placement takes a `Plan` too."""
        return self

    # Checking it -------------------------------------------------------------------------------

    def check(
        self, config: "ModelConfig | None" = None, devices: "Iterable[str] | None" = None
    ) -> None:
        """PlacementError with all that is wrong: made for another model than `config`, devices that
        are not among `devices` (cpu and disk always are), combinations that cannot be."""
        problems = list(self._impossible())
        if config is not None and (wrong := self.model.differences(ModelShape.of(config))):
            problems.insert(
                0, f"it was made for {self.model.name}, not {config.name}: {', '.join(wrong)}"
            )
        if devices is not None:
            there = by_kind({"cpu", "disk", *devices})
            for name in self.devices:
                if name not in there:
                    problems.append(f"{name} is not there; there are {', '.join(there)}")
        if problems:
            raise PlacementError(f"placement of {self.model.name}: " + "; ".join(problems))

    def _impossible(self) -> Iterator[str]:
        both = [
            layer
            for layer in range(self.model.layers)
            if self.decode.said("attention", layer) != self.prefill.said("attention", layer)
        ]
        if both:
            yield (
                f"attention of layers {write_ranges(both)} is on one device in prefill and on "
                "another in decode, and its cache can only be on one"
            )
        for component in PLACEABLE:
            if component in MAY_STAY_ON_DISK:
                continue
            where = {
                layer
                for phase in PHASES
                for name, layer, _, device in self.cells(phase)
                if name == component and device == "disk"
            }
            if where:
                inside = write_ranges(x for x in where if x is not None)
                yield (
                    f"{component}{f' of layers {inside}' if inside else ''} cannot stay on disk: "
                    f"every token reads all of it; {' and '.join(MAY_STAY_ON_DISK)} can"
                )

    # Text --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML have it (`placement_file`)."""
        from ktlab.placement.placement_file import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Placement":
        """What `to_dict` wrote."""
        from ktlab.placement.placement_file import from_dict

        return from_dict(data)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Compact: experts and layers as ranges."""
        from ktlab.placement.placement_file import to_json

        return to_json(self, indent=indent)

    @classmethod
    def from_json(cls, text: str, *, source: str = "placement") -> "Placement":
        """Read back; PlacementError with everything that is wrong."""
        from ktlab.placement.placement_file import from_json

        return from_json(text, source)

    def to_yaml(self) -> str:
        """The same for people."""
        from ktlab.placement.placement_file import to_yaml

        return to_yaml(self)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "placement") -> "Placement":
        """Read back; PlacementError with everything that is wrong."""
        from ktlab.placement.placement_file import from_yaml

        return from_yaml(text, source)

    @classmethod
    def read(cls, path: "str | PathLike[str]") -> "Placement":
        """From a .json file, or from any other as YAML; PlacementError names the file."""
        from ktlab.placement.placement_file import read_placement

        return read_placement(path)

    def __repr__(self) -> str:
        head, places = self.to_yaml().rstrip().split("\n", 1)
        of = self.model
        return html.wrapped(f"Placement of {of.name}, {of.layers} layers\n{places}")

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        from ktlab.placement.grid import bundle

        return bundle(self)


def kind_of(device: str) -> str:
    """What computes there: "cpu" (also of a NUMA node), "cuda", or "disk" for what waits there."""
    kind = device.partition(":")[0]
    return "cpu" if kind == "numa" else kind


def check_device(device: object) -> str:
    """`device` if it is a device word, else PlacementError."""
    if problems := list(_device_problems(device)):
        raise PlacementError("; ".join(problems))
    return str(device)


def _device_problems(device: object) -> Iterator[str]:
    if isinstance(device, str) and DEVICE.fullmatch(device):
        return
    near = ""
    if device in ("cuda", "gpu", "numa"):
        near = f'; did you mean "{"numa" if device == "numa" else "cuda"}:0"?'
    yield f"device {short(device)} is unknown{near} (expected cpu, numa:n, cuda:n or disk)"


def by_kind(devices: Iterable[str]) -> tuple[str, ...]:
    """Each once: cpu, numa nodes, GPUs, disk."""

    def key(name: str) -> tuple[int, str, int]:
        kind, _, number = name.partition(":")
        order = ("cpu", "numa", "cuda", "disk")
        return order.index(kind) if kind in order else len(order), kind, int(number or 0)

    return tuple(sorted(set(devices), key=key))
