"""Seconds of what a GPU computes, of its launches, and of what passes over the link: for every
engine, with its own shares.

T tokens of the pass, S positions in the cache, E experts, K of them a token, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence

from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.placement.case import CPU_LANE, LINK_LANE, Case, Pass, StageTime, lane_of, on_gpu, stage
from ktlab.placement.placed import Placed
from ktlab.placement.touched import touched

BFLOAT16 = 2
FEED = ("router", "experts", "shared", "dense")
"""What takes the hidden numbers from attention and gives a sum back."""


def gpu_stage(
    case: Case, layer: int | None, component: str, row: Placed, one: Pass
) -> StageTime | None:
    """A row that a GPU computes; None for what takes no time there."""
    if component == "experts":
        assert layer is not None
        return _experts(case, layer, row, one)
    if component == "cache":
        return _scores(case, layer, row, one)
    if component in ("attention", "router", "shared", "dense", "output"):
        tokens = 1 if component == "output" else one.tokens
        parts = _bound(case, row, row.part.flop_per_token * tokens, float(row.bytes))
        return stage(
            layer, component, lane_of(row.device), flop=row.part.flop_per_token * tokens,
            nbytes=row.bytes, parts=parts,
        )  # fmt: skip
    return None


def _experts(case: Case, layer: int, row: Placed, one: Pass) -> StageTime:
    """Read once a pass, and computed there."""
    chances_E = case.chances(layer, row)
    each = row.bytes / case.experts_of(row)
    reads = touched(one.tokens, chances_E) * each
    flop = 2.0 * one.tokens * chances_E.sum() * row.part.parameters / case.experts_of(row)
    return stage(
        layer, "experts on the GPU", lane_of(row.device), flop=flop, nbytes=reads,
        parts=_bound(case, row, flop, reads),
    )  # fmt: skip


def _bound(case: Case, row: Placed, flop: float, nbytes: float) -> dict[str, float]:
    """The longer of reading and computing: a GPU does both at a time."""
    gpu = case.gpu(row.device)
    memory = nbytes / (case.share("gpu_bytes_share") * gpu.bandwidth)
    compute = flop / (case.share("gpu_flop_share") * gpu.flop_per_s)
    return {"memory": memory} if memory > compute else {"compute": compute}


def _scores(case: Case, layer: int | None, row: Placed, one: Pass) -> StageTime:
    """Queries against the cache, and the mixing of what it holds."""
    sizes, gpu, lane = case.config.attention, case.gpu(row.device), lane_of(row.device)
    compute = case.share("gpu_flop_share") * gpu.flop_per_s
    if case.engine.attention == "torch" and isinstance(sizes, MLASizes):
        # The whole buffer is multiplied, whatever part of it is filled (StaticCache).
        pairs = 1.0 * one.tokens * one.room
        flop = sizes.flop_per_pair["absorbed"] * pairs
        if one.decode:  # each head reads the latent again, out of the cache
            wide = 2 * sizes.kv_lora_rank + sizes.qk_rope_dim
            reads = BFLOAT16 * sizes.num_heads * wide * pairs
            parts = {"cache": reads / gpu.cache_bandwidth}
        else:
            reads = case.share("score_bytes") * sizes.num_heads * pairs
            parts = {"compute": flop / compute, "memory": reads / gpu.bandwidth}
        return stage(layer, "scores", lane, flop=flop, nbytes=reads, parts=parts)
    if not one.decode:  # keys as wide as queries, values padded to them; half of the pairs masked
        flop = 4.0 * sizes.num_heads * sizes.qk_dim * one.pairs
        if case.engine.attention == "float32":  # and makes keys and values of the latent so, too
            compute *= gpu.float32_flop_per_s / gpu.flop_per_s
            flop += one.tokens * (sizes.flop_decompressing if isinstance(sizes, MLASizes) else 0)
        parts = {"compute": flop / compute}
        return stage(layer, "scores", lane, flop=flop, nbytes=0.0, parts=parts)
    form = "absorbed" if isinstance(sizes, MLASizes) else "grouped"
    flop = sizes.flop_per_pair[form] * one.pairs
    nbytes = BFLOAT16 * sizes.cache_elements[form] * (one.context + 1)
    busy = min(1.0, _blocks(case.config) / gpu.multiprocessors)
    parts = {"compute": flop / (compute * busy)}
    if (memory := nbytes / (case.share("gpu_bytes_share") * gpu.bandwidth)) > parts["compute"]:
        parts = {"memory": memory}
    return stage(layer, "scores", lane, flop=flop, nbytes=nbytes, parts=parts)


def _blocks(config: ModelConfig) -> int:
    """Blocks of the decoding kernel: 16 heads each, and 4 parts of the cache (num_kv_splits in
    kvcache-ai/ktransformers, attention.py); fewer than the multiprocessors leave some idle."""
    return 4 * -(-config.num_heads // 16)


def launch(
    case: Case, layer: int, rows: Mapping[str, Sequence[Placed]], one: Pass
) -> StageTime | None:
    """What a layer costs beside its work: launches where a GPU takes part."""
    there = [row for placed in rows.values() for row in placed if on_gpu(row)]
    names = case.engine.launch[one.phase] if there else case.engine.barrier
    if not names:
        return None
    lane = lane_of(there[0].device) if there else CPU_LANE
    parts = {"launch": sum(case.share(name) for name in names)}
    return stage(layer, "launch", lane, flop=0, nbytes=0, parts=parts)


def crossings(case: Case, one: Pass) -> Iterator[StageTime]:
    """Hidden numbers over the link: from layer to layer where attention moves, and within a layer
    to what is computed elsewhere and back. The last are of the output, in no layer."""
    before = next((row.device for row in case.outside("embedding", one.phase)), "cpu")
    for layer, rows in enumerate(case.layers(one.phase)):
        home = rows["attention"][0].device
        if lane_of(home) != lane_of(before):
            yield _moved(case, layer, "handover", one.tokens)
        feed = [row for name in FEED for row in rows.get(name, ())]
        if any(lane_of(row.device) != lane_of(home) for row in feed):
            yield _moved(case, layer, "transfer", 2 * one.tokens)
        before = home
    for row in case.outside("output", one.phase):
        if lane_of(row.device) != lane_of(before):
            yield _moved(case, None, "handover", 1)


def _moved(case: Case, layer: int | None, name: str, rows: int) -> StageTime:
    nbytes = float(case.engine.hidden_bytes) * rows * case.config.hidden_size
    seconds = nbytes / (case.share(case.engine.link) * case.machine.links["pcie"])
    return stage(layer, name, LINK_LANE, flop=0, nbytes=nbytes, parts={"link": seconds})
