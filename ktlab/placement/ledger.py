"""Every byte that a model takes of a device, and the largest context that fits.

T tokens of a call, S positions of the context, D hidden, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.html import decimal_bytes
from ktlab.placement.machine import CPU, GPU, Device
from ktlab.placement.placed import Placed
from ktlab.record import Record

ELEMENT_BYTES = {CPU: 4, GPU: 2}
"""Of activations and cache: float32 on the CPU, bfloat16 on a GPU."""
CACHE_FORMATS = {CPU: "f32", GPU: "bf16"}
RUNTIME_BYTES = {CPU: 300_000_000, GPU: 500_000_000}
"""What is there before any weight. Python, torch and the kernels: a process showed a peak of 297 MB
after two tokens of the embedded model. CUDA's context and its libraries' work space: what is usual,
not measured by us."""
KINDS = ("weights", "converted", "copies", "cache", "activations", "runtime")


@dataclass(frozen=True, kw_only=True)
class Ledger(Record):
    """Bytes on one device, by what they are for."""

    device: str
    capacity: int | None
    weights: int
    """Used as they lie in the file: mapped, so the system may drop and read them again."""
    converted: int
    """Made while loading: another format, or a copy for another memory."""
    copies: int
    """The same experts once more for each further NUMA node."""
    cache: int
    activations: int
    runtime: int
    largest_context: int | None
    """The longest context that fits; 0: not even the shortest; None: no limit was given."""

    @property
    def needed(self) -> int:
        """All of it."""
        return sum(int(getattr(self, kind)) for kind in KINDS)

    @property
    def headroom(self) -> int | None:
        """What is left; negative: what is missing."""
        return None if self.capacity is None else self.capacity - self.needed

    @property
    def fits(self) -> bool | None:
        """None where nobody said how large the memory is."""
        return None if self.headroom is None else self.headroom >= 0

    @property
    def by_kind(self) -> dict[str, int]:
        """{kind: bytes}, without what is nothing."""
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}

    @property
    def verdict(self) -> str:
        """One line."""
        needs = f"{self.device} needs {decimal_bytes(self.needed)}"
        if self.capacity is None or self.headroom is None:
            return f"{needs}; no limit given"
        of = f"{needs} of {decimal_bytes(self.capacity)}"
        longest = f"the largest context that fits is {self.largest_context:,} tokens"
        if self.headroom >= 0:
            return f"fits: {of}, {decimal_bytes(self.headroom)} are left; {longest}"
        if self.largest_context:
            return f"does not fit: {of}, {decimal_bytes(-self.headroom)} too much; {longest}"
        return f"does not fit: {of}, {decimal_bytes(-self.headroom)} too much at any context"


def ledger(
    config: ModelConfig,
    device: Device,
    placed: Sequence[Placed],
    *,
    form: str,
    context: int,
    chunk: int,
    copies: int,
    caches_here: bool,
    computes_here: bool,
) -> Ledger:
    """The bytes of one device. `copies` of the experts exist in host memory, one a NUMA node."""
    here = [p for p in placed if p.device == device.name]
    experts = sum(p.bytes for p in here if p.part.component == "experts")
    fixed = {
        "weights": sum(p.in_place for p in here),
        "converted": sum(p.converted for p in here),
        "copies": (copies - 1) * experts if device.name == CPU else 0,
        "runtime": RUNTIME_BYTES[device.name],
    }

    def growing(positions: int) -> dict[str, int]:
        cached = cache_bytes(config, form, positions, ELEMENT_BYTES[device.name])
        worked = activation_bytes(config, form, min(chunk, positions), positions, device.name)
        return {
            "cache": cached if caches_here else 0,
            "activations": worked if computes_here else _expert_activations(config, chunk),
        }

    longest = None
    if device.capacity is not None:
        room = device.capacity - sum(fixed.values())
        longest = _largest(
            lambda positions: sum(growing(positions).values()) <= room, config.context_length
        )
    return Ledger(
        device=device.name,
        capacity=device.capacity,
        largest_context=longest,
        **fixed,
        **growing(context),
    )


def cache_bytes(config: ModelConfig, form: str, context: int, element_bytes: int) -> int:
    """Bytes of the cache of all layers."""
    return config.num_layers * config.attention.cache_elements[form] * context * element_bytes


def activation_bytes(config: ModelConfig, form: str, tokens: int, context: int, device: str) -> int:
    """The most that one layer holds at a time while T tokens pass at a context of S.

    On the CPU the scores of all heads lie in memory at once, before and after the softmax
    (attention/mla.py); on a GPU they stay in the kernel.
    """
    sizes = config.attention
    widths = 4 * config.hidden_size + 2 * sizes.num_heads * sizes.qk_dim
    if isinstance(sizes, MLASizes) and form == "absorbed":
        widths += sizes.num_heads * (2 * sizes.kv_lora_rank + sizes.qk_rope_dim)
    scores = 2 * sizes.num_heads * context if device == CPU else 0
    shared = config.num_shared_experts * config.expert_size
    inner = max(config.intermediate_size if config.first_dense_layers else 0, shared)
    numbers = tokens * (widths + max(scores, 2 * inner)) + 2 * config.vocab_size
    return ELEMENT_BYTES[device] * numbers + (
        _expert_activations(config, tokens) if device == CPU else 0
    )


def _expert_activations(config: ModelConfig, tokens: int) -> int:
    """The routed experts' part in host memory: inputs gathered, two inner widths, outputs."""
    per_token = config.top_k * (2 * config.expert_size + config.hidden_size)
    return ELEMENT_BYTES[CPU] * tokens * (per_token + config.hidden_size)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest context up to `limit` that fits, by halving; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
