"""Write a GGUF that llama.cpp reads unchanged, atomically."""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter, LlamaFileType

from ktlab.checkpoint.checkpoint import check_tensors, together
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.metadata import ARCHITECTURE, Field, metadata_from_config
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.pretokenizers import PRE_TOKENIZERS
from ktlab.checkpoint.tokenizer import UNUSED, Tokenizer
from ktlab.errors import CheckpointError
from ktlab.quantization import QTensor

QUANTIZATION_VERSION = 2
"""ggml's GGML_QNT_VERSION: the block layouts of the formats."""


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, QTensor],
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; the file appears complete or not at all.

    `tensors` must be exactly those of `expected_tensors(config)`. `metadata` adds fields
    ("general.license": "..."): text, numbers, booleans or lists of one of these.
    """
    path = Path(path)
    check_tensors(path.name, config, {name: tensor.shape for name, tensor in tensors.items()})
    chosen = {name: tensors[name] for name in expected_tensors(config)}
    _check_formats(path.name, chosen)
    fields = _general(config, chosen) | metadata_from_config(config)
    if tokenizer is not None:
        fields |= _tokenizer_fields(config, tokenizer)
    fields |= _extra_fields(path.name, metadata or {}, fields)

    writer = GGUFWriter(None, ARCHITECTURE)
    for key, (value, kind) in fields.items():
        if key != "general.architecture":  # the writer has added it
            writer.add_key_value(key, value, kind)
    for name, tensor in chosen.items():
        writer.add_tensor(name, tensor.blocks, raw_dtype=tensor.format.ggml_type)

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        writer.write_header_to_file(Path(temporary))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        writer.close()
        os.unlink(temporary)
        raise
    return path


def _check_formats(where: str, tensors: Mapping[str, QTensor]) -> None:
    """Refuse what GGUF has no type for, all tensors together."""
    problems = [
        f"{name} is {tensor.format.name}, which exists in memory only"
        for name, tensor in tensors.items()
        if tensor.format.ggml_type is None
    ]
    if problems:
        advice = "GGUF has no such type: requantize() to one that it has, e.g. q8_0"
        raise CheckpointError(together(where, problems, advice))


def _general(config: ModelConfig, tensors: Mapping[str, QTensor]) -> dict[str, Field]:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
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
    missing = config.vocab_size - tokenizer.vocab_size
    if missing < 0:
        raise CheckpointError(
            f"{config.name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the embedding only {config.vocab_size} rows"
        )
    if tokenizer.pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{config.name}: its {tokenizer.pre} cuts texts in a way that GGUF has no name for; "
            f"there are {', '.join(PRE_TOKENIZERS)}"
        )
    padding = [f"[PAD{tokenizer.vocab_size + i}]" for i in range(missing)]
    array, string, u32 = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32
    fields: dict[str, Field] = {
        "tokenizer.ggml.model": ("gpt2", string),
        "tokenizer.ggml.pre": (tokenizer.pre, string),
        "tokenizer.ggml.tokens": (tokenizer.tokens + padding, array),
        "tokenizer.ggml.token_type": (tokenizer.types + [UNUSED] * missing, array),
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
