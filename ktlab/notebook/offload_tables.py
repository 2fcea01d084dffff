"""Tables of notebook 03: what calls read, which static set serves whom, what a link allows."""

import math
from collections.abc import Sequence
from functools import partial
from operator import mul, truediv
from typing import TYPE_CHECKING

import numpy as np

from ktlab import html
from ktlab.interval import Interval
from ktlab.notebook.passages import experts_touched
from ktlab.placement.strategy_placement import intensities

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.experts.caches import CacheReplay
    from ktlab.model.model import Model
    from ktlab.model.trace import Trace

V3_LAYERS = 58
V3_EXPERT_BYTES = 3 * 7168 * 2048 * 4.5 / 8
"""One routed expert of DeepSeek-V3 (arXiv 2412.19437, 4.2) at 4.5 bits a weight."""


def touched_frame(
    model: "Model", trace: "Trace", layer: int, calls: Sequence[int]
) -> "pd.DataFrame":
    """For calls of so many consecutive tokens: experts read, their bytes, work per byte, each with
    its interval over the trace's texts; how many independent choices would read is arithmetic.

    Calls longer than every text of the trace are left out.
    """
    import pandas as pd

    bank, k = model.layers[layer].experts, model.config.top_k
    flop = 2 * sum(weight.size for weight in (bank.gate[0], bank.up[0], bank.down[0]))
    rows = []
    longest = int(np.bincount(trace.segment_T).max())
    for tokens in (n for n in calls if n <= longest):
        touched = experts_touched(trace, layer, tokens)
        alone = bank.num_experts * (1 - (1 - k / bank.num_experts) ** tokens)
        nbytes = touched.mapped(partial(mul, bank.expert_bytes))
        rows.append(
            {
                "tokens in a row": tokens,
                "experts read": html.unbroken(touched),
                "if independent": f"{alone:.1f}",
                "bytes": _byte_size(nbytes),
                "FLOP per byte": html.unbroken(nbytes.mapped(partial(truediv, tokens * k * flop))),
            }
        )
    return pd.DataFrame(rows).set_index("tokens in a row")


def static_set_frame(trace: "Trace", layer: int, share: float) -> "pd.DataFrame":
    """Hits of a static set on each domain, chosen on the same domain or on all the others."""
    import pandas as pd

    rows = []
    for name in trace.domains:
        own = trace.where(domain=name)
        others = trace.where(domain=set(trace.domains) - {name})
        here = own.routing.hot_set(layer, share)
        elsewhere = others.routing.hot_set(layer, share, held_out=own)
        rows.append(
            {
                "used on": name,
                "chosen on the same domain": html.unbroken(here.coverage),
                "chosen on all others": html.unbroken(elsewhere.coverage),
                "best with hindsight": html.unbroken(here.hindsight),
            }
        )
    return pd.DataFrame(rows).set_index("used on")


def intensity_frame(name: str, format: str) -> "pd.DataFrame":
    """What a token of decode does with each component of a published model, the most used first."""
    import pandas as pd

    rows = [
        {
            "component": component,
            "stored": html.unbroken(html.decimal_bytes(row["bytes"])),
            "work of a token": html.unbroken(html.quantity(row["flop"], "FLOP")),
            "FLOP per number stored": f"{row['use']:.3g}",
            "FLOP per byte read": f"{row['flop_per_byte']:.3g}",
        }
        for component, row in intensities(name, format=format).iterrows()
    ]
    return pd.DataFrame(rows).set_index("component")


def link_frame(
    model: "Model", caches: "CacheReplay", capacity: int, bytes_per_s: float
) -> "pd.DataFrame":
    """Bytes that a token's misses move, and the tokens per second that a link then allows, with
    intervals over the held-out text. An expert's bytes are counted.

    Once for this model, once for DeepSeek-V3's sizes with *this* model's hit rates.
    """
    import pandas as pd

    layers = len(model.moe_blocks)
    # Of all layers: a file mixes formats, so that their experts differ in size.
    mean_bytes = sum(block.experts.expert_bytes for block in model.moe_blocks) / layers
    sizes = {
        model.name: (mean_bytes, 1.0),
        "DeepSeek-V3's sizes": (V3_EXPERT_BYTES, V3_LAYERS * 8 / caches.requests_per_token),
    }
    assert layers == len(caches.by_layer)
    rows = []
    for name, (expert_bytes, scale) in sizes.items():
        for policy in caches.overall:
            loads = caches.loads_per_token(policy, capacity)
            moved = loads.mapped(partial(mul, scale * expert_bytes))
            most = moved.mapped(lambda n: bytes_per_s / n if n > 0 else math.inf)
            rows.append(
                {
                    "model": name,
                    "policy": policy,
                    "one expert": html.unbroken(html.byte_size(expert_bytes)),
                    "moved a token": _byte_size(moved),
                    "tokens/s at most": html.unbroken(most) if moved.value else "∞",
                }
            )
    return pd.DataFrame(rows).set_index(["model", "policy"])


def _byte_size(count: Interval) -> str:
    size, unit = html.byte_unit(count.value)
    return html.unbroken(count.mapped(lambda n: n / size, unit))
