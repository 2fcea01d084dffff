"""Whether what a placement moves has room where it goes: counted before the first byte is moved."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ktlab.errors import PlacementError
from ktlab.experts.nodes import bytes_on_nodes
from ktlab.experts.placed_bank import PlacedBank
from ktlab.html import decimal_bytes
from ktlab.kernels.seat import HOST, Seat, TorchSeat
from ktlab.model.block import DenseBlock
from ktlab.model.copies import refuse
from ktlab.model.placed_block import seat_of

if TYPE_CHECKING:
    from ktlab.model.model import Model

PHASES = ("decode", "prefill")


def check_room(
    model: "Model", wanted: Any, seats: Mapping[str, TorchSeat], nodes: str | None
) -> None:
    """PlacementError where a device lacks room, by how much; SettingError where host memory does,
    for stand-ins and for copies on NUMA nodes."""
    needed = needed_bytes(model, wanted, seats)
    problems = []
    for word, nbytes in needed.items():
        free = seats[word].free_bytes
        if free is not None and nbytes > free:
            problems.append(
                f"{word} would get {decimal_bytes(nbytes)} and has {decimal_bytes(free)} free: "
                f"{decimal_bytes(nbytes - free)} too little"
            )
    if problems:
        raise PlacementError(f"{model.name}: {'; '.join(problems)}; nothing was moved")
    if stand_ins := sum(n for word, n in needed.items() if seats[word].stand_in):
        refuse(model, stand_ins, "this placement", "what stands in for a device")
    if copies := _node_bytes(model, wanted, nodes):
        refuse(model, copies, "this placement", "copies of experts on NUMA nodes")


def needed_bytes(model: "Model", wanted: Any, seats: Mapping[str, TorchSeat]) -> dict[str, int]:
    """Bytes of matrices that will be loaded, by device; what is there already is not counted."""
    found = dict.fromkeys(seats, 0)

    def add(word: str, here: Seat, shapes: Iterable[tuple[int, ...]]) -> None:
        if word in seats and here is not seats[word]:
            found[word] += sum(map(seats[word].bytes_of, shapes))

    for block in model.layers:
        linears = getattr(block.attention, "linears", {})
        here = getattr(block.attention, "seat", HOST)
        add(wanted.device("attention", layer=block.index), here, _shapes(linears))
        dense = isinstance(block, DenseBlock)
        name, component = ("mlp", "dense") if dense else ("shared", "shared")
        if not hasattr(block.stages().get(name), "linears"):
            continue
        words = {p: wanted.device(component, layer=block.index, phase=p) for p in PHASES}
        for phase, word in words.items():
            if phase == "decode" or word != words["decode"]:
                linears = block.stages_in(phase)[name].linears
                add(word, seat_of(linears["gate"]), _shapes(linears))
    for block in model.moe_blocks:
        gate, word = getattr(block.router, "gate", None), wanted.device("router", layer=block.index)
        if gate is not None and word in seats and seat_of(gate) is not seats[word]:
            found[word] += 4 * math.prod(gate.stack.shape)  # float32 everywhere
        bank = block.experts
        one = [stack.shape[1:] for stack in bank.stacks]
        for word in seats:
            there = bank.residents.get(word, {}) if isinstance(bank, PlacedBank) else {}
            add(word, HOST, one * len(_ids(wanted, block.index, word) - set(there)))
    add(wanted.device("output"), seat_of(model.output), [model.output.stack.shape])
    table = seat_of(model.embedding_table)
    if (word := wanted.device("embedding")) in seats and table is not seats[word]:
        found[word] += seats[word].dtype.itemsize * math.prod(model.embedding.shape)
    return found


def _shapes(linears: Mapping[str, Any]) -> list[tuple[int, ...]]:
    return [linear.stack.shape for linear in linears.values()]


def _ids(wanted: Any, layer: int, word: str) -> set[int]:
    """Experts of a layer that are on a device in some phase."""
    rows = [wanted.experts_row(layer, phase) for phase in PHASES]
    return {expert for row in rows for expert, found in enumerate(row) if found == word}


def _node_bytes(model: "Model", wanted: Any, nodes: str | None) -> int:
    needed = 0
    for block in model.moe_blocks:
        bank = block.experts
        placed = bank if isinstance(bank, PlacedBank) else None
        for word in wanted.devices:
            ids = _ids(wanted, block.index, word) if word.startswith("numa:") else set()
            there = placed.nodes.get(word) if placed is not None else None
            if ids and (there is None or set(there.ids) != ids):
                needed += bank.expert_bytes * len(ids)
        if nodes is not None and (placed is None or placed.across != nodes):
            needed += bytes_on_nodes(bank, nodes, len(_ids(wanted, block.index, "cpu")))
    return needed
