"""SwiGLU with one set of weights: the shared expert, and the feed-forward network of dense layers.

Source: arXiv 2002.05202; DeepSeek-V3 (2412.19437) equation 12 for the shared expert's place.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab import html
from ktlab.kernels import products
from ktlab.kernels.linear import Linear
from ktlab.kernels.stack import Stack


@lru_cache(maxsize=8)
def _everybody(tokens: int) -> tuple[Tensor, Tensor]:
    """Expert 0 with weight 1 for each token: (T, 1) ids and weights."""
    return torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)


class MLP:
    """down(silu(gate x) * up x), with gate and up (F, D) and down (D, F)."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate, self.up, self.down = gate, up, down

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), float32."""
        kernel = self.gate.kernel
        if kernel.backend == "native" and self.alike:
            # A bank of one expert that everybody selects: one call instead of five.
            return products.moe(kernel, self.stacks, hidden_TD, *_everybody(len(hidden_TD)))
        return self.down(F.silu(self.gate(hidden_TD)).mul_(self.up(hidden_TD)))

    @property
    def stacks(self) -> tuple[Stack, Stack, Stack]:
        """gate, up and down."""
        return self.gate.stack, self.up.stack, self.down.stack

    @property
    def alike(self) -> bool:
        """Whether one call computes all three; where few tokens become many may differ."""
        kernels = (linear.kernel for linear in (self.gate, self.up, self.down))
        return len({(k.isa, k.layout, k.threads, k.numa) for k in kernels}) == 1

    @property
    def linears(self) -> dict[str, Linear]:
        """The three matrices by name."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def quantized(self, format: str) -> "MLP":
        """The same weights in another format."""
        return MLP(*(linear.quantized(format) for linear in self.linears.values()))

    def clone(self) -> "MLP":
        """The same weights under switches of their own."""
        return MLP(*(linear.clone() for linear in self.linears.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    @property
    def width(self) -> int:
        """F, the size of the inner activation."""
        return self.gate.stack.shape[0]

    def __repr__(self) -> str:
        return (
            f"MLP({self.gate.stack.shape[1]} x {self.width}, {self.gate.stack.format.name}, "
            f"{html.byte_size(self.nbytes)})"
        )
