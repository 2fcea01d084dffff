"""Which device each component goes to, and in which format it is computed there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.converted import wanted_format
from ktlab.checkpoint.facts import ModelFacts, TensorFacts
from ktlab.checkpoint.names import is_quantizable
from ktlab.kernels import codings, native
from ktlab.placement.machine import CPU, DISK, GPU, Machine
from ktlab.placement.parts import Part, grouped, part
from ktlab.quantization import Format, fallback_format, get_format
from ktlab.record import Record

ON_CPU = ("embedding", "experts")
"""Stay in host memory where there is a GPU: of their numbers a token uses least (`Part.use`)."""
GPU_FORMAT, GPU_PER_HEAD_FORMAT = "int4_group128", "bf16"
"""Matrices on a GPU have 4 bits; keys and values out of the latent, one matrix a head that the
absorbed form multiplies in place, have 16, as KTransformers leaves kv_b_proj out of its 4 bits."""
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

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self.in_place + self.converted


def place(
    facts: ModelFacts,
    machine: Machine,
    *,
    convert: Mapping[Format, Format],
    quantize: Mapping[str, Format],
    gpu_formats: Conversions,
) -> list[Placed]:
    """The parts on their devices, by KTransformers' rule: what a token uses most on the GPU, routed
    experts and embedding in host memory. Without a GPU everything is there.

    `convert` and `quantize` are those of `ktlab.load`, by format and by a glob over names;
    `gpu_formats` overrides the 4 bits, {component: format}.
    """
    groups = grouped(facts)

    def format_of(tensor: TensorFacts, component: str, device: str) -> str:
        if device == GPU:
            return _gpu_format(tensor, component, gpu_formats)
        if device == DISK:
            return tensor.format
        stored = get_format(tensor.format)
        return _cpu_format(
            tensor, component, wanted_format(tensor.name, tensor.shape, stored, convert, quantize)
        )

    def placed(layer: int | None, component: str, tensors: list[TensorFacts]) -> Placed:
        device = device_of(component, machine)
        return _placed(facts.config, layer, component, tensors, device, format_of)

    found = [placed(layer, component, tensors) for (layer, component), tensors in groups.items()]
    if facts.config.tied_output:
        output = placed(None, "output", groups[None, "embedding"])
        # One tensor serves both: in one memory it is there once, a GPU has a copy of its own.
        if output.device == CPU:
            output = replace(output, in_place=0, converted=0)
        found.append(replace(output, part=replace(output.part, parameters=0, bytes=0)))
    return found


def device_of(component: str, machine: Machine) -> str:
    """Where the rule puts a component."""
    if component == "nextn":
        return DISK
    return CPU if component in ON_CPU or GPU not in machine else GPU


def _placed(
    config: ModelConfig,
    layer: int | None,
    component: str,
    tensors: list[TensorFacts],
    device: str,
    format_of: Callable[[TensorFacts, str, str], str],
) -> Placed:
    stored = part(config, layer, component, tensors)
    sizes: dict[str, int] = {}
    in_place = converted = 0
    changes: dict[str, None] = {}
    for tensor in tensors:
        wanted = format_of(tensor, component, device)
        nbytes = _nbytes(tensor, wanted)
        sizes[wanted] = sizes.get(wanted, 0) + nbytes
        if wanted == tensor.format and device != GPU:
            in_place += nbytes
        else:
            converted += nbytes
        if wanted != tensor.format:
            changes[f"{tensor.format} -> {wanted}"] = None
    # What a token reads is read in the format that is there.
    scale = (in_place + converted) / stored.bytes if stored.bytes else 1.0
    return Placed(
        part=replace(stored, bytes_per_token=stored.bytes_per_token * scale),
        device=device,
        formats=tuple(sorted(sizes, key=lambda name: -sizes[name])),
        in_place=in_place if device != DISK else 0,
        converted=converted if device != DISK else 0,
        conversions=tuple(changes),
    )


def _gpu_format(tensor: TensorFacts, component: str, gpu_formats: Conversions) -> str:
    if not is_quantizable(tensor.name, tensor.shape):
        return tensor.format
    wanted = gpu_formats.get(component)
    if wanted is None:
        wanted = GPU_PER_HEAD_FORMAT if _is_per_head(tensor) else GPU_FORMAT
    return fallback_format(wanted, tensor.shape[-1]).name


def _cpu_format(tensor: TensorFacts, component: str, loaded: Format) -> str:
    """What is in memory of a tensor that was loaded as `loaded`. Single rows of the embedding are
    decoded when they are looked up. A prompt multiplies matrices of single heads on a copy, counted
    as float32 (bfloat16 under AMX), and so is what no kernel computes on its encoded values."""
    if not is_quantizable(tensor.name, tensor.shape) or component == "embedding":
        return loaded.name
    return "f32" if _is_per_head(tensor) or loaded.name not in computed_formats() else loaded.name


def _is_per_head(tensor: TensorFacts) -> bool:
    return any(part in tensor.name for part in PER_HEAD)


def computed_formats() -> frozenset[str]:
    """Formats that some kernel computes without making a float32 copy."""
    return codings.FORMATS | frozenset(native.formats())


def _nbytes(tensor: TensorFacts, format: str) -> int:
    if format == tensor.format:
        return tensor.nbytes
    return prod(tensor.shape[:-1]) * get_format(format).row_bytes(tensor.shape[-1])
