"""From blocks to the packed layout and back, and to the formats that are made in memory.

The C core does it in parallel; Numba where there is none. Values are the same in both layouts, bit
for bit.
"""

import math
import mmap
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.kernels import codings, native, numba_backend
from ktlab.kernels.request import PACKED, Kernel, Request
from ktlab.kernels.threads import default_threads
from ktlab.kernels.weights import Weights, aligned_bytes, check_format
from ktlab.quantization import Format, QTensor, get_format


def blocks(tensor: QTensor) -> Weights:
    """A tensor (N, K) or (E, N, K) as kernels take it; a view, unless it has gaps."""
    return Weights.from_blocks(tensor.format.name, tensor.shape, tensor.blocks)


def pack(
    weights: Weights,
    kernel: Kernel | Request | None = None,
    out: NDArray[np.uint8] | None = None,
) -> Weights:
    """The same weights packed, into `out` (64-byte aligned) or new memory."""
    matrices = (weights.experts, weights.rows, weights.cols)
    data = aligned_bytes(packed_size(weights.format, matrices)) if out is None else out
    _packer(weights.format).pack(weights, data, *_threads(kernel))
    return packed_view(weights.format, matrices, data)


def packed_size(format: str, matrices: tuple[int, int, int]) -> int:
    """Bytes of (E, N, K) in packed form."""
    experts, rows, cols = matrices
    return experts * codings.packed_bytes(check_format(format), rows, cols)


def packed_view(format: str, matrices: tuple[int, int, int], data: NDArray[np.uint8]) -> Weights:
    """Packed bytes as weights of (E, N, K)."""
    experts, rows, cols = matrices
    return Weights(
        format=format,
        layout=PACKED,
        experts=experts,
        rows=rows,
        cols=cols,
        data=data,
        expert_stride=data.nbytes // experts,
    )


def unpack_tensor(
    weights: Weights, name: str, shape: tuple[int, ...], kernel: Kernel | None = None
) -> QTensor:
    """Packed weights back in blocks, bit for bit."""
    format = get_format(weights.format)
    data = np.empty(math.prod(shape[:-1]) * format.row_bytes(shape[-1]), np.uint8)
    _packer(weights.format).unpack(weights, data, *_threads(kernel))
    rows = data.reshape(*shape[:-1], -1)
    return QTensor(name=name, format=format, shape=shape, blocks=rows, source="unpacked")


def convert(
    tensor: QTensor, format: str | Format, kernel: Kernel | Request | None = None
) -> QTensor:
    """`tensor.requantize(format)`, in parallel where kernels can do it; the same bytes."""
    format = get_format(format)
    memory_only = format.ggml_type is None
    if format == tensor.format or not memory_only or len(tensor.shape) not in (2, 3):
        return tensor.requantize(format)
    try:
        packer = _packer(tensor.format.name)
    except SettingError:
        return tensor.requantize(format)
    shape = tensor.shape[:-1] + (format.row_bytes(tensor.shape[-1]),)
    out = np.empty(math.prod(shape), np.uint8)
    packer.convert(blocks(tensor), format.name, out, *_threads(kernel))
    return QTensor(
        name=tensor.name,
        format=format,
        shape=tensor.shape,
        blocks=out.reshape(shape),
        source=f"requantized from {tensor.format.name}",
    )


def _threads(kernel: Kernel | Request | None) -> tuple[int, int | None]:
    if kernel is None:
        return default_threads(), None
    return kernel.threads or default_threads(kernel.numa), kernel.numa


def _packer(format: str) -> ModuleType:
    """The module that changes layouts: native if it is there, else numba."""
    if not native.unavailable() and format in native.formats():
        return native
    if reason := numba_backend.reject((format,)):
        why = native.unavailable() or f"no C kernel knows {format}"
        raise SettingError(f"{format} cannot be packed here: {why}; {reason}")
    return numba_backend


def drop_pages(array: NDArray[np.uint8]) -> bool:
    """Let the system take back the memory of a file's mapped pages; False if it is no mapping.

    They are read again from the file where they are needed. A mapping that can be written to is
    left alone: its changes might be nowhere else.
    """
    if array.flags.writeable:
        return False
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(owner, "madvise"):
        return False
    start = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        owner.madvise(mmap.MADV_DONTNEED, first, length)
    return True
