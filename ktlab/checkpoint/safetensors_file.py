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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.names import Shape
from ktlab.errors import CheckpointError, short

LARGEST_HEADER = 100_000_000
"""Bytes of JSON; the library has the same limit."""
_KEYS = {"dtype", "shape", "data_offsets"}
_INTEGER = {int}  # and no bool
DTYPE_BYTES = (
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
    | {f"{kind}{8 * size}": size for kind in "IU" for size in (1, 2, 4, 8)}
    | {"BOOL": 1, "C64": 8}
)
"""Bytes of an element; types of less than a byte are not read here."""
DAMAGED = "the file is damaged: copy or download it again"


class Kind(NamedTuple):
    """What many tensors of a file have in common."""

    dtype: str
    shape: Shape
    nbytes: int


class StoredTensor(NamedTuple):
    """One entry of a header. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: Shape
    offset: int
    nbytes: int
    path: Path


class Columns(NamedTuple):
    """Names of a file's tensors, and where each one's bytes start, counted from `base`."""

    names: Iterable[str]
    starts: Iterable[int]
    base: int


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of files by name, kept as columns: an entry is made for whoever asks for it.

    DeepSeek-V3 has 90 thousand, and a plan of it looks at a thousand.
    """

    def __init__(self, kinds: dict[str, Kind], offsets: Mapping[Path, Columns]) -> None:
        self.kinds = kinds
        self._offsets = offsets

    @classmethod
    def joined(cls, parts: Sequence["StoredTensors"]) -> "StoredTensors":
        """Those of all parts; of a name that is in several, the last."""
        kinds: dict[str, Kind] = {}
        offsets: dict[Path, Columns] = {}
        for part in parts:
            kinds.update(part.kinds)
            offsets.update(part._offsets)
        return cls(kinds, offsets)

    def only(self, names: Iterable[str]) -> "StoredTensors":
        """Those of these names."""
        kinds = {name: self.kinds[name] for name in names}
        offsets: dict[Path, Columns] = {}
        for path, columns in self._offsets.items():
            starts = zip(columns.names, columns.starts, strict=True)
            kept = {name: at for name, at in starts if name in kinds}
            offsets[path] = Columns(kept.keys(), kept.values(), columns.base)
        return StoredTensors(kinds, offsets)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order in which they were read."""
        return tuple(self._offsets)

    @cached_property
    def _places(self) -> dict[str, tuple[int, Path]]:
        return {
            name: (columns.base + start, path)
            for path, columns in self._offsets.items()
            for name, start in zip(columns.names, columns.starts, strict=True)
        }

    def __getitem__(self, name: str) -> StoredTensor:
        dtype, shape, nbytes = self.kinds[name]
        offset, path = self._places[name]
        return StoredTensor(name, dtype, shape, offset, nbytes, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds


def read_header(path: Path) -> StoredTensors:
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
        raw = file.read(length)
    regular = _regular(raw, path, size - 8 - length)
    if regular is not None:
        return regular
    content = read_json(raw, f"{where}: the header")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: the header is no JSON object; {DAMAGED}")
    content.pop("__metadata__", None)
    data_start, room = 8 + length, size - 8 - length
    problems: list[str] = []
    kinds: dict[str, Kind] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in content.items():
        if fault := _fault(entry, room):
            problems.append(f"{name} {fault}")
            continue
        start, end = entry["data_offsets"]
        spans.append((start, end, name))
        kinds[name] = Kind(entry["dtype"], tuple(entry["shape"]), end - start)
    problems = problems or _gaps(spans, room)
    if problems:
        raise CheckpointError(together(where, problems, DAMAGED))
    starts = [start for start, _, _ in spans]
    return StoredTensors(kinds, {path: Columns(list(kinds), starts, data_start)})


_METADATA = re.compile(r'\{(?:"__metadata__":\{[^{}]*\},)?')
_SHAPE = re.compile(r":\[((?:0|[1-9]\d{0,17})(?:,(?:0|[1-9]\d{0,17})){0,7})?\],")
# A header cut at its quotation marks: ten pieces an entry, six of them always the same.
_NAME, _DTYPE, _DIMENSIONS, _OFFSETS, _PIECES = 1, 5, 8, 10, 10
_ALWAYS = {2: ":{", 3: "dtype", 4: ":", 6: ",", 7: "shape", 9: "data_offsets"}
_DIGITS = b"0123456789"
_PLAIN = bytes(byte for byte in range(32, 127) if byte != ord("\\"))
_NBYTES = itemgetter(Kind._fields.index("nbytes"))


def _regular(raw: bytes, path: Path, room: int) -> StoredTensors | None:
    """The entries of a header written as the library writes it, tensors in the order of their
    bytes; None for any other and for anything wrong, which takes JSON and words.

    No step handles entries one by one in Python: DeepSeek-V3's 90 thousand take a quarter of the
    time that JSON's objects take.
    """
    if raw.translate(None, _PLAIN):  # escapes, control characters, other alphabets
        return None
    text = raw.decode("ascii").rstrip(" ")
    head = _METADATA.match(text)
    if head is None or not text.endswith("}}"):
        return None
    pieces = text[head.end() : -1].split('"')
    count = len(pieces) // _PIECES
    if not count or len(pieces) != 1 + _PIECES * count or pieces[0]:
        return None
    if any(pieces[at::_PIECES] != [word] * count for at, word in _ALWAYS.items()):
        return None
    offsets = "".join(pieces[_OFFSETS::_PIECES]) + ","  # the last entry has no comma
    if offsets.encode().translate(None, _DIGITS) != b":[,]}," * count:
        return None
    try:
        ends = json.loads("[" + offsets[2:-3].replace("]},:[", ",") + "]")
    except ValueError:  # 007, or nothing between two commas
        return None
    starts = ends[::2]
    del ends[::2]
    described = list(zip(pieces[_DTYPE::_PIECES], pieces[_DIMENSIONS::_PIECES], strict=True))
    distinct = set(described)
    known = {words: kind for words in distinct if (kind := _kind(*words)) is not None}
    if len(known) < len(distinct):
        return None
    kinds = list(map(known.__getitem__, described))
    covered = [0, *accumulate(map(_NBYTES, kinds))]
    if starts != covered[:-1] or ends != covered[1:] or covered[-1] != room:
        return None
    names = pieces[_NAME::_PIECES]
    by_name = dict(zip(names, kinds, strict=True))
    if len(by_name) != count or "__metadata__" in by_name:
        return None
    return StoredTensors(by_name, {path: Columns(names, starts, 8 + len(raw))})


def _kind(dtype: str, dimensions: str) -> Kind | None:
    """Type, shape and bytes of an entry; None if they are not as they should be."""
    found = _SHAPE.fullmatch(dimensions)
    if found is None or dtype not in DTYPE_BYTES:
        return None
    shape = tuple(map(int, found[1].split(","))) if found[1] else ()
    return Kind(dtype, shape, math.prod(shape) * DTYPE_BYTES[dtype])


def read_json(raw: bytes, what: str) -> Any:
    """Parsed JSON; CheckpointError if it is none."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {error}; {DAMAGED}") from None


def _fault(entry: object, room: int) -> str:
    """What is wrong with the description of a tensor in `room` bytes of data; "" if nothing is."""
    if not isinstance(entry, dict) or not _KEYS <= entry.keys():
        return f"is described by {short(entry)}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"is of type {short(dtype)}, expected one of {', '.join(DTYPE_BYTES)}"
    # Types first: a product over texts would be as long as the numbers between them say.
    if not isinstance(shape, list) or not _INTEGER.issuperset(map(type, shape)) or len(shape) > 8:
        return f"has shape {short(shape)}, expected a list of whole numbers"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not _INTEGER.issuperset(map(type, offsets))
        or not 0 <= offsets[0] <= offsets[1]
    ):
        return f"has data_offsets {short(offsets)}, expected where it starts and ends"
    if shape and min(shape) < 0:
        return f"has shape {short(shape)}, expected no negative number"
    start, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != end - start:
        dimensions = "×".join(map(str, shape)) or "a single number"
        return f"is {dtype} {dimensions}, {nbytes} bytes, but its offsets span {end - start}"
    if end > room:
        return f"would end at byte {end} of the data, but the file has only {room} (truncated?)"
    return ""


def _gaps(spans: list[tuple[int, int, str]], room: int) -> list[str]:
    """Tensors that overlap, and bytes that belong to none: the format has neither.

    So a name that appears twice is found too: JSON keeps the last, and the first leaves a gap.
    """
    problems = []
    covered, before = 0, "the header"
    for start, end, name in sorted(spans):
        if start != covered:
            how = "overlaps" if start < covered else f"leaves {start - covered} bytes after"
            problems.append(f"{name} {how} {before}")
        covered, before = max(covered, end), name
    if covered != room:
        problems.append(f"{room - covered} bytes after {before} belong to no tensor")
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
    def _file(self) -> BinaryIO:
        # Kept open: a file that is replaced keeps the bytes that are mapped.
        return self.path.open("rb")

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, np.uint8)

    def bytes_of(self, entry: StoredTensor) -> NDArray[np.uint8]:
        """The tensor's bytes, read-only; `CheckpointError` if the file is not as it was opened."""
        if self._now() != self._stamp:
            raise self._changed()
        return self._data[entry.offset : entry.offset + entry.nbytes]

    def check_unchanged(self) -> None:
        """`CheckpointError` if what is mapped was written to since the file was opened."""
        if "_data" in vars(self):
            status = os.fstat(self._file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not as it was when it was opened; load the model again"
        )
