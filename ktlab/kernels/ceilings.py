"""What the C core's own threads reach at best: arithmetic of an instruction set, and reading.

Ceilings for figures of the native kernels, measured in the same process by the same pool.
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels import native

SECONDS = 0.1


def usable(isa: str) -> bool:
    """Whether the instruction set can be measured in this process."""
    return native.isas().get(isa, "absent") == ""


def operations(isa: str, threads: int, seconds: float = SECONDS, *, loading: bool = False) -> float:
    """Operations/s (a multiply and an add are two) of the set's dot instruction on registers.

    `loading`: of AMX with three tile loads for two products, as its kernels do; 0.0 for others.
    """
    return float(native._native().peak_ops(native.pool(threads), isa, seconds, loading))


def float32(threads: int, seconds: float = SECONDS) -> float:
    """float32 FLOP/s on registers, with the widest vectors of this machine."""
    return float(native._native().peak_fma(native.pool(threads), seconds))


def reading(buffer: NDArray[np.uint8], threads: int, seconds: float = SECONDS) -> float:
    """Bytes/s that all threads read together from a buffer several times as large as the cache.

    It must have been written to: fresh pages are one and the same page of zeros.
    """
    return float(native._native().peak_read(native.pool(threads), buffer, seconds))
