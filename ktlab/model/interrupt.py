"""A model whose forward passes can be stopped between two stages, for work behind a live view.

A cancel event that is looked at between passes is seen after up to one prefill; a reader who has
already pressed the next button waits that long for the first answer.
"""

import threading
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from ktlab.model.model import Model
from ktlab.probe import Probe


class Interrupted(Exception):
    """A forward pass was left because its result is no longer wanted."""


class Stopping(Probe):
    """Passes everything on to `inner`, and raises at the first stage after `cancel` was set."""

    def __init__(self, inner: Probe, cancel: threading.Event) -> None:
        self._inner, self._cancel = inner, cancel
        self.inside = inner.inside

    def record(self, name: str, values: Tensor) -> None:
        self._inner.record(name, values)

    def wants(self, name: str) -> bool:
        return self._inner.wants(name)

    def stage(self, name: str) -> AbstractContextManager[None]:
        if self._cancel.is_set():
            raise Interrupted
        return self._inner.stage(name)


def interruptible(model: Model, cancel: threading.Event) -> Model:
    """A clone of `model` that raises `Interrupted` at its next stage once `cancel` is set."""
    clone = model.clone()
    clone.watch = partial(Stopping, cancel=cancel)
    return clone
