"""Seconds of each stage of each layer, wherever a placement puts it.

A row of the plan goes to whoever knows its device: a GPU's to `gpu_times`, the CPU's to `own_times`
(ktlab) or `host_times` (engines whose speeds were published).
"""

from collections.abc import Iterator, Sequence

from ktlab.placement.case import Case, Pass, StageTime, on_gpu
from ktlab.placement.engines import KTLAB
from ktlab.placement.gpu_times import crossings, gpu_stage, launch
from ktlab.placement.host_times import host_stage
from ktlab.placement.own_times import own_glue, own_stage
from ktlab.placement.placed import Placed


def stage_times(case: Case, one: Pass) -> Iterator[StageTime]:
    """Every stage of a pass, layer by layer, then what is there once."""
    own = case.engine.name == KTLAB
    cpu_stage = own_stage if own else host_stage

    def of(layer: int | None, component: str, rows: Sequence[Placed]) -> Iterator[StageTime]:
        for row in rows:
            compute = gpu_stage if on_gpu(row) else cpu_stage
            found = compute(case, layer, component, row, one)
            if found is not None:
                yield found

    moved = list(crossings(case, one))
    for index, rows in enumerate(case.layers(one.phase)):
        yield from (found for found in moved if found.layer == index)
        for component, placed in rows.items():
            yield from of(index, component, placed)
        found = launch(case, index, rows, one)
        if found is not None:
            yield found
    yield from (found for found in moved if found.layer is None)
    yield from of(None, "output", case.outside("output", one.phase))
    if own:
        yield from own_glue(case, one)
