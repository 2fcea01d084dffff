"""SGLang's words for experts on CPU and GPU (kt-kernel): written from a placement.

What they mean (sglang's kt_ep_wrapper.py and kt-kernel's experts_base.py, early 2026): everything
but routed experts is on the GPUs. Of the layers' experts --kt-num-gpu-experts times the layers are
on the GPU: `uniform` takes the first of each layer, `front-loading` fills layer by layer,
`frequency` takes the most used of all layers together by a table of counts (a .pt file with
"logical_count", layers x experts). A table of ones and noughts so says any mask.
L layers, E experts.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import PlacementError, nearest
from ktlab.placement.flags.shown import shown
from ktlab.placement.placement import PHASES, Placement
from ktlab.placement.ranges import write_ranges
from ktlab.record import Record

METHODS = ("AMXINT8", "AMXINT4", "RAWINT4", "FP8", "FP8_PERCHANNEL", "BF16", "LLAMAFILE")
"""--kt-method: what kt-kernel computes experts on the CPU with."""
UNIFORM, FRONT_LOADING, FREQUENCY = "uniform", "front-loading", "frequency"
COUNTS = "expert-counts.pt"
"""The table for `frequency`, which `SGLang.save` writes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SGLang(Record):
    """--kt options that put experts so; `left_out` is what of the placement cannot be said."""

    args: tuple[str, ...]
    gpu_experts: tuple[tuple[int, ...], ...]
    """Those on a GPU, for each layer with experts."""
    moe_layers: tuple[int, ...]
    layers: int
    experts: int
    strategy: str
    left_out: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        placement: Placement,
        *,
        method: str = "LLAMAFILE",
        cpu_threads: int | None = None,
        numa_nodes: int = 1,
        deferred: int = 0,
    ) -> "SGLang":
        """The options for decode; `method` is what computes on the CPU (`METHODS`).

        Raises `PlacementError` with all that is wrong.
        """
        placement = placement.placement
        problems = []
        if method not in METHODS:
            problems.append(f"method {method!r} is unknown{nearest(method, METHODS)}; "
                            f"expected {', '.join(METHODS)}")  # fmt: skip
        for name, value, least in (
            ("cpu_threads", cpu_threads, 1), ("numa_nodes", numa_nodes, 1),
            ("deferred", deferred, 0),
        ):  # fmt: skip
            if value is not None and (isinstance(value, bool) or value < least):
                problems.append(f"{name}={value!r}: expected a whole number from {least} on")
        shape = placement.model
        if not shape.moe_layers:
            problems.append(f"{shape.name} has no experts")
        if problems:
            raise PlacementError("SGLang's options: " + "; ".join(problems))
        mine = [
            tuple(e for e, where in enumerate(placement.experts_row(layer)) if _is_gpu(where))
            for layer in shape.moe_layers
        ]
        total = sum(map(len, mine))
        strategy = _strategy(mine, shape.experts, total)
        args = ["--kt-method", method]
        if cpu_threads is not None:
            args += ["--kt-cpuinfer", str(cpu_threads)]
        args += ["--kt-threadpool-count", str(numa_nodes)]
        if total % len(mine) == 0:
            args += ["--kt-num-gpu-experts", str(total // len(mine))]
        else:  # cut down to a whole number there: a half above survives what floats lose
            ratio = (total + 0.5) / (len(mine) * shape.experts)
            args += ["--kt-gpu-experts-ratio", f"{ratio:.9f}"]
        args += ["--kt-expert-placement-strategy", strategy]
        if strategy == FREQUENCY:
            args += ["--init-expert-location", COUNTS]
        if deferred:
            args += ["--kt-max-deferred-experts-per-token", str(deferred)]
        return cls(
            args=tuple(args), gpu_experts=tuple(mine), moe_layers=tuple(shape.moe_layers),
            layers=shape.layers, experts=shape.experts, strategy=strategy,
            left_out=tuple(_left_out(placement)),
        )  # fmt: skip

    @property
    def mask_LE(self) -> NDArray[np.bool_]:
        """(L, E) bool, all layers: True on a GPU; what kt-kernel takes as gpu_experts_mask."""
        mask_LE = np.zeros((self.layers, self.experts), bool)
        for layer, experts in zip(self.moe_layers, self.gpu_experts, strict=True):
            mask_LE[layer, list(experts)] = True
        return mask_LE

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the table that --init-expert-location names: 1 on a GPU, 0 elsewhere."""
        import torch

        file = Path(path)
        torch.save({"logical_count": torch.from_numpy(self.mask_LE.astype(np.float32))}, file)
        return file

    def __str__(self) -> str:
        return shlex.join(self.args)

    def __repr__(self) -> str:
        return shown(self.args, self.left_out)


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda:")


def _strategy(mine: "list[tuple[int, ...]]", experts: int, total: int) -> str:
    """The plainest one that gives just these experts."""
    first = tuple(range(total // len(mine)))
    if all(found == first for found in mine):
        return UNIFORM
    flat = [layer * experts + expert for layer, found in enumerate(mine) for expert in found]
    return FRONT_LOADING if flat == list(range(total)) else FREQUENCY


def _left_out(placement: Placement) -> Iterator[str]:
    if placement.decode != placement.prefill:
        yield f"prefill elsewhere than decode: {PHASES[0]} is written"
    elsewhere: dict[tuple[str, str], list[int]] = {}
    for component, layer, _, device in placement.cells():
        if component not in ("experts", "cache", "nextn") and not _is_gpu(device):
            at = elsewhere.setdefault((component, device), [])
            at += [] if layer is None else [layer]
    for (component, device), layers in elsewhere.items():
        where = f" of layers {write_ranges(layers)}" if layers else ""
        yield f"{component}{where} on {device}: SGLang computes all but routed experts on the GPUs"
    used = {d for d in placement.devices if _is_gpu(d)}
    if len(used) > 1:
        yield f"{', '.join(sorted(used))}: SGLang divides each matrix among GPUs (--tp-size)"
    if "disk" in placement.devices:
        yield "disk: SGLang keeps experts in host memory"
