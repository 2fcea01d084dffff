"""Rotary position embedding, with YaRN.

S positions, R rotated dimensions of a head. Pairs are interleaved, (0, 1), (2, 3), ..., in
DeepSeek's own code and in llama.cpp's deepseek2; Qwen3 and OLMoE turn halves, (0, R/2), ...
Source: RoFormer (arXiv 2104.09864), YaRN (2309.00071),
DeepSeek-V2 (2405.04434) 3.1.4.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ktlab.checkpoint.config import ModelConfig, YarnScaling
from ktlab.kernels.seat import HOST, Seat


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1: the attention temperature of YaRN, equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: qk_dim^-0.5, times mscale_all_dim's square."""
    scale = config.attention.qk_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def frequencies(config: ModelConfig) -> Tensor:
    """(R/2,) float32 radians per position of each pair, stretched by YaRN where it is on."""
    dims = (
        torch.arange(0, config.attention.rope_dim, 2, dtype=torch.float32)
        / config.attention.rope_dim
    )
    inverse = config.rope_theta**-dims
    if config.yarn is None:
        return inverse
    low, high = _correction_range(config, config.yarn)
    ramp = (torch.arange(len(inverse), dtype=torch.float32) - low) / (high - low)
    keep = 1.0 - ramp.clamp(0.0, 1.0)  # fast pairs keep their frequency, slow ones are stretched
    return inverse * keep + inverse / config.yarn.factor * (1.0 - keep)


def _correction_range(config: ModelConfig, yarn: YarnScaling) -> tuple[float, float]:
    """Pairs between which YaRN blends: those that turn beta_fast and beta_slow times."""

    def pair_of(turns: float) -> float:
        ratio = yarn.original_context / (turns * 2 * math.pi)
        return config.attention.rope_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), config.attention.rope_dim - 1)
    return low, high if high > low else low + 0.001


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tokens of a call stand; tensors are where attention is computed."""

    positions_BT: Tensor
    turns_BTr: Tensor
    """Complex, (B, T, R/2): by how much each pair is turned (and stretched, by YaRN)."""
    starts: tuple[int, ...]
    """First position of each sequence."""
    seen: int
    """Positions up to the last one of any sequence: so many are attended to."""


class RoPE:
    """Turns queries and keys by their positions; one serves all layers of a model."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = frequencies(config)
        self.halves = config.attention.rope_pairs == "halves"
        yarn = config.yarn
        self._magnitude = (
            yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
            if yarn is not None
            else 1.0
        )
        self._latest: tuple[Tensor, Places] | None = None
        self._elsewhere: MutableMapping[Seat, tuple[Places, Places]] = WeakKeyDictionary()

    def places(self, positions_BT: Tensor, seat: Seat = HOST) -> "Places":
        """What every layer of a call needs of its positions, on its device."""
        found = self._places(positions_BT)
        if seat is HOST:
            return found
        kept = self._elsewhere.get(seat)
        if kept is None or kept[0] is not found:
            moved = replace(
                found,
                positions_BT=seat.take(found.positions_BT),
                turns_BTr=seat.take(found.turns_BTr),
            )
            self._elsewhere[seat] = kept = (found, moved)
        return kept[1]

    def _places(self, positions_BT: Tensor) -> "Places":
        # They ask with the same tensor: compute for the first, keep for the rest.
        latest = self._latest
        if latest is None or latest[0] is not positions_BT:
            angles = positions_BT[..., None].to(torch.float32) * self._frequencies
            turns = torch.polar(torch.full_like(angles, self._magnitude), angles)
            last, starts = positions_BT[:, -1].tolist(), positions_BT[:, 0].tolist()
            found = Places(
                positions_BT=positions_BT,
                turns_BTr=turns,
                starts=tuple(starts),
                seen=max(last) + 1,
            )
            self._latest = latest = (positions_BT, found)
        return latest[1]

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """x (..., R), with complex turns (..., R/2) broadcast against it.

        A pair is a complex number; to turn it by an angle is to multiply it.
        """
        if self.halves:
            turned = torch.complex(*x.chunk(2, dim=-1)) * turns
            return torch.cat((turned.real, turned.imag), dim=-1)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns
        return torch.view_as_real(turned).flatten(-2)
