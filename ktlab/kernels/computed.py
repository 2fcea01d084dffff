"""What the expert banks and the matrices of the dense part share: a live choice of kernel."""

from typing import Any, TypeVar

from ktlab.kernels import dispatch
from ktlab.kernels.request import Kernel, Request

_Computed = TypeVar("_Computed", bound="Computed")


class Computed:
    """Something that a kernel computes. `request` is what was asked for, `kernel` what runs."""

    def __init__(self) -> None:
        self._request = Request()
        self._kernel: Kernel | None = None

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
        self._kernel = dispatch.choose(request, self.formats)
        self._request = request

    @property
    def kernel(self) -> Kernel:
        """What computes it, chosen once for its formats."""
        if self._kernel is None:
            self._kernel = dispatch.choose(self._request, self.formats)
        return self._kernel

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

    def explain(self, tokens: int = 1) -> dispatch.Explanation:
        """Each backend, isa and layout: chosen, usable, or rejected because ...

        `tokens` of one expert decide between the path for few and the one for many.
        """
        return dispatch.explain(self._request, self.formats, tokens)
