"""Muon for matrices, Adam for the rest.

Muon steps along the momentum of the gradient with its singular values pushed to one. The matrices
themselves may be bfloat16: float32 masters, kept here, take the steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from model import TinyModel, fused
from torch import Tensor, nn


def orthogonalise(x_MRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices, batched over M."""
    tall = x_MRC.shape[1] > x_MRC.shape[2]
    norm_M11 = x_MRC.float().square().sum((1, 2), keepdim=True).sqrt()
    x_MRC = x_MRC / (norm_M11 + 1e-7).to(x_MRC.dtype)
    for _ in range(steps):
        # The quintic's coefficients trade exactness for a steep slope at zero. Here s is the
        # shorter side: the polynomial of the Gram matrix is small and costs one product more.
        gram_Mss = torch.bmm(x_MRC.mT, x_MRC) if tall else torch.bmm(x_MRC, x_MRC.mT)
        series_Mss = torch.bmm(gram_Mss, gram_Mss).mul_(2.0315).add_(gram_Mss, alpha=-4.7750)
        series_Mss.diagonal(dim1=1, dim2=2).add_(3.4445)
        x_MRC = torch.bmm(x_MRC, series_Mss) if tall else torch.bmm(series_Mss, x_MRC)
    return x_MRC


@partial(fused, dynamic=True)
def accumulate(momentum: Tensor, grad: Tensor, decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Update the momentum in place; return Nesterov's look ahead."""
    momentum.mul_(decay).add_(grad)
    return (grad + decay * momentum).to(dtype)


@partial(fused, dynamic=True)
def descend(master: Tensor, matrix: Tensor, step: Tensor, rate: Tensor, shrink: Tensor) -> None:
    master.mul_(shrink).sub_(rate * step)
    matrix.copy_(master)


class Muon:
    """The optimiser of a whole `TinyModel`. Rates are peak rates, scaled by `step`'s argument."""

    rate, weight_decay = 0.02, 0.05
    adam_rates = {"embedding": 0.01, "head": 0.004, "router": 0.0015, "norm": 0.003}

    def __init__(self, model: TinyModel, compute: torch.dtype) -> None:
        self.matrices: dict[str, nn.Parameter] = {}
        self.rows: dict[str, int] = {}
        groups = []
        for name, parameter in model.named_parameters():
            kind = next((kind for kind in self.adam_rates if kind in name), None)
            if kind is not None:
                groups.append({"params": [parameter], "peak": self.adam_rates[kind]})
                continue
            self.matrices[name] = parameter
            # Gate and up share an array but are matrices of their own.
            self.rows[name] = parameter.shape[-2] // (2 if name.endswith("gate_up") else 1)
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self.master = {name: p.detach().float().clone() for name, p in self.matrices.items()}
        self.momentum = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.compute = compute
        for parameter in self.matrices.values():
            parameter.data = parameter.data.to(compute)

    @torch.no_grad()
    def step(self, scale: float, decay: float) -> None:
        """One step at `scale` times the peak rates, with momentum `decay`; clears gradients."""
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * scale
        self.adam.step()
        self.adam.zero_grad()
        for name, parameter in self.matrices.items():
            assert parameter.grad is not None
            rows, columns = self.rows[name], parameter.shape[-1]
            look = accumulate(
                self.momentum[name].flatten(),
                parameter.grad.flatten(),
                torch.tensor(decay),
                self.compute,
            )
            step = orthogonalise(look.view(-1, rows, columns)).flatten()
            rate = self.rate * scale
            descend(
                self.master[name].flatten(),
                parameter.data.flatten(),
                step,
                torch.tensor(rate * max(1.0, rows / columns) ** 0.5),
                torch.tensor(1 - rate * self.weight_decay),
            )
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum, "master": self.master}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.momentum, self.master = state["momentum"], state["master"]
