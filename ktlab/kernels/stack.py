"""One quantized matrix, or a stack of them, with what kernels have made of it.

E experts, N rows (output features), K columns (input features).
"""

import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor

from ktlab.errors import FormatError
from ktlab.kernels import packing
from ktlab.kernels.request import BLOCKS, PACKED, Kernel, Request
from ktlab.kernels.torch_moe import float_tensor
from ktlab.kernels.weights import Weights
from ktlab.quantization import QTensor

FLOATS, HALVES = "float32", "bfloat16"

Operand = TypeVar("Operand")


class Stack:
    """A tensor (N, K) or (E, N, K), and operands by what they depend on: the layout alone.

    Clones of a model share it, so that nothing is packed or decoded twice. The blocks may be let
    go once they are packed (`release`), those of a requantized copy are; whoever asks for them
    again gets them back bit for bit.
    """

    def __init__(self, tensor: QTensor, *, as_loaded: bool = True) -> None:
        self.as_loaded = as_loaded
        """Whether these are the checkpoint's own bytes, not requantized ones."""
        self.name, self.format, self.shape = tensor.name, tensor.format, tensor.shape
        self.source, self.nbytes = tensor.source, tensor.nbytes
        self._tensor: QTensor | None = tensor
        self._unpacked: weakref.ref[QTensor] | None = None
        self._operands: dict[Any, Any] = {}
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """Number of weights."""
        experts, rows, cols = self.matrices
        return experts * rows * cols

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(E, N, K); E = 1 for a single matrix."""
        if len(self.shape) not in (2, 3):
            raise FormatError(f"{self.name} is {self.shape}; expected (N, K) or (E, N, K)")
        experts, rows, cols = (1, *self.shape)[-3:]
        return experts, rows, cols

    @property
    def tensor(self) -> QTensor:
        """The tensor in blocks. If they were let go: unpacked, and kept while somebody uses it."""
        with self._lock:
            if self._tensor is not None:
                return self._tensor
            kept = self._unpacked() if self._unpacked is not None else None
            if kept is None:
                kept = packing.unpack_tensor(self._operands[PACKED], self.name, self.shape)
                self._unpacked = weakref.ref(kept)
            return kept

    def operand(self, key: Any, make: Callable[[], Operand]) -> Operand:
        """What `make` gives, made at the first call and kept under `key`."""
        found = self._operands.get(key)
        if found is None:
            with self._lock:
                found = self._operands.get(key)
                if found is None:
                    found = self._operands[key] = make()
        return found

    def weights(self, layout: str, kernel: Kernel | Request | None = None) -> Weights:
        """The encoded numbers in `layout`; packed at first use, with the threads of `kernel`."""
        if layout == BLOCKS:
            return self.operand(BLOCKS, lambda: packing.blocks(self.tensor))
        return self.operand(PACKED, lambda: self._packed(kernel))

    def _packed(self, kernel: Kernel | Request | None) -> Weights:
        tensor = self.tensor
        packed = packing.pack(packing.blocks(tensor), kernel)
        # Pages of a mapped file come again if asked for, and a copy is packed only to be computed.
        if not packing.drop_pages(tensor.blocks) and not self.as_loaded:
            self._forget_blocks()
        return packed

    def adopt(self, packed: Weights) -> None:
        """Take weights that were packed before, e.g. mapped from a cache."""
        if (packed.experts, packed.rows, packed.cols) != self.matrices or (
            packed.format != self.format.name
        ):
            raise FormatError(
                f"{self.name} is {self.format.name} {self.matrices}, the packed weights are "
                f"{packed.format} {(packed.experts, packed.rows, packed.cols)}"
            )
        with self._lock:
            self._operands[PACKED] = packed

    @property
    def floats(self) -> Tensor:
        """The values as float32, of `shape`."""
        return self.operand(FLOATS, lambda: float_tensor(self.tensor))

    @property
    def halves(self) -> Tensor:
        """The values rounded to bfloat16, of `shape`."""
        return self.operand(HALVES, lambda: float_tensor(self.tensor).to(torch.bfloat16))

    @property
    def packed(self) -> bool:
        """Whether it has been packed already."""
        return PACKED in self._operands

    def release(self) -> None:
        """Let go of the blocks once packed: a mapped file's pages, or this object's own copy."""
        with self._lock:
            if self._tensor is None or not self.packed:
                return
            if not packing.drop_pages(self._tensor.blocks):
                self._forget_blocks()

    def _forget_blocks(self) -> None:
        if self._tensor is not None:
            self._unpacked, self._tensor = weakref.ref(self._tensor), None
            for key in [k for k in self._operands if BLOCKS in k]:
                del self._operands[key]

    @property
    def block_bytes(self) -> int:
        """Bytes of the blocks; 0 once they were let go."""
        return 0 if self._tensor is None else self.nbytes

    @property
    def operands(self) -> frozenset[Any]:
        """The keys of what was made so far."""
        return frozenset(self._operands)

    def forget(self, keep: Collection[Any] = ()) -> None:
        """Let go of all that was made but `keep`, and but packed weights without blocks; who
        computes with some of it now still has it."""
        with self._lock:
            for key in self.operands - frozenset(keep):
                if self._tensor is not None or PACKED not in key:
                    self._operands.pop(key, None)

    @property
    def operand_bytes(self) -> dict[str, int]:
        """Bytes of the copies made so far, by what they are."""
        found = {}
        for key in (PACKED, FLOATS, HALVES):
            made = self._operands.get(key)
            if made is not None:
                found[key] = int(made.nbytes)
        return found

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        copies = ", ".join(self.operand_bytes) or "nothing made of it yet"
        return f"Stack({self.name}: {shape}, {self.format.name}; {copies})"
