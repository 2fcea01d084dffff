"""Machines that are listed: `data/machines`, each value with its source, and files of one's own."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ktlab.checkpoint.embedded import data_path
from ktlab.errors import SettingError, nearest
from ktlab.placement.machine import CPU, GPU, THIS, Device, Gpu, Machine, Processor

LANE_BYTES = 8
"""A memory channel transfers 64 bits at a time."""


def machine_names() -> tuple[str, ...]:
    """Every name that `get_machine` knows: "this", and what is listed."""
    return (THIS, *_file("machines.json"))


def listed(name: str) -> Machine:
    """A listed machine, or what a .json file holds; SettingError with the nearest name."""
    if name.endswith(".json"):
        return _own(Path(name).expanduser())
    known = _file("machines.json")
    if name.lower() not in known:
        names = machine_names()
        raise SettingError(
            f"machine={name!r}{nearest(name.lower(), names)}: expected "
            f"{', '.join(map(repr, names))}, a .json file that Machine.to_json wrote, a Machine, "
            'or for a plan sizes such as ram="382GB", vram="14GB"'
        )
    return _machine(name.lower(), known[name.lower()])


def _machine(name: str, said: dict[str, Any]) -> Machine:
    chip = _file("processors.json")[said["processor"]]
    card = _file("gpus.json")[said["gpu"]]
    clocks = {"amx": chip["tile_clock_hz"] or 0.0}
    peaks = {
        isa: chip["cores"] * clocks.get(isa[:3], chip["clock_hz"]) * each
        for isa, each in chip["operations_per_cycle"].items()
    }
    return Machine(
        name=name,
        about=said["about"],
        devices=(
            Device(name=CPU, capacity=int(said["memory_bytes"]), about="installed"),
            Device(name=GPU, capacity=int(card["vram"]), about=card["name"]),
        ),
        numa_nodes=said["sockets"],
        sockets=said["sockets"],
        processor=Processor(
            name=chip["name"],
            cores=chip["cores"],
            clock_hz=chip["clock_hz"],
            peaks=peaks,
            l2_bytes=chip["l2_bytes"],
            l3_bytes=chip["l3_bytes"],
        ),
        bandwidth=LANE_BYTES * said["channels"] * said["transfers_per_s"],
        gpus=(
            Gpu(
                name=card["name"],
                flop_per_s=card["flop_per_s"],
                float32_flop_per_s=card["float32_flop_per_s"],
                bandwidth=card["bandwidth"],
                cache_bandwidth=card["cache_bandwidth"],
                vram=int(card["vram"]),
                multiprocessors=card["multiprocessors"],
            ),
        ),
        links={"pcie": said["pcie"]},
        sources={
            "machine": said["source"],
            "processor": chip["source"],
            "gpu": card["source"],
            "bandwidth": f"{said['channels']} channels x 8 bytes x {said['transfers_per_s']:.3g}/s",
        },
    )


def _own(path: Path) -> Machine:
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"machine={str(path)!r}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"machine={str(path)!r} is no machine as Machine.to_json writes it: {error}"
        ) from None


@cache
def _file(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data_path("machines", name).read_text(encoding="utf-8"))
    return found
