"""From blocks to the packed layout and back, and from one format to another.

The C core packs, and makes the formats that exist in memory only; Numba where there is none. Blocks
of GGUF's formats are made by Numba (`encodings`), by NumPy where it knows no better. Values are the
same in both layouts, and bytes whoever makes them, bit for bit.
"""

import math
import mmap
from collections.abc import Callable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.kernels import codings, native, numba_backend
from ktlab.kernels.encodings import ENCODED
from ktlab.kernels.request import PACKED, Kernel, Request
from ktlab.kernels.threads import default_threads
from ktlab.kernels.weights import Weights, aligned_bytes, check_format
from ktlab.quantization import Format, QTensor, get_format

FEW_WEIGHTS = 1 << 18
"""Below this NumPy encodes within 0.1 s, and Numba need not be imported and compiled."""


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
    """`tensor.requantize(format)`, in parallel where kernels can do it; the same bytes.

    Pages of a mapped file that were read for it are given back: who takes the copy needs them no
    more.
    """
    format = get_format(format)
    if format == tensor.format:
        return tensor
    make = _converter(tensor, format, *_threads(kernel))
    if make is None:
        made = tensor.requantize(format)
    else:
        blocks_ = np.empty(tensor.shape[:-1] + (format.row_bytes(tensor.shape[-1]),), np.uint8)
        make(blocks_)
        source = f"requantized from {tensor.format.name}"
        made = QTensor(
            name=tensor.name, format=format, shape=tensor.shape, blocks=blocks_, source=source
        )
    drop_pages(tensor.blocks)
    return made


def rows(tensor: QTensor) -> NDArray[np.float32]:
    """`tensor.dequantize()` of a matrix (N, K): the same bits, by the C core where it knows the
    format, which takes a third of NumPy's time and lets other threads go on."""
    if tensor.format.name not in native.formats():
        return np.require(tensor.dequantize(), requirements="W")
    values = np.empty(tensor.shape, np.float32)
    native.dequantize(blocks(tensor), values)
    return values


def floats(tensor: QTensor) -> QTensor:
    """A tensor of 8-bit floats as float32, in parallel."""
    values = np.empty(tensor.shape, np.float32)
    if numba_backend.unavailable() or tensor.size < FEW_WEIGHTS:
        values[:] = tensor.dequantize()
    else:
        numba_backend.floats(tensor, values.reshape(-1, tensor.shape[-1]), default_threads())
    return QTensor.from_array(tensor.name, values)


def _converter(
    tensor: QTensor, format: Format, threads: int, numa: int | None
) -> Callable[[NDArray[np.uint8]], None] | None:
    """What fills blocks of `format` with a tensor's values; None where only NumPy can."""
    if format.name in ENCODED:
        if numba_backend.unavailable() or tensor.size < FEW_WEIGHTS:
            return None
        return lambda out: numba_backend.encode(
            tensor, format.name, out.reshape(-1, out.shape[-1]), threads
        )
    if format.ggml_type is not None or len(tensor.shape) not in (2, 3):
        return None
    try:
        packer = _packer(tensor.format.name)
    except SettingError:
        return None
    return lambda out: packer.convert(blocks(tensor), format.name, out.reshape(-1), threads, numa)


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
