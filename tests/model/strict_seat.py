"""A stand-in that behaves like a GPU where code errs: its tensors do not mix with the host's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ktlab.kernels.seat import TorchSeat


class There(torch.Tensor):
    """A tensor of the stand-in. Meeting a host tensor is an error, as it is on CUDA."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist", "item", "__int__"):
            raise RuntimeError(f"{name}() of a tensor on a device")
        flat, _ = tree_flatten((args, kwargs or {}))
        # Masks and indices that were made with device=x.device are of the host here; a 0-dim
        # tensor may come from anywhere.
        strangers = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, There)]
        if any(x.ndim and x.is_floating_point() for x in strangers):
            raise RuntimeError(f"{name}: tensors on two devices")
        return super().__torch_function__(func, types, args, kwargs or {})


class StrictSeat(TorchSeat):
    """The CPU under a GPU's name; `room` bytes, then out of memory (or what `full` is)."""

    full: type[Exception] = torch.OutOfMemoryError

    def __init__(self, word: str, dtype: str = "f32", room: int | None = None) -> None:
        super().__init__(word, "cpu", dtype)
        self.room = room

    def take(self, values: Tensor) -> Tensor:
        assert not isinstance(values, There), "taken twice"
        return super().take(values)

    def give(self, *values: Tensor) -> Any:
        assert all(isinstance(x, There) for x in values), "given back twice"
        return super().give(*values)

    def placed(self, values: Tensor) -> Tensor:
        return values.as_subclass(There)

    def plain(self, values: Tensor) -> Tensor:
        return values.as_subclass(torch.Tensor)

    def _keep(self, values: Tensor, what: str) -> Tensor:
        if self.room is not None and sum(self.here_bytes.values()) > self.room:
            raise self.full("tried to allocate more than there is")
        return super()._keep(values, what)
