# cython: language_level=3, embedsignature=True
"""The skin of the C core (csrc/ktl.h): check, release the GIL, call. No algorithms here.

Arrays are anything with the buffer protocol, NumPy arrays above all. Letters: E experts, N rows,
K columns, T tokens, F and D the widths of an expert's gate/up and down. An error says which
argument, what was expected, what was found; the C core has then written nothing.
"""

from collections import namedtuple

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uint8_t, uint16_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from ktlab_ext.ktl cimport *


HEADER_BYTES = KTL_HEADER_BYTES
LAYOUTS = ("ggml_blocks", "packed")
Header = namedtuple("Header", "format experts rows cols source")


# ---- names ---------------------------------------------------------------------------------------

def formats():
    """The names of all formats, in the core's order."""
    return tuple(ktl_format_name(i).decode() for i in range(KTL_FORMATS))


def isas():
    """Instruction set -> "" if usable in this process, else the reason why not."""
    return {ktl_isa_name(i).decode(): ktl_isa_reason(i).decode() for i in range(KTL_ISAS)}


def cpu_vendor():
    """What cpuid says of the processor's maker, such as "AuthenticAMD"."""
    return ktl_cpu_vendor().decode()


def pairs(str isa):
    """Whether an instruction set scales many tokens' sums two by two as 16 bits (csrc/pairs.inc.h)."""
    return bool(ktl_pairs(ktl_isa_of(isa.encode())))


def set_pairs(wanted):
    """The same by hand, for tests and comparisons; None: as pays. Process-wide; not
    while another thread computes."""
    ktl_set_pairs(-1 if wanted is None else bool(wanted))


cdef int format_of(str name) except -1:
    cdef int found = ktl_format_of(name.encode())
    if found < 0:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(formats())}")
    return found


cdef int isa_of(str name) except -1:
    cdef int found = ktl_isa_of(name.encode())
    if found < 0:
        raise ValueError(f"unknown instruction set {name!r}; known: {', '.join(isas())}")
    return found


def computes(str isa, str format):
    """Whether the instruction set has a kernel for the format."""
    return ktl_isa_computes(isa_of(isa), format_of(format)) == 1


def row_bytes(str format, int64_t cols):
    """Bytes of one row of `cols` values in blocks form."""
    return size(ktl_row_bytes(format_of(format), cols), format, f"{cols} columns")


def packed_bytes(str format, int64_t rows, int64_t cols):
    """Bytes of one packed matrix, header excluded; a multiple of 64."""
    return size(ktl_packed_bytes(format_of(format), rows, cols), format, f"{rows} x {cols}")


cdef size(int64_t found, str format, str shape):
    if found < 0:
        raise ValueError(f"{format} has no form for {shape}: its blocks do not divide the row")
    return found


cdef fail(int code, str call, Matrix matrix, str isa=None):
    """Raises for an error code of the core: what the checks before the call could not see."""
    if code == KTL_ERR_MEMORY:
        raise MemoryError(f"{call}: no memory for scratch; fewer tokens at a time need less")
    if code in (KTL_ERR_ISA, KTL_ERR_FORMAT) and isa is not None:
        known = isas()
        usable = [i for i in known if not known[i] and computes(i, matrix.format)]
        reason = known[isa] or f"it has no kernel for {matrix.format}"
        raise ValueError(f"{call}: {isa} cannot be used: {reason}; usable: {', '.join(usable)}")
    text = {
        KTL_ERR_FORMAT: "this operation does not exist for the format",
        KTL_ERR_LAYOUT: "this operation does not exist for the layout",
        KTL_ERR_SHAPE: "the shape does not fit the format or the operation",
        KTL_ERR_ALIGN: "packed data must begin at a multiple of 64 bytes",
        KTL_ERR_ID: "an expert id is out of range",
    }.get(code, f"error {code} of the C core")
    raise ValueError(f"{call}: {text}; found {matrix!r}" + (f", {isa}" if isa else ""))


include "arrays.pxi"


# ---- objects -------------------------------------------------------------------------------------

cdef class Pool:
    """Worker threads that wait for the calls of this module; the calling thread is one of them.

    threads  1 to 1024, more than there are cpus is allowed
    cpus     the workers run on these cpu numbers only (a NUMA node's); None: on any
    Safe after fork: a child starts its own workers. Idle workers sleep.
    """

    cdef ktl_pool *pool
    cdef readonly int threads
    cdef readonly object cpus

    def __cinit__(self, int threads, cpus=None):
        cdef int *numbers = NULL
        cdef int count = 0
        self.cpus = None if cpus is None else tuple(int(cpu) for cpu in cpus)
        try:
            if self.cpus is not None:
                count = len(self.cpus)
                numbers = <int *>malloc((count + 1) * sizeof(int))
                if numbers == NULL:
                    raise MemoryError("Pool: no memory")
                for i, cpu in enumerate(self.cpus):
                    numbers[i] = cpu
            self.pool = ktl_pool_new(threads, numbers, count)
        finally:
            free(numbers)
        if self.pool == NULL:
            raise ValueError(
                f"Pool: expected 1 to 1024 threads and cpu numbers that exist on this machine, "
                f"found threads={threads}, cpus={self.cpus}; leave cpus out to run anywhere")
        self.threads = threads

    def __dealloc__(self):
        ktl_pool_free(self.pool)

    def __repr__(self):
        where = "" if self.cpus is None else f", cpus={self.cpus}"
        return f"Pool(threads={self.threads}{where})"


cdef class Matrix:
    """A stack of E quantized matrices (N x K) in one buffer, which it keeps alive.

    buffer         1-D uint8, contiguous, read-only allowed; packed: begins at a multiple of 64 bytes
    format         one of formats()
    layout         "ggml_blocks" or "packed"
    expert_stride  bytes from one expert to the next; None: they follow each other without a gap
    """

    cdef Py_buffer view
    cdef ktl_matrix m
    cdef readonly str format, layout
    cdef readonly object buffer

    def __cinit__(self, buffer, str format, str layout, int64_t experts, int64_t rows,
                  int64_t cols, expert_stride=None):
        cdef int64_t each
        cdef int code
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        self.format, self.layout = format, layout
        self.m.format = format_of(format)
        self.m.layout = KTL_PACKED if layout == "packed" else KTL_GGML_BLOCKS
        self.m.experts, self.m.rows, self.m.cols = experts, rows, cols
        if experts < 1 or rows < 1 or cols < 1:
            raise ValueError(f"Matrix: expected at least 1 expert, row and column, found {experts} "
                             f"x {rows} x {cols}")
        take(buffer, &self.view, "buffer", 1, b'B', b'B', "1 dimension of uint8", False)
        whole(&self.view, "buffer")
        if self.m.layout == KTL_PACKED:
            each = packed_bytes(format, rows, cols)
        else:
            each = row_bytes(format, cols)
            each = each * rows if each <= self.view.len // rows else self.view.len + 1
        self.m.data = <const uint8_t *>self.view.buf
        self.m.expert_stride = each if expert_stride is None else expert_stride
        code = ktl_matrix_check(&self.m, self.view.len)
        if code == KTL_ERR_ALIGN:
            raise ValueError(
                f"Matrix: packed data must begin at a multiple of 64 bytes, and so must each expert;"
                f" found {<uintptr_t>self.view.buf % 64} bytes past one and expert_stride="
                f"{self.m.expert_stride}; copy it to an aligned buffer")
        if code != KTL_OK:
            raise ValueError(
                f"Matrix: {experts} x {rows} x {cols} of {format}, {layout}, expert_stride="
                f"{self.m.expert_stride} does not fit into the buffer's {self.view.len} bytes")
        self.buffer = buffer

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    @property
    def experts(self):
        return self.m.experts

    @property
    def rows(self):
        return self.m.rows

    @property
    def cols(self):
        return self.m.cols

    @property
    def expert_stride(self):
        return self.m.expert_stride

    def __repr__(self):
        return (f"Matrix({self.format}, {self.layout}, {self.m.experts} x {self.m.rows} x "
                f"{self.m.cols})")


# ---- operations ----------------------------------------------------------------------------------

def linear(Pool pool not None, str isa not None, int few, Matrix matrix not None, int64_t expert,
           x, y):
    """y (T x N) = x (T x K) W^T with matrix `expert` of the stack.

    x: float32, or uint16 that holds bfloat16 bits; y: float32, overwritten. Rows are contiguous,
    the distance between them is free. Up to `few` tokens the path for few tokens runs.
    """
    cdef Py_buffer v[2]
    cdef int64_t x_stride, y_stride
    cdef int x_type, code, isa_number = isa_of(isa)
    memset(v, 0, sizeof(v))
    try:
        x_type = take_x(x, &v[0], &x_stride)
        if v[0].shape[1] != matrix.m.cols:
            raise ValueError(f"x: expected {matrix.m.cols} columns, found {v[0].shape[1]}")
        if not 0 <= expert < matrix.m.experts:
            raise ValueError(f"expert: expected 0 to {matrix.m.experts - 1}, found {expert}")
        take_y(y, &v[1], v[0].shape[0], matrix.m.rows, &y_stride)
        apart(&v[0], &v[1])
        with nogil:
            code = ktl_linear(pool.pool, isa_number, few, &matrix.m, expert, 1, v[0].buf, x_type,
                              v[0].shape[0], x_stride, 0, <float *>v[1].buf, y_stride, 0)
        if code != KTL_OK:
            fail(code, "linear", matrix, isa)
    finally:
        PyBuffer_Release(&v[0])
        PyBuffer_Release(&v[1])


def linear_by_head(Pool pool not None, str isa not None, int few, Matrix matrix not None, x, y):
    """y[:, h] (T x N) = x[:, h] (T x K) W[h]^T with every matrix of the stack.

    x: (T x H x K) float32, rows contiguous, other distances free; y: (T x H x N) float32,
    C-contiguous, overwritten. few: as in linear.
    """
    cdef Py_buffer v[2]
    cdef int code, isa_number = isa_of(isa)
    cdef int64_t heads = matrix.m.experts, size = 4
    memset(v, 0, sizeof(v))
    try:
        take(x, &v[0], "x", 3, b'f', b'f', "3 dimensions of float32", False)
        take(y, &v[1], "y", 3, b'f', b'f', "3 dimensions of float32", True)
        whole(&v[1], "y")
        if (v[0].shape[1], v[0].shape[2]) != (heads, matrix.m.cols):
            raise ValueError(f"x: expected shape (T, {heads}, {matrix.m.cols}), found "
                             f"({v[0].shape[0]}, {v[0].shape[1]}, {v[0].shape[2]})")
        if (v[1].shape[0], v[1].shape[1], v[1].shape[2]) != (v[0].shape[0], heads, matrix.m.rows):
            raise ValueError(f"y: expected shape ({v[0].shape[0]}, {heads}, {matrix.m.rows}), found "
                             f"({v[1].shape[0]}, {v[1].shape[1]}, {v[1].shape[2]})")
        if v[0].len and (v[0].strides[2] != size or v[0].strides[0] < 0 or v[0].strides[1] < 0
                         or v[0].strides[0] % size or v[0].strides[1] % size):
            raise ValueError("x: expected contiguous rows; use numpy.ascontiguousarray")
        with nogil:
            code = ktl_linear(pool.pool, isa_number, few, &matrix.m, 0, heads, v[0].buf, KTL_X_F32,
                              v[0].shape[0], v[0].strides[0] // size, v[0].strides[1] // size,
                              <float *>v[1].buf, heads * matrix.m.rows, matrix.m.rows)
        if code != KTL_OK:
            fail(code, "linear_by_head", matrix, isa)
    finally:
        PyBuffer_Release(&v[0])
        PyBuffer_Release(&v[1])


include "attention.pxi"


def moe(Pool pool not None, str isa not None, int few, Matrix gate not None, Matrix up not None,
        Matrix down not None, x, ids, weights, y):
    """y (T x D) = sum over k of weights[t, k] * down(silu(gate(x)) * up(x)) of expert ids[t, k].

    gate, up: E x (F x D); down: E x (D x F); ids: int64 (T x k), -1 is nobody, an id may repeat;
    weights: float32 (T x k); both C-contiguous. x, y, few: as in linear.
    """
    cdef Py_buffer v[4]
    cdef int64_t x_stride, y_stride, tokens, top_k
    cdef int x_type, code, i, isa_number = isa_of(isa)
    if not (gate.m.experts == up.m.experts == down.m.experts and gate.m.rows == up.m.rows
            == down.m.cols and gate.m.cols == up.m.cols == down.m.rows):
        raise ValueError(f"expected gate and up of E x F x D and down of E x D x F, found "
                         f"{gate!r}, {up!r}, {down!r}")
    memset(v, 0, sizeof(v))
    try:
        x_type = take_x(x, &v[0], &x_stride)
        tokens = v[0].shape[0]
        if v[0].shape[1] != gate.m.cols:
            raise ValueError(f"x: expected {gate.m.cols} columns, found {v[0].shape[1]}")
        take_y(y, &v[1], tokens, down.m.rows, &y_stride)
        apart(&v[0], &v[1])
        take(ids, &v[2], "ids", 2, b'q', b'q', "2 dimensions of int64", False)
        whole(&v[2], "ids")
        take(weights, &v[3], "weights", 2, b'f', b'f', "2 dimensions of float32", False)
        whole(&v[3], "weights")
        top_k = v[2].shape[1]
        if v[2].shape[0] != tokens or v[3].shape[0] != tokens or v[3].shape[1] != top_k:
            raise ValueError(
                f"ids and weights: expected ({tokens}, k) both, found ({v[2].shape[0]}, {top_k}) "
                f"and ({v[3].shape[0]}, {v[3].shape[1]})")
        with nogil:
            code = ktl_moe(pool.pool, isa_number, few, &gate.m, &up.m, &down.m, v[0].buf, x_type,
                           tokens, x_stride, <const int64_t *>v[2].buf, <const float *>v[3].buf,
                           top_k, <float *>v[1].buf, y_stride)
        if code == KTL_ERR_ID:
            raise_bad_id(<const int64_t *>v[2].buf, tokens, top_k, gate.m.experts)
        if code == KTL_ERR_FORMAT:
            for part in (gate, up, down):
                if not ktl_isa_computes(isa_number, (<Matrix>part).m.format):
                    fail(code, "moe", part, isa)
        if code != KTL_OK:
            fail(code, "moe", gate, isa)
    finally:
        for i in range(4):
            PyBuffer_Release(&v[i])


cdef raise_bad_id(const int64_t *ids, int64_t tokens, int64_t top_k, int64_t experts):
    cdef int64_t i
    for i in range(tokens * top_k):
        if not -1 <= ids[i] < experts:
            raise ValueError(f"ids[{i // top_k}, {i % top_k}]: expected 0 to {experts - 1}, or -1 "
                             f"for nobody, found {ids[i]}")


include "layer.pxi"


cdef enum change_kind:
    PACK, UNPACK, CONVERT


cdef change(change_kind kind, str call, Pool pool, Matrix matrix, str format, out):
    cdef Py_buffer v
    cdef int code, number = 0
    memset(&v, 0, sizeof(v))
    if kind == PACK:
        needed = matrix.m.experts * packed_bytes(matrix.format, matrix.m.rows, matrix.m.cols)
    else:
        number = format_of(format)
        needed = matrix.m.experts * matrix.m.rows * row_bytes(format, matrix.m.cols)
    if (kind == UNPACK) != (matrix.m.layout == KTL_PACKED):
        raise ValueError(f"{call}: expected {'packed' if kind == UNPACK else 'ggml_blocks'}, found "
                         f"{matrix!r}")
    try:
        take(out, &v, "out", 1, b'B', b'B', "1 dimension of uint8", True)
        whole(&v, "out")
        if v.len != needed:
            raise ValueError(f"out: expected {needed} bytes, found {v.len}")
        if kind == PACK and <uintptr_t>v.buf % 64:
            raise ValueError(f"out: expected data at a multiple of 64 bytes, found it "
                             f"{<uintptr_t>v.buf % 64} bytes past one; allocate 64 bytes more")
        with nogil:
            if kind == PACK:
                code = ktl_pack(pool.pool, &matrix.m, <uint8_t *>v.buf, v.len)
            elif kind == UNPACK:
                code = ktl_unpack(pool.pool, &matrix.m, <uint8_t *>v.buf, v.len)
            else:
                code = ktl_convert(pool.pool, &matrix.m, number, <uint8_t *>v.buf, v.len)
        if code != KTL_OK:
            fail(code, call, matrix)
    finally:
        PyBuffer_Release(&v)


def pack(Pool pool not None, Matrix matrix not None, out):
    """Blocks to packed: out holds experts * packed_bytes(...) uint8, 64-byte aligned."""
    change(PACK, "pack", pool, matrix, matrix.format, out)


def unpack(Pool pool not None, Matrix matrix not None, out):
    """Packed to blocks, bit-exact: out holds experts * rows * row_bytes(...) uint8."""
    change(UNPACK, "unpack", pool, matrix, matrix.format, out)


def convert(Pool pool not None, Matrix matrix not None, str format not None, out):
    """Blocks of any format to blocks of int8_channel or int4_group*, rounded to nearest."""
    change(CONVERT, f"convert to {format}", pool, matrix, format, out)


def dequantize(Matrix matrix not None, int64_t expert, int64_t row, out):
    """Fills out (count x K float32, C-contiguous) with rows [row, row + count) of one expert."""
    cdef Py_buffer v
    cdef int code
    memset(&v, 0, sizeof(v))
    try:
        take(out, &v, "out", 2, b'f', b'f', "2 dimensions of float32", True)
        whole(&v, "out")
        if v.shape[1] != matrix.m.cols:
            raise ValueError(f"out: expected {matrix.m.cols} columns, found {v.shape[1]}")
        if not 0 <= expert < matrix.m.experts:
            raise ValueError(f"expert: expected 0 to {matrix.m.experts - 1}, found {expert}")
        if not 0 <= row <= matrix.m.rows - v.shape[0]:
            raise ValueError(f"rows: expected a part of 0 to {matrix.m.rows}, found {row} to "
                             f"{row + v.shape[0]}")
        with nogil:
            code = ktl_dequantize(&matrix.m, expert, row, v.shape[0], <float *>v.buf)
        if code != KTL_OK:
            fail(code, "dequantize", matrix)
    finally:
        PyBuffer_Release(&v)


# ---- the header of packed data -------------------------------------------------------------------

cdef int put(char *field, size_t room, str name, str text) except -1:
    cdef bytes raw = text.encode()
    if <size_t>len(raw) >= room or b"\0" in raw:
        raise ValueError(f"{name}: expected at most {room - 1} bytes, found {text!r}")
    cdef size_t i
    for i in range(<size_t>len(raw)):
        field[i] = (<const char *>raw)[i]
    return 0


def header_write(str format, int64_t experts, int64_t rows, int64_t cols, str source=""):
    """The HEADER_BYTES bytes that stand before packed data in a file.

    source: what it was packed from (a digest of at most 63 characters), compared when it is read.
    """
    cdef ktl_header h
    cdef uint8_t raw[KTL_HEADER_BYTES]
    memset(&h, 0, sizeof(h))
    put(h.format, sizeof(h.format), "format", format)
    put(h.source, sizeof(h.source), "source", source)
    h.experts, h.rows, h.cols = experts, rows, cols
    if ktl_header_write(&h, raw) != KTL_OK:
        raise ValueError(f"header: expected a known format and a shape that it has, found {format} "
                         f"{experts} x {rows} x {cols}")
    return raw[:KTL_HEADER_BYTES]


def header_read(data, total_bytes=None):
    """Header(format, experts, rows, cols, source) of packed data, or ValueError that says why not.

    data: 1-D uint8 that begins with the header; total_bytes: of header and data together, where
    `data` is not all of it.
    """
    cdef Py_buffer v
    cdef ktl_header h
    cdef char why[256]
    cdef int64_t total
    memset(&v, 0, sizeof(v))
    try:
        take(data, &v, "data", 1, b'B', b'B', "1 dimension of uint8", False)
        whole(&v, "data")
        total = v.len if total_bytes is None else total_bytes
        if min(v.len, total) < KTL_HEADER_BYTES:
            raise ValueError(f"packed header: expected {KTL_HEADER_BYTES} bytes, found "
                             f"{min(v.len, total)}")
        memset(why, 0, sizeof(why))
        if ktl_header_read(<const uint8_t *>v.buf, total, &h, why) != KTL_OK:
            raise ValueError(f"packed header: {why.decode(errors='replace')}")
        return Header(h.format.decode(), h.experts, h.rows, h.cols, h.source.decode())
    finally:
        PyBuffer_Release(&v)


# ---- ceilings ------------------------------------------------------------------------------------

cdef int check_seconds(double seconds) except -1:
    if not 0 < seconds <= 60:
        raise ValueError(f"seconds: expected more than 0 and at most 60, found {seconds}")
    return 0


def peak_ops(Pool pool not None, str isa not None, double seconds=0.2, bint loading=False):
    """Operations per second (multiply and add are two) of the set's dot instruction on registers.

    `loading` (AMX): with three tile loads, from L1, for two products. 0.0 where there
    is no such ceiling: emulated sets, and `loading` without tiles.
    """
    cdef double found
    cdef int number = isa_of(isa)
    check_seconds(seconds)
    if ktl_isa_reason(number)[0]:
        raise ValueError(f"peak_ops: {isa} cannot be used: {ktl_isa_reason(number).decode()}")
    with nogil:
        found = ktl_peak_ops(pool.pool, number, loading, seconds)
    return found


def peak_fma(Pool pool not None, double seconds=0.2):
    """float32 FLOP per second on registers."""
    cdef double found
    check_seconds(seconds)
    with nogil:
        found = ktl_peak_fma(pool.pool, seconds)
    return found


def peak_read(Pool pool not None, buffer, double seconds=0.2):
    """Bytes per second that all workers read from `buffer`; several times the cache, filled."""
    cdef Py_buffer v
    cdef double found
    check_seconds(seconds)
    memset(&v, 0, sizeof(v))
    try:
        take(buffer, &v, "buffer", 1, b'B', b'B', "1 dimension of uint8", False)
        whole(&v, "buffer")
        if v.len < 1 << 20:
            raise ValueError(f"buffer: expected at least 1 MiB, found {v.len} bytes")
        with nogil:
            found = ktl_peak_read(pool.pool, <const uint8_t *>v.buf, v.len, seconds)
        return found
    finally:
        PyBuffer_Release(&v)
