"""Attention over the cached latent that _native.pyx includes: a token's, and a prompt's."""

def attend(Pool pool not None, str isa not None, q, keys, float scale, y):
    """y (H x V) = softmax(scale q keys^T) keys[:, :V]: one query a head, keys shared by all heads.

    q: (H x C), y: (H x V) with V <= C, both C-contiguous; keys: (S x C), rows contiguous, the
    distance between them is free. All float32; y is overwritten.
    """
    cdef Py_buffer v[3]
    cdef int64_t stride
    cdef int code, i, isa_number = isa_of(isa)
    memset(v, 0, sizeof(v))
    try:
        take(q, &v[0], "q", 2, b'f', b'f', "2 dimensions of float32", False)
        take(keys, &v[1], "keys", 2, b'f', b'f', "2 dimensions of float32", False)
        take(y, &v[2], "y", 2, b'f', b'f', "2 dimensions of float32", True)
        whole(&v[0], "q")
        whole(&v[2], "y")
        stride = row_stride(&v[1], "keys", False)
        if v[1].shape[1] != v[0].shape[1] or v[1].shape[0] < 1:
            raise ValueError(f"keys: expected at least one row of {v[0].shape[1]}, found shape "
                             f"({v[1].shape[0]}, {v[1].shape[1]})")
        if v[2].shape[0] != v[0].shape[0] or not 0 < v[2].shape[1] <= v[0].shape[1]:
            raise ValueError(f"y: expected shape ({v[0].shape[0]}, 1 to {v[0].shape[1]}), found "
                             f"({v[2].shape[0]}, {v[2].shape[1]})")
        apart(&v[0], &v[2])
        apart(&v[1], &v[2])
        with nogil:
            code = ktl_attend(pool.pool, isa_number, <const float *>v[0].buf, v[0].shape[0],
                              v[0].shape[1], <const float *>v[1].buf, v[1].shape[0], stride,
                              v[2].shape[1], scale, <float *>v[2].buf)
        if code == KTL_ERR_MEMORY:
            raise MemoryError(f"attend: no memory for scratch of {v[1].shape[0]} positions")
        if code != KTL_OK:
            raise ValueError(f"attend: {isa} cannot be used: {isas()[isa]}")
    finally:
        for i in range(3):
            PyBuffer_Release(&v[i])


def attends_many(str isa not None):
    """Whether `attend_many` computes on an instruction set: where tiles multiply bfloat16."""
    return bool(ktl_attends_many(isa_of(isa)))


cdef int64_t by_head(object array, Py_buffer *v, str name, int64_t tokens, int64_t heads,
                     int64_t *token_stride) except -1:
    """Fills `v` from T x H x N float32 whose last axis is contiguous; the distance between heads."""
    take(array, v, name, 3, b'f', b'f', "3 dimensions of float32", False)
    if v.shape[0] != tokens or v.shape[1] != heads:
        raise ValueError(f"{name}: expected shape ({tokens}, {heads}, ...), found ({v.shape[0]}, "
                         f"{v.shape[1]}, {v.shape[2]})")
    if (v.shape[2] > 1 and v.strides[2] != 4) or v.strides[0] % 4 or v.strides[1] % 4:
        raise ValueError(f"{name}: expected a contiguous last axis; use numpy.ascontiguousarray")
    token_stride[0] = v.strides[0] // 4
    return v.strides[1] // 4


def attend_many(Pool pool not None, str isa not None, q, q_rope, keys, k_b, v_b, float scale, y):
    """The last T of S cached positions attend to those up to their own, as ktl.h says.

    q (T x H x N) and q_rope (T x H x R): last axis contiguous; keys (S x (C + R)): rows contiguous;
    all float32. k_b (H x C x N), v_b (H x V x C): bfloat16 as int16, C-contiguous. y (T x H x V):
    float32, C-contiguous, overwritten.
    """
    cdef Py_buffer v[6]
    cdef ktl_many m
    cdef int code, i, isa_number = isa_of(isa)
    memset(v, 0, sizeof(v))
    try:
        take(y, &v[5], "y", 3, b'f', b'f', "3 dimensions of float32", True)
        take(k_b, &v[3], "k_b", 3, b'h', b'H', "3 dimensions of 16-bit integers", False)
        take(v_b, &v[4], "v_b", 3, b'h', b'H', "3 dimensions of 16-bit integers", False)
        for i, name in ((3, "k_b"), (4, "v_b"), (5, "y")):
            whole(&v[i], name)
        m.tokens, m.heads, m.values = v[5].shape[0], v[5].shape[1], v[5].shape[2]
        m.rank, m.nope = v[3].shape[1], v[3].shape[2]
        m.q_head = by_head(q, &v[0], "q", m.tokens, m.heads, &m.q_token)
        m.rope_head = by_head(q_rope, &v[1], "q_rope", m.tokens, m.heads, &m.rope_token)
        m.rope = v[1].shape[2]
        take(keys, &v[2], "keys", 2, b'f', b'f', "2 dimensions of float32", False)
        m.keys_stride = row_stride(&v[2], "keys", False)
        m.positions = v[2].shape[0]
        if (v[0].shape[2] != m.nope or v[3].shape[0] != m.heads or v[4].shape[0] != m.heads
                or v[4].shape[1] != m.values or v[4].shape[2] != m.rank
                or v[2].shape[1] != m.rank + m.rope or m.positions < m.tokens):
            raise ValueError(
                f"expected k_b (H, C, N) and v_b (H, V, C) for q (T, H, N), q_rope (T, H, R), y "
                f"(T, H, V) and keys of at least T rows of C + R; found q "
                f"({m.tokens}, {m.heads}, {v[0].shape[2]}), R = {m.rope}, k_b ({v[3].shape[0]}, "
                f"{m.rank}, {m.nope}), v_b ({v[4].shape[0]}, {v[4].shape[1]}, {v[4].shape[2]}), "
                f"keys ({m.positions}, {v[2].shape[1]}), y with V = {m.values}")
        for i in range(5):
            apart(&v[i], &v[5])
        m.q, m.q_rope = <const float *>v[0].buf, <const float *>v[1].buf
        m.keys = <const float *>v[2].buf
        m.k_b, m.v_b = <const uint16_t *>v[3].buf, <const uint16_t *>v[4].buf
        m.scale, m.y = scale, <float *>v[5].buf
        with nogil:
            code = ktl_attend_many(pool.pool, isa_number, &m)
        if code == KTL_ERR_MEMORY:
            raise MemoryError(f"attend_many: no memory for scratch of {m.tokens} tokens over "
                              f"{m.positions} positions")
        if code == KTL_ERR_SHAPE:
            raise ValueError("attend_many: expected at least one token, head and dimension")
        if code != KTL_OK:
            raise ValueError(f"attend_many: {isa} cannot be used: "
                             f"{isas()[isa] or 'it has no tiles of bfloat16'}")
    finally:
        for i in range(6):
            PyBuffer_Release(&v[i])
