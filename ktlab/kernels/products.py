"""What kernels compute, by backend: `linear` and `moe` on quantized matrices, and `attend`.

T tokens, D hidden, E experts, K selected (or columns of one matrix), N rows.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.errors import SettingError
from ktlab.kernels import native, numba_backend, reference, torch_moe
from ktlab.kernels.computed import Computed
from ktlab.kernels.request import AUTO, BF16_ISA, PACKED, Kernel
from ktlab.kernels.stack import FLOATS, Stack
from ktlab.kernels.weights import Weights


def linear(kernel: Kernel, stack: Stack, x_TK: Tensor) -> Tensor:
    """x W^T, (T, N) float32, for a single matrix W (N, K). x: floats of any kind."""
    if kernel.backend == "torch":
        return F.linear(x_TK.float(), stack.floats)
    if kernel.backend == "native":
        return native.linear(kernel, native_matrix(kernel, stack), x_TK)
    x = _plain(x_TK.float())
    if kernel.backend == "numba":
        weights = stack.weights(kernel.layout, kernel)
        return torch.from_numpy(numba_backend.linear(kernel, weights, x))
    return torch.from_numpy(reference.linear(stack.tensor, x))


def linear_by_head(kernel: Kernel, stack: Stack, x_THK: Tensor) -> Tensor:
    """(T, H, N) float32: x[:, h] W[h]^T with W (H, N, K); native only.

    On packed data whatever the kernel's layout: it is little, and rows are short.
    """
    return native.linear_by_head(kernel, native_matrix(kernel, stack, PACKED), x_THK)


def attend(kernel: Kernel, q_HC: Tensor, keys_SC: Tensor, values: int, scale: float) -> Tensor:
    """softmax(scale q K^T) V, (H, V) float32: one query a head; keys that all heads share, whose
    first `values` columns are the values. What decoding with absorbed MLA does.

    In float32, but from 8 heads and 512 positions on in bfloat16 with float32 sums where the isa
    has tiles of it (that loses 0.2 to 0.3 % of the norm), or in integers of 16 bits under avx512
    (0.03 to 0.08 %)."""
    if kernel.backend == "native":
        return native.attend(kernel, q_HC, keys_SC, values, scale)
    weights_HS = (q_HC @ keys_SC.T).mul_(scale).softmax(-1)
    return weights_HS @ keys_SC[:, :values]


def many_kernel(*of: Computed) -> Kernel | None:
    """What computes `attend_many` for k_b and v_b: their kernel where it multiplies bfloat16, and
    avx512_bf16 beside integer kernels of AVX-512 where nobody named an isa; None: nothing does.

    Floats of more bits (f16, f32) keep them.
    """
    kernels = [
        _multiplying_bfloat16(product) if product.kernel.backend == "native" else None
        for product in of
    ]
    return kernels[0] if all(kernels) else None


def _multiplying_bfloat16(product: Computed) -> Kernel | None:
    kernel = product.kernel
    if native.attends_many(kernel.isa):
        return kernel
    free = product.request.wanted_isa == AUTO and kernel.isa == "avx512_vnni"
    if free and not native.reject(BF16_ISA, product.formats):
        return replace(kernel, isa=BF16_ISA)
    return None


def attend_many(
    kernel: Kernel,
    q: tuple[Tensor, Tensor],
    keys_Sc: Tensor,
    up: tuple[Stack, Stack],
    scale: float,
    out_THV: Tensor,
) -> None:
    """What many tokens, the last of S positions, attend to in a latent cache: `out_THV`, float32.

    q: (T, H, N) and, turned, (T, H, R); keys_Sc: (S, C + R), the latent and the turned part; up:
    k_b (H, C, N) and v_b (H, V, C), which make keys and values of the latent. Computed in bfloat16
    with float32 sums; token t sees S - T + t + 1 positions.
    """
    native.attend_many(kernel, *q, keys_Sc, up[0].halves, up[1].halves, scale, out_THV)


def native_matrix(kernel: Kernel, stack: Stack, layout: str = "") -> Any:
    """The C core's view of a stack in a layout, the kernel's own if none is named."""
    layout = layout or kernel.layout
    return stack.operand(("native", layout), lambda: native.matrix(stack.weights(layout, kernel)))


def native_floats(stack: Stack) -> Any:
    """The C core's view of a matrix's float32 copy."""
    return stack.operand(
        ("native", FLOATS),
        lambda: native.matrix(Weights.from_blocks("f32", stack.shape, stack.floats.numpy())),
    )


def moe(
    kernel: Kernel,
    stacks: tuple[Stack, Stack, Stack],
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D) float32; id -1 is nobody.

    `stacks` are gate and up (E, F, D) and down (E, D, F). Hidden numbers and weights may be floats
    of any kind, ids integers of any kind. Raises ValueError on shapes and ids that do not fit,
    TypeError on ids that are no integers.
    """
    if ids_TK.is_floating_point():
        raise TypeError(f"ids: expected integers, found {ids_TK.dtype}")
    ids_TK, weights_TK = ids_TK.long(), weights_TK.float()
    if kernel.backend == "native":
        matrices = [native_matrix(kernel, stack) for stack in stacks]
        return native.moe(kernel, matrices, hidden_TD, ids_TK, weights_TK)
    hidden_TD = hidden_TD.float()
    if kernel.backend != "numba":  # it looks itself, as the C core does
        _check_call(stacks[0], hidden_TD, ids_TK, weights_TK)
    if kernel.backend == "torch":
        floats: list[Tensor] = [stack.floats for stack in stacks]
        call = (hidden_TD.detach(), ids_TK, weights_TK.detach())
        return torch_moe.moe(floats[0], floats[1], floats[2], *call)
    arrays = (_plain(hidden_TD), _plain(ids_TK), _plain(weights_TK))
    if kernel.backend == "numba":
        weights = [stack.weights(kernel.layout, kernel) for stack in stacks]
        return torch.from_numpy(numba_backend.moe(kernel, weights, *arrays))
    gate, up, down = (stack.tensor for stack in stacks)
    return torch.from_numpy(reference.moe(gate, up, down, *arrays).astype(np.float32))


def _check_call(gate: Stack, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    """What the C core says of a call that does not fit: torch would fail without words, or give a
    row too few, and NumPy leave out what it does not find."""
    experts, _, cols = gate.matrices
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != cols:
        raise SettingError(f"x: expected (tokens, {cols}), found {tuple(hidden_TD.shape)}")
    tokens = len(hidden_TD)
    if ids_TK.ndim != 2 or len(ids_TK) != tokens or weights_TK.shape != ids_TK.shape:
        raise SettingError(
            f"ids and weights: expected ({tokens}, k) both, found {tuple(ids_TK.shape)} and "
            f"{tuple(weights_TK.shape)}"
        )
    wrong = ((ids_TK < -1) | (ids_TK >= experts)).nonzero()
    if len(wrong):
        token, slot = wrong[0].tolist()
        raise SettingError(
            f"ids[{token}, {slot}]: expected 0 to {experts - 1}, or -1 for nobody, found "
            f"{int(ids_TK[token, slot])}"
        )


def _plain(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
