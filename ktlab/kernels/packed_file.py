"""Packed weights on disk: one tensor a file, a header that describes it, mapped again at a start.

Header: 192 bytes as ktlab_ext/csrc/header.c has them; the C core writes and reads it where it is
there. A file appears complete under its name or not at all.
"""

import errno
import hashlib
import mmap
import os
import re
import socket
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import CheckpointError, FormatError, SettingError
from ktlab.kernels import native, packing
from ktlab.kernels.weights import Weights, check_cols
from ktlab.quantization import QTensor

HEADER_BYTES = 192
SUFFIX, PARTIAL = ".ktlpack", ".part"
DIGEST_CHARACTERS = 48
SAMPLES = 4096
"""Bytes of a file's tensor that its digest looks at, besides the file's own identity."""

_MAGIC, _VERSION = b"KTLPACK\0", 1
_FIELDS = struct.Struct("<8sII16sqqqq64s56s")
_LARGEST = (1 << 63) - 1


class Header(NamedTuple):
    """What a packed file says of itself."""

    format: str
    experts: int
    rows: int
    cols: int
    source: str
    """Digest of what it was packed from."""


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def write_header(header: Header) -> bytes:
    """The 192 bytes before the data."""
    if not native.unavailable():
        return native.header_write(*header)
    return plain_header(header)


def plain_header(header: Header) -> bytes:
    """`write_header` without the C core, byte for byte the same."""
    format, *matrices, source = header
    experts, rows, cols = matrices
    data_bytes = packing.packed_size(format, (experts, rows, cols))
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, HEADER_BYTES, format.encode(), *matrices, data_bytes, source.encode(), b""
    )
    return fields + struct.pack("<Q", _fnv1a(fields))


def read_header(data: NDArray[np.uint8], total_bytes: int) -> Header:
    """The header at the start of `data`; ValueError that says what was expected and found."""
    if not native.unavailable():
        return Header(*native.header_read(data, total_bytes))
    return read_plain_header(bytes(data[:HEADER_BYTES]), total_bytes)


def read_plain_header(raw: bytes, total_bytes: int) -> Header:
    """`read_header` without the C core: trusts nothing either, and refuses the same."""
    if min(len(raw), total_bytes) < HEADER_BYTES:
        raise ValueError(f"expected {HEADER_BYTES} bytes of header, found {len(raw)}")
    fields, (stated,) = raw[:-8], struct.unpack("<Q", raw[-8:])
    magic, version, size, format, *matrices, data_bytes, source, zeros = _FIELDS.unpack(fields)
    if magic != _MAGIC:
        raise ValueError("expected the magic KTLPACK, found other bytes")
    if version != _VERSION:
        raise ValueError(f"expected version {_VERSION}, found {version}; pack again")
    if _fnv1a(fields) != stated or size != HEADER_BYTES:
        raise ValueError("the header's checksum does not fit; pack again")
    if any(zeros):
        raise ValueError("expected zeros before the checksum, found other bytes; pack again")
    experts, rows, cols = (int(size) for size in matrices)
    name, digest = _text(format), _text(source)
    try:
        # As in header.c: room for padding and 4 bytes a value.
        there = min(experts, rows, cols) > 0 and rows * cols <= _LARGEST >> 12
        expected = packing.packed_size(name, (experts, rows, cols)) if there else -1
        check_cols(name, cols)
    except FormatError as error:
        raise ValueError(str(error)) from error
    if data_bytes != expected or total_bytes - HEADER_BYTES != expected:
        raise ValueError(
            f"expected {expected} bytes of data for {name} {matrices}, found {data_bytes} stated "
            f"and {total_bytes - HEADER_BYTES} there"
        )
    return Header(name, experts, rows, cols, digest)


def _text(field: bytes) -> str:
    """A header's word: printable, then zeros to the end, at least one."""
    text, end, rest = field.partition(b"\0")
    if not end or any(rest) or not all(0x20 <= byte <= 0x7E for byte in text):
        raise ValueError("expected printable names of format and source, found other bytes")
    return text.decode("ascii")


def open_packed(path: str | Path) -> tuple[Header, Weights]:
    """A packed file, mapped and not copied; `CheckpointError` if it is not what it says."""
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, mode="r")
        header = read_header(data, data.nbytes)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is no packed tensor that can be used: {error}; delete it and pack again"
        ) from error
    matrices = (header.experts, header.rows, header.cols)
    body = np.asarray(data)[HEADER_BYTES:]
    return header, packing.packed_view(header.format, matrices, body)


def file_identity(path: Path) -> str:
    """Changes with the file: size, time of change, and its first MiB, where a GGUF has its header.

    Not the whole content, which may be 400 GB; `source_digest` adds samples of each tensor.
    """
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size}:{stat.st_mtime_ns}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
    return digest.hexdigest()


def source_digest(tensor: QTensor, format: str, identity: str) -> str:
    """Names what a packed tensor was made from: the model file, the tensor in it, the format.

    Without an `identity` (a model in memory) the whole content counts.
    """
    flat = tensor.blocks.reshape(-1)
    step = max(1, flat.nbytes // SAMPLES) if identity else 1
    about = f"{identity}:{tensor.name}:{tensor.format.name}:{tensor.shape}:{format}:"
    digest = hashlib.sha256(about.encode())
    digest.update(np.ascontiguousarray(flat[::step]).data)
    return digest.hexdigest()[:DIGEST_CHARACTERS]


class PackCache:
    """A folder of packed tensors, for one model. What does not fit is packed again and replaced."""

    def __init__(self, folder: str | Path) -> None:
        if not str(folder):
            raise SettingError("cache='' names no folder; expected the path of one for this model")
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cache={str(folder)!r} cannot be used: {error.strerror or error}; name a folder "
                "that can be written to"
            ) from error
        self._host = _word(socket.gethostname())
        self._remove_remains()

    def path(self, name: str, format: str) -> Path:
        """Where the tensor of that name lies in that format."""
        return self.folder / f"{_word(name)}.{format}{SUFFIX}"

    def load(self, name: str, format: str, source: str) -> Weights | None:
        """The packed tensor, mapped; None with a warning if the file is not the one wanted."""
        path = self.path(name, format)
        if not path.exists():
            return None
        try:
            header, weights = open_packed(path)
        except CheckpointError as error:
            warnings.warn(f"{self.folder}: {error}", stacklevel=2)
            return None
        if (header.format, header.source) != (format, source):
            warnings.warn(
                f"{path}: packed from another model or tensor (source {header.source[:12]}, "
                f"expected {source[:12]}); it is packed again and replaced. Give each model a "
                "folder of its own",
                stacklevel=2,
            )
            return None
        return weights

    def store(
        self, name: str, header: Header, fill: Callable[[NDArray[np.uint8]], object]
    ) -> Weights:
        """Let `fill` write the packed bytes into a new file, then put it under its name."""
        path = self.path(name, header.format)
        run = f"{os.getpid()}-{threading.get_ident()}"
        partial = path.with_name(f".{path.stem}.{self._host}.{run}{PARTIAL}")
        size = packing.packed_size(header.format, (header.experts, header.rows, header.cols))
        try:
            with partial.open("w+b") as file:
                # Space is taken first: writing to a mapping of a full disk would end the process.
                os.posix_fallocate(file.fileno(), 0, HEADER_BYTES + size)
                # Unmapped when the last view of it is gone.
                mapped = mmap.mmap(file.fileno(), HEADER_BYTES + size)
                data = np.frombuffer(mapped, np.uint8)
                fill(data[HEADER_BYTES:])
                data[:HEADER_BYTES] = np.frombuffer(write_header(header), np.uint8)
                mapped.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = f"free {(size >> 20) + 1} MiB" if full else "name another folder"
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}; {advice} or pack without a "
                "cache"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return open_packed(path)[1]

    def _remove_remains(self) -> None:
        """Delete what a killed run on this machine has left unfinished."""
        for partial in self.folder.glob(f".*.{self._host}.*{PARTIAL}"):
            run = partial.name.removesuffix(PARTIAL).rpartition(".")[2]
            process = run.partition("-")[0]
            if process.isdigit() and not _alive(int(process)):
                with suppress(OSError):
                    partial.unlink()


def _word(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
