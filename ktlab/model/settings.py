"""Live switches: what `override` accepts, how it is checked, applied and undone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ktlab.attention.mla import check_form
from ktlab.errors import SettingError, nearest
from ktlab.kernels.dispatch import check_backend, choose
from ktlab.model.block import Layer, MoEBlock
from ktlab.quantization import get_format
from ktlab.routing.rules import FixedK, SelectionRule, with_k

if TYPE_CHECKING:
    from ktlab.model.model import Model

COMPONENTS = ("attention", "dense", "experts", "shared", "output")
"""What `quantize=` can name; `experts` is what a bare format means."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is set at this moment, layer by layer; prints what differs from its training."""

    trained_top_k: int
    rules: Mapping[int, SelectionRule]
    attention: Mapping[int, str]
    backend: Mapping[int, str]
    formats: Mapping[str, str]
    mask: Mapping[int, tuple[int, ...]]
    force: Mapping[int, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; a setting that all layers share is given once."""
        return {f.name: _collapsed(getattr(self, f.name)) for f in fields(self)}

    def __str__(self) -> str:
        parts = []
        rules = set(self.rules.values())
        if rules != {FixedK(self.trained_top_k)}:
            parts.append(_collapsed(self.rules) if len(rules) == 1 else f"rules {dict(self.rules)}")
        for name, usual in (("attention", "absorbed"), ("backend", "auto")):
            values = getattr(self, name)
            if set(values.values()) != {usual}:
                parts.append(f"{name} {_collapsed(values)}")
        parts += [
            f"{name} in layers {list(v)}"
            for name in ("mask", "force")
            if (v := getattr(self, name))
        ]
        parts.append(f"experts {self.formats.get('experts', 'none')}")
        return ", ".join(map(str, parts))


def _collapsed(values: Any) -> Any:
    """One value where all layers agree, else the mapping; rules as text."""
    if not isinstance(values, Mapping):
        return values
    plain = {key: v if isinstance(v, (str, tuple)) else str(v) for key, v in values.items()}
    distinct = list(dict.fromkeys(plain.values()))
    if len(distinct) == 1 and all(isinstance(key, int) for key in plain):
        return distinct[0] if isinstance(distinct[0], str) else plain
    return plain


def current(model: "Model") -> Settings:
    """Read the settings off the stages: the stages are what is true."""
    moe = model.moe_blocks
    return Settings(
        trained_top_k=model.config.top_k,
        rules={b.index: b.router.rule for b in moe},
        attention={b.index: b.attention.form for b in model.layers},
        backend={b.index: b.experts.backend for b in moe},
        formats=component_formats(model),
        mask={b.index: tuple(sorted(b.router.mask)) for b in moe if b.router.mask},
        force={b.index: b.router.force for b in moe if b.router.force},
    )


def component_formats(model: "Model") -> dict[str, str]:
    """The formats of each component, joined by + where they differ."""
    found: dict[str, list[str]] = {}
    for component, holder, name in component_stages(model):
        stage = getattr(holder, name)
        found.setdefault(component, []).extend(tensor_formats(stage))
    return {component: "+".join(dict.fromkeys(formats)) for component, formats in found.items()}


def tensor_formats(stage: Any) -> list[str]:
    """Formats of a stage's matrices."""
    if hasattr(stage, "formats"):
        return list(stage.formats)
    if hasattr(stage, "weight"):
        return [stage.weight.format.name]
    linears = stage.weights.linears if hasattr(stage, "weights") else vars(stage)
    return [linear.weight.format.name for linear in linears.values()]


def component_stages(model: "Model") -> Iterator[tuple[str, Any, str]]:
    """(component, object that holds it, attribute) of everything that `quantize=` can change."""
    for block in model.layers:
        yield "attention", block, "attention"
        if isinstance(block, MoEBlock):
            yield "experts", block, "experts"
            if block.shared is not None:
                yield "shared", block, "shared"
        else:
            yield "dense", block, "mlp"
    yield "output", model, "output"


class Change:
    """A set of assignments that can be undone, newest first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        self._undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def undo(self) -> None:
        while self._undo:
            setattr(*self._undo.pop())


def apply(
    model: "Model",
    change: Change,
    *,
    top_k: int | Mapping[int, int] | None = None,
    rule: SelectionRule | Mapping[int, SelectionRule] | None = None,
    attention: str | Mapping[int, str] | None = None,
    backend: str | Mapping[int, str] | None = None,
    quantize: str | Mapping[str, str] | None = None,
    mask: Mapping[int, Sequence[int]] | None = None,
    force: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Make the changes, recording each in `change`; raises `SettingError` on the first impossible
    one, leaving it to the caller to undo."""
    if quantize is not None:
        _quantize(model, change, quantize)  # first: the other switches belong on the new stages
    moe: dict[int, MoEBlock] = {b.index: b for b in model.moe_blocks}
    every: dict[int, Layer] = {b.index: b for b in model.layers}
    for index, new_rule in _per_layer("rule", rule, moe).items():
        change.set(moe[index].router, "rule", new_rule)
    for index, k in _per_layer("top_k", top_k, moe).items():
        if isinstance(k, bool) or not isinstance(k, int):
            raise SettingError(f"top_k = {k!r}: expected a whole number of experts")
        router = moe[index].router
        change.set(router, "rule", FixedK(k) if k < 1 else with_k(router.rule, k))
    for index, experts in _per_layer("mask", mask, moe).items():
        change.set(moe[index].router, "mask", frozenset(experts))
    for index, experts in _per_layer("force", force, moe).items():
        change.set(moe[index].router, "force", tuple(experts))
    for index, form in _per_layer("attention", attention, every).items():
        change.set(every[index].attention, "form", check_form(form))
    for index, name in _per_layer("backend", backend, moe).items():
        bank = moe[index].experts
        choose(check_backend(name), bank.formats, tokens=1)  # refuses what cannot compute it
        change.set(bank, "backend", name)
    for block in moe.values():
        block.router.check()


def _per_layer(
    name: str, value: Any, blocks: Mapping[int, Layer] | Mapping[int, MoEBlock]
) -> dict[int, Any]:
    """One value for all `blocks`, or a mapping from layer index; {} for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        if name in ("mask", "force"):
            raise SettingError(
                f"{name}={value!r}: experts are numbered layer by layer; expected a mapping such "
                f"as {{{next(iter(blocks), 0)}: [0, 1]}}"
            )
        return dict.fromkeys(blocks, value)
    outside = [index for index in value if index not in blocks]
    if outside:
        raise SettingError(
            f"{name}: layers {outside} cannot take it; it applies to layers {list(blocks)}"
        )
    return dict(value)


def _quantize(model: "Model", change: Change, quantize: str | Mapping[str, str]) -> None:
    wanted = {"experts": quantize} if isinstance(quantize, str) else dict(quantize)
    for component, format in wanted.items():
        if component not in COMPONENTS:
            raise SettingError(
                f"quantize: component {component!r} is unknown; expected some of "
                f"{', '.join(COMPONENTS)}{nearest(component, COMPONENTS)}"
            )
        get_format(format)
    for component, holder, name in component_stages(model):
        if component not in wanted:
            continue
        stage = getattr(holder, name)
        change.set(holder, name, model.requantized(stage, get_format(wanted[component]).name))
