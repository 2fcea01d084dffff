"""The C kernels (ktlab_ext) behind this package's words; the only module that imports them.

T tokens, D hidden, K columns or selected experts, N rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ktlab_ext
from ktlab.errors import SettingError
from ktlab.kernels.request import Kernel
from ktlab.kernels.threads import node_cpus
from ktlab.kernels.weights import Weights

LOAD_HINT = "convert it at load: load(..., convert={{{0!r}: 'q8_0'}})"


def unavailable() -> str:
    """Why the C kernels are not here; "" if they are."""
    return ktlab_ext.reason


def _native() -> Any:
    if ktlab_ext.native is None:
        raise SettingError(f"backend 'native' is not there: {ktlab_ext.reason}")
    return _instead or ktlab_ext.native


_instead: Any = None


class _Idle:
    """The extension with operations that return at once and leave their outputs as they are."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ktlab_ext.native, name)

    def linear(self, *_: Any) -> None:
        pass

    moe = linear_by_head = attend = attend_many = mla_token = layers_token = linear


@contextmanager
def idle() -> Iterator[None]:
    """For measuring what goes on around the kernels: they compute nothing meanwhile."""
    global _instead
    _instead = _Idle()
    try:
        yield
    finally:
        _instead = None


@lru_cache(maxsize=1)
def isas() -> dict[str, str]:
    """Instruction set -> "" if usable in this process, else why not; {} without C kernels."""
    return dict(ktlab_ext.native.isas()) if ktlab_ext.native is not None else {}


@lru_cache(maxsize=1)
def cpu_vendor() -> str:
    """The processor's maker as cpuid has it, "AuthenticAMD"; "" without C kernels."""
    return ktlab_ext.native.cpu_vendor() if ktlab_ext.native is not None else ""


def pairs(isa: str) -> bool:
    """Whether an instruction set scales many tokens' sums two by two as 16 bits (ktlab_ext,
    pairs.inc.h): avx2 does, and avx512_vnni on AMD's processors, where an addition costs nothing
    beside a product."""
    return ktlab_ext.native is not None and bool(ktlab_ext.native.pairs(isa))


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Formats that the C kernels compute on their encoded values."""
    return tuple(ktlab_ext.native.formats()) if ktlab_ext.native is not None else ()


@lru_cache(maxsize=1024)
def computes(isa: str, format: str) -> bool:
    """Whether the instruction set has a kernel for the format.

    amx_bf16 has one for everything but f16 and f32, which it would round: the weights of a tile are
    decoded to bfloat16 in the cache, which loses less than activations rounded to int8 do.
    """
    return format in formats() and bool(_native().computes(isa, format))


def reject(isa: str, formats_: Sequence[str]) -> str:
    """Why native code with this instruction set cannot compute these formats here; "" if it can."""
    if reason := unavailable():
        return reason
    unknown = [f for f in dict.fromkeys(formats_) if f not in formats()]
    if unknown:
        return f"no C kernel computes {', '.join(unknown)}; {LOAD_HINT.format(unknown[0])}"
    if reason := isas()[isa]:
        return reason
    others = [f for f in dict.fromkeys(formats_) if not computes(isa, f)]
    return f"{isa} has no kernel for {', '.join(others)}" if others else ""


def pool(threads: int, numa: int | None = None) -> Any:
    """The shared pool of that many threads (on that NUMA node's processors)."""
    return _pool(threads, numa)


@lru_cache(maxsize=64)
def _pool(threads: int, numa: int | None) -> Any:
    return _native().Pool(threads, None if numa is None else node_cpus(numa))


def matrix(weights: Weights) -> Any:
    """The C core's view of weights; nothing is copied, the buffer is kept alive."""
    return _native().Matrix(
        weights.data,
        weights.format,
        weights.layout,
        weights.experts,
        weights.rows,
        weights.cols,
        weights.expert_stride,
    )


def linear(kernel: Kernel, matrix: Any, x_TK: Tensor, expert: int = 0) -> Tensor:
    """x W^T, (T, N) float32, with one matrix of a stack."""
    y_TN = torch.empty((x_TK.shape[0], matrix.rows), dtype=torch.float32)
    _native().linear(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        kernel.few,
        matrix,
        expert,
        _rows(x_TK),
        y_TN.numpy(),
    )
    return y_TN


def linear_by_head(kernel: Kernel, matrix: Any, x_THK: Tensor) -> Tensor:
    """x[:, h] W[h]^T for every matrix of a stack, (T, H, N) float32."""
    tokens, heads, _ = x_THK.shape
    y_THN = torch.empty((tokens, heads, matrix.rows), dtype=torch.float32)
    _native().linear_by_head(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        kernel.few,
        matrix,
        _rows(x_THK.float()),
        y_THN.numpy(),
    )
    return y_THN


def attend(kernel: Kernel, q_HC: Tensor, keys_SC: Tensor, values: int, scale: float) -> Tensor:
    """softmax(scale q K^T) V, (H, V) float32: one query a head, V the first columns of the keys."""
    y_HV = torch.empty((q_HC.shape[0], values), dtype=torch.float32)
    _native().attend(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        q_HC.contiguous().numpy(),
        keys_SC.numpy(),
        scale,
        y_HV.numpy(),
    )
    return y_HV


def attends_many(isa: str) -> bool:
    """Whether an instruction set has `attend_many`."""
    return bool(_native().attends_many(isa))


def attend_many(
    kernel: Kernel,
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    keys_Sc: Tensor,
    k_b_HCN: Tensor,
    v_b_HVC: Tensor,
    scale: float,
    out_THV: Tensor,
) -> None:
    """See `products.attend_many`; k_b and v_b are bfloat16."""
    _native().attend_many(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        q_nope_THN.numpy(),
        q_rope_THR.numpy(),
        keys_Sc.numpy(),
        k_b_HCN.view(torch.int16).numpy(),
        v_b_HVC.view(torch.int16).numpy(),
        scale,
        out_THV.numpy(),
    )


def mla_token(
    kernel: Kernel, mla: Any, turns: Tensor, x_D: Tensor, keys_SC: Tensor
) -> tuple[Tensor, Tensor]:
    """Absorbed latent attention of one token: its output (D) and its queries (H (N + R)).

    `mla`: the core's `MLA`. The last row of `keys_SC` is written. turns: complex, (R / 2).
    """
    q = torch.empty(mla.matrices[1].rows, dtype=torch.float32)
    y_D = torch.empty_like(x_D)
    _native().mla_token(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        mla,
        torch.view_as_real(turns).reshape(-1).numpy(),
        x_D.numpy(),
        keys_SC.numpy(),
        q.numpy(),
        y_D.numpy(),
    )
    return y_D, q


def layers_token(
    kernel: Kernel, layers: list[Any], turns: list[Tensor], x_D: Tensor, keys_SC: list[Tensor]
) -> Tensor:
    """One token through layers of the core's `Layer`, one after the other, (D) to (D); turns and
    keys, one a layer, as in `mla_token`. On the threads of `kernel`."""
    y_D = torch.empty_like(x_D)
    _native().layers_token(
        pool(kernel.threads, kernel.numa),
        layers,
        [torch.view_as_real(each).reshape(-1).numpy() for each in turns],
        x_D.numpy(),
        [keys.numpy() for keys in keys_SC],
        y_D.numpy(),
    )
    return y_D


def together(kernels: Sequence[Kernel]) -> bool:
    """Whether one call of the C core can do the work of all of them, each with its own isa."""
    return len({(k.backend, k.threads, k.numa) for k in kernels}) == 1 and (
        kernels[0].backend == "native"
    )


def core() -> Any:
    """The extension module, for its classes: `MLA`, `Router`, `Experts`, `Layer`."""
    return _native()


def moe(
    kernel: Kernel,
    matrices: Sequence[Any],
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D) float32; id -1 is nobody.

    `matrices` are gate, up and down.
    """
    gate, up, down = matrices
    y_TD = torch.empty((hidden_TD.shape[0], down.rows), dtype=torch.float32)
    _native().moe(
        pool(kernel.threads, kernel.numa),
        kernel.isa,
        kernel.few,
        gate,
        up,
        down,
        _rows(hidden_TD),
        ids_TK.contiguous().numpy(),
        weights_TK.detach().contiguous().numpy(),
        y_TD.numpy(),
    )
    return y_TD


def _rows(x: Tensor) -> NDArray[Any]:
    """float32, or bfloat16 as the core takes it: its bits. Rows must be contiguous in themselves;
    the distance between them is free."""
    x = x.detach() if x.requires_grad else x
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.dtype == torch.bfloat16:
        bits: NDArray[Any] = x.view(torch.int16).numpy().view(np.uint16)
        return bits
    return x.float().numpy()


def pack(weights: Weights, out: NDArray[np.uint8], threads: int, numa: int | None) -> None:
    """Blocks to packed, into `out` (64-byte aligned)."""
    _native().pack(pool(threads, numa), matrix(weights), out)


def unpack(weights: Weights, out: NDArray[np.uint8], threads: int, numa: int | None) -> None:
    """Packed to blocks, bit for bit."""
    _native().unpack(pool(threads, numa), matrix(weights), out)


def convert(
    weights: Weights, format: str, out: NDArray[np.uint8], threads: int, numa: int | None
) -> None:
    """Blocks of any format to blocks of a format that is made at load."""
    _native().convert(pool(threads, numa), matrix(weights), format, out)


def dequantize(weights: Weights, out: NDArray[np.float32]) -> None:
    """A single matrix as float32, into `out` (N, K), on this thread alone."""
    _native().dequantize(matrix(weights), 0, 0, out)


def header_write(format: str, experts: int, rows: int, cols: int, source: str) -> bytes:
    """The header of a packed file."""
    return bytes(_native().header_write(format, experts, rows, cols, source))


def header_read(data: NDArray[np.uint8], total_bytes: int) -> tuple[str, int, int, int, str]:
    """(format, E, N, K, source), or ValueError that says what is wrong."""
    found = _native().header_read(data[: _native().HEADER_BYTES], total_bytes)
    return (found.format, found.experts, found.rows, found.cols, found.source)
