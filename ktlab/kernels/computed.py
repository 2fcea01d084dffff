"""What the expert banks and the matrices of the dense part share: a live choice of kernel."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

from ktlab.kernels import dispatch
from ktlab.kernels.pack_run import PackReport, pack_stacks
from ktlab.kernels.packed_file import PackCache
from ktlab.kernels.request import AUTO, PACKED, Kernel, Request, Settled
from ktlab.kernels.stack import Stack
from ktlab.kernels.threads import default_threads

_Computed = TypeVar("_Computed", bound="Computed")

PACKED_BYTES = 64 << 20
"""Up to here matrices are packed at their first use: short or odd rows are read up to ten times
faster. The second copy is a few percent of a large model, whose banks are larger than this; a small
model's experts it doubles, by so much a layer at most."""


class Computed:
    """Something that a kernel computes. `request` is what was asked for, `kernel` what runs."""

    stacks: tuple[Stack, ...]
    """The matrices, with what kernels have made of them."""
    _stored: tuple[Stack, ...]
    """The same as loaded."""

    def __init__(self) -> None:
        self._request = Request()
        self._kernel: Kernel | None = None
        # {format: stacks}: requantized once, shared by clones.
        self._requantized: dict[str, Any] = {}

    @property
    def kept_formats(self) -> tuple[str, ...]:
        """Formats that it has been requantized to and still has: taking them costs nothing."""
        return tuple(self._requantized)

    @property
    def requantized(self) -> Iterator[Stack]:
        """The stacks of its copies; what a copy shares with the stored weights is none."""
        for stacks in tuple(self._requantized.values()):
            yield from (stack for stack in stacks if not stack.as_loaded)

    def let_go(self, keep: Collection[str] = ()) -> None:
        """Forget requantized copies but those in the formats `keep`; who uses one still has it."""
        for format in [name for name in self._requantized if name not in keep]:
            self._requantized.pop(format, None)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of the matrices that one kernel must compute."""
        raise NotImplementedError

    @property
    def request(self) -> Request:
        """How it shall be computed; setting it raises `SettingError` on what cannot be."""
        return self._request

    @request.setter
    def request(self, request: Request) -> None:
        self._kernel = self._choose(request)
        self._request = request

    @property
    def kernel(self) -> Kernel:
        """What computes it, chosen once for its formats."""
        if self._kernel is None:
            self._kernel = self._choose(self._request)
        return self._kernel

    def _choose(self, request: Request) -> Kernel:
        return dispatch.choose(self.settled(request), self.formats)

    @property
    def small(self) -> bool:
        """Whether native kernels get it packed unasked."""
        return sum(stack.nbytes for stack in self.stacks) <= PACKED_BYTES

    def settled(self, request: Request, formats: Sequence[str] = ()) -> Request:
        """Where nothing else is named, native kernels get small matrices packed.

        `formats`: what the matrices would be requantized to."""
        if request.layout != AUTO or not self.small:
            return request
        if dispatch.choose(request, tuple(formats) or self.formats).backend != "native":
            return request
        return Settled.of(request)

    @property
    def backend(self) -> str:
        """The backend asked for; `kernel.backend` is the one that runs."""
        return self._request.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.request = self._request.with_(backend=backend)

    @property
    def isa(self) -> str:
        """The instruction set that runs."""
        return self.kernel.isa

    @property
    def layout(self) -> str:
        """How the numbers lie that the kernel reads."""
        return self.kernel.layout

    def use(self: _Computed, **words: Any) -> _Computed:
        """Set some of backend, isa, layout, threads, numa, few: live, nothing is reloaded.

        "auto" and None give a choice back to the dispatch table. Refused words change nothing.
        """
        self.request = self._request.with_(**words)
        return self

    def pack(
        self, cache: PackCache | None = None, *, identity: str = "", threads: int | None = None
    ) -> PackReport:
        """Pack the matrices now instead of at first use, and set layout="packed".

        Their blocks are let go; `use(layout="ggml_blocks")` brings them back. With a `cache` packed
        tensors come from files where they are there; `identity` is `file_identity` of the model's.
        """
        packed = self._request.with_(layout=PACKED)
        dispatch.choose(packed, self.formats)
        request = packed if threads is None else packed.with_(threads=threads)
        tensors = tuple(pack_stacks(self.stacks, request, cache, identity))
        self.request = packed
        return PackReport(
            tensors=tensors, left={}, threads=request.threads or default_threads(request.numa)
        )

    def explain(self, tokens: int = 1) -> dispatch.Explanation:
        """Each backend, isa and layout: chosen, usable, or rejected because ...

        `tokens` of one expert decide between the path for few and the one for many.
        """
        return dispatch.explain(self.settled(self._request), self.formats, tokens)
