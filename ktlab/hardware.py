"""What this machine is: read from the operating system, asked for where a flag is not enough.

Linux tells most (/proc, cgroups, arch_prctl); elsewhere the answer is "unknown", never a guess.
"""

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ktlab.memory import Memory as Memory
from ktlab.memory import memory as memory
from ktlab.record import Record

FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)
"""Instruction sets that expert kernels care about, by their names in /proc/cpuinfo."""

ARCH_PRCTL = 158  # the number of this system call on x86-64
ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
XFEATURE_XTILEDATA = 18


@dataclass(frozen=True, kw_only=True)
class Grant(Record):
    """Whether the operating system lets this process use AMX tiles; None where it cannot tell."""

    granted: bool | None
    reason: str


@lru_cache(maxsize=1)
def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cpu_name() -> str:
    """The processor's name as the system gives it. In a virtual machine that may be a maker's name
    for several ("AMD EPYC"): then with family and model, which tell one generation from another."""
    info = cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine() or "unknown"
    family, model = info.get("cpu family"), info.get("model")
    if family is None or model is None or any(letter.isdigit() for letter in name):
        return name
    return f"{name} (family {family} model {model})"


def features() -> dict[str, bool] | None:
    """Which of `FEATURES` the processor has; None where the system does not say."""
    flags = cpuinfo().get("flags")
    if flags is None:
        return None
    found = set(flags.split())
    return {name: name in found for name in FEATURES}


def isa() -> tuple[str, ...]:
    """The features that can be used now: found, and for AMX also granted. () where unknown."""
    found = features() or {}
    usable = [name for name, has in found.items() if has and not name.startswith("amx")]
    if any(found.get(name) for name in ("amx_int8", "amx_bf16")) and amx_grant().granted:
        usable += [name for name in ("amx_int8", "amx_bf16") if found[name]]
    return tuple(usable)


def widest_isa() -> tuple[str, ...]:
    """The last two of `isa()` that name vectors or tiles, for where there is room for two."""
    return tuple(name for name in isa() if name not in ("fma", "f16c"))[-2:]


@lru_cache(maxsize=1)
def amx_grant() -> Grant:
    """Ask the kernel for AMX tile data, as every program that uses it must (Linux 5.16).

    The question is the request: arch_prctl(ARCH_REQ_XCOMP_PERM), then ARCH_GET_XCOMP_PERM to
    see what was granted. It costs nothing but a larger signal frame. A flag in /proc/cpuinfo
    alone proves nothing: virtual machines and old kernels show it and refuse.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return Grant(granted=None, reason=f"cannot be asked on {sys.platform} {platform.machine()}")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return Grant(granted=None, reason="cannot be asked from a 32-bit Python")
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(code: int, argument: ctypes._Pointer | ctypes.c_ulong) -> int:
        result = libc.syscall(ctypes.c_long(ARCH_PRCTL), ctypes.c_int(code), argument)
        return 0 if result == 0 else ctypes.get_errno()

    refused = prctl(ARCH_REQ_XCOMP_PERM, ctypes.c_ulong(XFEATURE_XTILEDATA))
    permitted = ctypes.c_uint64(0)
    unknown = prctl(ARCH_GET_XCOMP_PERM, ctypes.pointer(permitted))
    if not unknown and permitted.value >> XFEATURE_XTILEDATA & 1:
        return Grant(granted=True, reason="arch_prctl(ARCH_REQ_XCOMP_PERM) granted tile data")
    why = os.strerror(refused or unknown) if refused or unknown else "permission bit stayed unset"
    return Grant(granted=False, reason=f"arch_prctl(ARCH_REQ_XCOMP_PERM) refused: {why}")


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes(
    level: int | None = None, *, folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")
) -> int | None:
    """Size of processor 0's cache of a level, or of its largest, usually the last; None where
    unknown."""
    sizes = []
    for path in folder.glob("index*/size"):
        try:
            text = path.read_text().strip()  # "107520K"
            if level in (None, int((path.parent / "level").read_text())):
                sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes, default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that a container allows; None where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        root = Path("/sys/fs/cgroup/cpu")
        quota_us = int((root / "cpu.cfs_quota_us").read_text())
        return quota_us / int((root / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None
