"""Stages to the devices that a placement names: all that is new is made first, then exchanged.

Only what changed is made. Whatever fails on the way (a device that is full, most of all) leaves the
model as it was.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ktlab.attention.stage import Attention
from ktlab.errors import PlacementError
from ktlab.experts.bank import ExpertBank
from ktlab.experts.mlp import MLP
from ktlab.experts.placed_bank import PlacedBank
from ktlab.html import decimal_bytes
from ktlab.kernels.device_linear import DeviceLinear
from ktlab.kernels.linear import Linear
from ktlab.kernels.seat import HOST, INT4, Seat, TorchSeat
from ktlab.model.block import Layer, MoEBlock
from ktlab.model.place_room import PHASES, check_room
from ktlab.model.place_seats import StandIn, nodes_mode, planned_formats, seats_of
from ktlab.model.placed_block import Twins, seat_of
from ktlab.model.settings import Change
from ktlab.record import Record
from ktlab.routing.router import Router

if TYPE_CHECKING:
    from ktlab.model.model import Model


class PlacementLike(Protocol):
    """What is asked of a placement; `ktlab.Placement`, `Plan` and `RuleSet` have it."""

    @property
    def placement(self) -> Any:
        """The placement: itself, a plan's, or a rule set's function of a model."""


@dataclass(frozen=True, kw_only=True)
class Moved(Record):
    """What a call of `place` did."""

    parts: int
    """Stages and experts that were made anew."""
    loaded_bytes: Mapping[str, int]
    """{device: bytes that were put there}."""
    freed_bytes: Mapping[str, int]
    """{device: bytes that are no longer there}."""
    seconds: float

    def __str__(self) -> str:
        def words(sizes: Mapping[str, int]) -> str:
            return ", ".join(f"{decimal_bytes(n)} on {name}" for name, n in sizes.items() if n)

        parts = [f"{self.parts} parts moved in {self.seconds:.2g} s"]
        parts += [f"loaded {words(self.loaded_bytes)}"] if any(self.loaded_bytes.values()) else []
        parts += [f"freed {words(self.freed_bytes)}"] if any(self.freed_bytes.values()) else []
        return "; ".join(parts)

    __repr__ = __str__


def place(
    model: "Model",
    placement: PlacementLike,
    *,
    stand_in: "StandIn | None",
    dtype: str | None,
    nodes: str | None,
) -> Moved:
    """`Model.place`."""
    start, seats, before = perf_counter(), model.seats, device_bytes(model)
    change = Change()
    parts = apply_placement(model, change, placement, stand_in=stand_in, dtype=dtype, nodes=nodes)
    del change  # which still holds what was there before
    after = device_bytes(model, seats)
    words = dict.fromkeys([*before, *after])
    gained = {word: after.get(word, 0) - before.get(word, 0) for word in words}
    if any(n < 0 for n in gained.values()):
        torch.cuda.empty_cache()  # torch keeps what was freed; others may want it
    return Moved(
        parts=parts,
        loaded_bytes={word: n for word, n in gained.items() if n > 0},
        freed_bytes={word: -n for word, n in gained.items() if n < 0},
        seconds=perf_counter() - start,
    )


def apply_placement(
    model: "Model",
    change: Change,
    placement: PlacementLike,
    *,
    stand_in: "StandIn | None" = None,
    dtype: str | None = None,
    nodes: str | None = None,
) -> int:
    """Make what is new and exchange it, recording each assignment; the number of new parts."""
    wanted = getattr(placement, "placement", None)
    if wanted is None:
        raise PlacementError(
            f"placement is a {type(placement).__name__}; expected a Placement, a Plan or a "
            "RuleSet, such as ktlab.Placement.read(FILE) or ktlab.plan(MODEL, vram=...)"
        )
    if callable(wanted):  # of a rule set: where it puts this model
        wanted = wanted(model)
    builder = None
    try:
        seats = seats_of(model, wanted, stand_in or {}, dtype, planned_formats(placement))
        _check_runs(model, wanted)
        nodes = nodes_mode(model, nodes)
        check_room(model, wanted, seats, nodes)
        builder = _Builder(model, wanted, seats, nodes)
        builder.build()
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError) as error:
        full = not isinstance(error, torch.AcceleratorError)
        at, doing = (builder.at, builder.doing) if builder else ("a device", "the beginning")
        if builder:  # IPython keeps the error with its frames, and they what had been loaded
            builder.assignments.clear()
        clear_frames(error.__traceback__)
        raise PlacementError(
            f"{model.name}: {at} {'ran out of memory' if full else 'failed'} at "
            f"{doing} ({error}); nothing was moved, the model is where it was. "
            f"{'Put fewer experts there, or free memory first' if full else 'See nvidia-smi'}"
        ) from error
    for holder, name, value in builder.assignments:
        change.set(holder, name, value)
    change.set(model, "placement", wanted)
    change.set(model, "seats", seats)
    return builder.parts


def _check_runs(model: "Model", wanted: Any) -> None:
    """What a placement may say and this code does not do."""
    problems = []
    shape = wanted.model
    for component in ("router", "output", "embedding", "norms"):
        moved = [
            layer
            for layer in shape.layers_of(component)
            if len({wanted.device(component, layer=layer, phase=p) for p in PHASES}) > 1
        ]
        if moved:
            problems.append(
                f"{component} is on one device in prefill and on another in decode; only experts, "
                "shared and dense can be"
            )
    for layer in shape.layers_of("norms"):
        leader = "output" if layer is None else "attention"
        if wanted.device("norms", layer=layer) != wanted.device(leader, layer=layer):
            problems.append(f"norms of layer {layer} are computed where {leader} is")
    for component in ("attention", "output", "embedding", "router"):
        words = {wanted.device(component, layer=layer) for layer in shape.layers_of(component)}
        if "disk" in words and component != "embedding":
            problems.append(f"{component} cannot stay on disk")
    if problems:
        raise PlacementError(f"placement of {shape.name}: " + "; ".join(dict.fromkeys(problems)))


class _Builder:
    """Makes the parts that differ, as assignments; changes nothing."""

    def __init__(
        self, model: "Model", wanted: Any, seats: Mapping[str, TorchSeat], nodes: str | None
    ) -> None:
        self.model, self.wanted, self.seats, self.nodes = model, wanted, seats, nodes
        self.assignments: list[tuple[Any, str, Any]] = []
        self.parts = 0
        self.at, self.doing = "cpu", "the beginning"

    def build(self) -> None:
        """Layer by layer, then what is outside of layers."""
        for block in self.model.layers:
            before = len(self.assignments)
            self._layer(block)
            if len(self.assignments) > before and not block.moved:
                self.assignments.append((block, "moved", True))
        self._outside()

    # Where -------------------------------------------------------------------------------------

    def _before(self, component: str, layer: int | None, phase: str = "decode") -> str:
        old = self.model.placement
        return (
            "cpu" if old is None else str(old.placement.device(component, layer=layer, phase=phase))
        )

    def _changed(
        self, component: str, layer: int | None, here: Seat, phase: str = "decode"
    ) -> bool:
        """Whether a stage that is on `here` has to be made anew."""
        word = self.wanted.device(component, layer=layer, phase=phase)
        there = self.seats.get(word, HOST)
        return here is not there or word != self._before(component, layer, phase)

    def _note(self, component: str, layer: int | None, word: str) -> None:
        self.at, self.parts = word, self.parts + 1
        self.doing = component if layer is None else f"layers.{layer}.{component}"

    # What --------------------------------------------------------------------------------------

    def _layer(self, block: Layer) -> None:
        if self._changed("attention", block.index, getattr(block.attention, "seat", HOST)):
            self._attention(block)
        if not isinstance(block, MoEBlock):
            self._feed(block, "dense", "mlp")
            return
        self._router(block)
        self._experts(block)
        if block.shared is not None:
            self._feed(block, "shared", "shared")

    def _attention(self, block: Layer) -> None:
        word = self.wanted.device("attention", layer=block.index)
        self._note("attention", block.index, word)
        stage = _own(block.attention, Attention, f"layers.{block.index}.attention")
        seat, old = self.seats.get(word, HOST), stage.seat
        move = self._mover(word, self._before("attention", block.index))
        hold = _holder(old, seat)
        made = stage.on(seat, move, hold)
        for norm_D in (block.attention_norm_D, block.mlp_norm_D):
            made.near(norm_D)  # now, while there may still be no room
        self.assignments.append((block, "attention", made))

    def _router(self, block: MoEBlock) -> None:
        old = seat_of(getattr(block.router, "gate", None))
        if not self._changed("router", block.index, old):
            return
        word = self.wanted.device("router", layer=block.index)
        self._note("router", block.index, word)
        router = copy.copy(_own(block.router, Router, f"layers.{block.index}.router"))
        hold = _holder(old, self.seats.get(word, HOST))
        # A gate that is rounded chooses other experts: float32 everywhere.
        router.gate = self._mover(word, self._before("router", block.index), "f32")(router.gate)
        router.bias_E = None if router.bias_E is None else hold(router.bias_E)
        self.assignments.append((block, "router", router))

    def _feed(self, block: Layer, component: str, name: str) -> None:
        index = block.index
        here = {
            phase: seat_of(getattr(block.stages_in(phase)[name], "gate", None)) for phase in PHASES
        }
        if not any(self._changed(component, index, here[phase], phase) for phase in PHASES):
            return
        stage = _own(getattr(block, name), MLP, f"layers.{index}.{name}")
        words = [self.wanted.device(component, layer=index, phase=phase) for phase in PHASES]
        made = []
        for word in dict.fromkeys(words):
            self._note(component, index, word)
            move = self._mover(word, self._before(component, index))
            made.append(MLP(*(move(linear) for linear in stage.linears.values())))
        self.assignments.append((block, name, made[0]))
        self.assignments.append((block, "in_prefill", Twins({name: made[1]} if made[1:] else {})))

    def _experts(self, block: MoEBlock) -> None:
        where = {phase: self.wanted.experts_row(block.index, phase) for phase in PHASES}
        bank = block.experts
        before = {p: ("cpu",) * len(where[p]) for p in PHASES}
        if isinstance(bank, PlacedBank):
            before = dict(bank.where)
        words = {word for row in where.values() for word in row}
        seats = bank.seats if isinstance(bank, PlacedBank) else {}
        same = all(seats.get(word) is self.seats.get(word) for word in words)
        across = bank.across if isinstance(bank, PlacedBank) else None
        if where == before and same and across == self.nodes:
            return
        _own(bank, ExpertBank, f"layers.{block.index}.experts")
        self._note("experts", block.index, " and ".join(sorted(words - {"cpu"}) or ["cpu"]))
        self.assignments.append(
            (block, "experts", PlacedBank.of(bank, where, self.seats, self.nodes))
        )

    def _outside(self) -> None:
        model, wanted = self.model, self.wanted
        if self._changed("output", None, seat_of(model.output)):
            word = wanted.device("output")
            self._note("output", None, word)
            move = self._mover(word, self._before("output", None))
            self.assignments.append((model, "output", move(model.output)))
        if self._changed("embedding", None, seat_of(model.embedding_table)):
            word = wanted.device("embedding")
            self._note("embedding", None, word)
            seat = self.seats.get(word)
            table = None
            if seat is not None:  # rows are looked up, which groups of 4 bits are not made for
                dtype = "bf16" if seat.format == INT4 else seat.format
                table = DeviceLinear(Linear(model.embedding), seat, dtype)
            self.assignments.append((model, "embedding_table", table))

    def _mover(
        self, word: str, before: str, dtype: str | None = None
    ) -> Callable[[Linear], Linear]:
        """What becomes of a matrix that goes to `word`."""
        seat = self.seats.get(word)

        def move(linear: Linear) -> Linear:
            host = linear.on_host() if isinstance(linear, DeviceLinear) else linear.clone()
            if seat is not None:
                return DeviceLinear(host, seat, dtype)
            if word.startswith("numa:"):
                return host.use(numa=int(word.partition(":")[2]))
            return host.use(numa=None) if before.startswith("numa:") else host

        return move


def _own(stage: Any, expected: type, name: str) -> Any:
    of_the_user = expected is ExpertBank and bool(stage.own)  # which computes where it is
    if of_the_user or not isinstance(stage, expected):
        raise PlacementError(
            f"{name} is a {type(stage).__name__} of your own, which stays where you put it; only "
            f"ktlab's stages are moved. Take it out before placing {name.rpartition('.')[2]}"
        )
    return stage


def _holder(old: Seat, new: Seat) -> Callable[[Tensor], Tensor]:
    """What becomes of a norm or a bias that goes from one seat to another."""

    def hold(values: Tensor) -> Tensor:
        host = old.give(values)()[0]
        return new.hold(host) if isinstance(new, TorchSeat) else host

    return hold


def device_bytes(model: "Model", before: "Mapping[str, TorchSeat] | None" = None) -> dict[str, int]:
    """Bytes that stay on devices (also those of `before`) and in NUMA nodes' copies, by device."""
    found: dict[str, int] = {}
    for seat in {**{id(s): s for s in (before or {}).values()},
                 **{id(s): s for s in model.seats.values()}}.values():  # fmt: skip
        found[seat.word] = found.get(seat.word, 0) + sum(seat.here_bytes.values())
    for block in model.moe_blocks:
        if isinstance(block.experts, PlacedBank):
            for word, part in block.experts.node_parts:
                found[word] = found.get(word, 0) + part.nbytes
    return found
