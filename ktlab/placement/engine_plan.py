"""The plan behind a prediction: what lies where, and in which formats, when an engine runs it."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.facts import read_facts
from ktlab.checkpoint.published import published_model, published_models
from ktlab.errors import SettingError
from ktlab.placement.engines import Engine
from ktlab.placement.ledger import ledgers
from ktlab.placement.machine import CPU, GPU, Machine
from ktlab.placement.placed import Placed
from ktlab.placement.plan import Plan, plan

if TYPE_CHECKING:
    from ktlab.placement.placement import Placement


def config_of(model: str) -> ModelConfig:
    """The sizes of a published shape or of a file."""
    return published_model(model).config if _is_shape(model) else read_facts(model).config


def format_word(model: str, how: Engine, placement: "Placement | Plan | None") -> str:
    """What a prediction calls the formats, where nobody named one."""
    if isinstance(placement, Plan):
        return "the plan's formats"
    return how.format if _is_shape(model) else "its own formats"


def _is_shape(model: str) -> bool:
    """Whether it is a published shape, whose format is anybody's choice."""
    return model.lower() in published_models() and not Path(model).exists()


def engine_plan(
    model: str,
    how: Engine,
    where: Machine,
    format: str | None,
    context: int,
    placement: "Placement | Plan | None",
) -> Plan:
    """What lies where and in which format: by the placement, else by the engine's own rule."""
    kept = (CPU, GPU) if how.gpu else (CPU,)
    there = where
    if placement is None:
        there = replace(where, devices=tuple(d for d in where.devices if d.name in kept))
    if how.experts is not None:  # the GPU's part has its 4 bits from any format
        file_type: str | None = how.experts
    else:
        file_type = format or (how.format if _is_shape(model) else None)
    copies = where.sockets if how.numa == "copies" else 1
    if placement is None and _is_shape(model):
        # A shape is a value: the same plan serves every number of experts, and a fit.
        bare = Machine(
            name=there.name,
            devices=there.devices,
            numa_nodes=there.numa_nodes,
            sockets=there.sockets,
        )
        return replace(
            _shape_plan(model, file_type, bare.to_json(), context, copies), machine=there
        )
    planned = plan(
        model,
        format=file_type,
        machine=there,
        context=context,
        numa_copies=copies,
        placement=placement,
        gpu_formats=how.gpu_format,
    )
    if not isinstance(placement, Plan):
        return planned
    if (
        format is not None
        and how.experts is None
        and planned.stored_bytes != placement.stored_bytes
    ):
        raise SettingError(
            f"format={format!r}, and the placement is a plan in other formats; leave format out, "
            "or give plan.placement alone"
        )
    return _in_its_formats(planned, placement, config_of(model), how)


def _in_its_formats(planned: Plan, given: Plan, config: ModelConfig, how: Engine) -> Plan:
    """`planned` with its weights in the formats of a plan of the same placement; an engine that
    makes its own of the experts does so still."""
    own = ("cache",) if how.experts is None else ("cache", "experts")

    def seat(row: Placed) -> tuple[Any, ...]:
        return row.part.layer, row.part.component, row.device, row.phases, row.experts

    theirs = {seat(row): row for row in given.rows if row.part.component not in own}
    rows = tuple(theirs.get(seat(row), row) for row in planned.rows)
    counted = ledgers(
        config,
        planned.machine,
        planned.placement,
        [row for row in rows if row.part.component != "cache"],
        form=planned.attention,
        context=planned.context,
        chunk=planned.chunk,
        copies=planned.numa_copies,
    )
    stored = given.stored_bytes
    return replace(planned, rows=rows, ledgers=tuple(counted), stored_bytes=stored, known=())


@lru_cache(maxsize=64)
def _shape_plan(model: str, format: str | None, machine: str, context: int, copies: int) -> Plan:
    there = Machine.from_json(machine)
    return plan(model, format=format, machine=there, context=context, numa_copies=copies)
