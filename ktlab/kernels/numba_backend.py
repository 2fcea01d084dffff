"""Numba's kernels behind this package's words; imported when something is computed with them."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels import codings
from ktlab.kernels.native import LOAD_HINT
from ktlab.kernels.request import Kernel
from ktlab.kernels.weights import Weights
from ktlab.quantization import QTensor


@lru_cache(maxsize=1)
def unavailable() -> str:
    """Why Numba cannot be used; "" if it can."""
    return "" if find_spec("numba") is not None else "numba is not installed: pip install numba"


def reject(formats: Sequence[str]) -> str:
    """Why Numba's kernels cannot compute these formats; "" if they can."""
    if reason := unavailable():
        return reason
    unknown = [f for f in dict.fromkeys(formats) if f not in codings.FORMATS]
    if unknown:
        return f"no Numba kernel computes {', '.join(unknown)}; {LOAD_HINT.format(unknown[0])}"
    return ""


def _kernels() -> Any:
    from ktlab.kernels import numba_kernels

    return numba_kernels


def linear(kernel: Kernel, weights: Weights, x_TK: NDArray[np.float32]) -> NDArray[np.float32]:
    """x W^T, (T, N)."""
    return _kernels().linear(weights, x_TK, few=kernel.few, threads=kernel.threads)


def moe(
    kernel: Kernel,
    matrices: Sequence[Weights],
    hidden_TD: NDArray[np.float32],
    ids_TK: NDArray[np.int64],
    weights_TK: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D); id -1 is nobody.

    `matrices` are gate, up and down.
    """
    return _kernels().moe(
        *matrices, hidden_TD, ids_TK, weights_TK, few=kernel.few, threads=kernel.threads
    )


def pack(weights: Weights, out: NDArray[np.uint8], threads: int, numa: int | None) -> None:
    """Blocks to packed, into `out` (64-byte aligned)."""
    out[:] = 0  # the packer leaves out the gaps that fill chunks up to 64 bytes
    _packer().pack(weights, out, threads)


def unpack(weights: Weights, out: NDArray[np.uint8], threads: int, numa: int | None) -> None:
    """Packed to blocks, bit for bit."""
    _packer().unpack(weights, out, threads)


def convert(
    weights: Weights, format: str, out: NDArray[np.uint8], threads: int, numa: int | None
) -> None:
    """Blocks of any format to blocks of a format that is made at load."""
    _packer().convert(weights, format, out, threads)


def encode(tensor: QTensor, format: str, out: NDArray[np.uint8], threads: int) -> None:
    """Rows of floats, or of anything that can be decoded, to blocks of a format of `ENCODED`."""
    from ktlab.kernels import numba_encode

    numba_encode.encode(tensor, format, out, threads)


def floats(tensor: QTensor, out: NDArray[np.float32], threads: int) -> None:
    """f32, f16, bf16 or fp8_e4m3 to float32."""
    from ktlab.kernels import numba_encode

    numba_encode.floats(tensor, out, threads)


def _packer() -> Any:
    from ktlab.kernels import numba_pack

    return numba_pack
