"""Passages of several texts as one labelled trace. No widgets.

A passage starts on a new line somewhere in its text; passages are far enough apart to count as
different texts, so halves of them can be held out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ktlab.errors import ContextError
from ktlab.interval import Interval
from ktlab.measurement.pace import pace
from ktlab.notebook.excerpts import excerpt
from ktlab.progress import ProgressBar, duration
from ktlab.routing import intervals

if TYPE_CHECKING:
    from ktlab.model.model import Model
    from ktlab.model.trace import Trace

CHARACTERS_PER_TOKEN = 8
"""Enough in every language here; what is too much is cut."""
TRACE_S = 40.0
"""So long a cell may trace."""
SHORT, LEAST_TOKENS = 128, 64
"""Tokens of a passage below which there are rather fewer of them, and below which none is cut:
with less, statistics of a text mean nothing."""
NEEDED = ("layers.*.router.ids", "layers.*.router.weights")


def passages(text: str, count: int, characters: int) -> list[str]:
    """`count` excerpts spread evenly over `text`; fewer where it is too short for them."""
    count = max(1, min(count, len(text) // max(1, characters)))
    return [excerpt(text, characters, (i + 0.5) / count) for i in range(count)]


def trace_passages(
    model: "Model",
    texts: Mapping[str, str],
    *,
    count: int = 4,
    tokens: int = 256,
    seconds: float = TRACE_S,
) -> "Trace":
    """The routers' decisions on `count` passages of each text, labelled by its name.

    Where that would take longer than about `seconds`, passages are fewer and shorter, which a line
    says; `math.inf` traces them all.
    """
    if not texts:
        raise ContextError("no texts: expected a mapping such as ktlab.domain_texts()")
    tokens = min(tokens, model.config.context_length)
    asked = f"{count} passage{'s' if count > 1 else ''} of {tokens} tokens"
    whole, each = count * tokens, pace(model).read(seconds / len(texts), count * tokens, least=16)
    if each < whole:
        # Two are what can be held against each other; a short passage says little of its text.
        count = min(count, max(2, each // SHORT))
        tokens = min(tokens, max(LEAST_TOKENS, each // count))
        counted = f"each of {len(texts)} texts" if len(texts) > 1 else "the text"
        would = duration(whole * len(texts) * pace(model).pass_s / pace(model).tokens)
        print(
            f"{asked} from {counted} would take about {would} with this model: "
            f"{count} of {tokens} are traced. With seconds=math.inf it would be all."
        )
    bar = ProgressBar("tracing", shown=None if each < whole else False)
    traces = []
    for number, (name, text) in enumerate(texts.items()):
        bar(number, len(texts))
        for passage in passages(text, count, CHARACTERS_PER_TOKEN * tokens):
            ids = model.tokenizer.encode(passage)[:tokens]
            traces.append(model.trace(ids, names=NEEDED, domain=name))
    bar(len(texts), len(texts))
    return traces[0].merge(*traces[1:])


def experts_touched(trace: "Trace", layer: int, tokens: int) -> Interval:
    """Mean number of different experts that `tokens` consecutive tokens of one text select."""
    routing = trace.routing
    ids_TK = routing.ids(layer)
    starts = np.flatnonzero(np.r_[True, np.diff(trace.segment_T) != 0, True])
    windows = [
        start
        for begin, end in zip(starts[:-1], starts[1:], strict=True)
        for start in range(begin, end - tokens + 1, tokens)
    ]
    if not windows:
        raise ContextError(f"no text in the trace has {tokens} tokens; trace longer ones")
    found = [ids_TK[start : start + tokens] for start in windows]
    counts = [(len(np.unique(ids[ids >= 0])), 1) for ids in found]
    return intervals.bootstrap(
        intervals.sums(np.array(counts), routing.unit_T[windows]),
        lambda total_R2: total_R2[:, 0] / total_R2[:, 1],
    )
