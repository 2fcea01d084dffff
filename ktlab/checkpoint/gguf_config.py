"""What the headers of a GGUF say of a model, checked: its configuration, and each tensor of it."""

import re
from collections.abc import Collection, Mapping, Sequence

from ktlab.checkpoint.checkpoint import check_tensors
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.checkpoint.header import Header, TensorEntry, type_name
from ktlab.checkpoint.metadata import config_from_metadata
from ktlab.checkpoint.names import Shape, expected_tensors, fused_kv_b
from ktlab.errors import CheckpointError, short
from ktlab.quantization import FORMATS

PARTS_OF_KV_B = re.compile(r"\.attn_(k_b|v_b|kv_b)\.weight$")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_ANGLES = re.compile(r"\b(attn_rot_embd|rope_\w+)\.weight$")
"""Tables that llama.cpp skips or computes for itself (gguf-py MODEL_TENSOR_SKIP)."""


def read_config(where: str, headers: Sequence[Header]) -> ModelConfig:
    """The configuration that a model's headers state, every tensor checked against it."""
    fields, entries = headers[0].fields, [e for header in headers for e in header.entries]
    shapes = {entry.name: entry.shape for entry in entries}
    config = config_from_metadata(where, fields, shapes)
    if config.num_layers > len(entries):
        key = f"{config.architecture}.block_count"
        raise CheckpointError(
            f"{where}: {key} is {config.num_layers}, but the file has only "
            f"{len(entries)} tensors; the file is damaged: download or convert it again"
        )
    problems = _tokenizer_faults(headers[0], config.vocab_size)
    expected = expected_tensors(config)
    problems += _without_place(config, shapes)
    shapes = {name: by_head(shape, expected.get(name)) for name, shape in shapes.items()}
    problems += _unusable(
        [e for e in entries if e.name in expected or PARTS_OF_KV_B.search(e.name)]
    )
    check_tensors(where, config, _with_parts(config, shapes, expected, problems), problems)
    return config


def _tokenizer_faults(header: Header, rows: int) -> list[str]:
    """What counts and ids tell of a tokenizer that cannot be right; its texts are not read."""
    tokens = header.long_arrays.get("tokenizer.ggml.tokens")
    if tokens is None:
        return []
    problems = []
    if tokens.count > rows:
        problems.append(f"the vocabulary has {tokens.count} tokens, the embedding only {rows} rows")
    types = _items(header, "tokenizer.ggml.token_type")
    if types not in (None, tokens.count):
        problems.append(f"tokenizer.ggml.token_type has {types} items for {tokens.count} tokens")
    for name in ("bos", "eos", "eot", "eom"):
        token = header.fields.get(key := f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < tokens.count):
            problems.append(f"{key} is {short(token)}, expected 0 to {tokens.count - 1}")
    return problems


def _items(header: Header, key: str) -> int | None:
    """How many items an array has; None where there is no such array."""
    if (long := header.long_arrays.get(key)) is not None:
        return long.count
    found = header.fields.get(key)
    return len(found) if isinstance(found, list) else None


def is_nextn(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is of a layer for next-token prediction."""
    found = _BLOCK.match(name)
    return found is not None and int(found[1]) >= config.num_layers


def unused_tensors(config: ModelConfig, names: Collection[str]) -> list[str]:
    """Those of a file's tensors that the model has no use for, next-token prediction aside."""
    known = set(expected_tensors(config))
    if isinstance(config.attention, MLASizes):
        fused = (name for name in names if name.endswith(".attn_kv_b.weight"))
        known |= {name for name in fused if name.replace("kv_b", "k_b") not in names}
    return [name for name in names if name not in known and not is_nextn(config, name)]


def _without_place(config: ModelConfig, names: Collection[str]) -> list[str]:
    """Unused tensors that say of a model that it is another one: without them it would answer, and
    wrongly. A bias, a scale, a matrix of a layer; not angles, nor `attn_kv_b` beside its parts."""
    alike: dict[str, list[str]] = {}
    for name in unused_tensors(config, names):
        of_mla = isinstance(config.attention, MLASizes) and PARTS_OF_KV_B.search(name)
        weighs = _BLOCK.match(name) or name.endswith((".bias", ".scale"))
        if weighs and not of_mla and not _ANGLES.search(name):
            alike.setdefault(_BLOCK.sub("", name), []).append(name)
    return [
        f"{first}{f' and {len(more)} more like it have' if more else ' has'} no place in a model "
        "of this kind"
        for first, *more in alike.values()
    ]


def by_head(shape: Shape, expected: Shape | None) -> Shape:
    """(H, rows, columns) for (H * rows, columns): some early files keep the heads in one matrix."""
    if expected is not None and len(expected) == 3 and len(shape) == 2:
        heads, rows, columns = expected
        if shape == (heads * rows, columns):
            return expected
    return shape


def _with_parts(
    config: ModelConfig,
    stored: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    problems: list[str],
) -> dict[str, Shape]:
    """The shapes of a file, where a fused tensor counts for its two parts."""
    shapes = dict(stored)
    if isinstance(config.attention, MLASizes):
        wanted = fused_kv_b(config.attention)
        for layer in range(config.num_layers):
            fused = f"blk.{layer}.attn_kv_b.weight"
            if fused not in shapes or f"blk.{layer}.attn_k_b.weight" in shapes:
                continue
            if shapes[fused] != wanted:
                problems.append(f"{fused} has shape {shapes[fused]}, expected {wanted}")
            for part in ("k", "v"):
                split = f"blk.{layer}.attn_{part}_b.weight"
                shapes[split] = expected[split]
    return shapes


def _unusable(entries: Sequence[TensorEntry]) -> list[str]:
    """Tensors that the model needs, in types that gguf knows and nobody computes with."""
    unusable: dict[str, list[str]] = {}
    for entry in entries:
        kind = type_name(entry.type_number)
        if kind.lower() not in FORMATS:
            unusable.setdefault(kind, []).append(entry.name)
    usable = ", ".join(name.upper() for name, f in FORMATS.items() if f.ggml_type is not None)
    return [
        f"{names[0]}"
        + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
        + f": {kind}, which no kernel here computes; usable: {usable}"
        for kind, names in unusable.items()
    ]
