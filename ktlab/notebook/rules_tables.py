"""Tables of notebook 07: a preview in a narrow column, problems beside their lines, near experts.

Pure functions."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ktlab import html
from ktlab.errors import RuleError
from ktlab.kernels.seat import TorchSeat
from ktlab.measurement.pace import readable
from ktlab.model.place_room import needed_bytes
from ktlab.placement.placement import PLACEABLE
from ktlab.placement.rules import Preview, RuleSet
from ktlab.routing import intervals

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model
    from ktlab.placement import Placement

STAND_IN_BYTES = 400 << 20
"""What stands in for a device may take so much memory of the host."""
READ_S = 4.0
"""Spent on each bonus, half on what routers choose and half on the loss."""
_PLACE = re.compile(r"line (\d+), column (\d+): (.*)", re.S)


def preview_html(preview: Preview) -> str:
    """The rules one after the other, with what each does to which modules; places above."""
    return html.card("", preview.where_html(), preview.table_html())


def problems_html(error: RuleError, text: str) -> str:
    """Each problem under the line that it is in, with a mark at its column."""
    lines, shown = text.splitlines(), []
    for problem in str(error).split("\n  ") if "\n" in str(error) else [str(error)]:
        found = _PLACE.search(problem)
        if found is None:
            continue
        number, column, what = int(found[1]), int(found[2]), found[3].rstrip(";")
        line = lines[number - 1] if number <= len(lines) else ""
        code = f"{number:>4}  {line}\n{' ' * (5 + column)}^"
        shown.append(
            f'<pre style="margin:4px 0 0;overflow-x:auto">{escape(code)}</pre>'
            f'<div class="bad">{escape(what)}</div>'
        )
    if not shown:
        shown.append(f'<div class="bad">{escape(str(error))}</div>')
    count = "1 problem" if len(shown) == 1 else f"{len(shown)} problems"
    return html.card(count, html.Raw("".join(shown)))


def fitting(
    model: "Model", placement: "Placement", most_bytes: int = STAND_IN_BYTES
) -> "Placement":
    """As much of a placement as a stand-in has room for: all of it, or the first layers, the rest
    on the CPU."""
    seats = {w: TorchSeat(w, "cpu") for w in placement.devices if w.startswith("cuda:")}
    first = placement.model.layers
    while sum(needed_bytes(model, placement, seats).values()) > most_bytes:
        first -= 1
        for component in PLACEABLE:
            there = placement.model.layers_of(component)
            if later := [layer for layer in there if layer is None or layer >= first]:
                placement = placement.put(component, "cpu", layers=later)
    return placement


def near_frame(
    model: "Model",
    text: str,
    near: Sequence[int],
    rules: Callable[[float], RuleSet],
    bonuses: Sequence[float],
    *,
    max_tokens: int = 512,
) -> "pd.DataFrame":
    """A row for each bonus: share of slots that go to `near`, and what the text loses by it, with
    intervals over blocks of the text."""
    import pandas as pd

    from ktlab.measurement.quality import BaselineCache, measure_quality

    most = readable(model, READ_S, 2, max_tokens)
    ids = model.tokenizer.encode(text)[: most + 1]
    rows: list[Mapping[str, Any]] = []
    baseline = BaselineCache()
    for bonus in bonuses:
        change = {"rules": rules(bonus)} if bonus else {}
        with model.clone().override(**change) as changed:
            routing = changed.trace(ids[:256]).routing
            hot_TE = np.sum([routing.hot(layer) for layer in routing.layers], axis=0)
        slots = [hot_TE[:, list(near)].sum(1), hot_TE.sum(1)]
        share = intervals.ratio(*(intervals.sums(count_T, routing.unit_T) for count_T in slots))
        measured = measure_quality(model, ids, a={}, b=change, baseline=baseline)
        assert measured is not None  # nobody cancels it
        quality = measured[0]
        rows.append(
            {
                "bonus": bonus,
                "slots near": html.unbroken(share.mapped(lambda part: 100 * part, "%")),
                "KL divergence": "0" if quality.identical else html.unbroken(quality.kl_mean),
                "perplexity": "× 1"
                if quality.identical
                else html.unbroken(f"× {quality.perplexity_ratio}"),
            }
        )
    return pd.DataFrame(rows).set_index("bonus")
