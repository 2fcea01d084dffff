"""Is this file what it says? A walk over a GGUF's header that trusts nothing.

Before the `gguf` package reads a file, every length and offset in its header is checked against
the file's size, so that a truncated, corrupt or malicious file is refused with a clear message
and before anything large is allocated. Only integers and names are looked at here.
Source: the GGUF specification, github.com/ggml-org/ggml docs/gguf.md.
"""

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ktlab.checkpoint.checkpoint import together
from ktlab.errors import CheckpointError
from ktlab.quantization import FORMATS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
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
        length = self.number("Q", what)
        start = self.skip(length, what)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            message = f"{self.where}: {what} is no UTF-8; the file is corrupt"
            raise CheckpointError(message) from None

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


def check_header(path: Path) -> list[TensorEntry]:
    """The table of tensors, all of which lie inside the file; CheckpointError otherwise."""
    where = path.name
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{where}: not a GGUF file: {size} bytes, expected at least 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, where)
        _check_start(cursor)
        tensor_count = cursor.count(_SMALLEST_TENSOR, "the number of tensors")
        field_count = cursor.count(_SMALLEST_FIELD, "the number of metadata fields")
        alignment = _walk_fields(cursor, field_count)
        raw = [_read_entry(cursor, index) for index in range(tensor_count)]
        data_start = -(-cursor.position // alignment) * alignment
        return _check_entries(where, raw, data_start, size, alignment)


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
    raise CheckpointError(f"{cursor.where}: GGUF version {version}, expected one of {VERSIONS}")


def _walk_fields(cursor: _Cursor, count: int) -> int:
    """Step over the metadata; returns the alignment of the tensor data."""
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        key = cursor.string(f"the name of metadata field {index}")
        kind = cursor.number("I", key)
        start = cursor.position
        _skip_value(cursor, kind, key)
        if key == "general.alignment":
            value = cursor.data[start : cursor.position]
            alignment = int.from_bytes(value, "little") if kind == 4 else 0
            if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
                raise CheckpointError(
                    f"{cursor.where}: general.alignment is not a power of two up to 2**20"
                )
    return alignment


def _skip_value(cursor: _Cursor, kind: int, key: str) -> None:
    if kind in _SCALAR_BYTES:
        cursor.skip(_SCALAR_BYTES[kind], key)
    elif kind == _STRING:
        cursor.skip(cursor.number("Q", key), key)
    elif kind == _ARRAY:
        item = cursor.number("I", key)
        if item == _STRING:
            for _ in range(cursor.count(8, f"the length of {key}")):
                cursor.skip(cursor.number("Q", key), key)
        elif item in _SCALAR_BYTES:
            width = _SCALAR_BYTES[item]
            cursor.skip(width * cursor.count(width, f"the length of {key}"), key)
        else:
            raise CheckpointError(f"{cursor.where}: {key} is an array of unknown type {item}")
    else:
        raise CheckpointError(
            f"{cursor.where}: metadata field {key!r} has unknown type {kind}; the file is corrupt"
        )


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
    usable = ", ".join(name.upper() for name, f in FORMATS.items() if f.ggml_type is not None)
    problems = [f"{n} appears {k} times" for n, k in Counter(e.name for e in raw).items() if k > 1]
    entries: list[TensorEntry] = []
    unusable: dict[str, list[str]] = {}
    beyond: list[tuple[str, int]] = []
    next_offset: int | None = 0
    for entry in raw:
        shape = "×".join(str(n) for n in entry.shape)
        type_name = _type_name(entry.type_number)
        if type_name.lower() not in FORMATS:
            unusable.setdefault(type_name, []).append(entry.name)
            next_offset = None
            continue
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if min(entry.shape) < 1 or entry.shape[-1] % block_size:
            problems.append(
                f"{entry.name} is {type_name} {shape}: a row must be a multiple of {block_size}"
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
    for type_name, names in unusable.items():
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        problems.append(
            f"{names[0]}{more}: {type_name}, which no kernel here computes; usable: {usable}"
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


def _type_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"unknown type {number}"
