"""Packing many tensors, one after the other, timed: never two copies of a model at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab import html
from ktlab.kernels import packing
from ktlab.kernels.packed_file import Header, PackCache, source_digest
from ktlab.kernels.request import Request
from ktlab.kernels.stack import Stack
from ktlab.record import Record


@dataclass(frozen=True, kw_only=True)
class PackedTensor(Record):
    """One tensor's packing."""

    name: str
    format: str
    source_bytes: int
    packed_bytes: int
    seconds: float
    how: str
    """"packed", "mapped from the cache", "was packed already"."""


@dataclass(frozen=True, kw_only=True)
class PackReport(Record):
    """What was packed, and how fast."""

    tensors: tuple[PackedTensor, ...]
    left: dict[str, str]
    """Tensors that were left as they are, with the reason."""
    threads: int

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.tensors)

    @property
    def packed_bytes(self) -> int:
        return sum(t.packed_bytes for t in self.tensors)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of blocks packed in a second; 0 if all came from a cache."""
        fresh = [t for t in self.tensors if t.how == "packed"]
        seconds = sum(t.seconds for t in fresh)
        return sum(t.source_bytes for t in fresh) / seconds / 1e9 if seconds else 0.0

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.how] = counts.get(tensor.how, 0) + 1
        counts.update({"left as they are": len(self.left)} if self.left else {})
        parts = [f"{count} {how}" for how, count in counts.items()]
        parts += [html.byte_size(self.packed_bytes), f"{self.seconds:.3g} s"]
        if self.gb_per_s:
            parts.append(f"{self.gb_per_s:.3g} GB/s with {self.threads} threads")
        return f"PackReport({', '.join(parts)})"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = [
            (t.name, t.format, html.byte_size(t.packed_bytes), f"{1e3 * t.seconds:.3g} ms", t.how)
            for t in self.tensors
        ]
        rows += [(name, "", "", "", f"left: {reason}") for name, reason in self.left.items()]
        table = html.table(rows, ("tensor", "format", "bytes", "time", "how"))
        return html.mimebundle(repr(self), html.card(repr(self), html.details("tensors", table)))


def pack_stacks(
    stacks: Iterable[Stack],
    request: Request,
    cache: PackCache | None = None,
    identity: str = "",
) -> Iterator[PackedTensor]:
    """Pack each stack and let its blocks go before the next one is touched.

    `identity` names the model file for the cache (`file_identity`), "" for weights in memory.
    """
    for stack in stacks:
        start = perf_counter()
        how = "was packed already" if stack.packed else "packed"
        if cache is not None:
            how = _through_cache(stack, request, cache, identity)
        weights = stack.weights(packing.PACKED, request)
        stack.release()
        yield PackedTensor(
            name=stack.name,
            format=stack.format.name,
            source_bytes=stack.nbytes,
            packed_bytes=weights.nbytes,
            seconds=perf_counter() - start,
            how=how,
        )


def _through_cache(stack: Stack, request: Request, cache: PackCache, identity: str) -> str:
    """What is packed already (small matrices are at their first use) stays where it is in memory,
    and is stored for the next start."""
    tensor, format = stack.tensor, stack.format.name
    source = source_digest(tensor, format, identity if stack.as_loaded else "")
    header = Header(format, *stack.matrices, source)

    def fill(out: NDArray[np.uint8]) -> None:
        if stack.packed:
            out[:] = stack.weights(packing.PACKED).data
        else:
            packing.pack(packing.blocks(tensor), request, out)

    there = cache.load(stack.name, format, source)
    packed = cache.store(stack.name, header, fill) if there is None else there
    if stack.packed:
        return "was packed already"
    stack.adopt(packed)
    return "packed" if there is None else "mapped from the cache"
