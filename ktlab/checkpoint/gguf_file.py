"""GGUF files as checkpoints: memory-mapped, checked, nothing decoded before it is asked for."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import CheckpointView, check_tensors, unknown_tensor
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.checkpoint.header import Header, TensorEntry, read_header
from ktlab.checkpoint.metadata import config_from_metadata
from ktlab.checkpoint.names import Shape, expected_tensors, fused_kv_b
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError
from ktlab.quantization import QTensor, get_format


class GGUFCheckpoint(CheckpointView):
    """One GGUF file of a DeepSeek-architecture model (llama.cpp's `deepseek2`).

    Older files hold keys and values fused (`attn_kv_b`); they are shown as the split tensors
    `attn_k_b` (decoded to f32, because its axes are swapped) and `attn_v_b` (the same bytes).
    A file without `output.weight` shares `token_embd.weight` for it, as in llama.cpp.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        file = Path(path)
        self.path = file
        self.name = name or file.name
        self._where = file.name
        header = read_header(file)
        self._data: NDArray[np.uint8] = np.memmap(file, np.uint8, mode="r")
        self.metadata: Mapping[str, object] = GGUFMetadata(self._where, header, self._data)
        self._entries = {entry.name: entry for entry in header.entries}
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{self._where}: one of {parts} files of a split checkpoint, which this kit does "
                "not read; join them with llama.cpp's `llama-gguf-split --merge`"
            )
        self.config = self._read_config()
        check_entries(
            self._where, self.config, {name: e.shape for name, e in self._entries.items()}
        )

    def _read_config(self) -> ModelConfig:
        where = self._where
        config = config_from_metadata(
            where, self.metadata, {name: entry.shape for name, entry in self._entries.items()}
        )
        if config.num_layers > len(self._entries):
            key = f"{config.architecture}.block_count"
            raise CheckpointError(
                f"{where}: {key} is {config.num_layers}, but the file has only "
                f"{len(self._entries)} tensors; the file is damaged: download or convert it again"
            )
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the file; None where the file has none."""
        if "tokenizer.ggml.model" not in self.metadata:
            return None
        tokenizer = Tokenizer.from_gguf(self.metadata, self._where)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self._where}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the embedding only {self.config.vocab_size} rows"
            )
        return tokenizer

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(expected_tensors(self.config))

    @cached_property
    def unused(self) -> list[str]:
        """Tensors in the file that the model does not use."""
        known = set(self.names())
        fused = {n for n in self._entries if n.endswith(".attn_kv_b.weight")}
        used_fused = {n for n in fused if n.replace("kv_b", "k_b") not in self._entries}
        return [name for name in self._entries if name not in known | used_fused]

    def tensor(self, name: str) -> QTensor:
        """The tensor of that canonical name; its bytes are a read-only view of the file."""
        if name in self._entries:
            return self._stored(self._entries[name])
        for part in ("k_b", "v_b"):
            if name.endswith(f".attn_{part}.weight"):
                fused = name.replace(f"attn_{part}", "attn_kv_b")
                if fused in self._entries:
                    return self._split(name, self._stored(self._entries[fused]))
        raise unknown_tensor(self._where, name, self.names())

    def stored(self) -> Iterator[QTensor]:
        """The tensors of the file, under the names that they have there."""
        return map(self._stored, self._entries.values())

    def _stored(self, entry: TensorEntry) -> QTensor:
        format = get_format(gguf.GGMLQuantizationType(entry.type_number))
        raw = np.asarray(self._data)[entry.offset : entry.offset + entry.nbytes]
        blocks = raw.reshape(entry.shape[:-1] + (format.row_bytes(entry.shape[-1]),))
        return QTensor(
            name=entry.name,
            format=format,
            shape=entry.shape,
            blocks=blocks,
            source=self._where,
        )

    def _split(self, name: str, fused: QTensor) -> QTensor:
        """Keys (H, C, N) or values (H, V, C) out of fused (H * (N + V), C)."""
        sizes = self.config.mla
        heads, keys = sizes.num_heads, sizes.qk_nope_dim
        source = f"{self._where}, split from attn_kv_b"
        by_head = fused.blocks.reshape(heads, keys + sizes.v_dim, -1)
        if "attn_v_b" in name:
            return QTensor(
                name=name,
                format=fused.format,
                shape=(heads, sizes.v_dim, sizes.kv_lora_rank),
                blocks=by_head[:, keys:],
                source=source,
            )
        keys_HCN = fused.format.dequantize(by_head[:, :keys]).transpose(0, 2, 1)
        made = QTensor.from_array(name, keys_HCN, "f32")
        return QTensor(
            name=name, format=made.format, shape=made.shape, blocks=made.blocks, source=source
        )

    def listing(self) -> list[tuple[str, str, Shape, int]]:
        """(name, format, shape, bytes) of each tensor in the file."""
        return [
            (e.name, gguf.GGMLQuantizationType(e.type_number).name.lower(), e.shape, e.nbytes)
            for e in self._entries.values()
        ]


def check_entries(where: str, config: ModelConfig, stored: Mapping[str, Shape]) -> None:
    """Names and shapes of a file against its configuration; fused tensors count for their parts."""
    shapes = dict(stored)
    problems = []
    expected = expected_tensors(config)
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
    check_tensors(where, config, shapes, problems)


class GGUFMetadata(Mapping[str, object]):
    """A GGUF's metadata as plain Python values; long arrays are read when asked for."""

    def __init__(self, where: str, header: Header, data: NDArray[np.uint8]) -> None:
        self._where, self._header, self._data = where, header, data

    def __getitem__(self, key: str) -> object:
        long = self._header.long_arrays.get(key)
        if long is not None:
            return long.read(self._data, f"{self._where}: {key}")
        return self._header.fields[key]

    def __contains__(self, key: object) -> bool:
        return key in self._header.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.fields)

    def __len__(self) -> int:
        return len(self._header.fields)

    def __repr__(self) -> str:
        return f"GGUFMetadata({len(self)} fields: {', '.join(list(self)[:6])}, ...)"
