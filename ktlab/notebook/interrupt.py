"""A model whose forward passes can be stopped between two stages, for work behind a live view.

A cancel event that is looked at between passes is seen after up to one prefill; a reader who has
already pressed the next button waits that long for the first answer.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ktlab.attention.cache import Cache
from ktlab.model.model import Model
from ktlab.probe import Probe


class Interrupted(Exception):
    """A forward pass was left because its result is no longer wanted."""


class _Stopping(Probe):
    """Passes everything on to `inner`, and raises at the first stage after `cancel` was set."""

    def __init__(self, inner: Probe, cancel: threading.Event) -> None:
        self._inner, self._cancel = inner, cancel

    def record(self, name: str, values: Tensor) -> None:
        self._inner.record(name, values)

    def stage(self, name: str) -> AbstractContextManager[None]:
        if self._cancel.is_set():
            raise Interrupted
        return self._inner.stage(name)


class InterruptibleModel(Model):
    """A clone of `model` (so are its clones) that raises `Interrupted` once `cancel` is set."""

    def __init__(self, model: Model, cancel: threading.Event) -> None:
        # Like Model.clone: the same weights, stages of its own; nothing is loaded again.
        self.__dict__.update(model.clone().__dict__)
        self._cancel = cancel

    def _hidden(
        self,
        ids_BT: Tensor,
        cache: Cache,
        lengths: Any,
        probe: Probe,
        chunk: int,
    ) -> Tensor:
        return super()._hidden(ids_BT, cache, lengths, _Stopping(probe, self._cancel), chunk)

    def requantized(self, stage: Any, format: str) -> Any:
        if self._cancel.is_set():
            raise Interrupted
        return super().requantized(stage, format)
