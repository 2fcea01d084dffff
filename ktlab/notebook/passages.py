"""Passages of several texts as one labelled trace. No widgets.

A passage starts on a new line somewhere in its text; passages are far enough apart to count as
different texts, so halves of them can be held out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ktlab.errors import ContextError
from ktlab.notebook.excerpts import excerpt

if TYPE_CHECKING:
    from ktlab.model.model import Model
    from ktlab.model.trace import Trace

CHARACTERS_PER_TOKEN = 8
"""Enough in every language here; what is too much is cut."""
NEEDED = ("layers.*.router.ids", "layers.*.router.weights")


def passages(text: str, count: int, characters: int) -> list[str]:
    """`count` excerpts spread evenly over `text`; fewer where it is too short for them."""
    count = max(1, min(count, len(text) // max(1, characters)))
    return [excerpt(text, characters, (i + 0.5) / count) for i in range(count)]


def trace_passages(
    model: "Model", texts: Mapping[str, str], *, count: int = 4, tokens: int = 256
) -> "Trace":
    """The routers' decisions on `count` passages of each text, labelled by its name."""
    if not texts:
        raise ContextError("no texts: expected a mapping such as ktlab.domain_texts()")
    traces = []
    for name, text in texts.items():
        for passage in passages(text, count, CHARACTERS_PER_TOKEN * tokens):
            ids = model.tokenizer.encode(passage)[:tokens]
            traces.append(model.trace(ids, names=NEEDED, domain=name))
    return traces[0].merge(*traces[1:])


def experts_touched(trace: "Trace", layer: int, tokens: int) -> float:
    """Mean number of different experts that `tokens` consecutive tokens of one text select."""
    ids_TK = trace.routing.ids(layer)
    starts = np.flatnonzero(np.r_[True, np.diff(trace.segment_T) != 0, True])
    counts = [
        len(np.unique(window[window >= 0]))
        for begin, end in zip(starts[:-1], starts[1:], strict=True)
        for start in range(begin, end - tokens + 1, tokens)
        for window in [ids_TK[start : start + tokens]]
    ]
    if not counts:
        raise ContextError(f"no text in the trace has {tokens} tokens; trace longer ones")
    return float(np.mean(counts))
