"""Who takes part in a benchmark of expert kernels: ktlab's own kernel, and the peers'.

T tokens, D hidden.
"""

from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ktlab.experts.bank import ExpertBank
from ktlab.kernels.request import Kernel, Request
from ktlab.measurement.peers.client import Peer
from ktlab.measurement.synthetic import Inputs, SyntheticExperts, fallbacks

FLOAT_BYTES = 4
OPERATIONS_ISA = {"amx": "amx_int8", "avx2": "avx2"}
"""Of kt-kernel's builds, the instruction set whose peak holds; the others are AVX-512 with VNNI."""


class Contender(Protocol):
    """Something that computes the layer, fed with inputs by their number of tokens."""

    label: str
    group: str
    """Of several contenders of a group, which differ in the layout alone, the best counts."""
    format: str
    """Asked for; `reason` says where a matrix has another."""
    layout: str
    backend: str
    isa: str
    peak_isa: str
    """Instruction set whose peak is its ceiling for many tokens; "" = float32."""

    def expert_bytes(self) -> float:
        """Bytes of one expert's weights as this contender reads them."""
        ...

    def run(self, tokens: int, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        ...

    def output(self, tokens: int) -> NDArray[np.float32]:
        """(T, D) for the first routing."""
        ...

    def kernel(self, tokens_per_expert: float) -> str:
        """What ran."""
        ...

    def reason(self) -> str:
        """Why this."""
        ...


class OwnKernel:
    """An `ExpertBank` under one request."""

    label, group = "ktlab", "ktlab"

    def __init__(
        self, experts: SyntheticExperts, inputs: dict[int, Inputs], format: str, request: Request
    ) -> None:
        self.bank = ExpertBank(0, *experts.weights.values())
        self.bank.request = request
        self.chosen: Kernel = self.bank.kernel
        self.backend, self.isa = self.chosen.backend, self.chosen.isa
        self.layout, self.format, self.shape = self.chosen.layout, format, experts.shape
        self._instead = fallbacks(format, experts.formats)
        floats = set(self.bank.formats) <= {"f32", "f16", "bf16"}
        own_peak = self.backend == "native" and (not floats or "_bf16" in self.isa)
        self.peak_isa = self.isa.removesuffix("_emulated") if own_peak else ""
        self._turn = 0
        self._inputs = {
            tokens: (
                torch.from_numpy(i.hidden_TD),
                torch.from_numpy(i.ids_VTK),
                torch.from_numpy(i.weights_VTK),
            )
            for tokens, i in inputs.items()
        }

    def expert_bytes(self) -> float:
        if self.backend == "torch":
            return FLOAT_BYTES * self.shape.expert_weights
        prepared = self.bank.prepared_bytes
        if self.layout in prepared:
            return prepared[self.layout] / self.shape.experts
        return self.bank.expert_bytes

    def run(self, tokens: int, repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            self._turn += 1
            arguments = self._arguments(tokens, self._turn)
            start = perf_counter()
            self.bank.forward(*arguments)
            seconds.append(perf_counter() - start)
        return seconds

    def output(self, tokens: int) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self.bank.forward(*self._arguments(tokens, 0)).numpy()
        return result

    def _arguments(self, tokens: int, turn: int) -> tuple[torch.Tensor, ...]:
        hidden_TD, ids_VTK, weights_VTK = self._inputs[tokens]
        routing = turn % len(ids_VTK)
        return hidden_TD, ids_VTK[routing], weights_VTK[routing]

    def kernel(self, tokens_per_expert: float) -> str:
        if self.backend != "native":
            return f"{self.backend}, {self.isa}"
        path = "few" if tokens_per_expert <= self.chosen.few else "many"
        return f"native {self.isa}, path for {path} tokens"

    def reason(self) -> str:
        return "; ".join(filter(None, (self.chosen.reason, self._instead)))


class PeerKernel:
    """A peer's process."""

    def __init__(self, peer: Peer, folder: Path, experts: SyntheticExperts, format: str) -> None:
        self.peer, self.folder = peer, folder
        method, found = peer.method, peer.description
        self.label = method.label
        self.group = f"{method.peer} {method.own_format}"
        self.backend = method.peer
        self.layout, self.isa = found["layout"], found["isa"]
        self.format = method.own_format or format
        self._instead = "" if method.own_format else fallbacks(format, experts.formats)
        own_bytes = method.own_bits / 8 * experts.shape.expert_weights
        self._expert_bytes = own_bytes or experts.expert_bytes
        # Neither LLAMAFILE nor ggml's mul_mat_id has a path through AMX.
        self.peak_isa = "avx512_vnni" if "avx512" in self.isa or self.isa == "amx" else "avx2"
        if method.own_format:
            self.peak_isa = OPERATIONS_ISA.get(self.isa, "avx512_vnni")

    def expert_bytes(self) -> float:
        return self._expert_bytes

    def run(self, tokens: int, repeats: int) -> list[float]:
        return self.peer.run(tokens, repeats)

    def output(self, tokens: int) -> NDArray[np.float32]:
        return self.peer.output(tokens, self.folder / "output.npy")

    def kernel(self, tokens_per_expert: float) -> str:
        return f"{self.peer.description['kernel']} ({self.label})"

    def reason(self) -> str:
        why = f"{self.peer.description['version']}, its own choice for this machine and format"
        return "; ".join(filter(None, (why, self._instead)))
