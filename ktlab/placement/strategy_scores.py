"""Strategies scored on one trace: hit rates with intervals at a budget, and over all budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktlab import figures, html
from ktlab.errors import PlacementError
from ktlab.experts.caches import CacheReplay, replay
from ktlab.interval import Interval
from ktlab.placement.strategies import STRATEGIES, Strategy, check_count, get_strategy
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Score(Record):
    """One strategy at one budget."""

    strategy: str
    about: str
    hit_rate: Interval
    """Share of looked-up experts that were on the fast device."""
    loads_per_token: Interval
    """Experts that a token fetches over the link, or has computed on the slow device; with what a
    cache fetches ahead."""
    moves: bool
    needs_profile: bool


@dataclass(frozen=True, kw_only=True, repr=False)
class Scores(Record):
    """Strategies at one budget, best first."""

    rows: tuple[Score, ...]
    budget: int
    """Experts on the fast device, of all layers together."""
    experts: int
    """That there are."""
    model: str
    tokens: int
    """Scored tokens."""
    method: str

    def __getitem__(self, strategy: str) -> Score:
        """The row of a strategy."""
        for row in self.rows:
            if row.strategy == strategy:
                return row
        raise PlacementError(
            f"{strategy!r} was not scored; scored: {', '.join(row.strategy for row in self.rows)}"
        )

    def to_frame(self) -> "pd.DataFrame":
        """strategy, hit_rate, low, high, loads_per_token, loads_low, loads_high, moves,
        needs_profile, about."""
        import pandas as pd

        found = [
            {
                "strategy": row.strategy,
                "hit_rate": row.hit_rate.value,
                "low": row.hit_rate.low,
                "high": row.hit_rate.high,
                "loads_per_token": row.loads_per_token.value,
                "loads_low": row.loads_per_token.low,
                "loads_high": row.loads_per_token.high,
                "moves": row.moves,
                "needs_profile": row.needs_profile,
                "about": row.about,
            }
            for row in self.rows
        ]
        return pd.DataFrame(found).set_index("strategy")

    def plot(self) -> "Figure":
        """Hit rates with intervals, the best on top; dotted: experts picked blindly."""
        rates = [row.hit_rate for row in self.rows]
        return figures.rates_by_name(
            [row.strategy for row in self.rows],
            np.array([rate.value for rate in rates]),
            np.array([rate.low for rate in rates]),
            np.array([rate.high for rate in rates]),
            hollow=[row.moves for row in self.rows],
            kinds=("fixed", "moves experts"),
            chance=self.budget / self.experts,
            x="hit rate on held-out text",
            title=f"{self.budget:,} of {self.experts:,} experts near",
        )

    def _title(self) -> str:
        return f"{self.model}: {self.budget:,} of {self.experts:,} experts on the fast device"

    def _table(self) -> list[tuple[object, ...]]:
        return [
            (row.strategy, str(row.hit_rate), str(row.loads_per_token), row.about)
            for row in self.rows
        ]

    def __repr__(self) -> str:
        width = max((len(row.strategy) for row in self.rows), default=0)
        lines = [
            f"  {name:{width}}  {rate}  {loads} loads a token"
            for name, rate, loads, _ in self._table()
        ]
        note = f"  {self.tokens:,} tokens; {self.method}"
        return "\n".join([self._title(), *lines, note])

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        table = html.table(self._table(), ("strategy", "hit rate", "loads a token", "what it does"))
        note = html.Raw(f'<div class="s">{self.tokens:,} tokens; {html.text(self.method)}</div>')
        return html.mimebundle(repr(self), html.card(self._title(), table, note))


def curves(
    strategies: Sequence[str | Strategy] | None, trace: Any, *, profile: Any = None
) -> CacheReplay:
    """Hit rates over all budgets, `.plot()`, `.at(capacity)`; see `score` for the arguments."""
    chosen = [get_strategy(s) for s in (STRATEGIES if strategies is None else strategies)]
    return replay(trace, policies=chosen, profile=profile)


def score(
    strategies: Sequence[str | Strategy] | None,
    trace: Any,
    budget: int,
    *,
    profile: Any = None,
    replayed: CacheReplay | None = None,
) -> Scores:
    """Strategies (names or objects; None: all) on one trace, with room for `budget` experts.

    `budget` counts the experts of all layers and is rounded down to a whole number a layer. Learnt
    on one half of each domain's text and scored on the other; or, with `profile`, learnt there and
    scored on all of the trace. `replayed` is what `curves` gave for the same, if it is at hand.
    Raises PlacementError for an unknown strategy or an impossible budget, TraceError for a trace
    without routing and for a profile of another model or of the text that it would be scored on.
    """
    found = curves(strategies, trace, profile=profile) if replayed is None else replayed
    layers = len(found.by_layer)
    check_count("budget", budget, layers=layers, experts=found.num_experts, model=found.model)
    capacity = budget // layers
    named = {s.name: s for s in map(get_strategy, strategies or STRATEGIES)}
    rows = [
        Score(
            strategy=name,
            about=named[name].about,
            hit_rate=found.hit_rate(name, capacity),
            loads_per_token=found.loads_per_token(name, capacity),
            moves=named[name].moves,
            needs_profile=named[name].needs_profile,
        )
        for name in named
    ]
    return Scores(
        rows=tuple(sorted(rows, key=lambda row: -row.hit_rate.value)),
        budget=capacity * layers,
        experts=layers * found.num_experts,
        model=found.model,
        tokens=found.tokens,
        method=found.method,
    )
