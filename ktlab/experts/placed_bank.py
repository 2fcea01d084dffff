"""A layer's experts on several devices: each token's experts where they are, all at once.

The host's kernels compute in threads while devices do, and the sum is formed where the layer's
hidden numbers are. T tokens, D hidden, E experts, K selected.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ktlab.experts.bank import ExpertBank
from ktlab.experts.nodes import NodePart, Team
from ktlab.kernels import dispatch, packing, products
from ktlab.kernels.int4 import Values
from ktlab.kernels.request import BLOCKS
from ktlab.kernels.seat import HOST, Seat, TorchSeat
from ktlab.kernels.torch_moe import some_experts

Where = Mapping[str, tuple[str, ...]]
"""Phase to the device word of each expert."""
Matrices = tuple[Values, Values, Values]


@dataclass(kw_only=True)
class Overlap:
    """Seconds of a layer's calls: the host's experts, the devices' work, both beside each other.
    Not those of deferred experts, beside which the next layer works, too."""

    on: bool = False
    """Whether it is measured: a GPU must be waited for, which costs time."""
    calls: int = 0
    host_s: float = 0.0
    device_s: float = 0.0
    both_s: float = 0.0

    @property
    def share(self) -> float | None:
        """Of what could pass at the same time, how much did; None before the first call."""
        possible = min(self.host_s, self.device_s)
        hidden = self.host_s + self.device_s - self.both_s
        return min(1.0, max(0.0, hidden / possible)) if possible > 0 else None


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """They wait for native code, which has threads of its own."""
    return ThreadPoolExecutor(max_workers=8, thread_name_prefix="ktlab-experts")


class PlacedBank(ExpertBank):
    """An `ExpertBank` whose experts are on the devices that `where` names."""

    where: Where
    seats: Mapping[str, TorchSeat]
    residents: dict[str, dict[int, Matrices]]
    """Device to its experts' gate, up and down."""
    nodes: dict[str, NodePart]
    """NUMA nodes with experts of their own."""
    team: Team | None
    """All nodes together, where they share the experts that `where` has on the CPU."""
    across: str | None
    """How they share them: interleave, split, copy; None: they do not."""
    overlap: Overlap
    """Measured while `overlap.on`; clones share it."""

    @classmethod
    def of(
        cls,
        bank: ExpertBank,
        where: Where,
        seats: Mapping[str, TorchSeat],
        across: str | None = None,
    ) -> "ExpertBank":
        """`bank` with its experts elsewhere: what is there already stays, the rest is made. If that
        fails nothing has changed. `across`: how NUMA nodes share those on the CPU (`Team`)."""
        if across is None and all(set(row) <= {"cpu"} for row in where.values()):
            return on_host(bank)
        found = cls.__new__(cls)
        vars(found).update(vars(bank))
        found.where, found.seats, found.overlap = dict(where), seats, Overlap()
        found.across = across
        before = bank if isinstance(bank, PlacedBank) and bank.stacks is bank._built_of else None
        found._build(before)
        return found

    def _build(self, before: "PlacedBank | None") -> None:
        residents: dict[str, dict[int, Matrices]] = {}
        nodes: dict[str, NodePart] = {}
        for word, ids in self._words().items():
            if word in self.seats:
                seat = self.seats[word]
                same = before is not None and before.seats.get(word) is seat
                kept = before.residents.get(word, {}) if before is not None and same else {}
                residents[word] = {
                    e: kept[e] if e in kept else self._load(seat, e) for e in sorted(ids)
                }
            elif word.startswith("numa:"):
                old = before.nodes.get(word) if before is not None else None
                nodes[word] = (
                    old if old is not None and old.ids == tuple(sorted(ids))
                    else NodePart.of(self, int(word.partition(":")[2]), sorted(ids))
                )  # fmt: skip
        team, shared = None, sorted(self._words().get("cpu", ()))
        if self.across is not None and shared:
            team = before.team if before is not None else None
            if team is None or (team.mode, team.ids) != (self.across, tuple(shared)):
                team = Team.of(self, self.across, shared)
        self.residents, self.nodes, self.team = residents, nodes, team
        self._built_of = self.stacks
        self._masks: dict[tuple[str, str], Tensor] = {}

    def _words(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for row in self.where.values():
            for expert, word in enumerate(row):
                found.setdefault(word, set()).add(expert)
        return found

    def _load(self, seat: TorchSeat, expert: int) -> Matrices:
        gate, up, down = (seat.load_matrix(stack.tensor[expert]) for stack in self.stacks)
        return gate, up, down

    @property
    def placement(self) -> str:  # type: ignore[override]
        """The devices, with the number of experts of decode."""
        row = self.where["decode"]
        if self.team is not None and set(row) == {"cpu"}:
            return str(self.team)
        return ", ".join(f"{word} {row.count(word)}" for word in dict.fromkeys(row))

    def explain(self, tokens: int = 1) -> dispatch.Explanation:
        """See `Computed.explain`: the devices first, then what computes those on the CPU."""
        there = [self.seats[word].verdict for word in self.residents]
        return dispatch.Explanation([*there, *super().explain(tokens)])

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes of experts on devices and NUMA nodes, by device."""
        found = {
            word: sum(matrix.nbytes for expert in there.values() for matrix in expert)
            for word, there in self.residents.items()
        }
        for word, part in self.node_parts:
            found[word] = found.get(word, 0) + part.nbytes
        return found

    @property
    def node_parts(self) -> list[tuple[str, NodePart]]:
        """(NUMA node, its experts) of each."""
        shared = self.team.parts if self.team is not None else ()
        return [*self.nodes.items(), *((f"numa:{part.node}", part) for part in shared)]

    # What an `ExpertBank` does -----------------------------------------------------------------

    def quantized(self, format: str) -> "PlacedBank":
        """See `ExpertBank.quantized`; the devices get the values of the other format."""
        bank = copy.copy(self)
        bank.stacks, bank._kernel = self._in_format(format), None
        bank._build(None)
        return bank

    def use(self, *, format: str | None = None, **words: Any) -> "PlacedBank":
        """See `ExpertBank.use`."""
        before = dict(vars(self))
        super().use(format=format, **words)
        if self.stacks is not self._built_of:
            try:
                self._build(None)
            except BaseException:
                vars(self).update(before)
                raise
        return self

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See `ExpertBank.forward`: from host memory to host memory, as decode is placed."""
        given = (hidden_TD, hidden_TD, ids_TK, weights_TK)
        return self.start(*given, here=HOST, phase="decode").finish()

    # Running -----------------------------------------------------------------------------------

    def start(
        self,
        hidden_TD: Tensor,
        host_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        here: Seat,
        phase: str,
        beside: bool = False,
        after: "Running | None" = None,
    ) -> "Running":
        """Set everything going. `hidden_TD` is on `here`, where `finish` brings the sum, (T, D);
        `host_TD`, the same, and the others are in host memory. `beside`: whether the caller has
        other work meanwhile; `after`: whose work on the host comes first."""
        used = set(self.where[phase])
        asked = {word: self._ids_of(word, phase, ids_TK) for word in used}
        asked = {word: ids for word, ids in asked.items() if bool((ids >= 0).any())}
        overlap = self.overlap if after is None else Overlap()
        running = Running(like=hidden_TD, here=here, begun=perf_counter(), overlap=overlap)
        apart = beside or len(asked) > 1
        for word, ids in asked.items():
            if word not in self.residents:
                moe = self._on_cpu(word)
                work = partial(_timed, moe, host_TD, ids, weights_TK, first=_done(after))
                running.on_host.append(_threads().submit(work).result if apart else work)
        for word, ids in asked.items():
            if word in self.residents:
                seat = self.seats[word]
                hidden = hidden_TD if seat is here else seat.take(host_TD)
                with running.beside(seat):
                    there = some_experts(self.residents[word], hidden, ids, weights_TK, seat.take)
                running.on_devices.append((seat, there))
        return running

    def _ids_of(self, word: str, phase: str, ids_TK: Tensor) -> Tensor:
        mask = self._masks.get((phase, word))
        if mask is None:
            mask = torch.tensor([found == word for found in self.where[phase]])
            self._masks[phase, word] = mask
        return ids_TK.masked_fill(~mask[ids_TK.clamp_min(0)], -1)

    def _on_cpu(self, word: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if word in self.nodes:
            return self.nodes[word].moe
        if word == "disk":
            return self._from_disk
        if self.team is not None:
            return self.team.moe
        kernel, stacks = self.kernel, self.stacks
        return lambda hidden, ids, weights: products.moe(kernel, stacks, hidden, ids, weights)

    def _from_disk(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """On the file's own blocks, whose pages are given back at once."""
        request = self._request.with_(layout=BLOCKS)
        kernel = dispatch.choose(request, self.formats)
        found = products.moe(kernel, self.stacks, hidden_TD, ids_TK, weights_TK)
        for expert in set(ids_TK.flatten().tolist()) - {-1}:
            for stack in self.stacks:
                packing.drop_pages(stack.tensor.blocks[expert])
        return found


def start_experts(
    bank: ExpertBank,
    hidden_TD: Tensor,
    host_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    here: Seat,
    phase: str,
    beside: bool,
    after: "Running | None" = None,
) -> "Running":
    """`PlacedBank.start` of any bank: one that is on the host alone, or of a user's own."""
    given = (host_TD, ids_TK, weights_TK)
    if isinstance(bank, PlacedBank):
        return bank.start(hidden_TD, *given, here=here, phase=phase, beside=beside, after=after)
    running = Running(like=hidden_TD, here=here, begun=perf_counter(), overlap=Overlap())
    work = partial(_timed, bank.forward, *given, first=_done(after))
    running.on_host.append(_threads().submit(work).result if beside else work)
    return running


@dataclass(kw_only=True)
class Running:
    """Experts that are being computed."""

    like: Tensor
    here: Seat
    begun: float
    overlap: Overlap
    on_host: list[Callable[[], tuple[Tensor, float]]] = field(default_factory=list)
    on_devices: list[tuple[TorchSeat, Tensor]] = field(default_factory=list)
    marks: list[tuple[TorchSeat, Any, Any]] = field(default_factory=list)

    @contextmanager
    def beside(self, seat: TorchSeat) -> Iterator[None]:
        """What a device is given meanwhile, its experts, the shared expert: timed if anybody asked,
        as marks cost time."""
        begun = seat.mark() if self.overlap.on else None
        yield
        if begun is not None:
            self.marks.append((seat, begun, seat.mark()))

    def finish(self, to: Seat | None = None) -> Tensor:
        """(T, D) on `here` or another seat, summed in the same order every time."""
        to = to or self.here
        total: Tensor | None = None
        elsewhere: list[Tensor] = []
        for seat, there in self.on_devices:
            if seat is to:
                total = there if total is None else total + there
            else:
                elsewhere += seat.give(there)()
        results = [wait() for wait in self.on_host]
        elsewhere += [values for values, _ in results]
        if self.overlap.on:
            self._count([seconds for _, seconds in results])
        if elsewhere:
            arrived = to.take(torch.stack(elsewhere).sum(0) if elsewhere[1:] else elsewhere[0])
            total = arrived if total is None else total + arrived
        if total is None:  # nobody was selected
            return (
                torch.zeros_like(self.like)
                if to is self.here
                else to.take(torch.zeros(self.like.shape))
            )
        return total

    def _count(self, host: Sequence[float]) -> None:
        by_seat: dict[TorchSeat, float] = {}
        for seat, begun, end in self.marks:
            by_seat[seat] = by_seat.get(seat, 0.0) + seat.between(begun, end)
        device_s = max(by_seat.values(), default=0.0)  # they work beside each other, too
        if host and device_s:
            self.overlap.calls += 1
            self.overlap.host_s += max(host)
            self.overlap.device_s += device_s
            self.overlap.both_s += perf_counter() - self.begun


def _done(after: "Running | None") -> Callable[[], None]:
    """Waits for the host's part of other experts."""
    waits = [] if after is None else list(after.on_host)

    def wait() -> None:
        for one in waits:
            one()

    return wait


def _timed(
    work: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    first: Callable[[], None],
) -> tuple[Tensor, float]:
    first()
    start = perf_counter()
    with torch.inference_mode():
        found = work(hidden_TD, ids_TK, weights_TK)
    return found, perf_counter() - start


_OWN = frozenset(
    ("where", "seats", "residents", "nodes", "team", "across", "overlap", "_built_of", "_masks")
)


def on_host(bank: ExpertBank) -> ExpertBank:
    """The same experts, all on the host."""
    if not isinstance(bank, PlacedBank):
        return bank
    found = ExpertBank.__new__(ExpertBank)
    vars(found).update({k: v for k, v in vars(bank).items() if k not in _OWN})
    return found
