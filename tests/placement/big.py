"""Files of DeepSeek-V3's true shape that take no room: headers are written, weights are holes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType, GGUFWriter

from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.hugging_face import SCALE
from ktlab.checkpoint.hugging_face_names import origin
from ktlab.checkpoint.metadata import metadata_from_config
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.safetensors_file import DTYPE_BYTES
from ktlab.checkpoint.safetensors_folder import CONFIG, INDEX

VOCABULARY = 129280
MERGES = 127741
"""As DeepSeek-V3's tokenizer has."""
ALIGNMENT = 32


class Blank(GGUFWriter):
    """Writes a header for tensors that nobody holds, then makes the file as long as they are."""

    def add_blank(
        self, name: str, shape: tuple[int, ...], format: gguf.GGMLQuantizationType
    ) -> int:
        block, size = gguf.GGML_QUANT_SIZES[format]
        nbytes = math.prod(shape) // block * size
        # The writer takes the shape in bytes of a quantized array, as its own callers give it.
        raw = (*shape[:-1], shape[-1] // block * size) if block > 1 else shape
        dtype = np.dtype(np.uint8 if block > 1 else np.float32)
        self.add_tensor_info(name, raw, dtype, nbytes, raw_dtype=format)
        return -(-nbytes // ALIGNMENT) * ALIGNMENT


def write_shards(
    folder: Path, name: str, file_type: str, count: int, extra: Mapping[str, Any] | None = None
) -> list[Path]:
    """`count` sparse shards of a published model; a few MB on disk, whatever they say."""
    config = published_model(name).config
    shapes = expected_tensors(config)
    formats = mixture(file_type, shapes, config)
    names = list(shapes)
    per_shard = -(-len(names) // count)
    paths = []
    for number in range(count):
        path = folder / f"{name}-{number + 1:05}-of-{count:05}.gguf"
        writer = Blank(path, config.architecture)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(names))
        if number == 0:
            for key, (value, kind) in metadata_from_config(config).items():
                writer.add_key_value(key, value, kind)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list([f"token{i}" for i in range(VOCABULARY)])
            writer.add_token_types([1] * VOCABULARY)
            writer.add_token_merges([f"to ken{i}" for i in range(MERGES)])
            for key, value in (extra or {}).items():
                writer.add_key_value(key, value, GGUFValueType.get_type(value))
        size = 0
        for tensor in names[number * per_shard : (number + 1) * per_shard]:
            stored = formats[tensor].ggml_type
            assert stored is not None
            size += writer.add_blank(tensor, shapes[tensor], stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT
        with path.open("r+b") as file:
            file.truncate(start + size)
        paths.append(path)
    return paths


def write_folder(folder: Path, name: str, count: int) -> list[Path]:
    """A published model as `count` sparse safetensors in DeepSeek's FP8, experts one by one."""
    known = json.loads(data_path("models").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    config = published_model(name).config
    stored: dict[str, tuple[str, Shape]] = {}
    for tensor, shape in expected_tensors(config).items():
        made_of = origin(config, tensor, shape, ())
        for one in made_of.names:
            if len(made_of.shape) < 2 or "embed" in one or "lm_head" in one or ".gate." in one:
                stored[one] = "F32" if one.endswith("bias") else "BF16", made_of.shape
            else:
                stored[one] = "F8_E4M3", made_of.shape
                stored[one + SCALE] = "F32", tuple(-(-n // 128) for n in made_of.shape)
    names = list(stored)
    per_file = -(-len(names) // count)
    weight_map: dict[str, str] = {}
    paths = []
    for number in range(count):
        path = folder / f"model-{number + 1:05}-of-{count:06}.safetensors"
        own = names[number * per_file : (number + 1) * per_file]
        _write_blank(path, {one: stored[one] for one in own})
        weight_map |= dict.fromkeys(own, path.name)
        paths.append(path)
    index = {"metadata": {"total_size": 0}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    content = known["config"] | {"quantization_config": fp8}
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return paths


def _write_blank(path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> None:
    """Header as the library writes it: widest type first, then by name; no weights behind it."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
