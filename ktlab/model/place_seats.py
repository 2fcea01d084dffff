"""Which devices a placement means here, in which format, and how NUMA nodes share experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ktlab.errors import PlacementError
from ktlab.experts.nodes import ALONE, check_nodes
from ktlab.experts.placed_bank import PlacedBank
from ktlab.kernels.int4 import GROUPED
from ktlab.kernels.seat import DTYPES, FORMATS, INT4, TorchSeat
from ktlab.kernels.threads import numa_nodes

if TYPE_CHECKING:
    from ktlab.model.model import Model

StandIn = Mapping[str, "str | TorchSeat"]
_APART = ("cache", "norms", "router")


def nodes_mode(model: "Model", asked: str | None) -> str | None:
    """How NUMA nodes share experts from now on: as asked, or as they do."""
    if asked is None:
        banks = [b.experts for b in model.moe_blocks if isinstance(b.experts, PlacedBank)]
        return next((bank.across for bank in banks), None)
    if asked == ALONE:
        return None
    check_nodes(asked)
    return asked


def planned_formats(placement: Any) -> dict[str, str]:
    """{device: what a plan counts its matrices as}; {} of what is no plan. Of a row its largest
    format is that of its matrices; caches, norms and routers have their own."""
    found: dict[str, set[str]] = {}
    for row in getattr(placement, "rows", ()):
        if row.device.startswith("cuda:") and row.part.component not in _APART:
            found.setdefault(row.device, set()).add(row.formats[0])
    return {word: _seat_format(word, formats) for word, formats in found.items()}


def _seat_format(word: str, formats: set[str]) -> str:
    if formats & set(GROUPED):  # what its groups do not divide is rounded less
        return INT4
    strange = formats - set(DTYPES)
    if strange:
        raise PlacementError(
            f"the plan counts {', '.join(sorted(strange))} on {word}, where matrices are one of "
            f"{', '.join(FORMATS)}: plan with gpu_formats=, or say dtype="
        )
    return next((dtype for dtype in DTYPES if dtype in formats), "bf16")


def seats_of(
    model: "Model",
    wanted: Any,
    stand_in: StandIn,
    dtype: str | None,
    planned: Mapping[str, str],
) -> dict[str, TorchSeat]:
    """The devices by word: those in use already, GPUs that torch finds, stand-ins. All that is
    wrong with the placement is told here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {f"cuda:{i}": f"cuda:{i}" for i in range(count)}
    nodes = [f"numa:{node}" for node in numa_nodes()]
    known = [w for w, seat in model.seats.items() if seat.stand_in]
    try:
        wanted.check(model.config, ["cpu", *nodes, *gpus, *known, *stand_in])
    except PlacementError as error:
        asked = [word for word in wanted.devices if word.startswith("cuda:")]
        missing = [word for word in asked if word not in {*gpus, *known, *stand_in}]
        if not missing:
            raise
        raise PlacementError(
            f"{error}; torch finds {count or 'no'} CUDA device{'s' * (count > 1)} here. To run "
            f'the same code without one: stand_in={{"{missing[0]}": "cpu"}}'
        ) from error
    found: dict[str, TorchSeat] = {}
    for word in wanted.devices:
        if not word.startswith("cuda:"):
            continue
        asked_for, old = stand_in.get(word), model.seats.get(word)
        if isinstance(asked_for, TorchSeat):
            found[word] = asked_for
            continue
        if old is not None and asked_for in (None, str(old.device)):
            format = dtype or planned.get(word, old.format)
            found[word] = old if format == old.format else TorchSeat(word, old.device, format)
        else:
            device = _device(asked_for or gpus[word], count)
            found[word] = TorchSeat(word, device, dtype or planned.get(word, "bf16"))
    return found


def _device(name: str, count: int) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PlacementError(f"stand_in names the torch device {name!r}: {reason}") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PlacementError(
            f"stand_in names the torch device {name!r}; torch finds {count or 'no'} CUDA "
            f'device{"s" * (count > 1)} here. The CPU can stand in for any: "cpu"'
        )
    return device
