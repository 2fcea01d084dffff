"""What is on each device under a placement, and in which format it is computed there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.converted import wanted_format
from ktlab.checkpoint.facts import ModelFacts, TensorFacts
from ktlab.checkpoint.names import is_quantizable
from ktlab.kernels import codings, native
from ktlab.kernels.int4 import GROUPED
from ktlab.kernels.linear import SMALL
from ktlab.placement.machine import CPU, DISK, GPU, Machine
from ktlab.placement.parts import Part, grouped, part
from ktlab.placement.placement import PHASES, PLACEABLE, Placement, kind_of
from ktlab.placement.ranges import write_ranges
from ktlab.quantization import Format, fallback_format, get_format
from ktlab.record import Record

ON_CPU = ("embedding", "experts")
"""Stay in host memory where there is a GPU: of their numbers a token uses least (`Part.use`)."""
GPU_FORMAT, GPU_WHOLE_FORMAT = "int4_group128", "bf16"
"""Matrices on a GPU have 4 bits; keys and values out of the latent, one matrix a head that the
absorbed form multiplies in place, have 16, as KTransformers leaves kv_b_proj out of its 4 bits, and
so has an embedding, whose rows are looked up (`model.place` holds both so)."""
PER_HEAD = ("attn_k_b", "attn_v_b", "attn_kv_b")

Conversions = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Placed(Record):
    """A part on a device."""

    part: Part
    device: str
    formats: tuple[str, ...]
    """As it is computed there, the largest first."""
    in_place: int
    """Bytes that are used as they lie in the file: mapped, not copied."""
    converted: int
    """Bytes that are made while loading: another format, or a copy in another memory."""
    conversions: tuple[str, ...] = ()
    """What is made of what, e.g. "q4_k -> int4_group128"."""
    phases: tuple[str, ...] = PHASES
    """When it is computed there. What moves between the phases is on both devices."""
    experts: str = ""
    """Which of a layer's experts, as ranges; "" where it is all of them or there are none."""
    share: float = 1.0
    """Of the component, where experts are apart."""

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self.in_place + self.converted


FormatOf = Callable[[TensorFacts, str, str], str]
"""The format of a tensor of a component on a device."""


def usual(config: ModelConfig, machine: Machine) -> Placement:
    """KTransformers' rule: what a token uses most on the GPU, routed experts and embedding in host
    memory. Without a GPU everything is there."""
    found = Placement.everywhere(config, CPU)
    if GPU in machine:
        for component in PLACEABLE:
            if component not in ON_CPU and found.model.layers_of(component):
                found = found.put(component, GPU)
    return found


def place(
    facts: ModelFacts,
    placement: Placement,
    *,
    convert: Mapping[Format, Format],
    quantize: Mapping[str, Format],
    gpu_formats: Conversions,
) -> list[Placed]:
    """The parts on their devices: one row for each device (and phase) that has some of a part.

    `convert` and `quantize` are those of `ktlab.load`, by format and by a glob over names;
    `gpu_formats` overrides the 4 bits, {component: format}.
    """
    groups = grouped(facts)

    def format_of(tensor: TensorFacts, component: str, device: str) -> str:
        if kind_of(device) == "cuda":
            return _gpu_format(tensor, component, gpu_formats)
        if kind_of(device) == "disk":
            return tensor.format
        stored = get_format(tensor.format)
        return _cpu_format(
            tensor, component, wanted_format(tensor.name, tensor.shape, stored, convert, quantize)
        )

    found = []
    for (layer, component), tensors in groups.items():
        whole: dict[str, Placed] = {}
        for device, phases, experts in _seats(placement, component, layer):
            if device not in whole:
                whole[device] = _placed(facts.config, layer, component, tensors, device, format_of)
            found.append(_some(whole[device], phases, experts, facts.config.num_experts))
    if facts.config.tied_output:
        found += _tied(facts, placement, groups[None, "embedding"], format_of)
    return found


def host_copy(
    facts: ModelFacts,
    placement: Placement,
    *,
    convert: Mapping[Format, Format],
    quantize: Mapping[str, Format],
) -> tuple[int, int]:
    """Bytes of experts that only GPUs and NUMA nodes compute, from copies of theirs: what host
    memory has of them still, in the mapped file, and made while loading."""
    config, groups = facts.config, grouped(facts)
    in_file = made = 0
    for layer in config.moe_layers:
        words = zip(*(placement.experts_row(layer, phase) for phase in PHASES), strict=True)
        away = sum({CPU, DISK}.isdisjoint(word) for word in words)
        for tensor in groups[layer, "experts"]:
            stored = get_format(tensor.format)
            wanted = wanted_format(tensor.name, tensor.shape, stored, convert, quantize)
            share = _nbytes(tensor, wanted.name) * away // config.num_experts
            in_file += share if wanted == stored else 0
            made += 0 if wanted == stored else share
    return in_file, made


def _seats(
    placement: Placement, component: str, layer: int | None
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...] | None]]:
    """(device, phases, experts or None) of a part."""
    if component == "experts" and layer is not None:
        rows = [placement.experts_row(layer, phase) for phase in PHASES]
    elif component == "nextn":
        rows = [("disk",), ("disk",)]
    else:
        rows = [(placement.device(component, layer=layer, phase=p),) for p in PHASES]
    seats: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for expert, (decode, prefill) in enumerate(zip(*rows, strict=True)):
        if decode == prefill:
            seats.setdefault((decode, PHASES), []).append(expert)
        else:
            for device, phase in zip((decode, prefill), PHASES, strict=True):
                seats.setdefault((device, (phase,)), []).append(expert)
    for (device, phases), experts in seats.items():
        yield device, phases, tuple(experts) if component == "experts" else None


def _some(
    row: Placed, phases: tuple[str, ...], experts: Sequence[int] | None, count: int
) -> Placed:
    """The share of a row that is these experts, with the work of decode where it is computed."""
    if phases == PHASES and (experts is None or len(experts) == count):
        return row
    some, of = (1, 1) if experts is None else (len(experts), count)
    works = some / of if "decode" in phases else 0.0
    part = row.part
    return replace(
        row,
        part=replace(
            part,
            parameters=part.parameters * some // of,
            bytes=part.bytes * some // of,
            flop_per_token=part.flop_per_token * works,
            bytes_per_token=part.bytes_per_token * works,
        ),
        in_place=row.in_place * some // of,
        converted=row.converted * some // of,
        phases=phases,
        experts="" if some == of or experts is None else write_ranges(experts),
        share=some / of,
    )


def _tied(
    facts: ModelFacts, placement: Placement, tensors: list[TensorFacts], format_of: FormatOf
) -> Iterator[Placed]:
    """An output that is the embedding: in one memory it is there once, another has a copy."""
    for device, phases, _ in _seats(placement, "output", None):
        output = _placed(facts.config, None, "output", tensors, device, format_of)
        output = _some(output, phases, None, 0)
        if device == placement.device("embedding"):
            output = replace(output, in_place=0, converted=0)
        yield replace(output, part=replace(output.part, parameters=0, bytes=0))


def _placed(
    config: ModelConfig,
    layer: int | None,
    component: str,
    tensors: list[TensorFacts],
    device: str,
    format_of: FormatOf,
) -> Placed:
    stored = part(config, layer, component, tensors)
    sizes: dict[str, int] = {}
    in_place = converted = read = 0
    changes: dict[str, None] = {}
    for tensor in tensors:
        wanted = format_of(tensor, component, device)
        nbytes = _nbytes(tensor, wanted)
        sizes[wanted] = sizes.get(wanted, 0) + nbytes
        packed = _packed_bytes(tensor, component, device)
        converted += packed
        read += packed or nbytes
        if wanted == tensor.format and kind_of(device) != "cuda":
            in_place += nbytes
        else:
            converted += nbytes
        if wanted != tensor.format:
            changes[f"{tensor.format} -> {wanted}"] = None
    # What a token reads is read in the format that is there.
    scale = read / stored.bytes if stored.bytes else 1.0
    return Placed(
        part=replace(stored, bytes_per_token=stored.bytes_per_token * scale),
        device=device,
        formats=tuple(sorted(sizes, key=lambda name: -sizes[name])),
        in_place=in_place if kind_of(device) != "disk" else 0,
        converted=converted if kind_of(device) != "disk" else 0,
        conversions=tuple(changes),
    )


def _gpu_format(tensor: TensorFacts, component: str, gpu_formats: Conversions) -> str:
    if not is_quantizable(tensor.name, tensor.shape):
        return tensor.format
    wanted = fallback_format(gpu_formats.get(component, GPU_FORMAT), tensor.shape[-1]).name
    whole = component == "embedding" or _is_per_head(tensor)
    return GPU_WHOLE_FORMAT if whole and wanted in GROUPED else wanted


def _cpu_format(tensor: TensorFacts, component: str, loaded: Format) -> str:
    """What is in memory of a tensor that was loaded as `loaded`. Single rows of the embedding are
    decoded when they are looked up. A prompt multiplies matrices of single heads on a copy, counted
    as float32 (bfloat16 under AMX), and so is what no kernel computes on its encoded values."""
    if not is_quantizable(tensor.name, tensor.shape) or component == "embedding":
        return loaded.name
    return "f32" if _is_per_head(tensor) or loaded.name not in computed_formats() else loaded.name


def _packed_bytes(tensor: TensorFacts, component: str, device: str) -> int:
    """A single token multiplies matrices of single heads on their quantized values, packed, beside
    the floats of a prompt; 0 for all else, which is there once."""
    if kind_of(device) != "cpu" or component == "nextn" or not _is_per_head(tensor):
        return 0
    small = prod(tensor.shape) <= SMALL
    return tensor.nbytes if tensor.format in native.formats() and not small else 0


def _is_per_head(tensor: TensorFacts) -> bool:
    return any(part in tensor.name for part in PER_HEAD)


def computed_formats() -> frozenset[str]:
    """Formats that some kernel computes without making a float32 copy."""
    return codings.FORMATS | frozenset(native.formats())


def _nbytes(tensor: TensorFacts, format: str) -> int:
    if format == tensor.format:
        return tensor.nbytes
    return prod(tensor.shape[:-1]) * get_format(format).row_bytes(tensor.shape[-1])
