"""Files of DeepSeek-V3's true shape that take no room: headers are written, weights are holes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType, GGUFWriter

from ktlab.checkpoint.metadata import metadata_from_config
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.published import published_model

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
