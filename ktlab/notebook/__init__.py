"""What a researcher sees: live views on a loaded model, made of the library's own objects.

>>> from ktlab.notebook import control_room
>>> room = control_room(ktlab.load("tiny"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktlab.notebook.control_room_view import ControlRoom, control_room

_HOMES = {
    "ControlRoom": "ktlab.notebook.control_room_view",
    "control_room": "ktlab.notebook.control_room_view",
}

__all__ = ["ControlRoom", "control_room"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ktlab.notebook' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
