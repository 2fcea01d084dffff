"""Live switches: what `override` accepts, how it is checked, applied and undone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from ktlab.attention.cache import USUAL_FORMS
from ktlab.errors import SettingError, nearest
from ktlab.experts.bank import ExpertBank
from ktlab.experts.banks import layers as ranges
from ktlab.kernels import dispatch
from ktlab.kernels.computed import Computed
from ktlab.kernels.request import AUTO, REQUEST_WORDS, Kernel, Request
from ktlab.model.block import Layer, MoEBlock
from ktlab.model.components import COMPONENTS, component_stages, every_product, products_of
from ktlab.model.copies import check_formats, check_prepared, prepared_bytes
from ktlab.quantization import get_format
from ktlab.routing.rules import FixedK, SelectionRule, with_k

if TYPE_CHECKING:
    from ktlab.model.model import Model

SWITCHES = (
    "rules", "top_k", "rule", "attention", "quantize", "format", "mask", "force", "deferred",
    "placement", "stand_in", "dtype", "nodes", *REQUEST_WORDS,
)  # fmt: skip
"""What `override` and `set` accept."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is set at this moment, layer by layer; prints what differs from its training."""

    trained_top_k: int
    rules: Mapping[int, SelectionRule]
    attention: Mapping[int, str]
    backend: Mapping[int, str]
    isa: Mapping[int, str]
    layout: Mapping[int, str]
    """What was asked for the experts; "auto" leaves the choice to the dispatch table."""
    kernel: Mapping[int, str]
    """What computes the experts: backend, isa, layout, threads."""
    matrices: Mapping[str, str]
    """What computes the other components' matrices."""
    formats: Mapping[str, str]
    mask: Mapping[int, tuple[int, ...]]
    force: Mapping[int, tuple[int, ...]]
    deferred: Mapping[int, int]
    """Experts of each token that the next layer adds, in the layers that defer any."""
    placement: Mapping[str, Any]
    """{component: device, or more where it is divided} and {device: what computes there}; {} where
    all is on the CPU."""
    own: Mapping[str, str]
    """{"layers.3.router": a class of the user's that stands there, with its words}."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; a setting that all layers share is given once."""
        return {f.name: _collapsed(getattr(self, f.name)) for f in fields(self)}

    def __str__(self) -> str:
        parts = []
        rules = set(self.rules.values())
        if rules != {FixedK(self.trained_top_k)}:
            parts.append(_collapsed(self.rules) if len(rules) == 1 else f"rules {dict(self.rules)}")
        usual_words = dict(backend={AUTO}, isa={AUTO}, layout={AUTO})
        for name, usual in {"attention": set(USUAL_FORMS), **usual_words}.items():
            values = getattr(self, name)
            if not set(values.values()) <= usual:
                parts.append(f"{name} {_collapsed(values)}")
        parts += [
            f"{name} in layers {list(v)}"
            for name in ("mask", "force")
            if (v := getattr(self, name))
        ]
        if self.deferred:
            counts = set(self.deferred.values())
            alike = len(counts) == 1 and len(self.deferred) == len(self.rules) - 1
            parts.append(f"deferred {counts.pop() if alike else dict(self.deferred)}")
        if self.placement:
            parts.append(f"placed on {' + '.join(self.placement['devices'])}")
        for name in dict.fromkeys(self.own.values()):
            where = [stage for stage, found in self.own.items() if found == name]
            stages = dict.fromkeys(stage.rpartition(".")[2] for stage in where)
            numbers = ranges(sorted({int(stage.split(".")[1]) for stage in where}))
            parts.append(f"{' and '.join(stages)} {name} in layers {numbers}")
        formats = f"experts in {self.formats.get('experts', 'none')}"
        return ", ".join([*(map(str, parts) if parts else ("as trained",)), formats])

    __repr__ = __str__


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
        backend={b.index: b.experts.request.backend for b in moe},
        isa={b.index: b.experts.request.isa for b in moe},
        layout={b.index: b.experts.request.layout for b in moe},
        kernel={b.index: str(b.experts.kernel) for b in moe},
        matrices=component_kernels(model),
        formats=component_formats(model),
        mask={b.index: tuple(sorted(b.router.mask)) for b in moe if b.router.mask},
        force={b.index: b.router.force for b in moe if b.router.force},
        deferred={b.index: b.deferred for b in moe if b.deferred},
        placement=_placement(model),
        own={
            f"layers.{block.index}.{name}": stage.own
            for block in model.layers
            for name, stage in block.stages().items()
            if getattr(stage, "own", "")
        },
    )


def _placement(model: "Model") -> dict[str, Any]:
    if model.placement is None:
        return {}
    wanted = model.placement.placement
    across = {getattr(block.experts, "across", None) for block in model.moe_blocks} - {None}
    if wanted.devices == ("cpu",) and not across:
        return {}
    devices = {word: str(model.seats.get(word, "native")) for word in wanted.devices}
    nodes = {"nodes": "+".join(sorted(map(str, across)))} if across else {}
    return {**wanted.to_dict()["places"], "devices": devices, **nodes}


def component_formats(model: "Model") -> dict[str, str]:
    """The formats of each component, joined by + where they differ."""
    found: dict[str, list[str]] = {}
    for component, holder, name in component_stages(model):
        stage = getattr(holder, name)
        found.setdefault(component, []).extend(tensor_formats(stage))
    return {component: "+".join(dict.fromkeys(formats)) for component, formats in found.items()}


def component_kernels(model: "Model") -> dict[str, str]:
    """What computes each component but the experts, joined by + where kernels differ."""
    found: dict[str, list[str]] = {}
    for component, holder, name in component_stages(model):
        if component != "experts":
            kernels = [str(product.kernel) for product in products_of(getattr(holder, name))]
            found.setdefault(component, []).extend(kernels)
    return {component: " + ".join(dict.fromkeys(kernels)) for component, kernels in found.items()}


def tensor_formats(stage: Any) -> list[str]:
    """Formats of a stage's matrices."""
    if isinstance(stage, Computed):
        return list(stage.formats)
    return [linear.stack.format.name for linear in stage.linears.values()]


class Rules(Protocol):
    """What the switch `rules` takes; `ktlab.RuleSet` is one."""

    def apply(self, model: "Model", *, stand_in: Any = None, dtype: str | None = None) -> "Change":
        """Set them on a model."""
        ...


class Change:
    """A set of assignments that can be undone, newest first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self._chosen: dict[tuple[Request, tuple[str, ...], bool], Kernel] = {}

    def set(self, holder: Any, name: str, value: Any) -> None:
        self._undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def take(self, other: "Change") -> None:
        """Undo what `other` has changed, too: it came later than all that is in here."""
        self._undo += other._undo

    def choose(self, product: Computed, request: Request) -> Kernel:
        """What shall compute `product`; asked once for all that are alike, which are many."""
        alike = (request, tuple(product.formats), product.small)
        if alike not in self._chosen:
            self._chosen[alike] = dispatch.choose(product.settled(request), product.formats)
        return self._chosen[alike]

    def undo(self) -> None:
        while self._undo:
            setattr(*self._undo.pop())


def apply(
    model: "Model",
    change: Change,
    *,
    rules: Rules | None = None,
    top_k: int | Mapping[int, int] | None = None,
    rule: SelectionRule | Mapping[int, SelectionRule] | None = None,
    attention: str | Mapping[int, str] | None = None,
    quantize: str | Mapping[str | int, str] | None = None,
    format: str | Mapping[str | int, str] | None = None,
    mask: Mapping[int, Sequence[int]] | None = None,
    force: Mapping[int, Sequence[int]] | None = None,
    deferred: int | Mapping[int, int] | None = None,
    placement: Any = None,
    stand_in: Any = None,
    dtype: str | None = None,
    nodes: str | None = None,
    **words: Any,
) -> None:
    """Make the changes, recording each in `change`; raises `SettingError` on the first impossible
    one, leaving it to the caller to undo. `words` are those of `kernels.request.Request`."""
    if rules is not None:
        if not hasattr(rules, "apply"):
            raise SettingError(
                f"rules={rules!r}: expected a RuleSet, such as ktlab.RuleSet.read(FILE)"
            )
        # First: what is named beside them counts more.
        change.take(rules.apply(model, stand_in=stand_in, dtype=dtype))
    if quantize is not None and format is not None:
        raise SettingError("quantize and format are two names of one switch; give one of them")
    wanted = format if quantize is None else quantize
    if wanted is not None:
        _quantize(model, change, wanted)  # first: the other switches belong on the new stages
    if placement is not None:
        from ktlab.model.place import apply_placement

        apply_placement(model, change, placement, stand_in=stand_in, dtype=dtype, nodes=nodes)
    elif nodes is not None:
        raise SettingError("nodes says how a placement is computed; give placement, too")
    elif rules is None and (stand_in is not None or dtype is not None):
        raise SettingError(
            "stand_in and dtype say what computes on a device; give placement or rules, too"
        )
    heavy = any(words.get(word) is not None for word in ("backend", "layout", "isa"))
    before = prepared_bytes(every_product(model)) if heavy else 0
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
    for index, count in _deferred(deferred, moe).items():
        change.set(moe[index], "deferred", count)
    for index, form in _per_layer("attention", attention, every).items():
        change.set(every[index].attention, "form", form)
    _set_kernels(model, change, words)
    if heavy:
        check_prepared(model, before, every_product(model))
    for block in moe.values():
        block.router.check()
        _check_deferred(block)


def _deferred(value: Any, moe: Mapping[int, MoEBlock]) -> dict[int, Any]:
    """{layer: experts to defer}; one number is for all layers that have a next one with experts."""
    last = max(moe, default=None)
    wanted = dict(value) if isinstance(value, Mapping) else value
    before = {index: block for index, block in moe.items() if index != last}
    if isinstance(wanted, dict) and wanted.get(last):
        raise SettingError(
            f"deferred: layer {last} is the last one with experts and has none to hand them to; it "
            f"applies to layers {list(before)}"
        )
    if isinstance(wanted, dict):
        wanted.pop(last, None)
    elif wanted and not before:
        raise SettingError(
            f"deferred={wanted!r}: it takes two layers with experts, found {len(moe)}"
        )
    return _per_layer("deferred", wanted, before)


def _check_deferred(block: MoEBlock) -> None:
    count, most = block.deferred, block.router.rule.k_max
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= most:
        raise SettingError(
            f"layers.{block.index}: deferred = {count!r}; expected a whole number from 0 to "
            f"{most}, the experts that a token of this layer takes"
        )


def _set_kernels(model: "Model", change: Change, words: Mapping[str, Any]) -> None:
    """backend, isa, layout, threads, numa, few: one value for every matrix, or a mapping from
    layers (their experts) or components. What was requantized is asked again, too."""
    wanted: dict[Computed, dict[str, Any]] = {}
    every: list[tuple[str, int | None, Computed]] = []
    for component, holder, name in component_stages(model):
        for product in products_of(getattr(holder, name)):
            layer = product.layer if isinstance(product, ExpertBank) else None
            every.append((component, layer, product))
            wanted[product] = {}
    for word, value in words.items():
        if value is None:
            continue
        if not isinstance(value, Mapping):
            for _, _, product in every:
                wanted[product][word] = value
            continue
        layers = [layer for _, layer, _ in every if layer is not None]
        unknown = [key for key in value if key not in (*COMPONENTS, *layers)]
        if unknown:
            raise SettingError(
                f"{word}: {unknown} cannot take it; expected layers with experts {layers} or some "
                f"of {', '.join(COMPONENTS)}"
            )
        for component, layer, product in every:
            for key in (component, layer):  # the layer counts more than "experts"
                if key in value:
                    wanted[product][word] = value[key]
    for product, changed in wanted.items():
        ask(change, product, **changed)


def ask(change: Change, product: Computed, **words: Any) -> None:
    """Set words of one product's request; `SettingError` where nothing computes it so."""
    before = product.request
    request = before.with_(**words) if words else before
    if request == before and product.kernel:
        return
    # Settled, as a first choice is: a small matrix stays packed whatever else is named.
    kernel = change.choose(product, request)
    change.set(product, "_request", request)
    change.set(product, "_kernel", kernel)


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


def _quantize(model: "Model", change: Change, quantize: str | Mapping[str | int, str]) -> None:
    wanted: dict[str | int, str]
    wanted = {"experts": quantize} if isinstance(quantize, str) else dict(quantize)
    layers = [block.index for block in model.moe_blocks]
    for key, format in wanted.items():
        if key not in (*COMPONENTS, *layers):
            raise SettingError(
                f"quantize: component {key!r} is unknown; expected some of "
                f"{', '.join(COMPONENTS)}, or layers with experts {layers}"
                f"{nearest(str(key), COMPONENTS)}"
            )
        get_format(format)
    check_formats(
        model, [(c, products_of(getattr(h, n)), f) for c, h, n, f in formatted(model, wanted)]
    )
    for _, holder, name, format in formatted(model, wanted):
        change.set(holder, name, model.requantized(getattr(holder, name), format))


def formatted(
    model: "Model", wanted: Mapping[str, str] | Mapping[str | int, str]
) -> Iterator[tuple[str, Any, str, str]]:
    """(component, holder, attribute, format) of every stage for which `quantize` names one."""
    by_key: Mapping[Any, str] = wanted
    for component, holder, name in component_stages(model):
        found = by_key.get(component)
        stage = getattr(holder, name)
        if isinstance(stage, ExpertBank):
            found = by_key.get(stage.layer, found)  # the layer counts more than "experts"
        if found is not None:
            yield component, holder, name, get_format(found).name
