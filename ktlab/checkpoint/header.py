"""Is this file what it says? A walk over a GGUF's header that trusts nothing.

Before the `gguf` package reads a file, every length and offset in its header is checked against
the file's size, so that a truncated, corrupt or malicious file is refused with a clear message
and before anything large is allocated. Metadata is read, but of arrays of texts (vocabularies)
only the length: that is what makes a header of 671 billion parameters readable in a moment.
Source: the GGUF specification, github.com/ggml-org/ggml docs/gguf.md.
"""

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import together
from ktlab.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
LONG = 1024
"""Arrays of more items than this are no hyper-parameters: only their length is kept."""
LONGEST_NAME, LONGEST_TEXT = 1 << 16, 1 << 24
_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in _CODES.items()}
_LENGTH = struct.Struct("<Q")
_SMALLEST_FIELD, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
"""Bytes that the shortest possible metadata field and tensor entry take."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One line of the file's table of tensors. `offset` counts from the start of the file."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    """NumPy order."""
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class LongArray:
    """Where an array lies that was stepped over: `count` items of a GGUF type from byte `start`."""

    start: int
    count: int
    item: int

    def read(self, data: NDArray[np.uint8], what: str) -> list[Any]:
        """Its items; `data` is the whole file that the header came from."""
        if self.item != _STRING:
            code = _CODES[self.item]
            end = self.start + self.count * struct.calcsize(code)
            return [
                _plain(v, self.item)
                for v in struct.unpack(f"<{self.count}{code}", data[self.start : end].tobytes())
            ]
        items, position, read = [], self.start, _LENGTH.unpack_from
        view = data.data
        for index in range(self.count):
            length = read(view, position)[0]
            position += 8 + length
            try:
                items.append(str(view[position - length : position], "utf-8"))
            except UnicodeDecodeError:
                raise CheckpointError(
                    f"{what} cannot be read: item {index} is no UTF-8; the file is corrupt"
                ) from None
        return items


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything before the weights of one GGUF file."""

    path: Path
    fields: dict[str, Any]
    """Metadata as plain Python values; of an array of texts or a long one only the length."""
    long_arrays: dict[str, LongArray]
    """Those arrays, to be read when they are asked for."""
    entries: list[TensorEntry]
    size: int
    """Bytes of the whole file."""


class _Cursor:
    """Reads forward through the header; asking for more than there is raises."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.position = data, where, 0

    def skip(self, count: int, what: str) -> int:
        """Move over `count` bytes; the position before them."""
        start = self.position
        if count > len(self.data) - start:
            raise CheckpointError(
                f"{self.where}: {what} would need {count} bytes at byte {start}, but the file "
                f"ends at {len(self.data)}; it is truncated or corrupt: copy or download it again"
            )
        self.position = start + count
        return start

    def number(self, code: str, what: str) -> int:
        start = self.skip(struct.calcsize("<" + code), what)
        return int(struct.unpack_from("<" + code, self.data, start)[0])

    def string(self, what: str) -> str:
        start = self.text(LONGEST_NAME, what)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            message = f"{self.where}: {what} is no UTF-8; the file is corrupt"
            raise CheckpointError(message) from None

    def text(self, longest: int, what: str) -> int:
        """Move over a text with its length; the position where its bytes begin."""
        length = self.number("Q", what)
        start = self.skip(length, what)
        if length > longest:
            raise CheckpointError(
                f"{self.where}: {what} is {length} bytes long, expected at most {longest}; "
                "the file is corrupt: copy or download it again"
            )
        return start

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self.number("Q", what)
        room = (len(self.data) - self.position) // smallest
        if count > room:
            raise CheckpointError(
                f"{self.where}: {what} is {count}, but the rest of the file has room for at most "
                f"{room}; it is truncated or corrupt: copy or download it again"
            )
        return count


def read_header(path: Path) -> Header:
    """Metadata and the table of tensors, all inside the file; CheckpointError otherwise."""
    where = path.name
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{where}: not a GGUF file: {size} bytes, expected at least 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, where)
        _check_start(cursor)
        tensor_count = cursor.count(_SMALLEST_TENSOR, "the number of tensors")
        field_count = cursor.count(_SMALLEST_FIELD, "the number of metadata fields")
        fields, long_arrays, alignment = _read_fields(cursor, field_count)
        raw = [_read_entry(cursor, index) for index in range(tensor_count)]
        data_start = -(-cursor.position // alignment) * alignment
        entries = _check_entries(where, raw, data_start, size, alignment)
        return Header(path=path, fields=fields, long_arrays=long_arrays, entries=entries, size=size)


def _check_start(cursor: _Cursor) -> None:
    start = cursor.skip(4, "the magic number")
    magic = cursor.data[start : start + 4]
    if magic != MAGIC:
        raise CheckpointError(
            f"{cursor.where}: not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}; "
            "convert other checkpoints with llama.cpp's convert_hf_to_gguf.py"
        )
    version = cursor.number("I", "the version")
    if version in VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{cursor.where}: big-endian GGUF; only little-endian is read here")
    newer = "; it was made for a later reader" if VERSIONS[-1] < version < 100 else ""
    raise CheckpointError(
        f"{cursor.where}: GGUF version {version}, expected one of {VERSIONS}{newer}"
    )


def _read_fields(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, LongArray], int]:
    """The metadata, the arrays in it that were stepped over, and the alignment of the tensors."""
    fields: dict[str, Any] = {}
    long_arrays: dict[str, LongArray] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        key = cursor.string(f"the name of metadata field {index}")
        kind = cursor.number("I", key)
        value = _read_value(cursor, kind, key)
        if isinstance(value, LongArray):
            long_arrays[key], value = value, value.count
        fields[key] = value
        if key == "general.alignment":
            alignment = fields[key] if kind == 4 else 0
            if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
                raise CheckpointError(
                    f"{cursor.where}: general.alignment is not a power of two up to 2**20"
                )
    return fields, long_arrays, alignment


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _CODES:
        start = cursor.skip(_SCALAR_BYTES[kind], key)
        return _plain(struct.unpack_from("<" + _CODES[kind], cursor.data, start)[0], kind)
    if kind == _STRING:
        start = cursor.text(LONGEST_TEXT, key)
        # Not refused here where it is no UTF-8: some field that nobody reads may be odd.
        return cursor.data[start : cursor.position].decode("utf-8", errors="replace")
    if kind == _ARRAY:
        item = cursor.number("I", key)
        if item == _STRING:
            count = cursor.count(8, f"the length of {key}")
            start = cursor.position
            _skip_strings(cursor, count, key)
            return LongArray(start=start, count=count, item=item)
        if item in _CODES:
            width = _SCALAR_BYTES[item]
            count = cursor.count(width, f"the length of {key}")
            start = cursor.skip(width * count, key)
            if count > LONG:
                return LongArray(start=start, count=count, item=item)
            values = struct.unpack_from(f"<{count}{_CODES[item]}", cursor.data, start)
            return [_plain(value, item) for value in values]
        raise CheckpointError(f"{cursor.where}: {key} is an array of unknown type {item}")
    raise CheckpointError(
        f"{cursor.where}: metadata field {key!r} has unknown type {kind}; the file is corrupt"
    )


def _plain(value: Any, kind: int) -> Any:
    """A float32 as the shortest decimal that means it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if kind == 6 else value


def _skip_strings(cursor: _Cursor, count: int, key: str) -> None:
    """Step over `count` texts; the loop of all others, for vocabularies have 10^5."""
    data, position, read = cursor.data, cursor.position, _LENGTH.unpack_from
    size = len(data)
    for _ in range(count):
        if position + 8 > size:
            break
        position += 8 + read(data, position)[0]
    else:
        cursor.skip(position - cursor.position, key)
        return
    cursor.skip(position + 8 - cursor.position, key)  # raises: it lies past the end
    raise AssertionError("unreachable")


def _read_entry(cursor: _Cursor, index: int) -> TensorEntry:
    name = cursor.string(f"the name of tensor {index}")
    dimensions = cursor.number("I", name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.where}: {name} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.number("Q", name) for _ in range(dimensions))[::-1]
    type_number = cursor.number("I", name)
    offset = cursor.number("Q", name)
    return TensorEntry(name=name, type_number=type_number, shape=shape, offset=offset, nbytes=0)


def _check_entries(
    where: str, raw: list[TensorEntry], data_start: int, size: int, alignment: int
) -> list[TensorEntry]:
    """Sizes from types and shapes; each tensor inside the file, right after the one before."""
    problems = [f"{n} appears {k} times" for n, k in Counter(e.name for e in raw).items() if k > 1]
    entries: list[TensorEntry] = []
    beyond: list[tuple[str, int]] = []
    next_offset: int | None = 0
    for entry in raw:
        shape = "×".join(str(n) for n in entry.shape)
        kind = type_name(entry.type_number)
        if kind.startswith("unknown"):
            problems.append(f"{entry.name}: {kind}, which no kernel here computes")
            next_offset = None
            continue
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if min(entry.shape) < 1 or entry.shape[-1] % block_size:
            problems.append(
                f"{entry.name} is {kind} {shape}: a row must be a multiple of {block_size}"
            )
            next_offset = None
            continue
        nbytes = math.prod(entry.shape) // block_size * block_bytes
        start = data_start + entry.offset
        if start + nbytes > size:
            beyond.append((entry.name, start + nbytes))
        elif next_offset is not None and entry.offset != next_offset:
            problems.append(
                f"{entry.name} starts at byte {entry.offset} of the data, but by types and shapes "
                f"the tensors before it end at {next_offset}: one of them lies about its size"
            )
        next_offset = -(-(entry.offset + nbytes) // alignment) * alignment
        entries.append(
            TensorEntry(
                name=entry.name,
                type_number=entry.type_number,
                shape=entry.shape,
                offset=start,
                nbytes=nbytes,
            )
        )
    if beyond:
        name, end = max(beyond, key=lambda item: item[1])
        problems.append(
            f"{len(beyond)} of {len(raw)} tensors lie beyond the end of the file, the last of them "
            f"{name}: it would end at byte {end}, but the file ends at {size} (truncated?)"
        )
    if problems:
        advice = "the file is damaged or of another kind: download or convert it again"
        raise CheckpointError(together(where, problems, advice))
    return entries


def type_name(number: int) -> str:
    """The name of a ggml type, e.g. "Q4_K"; "unknown type 99" for one that gguf does not know."""
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"unknown type {number}"
