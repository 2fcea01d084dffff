"""Experts in the memories of NUMA nodes: each node's processors compute what lies beside them.

Three ways to share a layer's experts among N nodes:

    interleave   expert e is on node e mod N; a token's experts decide who works (memory x 1)
    split        each node has a share of every expert's inner width; all work on all (x 1)
    copy         each node has all; a call's experts are dealt out evenly (x N, KTransformers'
                 USE_NUMA=1)

T tokens, E experts, K selected, F expert width, D hidden.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktlab.errors import PlacementError
from ktlab.kernels import dispatch, packing, products
from ktlab.kernels.request import PACKED, Kernel
from ktlab.kernels.stack import Stack
from ktlab.kernels.threads import numa_nodes
from ktlab.quantization import QTensor

if TYPE_CHECKING:
    from ktlab.experts.bank import ExpertBank, Stacks

MODES = ("interleave", "split", "copy")
ALONE = "none"
"""Nodes share nothing."""


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """One a node but the first; they wait for native code, which has threads of its own."""
    return ThreadPoolExecutor(max_workers=16, thread_name_prefix="ktlab-nodes")


@dataclass(frozen=True, kw_only=True, eq=False)
class NodePart:
    """Experts, or a share of each, in the memory of one node."""

    node: int
    ids: tuple[int, ...]
    kernel: Kernel
    stacks: "Stacks"
    local: Tensor
    """(E,) the place of an expert among `ids`, or -1."""

    @classmethod
    def of(
        cls, bank: "ExpertBank", node: int, ids: Sequence[int], inner: slice | None = None
    ) -> "NodePart":
        """Packed by the node's own threads: memory is where it is first written to. `inner` is a
        share of F in whole blocks."""
        request = bank.request.with_(numa=node, layout=PACKED)
        kernel = dispatch.choose(request, bank.formats)
        chosen, parts = np.asarray(ids), []
        for stack, axis in zip(bank.stacks, (1, 1, 2), strict=True):
            tensor = stack.tensor[chosen]
            part = Stack(tensor if inner is None else _cut(tensor, axis, inner), as_loaded=False)
            part.adopt(packing.pack(packing.blocks(part.tensor), kernel))
            part.release()
            parts.append(part)
        local = torch.full((bank.num_experts,), -1, dtype=torch.int64)
        local[list(ids)] = torch.arange(len(ids))
        gate, up, down = parts
        return cls(node=node, ids=tuple(ids), kernel=kernel, stacks=(gate, up, down), local=local)

    def moe(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See `ExpertBank.forward`; experts that are not here count as nobody."""
        here_TK = torch.where(ids_TK < 0, -1, self.local[ids_TK.clamp_min(0)])
        return products.moe(self.kernel, self.stacks, hidden_TD, here_TK, weights_TK)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy."""
        return sum(sum(stack.operand_bytes.values()) for stack in self.stacks)

    @property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The bytes themselves."""
        return [stack.weights(PACKED).data for stack in self.stacks]


def _cut(tensor: QTensor, axis: int, inner: slice) -> QTensor:
    """A share of F: rows of gate and up (E, F, D), columns of down (E, D, F)."""
    format, blocks = tensor.format, tensor.blocks
    shape = list(tensor.shape)
    shape[axis] = inner.stop - inner.start
    if axis == 1:
        cut = blocks[:, inner]
    else:
        head = format.row_head_bytes  # the row's scale belongs to each share of it
        first, last = (
            head + n // format.block_size * format.block_bytes for n in (inner.start, inner.stop)
        )
        cut = np.concatenate((blocks[..., :head], blocks[..., first:last]), axis=-1)
    return QTensor(
        name=tensor.name,
        format=format,
        shape=tuple(shape),
        blocks=np.ascontiguousarray(cut),
        source=f"a share of {tensor.source}",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Team:
    """All nodes, sharing experts in one of `MODES`."""

    mode: str
    ids: tuple[int, ...]
    parts: tuple[NodePart, ...]

    @classmethod
    def of(cls, bank: "ExpertBank", mode: str, ids: Sequence[int]) -> "Team":
        """One part a node."""
        nodes = check_nodes(mode)
        if mode == "interleave":
            whose = [[e for e in ids if e % len(nodes) == i] for i in range(len(nodes))]
            made = [NodePart.of(bank, n, own) for n, own in zip(nodes, whose, strict=True) if own]
        elif mode == "copy":
            made = [NodePart.of(bank, node, ids) for node in nodes]
        else:
            shares = _shares(bank, len(nodes))
            made = [NodePart.of(bank, n, ids, s) for n, s in zip(nodes, shares, strict=True)]
        return cls(mode=mode, ids=tuple(ids), parts=tuple(made))

    def moe(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See `ExpertBank.forward`; all nodes at once."""
        asked = self._dealt(ids_TK) if self.mode == "copy" else [ids_TK] * len(self.parts)
        first, *others = (
            _inference(part, hidden_TD, ids, weights_TK)
            for part, ids in zip(self.parts, asked, strict=True)
        )
        waiting = [_threads().submit(work) for work in others]
        total = first()
        for one in waiting:
            total = total + one.result()
        return total

    def _dealt(self, ids_TK: Tensor) -> list[Tensor]:
        """Each part's experts: the one with most tokens to the node with least work."""
        counts = torch.bincount(ids_TK.reshape(-1) + 1)[1:]
        whose, work = torch.zeros(len(counts) + 1, dtype=torch.int64), [0] * len(self.parts)
        for expert in counts.argsort(descending=True, stable=True).tolist():
            if not counts[expert]:
                break
            least = work.index(min(work))
            whose[expert] = least
            work[least] += int(counts[expert])
        owner_TK = whose[ids_TK.clamp_min(0)]
        return [ids_TK.masked_fill(owner_TK != i, -1) for i in range(len(self.parts))]

    @property
    def nbytes(self) -> int:
        """Bytes on all nodes."""
        return sum(part.nbytes for part in self.parts)

    def __str__(self) -> str:
        return f"{', '.join(f'numa:{part.node}' for part in self.parts)} ({self.mode})"


def _inference(part: NodePart, *arguments: Tensor) -> Callable[[], Tensor]:
    def work() -> Tensor:
        with torch.inference_mode():
            return part.moe(*arguments)

    return work


def _shares(bank: "ExpertBank", count: int) -> list[slice]:
    """F in whole blocks of `down`, as evenly as that goes."""
    block = bank.stacks[2].format.block_size
    blocks = bank.width // block
    if blocks < count:
        raise PlacementError(
            f"layers.{bank.layer}.experts: {bank.width} wide in {bank.stacks[2].format.name}, "
            f"which is {blocks} blocks of {block}: too few to split among {count} NUMA nodes; "
            "interleave or copy them"
        )
    borders = [i * blocks // count * block for i in range(count + 1)]
    borders[-1] = bank.width
    return [slice(a, b) for a, b in zip(borders, borders[1:], strict=False)]


def check_nodes(mode: str) -> list[int]:
    """The machine's nodes; PlacementError where there is nothing to share, or no such mode."""
    if mode not in MODES:
        raise PlacementError(f"nodes={mode!r}: expected one of {', '.join(MODES)}, or {ALONE}")
    nodes = numa_nodes()
    if len(nodes) < 2:
        found = ", ".join(f"node {n}: processors {list(cpus)}" for n, cpus in nodes.items())
        raise PlacementError(
            f"nodes={mode!r}: this machine has {len(nodes)} NUMA node{'s' * (len(nodes) != 1)} "
            f"({found or 'the system lists none'}); there is nothing to share among nodes"
        )
    return list(nodes)


def bytes_on_nodes(bank: "ExpertBank", mode: str, experts: int) -> int:
    """What `Team.of` will take for so many experts of a bank."""
    return bank.expert_bytes * experts * (len(check_nodes(mode)) if mode == "copy" else 1)
