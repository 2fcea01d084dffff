"""How a forward pass is watched: stages call a probe, which by default does nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from time import perf_counter

import torch
from torch import Tensor


class Probe:
    """Watches nothing, but may: subclasses say what they do with what they are offered."""

    inside: bool = True
    """Whether it wants to know what happens within a layer: without, a layer may be one call."""
    _nothing = nullcontext()

    def record(self, name: str, values: Tensor) -> None:
        """Offer one activation under its full name, tokens (batch times tokens) on axis 0."""

    def wants(self, name: str) -> bool:
        """Whether `record` looks at this activation; one that it does not stays where it is, on a
        GPU perhaps. A probe that passes on what it gets asks who gets it."""
        return True

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the enclosed stage, if anybody asked."""
        return self._nothing


class Silent(Probe):
    """What every forward pass uses unless somebody watches."""

    inside = False

    def wants(self, name: str) -> bool:
        return False


NO_PROBE = Silent()


class Recorder(Probe):
    """Keeps the activations whose names match, and the seconds that each stage took.

    `names` are shell patterns ("layers.*.router.ids"). Chunks of one text are joined on reading.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.patterns = names
        self.seen: set[str] = set()
        self.seconds: dict[str, float] = {}
        self._chunks: dict[str, list[Tensor]] = {}
        self._wanted: dict[str, bool] = {}

    def wants(self, name: str) -> bool:
        """Whether a pattern matches."""
        wanted = self._wanted.get(name)
        if wanted is None:
            wanted = any(fnmatchcase(name, pattern) for pattern in self.patterns)
            self._wanted[name] = wanted
        return wanted

    def record(self, name: str, values: Tensor) -> None:
        self.seen.add(name)
        if self.wants(name):
            self._chunks.setdefault(name, []).append(values.detach().clone())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def joined(self) -> dict[str, Tensor]:
        """Each recorded activation over the whole text, (T, ...)."""
        return {name: torch.cat(chunks) for name, chunks in self._chunks.items()}
