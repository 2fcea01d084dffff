"""Placements as JSON and YAML: short enough to read for 58 x 256 experts, checked as a whole.

model: {name: DeepSeek-V3, layers: 61, dense_layers: 3, experts: 256, shared: true, ...}
places:
  embedding: cpu
  attention: cuda:0
  shared: {cuda:0: 3-30, cpu: rest}         # device: layers
  experts:
    decode:                                 # or without phases, if both are alike
      cpu: rest
      cuda:0: {3: "0, 5", 4-10: 0-7}        # layers: experts
    prefill: cpu
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import yaml

from ktlab.errors import PlacementError, nearest, short
from ktlab.placement.placement import (
    DEVICE,
    FOLLOW,
    OUTSIDE,
    PHASES,
    PLACEABLE,
    ModelShape,
    Placement,
    by_kind,
    check_device,
)
from ktlab.placement.ranges import read_ranges, write_ranges

REST, ALL, LAST = "rest", "all", "last"
"""Whatever is not named elsewhere; all experts of a layer; the norm behind the last layer."""
LIMIT_BYTES = 4 << 20
LIMIT_PROBLEMS = 20
LIMIT_LAYERS, LIMIT_EXPERTS, LIMIT_SEATS = 1000, 4096, 1 << 18
"""Four times and more of what the largest models have."""

Layer = int | None
Seats = dict[tuple[Layer, int], str]
"""(layer, expert or 0) to device."""


# Writing ---------------------------------------------------------------------------------------


def to_dict(placement: Placement) -> dict[str, Any]:
    """Plain data, see above. Components that follow another are not written."""
    places = {}
    for component in PLACEABLE:
        found = [_written(placement, component, phase) for phase in PHASES]
        if any(found):
            alike = found[0] == found[1]
            places[component] = found[0] if alike else dict(zip(PHASES, found, strict=True))
    return {"model": placement.model.to_dict(), "places": places}


def _written(placement: Placement, component: str, phase: str) -> Any:
    table, layers = placement.table(phase), placement.model.layers_of(component)
    if component == "experts":
        return _experts_written(dict(zip(placement.model.moe_layers, table.experts, strict=True)))
    said = {layer: table.said(component, layer) for layer in layers}
    devices = by_kind(device for device in said.values() if device is not None)
    if len(devices) == 1 and None not in said.values():
        return devices[0]
    return {
        device: ", ".join(
            filter(
                None,
                [
                    write_ranges(x for x, d in said.items() if d == device and x is not None),
                    LAST if None in said and said[None] == device else "",
                ],
            )
        )
        for device in devices
    }


def _experts_written(rows: Mapping[int, tuple[str, ...]]) -> Any:
    count = Counter(device for row in rows.values() for device in row)
    if not count:
        return {}
    usual = count.most_common(1)[0][0]
    if len(count) == 1:
        return usual
    found: dict[str, Any] = {usual: REST}
    for device in by_kind(count):
        if device == usual:
            continue
        alike: dict[str, list[int]] = {}
        for layer, row in rows.items():
            ids = [expert for expert, where in enumerate(row) if where == device]
            if ids:
                experts = ALL if len(ids) == len(row) else write_ranges(ids)
                alike.setdefault(experts, []).append(layer)
        found[device] = {write_ranges(layers): experts for experts, layers in alike.items()}
    return found


def to_json(placement: Placement, *, indent: int | None = 2) -> str:
    """Strict JSON."""
    return json.dumps(to_dict(placement), indent=indent, ensure_ascii=False)


def to_yaml(placement: Placement) -> str:
    """The same as YAML, the model on one line."""
    data = to_dict(placement)
    model = json.dumps(data["model"], ensure_ascii=False)
    places = {"places": _plain(data["places"])}
    return f"model: {model}\n" + str(yaml.safe_dump(places, sort_keys=False, width=100))


def _plain(value: Any) -> Any:
    """Numbers where YAML would write them with quotes."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, str) and value.isdecimal() else value


# Reading ---------------------------------------------------------------------------------------


class _Twice(dict[Any, Any]):
    """A mapping that remembers keys that were there before."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        super().__init__()
        self.pairs = list(pairs)
        for key, value in self.pairs:
            self.setdefault(key, value)


class _Loader(yaml.SafeLoader):
    """Plain data: no anchors, aliases or tags; every pair of a mapping is kept."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors (&) and aliases (*) are not read here; write it out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Twice:
    construct: Callable[..., Any] = loader.construct_object
    pairs = [(construct(k, deep=True), construct(v, deep=True)) for k, v in node.value]
    unhashable = [key for key, _ in pairs if not isinstance(key, (str, int, float, type(None)))]
    if unhashable:
        raise yaml.MarkedYAMLError(
            problem=f"a key is {short(unhashable[0])}; expected a word or a number",
            problem_mark=node.start_mark,
        )
    return _Twice(pairs)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_placement(path: "str | PathLike[str]") -> Placement:
    """The placement of a .json file, or of any other as YAML; PlacementError names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(f"{fspath(path)}: cannot be read: {error}") from error
    read = from_json if Path(path).suffix == ".json" else from_yaml
    return read(text, fspath(path))


def from_yaml(text: str, source: str) -> Placement:
    """The placement of a text; PlacementError with everything that is wrong."""
    _check_size(text, source)
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise PlacementError(f"{source}: not YAML: {where}{what}") from error
    return from_dict(data, source)


def from_json(text: str, source: str) -> Placement:
    """The same from JSON."""
    _check_size(text, source)
    try:
        data = json.loads(text, object_pairs_hook=_Twice)
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{source}: not JSON: {error}") from error
    return from_dict(data, source)


def _check_size(text: str, source: str) -> None:
    if len(text) > LIMIT_BYTES:
        raise PlacementError(
            f"{source}: {len(text):,} characters; a placement has at most {LIMIT_BYTES:,}"
        )


def from_dict(data: Any, source: str = "placement") -> Placement:
    """The placement of plain data; PlacementError with everything that is wrong."""
    reader = _Reader()
    placement = reader.placement(data)
    if reader.problems or placement is None:
        problems = list(dict.fromkeys(reader.problems))
        more = len(problems) - LIMIT_PROBLEMS
        shown = problems[:LIMIT_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise PlacementError(f"{source}: " + "; ".join(shown))
    return placement


class _Reader:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def say(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}" if where else what)

    def placement(self, data: Any) -> Placement | None:
        fields = self.fields(data, "", ("model", "places"))
        if fields is None or set(fields) != {"model", "places"}:
            if fields is not None:
                said = ", ".join(map(str, fields)) or "neither"
                self.say("", f"expected model and places, found {said}")
            return None
        shape = self.shape(fields["model"])
        places = self.fields(fields["places"], "places", PLACEABLE)
        if shape is None or places is None:
            return None
        placement = Placement.everywhere(shape, "cpu")
        for component in PLACEABLE:
            if component not in places:
                if component not in FOLLOW and shape.layers_of(component):
                    self.say("places", f"{component} is missing")
                continue
            for phase, value in self.phases(places[component]):
                where = f"{component} ({phase})" if phase else component
                seats = self.seats(shape, component, value, where)
                placement = _put(placement, component, seats, phase or None)
        return placement

    def fields(self, data: Any, where: str, known: Iterable[str]) -> dict[str, Any] | None:
        if not isinstance(data, Mapping):
            said = f"expected {', '.join(known)}; found {short(data)}"
            if not where and _is_rule_file(data):
                said = (
                    "a rule file, not a placement; give it to ktlab plan as --rules, or read it "
                    "with RuleSet.read(file).placement(model), which may be written as YAML"
                )
            self.say(where, said)
            return None
        for key in self.keys(data, where):
            if key not in known:
                self.say(
                    where,
                    f"{key!r} is unknown{nearest(str(key), known)} (expected {', '.join(known)})",
                )
        return {key: value for key, value in data.items() if key in known}

    def keys(self, data: Mapping[Any, Any], where: str) -> Iterator[Any]:
        seen = (
            Counter(key for key, _ in data.pairs)
            if isinstance(data, _Twice)
            else Counter(list(data))
        )
        for key, times in seen.items():
            if times > 1:
                self.say(where, f"{key} is there {times} times")
            yield key

    def shape(self, data: Any) -> ModelShape | None:
        here = len(self.problems)
        names = tuple(ModelShape.__dataclass_fields__)
        fields = self.fields(data, "model", names)
        if fields is None:
            return None
        if missing := [name for name in names if name not in fields]:
            self.say("model", f"{', '.join(missing)} missing")
        limits = {"layers": LIMIT_LAYERS, "dense_layers": LIMIT_LAYERS, "experts": LIMIT_EXPERTS}
        for name, value in fields.items():
            kind = {"name": str, "shared": bool}.get(name, int)
            limit = limits.get(name, 1 << 31)
            bad = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
            if bad or (kind is int and not 0 <= value <= limit):
                expected = f"a number from 0 to {limit:,}" if kind is int else kind.__name__
                self.say("model", f"{name} is {short(value)}, expected {expected}")
        if len(self.problems) == here:
            if fields["dense_layers"] > fields["layers"]:
                self.say("model", f"{fields['dense_layers']} dense layers of {fields['layers']}")
            if (seats := fields["layers"] * fields["experts"]) > LIMIT_SEATS:
                self.say("model", f"{seats:,} experts in all, expected at most {LIMIT_SEATS:,}")
        return ModelShape(**fields) if len(self.problems) == here else None

    def phases(self, value: Any) -> Iterator[tuple[str, Any]]:
        """("", value) for both at once."""
        if isinstance(value, Mapping) and any(phase in value for phase in PHASES):
            fields = self.fields(value, "phases", PHASES) or {}
            if missing := [phase for phase in PHASES if phase not in fields]:
                self.say("phases", f"{', '.join(missing)} missing")
            yield from fields.items()
        else:
            yield "", value

    def seats(self, shape: ModelShape, component: str, value: Any, where: str) -> Seats:
        """The device of each (layer, expert); all of them or, of what may follow, some."""
        layers = shape.layers_of(component)
        width = shape.experts if component == "experts" else 1
        wanted = [(layer, expert) for layer in layers for expert in range(width)]
        if isinstance(value, str):
            value = {value: REST}
        if not isinstance(value, Mapping):
            self.say(where, f"expected a device, or {{device: layers}}; found {short(value)}")
            return {}
        found: Seats = {}
        twice: dict[str, list[tuple[Layer, int]]] = {}
        rest: list[str] = []
        for device in self.keys(value, where):
            if not isinstance(device, str) or not DEVICE.fullmatch(device):
                try:
                    check_device(device)
                except PlacementError as error:
                    self.say(where, str(error))
                continue
            if value[device] == REST:
                rest.append(device)
                continue
            for seat in self.named(shape, component, value[device], f"{where}, {device}"):
                if seat in found:
                    twice.setdefault(found[seat], []).append(seat)
                    twice.setdefault(device, [])
                found[seat] = device
        self.say_twice(component, twice, where)
        if len(rest) > 1:
            self.say(where, f"{' and '.join(rest)} cannot both take the rest")
        missing = [seat for seat in wanted if seat not in found]
        if rest:
            found.update(dict.fromkeys(missing, rest[0]))
        elif missing and component not in FOLLOW:
            names = write_ranges({layer for layer, _ in missing if layer is not None})
            self.say(where, f"nothing is said of layers {names}; add {{device: {REST}}}")
        return found

    def say_twice(
        self, component: str, twice: Mapping[str, list[tuple[Layer, int]]], where: str
    ) -> None:
        seats = sorted({(layer or 0, e) for found in twice.values() for layer, e in found})
        by_layer: dict[int, list[int]] = {}
        for layer, expert in seats:
            by_layer.setdefault(layer, []).append(expert)
        devices = " and ".join(by_kind(twice))
        for layer, experts in by_layer.items():
            if component == "experts":
                some = "expert " if len(experts) == 1 else "experts "
                what = f"{some}{write_ranges(experts)} of layer {layer}"
            else:
                what = component if component in OUTSIDE else f"layer {layer}"
            self.say(where, f"{what} placed twice, on {devices}")

    def named(
        self, shape: ModelShape, component: str, value: Any, where: str
    ) -> Iterator[tuple[Layer, int]]:
        if component == "experts" and not isinstance(value, Mapping):
            value = {value: ALL}
        if component != "experts":
            yield from ((layer, 0) for layer in self.some_layers(shape, component, value, where))
            return
        for key in self.keys(value, where):
            experts: tuple[int, ...] = tuple(range(shape.experts))
            if value[key] != ALL:
                experts = self.ranges(value[key], where, shape.experts, "experts")
            for layer in self.some_layers(shape, component, key, where):
                yield from ((layer, expert) for expert in experts)

    def some_layers(
        self, shape: ModelShape, component: str, value: Any, where: str
    ) -> Iterator[Layer]:
        there = shape.layers_of(component)
        if isinstance(value, str) and None in there:
            words = [word.strip() for word in value.split(",")]
            if LAST in words:
                yield None
                value = ", ".join(word for word in words if word != LAST)
                if not value:
                    return
        found = self.ranges(value, where, shape.layers, "layers")
        if wrong := [layer for layer in found if layer not in there]:
            self.say(where, f"layers {write_ranges(wrong)} have no {component}")
        yield from (layer for layer in found if layer in there)

    def ranges(self, value: Any, where: str, limit: int, what: str) -> tuple[int, ...]:
        try:
            found = read_ranges(value)
        except ValueError as error:
            self.say(where, str(error))
            return ()
        if outside := [x for x in found if x >= limit]:
            self.say(
                where, f"{what} {write_ranges(outside)} do not exist; there are 0 to {limit - 1}"
            )
        return tuple(x for x in found if x < limit)


def _is_rule_file(data: Any) -> bool:
    """Whether it is a list of `match` and `replace`, as RuleSet reads it."""
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, Mapping) and not {"match", "replace"}.isdisjoint(first)


def _put(placement: Placement, component: str, seats: Seats, phase: str | None) -> Placement:
    for device in by_kind(seats.values()):
        by_layer: dict[Layer, list[int]] = {}
        for (layer, expert), where in seats.items():
            if where == device:
                by_layer.setdefault(layer, []).append(expert)
        if component == "experts":
            experts = {layer: ids for layer, ids in by_layer.items() if layer is not None}
            placement = placement.put(component, device, experts=experts, phase=phase)
        else:
            placement = placement.put(component, device, layers=by_layer, phase=phase)
    return placement
