"""The routed experts of one layer: three stacked quantized matrices and the kernel that runs them.

T tokens, D hidden, E experts, K selected, F expert width.
"""

import copy
from typing import Any

from torch import Tensor

from ktlab import html
from ktlab.kernels import dispatch
from ktlab.quantization import QTensor, fallback_format

KEPT_FORMATS = 2
"""Requantized copies of a bank that are kept for a quick toggle back, with all that kernels made of
them (a float32 copy is four times Q8_0); the oldest goes first. Binder has 2 GB in all."""


class ExpertBank:
    """gate and up (E, F, D), down (E, D, F); `backend` is live.

    Operands that a kernel prepares (a float32 copy, codes apart from scales) are made at first
    use and shared by every clone, since they depend on the weights alone.
    """

    placement = "cpu"

    def __init__(self, layer: int, gate: QTensor, up: QTensor, down: QTensor) -> None:
        self.layer = layer
        self.gate, self.up, self.down = gate, up, down
        self._stored = (gate, up, down)
        self.backend = dispatch.AUTO
        self._operands: dict[str, Any] = {}
        # By format, weights and operands: requantized once, shared by clones like the rest.
        self._requantized: dict[str, tuple[tuple[QTensor, QTensor, QTensor], dict[str, Any]]] = {}

    @property
    def formats(self) -> tuple[str, str, str]:
        """Formats of gate, up and down: a Q4_K_M file mixes them."""
        return self.gate.format.name, self.up.format.name, self.down.format.name

    @property
    def format(self) -> str:
        """The formats as one word: "q8_0", or "q4_k+q6_k" where they differ."""
        return "+".join(dict.fromkeys(self.formats))

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights, without prepared copies."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's quantized weights."""
        return self.nbytes // self.num_experts

    @property
    def prepared_bytes(self) -> dict[str, int]:
        """Bytes of the copies made so far, by backend."""
        return {
            name: operands.nbytes
            for name, operands in self._operands.items()
            if hasattr(operands, "nbytes")
        }

    @property
    def layout(self) -> str:
        """How the numbers lie that a decode step reads."""
        return dispatch.choose(self.backend, self.formats, tokens=1).layout

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of the selected experts, (T, D) float32; id -1 selects nobody."""
        kernel = dispatch.choose(self.backend, self.formats, tokens=hidden_TD.shape[0])
        operands = self._operands.get(kernel.backend)
        if operands is None:
            operands = self._operands[kernel.backend] = kernel.prepare(
                self.gate, self.up, self.down
            )
        return kernel.run(operands, hidden_TD, ids_TK, weights_TK)

    def explain(self, tokens: int = 1) -> dispatch.Explanation:
        """Each kernel for calls of `tokens` tokens: chosen, usable, or rejected because ..."""
        return dispatch.explain(self.backend, self.formats, tokens)

    def quantized(self, format: str) -> "ExpertBank":
        """The stored experts in another format (rows that do not fit it fall back as in llama.cpp),
        with this bank's switches. Always from the weights as loaded: errors do not add up."""
        kept = self._requantized.get(format)  # once: another thread may drop it meanwhile
        if kept is None:
            while len(self._requantized) >= KEPT_FORMATS:
                self._requantized.pop(next(iter(self._requantized)), None)
            gate, up, down = (
                weight.requantize(fallback_format(format, weight.shape[-1]))
                for weight in self._stored
            )
            kept = self._requantized[format] = ((gate, up, down), {})
        bank = copy.copy(self)
        (bank.gate, bank.up, bank.down), bank._operands = kept
        return bank

    def __repr__(self) -> str:
        width, hidden = self.gate.shape[1:]
        return (
            f"ExpertBank(layer {self.layer}: {self.num_experts} experts of {hidden} x {width}, "
            f"{self.format}, {html.byte_size(self.nbytes)}, backend {self.backend}, "
            f"{self.placement})"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = [
            (name, " x ".join(map(str, w.shape)), w.format.name, html.byte_size(w.nbytes))
            for name, w in (("gate", self.gate), ("up", self.up), ("down", self.down))
        ]
        copies = {k: html.byte_size(v) for k, v in self.prepared_bytes.items()}
        body = html.pairs(
            {
                "one expert": html.byte_size(self.expert_bytes),
                "backend": self.backend,
                "layout": self.layout,
                "placement": self.placement,
                "prepared copies": ", ".join(f"{k} {v}" for k, v in copies.items()) or "none yet",
            }
        )
        title = f"layers[{self.layer}].experts: {self.num_experts} routed experts"
        table = html.table(rows, ("matrix", "shape", "format", "bytes"))
        return html.mimebundle(repr(self), html.card(title, table, body))
