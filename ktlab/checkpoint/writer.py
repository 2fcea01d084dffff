"""Write a GGUF that llama.cpp reads unchanged, atomically."""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, GGUFWriter, LlamaFileType

from ktlab.checkpoint.checkpoint import check_tensors, together
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.metadata import Field, metadata_from_config
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.part_file import FULL, check_room
from ktlab.checkpoint.pretokenizers import PRE_TOKENIZERS
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError
from ktlab.quantization import Format, QTensor

ALIGNMENT = GGUF_DEFAULT_ALIGNMENT
QUANTIZATION_VERSION = 2
"""ggml's GGML_QNT_VERSION: the block layouts of the formats."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor before its bytes exist: what a header says of it."""

    name: str
    format: Format
    shape: Shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last axis."""
        return self.format.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """Rows of all leading axes together."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def padded_bytes(self) -> int:
        """Up to where the next tensor starts."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, QTensor],
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; the file appears complete or not at all.

    `tensors` must be exactly those of `expected_tensors(config)`. `metadata` adds fields
    ("general.license": "..."): text, numbers, booleans or lists of one of these. Raises
    `CheckpointError` for what cannot be written, also where the disk has too little room.
    """
    path = Path(path)
    check_tensors(path.name, config, {name: tensor.shape for name, tensor in tensors.items()})
    chosen = [tensors[name] for name in expected_tensors(config)]
    specs = [TensorSpec(name=t.name, format=t.format, shape=t.shape) for t in chosen]
    header = gguf_header(path.name, config, specs, tokenizer, metadata)
    total = len(header) + sum(spec.padded_bytes for spec in specs)
    check_room(path, total, total)

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for spec, tensor in zip(specs, chosen, strict=True):
                file.write(np.ascontiguousarray(tensor.blocks).data)
                file.write(bytes(spec.padded_bytes - spec.nbytes))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in FULL:
            raise CheckpointError(
                f"{path}: the disk became full ({error.strerror}), nothing was written; make room "
                "or choose another folder"
            ) from error
        raise
    return path


def gguf_header(
    where: str,
    config: ModelConfig,
    tensors: Sequence[TensorSpec],
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """All that stands before the first tensor's bytes; the tensors follow in the given order, each
    padded with zeros to `padded_bytes`. The same arguments give the same bytes."""
    _check_formats(where, tensors)
    fields = _general(config, tensors) | metadata_from_config(config)
    if tokenizer is not None:
        fields |= _tokenizer_fields(config, tokenizer)
    fields |= _extra_fields(where, metadata or {}, fields)

    writer = GGUFWriter(None, config.architecture)
    for key, (value, kind) in fields.items():
        if key != "general.architecture":  # the writer has added it
            writer.add_key_value(key, value, kind)
    for spec in tensors:
        rows = (*spec.shape[:-1], spec.row_bytes)
        # A dtype of uint8 makes the writer take the shape for that of the bytes.
        writer.add_tensor_info(
            spec.name, rows, np.dtype(np.uint8), spec.nbytes, raw_dtype=spec.format.ggml_type
        )
    with tempfile.TemporaryDirectory(prefix="ktlab-header-") as folder:
        file = Path(folder, "header")
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = file.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def _check_formats(where: str, tensors: Sequence[TensorSpec]) -> None:
    """Refuse what GGUF has no type for, all tensors together."""
    unknown: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.format.ggml_type is None:
            unknown.setdefault(tensor.format.name, []).append(tensor.name)
    problems = [
        f"{first}{f' and {len(more)} more tensors are' if more else ' is'} {format}, which exists "
        "in memory only"
        for format, (first, *more) in unknown.items()
    ]
    if problems:
        advice = "GGUF has no such type: requantize() to one that it has, e.g. q8_0"
        raise CheckpointError(together(where, problems, advice))


def _general(config: ModelConfig, tensors: Sequence[TensorSpec]) -> dict[str, Field]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.format.name.upper()] += tensor.nbytes
    main = sizes.most_common(1)[0][0]
    names = (f"MOSTLY_{main}", f"MOSTLY_{main}_M", f"ALL_{main}")
    kinds = [LlamaFileType[name] for name in names if name in LlamaFileType.__members__]
    return {
        "general.type": ("model", GGUFValueType.STRING),
        "general.name": (config.name, GGUFValueType.STRING),
        "general.file_type": (int(kinds[0]) if kinds else 1024, GGUFValueType.UINT32),
        "general.quantization_version": (QUANTIZATION_VERSION, GGUFValueType.UINT32),
    }


def _tokenizer_fields(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Field]:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{config.name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the embedding only {config.vocab_size} rows"
        )
    if tokenizer.pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{config.name}: its {tokenizer.pre} cuts texts in a way that GGUF has no name for; "
            f"there are {', '.join(PRE_TOKENIZERS)}"
        )
    tokenizer = tokenizer.padded(config.vocab_size)
    array, string, u32 = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32
    fields: dict[str, Field] = {
        "tokenizer.ggml.model": ("gpt2", string),
        "tokenizer.ggml.pre": (tokenizer.pre, string),
        "tokenizer.ggml.tokens": (tokenizer.tokens, array),
        "tokenizer.ggml.token_type": (tokenizer.types, array),
        "tokenizer.ggml.add_bos_token": (tokenizer.add_bos, GGUFValueType.BOOL),
    }
    if tokenizer.merges:  # a GGUF array cannot be empty
        fields["tokenizer.ggml.merges"] = ([f"{a} {b}" for a, b in tokenizer.merges], array)
    for key, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = (token, u32)
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = (tokenizer.chat_template, string)
    return fields


def _extra_fields(
    where: str, metadata: Mapping[str, Any], taken: Mapping[str, Field]
) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for key, value in metadata.items():
        if key in taken and not key.startswith("general."):
            raise CheckpointError(f"{where}: metadata {key!r} is written from the configuration")
        if value == "" or value == [] or value == ():
            continue  # GGUF cannot hold these
        try:
            kind = GGUFValueType.get_type(value)
        except ValueError:
            raise CheckpointError(
                f"{where}: metadata {key!r} is a {type(value).__name__}; "
                "expected text, a number, a boolean or a list of one of these"
            ) from None
        fields[key] = (value, kind)
    return fields
