"""How many threads compute, and on which processors: one setting, shared pools.

Read from the affinity mask, the container's quota and /sys; where a system says nothing, every
processor it counts is taken for a core.
"""

import os
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import Any

from ktlab.errors import SettingError

NODES = Path("/sys/devices/system/node")
CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
LARGEST = 1024
"""More threads than this are a typing error."""


def allowed_cpus() -> tuple[int, ...]:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0-3,8" as the kernel writes lists of processors -> (0, 1, 2, 3, 8)."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def numa_nodes() -> dict[int, tuple[int, ...]]:
    """Processors of each NUMA node; {} where the system lists none."""
    nodes = {}
    for folder in NODES.glob("node[0-9]*"):
        try:
            nodes[int(folder.name[4:])] = parse_cpus((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
    return dict(sorted(nodes.items()))


def node_cpus(node: int) -> tuple[int, ...]:
    """Processors of a node that this process may use; SettingError if there is no such node."""
    nodes = numa_nodes()
    if node not in nodes:
        known = ", ".join(map(str, nodes)) or "none: the system does not list its nodes"
        raise SettingError(f"numa = {node!r}: there is no such node; this machine has {known}")
    cpus = tuple(cpu for cpu in nodes[node] if cpu in allowed_cpus())
    if not cpus:
        raise SettingError(
            f"numa = {node}: its processors {list(nodes[node])} are not among those that this "
            f"process may run on, {list(allowed_cpus())}; change its affinity (taskset, numactl)"
        )
    return cpus


def physical_cores(cpus: tuple[int, ...]) -> int:
    """Cores behind `cpus`: hyperthreads of one core count once."""
    cores = set()
    for cpu in cpus:
        folder = CPUS / f"cpu{cpu}" / "topology"
        try:
            package, core = ((folder / n).read_text() for n in ("physical_package_id", "core_id"))
            cores.add((int(package), int(core)))
        except (OSError, ValueError):
            cores.add((-1, cpu))
    return len(cores)


def quota() -> int | None:
    """Whole cores' worth of time that a container allows; None where there is no limit."""
    try:
        limit, period = QUOTA.read_text().split()
        return None if limit == "max" else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=64)
def default_threads(numa: int | None = None) -> int:
    """One thread for each physical core that this process may use, no more than its quota."""
    cores = physical_cores(node_cpus(numa) if numa is not None else allowed_cpus())
    return min(cores, quota() or cores)


def whole_number(value: Any) -> int | None:
    """`value` as an int if its type is one of whole numbers, NumPy's too; else None."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def check_threads(threads: int | None) -> int | None:
    """`threads` if it is a sensible number or None (the default), else a `SettingError`."""
    if threads is None:
        return None
    number = whole_number(threads)
    if number is None or not 1 <= number <= LARGEST:
        raise SettingError(
            f"threads = {threads!r}: expected a whole number from 1 to {LARGEST}, or None for one "
            f"a core ({default_threads()} here)"
        )
    return number
