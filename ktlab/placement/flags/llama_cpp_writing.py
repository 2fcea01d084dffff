"""From a placement to llama.cpp's words: -ngl and -ts for layers, -ot for what lies elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ktlab.placement.placement import PHASES, Placement
from ktlab.placement.ranges import write_ranges

TENSORS = {
    "embedding": r"^token_embd",
    "output": r"^output\.",
    "attention": r"\.attn_(q|k|v|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b|output)\.",
    "router": r"\.(ffn_gate_inp|exp_probs_b)\.",
    "experts": r"\.ffn_(up|down|gate|gate_up)_(ch|)exps",
    "shared": r"\.ffn_(gate|up|down)_shexp",
    "dense": r"\.ffn_(gate|up|down)\.",
    "norms": r"\.(\w+_)?norm\.",
}
"""Component -> its tensors' names; `blk.N` comes before those that layers have."""
LAST_NORM = "^output_norm"
EVERY_LAYER = 999
"""As people write it: also right where a file has layers for prediction."""


@dataclass
class Written:
    """What `LlamaCpp.of` makes of a placement."""

    gpu_layers: int = 0
    split: Sequence[int] = ()
    overrides: list[tuple[str, str]] = field(default_factory=list)
    """(pattern, device)."""
    left_out: list[str] = field(default_factory=list)


def write(placement: Placement) -> Written:
    """By layer where attention lies in a row of devices, by pattern what lies apart from that."""
    written = Written(left_out=list(_left_out(placement)))
    by_layer = _by_layer(placement, written)
    where = _whole(placement)
    apart: dict[tuple[str, str], list[int]] = {}
    for (component, layer), device in where.items():
        if layer is not None and device != by_layer[layer]:
            apart.setdefault((component, device), []).append(layer)
    output = by_layer[-1]
    for pattern, component, there in (
        (TENSORS["embedding"], "embedding", "cpu"),
        (TENSORS["output"], "output", output),
        (LAST_NORM, "norms", output),
    ):
        if where[component, None] != there:
            written.overrides.append((pattern, where[component, None]))
    for (component, device), layers in apart.items():
        written.overrides += _patterns(placement, component, device, layers)
    caches = [x for x in range(placement.model.layers) if where["attention", x] != by_layer[x]]
    if caches:
        written.left_out.append(
            f"attention of layers {write_ranges(caches)} is put there by pattern; llama.cpp keeps "
            "their cache with the layer, on another device"
        )
    return written


def _whole(placement: Placement) -> dict[tuple[str, int | None], str]:
    """A device for each component of each layer, in llama.cpp's sense: a GPU, or host memory."""
    found: dict[tuple[str, int | None], str] = {}
    for component in TENSORS:
        for layer in placement.model.layers_of(component):
            if component == "experts" and layer is not None:
                row = [_host(device) for device in placement.experts_row(layer)]
                # Most of them; of equal shares host memory, which has room.
                device = max(sorted(set(row)), key=row.count)
            else:
                device = _host(placement.device(component, layer=layer))
            found[component, layer] = device
    return found


def _host(device: str) -> str:
    return device if device.startswith("cuda:") else "cpu"


def _by_layer(placement: Placement, written: Written) -> list[str]:
    """Where -ngl and -ts put each layer, and the output behind them."""
    wanted = [
        _host(placement.device("attention", layer=layer)) for layer in range(placement.model.layers)
    ]
    gpus = [layer for layer, device in enumerate(wanted) if device != "cpu"]
    output = _host(placement.device("output"))
    if not gpus and output == "cpu":
        return [*wanted, output]
    first = gpus[0] if gpus else len(wanted)
    inside = [int(device[5:]) if device != "cpu" else None for device in (*wanted, output)][first:]
    rising, last = [], 0
    for number in inside:  # a layer that isn't on the next GPU is put there by pattern
        last = max(last, number) if number is not None else last
        rising.append(last)
    start = next((number for number in inside if number is not None), 0)
    rising = [max(number, start) for number in rising]
    written.gpu_layers = len(rising) if first else EVERY_LAYER
    if rising[-1] > 0:
        written.split = [rising.count(gpu) for gpu in range(rising[-1] + 1)]
    return ["cpu"] * first + [f"cuda:{number}" for number in rising]


def _patterns(
    placement: Placement, component: str, device: str, layers: list[int]
) -> Iterator[tuple[str, str]]:
    tensors = TENSORS[component]
    there = [layer for layer in placement.model.layers_of(component) if layer is not None]
    leading = list(range(placement.model.dense_layers, len(layers) + placement.model.dense_layers))
    if component == "experts" and device == "cpu" and layers == leading and layers != there:
        # As --n-cpu-moe counts: from layer 0 on, also where there are none.
        for layer in range(layers[-1] + 1):
            yield rf"blk\.{layer}{tensors}", device
    elif layers == there:
        yield (tensors if component == "experts" else rf"blk\.\d+{tensors}"), device
    else:
        yield rf"blk\.({'|'.join(map(str, layers))}){tensors}", device


def _left_out(placement: Placement) -> Iterator[str]:
    if placement.decode != placement.prefill:
        yield f"prefill elsewhere than decode; {PHASES[0]} is written, llama.cpp has one place"
    divided: dict[str, list[int]] = {}
    for layer in placement.model.moe_layers:
        row = placement.experts_row(layer)
        if len(set(row)) > 1:
            most = max(sorted(set(map(_host, row))), key=[_host(d) for d in row].count)
            divided.setdefault(most, []).append(layer)
    for most, layers in divided.items():
        yield (
            f"experts one by one in layers {write_ranges(layers)}: a tensor of llama.cpp holds all "
            f"experts of a layer; put where most are, {most}"
        )
    for device in placement.devices:
        if device.startswith("numa:"):
            yield f"{device}: host memory, which llama.cpp divides as a whole (--numa)"
        if device == "disk":
            yield "disk: host memory, mapped from the file"
