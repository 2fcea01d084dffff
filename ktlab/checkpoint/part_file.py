"""Large files written piece by piece: resumable, and never half a file under the final name.

Everything goes to FILE.part, which is renamed once it is whole. A run that was killed goes on where
it was: pieces are numbered by where they lie, so the length of FILE.part says which are there. The
last of them is written again, for it may be torn.
"""

import errno
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import CheckpointError
from ktlab.html import byte_size

try:
    import fcntl
except ImportError:  # not on Windows; two writers of one file are not told apart there
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[float, float], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes [offset, offset + nbytes) of the file; `make` gives the same ones at every call."""

    offset: int
    nbytes: int
    make: Callable[[], NDArray[np.uint8]]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def write_in_pieces(
    path: Path,
    header: bytes,
    pieces: Sequence[Piece],
    total: int,
    progress: Progress | None = None,
) -> Path:
    """Write `header` and then `pieces`, in the order of their offsets; what lies between is zeros.

    `total` is the length of the file. Goes on with a FILE.part that begins with the same header.
    Raises `CheckpointError` if the file is there already, if another process writes it, or if the
    disk has too little room, before or while it is written; what has been written then stays.
    """
    if path.exists():
        raise CheckpointError(f"{path} is there already; remove it or choose another name")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is no folder; make it first or choose another")
    part = part_of(path)
    there = part.exists()
    handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+b") as file:
        _lock(file, part)
        first = _first_missing(file, header, pieces)
        done = pieces[first].offset if first < len(pieces) else total
        file.truncate(min(done, max(len(header), pieces[first - 1].end if first else 0)))
        try:
            check_room(path, total - os.fstat(handle).st_size, total)
        except CheckpointError:
            if not there:
                part.unlink()
            raise
        try:
            file.seek(0)
            file.write(header)
            for index in range(first, len(pieces)):
                if progress is not None:
                    progress(pieces[index].offset, total)
                file.seek(pieces[index].offset)
                file.write(pieces[index].make().data)
            file.truncate(total)
            file.flush()
            os.fsync(handle)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise _full(part, error) from error
        os.replace(part, path)
    if progress is not None:
        progress(total, total)
    return path


def part_of(path: Path) -> Path:
    """The file that `path` grows in."""
    return path.with_name(path.name + ".part")


def _lock(file: BinaryIO, part: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(
            f"{part} is being written by another process; wait for it or choose another name"
        ) from None


def _first_missing(file: BinaryIO, header: bytes, pieces: Sequence[Piece]) -> int:
    """Index of the piece to go on with; 0 where there is nothing of this file yet."""
    if file.read(len(header)) != header:
        file.truncate(0)
        return 0
    size = file.seek(0, os.SEEK_END)
    return max(0, bisect_right([piece.end for piece in pieces], size) - 1)


def check_room(path: Path, needed: int, total: int) -> None:
    """`CheckpointError` unless `needed` bytes of `total` can still be written beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"{path} needs {byte_size(total)}, {byte_size(needed)} of them still to be written, "
            f"but {path.parent} has {byte_size(free)} free; make room, choose another folder, or "
            "write fewer layers or experts"
        )


def _full(part: Path, error: OSError) -> CheckpointError:
    written = part.stat().st_size
    return CheckpointError(
        f"{part}: the disk is full after {byte_size(written)} ({error.strerror}); make room and "
        "run the same command again, which goes on from there, or remove this file"
    )
