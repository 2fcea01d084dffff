"""Tables and plots of notebook 02, from a trace's routing statistics. No widgets.

G domains.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ktlab import figures, html
from ktlab.interval import Interval

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.trace import Trace


def hot_set_frame(trace: "Trace", share: float = 0.25) -> "pd.DataFrame":
    """For every layer: what the hottest `share` of the experts covers, and the verdict."""
    import pandas as pd

    routing = trace.routing
    rows = [
        {
            "layer": layer,
            "held out": html.unbroken(hot.coverage),
            "in sample": html.unbroken(hot.in_sample),
            "best with hindsight": html.unbroken(hot.hindsight),
            "verdict": hot.verdict.split(":")[0],
        }
        for layer in routing.layers
        for hot in [routing.hot_set(layer, share)]
    ]
    return pd.DataFrame(rows).set_index("layer")


def coverage_GG(trace: "Trace", layer: int, share: float = 0.25) -> NDArray[np.float64]:
    """(G, G) held-out slots of domain j covered by the hottest experts of domain i.

    On the diagonal the set is chosen on one half of the domain and measured on the other.
    """
    return np.array([[found.value for found in row] for row in _coverage(trace, layer, share)])


def _coverage(trace: "Trace", layer: int, share: float) -> list[list[Interval]]:
    statistics = [trace.where(domain=name).routing for name in trace.domains]

    def covered(i: int, j: int) -> Interval:
        held_out = None if i == j else statistics[j]
        return statistics[i].hot_set(layer, share, held_out=held_out).coverage

    domains = range(len(statistics))
    return [[covered(i, j) for j in domains] for i in domains]


def _together(columns: Sequence[Sequence[Interval]]) -> str:
    """Mean over domains with its interval: what is measured on one domain's text errs together,
    different domains err on their own."""
    means = [np.mean([x.value for x in column]) for column in columns]
    halves = [np.mean([x.half_width for x in column]) for column in columns]
    half = float(np.sqrt(np.square(halves).sum())) / len(columns)
    value = float(np.mean(means))
    return str(Interval(value=100 * value, low=100 * (value - half), high=100 * (value + half)))


def coverage_plot(coverage: NDArray, domains: Sequence[str], *, title: str = "") -> "Figure":
    """`coverage_GG` as a map: rows chosen on, columns used on."""
    figure = figures.domain_heatmap(coverage, domains, title=title)
    figure.update_traces(
        x=list(domains),
        hovertemplate="chosen on %{y}, used on %{x}: %{z:.1%}<extra></extra>",
        colorbar_title_text="covered",
    )
    return figure.update_layout(xaxis_title_text="used on", yaxis_title_text="chosen on")


def hot_set_verdict(trace: "Trace", layer: int, share: float = 0.25) -> str:
    """Where a hot set was chosen, and how much of held-out text it covers: in words."""
    found = _coverage(trace, layer, share)
    home = [[row[i]] for i, row in enumerate(found)]
    away = [[row[j] for i, row in enumerate(found) if i != j] for j in range(len(found))]
    at_home = [trace.where(domain=d).routing.hot_set(layer, share) for d in trace.domains]
    hot = sum(h.verdict.startswith("a hot set") for h in at_home)
    mixed = trace.routing.hot_set(layer, share)
    lines = [
        f"layer {layer}, hottest {share:.0%} of the experts, share of held-out slots covered",
        f"  chosen on the same domain    {_together(home)} %",
        f"  chosen on all domains        {_together([[mixed.coverage]])} %",
        f"  chosen on another domain     {_together(away)} %",
        f"  if experts were used alike   {100 * mixed.uniform:.3g} %",
        f"within one domain: a hot set in {hot} of {len(at_home)} domains",
        f"for mixed text: {mixed.verdict}",
    ]
    return html.wrapped("\n".join(lines))


def likeness_frame(mine: "Trace", trace: "Trace", layer: int) -> "pd.DataFrame":
    """Divergence of a text's loads from each domain's, the most alike first."""
    import pandas as pd

    found = {
        name: mine.routing.divergence(trace.where(domain=name), layer) for name in trace.domains
    }
    rows = [
        {
            "domain": name,
            "divergence": html.unbroken(rate.interval),
            "by chance": f"{rate.chance:.3f}",
        }
        for name, rate in sorted(found.items(), key=lambda item: item[1].value)
    ]
    return pd.DataFrame(rows).set_index("domain")
