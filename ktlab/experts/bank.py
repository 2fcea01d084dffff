"""The routed experts of one layer: three stacked quantized matrices and the kernel that runs them.

T tokens, D hidden, E experts, K selected, F expert width.
"""

import copy
from typing import Any

from torch import Tensor

from ktlab import html
from ktlab.kernels import dispatch, packing, products
from ktlab.kernels.computed import Computed
from ktlab.kernels.stack import Stack
from ktlab.quantization import QTensor, fallback_format, get_format

KEPT_FORMATS = 2
"""Requantized copies of a bank that are kept for a quick toggle back, with all that kernels made of
them (a float32 copy is four times Q8_0); the least recently used goes first. Binder has 2 GB."""

Stacks = tuple[Stack, Stack, Stack]


class ExpertBank(Computed):
    """gate and up (E, F, D), down (E, D, F); `request` is live, and `use` sets parts of it.

    What a kernel makes of the weights (packed panels, a float32 copy) is made at first use and
    shared by every clone, since it depends on the weights and the layout alone.
    """

    placement = "cpu"
    own: str = ""
    """What a class of the user's that stands here is called, with its words and its code's sum."""
    stacks: Stacks
    """gate, up and down, with what kernels have made of them."""
    _stored: Stacks

    def __init__(self, layer: int, gate: QTensor, up: QTensor, down: QTensor) -> None:
        super().__init__()
        self.layer = layer
        self.stacks = self._stored = (Stack(gate), Stack(up), Stack(down))

    # The weights -----------------------------------------------------------------------------

    @property
    def gate(self) -> QTensor:
        """(E, F, D)."""
        return self.stacks[0].tensor

    @property
    def up(self) -> QTensor:
        """(E, F, D)."""
        return self.stacks[1].tensor

    @property
    def down(self) -> QTensor:
        """(E, D, F)."""
        return self.stacks[2].tensor

    @property
    def formats(self) -> tuple[str, str, str]:
        """Formats of gate, up and down: a Q4_K_M file mixes them."""
        gate, up, down = (stack.format.name for stack in self.stacks)
        return gate, up, down

    @property
    def format(self) -> str:
        """The formats as one word: "q8_0", or "q4_k+q6_k" where they differ."""
        return "+".join(dict.fromkeys(self.formats))

    @property
    def computed_by(self) -> str:
        """The kernel, or the class of the user's that stands here."""
        return f"{type(self).__name__}, your own" if self.own else str(self.kernel)

    @property
    def num_experts(self) -> int:
        return self.stacks[0].shape[0]

    @property
    def width(self) -> int:
        """F, an expert's inner size."""
        return self.stacks[0].shape[1]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.stacks[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights, without prepared copies."""
        return sum(stack.nbytes for stack in self.stacks)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's quantized weights."""
        return self.nbytes // self.num_experts

    @property
    def prepared_bytes(self) -> dict[str, int]:
        """Bytes of the copies made so far, by layout."""
        found: dict[str, int] = {}
        for stack in self.stacks:
            for name, nbytes in stack.operand_bytes.items():
                found[name] = found.get(name, 0) + nbytes
        return found

    # The switches ----------------------------------------------------------------------------

    def use(self, *, format: str | None = None, **words: Any) -> "ExpertBank":
        """Set some of format, layout, backend, isa, threads, numa, few: live, nothing reloaded.

        "auto" and None give a choice back. Refused words change nothing.
        """
        request = self._request.with_(**words)
        if format is None:
            self.request = request
            return self
        # Asked before the long requantization: can this be computed at all?
        dispatch.choose(request, tuple(f.name for f in self._fitting(format)))
        self.stacks = self._in_format(format)
        self._request, self._kernel = request, None
        return self

    # Running ---------------------------------------------------------------------------------

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of the selected experts, (T, D) float32; id -1 selects nobody.

        Numbers may be floats of any kind, ids integers of any kind; see `products.moe`.
        """
        return products.moe(self.kernel, self.stacks, hidden_TD, ids_TK, weights_TK)

    def clone(self) -> "ExpertBank":
        """The same weights and operands under switches of its own."""
        return copy.copy(self)

    def quantized(self, format: str) -> "ExpertBank":
        """The stored experts in another format (rows that do not fit it fall back as in llama.cpp),
        with this bank's switches. Always from the weights as loaded: errors do not add up."""
        bank = copy.copy(self)
        bank.stacks, bank._kernel = self._in_format(format), None
        return bank

    def _fitting(self, format: str) -> list[Any]:
        return [fallback_format(format, stack.shape[-1]) for stack in self._stored]

    def _in_format(self, format: str) -> Stacks:
        format = get_format(format).name
        # One step: another thread may drop it meanwhile.
        kept: Stacks | None = self._requantized.pop(format, None)
        if kept is not None:
            self._requantized[format] = kept  # the latest used goes last
            return kept
        fitting = self._fitting(format)
        if all(f == s.format for f, s in zip(fitting, self._stored, strict=True)):
            return self._stored
        while len(self._requantized) >= KEPT_FORMATS:
            self._requantized.pop(next(iter(self._requantized)), None)
        gate, up, down = (
            stack
            if stack.format == format
            else Stack(packing.convert(stack.tensor, format, self._request), as_loaded=False)
            for stack, format in zip(self._stored, fitting, strict=True)
        )
        self._requantized[format] = (gate, up, down)
        return gate, up, down

    # Showing ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return html.wrapped(
            f"{type(self).__name__}(layer {self.layer}: {self.num_experts} experts of "
            f"{self.hidden_size} x {self.width}, {self.format}, {html.byte_size(self.nbytes)}, "
            f"{self.kernel}, {self.placement})"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = [
            (name, " x ".join(map(str, w.shape)), w.format.name, html.byte_size(w.nbytes))
            for name, w in zip(("gate", "up", "down"), self.stacks, strict=True)
        ]
        copies = {k: html.byte_size(v) for k, v in self.prepared_bytes.items()}
        kernel = self.kernel
        body = html.pairs(
            {
                "one expert": html.byte_size(self.expert_bytes),
                "asked for": str(self.request),
                "backend": kernel.backend,
                "instruction set": kernel.isa,
                "layout": kernel.layout,
                "threads": kernel.threads,
                "why": kernel.reason,
                "placement": self.placement,
                "prepared copies": ", ".join(f"{k} {v}" for k, v in copies.items()) or "none yet",
            }
        )
        title = f"layers[{self.layer}].experts: {self.num_experts} routed experts"
        table = html.table(rows, ("matrix", "shape", "format", "bytes"))
        return html.mimebundle(repr(self), html.card(title, table, body))
