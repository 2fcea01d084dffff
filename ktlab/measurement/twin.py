"""The true-size twin: a small model's switches on one expert layer of a real model's widths.

A tiny model lives in the cache and its time goes to calls, so its clock says little. The twin is
one layer of routed experts with the widths of a real model, synthetic weights, and as many of its
experts as fit into a few hundred MB. Two settings take turns on it, and their ratio is paired round
by round.

T tokens, D hidden, E experts, K selected.
"""

import copy
import threading
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from ktlab import hardware, html
from ktlab.errors import KtlabError, SettingError
from ktlab.interval import Interval
from ktlab.kernels import dispatch
from ktlab.kernels.request import BLOCKS, PACKED, Request
from ktlab.measurement import intervals
from ktlab.measurement.bench import SAMPLE_TOKENS, KernelCase, _case
from ktlab.measurement.contenders import FLOAT_BYTES, OwnKernel
from ktlab.measurement.rounds import Progress, Rates, scatter, take_turns
from ktlab.measurement.synthetic import (
    MoeShape,
    SyntheticExperts,
    expert_bytes,
    formats_of,
    get_shape,
)
from ktlab.record import Record

PHASES = ("decode", "prefill")
ROUNDS = 6
"""The fewest whose extremes are a 95 % interval of the median."""
WEIGHT_BYTES = 400 << 20
"""As many experts as fit into so much are made, but never fewer than a token selects ..."""
LARGEST_BYTES = 840 << 20
"""... and nothing at all where those would need more than this: Binder has 2 GB in all."""
MOST_EXPERTS = 16
BUFFER_BYTES = 256 << 20
"""Reading is measured on a buffer of so much at the most."""
PREFILL_TOKENS = 256
PROBE_TOKENS = 16
PREFILL_S = 1.0
"""A prefill that would take longer than this is cut to fewer tokens: a call cannot be cancelled."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two settings: what of a model's settings a layer of experts can follow."""

    label: str
    top_k: int
    format: str
    request: Request = field(default_factory=Request)


@dataclass(frozen=True, kw_only=True)
class Twin(Record):
    """Two settings on one synthetic layer; phases that are not measured yet are missing."""

    shape: str
    hidden: int
    width: int
    experts: int
    """In memory, of `all_experts` that the real layer has."""
    all_experts: int
    trained_top_k: int
    a: dict[str, KernelCase]
    """The baseline by phase: "decode" is 1 token, "prefill" many."""
    b: dict[str, KernelCase]
    label_a: str
    label_b: str
    ratios: dict[str, Interval]
    """Speed of b over a's by phase, paired round by round; above 1: b is faster."""
    rounds: int
    threads: int
    weight_bytes: int
    build_s: float
    seconds: float
    done: bool

    @property
    def what(self) -> str:
        """What was measured, and what it is not."""
        return (
            f"synthetic weights, not the tiny model: one expert layer of {self.shape}'s widths "
            f"({self.hidden} x {self.width}), {self.experts} of its {self.all_experts} experts, "
            f"{html.byte_size(self.weight_bytes)}; no attention, no shared expert"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A row a phase and setting."""
        rows: list[tuple[str, ...]] = []
        for phase in (p for p in PHASES if p in self.ratios):
            for label, cases in ((self.label_a, self.a), (self.label_b, self.b)):
                case = cases[phase]
                ratio = self.ratios[phase]
                rows.append(
                    (
                        f"{phase}, {case.tokens} token{'s' * (case.tokens > 1)}",
                        label,
                        f"{1e3 * case.median_s:.3g} ms {scatter(case.spread, self.rounds)}",
                        "baseline" if cases is self.a else f"×{ratio}",
                        f"{case.gflops:,.0f} GFLOP/s, {case.gb_s:.3g} GB/s",
                        f"{100 * case.ceiling_share:.0f} % of {case.ceiling}",
                        f"{100 * case.relative_error:.2g} %",
                        f"{case.kernel}, {case.layout}",
                    )
                )
        return rows

    @property
    def method(self) -> str:
        return (
            f"{self.rounds} rounds in turn after a warm-up, {self.threads} threads; medians, "
            f"half the distance of the quartiles; built in {self.build_s:.1f} s"
        )

    def __str__(self) -> str:
        lines = ["  " + "  ".join(row) for row in self.rows()]
        return "\n".join([f"Twin ({self.what})", *lines, self.method])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers = ("phase", "setting", "median", "speed", "reached", "ceiling", "error", "kernel")
        notes = html.Raw(f'<div class="s">{html.text(self.what)}<br>{html.text(self.method)}</div>')
        card = html.card("true-size twin", html.table(self.rows(), headers), notes)
        return html.mimebundle(str(self), card)


class Cancelled(KtlabError):
    """The measurement is not wanted any more."""


def plan(shape: str, a: Side, b: Side) -> tuple[MoeShape, int]:
    """(the layer with as many experts as fit, bytes of all copies of its weights); instant.

    `SettingError` on anything unknown, impossible, or too large.
    """
    known = get_shape(shape)
    most = max(a.top_k, b.top_k)
    if not 1 <= min(a.top_k, b.top_k) <= most <= known.experts:
        raise SettingError(
            f"top_k = {a.top_k} and {b.top_k}: {known.name} has {known.experts} experts, expected "
            f"1 to {known.experts}"
        )
    copies: dict[tuple[tuple[str, str, str], str], int] = {}
    for side in (a, b):
        formats = formats_of(side.format, known)
        layout = dispatch.choose(side.request, formats).layout
        for kept in {BLOCKS, layout}:  # the blocks are where everything else is made from
            quantized = kept in (BLOCKS, PACKED)
            each = expert_bytes(known, formats) if quantized else FLOAT_BYTES * known.expert_weights
            copies[formats, kept] = each
    one = sum(copies.values())
    experts = min(known.experts, max(most, min(MOST_EXPERTS, WEIGHT_BYTES // one)))
    free = hardware.memory().available
    limit = LARGEST_BYTES if free is None else min(LARGEST_BYTES, free // 2)
    if experts * one > limit:
        raise SettingError(
            f"{experts} experts of {known.name} need {html.byte_size(experts * one)} under these "
            f"settings, more than {html.byte_size(limit)}; choose a narrower model "
            "(deepseek-v2-lite), a smaller format or another backend"
        )
    return replace(known, experts=experts), experts * one


def measure_twin(shape: str, a: Side, b: Side, **options: Any) -> Twin:
    """The last of `stream_twin`."""
    *_, last = stream_twin(shape, a, b, **options)
    return last


def stream_twin(
    shape: str,
    a: Side,
    b: Side,
    *,
    rounds: int = ROUNDS,
    prefill_tokens: int = PREFILL_TOKENS,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Generator[Twin, None, None]:
    """Measure two settings on a layer of `shape`'s widths; yields after each phase.

    `cancel` is looked at before every call of a kernel's round; then the generator just ends.
    `SettingError` as from `plan`.
    """
    start = perf_counter()
    moe, nbytes = plan(shape, a, b)

    def say(text: str) -> None:
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled")
        if progress is not None:
            progress(text)

    try:
        say(f"making {moe.experts} experts of {moe.hidden} x {moe.width}")
        layers = _layers(moe, a, b, seed)
        threads = layers[0].contender.chosen.threads
        # The first call packs; whatever nobody reads any more goes before the next is packed.
        for layer in layers:
            say(f"{layer.contender.label} packs and warms up")
            layer.contender.run(1, 1)
        _release(layers)
        build_s = perf_counter() - start
        rates = SmallRates(threads)
        cases: dict[str, dict[str, KernelCase]] = {"a": {}, "b": {}}
        ratios: dict[str, Interval] = {}
        for phase in PHASES:
            tokens = 1
            if phase == "prefill":
                say("how long does a prefill take?")
                tokens = _affordable(layers, prefill_tokens)
            for layer in layers:
                layer.ready(tokens)
            contenders = [layer.contender for layer in layers]
            found = take_turns(contenders, tokens, rounds, rates, {}, partial(_say, say, phase))
            samples = {contender.label: seconds for contender, seconds in found}
            for name, layer in zip("ab", layers, strict=True):
                cases[name][phase] = layer.case(tokens, samples[layer.contender.label], rates)
            paired = zip(*(samples[layer.contender.label] for layer in layers), strict=True)
            ratio = intervals.median([x / y for x, y in paired], no_change=1.0)
            ratios[phase] = intervals.exactly(ratio, 1.0) if a == b else ratio
            yield Twin(
                shape=moe.name,
                hidden=moe.hidden,
                width=moe.width,
                experts=moe.experts,
                all_experts=get_shape(shape).experts,
                trained_top_k=moe.top_k,
                a=dict(cases["a"]),
                b=dict(cases["b"]),
                label_a=a.label,
                label_b=b.label,
                ratios=dict(ratios),
                rounds=rounds,
                threads=threads,
                weight_bytes=nbytes,
                build_s=build_s,
                seconds=perf_counter() - start,
                done=phase == PHASES[-1],
            )
    except Cancelled:
        return


def _say(say: Progress, phase: str, text: str) -> None:
    say(f"{phase}, {text}".replace(", 1 tokens", ", 1 token"))


class SmallRates(Rates):
    """Ceilings from a buffer that leaves room for the weights."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._buffer_bytes = min(self._buffer_bytes, BUFFER_BYTES)


@dataclass(kw_only=True)
class _Layer:
    """One side's contender, with the weights that its exact outputs come from."""

    weights: SyntheticExperts
    """With this side's top_k."""
    contender: OwnKernel

    def ready(self, tokens: int) -> None:
        """Inputs for calls of so many tokens."""
        if tokens not in self.contender._inputs:
            found = self.weights.inputs(tokens)
            arrays = (found.hidden_TD, found.ids_VTK, found.weights_VTK)
            hidden_TD, ids_VTK, weights_VTK = map(torch.from_numpy, arrays)
            self.contender._inputs[tokens] = (hidden_TD, ids_VTK, weights_VTK)

    def case(self, tokens: int, samples_s: list[float], rates: Rates) -> KernelCase:
        """The samples beside the ceiling and the exact output."""
        inputs = self.weights.inputs(tokens)
        exact_TD = self.weights.exact(inputs, min(tokens, SAMPLE_TOKENS))
        shape = self.weights.shape
        return _case(self.contender, samples_s, shape, inputs, exact_TD, rates.threads, rates)


def _layers(moe: MoeShape, a: Side, b: Side, seed: int) -> list[_Layer]:
    """Both sides; where their formats are the same, on the same weights."""
    made: dict[tuple[str, str, str], tuple[SyntheticExperts, Any]] = {}
    layers = []
    for name, side in (("baseline", a), ("now", b)):
        formats = formats_of(side.format, moe)
        if formats not in made:
            made[formats] = (SyntheticExperts(moe, formats, seed), None)
        base, stacks = made[formats]
        weights = copy.copy(base)
        weights.shape = replace(moe, top_k=side.top_k)

        contender = OwnKernel(weights, {1: weights.inputs(1)}, side.format, side.request)
        contender.label = contender.group = name
        if stacks is None:
            made[formats] = (base, contender.bank.stacks)
        else:
            contender.bank.stacks = stacks
        layers.append(_Layer(weights=weights, contender=contender))
    return layers


def _release(layers: list[_Layer]) -> None:
    """Let go of blocks that every side has packed."""
    reads: dict[int, set[str]] = {}
    for layer in layers:
        for stack in layer.contender.bank.stacks:
            reads.setdefault(id(stack), set()).add(layer.contender.layout)
    for layer in layers:
        for stack in layer.contender.bank.stacks:
            if reads[id(stack)] == {PACKED}:
                layer.weights.weights.clear()  # shared by both sides of a format
                stack.release()


def _affordable(layers: list[_Layer], wanted: int) -> int:
    """Tokens of a prefill that takes about `PREFILL_S` at the most on the slower side."""
    tokens = min(wanted, PROBE_TOKENS)
    while tokens < wanted:
        for layer in layers:
            layer.ready(tokens)
        slowest = max(layer.contender.run(tokens, 1)[0] for layer in layers)
        if 2 * slowest > PREFILL_S:  # twice the tokens take less than twice the time
            break
        tokens = min(2 * tokens, wanted)
    return tokens
