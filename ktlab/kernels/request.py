"""What a user asks of a computation, and what was chosen: five words that are never merged.

format says how numbers are encoded, layout how they lie, backend which code runs, isa which
instructions it uses, threads (and numa) on how many processors.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ktlab.errors import SettingError, nearest
from ktlab.kernels.threads import check_threads, node_cpus, whole_number

AUTO = "auto"
BACKENDS = (AUTO, "native", "numba", "torch", "numpy")
BLOCKS, PACKED = "ggml_blocks", "packed"
LAYOUTS = (AUTO, BLOCKS, PACKED)
EMULATED = ("amx_bf16_emulated", "amx_int8_emulated")
BF16_ISA = "avx512_bf16"
NATIVE_ISAS = (
    "amx_bf16", "avx512_vnni", BF16_ISA, "amx_int8", "avx2", "serial", *EMULATED
)  # fmt: skip
"""The best first. The emulated ones run AMX's kernels on any machine, slowly: for tests and
lessons, so only where they are named."""
NUMBA_ISA, TORCH_ISA, NUMPY_ISA = "LLVM's choice", "oneDNN's choice", "BLAS's choice"
"""Said of backends whose library picks its instructions; cannot be named."""
ISAS = (AUTO, *NATIVE_ISAS)
ISA_VARIABLE = "KTLAB_ISA"
"""Environment variable that stands for `isa=` wherever native code runs and no isa was named."""


MOST_TOKENS = (1 << 31) - 1
"""The C core counts them in an int."""


def _check_word(kind: str, word: object, known: Sequence[str]) -> None:
    if word not in known:
        raise SettingError(
            f"{kind} {word!r} is unknown; expected one of {', '.join(known)}"
            f"{nearest(str(word), known)}"
        )


def check_tokens(word: str, tokens: Any) -> int:
    """A number of tokens that the kernels can count to, else a `SettingError`."""
    number = whole_number(tokens)
    if number is None or not 0 <= number <= MOST_TOKENS:
        raise SettingError(
            f"{word} = {tokens!r}: expected a whole number of tokens from 0 to {MOST_TOKENS}"
        )
    return number


@dataclass(frozen=True, kw_only=True)
class Request:
    """How something shall be computed. "auto" and None leave the choice to the dispatch table."""

    backend: str = AUTO
    isa: str = AUTO
    layout: str = AUTO
    threads: int | None = None
    """None: one a physical core."""
    numa: int | None = None
    """Run on the processors of this NUMA node only."""
    few: int | None = None
    """Up to so many tokens (of one expert) take the path for few tokens; None: `switch.few_for`."""

    def __post_init__(self) -> None:
        _check_word("backend", self.backend, BACKENDS)
        _check_word("isa", self.isa, ISAS)
        _check_word("layout", self.layout, LAYOUTS)
        object.__setattr__(self, "threads", check_threads(self.threads))
        if self.numa is not None:
            node_cpus(self.numa)
        if self.few is not None:
            object.__setattr__(self, "few", check_tokens("few", self.few))

    def with_(self, **changes: Any) -> "Request":
        """A changed copy; `SettingError` on words that do not exist.

        What is named now counts more than what was named before: an older word that cannot stand
        beside it goes back to "auto". (What is named at once must fit; `dispatch.choose` sees to
        that.)
        """
        changed = replace(self, **changes)
        free: dict[str, Any] = {}
        only_native = changed.isa != AUTO and changed.backend not in (AUTO, "native")
        no_layout = changed.layout != AUTO and changed.backend == "torch"
        no_layout |= changed.layout == PACKED and changed.backend == "numpy"
        for conflict, word in ((only_native, "isa"), (no_layout, "layout")):
            if conflict and not {word, "backend"} <= set(changes):
                free["backend" if word in changes else word] = AUTO
        return replace(changed, **free)

    @property
    def wanted_isa(self) -> str:
        """The isa asked for here or by KTLAB_ISA, which counts where native code may run."""
        forced = os.environ.get(ISA_VARIABLE, "").strip().lower()
        if self.isa != AUTO or not forced or self.backend not in (AUTO, "native"):
            return self.isa
        _check_word(f"{ISA_VARIABLE} =", forced, ISAS)
        return forced

    def __str__(self) -> str:
        words = [w for w in (self.backend, self.isa, self.layout) if w != AUTO]
        words += [
            f"{name} {value}"
            for name in ("threads", "numa", "few")
            if (value := getattr(self, name)) is not None
        ]
        return " ".join(words) or AUTO


REQUEST_WORDS = tuple(f.name for f in fields(Request))


class Settled(Request):
    """A request of small matrices for which no layout was named: they are packed."""

    @classmethod
    def of(cls, request: Request) -> "Settled":
        return cls(**{word: getattr(request, word) for word in REQUEST_WORDS} | {"layout": PACKED})


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What will run: the answer to a `Request` for given formats."""

    backend: str
    isa: str
    layout: str
    threads: int
    numa: int | None
    few: int
    reason: str
    """Why this one."""

    def __str__(self) -> str:
        words = [f"{self.backend} {self.isa}", self.layout]
        if self.backend in ("native", "numba"):
            words.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        if self.numa is not None:
            words.append(f"numa {self.numa}")
        if self.backend in ("native", "numba"):
            words.append(f"few {self.few}")
        return ", ".join(words)
