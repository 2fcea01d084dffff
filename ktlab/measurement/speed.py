"""Prefill and decode speed of several settings, measured in alternation, beside the ceiling.

One repeat runs every setting once, in order (A B A B ...), so that what the machine does meanwhile
falls on all of them alike; ratios are taken within a repeat and their median is reported. The
repeats are few and their distribution unknown: intervals are order statistics.
"""

import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ktlab import html
from ktlab.errors import ContextError, SettingError
from ktlab.interval import Interval
from ktlab.measurement import intervals
from ktlab.measurement.roofline import Bound, Ceilings, measure_machine
from ktlab.measurement.windows import Text, encoded, label
from ktlab.record import Record

if TYPE_CHECKING:
    from ktlab.model.model import Model


@dataclass(frozen=True, kw_only=True)
class Timing(Record):
    """One phase of one setting."""

    tokens: int
    samples_s: tuple[float, ...]
    """Seconds of each repeat, for all `tokens`."""
    tokens_per_s: Interval
    """Median over the repeats."""
    mad_s: float
    """Median absolute deviation of `samples_s` from their median."""
    bound: Bound
    """The share of this machine's ceiling, and what holds the rest."""

    @property
    def median_s(self) -> float:
        """Median of `samples_s`."""
        return median(self.samples_s)

    @classmethod
    def of(
        cls, samples_s: Sequence[float], tokens: int, ceilings: Ceilings, work: tuple[float, ...]
    ) -> "Timing":
        """From seconds; `work` is (FLOP, bytes moved, bytes they are taken from) of one sample."""
        middle = median(samples_s)
        flop, nbytes, working = work
        return cls(
            tokens=tokens,
            samples_s=tuple(samples_s),
            tokens_per_s=intervals.median([tokens / s for s in samples_s], unit="tokens/s"),
            mad_s=median(abs(s - middle) for s in samples_s),
            bound=ceilings.bound(flop=flop, nbytes=nbytes, working_bytes=working, seconds=middle),
        )


@dataclass(frozen=True, kw_only=True)
class Speed(Record):
    """One setting, and its ratio to the first one (above 1: faster)."""

    label: str
    prefill: Timing
    decode: Timing
    prefill_ratio: Interval
    decode_ratio: Interval


@dataclass(frozen=True, kw_only=True)
class SpeedComparison(Record):
    """Speeds by name; the first is the baseline of the ratios."""

    speeds: dict[str, Speed]
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    total_repeats: int
    ceilings: Ceilings
    method: str

    def __getitem__(self, name: str) -> Speed:
        return self.speeds[name]

    @property
    def done(self) -> bool:
        """Whether all repeats ran."""
        return self.repeats >= self.total_repeats

    def rows(self) -> list[tuple[str, ...]]:
        """One row a setting and phase, as text."""
        rows = []
        for name, speed in self.speeds.items():
            for phase in ("prefill", "decode"):
                timing, ratio = getattr(speed, phase), getattr(speed, f"{phase}_ratio")
                rows.append(
                    (
                        phase,
                        _named(name, speed.label),
                        str(timing.tokens_per_s),
                        "baseline" if ratio.low == ratio.high == 1 else f"×{ratio}",
                        f"{1e3 * timing.mad_s / timing.tokens:.3g} ms",
                        str(timing.bound),
                    )
                )
        return sorted(rows, key=lambda row: row[0] != "prefill")

    def __str__(self) -> str:
        heads = [row[:3] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*heads, strict=True)]
        lines = []
        for head, (*_, ratio, spread, bound) in zip(heads, self.rows(), strict=True):
            cells = (cell.ljust(width) for cell, width in zip(head, widths, strict=True))
            lines += [f"  {'  '.join(cells)}  {ratio}", f"    MAD {spread} a token; {bound}"]
        return html.wrapped("\n".join([f"Speed ({self.method})", *lines]))

    __repr__ = __str__

    def to_html(self) -> str:
        """A table; below it what settings with a name are, and the method."""
        headers = (
            "phase",
            "setting",
            "median",
            "against the first",
            "of the ceiling",
        )  # without the deviations of a token, for which a narrow page has no room
        meant = {_named(name, one.label): name for name, one in self.speeds.items()}
        rows = [
            (
                phase,
                meant[setting],
                median,
                "–" if ratio == "baseline" else ratio,
                bound.replace(" of the ceiling", ""),
            )
            for phase, setting, median, ratio, _, bound in self.rows()
        ]
        notes = [said for said, name in meant.items() if said != name] + [self.method]
        below = (html.Raw(f'<div class="s">{html.text(note)}</div>') for note in notes)
        return html.card("speed on this machine", html.table(rows, headers), *below)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


def measure_speed(
    model: "Model",
    settings: Mapping[str, Mapping[str, Any]],
    *,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    repeats: int = 6,
    cancel: threading.Event | None = None,
    text: Text | None = None,
    seed: int = 0,
) -> SpeedComparison | None:
    """The last of `stream_speed`; None if cancelled before one repeat was done."""
    results = stream_speed(
        model,
        settings,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        repeats=repeats,
        cancel=cancel,
        text=text,
        seed=seed,
    )
    return next(iter(deque(results, maxlen=1)), None)


def stream_speed(
    model: "Model",
    settings: Mapping[str, Mapping[str, Any]],
    *,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    repeats: int = 6,
    cancel: threading.Event | None = None,
    text: Text | None = None,
    seed: int = 0,
) -> Generator[SpeedComparison, None, None]:
    """Yield a complete comparison after every repeat.

    `settings`: overrides by name, at least one; the first is the baseline. All see the same
    tokens: `text` (repeated if short), or random ones from `seed`. A first round, not counted,
    warms up. By default 256 tokens of prompt and 32 of decoding, fewer in a short context. 6
    repeats are the fewest whose extremes are a 95 % interval of the median. `cancel` is looked at
    before each token.
    """
    context = model.config.context_length
    prompt_tokens = min(256, context * 3 // 4) if prompt_tokens is None else prompt_tokens
    decode_tokens = min(32, context // 4) if decode_tokens is None else decode_tokens
    _check(model, settings, prompt_tokens, decode_tokens, repeats)
    prompt_T, next_D = _tokens(model, prompt_tokens, decode_tokens, text, seed)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    with ExitStack() as stack:
        clones = {name: model.clone() for name in settings}
        for name, overrides in settings.items():
            stack.enter_context(clones[name].override(**overrides))
        for clone in clones.values():
            if _run(clone, prompt_T, next_D[:2], cancel) is None:
                return
        ceilings = measure_machine()
        work = {name: _work(clone, prompt_tokens, decode_tokens) for name, clone in clones.items()}
        for repeat in range(1, repeats + 1):
            for name, clone in clones.items():
                sample = _run(clone, prompt_T, next_D, cancel)
                if sample is None:
                    return
                samples[name].append(sample)
            yield SpeedComparison(
                speeds=_speeds(samples, settings, (prompt_tokens, decode_tokens), ceilings, work),
                prompt_tokens=prompt_tokens,
                decode_tokens=decode_tokens,
                repeats=repeat,
                total_repeats=repeats,
                ceilings=ceilings,
                method=(
                    f"{prompt_tokens} tokens of prompt, then {decode_tokens} one by one; {repeat} "
                    f"repeats in alternation after a warm-up; medians with order-statistic "
                    f"intervals; {torch.get_num_threads()} threads"
                ),
            )


def _speeds(
    samples: Mapping[str, list[tuple[float, float]]],
    settings: Mapping[str, Mapping[str, Any]],
    tokens: tuple[int, int],
    ceilings: Ceilings,
    work: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]],
) -> dict[str, Speed]:
    first = next(iter(samples.values()))
    speeds = {}
    for name, pairs in samples.items():
        timings, ratios = [], []
        for phase in (0, 1):
            seconds = [pair[phase] for pair in pairs]
            timings.append(Timing.of(seconds, tokens[phase], ceilings, work[name][phase]))
            paired = [a[phase] / b[phase] for a, b in zip(first, pairs, strict=True)]
            ratio = intervals.median(paired, no_change=1.0)
            ratios.append(intervals.exactly(ratio, 1.0) if pairs is first else ratio)
        speeds[name] = Speed(
            label=label(settings[name]),
            prefill=timings[0],
            decode=timings[1],
            prefill_ratio=ratios[0],
            decode_ratio=ratios[1],
        )
    return speeds


def _run(
    model: "Model", prompt_T: Tensor, next_D: Tensor, cancel: threading.Event | None
) -> tuple[float, float] | None:
    """(prefill seconds, decode seconds), or None if cancelled."""
    cache = model.new_cache(context=len(prompt_T) + len(next_D))
    if cancel is not None and cancel.is_set():
        return None
    start = perf_counter()
    model.forward(prompt_T, cache)
    prefilled = perf_counter()
    for token in next_D:
        if cancel is not None and cancel.is_set():
            return None
        model.forward(token[None], cache)
    return prefilled - start, perf_counter() - prefilled


def _work(
    model: "Model", prompt: int, decode: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(FLOP, bytes moved, bytes of the whole model) of one prefill and of one decode."""
    prefill, step = model.cost(prompt, prompt), model.cost(1, prompt + decode // 2)
    return (
        (prefill.flop, prefill.bytes, model.nbytes),
        (step.flop * decode, step.bytes * decode, model.nbytes),
    )


def _tokens(
    model: "Model", prompt: int, decode: int, text: Text | None, seed: int
) -> tuple[Tensor, Tensor]:
    total = prompt + decode
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        ids_T = torch.randint(model.config.vocab_size, (total,), generator=generator)
    else:
        ids_T = encoded(model, text)
        ids_T = ids_T.repeat(-(-total // len(ids_T)))[:total]
    return ids_T[:prompt], ids_T[prompt:]


def _named(name: str, settings: str) -> str:
    return settings if name == settings else f"{name}: {settings}"


def _check(
    model: "Model",
    settings: Mapping[str, Mapping[str, Any]],
    prompt: int,
    decode: int,
    repeats: int,
) -> None:
    if not settings:
        raise SettingError(
            "no settings to measure: expected overrides by name, such as "
            "{'a': {'top_k': 8}, 'b': {'top_k': 6}}"
        )
    if min(prompt, decode, repeats) < 1:
        raise SettingError(
            f"prompt_tokens = {prompt}, decode_tokens = {decode}, repeats = {repeats}: expected "
            "at least 1 of each"
        )
    if prompt + decode > model.config.context_length:
        raise ContextError(
            f"{prompt} tokens of prompt and {decode} of decoding do not fit the context of "
            f"{model.name}, {model.config.context_length}; ask for fewer"
        )
