"""Where a rule file puts a model: its device words as a `Placement`.

Read as KTransformers runs them (util/utils.py `get_device`, operators/experts.py and linear.py): a
module is where generate_device says; prefill_device counts where prompts pass layer by layer alone,
because weights are moved there and back for it (per_layer_prefill_intput_threshold). What no rule
matches goes to the default device, cuda:0 there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ktlab.errors import RuleError
from ktlab.model.model import Model
from ktlab.placement.placement import FOLLOW, PHASES, Placement, by_kind
from ktlab.placement.rules.modules import Module, modules
from ktlab.placement.rules.preview import collapsed
from ktlab.placement.rules.reading import Rule
from ktlab.placement.rules.walk import Walk

COMPONENTS: Mapping[str, str] = {
    "attention": "attention", "attention matrix": "attention", "dense": "dense",
    "dense matrix": "dense", "shared experts": "shared", "shared experts matrix": "shared",
    "output": "output", "router": "router", "experts": "experts", "one expert": "experts",
    "embedding": "embedding", "norm": "norms",
}  # fmt: skip
"""A module's stage -> the component that it is, or is part of."""
FIRST_GPU = "cuda:0"
PLACEABLE = (
    "a placement knows cpu, numa:n, cuda:n and disk; write cuda:n for a GPU of another maker"
)

Where = tuple[str, str]
"""Devices of decode and prefill."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A rule file's placement, and what of its words a placement cannot say."""

    placement: Placement | None
    """None where the rules name what no placement knows."""
    notes: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    """{module that is a component, or a part of one: its device in decode}."""
    seats: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
    """{the same: (component, layer)}."""


def placed(walk: Walk, model: Model, default: str | None, as_written: bool) -> Placed:
    """What the rules that `walk` has found say of `model`; RuleError for devices unknown here."""
    return _Places(walk, model, default, as_written).found()


@dataclass
class _Seats:
    """The modules of one component in one layer: (numbers held, name, devices)."""

    parts: list[tuple[int, str, Where]] = field(default_factory=list)

    @property
    def where(self) -> Where:
        """Where most of its weights are; where the module itself is, if it holds none."""
        sizes: dict[Where, int] = {}
        for size, _, where in self.parts:
            sizes[where] = sizes.get(where, 0) + size
        return max(sizes, key=lambda each: sizes[each])


class _Places:
    def __init__(self, walk: Walk, model: Model, default: str | None, as_written: bool) -> None:
        self.model, self.notes = model, list[str]()
        self.rules: dict[str, Rule] = {}
        for rule in walk.rules:
            for module, _ in walk.taken.get(rule.number, ()):
                self.rules[module.name] = rule
        # Expert by expert only where a rule names some: there are ten thousands.
        self.one_by_one = {
            name for name in self.rules if name.rpartition(".")[0].endswith(".experts")
        }
        self.seats_of: dict[str, tuple[str, int | None]] = {}
        self.moves: dict[int, str] = {}
        threshold = 0
        for rule in self.rules.values():
            self.moves |= rule.kwargs.get("transfer_map", {})
            threshold = max(threshold, rule.kwargs.get("per_layer_prefill_intput_threshold", 0))
        self.layerwise = as_written or threshold > 0
        if threshold and not as_written:
            self.notes.append(f"prefill devices count for prompts of {threshold} tokens and more")
        rules = self.rules.values()
        if unknown := by_kind(name for rule in rules for name in unplaceable(rule)):
            raise RuleError(f"{', '.join(unknown)}: {PLACEABLE}")
        named = {name for rule in rules for name in _named(rule)}
        self.default = default or (FIRST_GPU if any(map(_is_gpu, named)) else "cpu")

    def found(self) -> Placed:
        """The placement: component by component, then experts that rules name one by one."""
        seats: dict[tuple[str, int | None], _Seats] = {}
        for module, where in self._modules(modules(self.model), None):
            component = COMPONENTS.get(module.stage)
            if component is None:
                continue
            if component != "norms":  # computed where attention or the output is
                self.seats_of[module.name] = (component, module.layer)
            size = sum(m.stack.size for m in module.ours) if isinstance(module.ours, tuple) else 0
            one = seats.setdefault((component, module.layer), _Seats())
            one.parts.append((size, module.name, where))
        placement = Placement.everywhere(self.model.config, "cpu")
        for phase, name in enumerate(PHASES):
            placement = self._put(placement, seats, phase, name)
        self._split(seats)
        for name in self.one_by_one:
            self.seats_of[name] = "experts", int(name.split(".")[2])
        placement = self._each_expert(placement)
        return Placed(
            placement=placement,
            notes=tuple(self.notes),
            where=devices_of(self.seats_of, placement),
            seats=self.seats_of,
        )

    def _put(
        self,
        placement: Placement,
        seats: Mapping[tuple[str, int | None], _Seats],
        phase: int,
        name: str,
    ) -> Placement:
        where = {seat: found.where[phase] for seat, found in seats.items()}
        groups: dict[tuple[str, str], list[int | None]] = {}
        for (component, layer), device in where.items():
            leader = "output" if layer is None else FOLLOW.get(component, "")
            if component == "norms" or (component in FOLLOW and where[leader, layer] == device):
                continue  # goes, and follows when that is put elsewhere
            groups.setdefault((component, device), []).append(layer)
        for (component, device), layers in groups.items():
            placement = placement.put(component, device, layers=layers, phase=name)
        return placement

    def _modules(self, module: Module, above: Rule | None) -> Iterator[tuple[Module, Where]]:
        """Every module but single experts; `above` is a rule that takes all that lies below."""
        rule = self.rules.get(module.name, above)
        yield module, self._where(rule, module.layer)
        if module.kind == "experts":
            return
        whole = rule if rule is not None and not rule.recursive else above
        for child in module.below():
            yield from self._modules(child, whole)

    def _where(self, rule: Rule | None, layer: int | None) -> Where:
        kwargs = rule.kwargs if rule is not None else {}
        decode = kwargs.get("generate_device") or kwargs.get("device")
        prefill = kwargs.get("prefill_device")
        either = decode or prefill or self._otherwise(layer)
        written = (_device(decode or either), _device(prefill or either))
        return written if self.layerwise else (written[0], written[0])

    def _otherwise(self, layer: int | None) -> str:
        """Where the hidden state is, which transfer_map says."""
        before = [at for at in self.moves if layer is not None and at <= layer]
        return self.moves[max(before)] if before else self.default

    def _split(self, seats: Mapping[tuple[str, int | None], _Seats]) -> None:
        """Tell of components whose parts are put apart: here they go as a whole."""
        apart: dict[tuple[str, str, str], list[str]] = {}
        for (component, layer), found in seats.items():
            whole = found.where
            if component == "norms":
                whole = seats["output" if layer is None else "attention", layer].where
            for size, name, where in found.parts:
                if where != whole and (size or component == "norms"):
                    key = (component, _shown(where), _shown(whole))
                    apart.setdefault(key, []).append(name)
        for (component, part, rest), names in apart.items():
            why = (
                "norms are where their layer's attention is"
                if component == "norms"
                else (f"{component} is placed as a whole")
            )
            self.notes.append(f"{collapsed(names)} on {part}: {why}, on {rest}")

    def _each_expert(self, placement: Placement) -> Placement:
        groups: dict[tuple[str, str], dict[int, list[int]]] = {}
        for name in self.one_by_one:
            parts = name.split(".")
            layer, expert = int(parts[2]), int(parts[-1])
            for phase, device in zip(PHASES, self._where(self.rules[name], layer), strict=True):
                groups.setdefault((device, phase), {}).setdefault(layer, []).append(expert)
        for (device, phase), experts in groups.items():
            placement = placement.put("experts", device, experts=experts, phase=phase)
        return placement


def devices_of(seats: Mapping[str, tuple[str, int | None]], placement: Placement) -> dict[str, str]:
    """{module: its device in decode, or devices} of modules that are in components of layers."""
    found = {}
    for name, (component, layer) in seats.items():
        last = name.rpartition(".")[2]
        if component != "experts" or layer is None:
            found[name] = placement.device(component, layer=layer)
        elif last.isdigit():
            found[name] = placement.device(component, layer=layer, expert=int(last))
        else:
            found[name] = " and ".join(by_kind(placement.experts_row(layer)))
    return found


def unplaceable(rule: Rule) -> tuple[str, ...]:
    """Devices that a rule names and no placement knows."""
    return by_kind(name for name in _named(rule) if name != "cpu" and not name.startswith("cuda:"))


def _named(rule: Rule) -> Iterator[str]:
    for word in ("generate_device", "prefill_device", "device"):
        if rule.kwargs.get(word):
            yield _device(rule.kwargs[word])
    yield from map(_device, rule.kwargs.get("transfer_map", {}).values())


def _device(word: str) -> str:
    """cuda is cuda:0."""
    return FIRST_GPU if word == "cuda" else word


def _is_gpu(device: str) -> bool:
    return device != "cpu"


def _shown(where: Where) -> str:
    decode, prefill = where
    return decode if decode == prefill else f"{decode} (prefill {prefill})"
