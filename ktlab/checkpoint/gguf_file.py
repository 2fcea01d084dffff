"""GGUF files as checkpoints: memory-mapped, checked, nothing decoded before it is asked for."""

import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint import kv_b
from ktlab.checkpoint.checkpoint import CheckpointView, check_tensors, unknown_tensor
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.checkpoint.header import Header, TensorEntry, type_name
from ktlab.checkpoint.metadata import config_from_metadata
from ktlab.checkpoint.names import Shape, expected_tensors, fused_kv_b
from ktlab.checkpoint.shards import SHARD, read_headers, shard_paths
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError, short
from ktlab.quantization import FORMATS, QTensor, get_format

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_PARTS = re.compile(r"\.attn_(k_b|v_b|kv_b)\.weight$")
_ANGLES = re.compile(r"\b(attn_rot_embd|rope_\w+)\.weight$")
"""Tables that llama.cpp skips or computes for itself (gguf-py MODEL_TENSOR_SKIP)."""


class GGUFCheckpoint(CheckpointView):
    """A GGUF file or its shards; `path` is the file, any of the shards, or their folder.

    MLA's up-projection may be stored fused (`attn_kv_b`, older files) or split (`attn_k_b` and
    `attn_v_b`); each is made from the other when it is asked for (`kv_b`). Layers for next-token
    prediction are listed in `nextn`, and nothing is done with them.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self._headers = read_headers(shard_paths(Path(path)))
        self.files = tuple(header.path for header in self._headers)
        self.path = self.files[0]
        self._where = self.path.name
        self.name = name or SHARD.sub(".gguf", self._where)
        self.config = read_config(self._where, self._headers)
        expected = expected_tensors(self.config)
        self._entries = {
            entry.name: (
                number,
                replace(entry, shape=by_head(entry.shape, expected.get(entry.name))),
            )
            for number, header in enumerate(self._headers)
            for entry in header.entries
        }
        self._maps = [_Mapped(header.path, header.size) for header in self._headers]
        self.metadata: Mapping[str, object] = GGUFMetadata(
            self._where, self._headers[0], self._maps[0]
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the file, a token for every row of the embedding; None where there is
        none."""
        if "tokenizer.ggml.model" not in self.metadata:
            return None
        return Tokenizer.from_gguf(self.metadata, self._where).padded(self.config.vocab_size)

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(expected_tensors(self.config))

    @cached_property
    def nextn(self) -> list[str]:
        """Tensors of the layers for next-token prediction, which are not run."""
        return [name for name in self._entries if is_nextn(self.config, name)]

    @cached_property
    def unused(self) -> list[str]:
        """Tensors in the file that the model does not use, `nextn` aside."""
        return unused_tensors(self.config, self._entries)

    @property
    def ignored(self) -> list[str]:
        """`unused`: what the model would be wrong without has been refused."""
        return self.unused

    def tensor(self, name: str) -> QTensor:
        """The tensor of that canonical name; its bytes are a read-only view of the file."""
        if name in self._entries:
            return self._stored(name)
        part = _PARTS.search(name)
        if part is not None and isinstance(self.config.attention, MLASizes):
            sizes, layer = self.config.attention, name[: part.start()]
            keys, values, fused = (f"{layer}.attn_{kind}.weight" for kind in ("k_b", "v_b", "kv_b"))
            if fused in self._entries:
                split = kv_b.split_keys if part[1] == "k_b" else kv_b.split_values
                return split(name, self._stored(fused), sizes)
            if part[1] == "kv_b" and keys in self._entries and values in self._entries:
                return kv_b.fuse(name, self._stored(keys), self._stored(values), sizes)
        raise unknown_tensor(self._where, name, self.names())

    def stored(self) -> Iterator[QTensor]:
        """The tensors of the file, under the names that they have there."""
        return map(self._stored, self._entries)

    def _stored(self, name: str) -> QTensor:
        number, entry = self._entries[name]
        format = get_format(gguf.GGMLQuantizationType(entry.type_number))
        raw = self._maps[number].checked()[entry.offset : entry.offset + entry.nbytes]
        return QTensor(
            name=name,
            format=format,
            shape=entry.shape,
            blocks=raw.reshape(entry.shape[:-1] + (format.row_bytes(entry.shape[-1]),)),
            source=self.files[number].name,
        )

    def listing(self) -> list[tuple[str, str, Shape, int]]:
        """(name, format, shape, bytes) of each tensor in the file."""
        return [
            (name, type_name(entry.type_number).lower(), entry.shape, entry.nbytes)
            for name, (_, entry) in self._entries.items()
        ]

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file was written to since it was opened.

        What is mapped would no longer be what was checked, and a file that became shorter would
        end the process at the next look at what is gone.
        """
        for mapped in self._maps:
            mapped.checked()


class _Mapped:
    """A file's bytes, read-only, and what it was like when they were mapped."""

    def __init__(self, path: Path, size: int) -> None:
        # Kept open: a file that is replaced keeps its bytes for us, and only writing to it matters.
        self._path, self._file = path, path.open("rb")
        self._then = _state(self._file.fileno())
        if self._then[0] != size:
            raise CheckpointError(
                f"{path.name}: {size:,} bytes while its header was read, now {self._then[0]:,}; "
                "open it when nobody is writing to it any more"
            )
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)

    def checked(self) -> NDArray[np.uint8]:
        """The bytes; `CheckpointError` if the file is not as it was."""
        now = _state(self._file.fileno())
        if now != self._then:
            raise CheckpointError(
                f"{self._path.name} was written to since it was opened ({self._then[0]:,} bytes "
                f"then, {now[0]:,} now); its weights are not those that were checked: load it again"
            )
        return self._data


def _state(descriptor: int) -> tuple[int, int]:
    """Size and time of the last change."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


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
    problems += _unusable([e for e in entries if e.name in expected or _PARTS.search(e.name)])
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
    key = "tokenizer.ggml.token_type"
    types, short_types = header.long_arrays.get(key), header.fields.get(key)
    count = types.count if types is not None else tokens.count
    count = len(short_types) if isinstance(short_types, list) else count
    if count != tokens.count:
        problems.append(f"{key} has {count} items for {tokens.count} tokens")
    for name in ("bos", "eos", "eot", "eom"):
        token = header.fields.get(key := f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < tokens.count):
            problems.append(f"{key} is {short(token)}, expected 0 to {tokens.count - 1}")
    return problems


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
        of_mla = isinstance(config.attention, MLASizes) and _PARTS.search(name)
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


class GGUFMetadata(Mapping[str, object]):
    """A GGUF's metadata as plain Python values; long arrays are read when asked for."""

    def __init__(self, where: str, header: Header, mapped: _Mapped) -> None:
        self._where, self._header, self._mapped = where, header, mapped

    def __getitem__(self, key: str) -> object:
        long = self._header.long_arrays.get(key)
        if long is not None:
            return long.read(self._mapped.checked(), f"{self._where}: {key}")
        return self._header.fields[key]

    def __contains__(self, key: object) -> bool:
        return key in self._header.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.fields)

    def __len__(self) -> int:
        return len(self._header.fields)

    def __repr__(self) -> str:
        return f"GGUFMetadata({len(self)} fields: {', '.join(list(self)[:6])}, ...)"
