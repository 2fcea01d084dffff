"""Memory of this machine and of this process, and how fast a file comes from its disk.

Read from the operating system where it tells (Linux: /proc, cgroups); "unknown" is None, never a
guess.
"""

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ktlab.record import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROBE_BYTES = 4 << 20
"""Read at once when a disk is measured: long enough for any disk to be at its full rate."""
_MOVE_PAGES = 279
"""The number of the system call on x86-64."""
PROBE_SECONDS = 0.25
"""A disk is measured for so long."""


@dataclass(frozen=True, kw_only=True)
class Memory(Record):
    """Bytes; None where unknown. `limit` is what a container allows, if less than the machine."""

    total: int | None
    available: int | None
    limit: int | None
    swap_total: int | None
    swap_used: int | None


def memory() -> Memory:
    """Memory and swap of the machine, and the container's limit."""
    info = _meminfo()
    limit = _memory_limit()
    total = info.get("MemTotal")
    if limit is not None and total is not None and limit >= total:
        limit = None
    swap, free = info.get("SwapTotal"), info.get("SwapFree")
    return Memory(
        total=total,
        available=info.get("MemAvailable"),
        limit=limit,
        swap_total=swap,
        swap_used=swap - free if swap is not None and free is not None else None,
    )


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except (OSError, ValueError, IndexError):
        pass
    try:
        import psutil
    except ImportError:
        return {}
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "MemTotal": ram.total,
        "MemAvailable": ram.available,
        "SwapTotal": swap.total,
        "SwapFree": swap.free,
    }


def _memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def resident_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of these mapped files that lie in this process's memory now; None where unknown.

    Source: `Rss` of the mappings in /proc/self/smaps, see proc(5).
    """
    wanted = {str(path.resolve()) for path in paths}
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    total, counts = 0, False
    for line in lines:
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # "7f..-7f.. r--p 00000000 08:01 123   /path/of/the/file"
            counts = rest.partition("/")[2] != "" and "/" + rest.partition("/")[2] in wanted
        elif counts and first == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


def disk_rate(path: Path, seconds: float = PROBE_SECONDS) -> float | None:
    """Bytes a second at which `path` comes from its disk, past the page cache.

    Reads pieces spread over the file for at most about `seconds`, by O_DIRECT. None where the file
    system or the operating system has no such thing, or the file is too small to tell.
    """
    flag = getattr(os, "O_DIRECT", None)
    pieces = path.stat().st_size // PROBE_BYTES
    if flag is None or pieces < 4:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None
    try:
        # Anonymous mappings begin at a page, as O_DIRECT asks of its buffers.
        with mmap.mmap(-1, PROBE_BYTES) as buffer:
            start, done = perf_counter(), 0
            while perf_counter() - start < seconds and done < pieces:
                # The golden ratio spreads any number of pieces evenly and repeats none.
                piece = int(done * 0.6180339887 % 1 * pieces)
                if os.preadv(handle, [buffer], piece * PROBE_BYTES) != PROBE_BYTES:
                    return None
                done += 1
            return done * PROBE_BYTES / (perf_counter() - start)
    except OSError:
        return None
    finally:
        os.close(handle)


def process_memory() -> int | None:
    """Bytes of this process in memory now (its resident set); None where unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def trim() -> None:
    """Give freed memory back to the system where the C library can (glibc keeps it otherwise)."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


def node_bytes(arrays: "Iterable[NDArray[Any]]", pages: int = 4096) -> dict[int, int] | None:
    """{NUMA node: bytes} of arrays, as the kernel says where their pages are; None where it does
    not. Up to so many pages of each array are asked for, spread evenly. Source: move_pages(2)."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    size = os.sysconf("SC_PAGE_SIZE")
    found: dict[int, float] = {}
    for array in arrays:
        first = array.ctypes.data // size
        count = (array.ctypes.data + array.nbytes - 1) // size - first + 1
        asked = [first + i * count // min(pages, count) for i in range(min(pages, count))]
        addresses = (ctypes.c_void_p * len(asked))(*(page * size for page in asked))
        status = (ctypes.c_int * len(asked))()
        if call(_MOVE_PAGES, 0, ctypes.c_ulong(len(asked)), addresses, None, status, 0) != 0:
            return None
        for node in status:
            if node >= 0:  # else not in memory
                found[node] = found.get(node, 0) + array.nbytes / len(asked)
    return {node: round(nbytes) for node, nbytes in found.items()}
