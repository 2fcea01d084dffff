"""Memory of this machine and of this process, and how fast a file comes from its disk.

Read from the operating system where it tells (Linux: /proc, cgroups); "unknown" is None, never a
guess.
"""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from ktlab.record import Record

PROBE_BYTES = 4 << 20
"""Read at once when a disk is measured: long enough for any disk to be at its full rate."""
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
