"""A strategy's placement on a machine, filled until the GPU is full; and who deserves it.

What a GPU has room for is counted by `ktlab.plan`, with cache, scratch and what the runtime takes.
"""

from collections.abc import Iterator
from os import fspath
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import PlacementError
from ktlab.model.model import Model
from ktlab.model.trace import Trace
from ktlab.placement.machine import CPU, GPU
from ktlab.placement.placement import FOLLOW, Placement
from ktlab.placement.plan import Plan, plan
from ktlab.placement.strategies import ArithmeticIntensity, Chosen, Strategy, get_strategy

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd


def place(
    strategy: str | Strategy,
    source: "str | PathLike[str] | Model",
    *,
    profile: Any = None,
    **options: Any,
) -> Plan:
    """Where a strategy puts everything, as a plan (`.placement` is the value).

    `source` is a model, or what `ktlab.plan` takes; `options` are its other arguments: `vram`, or
    `machine`, says what there is to fill, and `context`, `format`, `gpu_formats` count. Fixed
    strategies put all but experts and embedding on the GPU and fill the rest of it with experts;
    "intensity" goes operator by operator. `profile` is a trace of this very model.

    Raises PlacementError where the GPU cannot hold what must be there (by how much), where there is
    no GPU, without a profile that is needed or with another model's, and for a cache.
    """
    chosen = get_strategy(strategy)
    path = path_of(source)
    of = getattr(profile, "trace", profile)
    if isinstance(source, Model) and isinstance(of, Trace):
        of.require(source.identity)
    base = plan(path, **options)
    if GPU not in base.machine or base[GPU].capacity is None:
        raise PlacementError(
            f"{chosen.name}: nothing says how large a GPU is to be filled; give vram=, such as "
            'vram="24GB", or a machine with one'
        )
    if isinstance(chosen, ArithmeticIntensity):
        return _by_intensity(path, base, options)
    assert base.placement is not None
    base.check()
    sizes = expert_bytes(path, base.placement, options)
    room, shape = base[GPU].headroom or 0, base.placement.model
    most = len(shape.moe_layers) * shape.experts
    while True:
        count = _within(chosen, base.placement, most, room, sizes, profile)
        found = plan(path, placement=with_experts(base.placement, chosen.chosen(
            shape, count, profile)), **options)  # fmt: skip
        over = -(found[GPU].headroom or 0)
        if over <= 0 or not count:
            found.check()
            return found
        room -= over  # work space that the first expert brings with it


def with_experts(placement: Placement, chosen: Chosen) -> Placement:
    """The placement with these experts on the GPU too."""
    kept = {layer: ids for layer, ids in chosen.items() if ids}
    return placement.put("experts", GPU, experts=kept) if kept else placement


def expert_bytes(path: str, placement: Placement, options: Any) -> dict[int, float]:
    """{layer: bytes of one of its experts on the GPU}."""
    unbounded = {k: v for k, v in options.items() if k not in ("ram", "vram", "machine")}
    everything = plan(path, placement=placement.put("experts", GPU), **unbounded)
    experts = placement.model.experts
    return {
        row.part.layer: row.bytes / experts
        for row in everything.rows
        if row.part.component == "experts" and row.part.layer is not None
    }


def _within(
    strategy: Strategy, placement: Placement, most: int, room: float, sizes: dict[int, float],
    profile: Any,
) -> int:  # fmt: skip
    """The most experts whose bytes fit, by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        chosen = strategy.chosen(placement.model, middle, profile)
        size = sum(len(ids) * sizes[layer] for layer, ids in chosen.items())
        low, high = (middle, high) if size <= room else (low, middle - 1)
    return low


def _by_intensity(path: str, base: Plan, options: Any) -> Plan:
    """Operators of the highest use first, as long as they fit; then experts one by one."""
    unbounded = {k: v for k, v in options.items() if k not in ("ram", "vram", "machine")}
    assert base.placement is not None
    everywhere = Placement.everywhere(base.placement.model, GPU)
    whole = plan(path, placement=everywhere, **unbounded)
    capacity = base[GPU].capacity or 0
    room = float(capacity - whole[GPU].runtime - whole[GPU].activations)
    placement = Placement.everywhere(base.placement.model, CPU)
    least = None
    for _, component, layer, size in sorted(_operators(whole), key=lambda found: -found[0]):
        count = placement.model.experts if component == "experts" else 1
        fits = int(max(0.0, room) // (size / count)) if size else count
        least = size if least is None else least
        if fits < count and component != "experts":
            continue
        if fits:
            ids = range(min(fits, count)) if component == "experts" else None
            placement = placement.put(component, GPU, layers=[layer], experts=ids)
            room -= size / count * min(fits, count)
    if GPU not in placement.devices:
        short = html.decimal_bytes((least or 0) - room)
        raise PlacementError(
            f"intensity: {html.decimal_bytes(capacity)} hold no operator of {base.model} beside "
            f"work space and runtime; the first would need {short} more"
        )
    return plan(path, placement=placement, **options)


def _operators(whole: Plan) -> Iterator[tuple[float, str, int | None, int]]:
    """(use, component, layer, bytes with what follows it) of everything that can be placed."""
    groups: dict[tuple[str, int | None], tuple[float, int]] = {}
    for row in whole.rows:
        part = row.part
        if part.component == "nextn":
            continue
        leader = FOLLOW.get(part.component, part.component)
        if leader != part.component and part.layer is None:
            leader = "output"
        use, size = groups.get((leader, part.layer), (0.0, 0))
        # The operator is as intense as what is most so in it: attention as its cache.
        groups[leader, part.layer] = max(use, part.use), size + row.bytes
    for (component, layer), (use, size) in groups.items():
        yield use, component, layer, size


def intensities(source: "str | PathLike[str] | Model", **options: Any) -> "pd.DataFrame":
    """What a token of decode does with each component: `use` is FLOP per number stored, by which
    KTransformers decides (MLA's 512, counted on 512 of the latent's 576 numbers, against 0.075 for
    DeepSeek-V2's experts); flop_per_byte is what the roofline asks for.

    Columns: bytes, flop (of a token), use, flop_per_byte; the most used first.
    """
    import pandas as pd

    rows = [
        {
            "component": name,
            "bytes": total.bytes,
            "flop": total.flop_per_token,
            "use": total.use,
            "flop_per_byte": total.intensity,
        }
        for name, total in plan(path_of(source), **options).by_component().items()
        if name != "nextn"
    ]
    frame = pd.DataFrame(rows).set_index("component")
    return frame.sort_values("use", ascending=False, kind="stable")


def path_of(source: "str | PathLike[str] | Model") -> str:
    """What `plan` reads."""
    if not isinstance(source, Model):
        return fspath(source)
    if source.checkpoint.path is None:
        raise PlacementError(
            f"{source.name} was made in memory and has no file to plan from; save it, or name a "
            "published model"
        )
    return fspath(source.checkpoint.path)
