"""One safetensors file: its header checked, its bytes mapped.

The `safetensors` library maps files too, but stops at the first thing that is wrong, hands bfloat16
and float8 to torch only, and keeps its mapping to itself: pages that were read could not be given
back while a model is converted. A header is a length and a JSON object, so it is read here; the
tests write files with the library.
Source: github.com/huggingface/safetensors, README "Format".
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.names import Shape
from ktlab.errors import CheckpointError, short

LARGEST_HEADER = 100_000_000
"""Bytes of JSON; the library has the same limit."""
LARGEST_SIZE = 2**62
DTYPE_BYTES = (
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
    | {f"{kind}{8 * size}": size for kind in "IU" for size in (1, 2, 4, 8)}
    | {"BOOL": 1, "C64": 8}
)
"""Bytes of an element; types of less than a byte are not read here."""
DAMAGED = "the file is damaged: copy or download it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One entry of a header. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: Shape
    offset: int
    nbytes: int
    path: Path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, which lie inside it and side by side; CheckpointError otherwise.

    Only the header is read, so this is quick for a file of any size.
    """
    where = path.name
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise CheckpointError(
                f"{where}: not a safetensors file, or a truncated one: its header would have "
                f"{length} bytes, the file has {size}, a header at most {LARGEST_HEADER}"
            )
        content = read_json(file.read(length), f"{where}: the header")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: the header is no JSON object; {DAMAGED}")
    content.pop("__metadata__", None)
    data_bytes = size - 8 - length
    problems: list[str] = []
    entries = {}
    for name, entry in content.items():
        found = _entry(name, entry, data_bytes)
        if isinstance(found, str):
            problems.append(found)
            continue
        dtype, shape, (start, end) = found
        entries[name] = StoredTensor(
            name=name, dtype=dtype, shape=shape, offset=8 + length + start, nbytes=end - start,
            path=path,
        )  # fmt: skip
    if not problems:
        problems = _gaps(entries, 8 + length, size)
    if problems:
        raise CheckpointError(together(where, problems, DAMAGED))
    return entries


def read_json(raw: bytes, what: str) -> Any:
    """Parsed JSON; CheckpointError if it is none, or names something twice."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {error}; {DAMAGED}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears more than once")
    return content


def _entry(name: str, entry: object, room: int) -> tuple[str, Shape, tuple[int, int]] | str:
    """dtype, shape and bytes of one tensor, or what is wrong with it."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"{name} is described by {short(entry)}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"{name} is of type {short(dtype)}, expected one of {', '.join(DTYPE_BYTES)}"
    if not _counts(shape):
        return f"{name} has shape {short(shape)}, expected a list of whole numbers"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"{name} has data_offsets {short(offsets)}, expected where it starts and ends"
    start, end = offsets
    if end > room:
        return (
            f"{name} would end at byte {end} of the data, but the file has only {room} (truncated?)"
        )
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != end - start:
        dimensions = "×".join(map(str, shape)) or "a single number"
        return f"{name} is {dtype} {dimensions}, {nbytes} bytes, but its offsets span {end - start}"
    return dtype, tuple(shape), (start, end)


def _counts(value: object) -> bool:
    """Whether it is a list of a few whole numbers."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < LARGEST_SIZE for n in value)
    )


def _gaps(entries: Mapping[str, StoredTensor], data_start: int, size: int) -> list[str]:
    """Tensors that overlap, and bytes that belong to none: the format has neither."""
    problems = []
    end, before = data_start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            how = "overlaps" if entry.offset < end else f"leaves {entry.offset - end} bytes after"
            problems.append(f"{entry.name} {how} {before}")
        end, before = max(end, entry.offset + entry.nbytes), entry.name
    if end != size:
        problems.append(f"{size - end} bytes after {before} belong to no tensor")
    return problems


class MappedFile:
    """The bytes of a file, mapped at first use; nothing of it is read before it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._now()

    def _now(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, np.uint8)

    def bytes_of(self, entry: StoredTensor) -> NDArray[np.uint8]:
        """The tensor's bytes, read-only; `CheckpointError` if the file is not as it was opened."""
        if self._now() != self._stamp:
            raise CheckpointError(
                f"{self.path} is not as it was when it was opened; load the model again"
            )
        return self._data[entry.offset : entry.offset + entry.nbytes]
