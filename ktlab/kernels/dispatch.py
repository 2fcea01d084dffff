"""Which code runs: every backend, instruction set and layout, and the reason for each verdict.

What a user names runs or raises; only "auto" chooses, and it says why. The table is in the order
in which `auto` looks at it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ktlab import html
from ktlab.errors import SettingError
from ktlab.kernels import native, numba_backend, switch
from ktlab.kernels.request import (
    AUTO,
    BLOCKS,
    EMULATED,
    ISA_VARIABLE,
    NATIVE_ISAS,
    NUMBA_ISA,
    NUMPY_ISA,
    PACKED,
    TORCH_ISA,
    Kernel,
    Request,
    Settled,
    check_tokens,
)
from ktlab.kernels.threads import default_threads

FLOAT_COPY = "float32 copy"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute given formats. `reject` is "" if it can be used here, else why not."""

    backend: str
    isa: str
    layout: str
    reject: str
    purpose: str
    only_named: str = ""
    """The word that must be named before this is taken: "layout", "isa", "backend", or ""."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `explain` says of one candidate."""

    backend: str
    isa: str
    layout: str
    status: str
    reason: str


class Explanation(tuple[Verdict, ...]):
    """Everything that was considered, with its verdict; prints as a table."""

    __slots__ = ()

    @property
    def chosen(self) -> Verdict:
        """The one that runs."""
        return next(v for v in self if v.status == "chosen")

    def __repr__(self) -> str:
        return "\n".join(
            f"{v.backend:8} {v.isa:17} {v.layout:12} {v.status:9} {v.reason}" for v in self
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        tones = {"chosen": "ok", "rejected": "bad"}
        rows = [
            (v.backend, v.isa, v.layout, html.badge(v.status, tones.get(v.status, "")), v.reason)
            for v in self
        ]
        body = html.table(rows, ("backend", "isa", "layout", "verdict", "why"))
        return html.mimebundle(repr(self), html.card("kernels", body))


def candidates(formats: Sequence[str]) -> Iterator[Candidate]:
    """All of them for matrices of these formats (gate, up, down; or one), best first.

    Lazy: what stands lower is not even imported if something above it is taken.
    """
    for isa in _best_first(formats):
        reject = native.reject(isa, formats)
        for layout, purpose in (
            (BLOCKS, "computes on the blocks as they lie in the file, nothing is copied"),
            (PACKED, "re-tiled for this instruction set's operands; packed at first use"),
        ):
            named = "isa" if isa in EMULATED else "layout" if layout == PACKED else ""
            yield Candidate(
                backend="native", isa=isa, layout=layout, reject=reject, purpose=purpose,
                only_named=named,
            )  # fmt: skip
    reject = numba_backend.reject(formats)
    for layout, purpose in (
        (
            BLOCKS,
            "few tokens: dequantize and dot at once; many: decoded once for its register tile",
        ),
        (PACKED, "the same on packed panels; packed at first use"),
    ):
        yield Candidate(
            backend="numba", isa=NUMBA_ISA, layout=layout, reject=reject, purpose=purpose,
            only_named="layout" if layout == PACKED else "",
        )  # fmt: skip
    yield Candidate(
        backend="torch", isa=TORCH_ISA, layout=FLOAT_COPY, reject="",
        purpose="one float32 product a matrix, on a copy 4 bytes a weight; torch's own threads",
    )  # fmt: skip
    yield Candidate(
        backend="numpy", isa=NUMPY_ISA, layout=BLOCKS, reject="", only_named="backend",
        purpose="the reference: dequantizes each matrix when its turn comes",
    )  # fmt: skip


def _best_first(formats: Sequence[str]) -> Sequence[str]:
    """Integer tiles pay where their sums are seldom scaled, and are beaten by vectors elsewhere;
    products of bfloat16 pay where the weights are."""
    if set(formats) == {"bf16"}:
        return sorted(NATIVE_ISAS, key=lambda isa: "_bf16" not in isa or isa in EMULATED)
    if any(switch.family(f) != "long scales" for f in formats if f in native.formats()):
        return NATIVE_ISAS
    return ("amx_int8", *(isa for isa in NATIVE_ISAS if isa != "amx_int8"))


def _matches(request: Request, isa: str, candidate: Candidate) -> bool:
    named = {"backend": request.backend, "isa": isa, "layout": request.layout}
    return all(word in (AUTO, getattr(candidate, kind)) for kind, word in named.items())


def _reject(request: Request, candidate: Candidate) -> str:
    """Why not, this request considered."""
    if request.numa is not None and candidate.backend != "native" and not candidate.reject:
        return f"only native threads can be kept on a NUMA node (numa={request.numa})"
    return candidate.reject


def _may_be_taken(request: Request, isa: str, candidate: Candidate) -> bool:
    if not _matches(request, isa, candidate) or _reject(request, candidate):
        return False
    named = {"": True, "isa": isa != AUTO, "layout": request.layout != AUTO}
    return named.get(candidate.only_named, request.backend != AUTO)


def _isa(request: Request, formats: Sequence[str]) -> str:
    """What must run. KTLAB_ISA counts where native code could run, not for unknown formats."""
    if request.isa == AUTO and request.backend == AUTO and not native.unavailable():
        if any(format not in native.formats() for format in formats):
            return AUTO
    return request.wanted_isa


def choose(request: Request, formats: Sequence[str]) -> Kernel:
    """What runs for matrices of `formats`, e.g. (gate, up, down).

    Raises `SettingError` if what was named cannot compute them: it never falls back.
    """
    isa = _isa(request, formats)
    for candidate in candidates(formats):
        if _may_be_taken(request, isa, candidate):
            return _kernel(request, isa, candidate, formats)
    raise SettingError(_why_nothing(request, isa, formats))


def _kernel(request: Request, isa: str, candidate: Candidate, formats: Sequence[str]) -> Kernel:
    few, border = 0, ""
    if candidate.backend in ("native", "numba"):
        found = switch.threshold(candidate.isa, candidate.layout, formats)
        few, why = found.few, found.reason
        if request.few is not None:
            few, why = request.few, "set"
        border = f"; up to {few} tokens of an expert take the path for few ({why})"
    if native.pairs(candidate.isa) and switch.in_pairs(candidate.isa, formats):
        border += f"; more: sums of 16 bits, scaled two by two ({switch.PAIRS[candidate.isa]})"
    if switch.in_words(candidate.isa, formats):
        border += "; more: codes of 8 bits times activations of 12, in words"
    reason = f"{_because(request, isa, candidate)}: {candidate.purpose}{border}"
    return Kernel(
        backend=candidate.backend,
        isa=candidate.isa,
        layout=candidate.layout,
        threads=request.threads or default_threads(request.numa),
        numa=request.numa,
        few=few,
        reason=reason,
    )


def _because(request: Request, isa: str, candidate: Candidate) -> str:
    settled = isinstance(request, Settled)
    named = [w for w in (request.backend, isa, AUTO if settled else request.layout) if w != AUTO]
    if isa != AUTO and request.isa == AUTO:
        named[named.index(isa)] = f"{isa} by {ISA_VARIABLE}"
    why = f"named ({', '.join(named)})" if named else "the best that is usable here"
    return f"{why}, packed since the matrices are small" if settled else why


def _why_nothing(request: Request, isa: str, formats: Sequence[str]) -> str:
    every = list(candidates(formats))
    what = str(replace(request, isa=isa, threads=None, numa=None, few=None))
    source = f" ({ISA_VARIABLE} is set)" if isa != request.isa else ""
    named = [c for c in every if _matches(request, isa, c)]
    reasons = dict.fromkeys(filter(None, (_reject(request, c) for c in named)))
    if not reasons:
        ways = dict.fromkeys(f"{c.backend} on {c.layout}" for c in every)
        reasons = {
            f"there is no such combination; only native has a choice of isa, and there are "
            f"{', '.join(ways)}": None
        }
    usable = dict.fromkeys(
        f"{c.backend} {c.isa}" if c.backend == "native" else c.backend
        for c in every
        if not _reject(request, c)
    )
    free = replace(request, backend=AUTO, isa=AUTO, layout=AUTO)
    if any(_may_be_taken(free, _isa(free, formats), c) for c in every):
        usable["or 'auto'"] = None
    way = f"usable here: {', '.join(usable)}" if usable else f"leave out numa={request.numa}"
    return (
        f"{what}{source} cannot compute {'+'.join(dict.fromkeys(formats))}: "
        f"{'; '.join(reasons)}; {way}"
    )


def explain(request: Request, formats: Sequence[str], tokens: int = 1) -> Explanation:
    """Each backend, isa and layout: chosen, usable, or rejected because ...

    `tokens` of one expert decide which path of the chosen kernel they take.
    """
    tokens = check_tokens("tokens", tokens)
    kernel = choose(request, formats)
    verdicts = []
    for c in candidates(formats):
        chosen = (c.backend, c.isa, c.layout) == (kernel.backend, kernel.isa, kernel.layout)
        reject = _reject(request, c)
        status = "chosen" if chosen else "rejected" if reject else "usable"
        reason = reject or c.purpose
        if chosen:
            reason = kernel.reason
            if kernel.backend in ("native", "numba"):
                take = "tokens take" if tokens > 1 else "token takes"
                reason += f"; {tokens} {take} the path for {path(kernel, tokens)}"
        elif c.only_named and not reject:
            reason += f" (only where {c.only_named}= names it)"
        verdicts.append(
            Verdict(backend=c.backend, isa=c.isa, layout=c.layout, status=status, reason=reason)
        )
    return Explanation(verdicts)


def path(kernel: Kernel, tokens: int) -> str:
    """ "few" or "many": what `tokens` of one expert take."""
    return "few" if tokens <= kernel.few else "many"
