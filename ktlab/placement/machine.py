"""The machine that a model shall fit: memories with their sizes, measured or named."""

from dataclasses import dataclass
from pathlib import Path

from ktlab.errors import SettingError, nearest
from ktlab.html import decimal_bytes
from ktlab.memory import memory
from ktlab.placement.sizes import parse_size
from ktlab.record import Record

CPU, GPU, DISK = "cpu", "cuda:0", "disk"
MACHINES = ("this",)

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
class Machine(Record):
    """Host memory, and a GPU's where there is one. Sizes are those that a model may take."""

    name: str
    devices: tuple[Device, ...]
    numa_nodes: int = 1

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


def get_machine(
    machine: "str | Machine | None", *, ram: Size | None = None, vram: Size | None = None
) -> Machine:
    """A machine from "this" (measured), or from sizes; sizes given beside "this" count.

    Without any of them, host memory of any size and no GPU: what would be needed?
    """
    if isinstance(machine, Machine):
        base = machine
    elif machine is None:
        base = Machine(name="any machine", devices=(Device(name=CPU, capacity=None),))
    elif machine == "this":
        base = this_machine()
    else:
        raise SettingError(
            f"machine={machine!r}{nearest(str(machine), MACHINES)}: expected "
            f'{", ".join(map(repr, MACHINES))}, a Machine, or sizes such as ram="382GB", '
            'vram="14GB"'
        )
    sizes = {CPU: ("ram", ram), GPU: ("vram", vram)}
    given = {
        name: Device(name=name, capacity=parse_size(word, size), about="as given")
        for name, (word, size) in sizes.items()
        if size is not None
    }
    if not given:
        return base
    kept = {device.name: device for device in base.devices} | given
    return Machine(
        name=base.name if base.name != "any machine" else "as given",
        devices=tuple(kept.values()),
        numa_nodes=base.numa_nodes,
    )


def this_machine() -> Machine:
    """Memory available now, under a container's limit, and the first GPU that torch sees."""
    found = memory()
    sizes = [size for size in (found.available, found.limit) if size is not None]
    about = "available now" if found.limit is None else "available now, container's limit"
    devices = [Device(name=CPU, capacity=min(sizes) if sizes else None, about=about)]
    devices += _gpus()
    return Machine(name="this machine", devices=tuple(devices), numa_nodes=_numa_nodes())


def _gpus() -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        return []
    free, _ = torch.cuda.mem_get_info(0)
    return [Device(name=GPU, capacity=int(free), about=torch.cuda.get_device_name(0))]


def _numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
