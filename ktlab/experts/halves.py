"""What a cache policy or a placement may learn from, and the text that it is scored on.

Letters: T tokens, K selected, E experts, P foreseen, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError, short
from ktlab.routing.heldout import log_odds
from ktlab.routing.selections import Selections, hot

Ids = Mapping[int, NDArray[np.int64]]


def routing_of(trace: Any, what: str = "trace") -> Any:
    """The statistics of a trace, or what is given if it is such; `what` names it in messages.

    TraceError for anything else, a path among it, and for a trace that recorded no routing.
    """
    statistics = getattr(trace, "routing", trace)
    if not isinstance(statistics, Selections):
        said = f"the {what} is a {type(trace).__name__}; expected a trace of the routers' choices: "
        said += "model.trace(text)"
        if isinstance(trace, (str, PathLike)):
            said += f", or ktlab.Trace.load({short(fspath(trace))}) if it was saved there"
        raise TraceError(said)
    if not statistics.layers:
        raise TraceError(
            f"the {what} of {statistics.trace.model.name} recorded no routing; record it with "
            'model.trace(text), or with "layers.*.router.*" among its names='
        )
    return statistics


@dataclass(frozen=True, kw_only=True, eq=False)
class Halves:
    """Selected experts (T, K) by layer, -1 where a place is empty: a profile, and held-out text."""

    profile: Ids
    scored: Ids
    unit_T: NDArray[np.int64]
    """Unit of resampling of each scored token."""
    num_experts: int
    method: str
    _foreseen: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, trace: Any, *, layers: Sequence[int] | None = None, profile: Any = None
    ) -> "Halves":
        """The halves of each domain's text of a trace (or its statistics); or all of it, with
        `profile` for what may be learnt from. TraceError for a profile of another model, of the
        same text, or without the layers that are scored."""
        statistics = routing_of(trace)
        wanted = tuple(statistics.layers if layers is None else layers)
        scored = {layer: statistics.ids(layer) for layer in wanted}
        if profile is None:
            held_T = statistics.held_out_T()
            return cls(
                profile={layer: ids_TK[~held_T] for layer, ids_TK in scored.items()},
                scored={layer: ids_TK[held_T] for layer, ids_TK in scored.items()},
                unit_T=statistics.unit_T[held_T],
                num_experts=statistics.num_experts,
                method="learnt on one half of each domain's text, scored on the other",
            )
        learnt = routing_of(profile, "profile")
        statistics.same_model(learnt)
        missing = [layer for layer in wanted if layer not in learnt.layers]
        if missing:
            raise TraceError(
                f"the profile has no router of layers {missing}, which are to be scored; it has "
                f"layers {list(learnt.layers)}"
            )
        if statistics.same_text(learnt):
            raise TraceError(
                "the profile is the text that it would be scored on; give another text, or none "
                "(then one half is learnt from and the other scored)"
            )
        return cls(
            profile={layer: learnt.ids(layer) for layer in wanted},
            scored=scored,
            unit_T=statistics.unit_T,
            num_experts=statistics.num_experts,
            method="learnt on the profile, scored on another text",
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.scored)

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return len(self.unit_T)

    def foreseen(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(T, P) experts of a layer guessed from those that the layer before selected at the same
        token, best first, for the profile's and for the scored tokens; P is K. (T, 0) in the first.

        Learnt on the profile, as `RoutingStatistics.next_layer_predictability` says.
        """
        if layer not in self._foreseen:
            self._foreseen[layer] = self._foresee(layer)
        return self._foreseen[layer]

    def _foresee(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        at, learnt = self.layers.index(layer), len(self.profile[layer])
        if not at:
            return np.full((learnt, 0), -1), np.full((self.tokens, 0), -1)
        before = self.layers[at - 1]
        seen_TE, known_TE, wanted_TE = (
            hot(ids_TK, self.num_experts)
            for ids_TK in (self.profile[before], self.scored[before], self.profile[layer])
        )
        score_TE = log_odds(seen_TE, wanted_TE, np.concatenate([seen_TE, known_TE]))
        count = self.scored[layer].shape[1]
        guess_TP = np.argsort(-score_TE, axis=1, kind="stable")[:, :count]
        return guess_TP[:learnt], guess_TP[learnt:]

    @cached_property
    def together(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(T * L, K) lookups of all layers in the order in which a token meets them, the profile's
        and the scored ones; expert e of the l-th layer is l * E + e."""
        return self._flat(self.profile), self._flat(self.scored)

    def _flat(self, ids: Ids) -> NDArray[np.int64]:
        width = max(ids_TK.shape[1] for ids_TK in ids.values())
        rows = [
            np.pad(
                np.where(ids_TK >= 0, ids_TK + l * self.num_experts, -1),
                ((0, 0), (0, width - ids_TK.shape[1])),
                constant_values=-1,
            )
            for l, ids_TK in enumerate(ids.values())  # noqa: E741
        ]
        return np.stack(rows, axis=1).reshape(-1, width).astype(np.int64)
