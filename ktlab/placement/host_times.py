"""Seconds of what the published engines compute on the CPU: operations and bytes over ceilings.

Reading and computing hide part of each other: they take the root of the sum of their squares,
between the larger of the two (all hidden) and their sum (nothing hidden).
T tokens of the pass, S positions in the cache, E experts, K of them a token.
"""

from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.placement.case import CPU_LANE, Case, Pass, StageTime, stage
from ktlab.placement.gpu_times import BFLOAT16
from ktlab.placement.placed import Placed
from ktlab.placement.touched import padded, touched


def host_stage(
    case: Case, layer: int | None, component: str, row: Placed, one: Pass
) -> StageTime | None:
    """A row that the CPU computes; None for what takes no time there."""
    if component == "experts":
        assert layer is not None
        return _experts(case, layer, row, one.tokens)
    if component == "cache":
        return _scores(case, layer, one)
    if component in ("attention", "router", "shared", "dense", "output"):
        return _matrices(case, layer, component, row, 1 if component == "output" else one.tokens)
    return None


def _matrices(case: Case, layer: int | None, name: str, row: Placed, tokens: int) -> StageTime:
    """Matrices that every token goes through; only experts are copied or split among nodes."""
    flop = row.part.flop_per_token * tokens
    reads = row.part.bytes * -(-tokens // case.engine.group)
    compute = flop / case.compute if tokens > 1 else 0.0
    parts = _beside(compute, reads / case.one_node)
    return stage(layer, name, CPU_LANE, flop=flop, nbytes=reads, parts=parts)


def _experts(case: Case, layer: int, row: Placed, tokens: int) -> StageTime:
    """Routed experts: weights of the touched ones once a group, products of padded rows."""
    chances_E, here = case.chances(layer, row), case.experts_of(row)
    each = (row.part.bytes if case.engine.experts is None else row.bytes) / here
    flop_each = 2.0 * row.part.parameters / here
    chosen = tokens * float(chances_E.sum())
    flop = chosen * flop_each
    if tokens < max(case.engine.singly_below, 2):
        reads = chosen * each
        parts = {"memory": reads / case.memory}
        return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=reads, parts=parts)
    reads, products = 0.0, 0.0
    for start in range(0, tokens, case.engine.group):
        group = min(case.engine.group, tokens - start)
        reads += touched(group, chances_E) * each
        products += padded(group, chances_E, case.engine.pad) * flop_each
    memory = case.memory
    if case.machine.sockets > 1 and case.engine.numa == "split":
        memory *= case.share("cross_socket")  # threads take one another's tasks, and their weights
    rows_bytes = chosen * _row_bytes(case.config)
    parts = _beside(products / case.compute, reads / memory)
    parts["memory"] += rows_bytes / case.one_node
    moved = reads + rows_bytes
    return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=moved, parts=parts)


def _row_bytes(config: ModelConfig) -> float:
    """A token's rows at one expert, written once and read once: its input gathered for gate and for
    up as int8, both results and their product in float32, that as int8, the output in float32 (the
    m_local_ buffers of kvcache-ai/ktransformers, llamafile/moe.cpp)."""
    wide, inner = config.hidden_size, config.expert_size
    return 2.0 * (2 * wide + (2 + 1) * 4 * inner + inner + 4 * wide)


def _beside(compute: float, memory: float) -> dict[str, float]:
    """Seconds of computing and reading that hide part of each other, each by its weight."""
    squares = compute**2 + memory**2
    if not squares:
        return {"compute": 0.0, "memory": 0.0}
    return {"compute": compute**2 / squares**0.5, "memory": memory**2 / squares**0.5}


def _scores(case: Case, layer: int | None, one: Pass) -> StageTime:
    """Queries against the cache: llama.cpp keeps keys and values of all heads, KTransformers the
    latent wherever attention is."""
    sizes = case.config.attention
    form = "naive" if case.engine.attention == "cpu" else "absorbed"
    form = form if isinstance(sizes, MLASizes) else "grouped"
    nbytes = BFLOAT16 * sizes.cache_elements[form] * (one.context + one.tokens)
    flop = sizes.flop_per_pair[form] * one.pairs
    parts = _beside(0.0 if one.decode else flop / case.compute, nbytes / case.one_node)
    return stage(layer, "scores", CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)
