"""The up-projection of latent attention, as files store it: in one matrix, or as keys and values.

H heads, N nope, V value dimensions, C kv_lora_rank. Older GGUF files and Hugging Face's keep
`attn_kv_b` (H (N + V), C): for each head its N key rows, then its V value rows. Since llama.cpp
absorbs MLA (its pull request 12801), files have `attn_k_b` (H, C, N), the keys' part transposed,
and `attn_v_b` (H, V, C).
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.config import MLASizes
from ktlab.checkpoint.gathered import GatheredTensor
from ktlab.quantization import QTensor, get_format


def split_keys(name: str, fused: QTensor, sizes: MLASizes) -> QTensor:
    """(H, C, N) out of (H (N + V), C): f32, because the axes are swapped, decoded at first use."""
    by_head, keys = _by_head(fused, sizes), sizes.qk_nope_dim

    def head(index: int) -> NDArray[np.uint8]:
        keys_NC = fused.format.dequantize(by_head[index, :keys])
        return np.ascontiguousarray(keys_NC.T).view(np.uint8)

    return GatheredTensor(
        name=name,
        format=get_format("f32"),
        shape=(sizes.num_heads, sizes.kv_lora_rank, keys),
        make=head,
        count=sizes.num_heads,
        source=f"{fused.source}, split from attn_kv_b",
    )


def split_values(name: str, fused: QTensor, sizes: MLASizes) -> QTensor:
    """(H, V, C) out of (H (N + V), C): the same bytes."""
    return QTensor(
        name=name,
        format=fused.format,
        shape=(sizes.num_heads, sizes.v_dim, sizes.kv_lora_rank),
        blocks=_by_head(fused, sizes)[:, sizes.qk_nope_dim :],
        source=f"{fused.source}, split from attn_kv_b",
    )


def fuse(name: str, keys: QTensor, values: QTensor, sizes: MLASizes) -> QTensor:
    """(H (N + V), C) out of (H, C, N) and (H, V, C): f32, decoded at first use."""
    rows = sizes.qk_nope_dim + sizes.v_dim

    def head(index: int) -> NDArray[np.uint8]:
        keys_NC = keys[index].dequantize().T
        return np.concatenate([keys_NC, values[index].dequantize()]).view(np.uint8)

    return GatheredTensor(
        name=name,
        format=get_format("f32"),
        shape=(sizes.num_heads * rows, sizes.kv_lora_rank),
        make=head,
        count=sizes.num_heads,
        source=f"{keys.source}, from attn_k_b and attn_v_b",
    )


def _by_head(fused: QTensor, sizes: MLASizes) -> NDArray[np.uint8]:
    """(H, N + V, bytes of a row)."""
    return fused.blocks.reshape(sizes.num_heads, sizes.qk_nope_dim + sizes.v_dim, -1)
