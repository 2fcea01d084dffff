"""Which experts each token of a trace selected, and the checks that come before any statistic.

Letters: T tokens, K selected, E experts.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError
from ktlab.routing import intervals


class Routed(Protocol):
    """What is needed of a `ktlab.model.Trace`."""

    @property
    def ids_T(self) -> NDArray[np.int64]: ...
    @property
    def segment_T(self) -> NDArray[np.int64]: ...
    @property
    def domain_T(self) -> NDArray | None: ...
    @property
    def model(self) -> Any: ...
    def __getitem__(self, name: str) -> NDArray: ...
    def __contains__(self, name: object) -> bool: ...


class Selections:
    """The selected experts of `trace`, by layer, and the units that intervals resample."""

    def __init__(self, trace: Routed) -> None:
        self.trace = trace
        self.num_experts = int(trace.model.num_experts)
        self.run_T = intervals.runs(trace.segment_T, trace.domain_T)
        self.unit_T = intervals.units(self.run_T)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose selected experts were recorded."""
        layers = self.trace.model.moe_layers
        return tuple(i for i in layers if f"layers.{i}.router.ids" in self.trace)

    @property
    def domains(self) -> tuple[str, ...]:
        domain_T = self.trace.domain_T
        return () if domain_T is None else tuple(str(d) for d in np.unique(domain_T))

    def ids(self, layer: int) -> NDArray[np.integer]:
        """(T, K) selected experts, -1 where a rule took fewer."""
        return self.trace[f"layers.{self.routed(layer)}.router.ids"]

    def routed(self, layer: int) -> int:
        """`layer`, or TraceError if it has no router."""
        layers = tuple(self.trace.model.moe_layers)
        if layer in layers:
            return int(layer)
        known = f"layers with a router: {span(layers)}"
        if isinstance(layer, (int, np.integer)) and 0 <= layer < max(layers, default=0):
            raise TraceError(f"layer {layer} is a dense layer: it has no router; {known}")
        raise TraceError(f"{self.trace.model.name} has no layer {layer!r}; {known}")

    def following(self, layer: int) -> int:
        """The next layer with a router, or TraceError if `layer` is the last."""
        layers = tuple(self.trace.model.moe_layers)
        later = [i for i in layers if i > self.routed(layer)]
        if not later:
            raise TraceError(
                f"layer {layer} is the last with a router, so nothing follows it; "
                f"expected one of: {span(layers[:-1])}"
            )
        return later[0]

    def hot(self, layer: int) -> NDArray[np.bool_]:
        """(T, E) True where a token selected an expert."""
        return hot(self.ids(layer), self.num_experts)

    def counts(self, ids_TK: NDArray) -> NDArray[np.int64]:
        """(E,) how often each expert occurs in `ids_TK`."""
        return np.bincount(ids_TK[ids_TK >= 0].ravel(), minlength=self.num_experts)

    def held_out_T(self) -> NDArray[np.bool_]:
        """(T,) True on the half of each domain's text that nothing may be learnt from."""
        held_T = intervals.held_out_half(self.run_T, self.trace.domain_T)
        if held_T.all() or not held_T.any():
            raise TraceError("expected at least two tokens, to learn on one half; found one")
        return held_T

    def need_domains(self, count: int) -> NDArray:
        """(T,) labels, or TraceError if there are fewer than `count` domains."""
        domain_T = self.trace.domain_T
        if domain_T is None or len(self.domains) < count:
            found = ", ".join(self.domains) or "none"
            raise TraceError(
                f"expected a trace with at least {count} domain(s), found: {found}; label texts "
                'with model.trace(text, domain="...") and join them with Trace.merge'
            )
        return domain_T

    def same_text(self, other: "Selections") -> bool:
        """Whether both traces are of the same tokens, so that they can be compared in pairs."""
        return np.array_equal(self.trace.ids_T, other.trace.ids_T) and np.array_equal(
            self.run_T, other.run_T
        )

    def same_model(self, other: Any) -> None:
        """TraceError unless `other` is of the same model."""
        if not isinstance(other, Selections):
            raise TraceError(
                f"expected a trace or its routing statistics, found {type(other).__name__}"
            )
        mine, theirs = self.trace.model, other.trace.model
        if mine.fingerprint != theirs.fingerprint or self.num_experts != other.num_experts:
            raise TraceError(
                f"expert numbers of two models mean different things: expected a trace of "
                f"{mine.name} ({mine.fingerprint}), found one of {theirs.name} "
                f"({theirs.fingerprint}); trace the other text with the same model"
            )


def hot(ids_TK: NDArray[np.integer], num_experts: int) -> NDArray[np.bool_]:
    """(T, E) True where a token selected an expert."""
    hot_TE = np.zeros((len(ids_TK), num_experts), bool)
    token, place = np.nonzero(ids_TK >= 0)
    hot_TE[token, ids_TK[token, place]] = True
    return hot_TE


def span(layers: tuple[int, ...]) -> str:
    """(1, 2, 3) -> '1..3'."""
    if not layers:
        return "none"
    together = layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]}..{layers[-1]}" if together else ", ".join(map(str, layers))
