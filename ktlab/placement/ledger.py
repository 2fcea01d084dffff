"""Every byte that a model takes of a device, and the largest context that fits.

T tokens of a call, S positions of the context, D hidden, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktlab.attention.mla import DECOMPRESSED_BYTES
from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig
from ktlab.html import decimal_bytes
from ktlab.placement.machine import CPU, DISK, Device, Machine
from ktlab.placement.placed import Placed
from ktlab.placement.placement import Placement, kind_of
from ktlab.record import Record

ELEMENT_BYTES = {"cpu": 4, "cuda": 2}
"""Of activations and cache: float32 on the CPU, bfloat16 on a GPU."""
CACHE_FORMATS = {"cpu": "f32", "cuda": "bf16"}
RUNTIME_BYTES = {"cpu": 300_000_000, "cuda": 500_000_000}
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


def ledgers(
    config: ModelConfig,
    machine: Machine,
    placement: Placement,
    placed: Sequence[Placed],
    *,
    form: str,
    context: int,
    chunk: int,
    copies: int,
) -> list[Ledger]:
    """One for each device of the machine, and for each that the placement names besides."""

    def of(device: Device) -> Ledger:
        attends = sum(
            placement.device("attention", layer=layer) == device.name
            for layer in range(config.num_layers)
        )
        return ledger(
            config, device, placed, form=form, context=context, chunk=chunk, copies=copies,
            attends=attends,
        )  # fmt: skip

    nodes = [name for name in placement.devices if name.startswith("numa:")]
    apart = [of(_node(machine, name)) for name in nodes]
    taken = sum(one.needed for one in apart)
    found = []
    for device in machine.devices:
        if device.name == CPU and taken and device.capacity is not None:
            rest = max(0, device.capacity - taken)
            device = Device(name=CPU, capacity=rest, about="what the NUMA nodes' parts leave")
        found.append(of(device))
    known = {one.device for one in [*found, *apart]}
    others = [name for name in placement.devices if name not in known]
    return [*found, *apart, *(of(Device(name=name, capacity=None)) for name in others)]


def _node(machine: Machine, name: str) -> Device:
    """A NUMA node: its share of host memory."""
    if name in machine:
        return machine[name]
    capacity = machine[CPU].capacity
    share = None if capacity is None else capacity // machine.numa_nodes
    return Device(name=name, capacity=share, about=f"1 of {machine.numa_nodes} nodes")


def ledger(
    config: ModelConfig,
    device: Device,
    placed: Sequence[Placed],
    *,
    form: str,
    context: int,
    chunk: int,
    copies: int,
    attends: int,
) -> Ledger:
    """The bytes of one device. `copies` of the experts exist in host memory, one a NUMA node;
    attention of `attends` layers is here, and so is their cache."""
    here = [p for p in placed if p.device == device.name]
    kind = kind_of(device.name)
    if kind == DISK:
        stored = sum(p.part.bytes for p in here if p.part.component != "nextn")
        nothing = dict.fromkeys(KINDS, 0) | {"weights": stored}
        return Ledger(device=DISK, capacity=device.capacity, largest_context=None, **nothing)
    experts = sum(p.bytes for p in here if p.part.component == "experts")
    fixed = {
        "weights": sum(p.in_place for p in here),
        "converted": sum(p.converted for p in here),
        "copies": (copies - 1) * experts if device.name == CPU else 0,
        "runtime": 0 if device.name.startswith("numa:") else RUNTIME_BYTES[kind],
    }

    def growing(positions: int) -> dict[str, int]:
        element = ELEMENT_BYTES[kind]
        cached = cache_bytes(config, form, positions, element) * attends // config.num_layers
        tokens = min(chunk, positions)
        worked = activation_bytes(config, form, tokens, positions, kind)
        return {
            "cache": cached,
            "activations": worked if attends else _expert_activations(config, chunk),
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
    """The most that one layer holds at a time while up to T tokens pass at a context of S, on the
    CPU or on a GPU (`device` is "cpu" or "cuda"). Two rows of logits: those of every token, as
    `Model.forward` returns them, are the caller's.
    """
    sizes = config.attention
    shared = config.num_shared_experts * config.expert_size
    inner = max(config.intermediate_size if config.first_dense_layers else 0, shared)
    widths = tokens * (4 * config.hidden_size + 2 * sizes.num_heads * sizes.qk_dim)
    attention = _attention_numbers(sizes, form, tokens, context, device)
    numbers = widths + max(attention, 2 * inner * tokens) + 2 * config.vocab_size
    return ELEMENT_BYTES[device] * numbers + (
        _expert_activations(config, tokens) if device == "cpu" else 0
    )


def _attention_numbers(
    sizes: MLASizes | GQASizes, form: str, tokens: int, context: int, device: str
) -> int:
    """What attention holds besides queries and result (attention/mla.py, gqa.py).

    Scores of all heads lie in memory at once on the CPU, before and after the softmax; on a GPU
    they stay in the kernel. In the absorbed form a call of many tokens has no scores but keys and
    values of a few heads; the last call of a prompt may be short enough to have scores.
    """
    heads = sizes.num_heads
    latent = 0
    if isinstance(sizes, MLASizes) and form == "absorbed":
        latent = heads * (2 * sizes.kv_lora_rank + sizes.qk_rope_dim)
    if device != "cpu":
        return tokens * latent
    scores = 2 * heads * context
    if not isinstance(sizes, MLASizes) or not latent or sizes.most_absorbed is None:
        return tokens * (latent + scores)
    # Keys and values of one head at least; the mask, and torch's copy of it in floats.
    made = max(DECOMPRESSED_BYTES // ELEMENT_BYTES["cpu"], 2 * context * sizes.qk_dim)
    many = made + 2 * tokens * context if tokens > sizes.most_absorbed else 0
    return max(min(tokens, sizes.most_absorbed) * (latent + scores), many)


def _expert_activations(config: ModelConfig, tokens: int) -> int:
    """The routed experts' part in host memory: inputs gathered, two inner widths, outputs."""
    per_token = config.top_k * (2 * config.expert_size + config.hidden_size)
    return ELEMENT_BYTES["cpu"] * tokens * (per_token + config.hidden_size)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest context up to `limit` that fits, by halving; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
