"""CUDA's own code without a GPU: real numbers, computed on the CPU, under the name cuda:0.

Streams are clocks (what each knows to be done), so what may run before its input has arrived, a
host that reads too early, memory that goes back too early and needless waiting are found as they
would be met on a GPU, and on every run. Copies and kernels are those that torch dispatches.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from ktlab.kernels import int4

Clock = Counter[int]


class Gpu:
    """What is there, and what was found."""

    def __init__(self, room: int) -> None:
        self.room, self.allocated, self.reserved = room, 0, 0
        self.problems: Counter[str] = Counter()
        self.waits = 0
        self.host: Clock = Counter()
        self.default = Stream(self)
        self.local = threading.local()
        self.lock = threading.RLock()
        self.pinned: dict[int, Block] = {}
        self.kept: list[Tensor] = []  # so that an address is one pinned memory's

    def stream(self, device: Any = None) -> "Stream":
        found: Stream = getattr(self.local, "stream", self.default)
        return found

    @contextmanager
    def use(self, stream: "Stream") -> Iterator[None]:
        before, self.local.stream = self.stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def wait(self, clock: Clock) -> None:
        self.waits += 1
        self.host |= clock

    def touch(self, block: "Block", stream: "Stream | None", *, write: bool) -> None:
        """A stream, or the host, reads or writes; all that was before must be known to it."""
        who, clock = (0, self.host) if stream is None else (id(stream), stream.clock)
        clock[who] += 1
        earlier = [*block.written.items(), *(block.read.items() if write else ())]
        if any(other != who and clock[other] < time for other, time in earlier):
            self.problems[f"{'host' if stream is None else 'stream'} too early"] += 1
        (block.written if write else block.read)[who] = clock[who]


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.clock = gpu, Clock()

    def launch(self) -> "Stream":
        self.clock |= self.gpu.host
        self.clock[id(self)] += 1
        return self

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.launch().clock


class Event:
    gpu: ClassVar[Gpu]

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing = enable_timing

    def record(self, stream: Stream) -> None:
        self.clock, self.at = stream.launch().clock.copy(), id(stream)

    def synchronize(self) -> None:
        self.gpu.wait(self.clock)

    def elapsed_time(self, end: "Event") -> float:
        for event in (self, end):
            if not event.timing or self.gpu.host[event.at] < event.clock[event.at]:
                self.gpu.problems["an event's time before it has come"] += 1
        return 1.0


class Block:
    """Device memory, of the stream on which it was made; or pinned memory."""

    def __init__(self, gpu: Gpu, nbytes: int, stream: Stream | None) -> None:
        self.gpu, self.stream = gpu, stream
        self.written: Clock = Counter()
        self.read: Clock = Counter()
        self.recorded: set[int] = set()
        if stream is not None:
            nbytes = -(-nbytes // 512) * 512
            if gpu.allocated + nbytes > gpu.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            gpu.allocated += nbytes
            gpu.reserved = max(gpu.reserved, gpu.allocated)
            given = (gpu, nbytes, stream, self.written, self.read, self.recorded)
            weakref.finalize(self, _freed, *given)


def _freed(
    gpu: Gpu, nbytes: int, stream: Stream, written: Clock, read: Clock, recorded: set[int]
) -> None:
    gpu.allocated -= nbytes
    safe = {0, id(stream), *recorded}
    for who, time in (written | read).items():
        if who not in safe and max(stream.clock[who], gpu.host[who]) < time:
            gpu.problems["memory goes back while a stream uses it"] += 1


class There(Tensor):
    """A tensor on cuda:0; to torch's C++ it is of the CPU, which has no guard of devices."""

    gpu: ClassVar[Gpu]
    host: Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda:0"))

    @staticmethod
    def __new__(cls, values: Tensor, block: Block) -> "There":
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        made.host, made.block = values, block
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with cls.gpu.lock:
            return _dispatch(cls.gpu, func, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        self.block.recorded.add(id(stream))

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        self.gpu.wait(self.gpu.stream().launch().clock)
        return self.host.clone()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        places = [x for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
        if any(torch.device(place).type == "cpu" for place in places):
            return self.cpu()
        return super().to(*[x for x in args if x not in places], **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Everything(TorchDispatchMode):
    """What has no tensor of the device yet: making them, copying there, pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with There.gpu.lock:
            return _dispatch(There.gpu, func, args, kwargs or {})


def _pinned(gpu: Gpu, values: Tensor) -> Block | None:
    return gpu.pinned.get(values.untyped_storage().data_ptr())


def _dispatch(gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, writes = func._schema.name, func._schema.is_mutable
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    here = [x for x in tensors if not isinstance(x, There)]
    device = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
    to_gpu = device is not None and device.type == "cuda"
    if kwargs.get("pin_memory"):
        made = func(*args, **{**kwargs, "pin_memory": False})
        gpu.pinned[made.untyped_storage().data_ptr()] = Block(gpu, 0, None)
        gpu.kept.append(made)
        return made
    copies = there if name == "aten::copy_" else to_gpu and name in ("aten::to", "aten::_to_copy")
    if copies and there and here and isinstance(args[1], There):
        return _home(gpu, *args, **kwargs)
    if copies and here:
        return _away(gpu, func, args, kwargs)
    if not there and not to_gpu:
        for i, one in enumerate(here):
            if block := _pinned(gpu, one):
                gpu.touch(block, None, write=writes and i == 0)
        return func(*args, **kwargs)
    if any(one.ndim for one in here) and name not in ("aten::index", "aten::index_put_"):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name in WAITING or any(one.ndim for one in here):  # an index of the host is copied
        gpu.wait(gpu.stream().launch().clock)
    return _compute(gpu, func, args, kwargs, there, to_gpu)


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount")


def _home(gpu: Gpu, to: Tensor, values: There, non_blocking: bool = False) -> Tensor:
    stream, block = gpu.stream().launch(), _pinned(gpu, to)
    gpu.touch(values.block, stream, write=False)
    to.copy_(values.host)
    if not non_blocking:
        gpu.wait(stream.clock)
    elif block is None:
        gpu.problems["not waited for, and not pinned"] += 1
    else:
        gpu.touch(block, stream, write=True)
    return to


def _away(gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    to, values = (args if isinstance(args[0], There) else (None, *args))[:2]
    stream, block = gpu.stream().launch(), _pinned(gpu, values)
    if to is None:
        copied = values.to(kwargs.get("dtype") or values.dtype, copy=True)
        to = There(copied, Block(gpu, copied.nbytes, stream))
    else:
        to.host.copy_(values)
    gpu.touch(to.block, stream, write=True)
    if block is not None:
        gpu.touch(block, stream, write=False)
    if block is None or not (kwargs.get("non_blocking") or args[2:] == (True,)):
        gpu.wait(stream.clock)
    return to


def _compute(
    gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any], there: list[There], to_gpu: bool
) -> Any:
    stream = gpu.stream().launch()
    plain = tree_map(lambda x: x.host if isinstance(x, There) else x, (args, kwargs))
    if to_gpu:
        cpu = torch.device("cpu")
        plain = tree_map(lambda x: cpu if isinstance(x, torch.device) else x, plain)
    found = func(*plain[0], **plain[1])
    schema = func._schema
    looks = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    written = [kwargs.get(a.name, args[i] if i < len(args) else None)
               for i, a in enumerate(schema.arguments)
               if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
    for one in [] if looks else there:
        gpu.touch(one.block, stream, write=any(one is w for w in written))
    blocks = {one.host.untyped_storage().data_ptr(): one for one in there}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or schema.name == "aten::_local_scalar_dense":
            return x
        owner = blocks.get(x.untyped_storage().data_ptr()) if x.numel() else None
        if owner is None:
            block = Block(gpu, x.untyped_storage().nbytes(), stream)
            gpu.touch(block, stream, write=True)
            return There(x, block)
        if owner.host is x:
            return owner
        with torch.inference_mode(owner.is_inference()):
            return There(x, owner.block)

    made = tree_map(wrapped, found)
    if isinstance(made, There) and (looks or schema.is_mutable):
        return return_and_correct_aliasing(func, args, kwargs, made)
    return made


@contextmanager
def cuda(room: int = 1 << 40) -> Iterator[Gpu]:
    """torch.cuda, as far as ktlab asks it, with so many bytes."""
    gpu = There.gpu = Event.gpu = Gpu(room)
    names = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda device=None: "a GPU in name",
        Stream=lambda device=None: Stream(gpu),
        Event=Event,
        stream=gpu.use,
        current_stream=gpu.stream,
        synchronize=lambda device=None: gpu.wait(gpu.default.clock),
        memory_allocated=lambda device=None: gpu.allocated,
        memory_reserved=lambda device=None: gpu.reserved,
        mem_get_info=lambda device=None: (gpu.room - gpu.reserved, gpu.room),
        empty_cache=lambda: setattr(gpu, "reserved", gpu.allocated),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)
        int4.reason.cache_clear()
        with Everything():
            yield gpu
    int4.reason.cache_clear()
