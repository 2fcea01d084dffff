"""Results as plain data: frozen dataclasses that go to dictionaries and JSON and come back."""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R", bound="Record")


def unsaved(default: Any = None) -> Any:
    """A dataclass field that is neither compared, shown nor written: bulky or live things."""
    return field(default=default, compare=False, repr=False, metadata={"saved": False})


class Record:
    """Base of the result dataclasses. JSON has no infinity, so `inf` is written as a string."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, lists, numbers and strings; what `from_dict` reads."""
        return {
            f.name: _encode(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if f.metadata.get("saved", True)
        }

    @classmethod
    def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
        """The record that `to_dict` wrote; ValueError that names what is missing or unknown."""
        hints = get_type_hints(cls)
        known = {f.name: f for f in fields(cls) if f.metadata.get("saved", True)}  # type: ignore[arg-type]
        required = {
            name
            for name, f in known.items()
            if f.default is MISSING and f.default_factory is MISSING
        }
        missing, unknown = sorted(required - set(data)), sorted(set(data) - set(known))
        if missing or unknown:
            raise ValueError(
                f"not a {cls.__name__} as ktlab writes it: missing {missing}, unknown {unknown}"
            )
        return cls(**{name: _decode(hints[name], value) for name, value in data.items()})

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON (no NaN or Infinity literals)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Read back what `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return [_encode(v) for v in sorted(value)]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return _encode(value.item())
    return repr(value)


def _decode(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value)
    if hint is float:
        return float(value)
    if is_dataclass(hint) and isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], v) for v in value)
        return tuple(_decode(a, v) for a, v in zip(arguments, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {k: _decode(arguments[1], v) for k, v in value.items()}
    return value
