"""What routing statistics return as arrays: histograms, pairs of experts, domains; with plots.

Letters: E experts, L layers, G domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktlab import figures
from ktlab.interval import Interval
from ktlab.routing.findings import Shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class Histogram(Shown):
    """How often each expert of one layer was selected; as an array it is `counts_E`."""

    layer: int
    counts_E: NDArray[np.int64]
    tokens: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.array(self.counts_E, dtype=dtype) if copy else np.asarray(self.counts_E, dtype)

    def __len__(self) -> int:
        return len(self.counts_E)

    def __getitem__(self, index: Any) -> Any:
        return self.counts_E[index]

    @property
    def load_E(self) -> NDArray[np.float64]:
        """Share of routed slots, sums to 1."""
        return self.counts_E / max(1, self.counts_E.sum())

    @property
    def relative_E(self) -> NDArray[np.float64]:
        """Load in multiples of the uniform load 1/E."""
        return self.load_E * len(self.counts_E)

    def plot(self, before: "Histogram | None" = None) -> "Figure":
        """Bars in multiples of the uniform load, over those of `before` if given."""
        return figures.router_histogram(
            self.relative_E,
            None if before is None else before.relative_E,
            title=f"layer {self.layer}, {self.tokens:,} tokens",
        )

    def _title(self) -> str:
        return f"layer {self.layer}: load per expert, {self.tokens:,} tokens"

    def _rows(self) -> Mapping[str, object]:
        top = np.argsort(-self.counts_E, kind="stable")[:5]
        return {
            "hottest": ", ".join(f"{e} (×{self.relative_E[e]:.2f} uniform)" for e in top),
            "unused": f"{int((self.counts_E == 0).sum())} of {len(self)} experts",
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Coactivation(Shown):
    """Tokens on which two experts were selected together; as an array it is `counts_EE`.

    The diagonal holds each expert's own tokens. `expected_EE` is what the loads alone explain
    (quasi-independence: a_i a_j off the diagonal with the observed row sums), so a lift of 1 means
    that the pair meets as often as its loads make it. Expert groups show as blocks.
    """

    layer: int
    counts_EE: NDArray[np.int64]
    expected_EE: NDArray[np.float64]
    tokens: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.array(self.counts_EE, dtype=dtype) if copy else np.asarray(self.counts_EE, dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.counts_EE[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.counts_EE.shape

    @property
    def lift_EE(self) -> NDArray[np.float64]:
        """Observed over expected; nan on the diagonal and where nothing was expected."""
        lift = np.full(self.counts_EE.shape, np.nan)
        np.divide(self.counts_EE, self.expected_EE, out=lift, where=self.expected_EE > 0)
        np.fill_diagonal(lift, np.nan)
        return lift

    def strongest(self, count: int = 5) -> list[tuple[int, int, float]]:
        """Pairs furthest above chance in standard errors: (expert, expert, lift)."""
        expected = np.triu(self.expected_EE, 1)
        z = np.where(expected > 0, (self.counts_EE - expected) / np.sqrt(expected + 1e-9), -np.inf)
        order = np.argsort(-z, axis=None, kind="stable")[:count]
        lift = self.lift_EE
        pairs = [divmod(int(k), len(expected)) for k in order]
        return [(i, j, float(lift[i, j])) for i, j in pairs if expected[i, j] > 0]

    def plot(self) -> "Figure":
        return figures.coactivation_heatmap(self.lift_EE, title=f"layer {self.layer}")

    def _title(self) -> str:
        return f"layer {self.layer}: experts selected together, {self.tokens:,} tokens"

    def _rows(self) -> Mapping[str, object]:
        strongest = (f"{i} and {j} (×{lift:.2f})" for i, j, lift in self.strongest())
        return {"furthest above what their loads explain": ", ".join(strongest)}


@dataclass(frozen=True, kw_only=True, repr=False)
class DomainDivergence(Shown):
    """Mean pairwise Jensen-Shannon divergence between the domains' loads, layer by layer."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    pairwise_LGG: NDArray[np.float64]
    mean_L: tuple[Interval, ...]
    chance_L: tuple[float, ...]
    """What the same blocks give when the domains' labels are shuffled over them."""
    within_L: tuple[float, ...]
    """Divergence between two halves of one domain's text, mean over the domains."""
    method: str = ""

    def plot(self) -> "Figure":
        value, low, high = (
            np.array([getattr(i, name) for i in self.mean_L]) for name in ("value", "low", "high")
        )
        return figures.divergence_by_layer(
            self.layers, value, low, high, self.chance_L, within=self.within_L
        )

    def _title(self) -> str:
        return f"divergence between {len(self.domains)} domains: {', '.join(self.domains)}"

    def _rows(self) -> Mapping[str, object]:
        rows: dict[str, object] = {}
        levels = zip(self.layers, self.mean_L, self.chance_L, self.within_L, strict=True)
        for layer, mean, chance, within in levels:
            rows[f"layer {layer}"] = (
                f"{mean}; labels shuffled {chance:.4f}, halves of one domain {within:.4f}"
            )
        return {**rows, "method": self.method}
