"""The table of expert kernels, and the reason for every choice made from it.

A kernel that a user names runs or raises; only "auto" chooses, and it says why. A new kernel is
one entry here; a faster one for the same formats goes above it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktlab import html
from ktlab.errors import SettingError, nearest
from ktlab.kernels import numba_moe, reference, torch_moe
from ktlab.quantization.qtensor import QTensor

AUTO = "auto"
NUMBA_TOKENS = 48
"""Up to this many tokens one Numba pass beats torch's product per expert.

Measured on 2 cores of a Sapphire Rapids Xeon with 64 experts of 96 x 256, top 8: Numba takes 93 us
a token at any count; torch 0.5 ms for one token, 5.1 ms for 32 and 9.2 ms for 256.
"""


@dataclass(frozen=True, kw_only=True)
class ExpertKernel:
    """One way to compute an expert bank: `prepare` its operands once, `run` it on each call."""

    backend: str
    isa: str
    purpose: str
    layout: str
    reject: Callable[[str, str, str], str]
    """(gate, up, down formats) -> '' if usable, else why not."""
    prepare: Callable[[QTensor, QTensor, QTensor], Any]
    run: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    max_auto_tokens: float = float("inf")
    """`auto` takes this kernel up to so many tokens a call; 0 means never."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `explain` says of one kernel."""

    backend: str
    isa: str
    status: str
    reason: str


class Explanation(tuple[Verdict, ...]):
    """Every kernel that was considered, with its verdict; prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(f"{v.backend:8} {v.isa:12} {v.status:9} {v.reason}" for v in self)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        tones = {"chosen": "ok", "rejected": "bad"}
        rows = [
            (v.backend, v.isa, html.badge(v.status, tones.get(v.status, "")), v.reason)
            for v in self
        ]
        body = html.table(rows, ("backend", "isa", "verdict", "why"))
        return html.mimebundle(repr(self), html.card("expert kernels", body))


def _always(*_: str) -> str:
    return ""


def _only_q8_0(*formats: str) -> str:
    others = sorted(set(formats) - {"q8_0"})
    return f"computes q8_0 only, this bank has {', '.join(others)}" if others else ""


def _run_numba(bank: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    arrays = (t.contiguous().numpy() for t in (hidden_TD, ids_TK, weights_TK))
    return torch.from_numpy(numba_moe.moe(bank, *arrays))


def _run_reference(bank: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    arrays = (t.numpy() for t in (hidden_TD, ids_TK, weights_TK))
    return torch.from_numpy(reference.moe(*bank, *arrays).astype(np.float32))


EXPERT_KERNELS: tuple[ExpertKernel, ...] = (
    ExpertKernel(
        backend="numba",
        isa="LLVM's choice",
        purpose=f"few tokens: reads the 8-bit values once (auto: up to {NUMBA_TOKENS} a call)",
        layout="codes and scales apart",
        reject=_only_q8_0,
        prepare=numba_moe.prepare,
        run=_run_numba,
        max_auto_tokens=NUMBA_TOKENS,
    ),
    ExpertKernel(
        backend="torch",
        isa="oneDNN's choice",
        purpose="many tokens: one float32 product per expert",
        layout="float32 copy",
        reject=_always,
        prepare=torch_moe.prepare,
        run=torch_moe.moe,
    ),
    ExpertKernel(
        backend="numpy",
        isa="BLAS's choice",
        purpose="the reference: dequantizes each expert when its turn comes",
        layout="ggml_blocks",
        reject=_always,
        prepare=lambda *weights: weights,
        run=_run_reference,
        max_auto_tokens=0,
    ),
)

BACKENDS = (AUTO, *(kernel.backend for kernel in EXPERT_KERNELS))


def check_backend(backend: str) -> str:
    """`backend` if it exists, else a `SettingError` that lists what does."""
    if backend not in BACKENDS:
        raise SettingError(
            f"backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}"
            f"{nearest(backend, BACKENDS)}"
        )
    return backend


def choose(backend: str, formats: tuple[str, str, str], tokens: int) -> ExpertKernel:
    """The kernel that runs `tokens` tokens on a bank of these formats (gate, up, down).

    Raises `SettingError` if a named backend cannot compute the formats: it never falls back.
    """
    check_backend(backend)
    for kernel in EXPERT_KERNELS:
        reason = kernel.reject(*formats)
        if kernel.backend == backend:
            if reason:
                usable = [k.backend for k in EXPERT_KERNELS if not k.reject(*formats)]
                raise SettingError(
                    f"backend {backend!r} {reason}; usable here: {', '.join(usable)}, or 'auto'"
                )
            return kernel
        if backend == AUTO and not reason and tokens <= kernel.max_auto_tokens:
            return kernel
    raise AssertionError("the torch kernel takes everything")


def explain(backend: str, formats: tuple[str, str, str], tokens: int = 1) -> Explanation:
    """Each kernel: chosen, usable, or rejected because ..., for calls of `tokens` tokens."""
    chosen = choose(backend, formats, tokens)
    verdicts = []
    for kernel in EXPERT_KERNELS:
        reason = kernel.reject(*formats)
        status = "chosen" if kernel is chosen else "rejected" if reason else "usable"
        verdicts.append(
            Verdict(
                backend=kernel.backend,
                isa=kernel.isa,
                status=status,
                reason=reason or f"{kernel.purpose}; {kernel.layout}",
            )
        )
    return Explanation(verdicts)
