"""Expert kernels on one MoE layer of a real model's widths: speed beside the ceiling, and error.

Weights are synthetic (`synthetic`). Contenders take turns, round by round (A B C A B C ...), so
that what the machine does meanwhile falls on all of them alike; a round gives each the median of
some repeats, and the median of the rounds is reported. The ceiling is measured in between, in this
process and with the same threads.

T tokens, D hidden.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktlab import hardware, html
from ktlab.errors import SettingError
from ktlab.kernels import dispatch
from ktlab.kernels.request import Request
from ktlab.kernels.threads import default_threads
from ktlab.measurement.contenders import Contender, OwnKernel, PeerKernel
from ktlab.measurement.peers import client
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.rounds import LOADING, MOST_REPEATS, Progress, Rates, scatter, take_turns
from ktlab.measurement.synthetic import (
    Inputs,
    MoeShape,
    SyntheticExperts,
    check_seed,
    expert_bytes,
    formats_of,
    get_shape,
)
from ktlab.record import Record, unsaved

TOKENS = (1, 8, 32, 512)
ROUNDS = 7
MOST_TOKENS = 4096
SAMPLE_TOKENS = 4
"""So many tokens' outputs are held against float64."""
DEFAULT_BYTES = 1 << 30
"""Where no number of experts is named, as many as fit into so much."""


@dataclass(frozen=True, kw_only=True)
class KernelCase(Record):
    """One contender at one number of tokens."""

    shape: str
    experts: int
    """In memory."""
    top_k: int
    format: str
    layout: str
    backend: str
    isa: str
    tokens: int
    threads: int
    median_s: float
    spread: float
    """Distance of the quartiles of the rounds over their median."""
    gflops: float
    """A multiply and an add are two; gate, up and down of every selected expert."""
    gb_s: float
    """Bytes of the weights touched, each expert once, over the time (10^9 bytes/s)."""
    ceiling: str
    """What bounds this case, with its rate: the median over the same rounds."""
    ceiling_share: float
    """Least time that the ceiling allows over the median, 0..1."""
    relative_error: float
    """Norm of the difference to the float64 product of the dequantized weights, over its norm."""
    kernel: str
    reason: str
    samples_s: tuple[float, ...] = unsaved(())
    """Seconds of each round."""

    @property
    def min_s(self) -> float:
        """The best round."""
        return min(self.samples_s, default=self.median_s)

    def row(self) -> tuple[str, ...]:
        """For printing."""
        return (
            f"{self.tokens}",
            self.backend,
            self.isa,
            f"{self.format}, {self.layout}",
            f"{1e3 * self.median_s:,.4g} ms {scatter(self.spread, len(self.samples_s))}",
            f"{self.gflops:.4g}",
            f"{self.gb_s:.3g}",
            f"{100 * self.ceiling_share:.0f} % of {self.ceiling}",
            f"{100 * self.relative_error:.2g} %",
            self.kernel,
        )


HEADERS = (
    "tokens", "backend", "isa", "format, layout", "median", "GFLOP/s", "GB/s", "ceiling", "error",
    "kernel",
)  # fmt: skip
NARROW = 5
"""Columns of a terminal's table; the others stand in a line below, for which 80 are too few."""


@dataclass(frozen=True, kw_only=True)
class ExpertBench(Record):
    """All cases of one run."""

    cases: tuple[KernelCase, ...]
    skipped: dict[str, str]
    """Peers that could not take part: why."""
    rates: dict[str, float]
    """The ceilings by name: operations/s or bytes/s."""
    method: str
    provenance: Provenance

    def __str__(self) -> str:
        rows = [case.row() for case in self.cases]
        first = [HEADERS[:NARROW], *(row[:NARROW] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*first, strict=True)]
        head, *lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in first
        )
        more = (
            f"    {flops} GFLOP/s, {bytes} GB/s, {share}, the ceiling; error {error}; {kernel}"
            for flops, bytes, share, error, kernel in (row[NARROW:] for row in rows)
        )
        said = [head, *(line for pair in zip(lines, more, strict=True) for line in pair)]
        said += [f"without {name}: {why}" for name, why in self.skipped.items()]
        return html.wrapped("\n".join([*said, self.method]))

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        note = html.Raw(f'<div class="s">{html.text(self.method)}</div>')
        table = html.table([case.row() for case in self.cases], HEADERS)
        card = html.card("expert kernels", table, note, self.provenance.to_html())
        return html.mimebundle(str(self), card)


def bench_experts(
    shape: str = "deepseek-v3",
    *,
    experts: int | None = None,
    format: str = "q4_k_m",
    layout: str = "auto",
    backend: str = "auto",
    isa: str = "auto",
    tokens: Sequence[int] = TOKENS,
    threads: int | None = None,
    rounds: int = ROUNDS,
    peers: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExpertBench:
    """Measure one layer of routed experts.

    shape    "deepseek-v3", "deepseek-v2", "deepseek-v2-lite" or "HIDDENxWIDTHxEXPERTSxTOP_K"
    experts  kept in memory; None: what fits into 1 GB
    format   of the weights: one for all three matrices, or a mix such as "q4_k_m"
    layout, backend, isa, threads   as in `ExpertBank.use`
    peers    None: none; (): those that compute this format; or names such as "llama.cpp"
    seed     of weights, inputs and routing

    `SettingError` on anything unknown or impossible, before weights are made.
    """
    request = Request(backend=backend, isa=isa, layout=layout, threads=threads)
    threads = threads or default_threads()
    counts = _check_tokens(tokens)
    if rounds < 1:
        raise SettingError(f"rounds={rounds}: expected 1 or more")
    check_seed(seed)
    moe = get_shape(shape, experts)
    formats = formats_of(format, moe)
    if experts is None:
        fitting = int(DEFAULT_BYTES // expert_bytes(moe, formats))
        moe = get_shape(shape, max(moe.top_k, min(moe.experts, fitting)))
    dispatch.choose(request, formats)  # refuses now what is impossible
    methods = () if peers is None else client.choose(peers, formats)
    _check_memory(moe, formats, copies=2 + len(methods))
    if peers is not None and not methods:
        labels = ", ".join(m.label for m in client.METHODS)
        raise SettingError(f"format {format!r}: no peer computes it; name some of {labels}")
    for method in methods:
        client.python_of(method.peer)

    say = progress or (lambda text: None)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    say(f"weights: {moe.experts} experts of {moe.hidden} x {moe.width}, {format}")
    weights = SyntheticExperts(moe, formats, seed)
    inputs = {count: weights.inputs(count) for count in counts}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        own = OwnKernel(weights, inputs, format, request)
        contenders: list[Contender] = [own]
        if methods:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ktlab-bench-")))
            weights.save(folder, bfloat16=any(m.own_format for m in methods))
            for count in counts:
                inputs[count].save(folder)
        for method in methods:
            say(f"{method.label} prepares")
            try:
                peer = client.Peer(method, folder, threads=threads, isa=request.wanted_isa)
            except client.PeerError as error:
                skipped[method.label] = str(error)
                continue
            stack.callback(peer.close)
            contenders.append(PeerKernel(peer, folder, weights, format))
        rates = Rates(threads)
        cases: list[tuple[str, KernelCase]] = []
        for count in counts:
            found = take_turns(contenders, count, rounds, rates, skipped, say)
            exact_TD = weights.exact(inputs[count], min(count, SAMPLE_TOKENS))
            cases += [
                (c.label, _case(c, samples, moe, inputs[count], exact_TD, threads, rates))
                for c, samples in found
            ]
    return ExpertBench(
        # A peer that failed at some number of tokens is in none of the rows.
        cases=tuple(case for label, case in cases if label not in skipped),
        skipped=skipped,
        rates=dict(rates.best),
        method=(
            f"{rounds} rounds in turn, {threads} threads, median and quartiles; up to "
            f"{MOST_REPEATS} repeats a round after a warm-up; seed {seed}; load average before: "
            f"{load:.1f}"
            + "".join(
                f"; {name} {1e-9 * rate:,.0f} GFLOP/s"
                for name, rate in rates.best.items()
                if name.endswith(LOADING)
            )
        ),
        provenance=Provenance.collect(model=f"{moe.name} widths, synthetic weights", seed=seed),
    )


def _case(
    contender: Contender,
    samples_s: Sequence[float],
    shape: MoeShape,
    inputs: Inputs,
    exact_TD: NDArray[np.float64],
    threads: int,
    rates: Rates,
) -> KernelCase:
    tokens = len(inputs.hidden_TD)
    slots = tokens * shape.top_k
    operations = 2.0 * slots * shape.expert_weights
    nbytes = inputs.touched * contender.expert_bytes()
    middle = median(samples_s)
    low, high = np.quantile(samples_s, (0.25, 0.75))
    least_s, ceiling = rates.bound(nbytes, operations, contender.peak_isa, middle)
    found_TD = contender.output(tokens)[: len(exact_TD)].astype(np.float64)
    return KernelCase(
        shape=shape.name,
        experts=shape.experts,
        top_k=shape.top_k,
        format=contender.format,
        layout=contender.layout,
        backend=contender.backend,
        isa=contender.isa,
        tokens=tokens,
        threads=threads,
        median_s=middle,
        spread=float(high - low) / middle,
        gflops=operations / middle / 1e9,
        gb_s=nbytes / middle / 1e9,
        ceiling=ceiling,
        ceiling_share=least_s / middle,
        relative_error=float(np.linalg.norm(found_TD - exact_TD) / np.linalg.norm(exact_TD)),
        kernel=contender.kernel(slots / inputs.touched),
        reason=contender.reason(),
        samples_s=tuple(samples_s),
    )


def _check_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    counts = tuple(dict.fromkeys(tokens))
    wrong = [n for n in counts if isinstance(n, bool) or not 1 <= n <= MOST_TOKENS]
    if wrong or not counts:
        raise SettingError(f"tokens={list(tokens)}: expected whole numbers from 1 to {MOST_TOKENS}")
    return counts


def _check_memory(shape: MoeShape, formats: tuple[str, str, str], copies: int) -> None:
    """Refuse before anything is allocated: the weights, and a copy for each contender."""
    needed = copies * shape.experts * expert_bytes(shape, formats)
    available = hardware.memory().available
    if available is not None and needed > 0.8 * available:
        raise SettingError(
            f"{shape.experts} experts need about {html.byte_size(needed)} here ({copies} copies), "
            f"{html.byte_size(available)} are free; keep fewer: experts={shape.top_k} or more"
        )
