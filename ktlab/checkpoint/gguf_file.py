"""GGUF files as checkpoints: memory-mapped, checked, nothing decoded before it is asked for."""

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint import kv_b
from ktlab.checkpoint.checkpoint import CheckpointView, unknown_tensor
from ktlab.checkpoint.config import MLASizes
from ktlab.checkpoint.gguf_config import (
    PARTS_OF_KV_B,
    by_head,
    is_nextn,
    read_config,
    unused_tensors,
)
from ktlab.checkpoint.header import Header, type_name
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.shards import SHARD, read_headers, shard_paths
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError
from ktlab.quantization import QTensor, get_format


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
        part = PARTS_OF_KV_B.search(name)
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
