"""The checks of arrays that _native.pyx includes: type, dimensions, strides, alignment, overlap."""

cdef char type_code(const Py_buffer *v) noexcept:
    """The one letter of a native-order element type, q for every 8-byte integer, else 0."""
    cdef const char *form = v.format
    if form == NULL:
        return b'B'
    if form[0] == b'<' or form[0] == b'=' or form[0] == b'@':
        form += 1
    if form[0] == 0 or form[1] != 0:
        return 0
    if form[0] == b'l' and v.itemsize == 8:
        return b'q'
    return form[0]


cdef int take(object array, Py_buffer *v, str name, int ndim, char first, char second, str wanted,
              bint written) except -1:
    """Fills `v` from an array of `ndim` dimensions of type `first` or `second`, or raises."""
    if not PyObject_CheckBuffer(array):
        raise TypeError(f"{name}: expected {wanted}, found {type(array).__name__}; "
                        "pass a NumPy array (of a torch tensor: tensor.numpy())")
    PyObject_GetBuffer(array, v, PyBUF_STRIDES | PyBUF_FORMAT)
    cdef char code = type_code(v)
    if v.ndim != ndim or code == 0 or (code != first and code != second):
        form = v.format.decode() if v.format != NULL else 'B'
        raise TypeError(f"{name}: expected {wanted}, found {v.ndim} dimensions of "
                        f"type {form!r}; use reshape, astype or view")
    if written and v.readonly:
        raise ValueError(f"{name}: expected a writable array, found a read-only one")
    if <uintptr_t>v.buf % <uintptr_t>v.itemsize:
        raise ValueError(f"{name}: expected data aligned to its {v.itemsize}-byte elements, found "
                         f"address {<uintptr_t>v.buf:#x}; copy it")
    return 0


cdef int64_t row_stride(const Py_buffer *v, str name, bint written) except -1:
    """Elements from one row of a 2-D array to the next; rows are contiguous in themselves."""
    cdef int64_t width = v.shape[1] * v.itemsize
    if v.shape[0] == 0 or v.shape[1] == 0:
        return v.shape[1]
    if v.shape[1] > 1 and v.strides[1] != v.itemsize:
        raise ValueError(f"{name}: expected contiguous rows, found {v.strides[1]} bytes between "
                         f"elements of {v.itemsize}; use numpy.ascontiguousarray")
    if v.shape[0] == 1:
        return v.shape[1]
    if v.strides[0] < (width if written else 0) or v.strides[0] % v.itemsize:
        raise ValueError(f"{name}: expected rows that follow each other, found {v.strides[0]} bytes "
                         f"from row to row of {width} bytes; use numpy.ascontiguousarray")
    return v.strides[0] // v.itemsize


cdef int whole(const Py_buffer *v, str name) except -1:
    """Refuses a 1-D or 2-D array that is not C-contiguous."""
    cdef int64_t expected = v.itemsize
    cdef int i
    for i in range(v.ndim - 1, -1, -1):
        if v.shape[i] > 1 and v.strides[i] != expected and v.len > 0:
            raise ValueError(f"{name}: expected a C-contiguous array; use numpy.ascontiguousarray")
        expected *= v.shape[i]
    return 0


cdef uintptr_t width_bytes(const Py_buffer *v):
    return v.shape[v.ndim - 1] * v.itemsize


cdef uintptr_t before_last_row(const Py_buffer *v):
    return (v.shape[0] - 1) * v.strides[0] if v.ndim == 2 else 0


cdef int apart(const Py_buffer *x, const Py_buffer *y) except -1:
    """Refuses an output that shares bytes with the input (columns side by side are fine)."""
    cdef uintptr_t x0 = <uintptr_t>x.buf, y0 = <uintptr_t>y.buf, step, gap
    if x.len == 0 or y.len == 0:
        return 0
    cdef uintptr_t x_width = width_bytes(x), x1 = x0 + before_last_row(x) + x_width
    cdef uintptr_t y_width = width_bytes(y), y1 = y0 + before_last_row(y) + y_width
    if x1 <= y0 or y1 <= x0:
        return 0
    if x.ndim == 2 and y.ndim == 2 and x.strides[0] == y.strides[0] and x.strides[0] > 0:
        step = x.strides[0]
        gap = (y0 - x0) % step if y0 >= x0 else (step - (x0 - y0) % step) % step
        if gap >= x_width and gap + y_width <= step:
            return 0
    raise ValueError("x and y share memory: expected an output of its own")


cdef int take_x(object x, Py_buffer *v, int64_t *stride) except -1:
    take(x, v, "x", 2, b'f', b'H', "2 dimensions of float32, or of uint16 (bfloat16 bits)", False)
    stride[0] = row_stride(v, "x", False)
    return KTL_X_BF16 if v.itemsize == 2 else KTL_X_F32


cdef int take_y(object y, Py_buffer *v, int64_t tokens, int64_t cols, int64_t *stride) except -1:
    take(y, v, "y", 2, b'f', b'f', "2 dimensions of float32", True)
    stride[0] = row_stride(v, "y", True)
    if v.shape[0] != tokens or v.shape[1] != cols:
        raise ValueError(f"y: expected shape ({tokens}, {cols}), found "
                         f"({v.shape[0]}, {v.shape[1]})")
    return 0
