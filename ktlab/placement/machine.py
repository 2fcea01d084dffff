"""The machine that a model shall fit and run on: memories, processors, GPUs and links.

A machine is listed (`data/machines`, a JSON file of one's own), measured (`Machine.measure`), or no
more than sizes. Rates are bytes/s and operations/s; a multiply and an add are two operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ktlab.errors import SettingError
from ktlab.html import decimal_bytes
from ktlab.memory import memory
from ktlab.placement.sizes import parse_size
from ktlab.record import Record

CPU, GPU, DISK = "cpu", "cuda:0", "disk"
THIS = "this"

Size = str | int | float


@dataclass(frozen=True, kw_only=True)
class Device(Record):
    """One memory. `capacity` is what a model may take of it; None where nobody said."""

    name: str
    capacity: int | None
    about: str = ""

    def __str__(self) -> str:
        size = "any size" if self.capacity is None else decimal_bytes(self.capacity)
        return f"{self.name} ({size}{', ' + self.about if self.about else ''})"


@dataclass(frozen=True, kw_only=True)
class Processor(Record):
    """What sits in one socket."""

    name: str
    cores: int
    clock_hz: float | None
    """With all cores at work; None where it was not asked, because the peaks were measured."""
    peaks: Mapping[str, float]
    """{instruction set: operations/s of all cores}; "float32" are the widest vectors' FLOP/s."""
    l2_bytes: int | None = None
    l3_bytes: int | None = None

    @property
    def isa(self) -> tuple[str, ...]:
        """The instruction sets that it multiplies int8 or bfloat16 with."""
        return tuple(name for name in self.peaks if name != "float32")


@dataclass(frozen=True, kw_only=True)
class Gpu(Record):
    """One GPU's ceilings."""

    name: str
    flop_per_s: float
    """bfloat16 with float32 sums, not sparse."""
    float32_flop_per_s: float
    """Without tensor cores."""
    bandwidth: float
    cache_bandwidth: float
    """Of its last cache, which all multiprocessors share."""
    vram: int
    multiprocessors: int


@dataclass(frozen=True, kw_only=True)
class Kernel(Record):
    """ktlab's own kernel, measured on this machine at one number of tokens."""

    kind: str
    """"experts" of a bank, or one "matrix"."""
    format: str
    tokens: int
    """That each touched expert, or the matrix, gets."""
    weights: int
    """Of one expert (gate, up and down), or of the matrix."""
    bits: float
    """A weight, with its scales."""
    operations_per_s: float
    bytes_per_s: float
    """Weights of touched experts over the same seconds."""


@dataclass(frozen=True, kw_only=True)
class Machine(Record):
    """Host memory, and a GPU's where there is one. Sizes are those that a model may take."""

    name: str
    devices: tuple[Device, ...]
    numa_nodes: int = 1
    about: str = ""
    sockets: int = 1
    processor: Processor | None = None
    """What sits in each socket; None where only sizes are known."""
    bandwidth: float | None = None
    """Of one node's memory: listed, or as read by all cores where it was measured."""
    gpus: tuple[Gpu, ...] = ()
    links: Mapping[str, float] = field(default_factory=dict)
    """{"pcie": bytes/s each way}."""
    kernels: tuple[Kernel, ...] = ()
    """Of ktlab's own, where they were measured."""
    token_s: float | None = None
    """What a token of decode costs ktlab beside its kernels, where it was measured."""
    prompt_layer_s: float | None = None
    """What a layer costs it beside its kernels for each token of a prompt."""
    measured: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    """{what: where the values come from}."""

    @classmethod
    def measure(cls, *, again: bool = False) -> "Machine":
        """The machine at hand, its ceilings and kernels measured in less than 20 s.

        The result is kept under the user's cache folder for the same processor, cores and kernels;
        `again` measures anyway. Memory that is free is asked anew each time.
        """
        from ktlab.placement.measuring import measure

        return measure(again=again)

    @property
    def total_bandwidth(self) -> float | None:
        """Of all nodes' memory together, each node reading its own."""
        return None if self.bandwidth is None else self.bandwidth * self.sockets

    def __getitem__(self, name: str) -> Device:
        """The device of that name."""
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices)
        raise SettingError(f"{self.name} has no device {name!r}; there are {known}")

    def __contains__(self, name: object) -> bool:
        return any(device.name == name for device in self.devices)

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(map(str, self.devices))}"

    def __repr__(self) -> str:
        from ktlab.placement import machine_view

        return machine_view.text(self)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        from ktlab.placement import machine_view

        return machine_view.bundle(self)


def get_machine(
    machine: "str | Machine | None", *, ram: Size | None = None, vram: Size | None = None
) -> Machine:
    """A machine by name, from a file, or from sizes; sizes given beside a name count.

    "this" is the one at hand, as far as memory goes; names such as "2x6454s+4090d" are listed in
    `data/machines`, a path that ends in .json is what `Machine.to_json` wrote.

    Without any of them, host memory of any size and no GPU: what would be needed?
    """
    if isinstance(machine, Machine):
        base = machine
    elif machine is None:
        base = Machine(name="any machine", devices=(Device(name=CPU, capacity=None),))
    elif machine == THIS:
        base = this_machine()
    else:
        base = listed_machine(str(machine))
    sizes = {CPU: ("ram", ram), GPU: ("vram", vram)}
    given = {
        name: Device(name=name, capacity=parse_size(word, size), about="as given")
        for name, (word, size) in sizes.items()
        if size is not None
    }
    if not given:
        return base
    kept = {device.name: device for device in base.devices} | given
    name = base.name if base.name != "any machine" else "as given"
    return replace(base, name=name, devices=tuple(kept.values()))


def listed_machine(name: str) -> Machine:
    """The machine of that name, or of that JSON file; SettingError with the nearest name."""
    from ktlab.placement.listed import listed

    return listed(name)


def this_machine() -> Machine:
    """Memory available now, under a container's limit, and the GPUs that torch sees."""
    found = memory()
    sizes = [size for size in (found.available, found.limit) if size is not None]
    about = "available now" if found.limit is None else "available now, container's limit"
    devices = [Device(name=CPU, capacity=min(sizes) if sizes else None, about=about)]
    devices += _gpus()
    return Machine(name="this machine", devices=tuple(devices), numa_nodes=_numa_nodes())


def _gpus() -> list[Device]:
    import torch

    from ktlab.kernels.seat import free_bytes

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        Device(
            name=f"cuda:{i}",
            capacity=free_bytes(i),
            about=torch.cuda.get_device_name(i),
        )
        for i in range(count)
    ]


def _numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
