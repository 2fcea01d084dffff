"""Seconds of each stage of each layer: operations and bytes over ceilings, times few shares.

T tokens of the pass, S positions in the cache, E experts, K of them a token, H heads.
On the CPU reading and computing hide part of each other: they take the root of the sum of their
squares, between the larger of the two (all hidden) and their sum (nothing hidden).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.placement.engines import Efficiency, Engine
from ktlab.placement.machine import Machine
from ktlab.placement.placed import Placed
from ktlab.placement.placement import kind_of
from ktlab.placement.touched import Load, padded, touched
from ktlab.record import Record

CPU_LANE, GPU_LANE, LINK_LANE = "CPU", "GPU", "link"
BFLOAT16 = 2


@dataclass(frozen=True, kw_only=True)
class StageTime(Record):
    """One stage of one layer, or all its layers together (`layer` is None)."""

    layer: int | None
    stage: str
    lane: str
    seconds: float
    flop: float
    bytes: float
    """Read or moved."""
    bound: str
    """What it waits for most: "memory", "compute", "cache", "link", "launch"."""
    parts: Mapping[str, float]
    """{bound: seconds}; they add up."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is predicted: rows of a plan on a machine by an engine."""

    config: ModelConfig
    rows: Sequence[Placed]
    machine: Machine
    engine: Engine
    shares: Mapping[str, Efficiency]
    top_k: int
    loads: Mapping[int, Load]
    """{layer: share of choices of each expert}; layers that are missing are even."""

    def share(self, name: str) -> float:
        return self.shares[name].value

    def layers(self, phase: str) -> list[dict[str, list[Placed]]]:
        """{component: rows} of each layer: several where its experts are apart."""
        found: list[dict[str, list[Placed]]] = [{} for _ in range(self.config.num_layers)]
        for row in self.rows:
            layer = row.part.layer
            if layer is not None and layer < len(found) and phase in row.phases:
                found[layer].setdefault(row.part.component, []).append(row)
        return found

    def output(self, phase: str) -> list[Placed]:
        """The matrix that gives the logits, of the last token alone."""
        return [r for r in self.rows if r.part.component == "output" and phase in r.phases]

    @property
    def memory(self) -> float:
        """Bytes/s at which the cores read weights."""
        assert self.machine.bandwidth is not None
        if self.engine.numa == "one node":
            return self.one_node
        return self.share("gemv_share") * self.machine.bandwidth * self.machine.sockets

    @property
    def one_node(self) -> float:
        """Bytes/s of all cores from and to one node's memory, where activations of a prompt lie."""
        assert self.machine.bandwidth is not None
        across = self.share("cross_socket") if self.machine.sockets > 1 else 1.0
        return self.share("gemv_share") * self.machine.bandwidth * across

    @property
    def compute(self) -> float:
        """Operations/s of the many-token kernels on full tiles."""
        assert self.machine.processor is not None
        peak = self.machine.processor.peaks[self.engine.needs] * self.machine.sockets
        across = self.share("cross_socket") if self.machine.sockets > 1 else 1.0
        return self.share(self.engine.rate) * peak * across


def stage_times(
    case: Case, phase: str, tokens: int, context: int, room: int
) -> Iterator[StageTime]:
    """Every stage of a pass of T tokens onto S cached positions; `room` positions are allocated."""
    decode = phase == "decode"
    for index, rows in enumerate(case.layers(phase)):
        for component, placed in rows.items():
            for row in placed:
                if component == "experts" and _on_gpu(row):
                    yield _gpu_experts(case, index, row, tokens)
                elif component == "experts":
                    yield _experts(case, index, row, tokens)
                elif component == "cache":
                    yield _scores(case, index, row, tokens, context, room, decode)
                elif component in ("attention", "router", "shared", "dense"):
                    yield _matrices(case, index, component, row, tokens)
        yield _launch(case, index, decode)
        if case.engine.gpu and any(not _on_gpu(row) for row in rows.get("experts", ())):
            yield _link(case, index, tokens)
    for row in case.output(phase):
        yield _matrices(case, None, "output", row, 1)


def _on_gpu(row: Placed) -> bool:
    return kind_of(row.device) == "cuda"


def stage(
    layer: int | None, name: str, lane: str, *, flop: float, nbytes: float,
    parts: Mapping[str, float],
) -> StageTime:  # fmt: skip
    """A stage whose parts add up; its bound is the largest."""
    return StageTime(
        layer=layer, stage=name, lane=lane, seconds=sum(parts.values()), flop=flop, bytes=nbytes,
        bound=max(parts, key=lambda part: parts[part]), parts=dict(parts),
    )  # fmt: skip


def _matrices(case: Case, layer: int | None, name: str, row: Placed, tokens: int) -> StageTime:
    """Matrices that every token goes through."""
    flop = row.part.flop_per_token * tokens
    if not _on_gpu(row):
        reads = row.part.bytes * -(-tokens // case.engine.group)
        compute = flop / case.compute if tokens > 1 else 0.0
        parts = _beside(compute, reads / case.memory)
        return stage(layer, name, CPU_LANE, flop=flop, nbytes=reads, parts=parts)
    bound = _gpu_bound(case, flop, float(row.bytes))
    return stage(layer, name, GPU_LANE, flop=flop, nbytes=row.bytes, parts=bound)


def _experts(case: Case, layer: int, row: Placed, tokens: int) -> StageTime:
    """Routed experts: weights of the touched ones once a group, products of padded rows."""
    experts, k = case.config.num_experts, case.top_k
    load = case.loads.get(layer)
    here = experts * row.share
    each = (row.part.bytes if case.engine.experts is None else row.bytes) / here
    flop_each = 2.0 * row.part.parameters / here
    chosen = tokens * k * row.share
    flop = chosen * flop_each
    if tokens < max(case.engine.singly_below, 2):
        reads = chosen * each
        parts = {"memory": reads / case.memory}
        return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=reads, parts=parts)
    reads, products = 0.0, 0.0
    for start in range(0, tokens, case.engine.group):
        group = min(case.engine.group, tokens - start)
        reads += touched(group, experts, k, load) * row.share * each
        products += padded(group, experts, k, load, case.engine.pad) * row.share * flop_each
    memory = case.memory
    if case.machine.sockets > 1 and case.engine.numa == "split":
        memory *= case.share("cross_socket")  # threads take one another's tasks, and their weights
    rows_bytes = chosen * _row_bytes(case.config)
    parts = _beside(products / case.compute, reads / memory)
    parts["memory"] += rows_bytes / case.one_node
    moved = reads + rows_bytes
    return stage(layer, "experts", CPU_LANE, flop=flop, nbytes=moved, parts=parts)


def _gpu_experts(case: Case, layer: int, row: Placed, tokens: int) -> StageTime:
    """Experts that lie on the GPU: read once a pass, and computed there."""
    experts, k = case.config.num_experts, case.top_k
    each = row.bytes / (experts * row.share)
    reads = touched(tokens, experts, k, case.loads.get(layer)) * row.share * each
    flop = 2.0 * tokens * k * row.part.parameters / experts
    parts = _gpu_bound(case, flop, reads)
    return stage(layer, "experts on the GPU", GPU_LANE, flop=flop, nbytes=reads, parts=parts)


def _gpu_bound(case: Case, flop: float, nbytes: float) -> dict[str, float]:
    """The longer of reading and computing: a GPU does both at a time."""
    gpu = case.machine.gpus[0]
    memory = nbytes / (case.share("gpu_bytes_share") * gpu.bandwidth)
    compute = flop / (case.share("gpu_flop_share") * gpu.flop_per_s)
    return {"memory": memory} if memory > compute else {"compute": compute}


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


def _scores(
    case: Case, layer: int, row: Placed, tokens: int, context: int, room: int, decode: bool
) -> StageTime:
    """Queries against the cache, and the mixing of what it holds."""
    sizes = case.config.attention
    pairs = tokens * (context + tokens / 2)
    if not _on_gpu(row):
        form = "naive" if isinstance(sizes, MLASizes) else "grouped"
        nbytes = BFLOAT16 * sizes.cache_elements[form] * (context + tokens)
        flop = sizes.flop_per_pair[form] * pairs
        parts = _beside(0.0 if decode else flop / case.compute, nbytes / case.memory)
        return stage(layer, "scores", CPU_LANE, flop=flop, nbytes=nbytes, parts=parts)
    gpu = case.machine.gpus[0]
    compute = case.share("gpu_flop_share") * gpu.flop_per_s
    if case.engine.attention == "torch" and isinstance(sizes, MLASizes):
        # The whole buffer is multiplied, whatever part of it is filled (StaticCache).
        pairs = 1.0 * tokens * room
        flop = sizes.flop_per_pair["absorbed"] * pairs
        if decode:  # each head reads the latent again, out of the cache
            wide = 2 * sizes.kv_lora_rank + sizes.qk_rope_dim
            reads = BFLOAT16 * sizes.num_heads * wide * pairs
            parts = {"cache": reads / gpu.cache_bandwidth}
        else:
            reads = case.share("score_bytes") * sizes.num_heads * pairs
            parts = {"compute": flop / compute, "memory": reads / gpu.bandwidth}
        return stage(layer, "scores", GPU_LANE, flop=flop, nbytes=reads, parts=parts)
    if not decode:  # keys as wide as queries, values padded to them; half of the pairs are masked
        flop = 4.0 * sizes.num_heads * sizes.qk_dim * pairs
        parts = {"compute": flop / compute}
        return stage(layer, "scores", GPU_LANE, flop=flop, nbytes=0.0, parts=parts)
    form = "absorbed" if isinstance(sizes, MLASizes) else "grouped"
    flop = sizes.flop_per_pair[form] * pairs
    nbytes = BFLOAT16 * sizes.cache_elements[form] * (context + 1)
    busy = min(1.0, _blocks(case.config) / gpu.multiprocessors)
    parts = {"compute": flop / (compute * busy)}
    if (memory := nbytes / (case.share("gpu_bytes_share") * gpu.bandwidth)) > parts["compute"]:
        parts = {"memory": memory}
    return stage(layer, "scores", GPU_LANE, flop=flop, nbytes=nbytes, parts=parts)


def _blocks(config: ModelConfig) -> int:
    """Blocks of the decoding kernel: 16 heads each, and 4 parts of the cache (num_kv_splits in
    kvcache-ai/ktransformers, attention.py); fewer than the multiprocessors leave some idle."""
    return 4 * -(-config.num_heads // 16)


def _launch(case: Case, layer: int, decode: bool) -> StageTime:
    if not case.engine.gpu:
        seconds, lane = case.share("node_barrier_s"), CPU_LANE
    else:
        eager = 0.0 if decode else case.share("eager_layer_s")
        seconds, lane = case.share("layer_s") + eager, GPU_LANE
    return stage(layer, "launch", lane, flop=0, nbytes=0, parts={"launch": seconds})


def _link(case: Case, layer: int, tokens: int) -> StageTime:
    """Activations to the CPU and back; one token's are part of what a launch costs."""
    nbytes = 2.0 * BFLOAT16 * tokens * case.config.hidden_size
    seconds = nbytes / (case.share("link_share") * case.machine.links["pcie"])
    return stage(layer, "transfer", LINK_LANE, flop=0, nbytes=nbytes, parts={"link": seconds})
