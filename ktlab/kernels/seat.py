"""A device as code sees it: what goes there, what comes back, what is there.

One implementation for every torch device. On CUDA, copies go through pinned memory on streams of
their own, so that they pass beside the products. A stand-in is another torch device (the CPU) that
answers to a GPU's name, so that what runs on a GPU can be run, and tested, without one.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor

from ktlab.errors import SettingError
from ktlab.kernels import int4, packing
from ktlab.kernels.dispatch import Verdict
from ktlab.kernels.int4 import GROUPED, Values
from ktlab.kernels.request import Kernel
from ktlab.kernels.threads import default_threads
from ktlab.quantization import QTensor, fallback_format, get_format

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
INT4 = "int4"
FORMATS = (*DTYPES, INT4)
"""What matrices can be on a device; "int4" takes activations as bf16."""
LOADED_AT_ONCE = 1 << 20
"""Weights that a thread decodes to float32 at a time on their way to a device: few enough to be
in a cache still when they are rounded."""

GRAIN = 1 << 15
"""Numbers that torch converts without asking other threads for help."""

Host = Callable[[], tuple[Tensor, ...]]
"""Waits for a copy to arrive in host memory and returns it."""


class Seat:
    """The host: nothing has to go anywhere. `TorchSeat` is every other device."""

    word = "cpu"
    host = True
    dtype = torch.float32
    """Of caches."""

    @property
    def free_bytes(self) -> int | None:
        """What it could still take; None where nobody can say."""
        return int(psutil.virtual_memory().available)

    def take(self, values: Tensor) -> Tensor:
        """A host tensor, on the device."""
        return values

    def give(self, *values: Tensor) -> Host:
        """Start copying to host memory; what is returned waits for it."""
        return lambda: values

    def zeros(self, *shape: int, what: str = "cache") -> Tensor:
        """Memory for a cache, float32 on the host."""
        return torch.zeros(*shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.word})"


HOST = Seat()


class TorchSeat(Seat):
    """A torch device under a device word such as "cuda:0"; matrices there are of `dtype`."""

    host = False

    def __init__(self, word: str, device: "str | torch.device", dtype: str = "bf16") -> None:
        if dtype not in FORMATS:
            raise SettingError(f"dtype {dtype!r}: expected one of {', '.join(FORMATS)}")
        self.word, self.format = word, dtype
        self.device = torch.device(device)
        self.stand_in = self.device.type != word.partition(":")[0]
        self.dtype = DTYPES.get(dtype, torch.bfloat16)
        """Of caches and products."""
        self.taken_bytes = self.given_bytes = 0
        """Copied to the device and back since this was made, weights not counted."""
        self._here: dict[int, tuple[str, int]] = {}
        cuda = self.device.type == "cuda"
        self._inward = torch.cuda.Stream(self.device) if cuda else None
        self._outward = torch.cuda.Stream(self.device) if cuda else None

    # Activations -------------------------------------------------------------------------------

    def take(self, values: Tensor) -> Tensor:
        """See `Seat.take`; what follows on the device waits for the copy, the caller does not."""
        self.taken_bytes += values.nbytes
        if self._inward is None:
            return self.placed(values.to(self.device, copy=True))
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        with torch.cuda.stream(self._inward):
            there = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._inward)
        there.record_stream(current)
        return there

    def give(self, *values: Tensor) -> Host:
        """See `Seat.give`."""
        self.given_bytes += sum(x.nbytes for x in values)
        if self._outward is None:
            back = tuple(self.plain(x).to("cpu", copy=True) for x in values)
            return lambda: back
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in values]
        with torch.cuda.stream(self._outward):
            for host, x in zip(pinned, values, strict=True):
                host.copy_(x, non_blocking=True)
                x.record_stream(self._outward)
            arrived = torch.cuda.Event()
            arrived.record(self._outward)

        def wait() -> tuple[Tensor, ...]:
            arrived.synchronize()
            return tuple(pinned)

        return wait

    def placed(self, values: Tensor) -> Tensor:
        """A tensor of `device` as one of this seat: a strict stand-in marks it."""
        return values

    def plain(self, values: Tensor) -> Tensor:
        """The reverse."""
        return values

    def mark(self) -> Any:
        """This moment in the device's work."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, begun: Any, end: Any) -> float:
        """Seconds between two marks; waits for the later one."""
        if self.device.type != "cuda":
            return float(end - begun)
        end.synchronize()
        return float(begun.elapsed_time(end)) / 1e3

    # What stays there --------------------------------------------------------------------------

    def zeros(self, *shape: int, what: str = "cache") -> Tensor:
        """See `Seat.zeros`; of this seat's dtype."""
        return self._keep(torch.zeros(*shape, dtype=self.dtype, device=self.device), what)

    def load(self, tensor: QTensor, dtype: "torch.dtype | None" = None) -> Tensor:
        """The values of an encoded tensor, a piece at a time. Where the device has no room, what
        torch raises, and nothing stays there."""
        shape, rows = tensor.shape, tensor.blocks.reshape(-1, tensor.blocks.shape[-1])
        with torch.inference_mode(False):  # in which threads could not write what was made outside
            there = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        flat = there.view(-1, shape[-1])
        step = max(1, LOADED_AT_ONCE // shape[-1])
        cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if cuda else None  # a thread has its own

        def load(first: int) -> None:
            some = QTensor(
                name=tensor.name,
                format=tensor.format,
                shape=(len(rows[first : first + step]), shape[-1]),
                blocks=rows[first : first + step],
                source=tensor.source,
            )
            with torch.cuda.stream(stream):
                _rounded(torch.from_numpy(packing.rows(some)), flat[first : first + step])

        firsts = range(0, len(rows), step)
        mapped = map if len(firsts) == 1 else _loaders(default_threads()).map
        list(mapped(load, firsts))  # raises what one of them raised
        return self._keep(there, "weights")

    def load_matrix(self, tensor: QTensor) -> Values:
        """A matrix in the seat's format; one a head, and rows that no group divides, as bf16."""
        if self.format_of(tensor.shape) != INT4:
            return self.load(tensor)
        made = packing.convert(tensor, fallback_format(GROUPED[0], tensor.shape[-1]))
        return int4.on_device(made, self.device, self.dtype, lambda x: self._keep(x, "weights"))

    def format_of(self, shape: tuple[int, ...]) -> str:
        """In which format a matrix of this shape is here."""
        if self.format != INT4:
            return self.format
        fits = len(shape) == 2 and fallback_format(GROUPED[0], shape[-1]).name in GROUPED
        return INT4 if fits else "bf16"

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """What `load_matrix` will take."""
        if self.format_of(shape) == INT4:
            group = fallback_format(GROUPED[0], shape[-1]).block_size
            return int4.nbytes((shape[0], shape[1]), group, self.device, self.dtype)
        return math.prod(shape) * self.dtype.itemsize

    def hold(self, values: Tensor) -> Tensor:
        """A small host tensor (a norm, a bias) that stays on the device, as it is."""
        return self._keep(values.to(self.device, copy=True), "weights")

    def _keep(self, values: Tensor, what: str) -> Tensor:
        key = id(values)
        self._here[key] = (what, values.nbytes)
        weakref.finalize(values, self._here.pop, key, None)
        return self.placed(values)

    @property
    def here_bytes(self) -> dict[str, int]:
        """Bytes of what stays there now, {"weights": ..., "cache": ...}."""
        found: Counter[str] = Counter()
        for what, nbytes in list(self._here.values()):
            found[what] += nbytes
        return dict(found)

    @property
    def allocated_bytes(self) -> int:
        """What the device's allocator has given out; of a stand-in what stays there."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return sum(self.here_bytes.values())

    @property
    def free_bytes(self) -> int | None:
        """What the device could still take; None of a stand-in."""
        return free_bytes(self.device) if self.device.type == "cuda" else None

    @cached_property
    def kernel(self) -> Kernel:
        """Who computes there, in the dispatch table's words."""
        isa = "cuda" if self.device.type == "cuda" else "oneDNN's choice"
        stands = f", computed on the {self.device.type} in its stead" if self.stand_in else ""
        return Kernel(
            backend="torch",
            isa=isa,
            layout=f"rows of {self.format}",
            threads=1,
            numa=None,
            few=0,
            reason=f"placed on {self.word}{stands}{self._products}",
        )

    @property
    def _products(self) -> str:
        """How 4 bits are multiplied."""
        if self.format != INT4:
            return ""
        found = int4.reason(self.device, self.dtype, get_format(GROUPED[0]).block_size)
        return (
            f"; 16-bit for each product, as torch's product of 4 bits is not used: {found}"
            if found
            else "; torch's product of 4 bits, checked on it"
        )

    @property
    def verdict(self) -> Verdict:
        """The same as a line of `explain()`."""
        k = self.kernel
        return Verdict(
            backend=k.backend, isa=k.isa, layout=k.layout, status="chosen", reason=k.reason
        )

    def __repr__(self) -> str:
        stands = f", {self.device} stands in" if self.stand_in else ""
        return f"TorchSeat({self.word}: {self.format}{stands})"


def _rounded(values: Tensor, there: Tensor) -> None:
    """`values` of the host into `there`, on this thread alone: torch gives fewer than `GRAIN`
    numbers to no other, and a team of threads for each thread that decodes would be too many."""
    here = there if there.device.type == "cpu" else torch.empty(values.shape, dtype=there.dtype)
    for to, some in zip(here.view(-1).split(GRAIN), values.view(-1).split(GRAIN), strict=True):
        to.copy_(some)
    if here is not there:
        there.copy_(here)


@lru_cache(maxsize=4)
def _loaders(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ktlab-loading")


class Near:
    """The host's norms beside a stage that is on a device: copied once, gone with the stage."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, values: Tensor) -> Tensor:
        """`values` of the host, where the stage is."""
        if not isinstance(self._seat, TorchSeat):
            return values
        kept = self._kept.get(id(values))
        if kept is None:
            kept = self._kept[id(values)] = (values, self._seat.hold(values))
        return kept[1]


def free_bytes(gpu: "torch.device | int") -> int:
    """What a GPU could still take, with what torch's allocator keeps of memory that came back: the
    driver calls that taken."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return int(torch.cuda.mem_get_info(gpu)[0]) + kept


def synchronize(seats: Sequence[Any]) -> None:
    """Wait until the devices have nothing left to do: for a clock."""
    for seat in seats:
        if isinstance(seat, TorchSeat) and seat.device.type == "cuda":
            torch.cuda.synchronize(seat.device)
