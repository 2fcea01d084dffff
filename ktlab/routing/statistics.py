"""Statistics of which experts a trace selected, layer by layer.

Letters: T tokens, K selected, E experts, L layers, G domains, B units of resampling (see
`ktlab.routing.intervals`), R resamples. An id of -1 marks a place that a rule left empty and counts
nowhere. Consecutive tokens never cross from one text (segment) to the next.
"""

from collections.abc import Mapping
from math import log, log2, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab import html
from ktlab.errors import TraceError
from ktlab.interval import Interval
from ktlab.routing import heldout, intervals
from ktlab.routing.divergence import domain_js, entropy_bits, js_bits, js_by_chance, js_interval
from ktlab.routing.findings import Entropy, HotSet, Predictability, Rate
from ktlab.routing.overlap import chance_overlap, quasi_independent
from ktlab.routing.patterns import Coactivation, DomainDivergence, Histogram
from ktlab.routing.selections import Selections, span


class RoutingStatistics(Selections):
    """Statistics over `trace`; every method takes the index of a layer that has a router."""

    def histogram(self, layer: int) -> Histogram:
        """How many tokens selected each expert: an array of counts (E,) with `.plot()`."""
        ids_TK = self.ids(layer)
        return Histogram(layer=layer, counts_E=self.counts(ids_TK), tokens=len(ids_TK))

    def load(self, layer: int) -> NDArray[np.float64]:
        """(E,) each expert's share of the routed slots; sums to 1, uniform is 1/E."""
        return self.histogram(layer).load_E

    def load_LE(self) -> NDArray[np.float64]:
        """(L, E) loads of all `layers`."""
        return np.stack([self.load(layer) for layer in self.layers])

    def domain_load(self, layer: int) -> dict[str, NDArray[np.float64]]:
        """Each domain's own load (E,)."""
        domain_T = self.need_domains(1)
        ids_TK = self.ids(layer)
        counts = {d: self.counts(ids_TK[domain_T == d]) for d in self.domains}
        return {d: counts_E / max(1, counts_E.sum()) for d, counts_E in counts.items()}

    def entropy(self, layer: int) -> Entropy:
        """Entropy of the load in bits, beside its maximum log2 E. Few tokens bias it low."""
        counts_BE = intervals.sums(self.hot(layer), self.unit_T)
        used, slots = (counts_BE.sum(0) > 0).sum(), counts_BE.sum()
        return Entropy(
            layer=layer,
            interval=intervals.bootstrap(
                counts_BE, entropy_bits, unit="bits", bounds=(0, log2(self.num_experts))
            ),
            maximum=log2(self.num_experts),
            small_sample_bias=float((used - 1) / (2 * slots * log(2))) if slots else nan,
            method=intervals.METHOD,
        )

    def hottest(self, layer: int) -> Interval:
        """Load of the layer's most loaded expert on this text, in multiples of uniform."""
        return intervals.bootstrap(
            intervals.sums(self.hot(layer), self.unit_T),
            lambda counts_RE: self.num_experts * counts_RE.max(1) / counts_RE.sum(1).clip(1),
            bounds=(1, self.num_experts),
        )

    def coactivation(self, layer: int) -> Coactivation:
        """Tokens on which two experts were selected together (E, E), beside what loads explain."""
        hot_TE = self.hot(layer).astype(np.float32)
        counts_EE = np.rint(hot_TE.T @ hot_TE).astype(np.int64)
        return Coactivation(
            layer=layer,
            counts_EE=counts_EE,
            expected_EE=quasi_independent(counts_EE),
            tokens=len(hot_TE),
        )

    def reuse(self, layer: int, *, lag: int = 1) -> Rate:
        """P(an expert selected at a token is selected again `lag` tokens later in the same text).

        Chance is the same for two tokens drawn independently from the whole trace, i.e. with the
        same load: sum_e c_e (c_e - 1) / ((T - 1) sum_e c_e). The reference "same text" draws the
        two tokens from one text in any order: what the topic explains without the order.
        """
        hot_TE, run_T = self.hot(layer), self.run_T
        together = run_T[lag:] == run_T[:-lag] if 0 < lag < len(run_T) else np.zeros(0, bool)
        if not together.any():
            longest = int(np.bincount(run_T).max())
            raise TraceError(
                f"reuse at lag {lag}: expected texts of more than {lag} token(s) and a lag of 1 or "
                f"more; the longest text in the trace has {longest}. Trace a longer text"
            )
        first_TE, unit_T = hot_TE[:-lag][together], self.unit_T[:-lag][together]
        again_T = (first_TE & hot_TE[lag:][together]).sum(1)
        text_TE = hot_TE[np.bincount(run_T)[run_T] > 1]
        text_T = run_T[np.bincount(run_T)[run_T] > 1]
        when = "at the next token" if lag == 1 else f"{lag} tokens on"
        return Rate(
            what=f"experts selected again {when}",
            layer=layer,
            interval=intervals.ratio(
                intervals.sums(again_T, unit_T), intervals.sums(first_TE.sum(1), unit_T)
            ),
            chance=chance_overlap(hot_TE, np.zeros(len(hot_TE), np.int64)),
            chance_is="two tokens drawn independently from this trace",
            references={"same text, any order": chance_overlap(text_TE, text_T)},
            method=intervals.METHOD,
        )

    def next_layer_predictability(
        self, layer: int, *, candidates: int | None = None
    ) -> Predictability:
        """Recall of the next layer's experts guessed from this layer's, on held-out text.

        Each expert j of the next layer is scored by its log-odds given the selected set S of this
        one, experts taken as independent given j (naive Bernoulli Bayes, add-one smoothing). The
        guess is the best `candidates` (default: as many as the token really selects); recall is the
        share of really selected experts among them. It bounds from below what can be predicted.
        Chance here is the static guess: always the most loaded experts of the training half.
        """
        following = self.following(layer)
        return heldout.predictability(
            self.hot(layer),
            self.hot(following),
            self.held_out_T(),
            self.unit_T,
            layer=layer,
            following=following,
            candidates=candidates,
        )

    def divergence(self, other: Any, layer: int) -> Rate:
        """Jensen-Shannon divergence in bits between this load and `other`'s (trace or statistics).

        0 is equal, 1 is disjoint. Chance is what two such samples give when both come from the same
        source: the units of both are pooled and dealt out anew, 200 times. Two traces of the same
        tokens (two settings) are compared in pairs: units are drawn together, and swapped.
        """
        other = getattr(other, "routing", other)
        self.same_model(other)
        a_BE, b_BE = (intervals.sums(s.hot(layer), s.unit_T) for s in (self, other))
        paired = self.same_text(other)
        value, low, high = js_interval(a_BE, b_BE, paired=paired)
        return Rate(
            what="Jensen-Shannon divergence between two traces",
            layer=layer,
            interval=Interval(
                value=value, low=low, high=high, n=min(len(a_BE), len(b_BE)), unit="bits"
            ),
            chance=js_by_chance(a_BE, b_BE, paired=paired),
            chance_is="blocks of both traces swapped at random"
            if paired
            else "blocks of both traces dealt out at random",
            method=intervals.METHOD,
        )

    def domain_divergence(self) -> DomainDivergence:
        """Mean pairwise Jensen-Shannon divergence between the domains' loads, for every layer.

        Beside it two levels to compare with: the same blocks with shuffled labels (sampling noise
        alone), and two halves of one domain's text (noise of half the tokens, and the difference
        between texts of one domain).
        """
        domain_T, held_T = self.need_domains(2), self.held_out_T()
        starts = np.flatnonzero(np.r_[True, self.unit_T[1:] != self.unit_T[:-1]])
        label_B = np.searchsorted(self.domains, domain_T[starts].astype(str))
        hot = {layer: self.hot(layer) for layer in self.layers}
        found = [domain_js(hot_TE, self.unit_T, label_B) for hot_TE in hot.values()]
        masks = [domain_T == d for d in self.domains if (domain_T == d).sum() > 1]
        within = [
            [js_bits(h[m & held_T].sum(0), h[m & ~held_T].sum(0)) for m in masks]
            for h in hot.values()
        ]
        return DomainDivergence(
            domains=self.domains,
            layers=self.layers,
            pairwise_LGG=np.stack([pairwise for pairwise, _, _ in found]),
            mean_L=tuple(mean for _, mean, _ in found),
            chance_L=tuple(chance for _, _, chance in found),
            within_L=tuple(float(np.mean(values)) if values else nan for values in within),
            method=f"{intervals.METHOD}, within each domain",
        )

    def hot_set(self, layer: int, share: float = 0.25, *, held_out: Any = None) -> HotSet:
        """Coverage of held-out slots by the hottest `share` of experts (at least one).

        Chosen on one half and measured on the other; with `held_out` (a trace or its statistics)
        chosen on all of this trace and measured on that one.
        """
        hot_TE = self.hot(layer)
        if held_out is None:
            held_T = self.held_out_T()
            return heldout.hot_set(
                hot_TE[~held_T],
                hot_TE[held_T],
                self.unit_T[~held_T],
                self.unit_T[held_T],
                layer=layer,
                share=share,
            )
        other = getattr(held_out, "routing", held_out)
        self.same_model(other)
        return heldout.hot_set(
            hot_TE,
            other.hot(layer),
            self.unit_T,
            other.unit_T,
            layer=layer,
            share=share,
            method="chosen on one trace, measured on another",
        )

    def summary(self) -> list[dict[str, float]]:
        """One row a layer, in numbers, with the ends of their intervals; reuse is nan where no two
        tokens follow one another. How many experts nobody chose is a count of this text."""
        rows: list[dict[str, float]] = []
        for layer in self.layers:
            histogram, reuse = self.histogram(layer), self._reuse_or_none(layer)
            entropy, hottest = self.entropy(layer).interval, self.hottest(layer)
            row: dict[str, float] = {
                "layer": layer,
                "entropy_bits": entropy.value,
                "entropy_low": entropy.low,
                "entropy_high": entropy.high,
                "entropy_maximum_bits": log2(self.num_experts),
                "hottest_relative_to_uniform": hottest.value,
                "hottest_low": hottest.low,
                "hottest_high": hottest.high,
                "unused_experts": int((histogram.counts_E == 0).sum()),
                "reuse": reuse.interval.value if reuse else nan,
                "reuse_low": reuse.interval.low if reuse else nan,
                "reuse_high": reuse.interval.high if reuse else nan,
                "reuse_chance": reuse.chance if reuse else nan,
            }
            rows.append(row)
        return rows

    def to_frame(self) -> Any:
        """`summary()` as a pandas DataFrame, layers as the index."""
        import pandas as pd

        return pd.DataFrame(self.summary()).set_index("layer")

    def __repr__(self) -> str:
        return (
            f"RoutingStatistics of {self.trace.model.name}: {len(self.run_T):,} tokens, layers "
            f"{span(self.layers)}, {self.num_experts} experts"
        )

    def _repr_mimebundle_(self, **_: object) -> Mapping[str, Any]:
        headers = (
            *("layer", f"entropy, of {log2(self.num_experts):.3g} bits", "hottest, × uniform"),
            *("unused", "reused at next token", "by chance"),
        )
        rows = [
            [
                int(row["layer"]),
                _measured(row, "entropy_bits", "entropy"),
                _measured(row, "hottest_relative_to_uniform", "hottest"),
                int(row["unused_experts"]),
                _measured(row, "reuse", "reuse"),
                f"{row['reuse_chance']:.3f}",
            ]
            for row in self.summary()
        ]
        return html.mimebundle(repr(self), html.card(repr(self), html.table(rows, headers)))

    def _reuse_or_none(self, layer: int) -> Rate | None:
        try:
            return self.reuse(layer)
        except TraceError:
            return None


def _measured(row: Mapping[str, float], value: str, ends: str) -> str:
    return str(Interval(value=row[value], low=row[f"{ends}_low"], high=row[f"{ends}_high"]))
