"""The judge: NumPy, one expert at a time, as readable as the equations.

T tokens, D hidden, E experts, K selected, F expert width.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 12-13; SwiGLU from arXiv 2002.05202.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ktlab.quantization.qtensor import QTensor

ROWS = 8192
"""The output matrix of a large vocabulary would take 0.8 to 4 GB as float32."""


def silu(values: NDArray[Any]) -> NDArray[Any]:
    """x * sigmoid(x), written so that large negative values do not overflow."""
    return values * (0.5 * (1.0 + np.tanh(0.5 * values)))


def linear(
    weight: QTensor, x_TK: NDArray[np.float32], dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """x W^T, (T, N) in `dtype`, for W (N, K), of which `ROWS` rows at a time are floats."""
    x_TK = x_TK.astype(dtype)
    rows = (weight[start : start + ROWS] for start in range(0, weight.shape[0], ROWS))
    return np.concatenate([x_TK @ some.dequantize().astype(dtype).T for some in rows], axis=1)


def moe(
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    hidden_TD: NDArray[np.float32],
    ids_TK: NDArray[np.int64],
    weights_TK: NDArray[np.float32],
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Weighted sum of the selected experts' SwiGLU outputs, (T, D) in `dtype`.

    `gate` and `up` are (E, F, D), `down` is (E, D, F); an id of -1 selects nothing. Each expert is
    dequantized when its turn comes, so no float copy of the bank is ever held. float64 judges the
    error of every other kernel.
    """
    output_TD = np.zeros(hidden_TD.shape, dtype=dtype)
    for expert in np.unique(ids_TK[ids_TK >= 0]):
        tokens, slots = np.nonzero(ids_TK == expert)
        x = hidden_TD[tokens].astype(dtype)
        gate_FD, up_FD, down_DF = (
            weight[int(expert)].dequantize().astype(dtype) for weight in (gate, up, down)
        )
        inner = silu(x @ gate_FD.T) * (x @ up_FD.T)
        # A token may name an expert twice, which plain += on fancy indices would count once.
        np.add.at(output_TD, tokens, weights_TK[tokens, slots, None] * (inner @ down_DF.T))
    return output_TD
