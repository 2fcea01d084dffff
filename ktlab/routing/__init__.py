"""Which experts a token goes to: the router and its selection rules."""

from ktlab.routing.router import Router, Routing
from ktlab.routing.rules import CumulativeProbability, FixedK, RelativeThreshold, SelectionRule

__all__ = [
    "CumulativeProbability",
    "FixedK",
    "RelativeThreshold",
    "Router",
    "Routing",
    "SelectionRule",
]
