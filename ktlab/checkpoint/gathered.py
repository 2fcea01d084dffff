"""A tensor whose bytes are put together when somebody asks for them.

Experts that a file stores one by one lie wherever the file has them: to kernels they must be one
stack. That copy is made at first use; whoever converts them takes matrix by matrix and never makes
it, so a model and its conversion need not be in memory together.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels.packing import drop_pages
from ktlab.quantization import Format, QTensor

Bytes = NDArray[np.uint8]


class GatheredTensor(QTensor):
    """`make(i)` gives the rows, (N, row_bytes), of the i-th of `count` matrices, all alike."""

    def __init__(
        self,
        *,
        name: str,
        format: Format,
        shape: tuple[int, ...],
        make: Callable[[int], Bytes],
        count: int = 1,
        source: str = "memory",
    ) -> None:
        # A frozen dataclass sets its fields so; `blocks` is not among them here.
        values = dict(name=name, format=format, shape=shape, source=source)
        for field, value in values.items():
            object.__setattr__(self, field, value)
        format.row_bytes(shape[-1])  # refuses rows that do not fit
        object.__setattr__(self, "_make", make)
        object.__setattr__(self, "_count", count)

    _make: Callable[[int], Bytes]
    _count: int

    @cached_property
    def blocks(self) -> Bytes:
        """The whole stack, in memory from the first look on."""
        row_bytes = self.format.row_bytes(self.shape[-1])
        stack = np.empty(self.shape[:-1] + (row_bytes,), np.uint8)
        for target, rows in zip(
            stack.reshape(self._count, -1, row_bytes), self._byte_rows(), strict=True
        ):
            target[:] = rows
            drop_pages(rows)
        return stack

    @property
    def gathered(self) -> bool:
        """Whether the stack has been put together."""
        return "blocks" in vars(self)

    def matrices(self) -> Iterator[QTensor]:
        """One after the other, without putting them together first."""
        if self.gathered or self._count != math.prod(self.shape[:-2]):
            yield from super().matrices()
            return
        for index, rows in enumerate(self._byte_rows()):
            yield QTensor(
                name=f"{self.name}[{index}]" if self._count > 1 else self.name,
                format=self.format,
                shape=self.shape[-2:],
                blocks=rows,
                source=self.source,
            )

    def _byte_rows(self) -> Iterator[Bytes]:
        if self.gathered:
            yield from super()._byte_rows()
            return
        for index in range(self._count):
            yield self._make(index)
