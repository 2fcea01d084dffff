"""Seconds of each stage as ktlab itself computes them, on the CPU, from its own kernels' rates.

Where a machine was measured, those are its `kernels`; elsewhere they are shares of its ceilings, as
they were measured where the recorded speeds come from (`data/measurements/predicted_speeds.json`).
T tokens of the pass, S positions in the cache, E experts, K of them a token.
"""

from collections.abc import Iterator, Sequence
from math import log

import numpy as np

from ktlab.checkpoint.config import MLASizes
from ktlab.placement.case import CPU_LANE, Case, Pass, StageTime, on_gpu, stage
from ktlab.placement.machine import Kernel
from ktlab.placement.placed import Placed
from ktlab.placement.touched import touched

CHUNK = 512
"""Tokens of a prompt that pass at a time (`Model.forward`)."""
HALF_RATE_TOKENS = 3
"""Tokens an expert at which a kernel reaches half of its rate at many, on listed machines."""
EXPERTS, MATRIX, ATTENTION = "experts", "matrix", "attention"
VECTORS = ("avx512_vnni", "avx2")
"""Of those the first that a processor has."""


def own_stage(
    case: Case, layer: int | None, component: str, row: Placed, one: Pass
) -> StageTime | None:
    """A row that the CPU computes; None for what takes no time there, and for the cache, whose
    scores are in attention."""
    if component == "experts":
        assert layer is not None
        return _experts(case, layer, row, one.tokens)
    if component == "attention":
        return _attention(case, layer, row, one)
    if component in ("router", "shared", "dense", "output"):
        return _matrices(case, layer, component, row, 1 if component == "output" else one.tokens)
    return None


def own_glue(case: Case, one: Pass) -> Iterator[StageTime]:
    """What is no kernel: of each token of a prompt in each layer whose attention is on the CPU, or
    of one token of decode."""
    machine = case.machine
    if one.decode:
        token_s = case.share("own_token_s") if machine.token_s is None else machine.token_s
        yield _launch(None, token_s)
        return
    each = machine.prompt_layer_s
    each = case.share("own_prompt_layer_s") if each is None else each
    for layer, rows in enumerate(case.layers(one.phase)):
        if not any(on_gpu(row) for row in rows["attention"]):
            yield _launch(layer, one.tokens * each)


def _launch(layer: int | None, seconds: float) -> StageTime:
    return stage(layer, "launch", CPU_LANE, flop=0.0, nbytes=0.0, parts={"launch": seconds})


def _attention(case: Case, layer: int | None, row: Placed, one: Pass) -> StageTime:
    """Projections are matrices; what a prompt makes of the latent, and scores, is float32."""
    sizes, tokens, pairs = case.config.attention, one.tokens, one.pairs
    floats = _attention_floats(case)
    nbytes = float(row.part.bytes)
    latent = isinstance(sizes, MLASizes)
    if one.decode:
        scores = sizes.flop_per_pair["absorbed" if latent else "grouped"] * pairs
        flop = row.part.flop_per_token + scores
        parts = {"memory": nbytes / _bytes_rate(case, row), "compute": scores / floats}
        return stage(layer, "attention", CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)
    made = 0.0  # keys and values of all heads out of the latent
    if isinstance(sizes, MLASizes):
        made = 2.0 * sizes.kv_lora_rank * sizes.num_heads * (sizes.qk_nope_dim + sizes.v_dim)
    scores = made * tokens + sizes.flop_per_pair["naive" if latent else "grouped"] * pairs
    projections = (row.part.flop_per_token - made) * tokens
    weights = row.part.parameters
    seconds = projections / _rate(case, row, weights, min(tokens, CHUNK), MATRIX)
    parts = {"compute": seconds + scores / floats}
    flop = projections + scores
    return stage(layer, "attention", CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)


def _attention_floats(case: Case) -> float:
    """FLOP/s of what attention computes in float32."""
    for kernel in case.machine.kernels:
        if kernel.kind == ATTENTION:
            return kernel.operations_per_s
    assert case.machine.processor is not None
    peak = case.machine.processor.peaks["float32"] * case.machine.sockets
    return case.share("own_attention_share") * peak


def _matrices(case: Case, layer: int | None, name: str, row: Placed, tokens: int) -> StageTime:
    flop = row.part.flop_per_token * tokens
    nbytes = float(row.part.bytes)
    if tokens == 1 or name == "router":  # the gate is float32: small, and read like the rest
        parts = {"memory": nbytes / _bytes_rate(case, row)}
    else:
        parts = {
            "compute": flop / _rate(case, row, row.part.parameters, min(tokens, CHUNK), MATRIX)
        }
    return stage(layer, name, CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)


def _experts(case: Case, layer: int, row: Placed, tokens: int) -> StageTime:
    chances_E, here = case.chances(layer, row), case.experts_of(row)
    k = float(chances_E.sum())  # of a token's experts those that are here
    each, one = row.part.parameters / here, row.part.bytes / here
    if tokens == 1:
        flop = 2.0 * k * each
        parts = {"memory": flop / _rate(case, row, each, 1, EXPERTS)}
        return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=k * one, parts=parts)
    flop = seconds = nbytes = 0.0
    for start in range(0, tokens, CHUNK):
        chunk = min(CHUNK, tokens - start)
        if not (used := touched(chunk, chances_E)):
            break  # nobody chooses any of them
        nbytes += used * one
        work = 2.0 * chunk * k * each
        flop += work
        seconds += work / _rate(case, row, each, chunk * k / used, EXPERTS)
    parts = {"compute": seconds}
    return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)


def _bytes_rate(case: Case, row: Placed) -> float:
    """Bytes/s of a matrix' weights at one token."""
    kernels = _nearest(case.machine.kernels, row, row.part.parameters, MATRIX)
    if kernels:
        return kernels[0].bytes_per_s
    assert case.machine.bandwidth is not None
    return case.share("own_gemv_share") * case.machine.bandwidth * case.machine.sockets


def _rate(case: Case, row: Placed, weights: float, each: float, kind: str) -> float:
    """Operations/s where each matrix gets `each` tokens."""
    kernels = _nearest(case.machine.kernels, row, weights, kind)
    if kernels:
        x = [log(kernel.tokens) for kernel in kernels]
        y = [log(kernel.operations_per_s) for kernel in kernels]
        return float(np.exp(np.interp(log(max(each, 1.0)), x, y)))
    machine = case.machine
    assert machine.processor is not None
    peaks = machine.processor.peaks
    peak = next((peaks[isa] for isa in VECTORS if isa in peaks), peaks["float32"])
    many = case.share("own_vector_share") * peak * machine.sockets
    many *= each / (each + HALF_RATE_TOKENS)
    intensity = 2.0 * row.part.parameters / row.part.bytes
    return min(many, each * intensity * _bytes_rate(case, row))


def _nearest(kernels: Sequence[Kernel], row: Placed, weights: float, kind: str) -> list[Kernel]:
    """The measured kernels of the nearest bits and size, by rising numbers of tokens."""
    bits = 8.0 * row.part.bytes / max(row.part.parameters, 1)

    def distance(kernel: Kernel) -> float:
        return 2 * abs(log(kernel.bits / bits)) + abs(log(kernel.weights / weights)) / 4

    kernels = [kernel for kernel in kernels if kernel.kind == kind]
    if not kernels:
        return []
    best = min(kernels, key=distance)
    same = [k for k in kernels if (k.format, k.weights) == (best.format, best.weights)]
    return sorted(same, key=lambda kernel: kernel.tokens)
