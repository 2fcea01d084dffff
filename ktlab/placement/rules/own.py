"""A module of the user's: a class from a notebook cell in the place of a stage.

The class says what it does in another way; everything else (weights, switches, cost, clones, how it
is shown) is the replaced stage's own, because an object is made of both:

    class Near(Router):                    # or a plain class: what it lacks is the router's
        near: list[int]                    # words of the rule file, as for a dataclass
        bonus = 0.1
        def choice(self, scores_TE): ...

T tokens, E experts, K selected, D hidden, B batch.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from ktlab.attention.cache import Cache
from ktlab.attention.stage import Attention
from ktlab.errors import RuleError, nearest
from ktlab.experts.bank import ExpertBank
from ktlab.model.model import Model
from ktlab.probe import NO_PROBE
from ktlab.routing.router import Router, Routing

STAGES: Mapping[str, type] = {"router": Router, "experts": ExpertBank, "attention": Attention}
"""What a class of the user's can stand for: kind of module, also the layer's attribute -> class."""
CALLS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "router": {"forward": ("hidden_TD",), "choice": ("scores_TE",)},
    "experts": {"forward": ("hidden_TD", "ids_TK", "weights_TK")},
    "attention": {
        "attend": ("hidden_BTD", "cache", "positions_BT", "probe"),
        "forward": ("hidden_BTD", "cache", "positions_BT", "probe"),
    },
}
"""The methods that say what a stage does: one at least must be the class's. Method -> arguments."""
TRIED_TOKENS = 2

Classes = Mapping[str, type] | Iterable[type]


def by_name(classes: Classes) -> dict[str, type]:
    """{name in a rule file: class}; RuleError for what is no class."""
    found = dict(classes) if isinstance(classes, Mapping) else {}
    if not isinstance(classes, Mapping):
        found = {getattr(each, "__name__", repr(each)): each for each in classes}
    wrong = [name for name, each in found.items() if not isinstance(each, type)]
    if wrong:
        raise RuleError(
            f"classes: {', '.join(wrong)} are no classes; expected such as classes=[MyRouter], the "
            "class and not an object of it"
        )
    return found


def _own_part(cls: type) -> tuple[type, ...]:
    """The class and those of its bases that are the user's, too."""
    ours = {base for stage in _stages(cls) for base in stage.__mro__} | {object}
    return tuple(base for base in cls.__mro__ if base not in ours)


def _stages(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("ktlab.")]


def parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """The words that a rule file may give it, as `inspect` tells of a function's."""
    for base in _own_part(cls):
        if "__init__" in vars(base):
            return dict(list(inspect.signature(base.__init__).parameters.items())[1:])  # type: ignore[misc]
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(_own_part(cls)):
        values = {
            name: value
            for name, value in vars(base).items()
            if not (name.startswith("_") or callable(value) or hasattr(value, "__get__"))
        }
        told = inspect.get_annotations(base)
        for name in [*told, *values]:
            if not name.startswith("_") and "ClassVar" not in str(told.get(name)):
                default = values.get(name, inspect.Parameter.empty)
                kind = inspect.Parameter.KEYWORD_ONLY
                found[name] = inspect.Parameter(name, kind, default=default)
    return found


def wrong_words(cls: type, kwargs: Mapping[str, Any]) -> str:
    """What is wrong with the words of a rule as a class's, "" if nothing is."""
    known = parameters(cls)
    named = [n for n, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    found = []
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        found += [
            f"{cls.__name__} takes no {name}{nearest(name, named)}"
            for name in kwargs
            if name not in named
        ]
    lacking = [n for n in named if known[n].default is inspect.Parameter.empty and n not in kwargs]
    found += [f"{cls.__name__} needs {', '.join(lacking)}"] if lacking else []
    takes = f"; it takes {', '.join(named)}" if named else "; it takes no words"
    return "; ".join(found) + takes if found else ""


def misfits(cls: type, original: Any, kind: str) -> tuple[str, ...]:
    """Everything that keeps a class from standing where `original` stands, but running it."""
    name, base, found = cls.__name__, _base(original), []
    for stage in _stages(cls):
        if not isinstance(original, stage):
            found.append(f"{name} is a kind of {stage.__name__}, there stands {base.__name__}")
            break
    if kind == "experts" and base is not ExpertBank:
        found.append(
            f"the experts here are on {original.placement}, a class of your own computes them on "
            "the CPU; put them there first"
        )
    calls, part = CALLS[kind], _own_part(cls)
    defined = {key: value for each in reversed(part) for key, value in vars(each).items()}
    mine = [method for method in calls if method in defined]
    if not mine:
        near = next(filter(None, (nearest(key, calls) for key in defined if key[0] != "_")), "")
        called = " or ".join(f"{m}(self, {', '.join(given)})" for m, given in calls.items())
        found.append(f"{name} has no {called}{near}")
    for method in mine:
        if wrong := _not_called_so(defined[method], calls[method]):
            found.append(f"{name}.{method}: {wrong}")
    left: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    found += [f"{name} leaves {', '.join(sorted(left))} abstract"] if left else []
    hidden = [
        key
        for key, value in defined.items()
        if key[0] != "_" and callable(getattr(base, key, None)) and not callable(value)
    ]
    found += [f"{name} hides the stage's own {', '.join(hidden)}"] if hidden else []
    return tuple(found)


def _not_called_so(method: Any, given: tuple[str, ...]) -> str:
    if not callable(method):
        return f"expected a method, found {type(method).__name__}"
    signature = inspect.signature(method)
    try:
        signature.bind(None, *given)
    except TypeError as error:
        return f"is called with ({', '.join(given)}): {error}; it takes {signature}"
    return ""


def _base(original: Any) -> type:
    """The class of ours that a stage has, also where one of the user's stands there already."""
    return next(c for c in type(original).__mro__ if c.__module__.startswith("ktlab."))


@lru_cache(maxsize=64)
def _joined(cls: type, base: type) -> type:
    """The class before the stage's: what it lacks is the stage's."""
    bases = (cls,) if issubclass(cls, base) else (cls, base)
    # A dataclass compares by its fields and may be frozen; stages are looked up and switched.
    body: dict[str, Any] = {
        name: getattr(base, name) for name in ("__eq__", "__hash__", "__setattr__", "__repr__")
    }
    body |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, bases, body)


def made(cls: type, original: Any, kwargs: Mapping[str, Any]) -> Any:
    """An object of `cls` with all that `original` has: weights shared, switches as they stand."""
    try:
        joined = _joined(cls, _base(original))
        stage: Any = object.__new__(joined)
        vars(stage).update(vars(original))
        if any("__init__" in vars(each) for each in _own_part(cls)):
            stage.__init__(**kwargs)
        else:
            vars(stage).update(kwargs)
    except Exception as error:
        raise RuleError(
            f"{cls.__name__} cannot be made: {_told(error)}. What the stage has is there before "
            "__init__, which takes the rule's words alone and need not call super().__init__"
        ) from error
    stage.own = _identity(cls, kwargs)
    return stage


def stands(cls: type, original: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether it stands there already, with these words."""
    there: str = original.own
    return isinstance(original, cls) and there == _identity(cls, kwargs)


def called(cls: type, kwargs: Mapping[str, Any]) -> str:
    """ "Near(bonus=0.1)": the class and the rule's words."""
    return f"{cls.__name__}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})"


def _identity(cls: type, kwargs: Mapping[str, Any]) -> str:
    """ "Near(bonus=0.1)#3fa2": also of which code, since a cell may define a class again."""
    digest = hashlib.sha256()
    for base in _own_part(cls):
        for name, value in sorted(vars(base).items()):
            digest.update(f"{name}={_said(value)}".encode())
    return f"{called(cls, kwargs)}#{digest.hexdigest()[:4]}"


def _said(value: Any) -> str:
    """What of an attribute makes a definition: a function's code, a plain value."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if isinstance(code, CodeType):
        inner = [_said_code(each) for each in code.co_consts]
        return f"{code.co_code.hex()} {inner} {code.co_names}"
    return repr(value) if isinstance(value, (int, float, str, tuple, list, dict)) else ""


def _said_code(constant: Any) -> str:
    return constant.co_code.hex() if isinstance(constant, CodeType) else repr(constant)


# Trying it --------------------------------------------------------------------------------------


def tried(make: Callable[[], Any], kind: str, model: Model) -> tuple[str, ...]:
    """What is wrong with what it returns on two tokens, then one; () if nothing is."""
    try:
        stage = make()
    except RuleError as error:
        return (str(error),)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TRIED_TOKENS + 1, model.config.hidden_size, generator=generator)
    try:
        with torch.inference_mode():
            return tuple(dict.fromkeys(_TRIALS[kind](stage, hidden_TD, model)))
    except Exception as error:  # whatever a user's code may raise
        return (_told(error),)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _try_router(stage: Router, hidden_TD: Tensor, model: Model) -> list[str]:
    found, experts = [], model.config.num_experts
    hidden_TD = hidden_TD.to(stage.weight_ED.device)
    for part_TD in (hidden_TD[:TRIED_TOKENS], hidden_TD[TRIED_TOKENS:]):
        tokens, routing = len(part_TD), stage.forward(part_TD)
        if not isinstance(routing, Routing):
            return [f"returned {type(routing).__name__}; expected a Routing"]
        k = routing.ids_TK.shape[-1]
        expected = {
            "logits_TE": (tokens, experts), "scores_TE": (tokens, experts),
            "ids_TK": (tokens, k), "weights_TK": (tokens, k),
        }  # fmt: skip
        for name, shape in expected.items():
            kind = torch.int64 if name == "ids_TK" else torch.float32
            found += _unlike(name, getattr(routing, name), shape, kind)
        if not found and not -1 <= routing.ids_TK.min() <= routing.ids_TK.max() < experts:
            found.append(
                f"ids_TK from {routing.ids_TK.min()} to {routing.ids_TK.max()}; expected 0 to "
                f"{experts - 1}, and -1 where no expert is taken"
            )
        ids_TK = routing.ids_TK.sort(-1).values
        if ((ids_TK[:, 1:] == ids_TK[:, :-1]) & (ids_TK[:, 1:] >= 0)).any():
            found.append("ids_TK names an expert twice for one token")
    return found


def _try_experts(stage: ExpertBank, hidden_TD: Tensor, model: Model) -> list[str]:
    k = min(2, stage.num_experts)
    found: list[str] = []
    for part_TD in (hidden_TD[:TRIED_TOKENS], hidden_TD[TRIED_TOKENS:]):
        ids_TK = torch.arange(k).expand(len(part_TD), k)
        output = stage.forward(part_TD, ids_TK, torch.full(ids_TK.shape, 1 / k))
        found = _unlike("what it returned", output, tuple(part_TD.shape), torch.float32)
        if found:
            break
    return found


def _try_attention(stage: Attention, hidden_TD: Tensor, model: Model) -> list[str]:
    found: list[str] = []
    hidden_TD = stage.seat.take(hidden_TD)
    cache = Cache(model.config, [stage.form], 1, TRIED_TOKENS + 1, [stage.seat])
    for part_TD in (hidden_TD[:TRIED_TOKENS], hidden_TD[TRIED_TOKENS:]):
        positions_BT = cache.positions(len(part_TD))
        output = stage.forward(part_TD[None], cache.layers[0], positions_BT, NO_PROBE)
        found = _unlike("what it returned", output, (1, *part_TD.shape), torch.float32)
        if found:
            break
        cache.lengths_B += len(part_TD)
    return found


_TRIALS: Mapping[str, Callable[[Any, Tensor, Model], list[str]]] = {
    "router": _try_router, "experts": _try_experts, "attention": _try_attention
}  # fmt: skip


def _unlike(name: str, value: Any, shape: tuple[int, ...], kind: torch.dtype) -> list[str]:
    if not isinstance(value, Tensor):
        return [f"{name} is {type(value).__name__}; expected a tensor {shape} of {kind}"]
    if tuple(value.shape) != shape or value.dtype != kind:
        return [f"{name} is {tuple(value.shape)} of {value.dtype}; expected {shape} of {kind}"]
    if kind.is_floating_point and not value.isfinite().all():
        return [f"{name} has infinite numbers, or none"]
    return []
