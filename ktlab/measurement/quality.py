"""What a change of settings costs in quality, streamed with a narrowing interval.

Setting a is the baseline, b the change; both run over the same windows of the same text, and every
figure is of paired differences. KL divergence is KL(a || b) in nats, as llama.cpp's perplexity
tool has it.
"""

import threading
from collections.abc import Callable, Generator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ktlab.measurement.quality_result import Quality, summarize
from ktlab.measurement.tokens import BaselineCache, TokenComparison
from ktlab.measurement.windows import Text, evaluate, label

if TYPE_CHECKING:
    from ktlab.model.model import Model

__all__ = ["BaselineCache", "Quality", "measure_quality", "stream_quality", "summarize"]

INTERVALS = (
    "intervals by block jackknife with Student's quantile (ktlab.measurement.intervals); "
    "KL(a || b) in nats"
)


def stream_quality(
    model: "Model",
    text: Text | Mapping[str, Text],
    *,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    window: int = 256,
    max_tokens: int | None = None,
    cancel: threading.Event | None = None,
    baseline: BaselineCache | None = None,
    first: int = 64,
) -> Generator[Quality, None, None]:
    """Yield a complete `Quality` after a first small window and then after every window.

    `text`: a string, token ids (which spares encoding a long string each time), or several of
    them by name (domains: strata of the interval).
    `a` and `b`: what `model.override` takes, on top of the model's settings of this moment;
    `model` itself is not touched. Each window of `window` tokens is predicted from an empty cache,
    its first token seen as BOS; every token but the first is predicted once. `max_tokens`: tokens
    in all, shared evenly by the texts. `cancel` is looked at before every forward pass; what was
    yielded stays valid.
    `baseline`: keeps a's predictions, so that the next b on the same text is twice as fast.
    ContextError on a text under 2 tokens or a window beyond the model's context.
    """
    start = perf_counter()
    parts: dict[str, list[TokenComparison]] = {}
    windows = 0
    run = evaluate(
        model,
        text,
        a=a,
        b=b,
        window=window,
        max_tokens=max_tokens,
        cancel=cancel,
        baseline=baseline,
        first=first,
    )
    for step in run:
        parts.setdefault(step.text, []).append(step.tokens)
        windows += 1
        # Joined once, so that a long evaluation does not copy ever more pieces.
        parts = {name: [TokenComparison.join(pieces)] for name, pieces in parts.items()}
        joined = [pieces[0] for pieces in parts.values()]
        yield summarize(
            joined,
            identical=step.identical,
            total_tokens=step.total_tokens,
            windows=windows,
            label_a=label(a),
            label_b=label(b),
            seconds=perf_counter() - start,
            method=method(window, len(parts)),
        )


def measure_quality(
    model: "Model",
    text: Text | Mapping[str, Text],
    *,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    window: int = 256,
    max_tokens: int | None = None,
    cancel: threading.Event | None = None,
    baseline: BaselineCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Quality, dict[str, Quality]] | None:
    """All at once: the texts together, and each by its name. Options as in `stream_quality`.

    `progress(done, total)` is called after every window. A cancelled measurement returns what it
    has, None if that is nothing.
    """
    start = perf_counter()
    parts: dict[str, list[TokenComparison]] = {}
    done, step = 0, None
    for step in evaluate(
        model,
        text,
        a=a,
        b=b,
        window=window,
        max_tokens=max_tokens,
        cancel=cancel,
        baseline=baseline,
        first=window,
    ):
        parts.setdefault(step.text, []).append(step.tokens)
        done += len(step.tokens)
        if progress is not None:
            progress(done, step.total_tokens)
    if step is None:
        return None
    texts = {name: TokenComparison.join(pieces) for name, pieces in parts.items()}
    known: dict[str, Any] = {
        "identical": step.identical,
        "label_a": label(a),
        "label_b": label(b),
        "seconds": perf_counter() - start,
    }
    pooled = summarize(
        list(texts.values()),
        total_tokens=step.total_tokens,
        windows=sum(map(len, parts.values())),
        method=method(window, len(texts)),
        **known,
    )
    each = {
        name: summarize(
            [tokens],
            total_tokens=len(tokens),
            windows=len(parts[name]),
            method=method(window, 1),
            **known,
        )
        for name, tokens in texts.items()
    }
    return pooled, each


def method(window: int, texts: int) -> str:
    """How the figures came about, in words."""
    several = f", {texts} texts as strata" if texts > 1 else ""
    return (
        f"paired token by token, windows of {window} tokens, each behind BOS, cache empty"
        f"{several}; {INTERVALS}"
    )
