"""Every kernel that runs here as a point under the roofline: one layer, several token counts.

All usable kernels (backend, instruction set, layout), and the peers where they are installed, take
turns on the same synthetic layer of a real model's widths; the ceilings are measured in between.
"""

import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ktlab import figures, html
from ktlab.errors import SettingError
from ktlab.kernels import dispatch
from ktlab.kernels.request import BLOCKS, EMULATED, NATIVE_ISAS, PACKED, Request
from ktlab.kernels.threads import default_threads
from ktlab.measurement.bench import SAMPLE_TOKENS, KernelCase, _case
from ktlab.measurement.contenders import FLOAT_BYTES, Contender, OwnKernel, PeerKernel
from ktlab.measurement.peers import client
from ktlab.measurement.rounds import LOADING, Progress, scatter, take_turns
from ktlab.measurement.synthetic import SyntheticExperts, expert_bytes, formats_of, get_shape
from ktlab.measurement.twin import Cancelled, SmallRates
from ktlab.record import Record

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOKENS = (1, 8, 32, 512)
ROUNDS = 3
CALL_S = 0.6
"""A kernel that would take longer for a call is not measured at that number of tokens."""
BESIDE_FASTEST = 2.0
"""... unless the fastest takes half as long or more: then the machine is slow, not the kernel."""
BUDGET_S = 10.0
"""When a share of this is used up, only the `LEADERS` fastest go on to more tokens."""
LEADERS = 4
WEIGHT_BYTES = 224 << 20
"""Experts in the file's layout: more than most caches hold, and small enough for Binder."""
COPY_BYTES = 600 << 20
"""No kernel may make a larger copy of them."""
PEERS = ("llama.cpp/cpu", "kt-kernel/llamafile")
CEILINGS = (
    "per cent: of the ceiling's median in that point's own rounds; lines of the figure: the best "
    "of all rounds; above 100 % the rounds disagree, or caches helped"
)
ERROR = (
    f"error: norm of the difference of the first {SAMPLE_TOKENS} tokens' outputs (of all, where "
    "there are fewer) from float64 products of the same weights, over the norm of those"
)


@dataclass(frozen=True, kw_only=True)
class KernelRoofline(Record):
    """Measured points, and the ceilings that they stand under."""

    shape: str
    experts: int
    all_experts: int
    top_k: int
    format: str
    threads: int
    cases: tuple[KernelCase, ...]
    rates: dict[str, float]
    """"read" in bytes/s; instruction sets and "float32" in operations/s."""
    left_out: dict[str, str]
    """What was not measured, and why."""
    rounds: int
    done: bool

    @staticmethod
    def intensity(case: KernelCase) -> float:
        """Operations for each byte of weights that a call touches."""
        return case.gflops / case.gb_s

    @property
    def what(self) -> str:
        return (
            f"one expert layer of {self.shape}'s widths, synthetic weights in {self.format}, "
            f"{self.experts} of {self.all_experts} experts, top {self.top_k}; {self.threads} "
            f"threads, medians of {self.rounds} rounds in turn"
        )

    def plot(self) -> "Figure":
        """GFLOP/s against operations per byte, both logarithmic."""
        names = {
            _name(case): [c for c in self.cases if _name(c) == _name(case)] for case in self.cases
        }
        return figures.roofline(
            {
                name: [(self.intensity(c), c.gflops, _tokens(c.tokens)) for c in cases]
                for name, cases in names.items()
            },
            read=self.rates.get("read", 0.0) / 1e9,
            peaks={
                name: rate / 1e9
                for name, rate in self.rates.items()
                if name != "read" and not name.endswith(LOADING)
            },
            unit="GFLOP/s",
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A row a point."""
        return [
            (
                str(c.tokens),
                _name(c),
                f"{1e3 * c.median_s:,.4g} ms {scatter(c.spread, self.rounds)}",
                f"{c.gflops:,.0f}",
                f"{c.gb_s:.3g}",
                f"{100 * c.ceiling_share:.0f} % of {c.ceiling}",
                f"{100 * c.relative_error:.2g} %",
            )
            for c in sorted(self.cases, key=lambda c: (c.tokens, c.median_s))
        ]

    def __str__(self) -> str:
        lines = ["  " + "  ".join(row) for row in self.rows()]
        lines += [f"  without {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([f"KernelRoofline ({self.what})", *lines])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers = ("tokens", "kernel", "median", "GFLOP/s", "GB/s", "ceiling", "error")
        missing = html.pairs(self.left_out) if self.left_out else html.Raw("")
        note = html.Raw(
            f'<div class="s">{html.text(self.what)}. {html.text(f"{CEILINGS}. {ERROR}")}</div>'
        )
        body = html.card("kernels under the roofline", html.table(self.rows(), headers), note)
        return html.mimebundle(str(self), body + html.card("not measured", missing))


def stream_points(
    shape: str = "deepseek-v2-lite",
    format: str = "q4_k_m",
    *,
    tokens: Sequence[int] = TOKENS,
    experts: int | None = None,
    rounds: int = ROUNDS,
    peers: Sequence[str] = PEERS,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
    budget_s: float = BUDGET_S,
    seed: int = 0,
) -> Generator[KernelRoofline, None, None]:
    """Measure every usable kernel; yields after each number of tokens.

    `experts` kept in memory (None: `WEIGHT_BYTES` of them). Peers that are not installed, and
    kernels that would take too long or too much memory, are left out with the reason; on a slow
    machine `budget_s` keeps only the fastest for many tokens.
    """
    full = get_shape(shape)
    formats = formats_of(format, full)
    fitting = int(WEIGHT_BYTES // expert_bytes(full, formats))
    wanted = max(full.top_k, min(full.experts, fitting)) if experts is None else experts
    moe = get_shape(shape, wanted)
    threads = default_threads()
    left_out: dict[str, str] = {}
    start = perf_counter()
    found: list[KernelCase] = []

    def say(text: str) -> None:
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled")
        if progress is not None:
            progress(text)

    with ExitStack() as stack:
        try:
            say(f"making {moe.experts} experts of {moe.hidden} x {moe.width} in {format}")
            weights = SyntheticExperts(moe, formats, seed)
            inputs = {count: weights.inputs(count) for count in tokens}
            contenders: list[Contender] = []
            for request in usable(formats, left_out):
                own = OwnKernel(weights, inputs, format, request)
                copy_bytes = FLOAT_BYTES * moe.experts * moe.expert_weights
                if own.layout not in (BLOCKS, PACKED) and copy_bytes > COPY_BYTES:
                    size = html.byte_size(copy_bytes)
                    left_out[own.backend] = f"its float32 copy of these weights takes {size}"
                    continue
                own.label = own.group = f"{own.backend} {own.isa} {own.layout}"
                if contenders:
                    own.bank.stacks = contenders[0].bank.stacks  # type: ignore[attr-defined]
                contenders.append(own)
            contenders += _peers(stack, peers, weights, inputs, format, threads, left_out, say)
            rates = SmallRates(threads)
            previous: dict[str, tuple[int, float]] = {}
            for turn, count in enumerate(tokens):
                able = _quick(contenders, count, previous, left_out)
                if turn and perf_counter() - start > budget_s * turn / len(tokens):
                    able = _leaders(able, count, previous, left_out)
                samples = take_turns(able, count, rounds, rates, left_out, partial(_numbered, say))
                exact_TD = weights.exact(inputs[count], min(count, SAMPLE_TOKENS))
                for contender, seconds in samples:
                    case = _case(contender, seconds, moe, inputs[count], exact_TD, threads, rates)
                    previous[contender.label] = (count, case.median_s)
                    found.append(case)
                yield KernelRoofline(
                    shape=moe.name,
                    experts=moe.experts,
                    all_experts=full.experts,
                    top_k=moe.top_k,
                    format=format,
                    threads=threads,
                    cases=tuple(found),
                    rates=dict(rates.best),
                    left_out=dict(left_out),
                    rounds=rounds,
                    done=count == tokens[-1],
                )
        except Cancelled:
            return


def usable(formats: Sequence[str], left_out: dict[str, str]) -> list[Request]:
    """A request for each kernel that computes these formats here; the others go to `left_out`."""
    requests = []
    for c in dispatch.candidates(formats):
        if c.isa in EMULATED:
            continue
        if c.reject:
            left_out[f"{c.backend} {c.isa}"] = c.reject
            continue
        isa = c.isa if c.isa in NATIVE_ISAS else "auto"
        layout = c.layout if c.layout in (BLOCKS, PACKED) else "auto"
        requests.append(Request(backend=c.backend, isa=isa, layout=layout))
    return requests


def _quick(
    contenders: Sequence[Contender],
    count: int,
    previous: dict[str, tuple[int, float]],
    left_out: dict[str, str],
) -> list[Contender]:
    """Who is quick enough to be waited for: in seconds, or beside the fastest."""
    expected = {}
    for c in contenders:
        if c.label not in left_out:
            before, seconds = previous.get(c.label, (count, 0.0))
            expected[c.label] = seconds * count / before
    limit = max(CALL_S, BESIDE_FASTEST * min(expected.values(), default=0.0))
    for label, seconds in expected.items():
        if seconds > limit:
            left_out[label] = f"from {count} tokens on: a call would take up to {seconds:.1f} s"
    return [c for c in contenders if c.label in expected and c.label not in left_out]


def _leaders(
    able: list[Contender],
    count: int,
    previous: dict[str, tuple[int, float]],
    left_out: dict[str, str],
) -> list[Contender]:
    """The fastest at the number of tokens before; the others are left out."""
    ordered = sorted(able, key=lambda c: previous[c.label][1])
    for c in ordered[LEADERS:]:
        left_out[c.label] = f"from {count} tokens on: the time was up, the fastest {LEADERS} go on"
    return ordered[:LEADERS]


def _numbered(say: Progress, text: str) -> None:
    say(text.replace("1 tokens", "1 token") if text.startswith("1 ") else text)


def _peers(
    stack: ExitStack,
    names: Sequence[str],
    weights: SyntheticExperts,
    inputs: dict[int, Any],
    format: str,
    threads: int,
    left_out: dict[str, str],
    say: Progress,
) -> list[Contender]:
    """The peers that are installed and compute these formats."""
    found: list[Contender] = []
    folder: Path | None = None
    for name in names:
        try:
            methods = client.choose([name], weights.formats)
            for method in methods:
                client.python_of(method.peer)
                if method.formats and not set(weights.formats) <= set(method.formats):
                    raise SettingError(f"it does not compute {'+'.join(set(weights.formats))}")
                if folder is None:
                    made = tempfile.TemporaryDirectory(prefix="ktlab-points-")
                    folder = Path(stack.enter_context(made))
                    weights.save(folder, bfloat16=False)
                    for given in inputs.values():
                        given.save(folder)
                say(f"{name} prepares")
                peer = client.Peer(method, folder, threads=threads)
                stack.callback(peer.close)
                found.append(PeerKernel(peer, folder, weights, format))
        except (SettingError, client.PeerError) as error:
            left_out[name] = str(error)
    for contender in found:
        contender.group = contender.label
    return found


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"


def _name(case: KernelCase) -> str:
    own = case.backend in ("native", "numba", "torch", "numpy")
    isa = case.isa if case.backend == "native" or not own else ""
    return " ".join(filter(None, (case.backend, isa, case.layout)))
