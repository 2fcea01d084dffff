"""What a rule does to one module here, and what of it cannot be done, with the reason.

What has no counterpart here is told in `Effect.missing`, devices other than the CPU in
`Effect.away` (places.py says where they put the model; where they are there it goes there), what is
merely worth knowing in `Effect.note`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktlab import html
from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.kernels import dispatch, native
from ktlab.kernels.computed import Computed
from ktlab.kernels.linear import Linear
from ktlab.kernels.request import AUTO, NATIVE_ISAS, Kernel
from ktlab.kernels.seat import INT4
from ktlab.model.block import MoEBlock
from ktlab.placement.rules import own
from ktlab.placement.rules.modules import Module
from ktlab.placement.rules.reading import Rule
from ktlab.placement.rules.vocabulary import (
    CPU_KERNEL,
    DEFAULT,
    EXPERT_BACKENDS,
    GPU_FORMATS,
    GPU_KERNEL,
    LLAMAFILE,
    OPERATORS,
    TORCH,
    is_cpu,
)
from ktlab.quantization import fallback_format, get_format


@dataclass(frozen=True, kw_only=True)
class Effect:
    """`words` are what is set: format, backend, isa of a bank or a matrix, form of an attention."""

    words: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    after: str = ""
    missing: tuple[str, ...] = ()
    """What was asked for and is not done."""
    away: tuple[str, ...] = ()
    """Devices that were asked for, in words for where they are not there."""
    moved: bool = False
    """Whether the module goes to another device."""
    note: str = ""
    new_bytes: int = 0
    """Memory that weights in another format take beside those of the file."""
    stage: Callable[[], Any] | None = None
    """Makes what is put in the module's place."""
    wrong: tuple[str, ...] = ()
    """Why a class of the user's cannot stand there; `apply` refuses."""

    @property
    def sets(self) -> bool:
        """Whether a switch is set or a stage replaced."""
        return bool(self.words) or self.stage is not None


AS_LAST = "the last layer with experts has none to hand them to"
AS_CONFIGURED = "computed as the model's own configuration says"
CHUNKED = "prompts pass through each layer in pieces of 512 tokens"
_FITS: Mapping[str, tuple[str, ...]] = {
    "matrix": ("matrix", "expert matrix", "router"),
    "mlp": ("mlp", "expert"),
}
_STANDS_FOR = {
    "experts": "a layer's routed experts", "moe": "a layer with experts", "matrix": "one matrix",
    "attention": "attention", "rope": "RoPE", "router": "a router", "model": "the whole model",
    "norm": "a norm", "mlp": "a feed-forward network", "embedding": "the embedding",
}  # fmt: skip


def effect(rule: Rule, module: Module) -> Effect:
    """What `rule` does to the module that it matches."""
    return replace(_effect(rule, module), away=elsewhere(rule.kwargs))


def _effect(rule: Rule, module: Module) -> Effect:
    kind = rule.kind
    if rule.own is not None:
        return _own(rule, rule.own, module)
    if kind == DEFAULT:
        return Effect()
    if module.kind not in _FITS.get(kind, (kind,)):
        return Effect(
            missing=(f"{rule.class_name} stands for {_STANDS_FOR[kind]}, this is: {module.stage}",)
        )
    return _EFFECTS.get(kind, _as_configured)(rule, module)


def elsewhere(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Which devices a rule asks for that are not the CPU."""
    phases: dict[str, list[str]] = {}
    for name, phase in (
        ("generate_device", "decode"), ("prefill_device", "prefill"), ("device", "loading")
    ):  # fmt: skip
        place = kwargs.get(name)
        if place is not None and not is_cpu(place):
            phases.setdefault(place, []).append(phase)
    output = kwargs.get("out_device")
    if output is not None and not is_cpu(output) and output not in phases:
        phases[output] = ["its output"]
    told = [
        f"asks for {place}{'' if len(found) > 1 else ' for ' + found[0]}; computed on the CPU"
        for place, found in phases.items()
    ]
    told += [
        f"asks for {place} from layer {layer} on; computed on the CPU"
        for layer, place in kwargs.get("transfer_map", {}).items()
        if not is_cpu(place)
    ]
    return tuple(told)


def on_gpu(rule: Rule, module: Module, format: str) -> tuple[str, ...]:
    """What of a rule's words is not done to a module that goes to a GPU, to be `format` there."""
    usual = "KLinearMarlin" if rule.kind == "matrix" and module.kind == "matrix" else ""
    operator = rule.kwargs.get("generate_op", usual)
    found = GPU_FORMATS.get(operator or "", "")
    four = found == "4 bits"
    if not found or (four and format == INT4):
        return ()
    how = f'; 4 with dtype="{INT4}"' if four else ""
    return (f"{operator}'s {found}: {format} on a GPU here{how}",)


def _own(rule: Rule, cls: type, module: Module) -> Effect:
    if module.kind not in own.STAGES:
        fits = ", ".join(_STANDS_FOR[kind] for kind in own.STAGES)
        return Effect(missing=(f"{cls.__name__} can stand for {fits}; this is: {module.stage}",))
    if wrong := own.misfits(cls, module.ours, module.kind):
        return Effect(wrong=wrong)
    if own.stands(cls, module.ours, rule.own_words):
        return Effect(note=f"{own.called(cls, rule.own_words)} already")
    return Effect(
        stage=lambda: own.made(cls, module.ours, rule.own_words),
        before=module.ours.own.partition("#")[0] or type(module.ours).__name__,
        after=own.called(cls, rule.own_words),
    )


def _as_configured(rule: Rule, module: Module) -> Effect:
    return Effect(note=AS_CONFIGURED)


def _router(rule: Rule, module: Module) -> Effect:
    missing: tuple[str, ...] = ()
    if rule.class_name == "KMoEGateGreedy":
        missing += ("KMoEGateGreedy chooses in its own way; here experts are chosen as trained",)
    return Effect(missing=missing, note=AS_CONFIGURED)


def _model(rule: Rule, module: Module) -> Effect:
    if rule.kwargs.get("per_layer_prefill_intput_threshold"):
        return Effect(missing=(f"prefill of the whole prompt layer by layer; {CHUNKED}",))
    return Effect(note=AS_CONFIGURED)


def _attention(rule: Rule, module: Module) -> Effect:
    attention, note = module.ours, ""
    missing: tuple[str, ...] = ()
    absorbed = "absorbed" in attention.forms
    if "absorb_for_prefill" in rule.kwargs and not absorbed:
        missing += (f"{attention.kind} has no latent, so there is nothing to absorb",)
    elif rule.kwargs.get("absorb_for_prefill"):
        note = (
            "the latent is all that is cached; where it is faster a prompt still makes keys and "
            "values from it, some heads at a time"
        )
    if not absorbed or attention.form == "absorbed":
        return Effect(missing=missing, note=note or f"{attention.form} already")
    return Effect(
        words={"form": "absorbed"}, before=attention.form, after="absorbed", missing=missing,
        note=note,
    )  # fmt: skip


def _experts(rule: Rule, module: Module) -> Effect:
    kwargs, bank = rule.kwargs, module.ours
    operator = kwargs.get("generate_op", kwargs.get("generate_mlp_type", "KExpertsCPU"))
    what, missing = _runs_here(operator, "experts", kwargs, ())
    if what == TORCH:
        return _changed((bank,), {"backend": "torch"}, missing)
    if what != CPU_KERNEL:
        return Effect(missing=missing)
    backend = kwargs.get("backend") or LLAMAFILE
    format, isa = EXPERT_BACKENDS[backend]
    found = _compiled((bank,), missing, asked=backend, format=format, isa=isa)
    if backend == "AMXInt4" and found.words:
        return replace(found, note=f"{found.note}; scales by groups of columns, theirs one a row")
    return found


def _deferring(rule: Rule, module: Module) -> Effect:
    """Experts, and how many of a token's are added one layer later."""
    found, block = _experts(rule, module), module.block
    given = rule.kwargs.get("n_deferred_experts", 0)
    counts = given if isinstance(given, list) else [given]
    if not any(counts):
        return found
    assert isinstance(block, MoEBlock)
    missing, count = found.missing, counts[0]
    if len(counts) > 1:
        missing += (f"deferred by the number of tokens, {counts}; here {count} for any number",)
    if count > (most := block.router.rule.k_max):
        missing += (f"{count} deferred experts: a token has {most}; none is deferred",)
        return replace(found, missing=missing)
    if block.index == block.config.moe_layers[-1]:
        return replace(found, missing=missing, note=f"{found.note or AS_LAST}")
    if block.deferred == count:
        return replace(found, missing=missing)
    note = "; ".join(filter(None, (found.note, "in prompts, too")))
    return replace(
        found, words={**found.words, "deferred": str(count)}, missing=missing, note=note,
        before=", ".join(filter(None, (found.before, f"{block.deferred} deferred"))),
        after=", ".join(filter(None, (found.after, f"{count} deferred"))),
    )  # fmt: skip


def _matrix(rule: Rule, module: Module) -> Effect:
    kwargs = rule.kwargs
    if module.kind == "expert matrix":
        return Effect(
            missing=("a layer's experts are one bank here; a rule on mlp.experts sets it",)
        )
    operator = kwargs.get("generate_op", "KLinearMarlin")
    what, missing = _runs_here(operator, "matrix", kwargs, ())
    if kwargs.get("num_bits"):
        missing += (f"num_bits {kwargs['num_bits']}: a matrix keeps its format",)
    if module.kind == "router":
        return Effect(missing=missing, note="the router's gate keeps its own kernel")
    if what == TORCH:
        return _changed(module.ours, {"backend": "torch"}, missing)
    if what != CPU_KERNEL:
        return Effect(missing=missing)
    if operator == "KLinearQ8":
        missing += ("KLinearQ8's 8 bits: a matrix keeps its format",)
    return _compiled(module.ours, missing, asked=operator)


def _runs_here(
    operator: str | None, kind: str, kwargs: Mapping[str, Any], missing: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """What computes decode by a rule's word, "" where it is not on the CPU; and what is missing."""
    if operator is None or not is_cpu(kwargs.get("generate_device") or "cpu"):
        return "", missing  # on another device, which `elsewhere` has told
    what = OPERATORS[kind][operator]
    if what == GPU_KERNEL:
        missing += (f"{operator} runs on a GPU alone; computed by the present kernel",)
    return what, missing


def _compiled(
    products: Sequence[Computed], missing: tuple[str, ...], *, asked: str,
    format: str = "", isa: str = "",
) -> Effect:  # fmt: skip
    """Native code, with the instruction set that was named if it runs here."""
    words = {"backend": "native"} | ({"isa": isa} if isa else {})
    formats = [name for product in products for name in _formats(product, format)]
    reject = native.unavailable()
    if reject:
        words = {"backend": AUTO, "isa": AUTO}
    elif isa and (reject := native.reject(isa, formats)):
        words["isa"] = AUTO
    if not reject:
        for product in products:
            try:
                _choose(product, words, format)
            except SettingError:
                reject = native.reject(NATIVE_ISAS[-1], formats) or "no kernel computes them"
                words = {"backend": AUTO, "isa": AUTO}
    if not reject:
        return _changed(products, words, missing, format)
    kernel = _choose(products[0], words, format)
    told = f"{asked} asks for {isa or 'compiled code'}: {reject}; computed by {_code(kernel)}"
    return _changed(products, words, (*missing, told), format)


def _changed(
    products: Sequence[Computed], words: Mapping[str, str], missing: tuple[str, ...],
    format: str = "",
) -> Effect:  # fmt: skip
    """The effect of setting words and a format; none where the same code runs on the same bytes."""
    before = [(_formats(p), _code(p.kernel)) for p in products]
    after = [(_formats(p, format), _code(_choose(p, words, format))) for p in products]
    if before == after:
        return Effect(missing=missing, note=f"{_line(before)} already")
    note, new_bytes = "", 0
    if before[0][0] != after[0][0]:
        now = sum(stack.nbytes for product in products for stack in product.stacks)
        then = sum(_bytes(product, format) for product in products)
        note = f"{html.byte_size(now)} a layer become {html.byte_size(then)}"
        words = {"format": format, **words}
        made = [p for p in products if not (isinstance(p, ExpertBank) and format in p.kept_formats)]
        new_bytes = sum(_bytes(product, format) for product in made)
    return Effect(
        words=words, before=_line(before), after=_line(after), missing=missing, note=note,
        new_bytes=new_bytes,
    )  # fmt: skip


def _formats(product: Computed, format: str = "") -> tuple[str, ...]:
    """The formats of its matrices, as they would be after requantizing."""
    if not format:
        return product.formats
    return tuple(fallback_format(format, stack.shape[-1]).name for stack in product.stacks)


def _bytes(product: Computed, format: str) -> int:
    total = 0
    for stack, name in zip(product.stacks, _formats(product, format), strict=True):
        row = stack.shape[-1]
        total += stack.size // row * get_format(name).row_bytes(row)
    return total


def _choose(product: Computed, words: Mapping[str, str], format: str) -> Kernel:
    formats = _formats(product, format)
    request = product.request.with_(**words)
    return dispatch.choose(product.settled(request, formats), formats)


def _code(kernel: Kernel) -> str:
    return f"native {kernel.isa}" if kernel.backend == "native" else kernel.backend


def _line(states: Sequence[tuple[tuple[str, ...], str]]) -> str:
    """ "q4_k+q6_k, native avx2"; matrices that differ are joined."""
    formats = dict.fromkeys(name for names, _ in states for name in names)
    codes = dict.fromkeys(code for _, code in states)
    return f"{'+'.join(formats)}, {' and '.join(codes)}"


_EFFECTS: Mapping[str, Callable[[Rule, Module], Effect]] = {
    "experts": _deferring, "matrix": _matrix, "attention": _attention, "model": _model,
    "router": _router,
}  # fmt: skip


def set_on(module: Module) -> Sequence[ExpertBank | Linear]:
    """What an effect's words are set on, apart from an attention's form."""
    return (module.ours,) if isinstance(module.ours, ExpertBank) else tuple(module.ours)
