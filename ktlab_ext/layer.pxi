"""One token through layers, which _native.pyx includes: objects that hold a layer's matrices and
numbers, checked once, and the calls that take them.

Letters: D hidden, H heads, N nope, R rope, C the latent, Q the compressed query, E experts.
"""

cdef float *numbers(object array, Py_buffer *v, str name, int64_t count, bint written) except NULL:
    """The data of a contiguous 1-D float32 array of `count` numbers."""
    take(array, v, name, 1, b'f', b'f', "1 dimension of float32", written)
    whole(v, name)
    if v.shape[0] != count:
        raise ValueError(f"{name}: expected {count} numbers, found {v.shape[0]}")
    return <float *>v.buf


cdef class Held:
    """A float32 vector that stays where it is as long as this does."""

    cdef Py_buffer view
    cdef const float *data

    def __cinit__(self, array, str name, int64_t count):
        self.data = numbers(array, &self.view, name, count, False)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef int shape_of(str name, Matrix matrix, int64_t experts, int64_t rows, int64_t cols) except -1:
    if (matrix.m.experts, matrix.m.rows, matrix.m.cols) != (experts, rows, cols):
        raise ValueError(f"{name}: expected {experts} x {rows} x {cols}, found {matrix!r}")
    return 0


cdef int computable(str call, int isa, str isa_name, tuple parts) except -1:
    for part in parts:
        if part is not None and not ktl_isa_computes(isa, (<Matrix>part).m.format):
            fail(KTL_ERR_FORMAT, call, part, isa_name)
    return 0


cdef class MLA:
    """A layer's absorbed latent attention; q_a and q_a_norm may be None, then q_b reads D.

    q_a Q x D, q_b H (N + R) x D or Q, kv_a (C + R) x D, k_b H x (C x N), v_b H x (V x C),
    output D x H V; norms float32. halves: a pair to turn is (i, i + R / 2), not (2 i, 2 i + 1).
    """

    cdef ktl_mla m
    cdef readonly tuple matrices
    cdef tuple norms

    def __cinit__(self, Matrix q_a, q_a_norm, Matrix q_b not None, Matrix kv_a not None, kv_a_norm,
                  Matrix k_b not None, Matrix v_b not None, Matrix output not None, bint halves,
                  float eps, float scale):
        cdef int64_t heads = k_b.m.experts, rank = k_b.m.rows, rope = kv_a.m.rows - k_b.m.rows
        cdef int64_t hidden = kv_a.m.cols
        cdef Held norm
        if rope < 0 or rope % 2:
            raise ValueError(f"expected kv_a with an even number of rows beyond k_b's, found "
                             f"{kv_a!r} and {k_b!r}")
        if q_a is not None:
            shape_of("q_a", q_a, 1, q_a.m.rows, hidden)
        shape_of("q_b", q_b, 1, heads * (k_b.m.cols + rope), hidden if q_a is None else q_a.m.rows)
        shape_of("v_b", v_b, heads, v_b.m.rows, rank)
        shape_of("output", output, 1, output.m.rows, heads * v_b.m.rows)
        norm = Held(kv_a_norm, "kv_a_norm", rank)
        self.m.kv_a_norm = norm.data
        self.norms = (norm,)
        if q_a is not None:
            norm = Held(q_a_norm, "q_a_norm", q_a.m.rows)
            self.m.q_a, self.m.q_a_norm = &q_a.m, norm.data
            self.norms += (norm,)
        self.m.q_b, self.m.kv_a, self.m.k_b, self.m.v_b = &q_b.m, &kv_a.m, &k_b.m, &v_b.m
        self.m.output = &output.m
        self.m.halves, self.m.eps, self.m.scale = halves, eps, scale
        self.matrices = (q_a, q_b, kv_a, k_b, v_b, output)


cdef class Router:
    """Which experts a token takes, as ktl.h says. gate: E x D; bias: E numbers or None."""

    cdef ktl_router r
    cdef readonly Matrix gate
    cdef readonly str isa
    cdef Held bias

    def __cinit__(self, str isa not None, Matrix gate not None, bias, bint sigmoid, bint normalise,
                  int64_t groups, int64_t open_groups, int64_t top_k, float scale):
        cdef int64_t experts = gate.m.rows
        computable("Router", isa_of(isa), isa, (gate,))
        shape_of("gate", gate, 1, experts, gate.m.cols)
        if groups < 1 or experts % groups or not 1 <= open_groups <= groups:
            raise ValueError(f"expected groups that divide {experts} experts, of which 1 or more are "
                             f"open, found {groups} groups, {open_groups} open")
        if not 1 <= top_k <= open_groups * (experts // groups):
            raise ValueError(f"top_k: expected 1 to {open_groups * (experts // groups)}, found "
                             f"{top_k}")
        self.isa, self.gate = isa, gate
        self.r.gate, self.r.top_k, self.r.scale = &gate.m, top_k, scale
        self.r.sigmoid, self.r.normalise = sigmoid, normalise
        self.r.groups, self.r.open_groups = groups, open_groups
        if bias is not None:
            self.bias = Held(bias, "bias", experts)
            self.r.bias = self.bias.data


cdef class Experts:
    """gate and up (E x (F x D)) and down (E x (D x F)), and how they are computed, as in `moe`."""

    cdef ktl_feed f
    cdef readonly tuple matrices

    def __cinit__(self, str isa not None, int few, Matrix gate not None, Matrix up not None,
                  Matrix down not None):
        self.f.isa, self.f.few = isa_of(isa), few
        computable("Experts", self.f.isa, isa, (gate, up, down))
        shape_of("up", up, gate.m.experts, gate.m.rows, gate.m.cols)
        shape_of("down", down, gate.m.experts, gate.m.cols, gate.m.rows)
        self.f.gate, self.f.up, self.f.down = &gate.m, &up.m, &down.m
        self.matrices = (gate, up, down)


cdef class Layer:
    """Norms, latent attention (by the instruction set `isa`) and experts of a layer. Without a router
    `routed` is a dense network, which has one expert; `shared` may be None."""

    cdef ktl_layer l
    cdef readonly tuple parts
    cdef tuple norms

    def __cinit__(self, str isa not None, attention_norm, MLA mla not None, mlp_norm, Router router,
                  Experts routed not None, Experts shared):
        cdef int64_t hidden = mla.m.output.rows, experts = routed.f.gate.experts
        cdef Held first = Held(attention_norm, "attention_norm", hidden)
        cdef Held second = Held(mlp_norm, "mlp_norm", hidden)
        cdef Matrix part
        self.l.mla_isa = isa_of(isa)
        computable("Layer", self.l.mla_isa, isa, mla.matrices)
        self.norms = (first, second)
        self.l.attention_norm, self.l.mlp_norm = first.data, second.data
        self.l.mla = mla.m
        for name, matrix, wanted in (
            ("kv_a", mla.matrices[2], 0), ("routed", routed.matrices[0], 1 if router is None else 0),
            ("shared", None if shared is None else shared.matrices[0], 1),
            ("router", None if router is None else router.gate, 0),
        ):
            part = matrix
            if part is not None and part.m.cols != hidden:
                raise ValueError(f"{name}: expected {hidden} columns, found {part!r}")
            if part is not None and wanted and part.m.experts != wanted:
                raise ValueError(f"{name}: expected {wanted} expert, found {part!r}")
        if router is not None:
            if router.gate.m.rows != experts:
                raise ValueError(f"router: expected {experts} rows, one an expert, found "
                                 f"{router.gate!r}")
            self.l.router, self.l.router_isa = router.r, isa_of(router.isa)
        self.l.routed = routed.f
        if shared is not None:
            self.l.shared = shared.f
        self.parts = (mla, router, routed, shared)


cdef float *take_keys(object keys, Py_buffer *v, const ktl_mla *m, int64_t *stride) except NULL:
    take(keys, v, "keys", 2, b'f', b'f', "2 dimensions of float32", True)
    stride[0] = row_stride(v, "keys", True)
    if v.shape[0] < 1 or v.shape[1] != m.kv_a.rows:
        raise ValueError(f"keys: expected rows of {m.kv_a.rows}, found shape ({v.shape[0]}, "
                         f"{v.shape[1]})")
    return <float *>v.buf


def mla_token(Pool pool not None, str isa not None, MLA mla not None, turns, x, keys, q, y):
    """Absorbed latent attention of one token, as ktl.h says; arrays are float32.

    turns (R: cosine and sine of each pair), x (D), q (H (N + R)), y (D) contiguous; keys (S x
    (C + R)): its last row is written, all are attended to.
    """
    cdef Py_buffer v[5]
    cdef ktl_mla m = mla.m
    cdef float *at[5]
    cdef int64_t stride
    cdef int code, i, isa_number = isa_of(isa)
    memset(v, 0, sizeof(v))
    computable("mla_token", isa_number, isa, mla.matrices)
    try:
        m.turns = numbers(turns, &v[0], "turns", m.kv_a.rows - m.k_b.rows, False)
        at[1] = numbers(x, &v[1], "x", m.kv_a.cols, False)
        at[2] = take_keys(keys, &v[2], &m, &stride)
        at[3] = numbers(q, &v[3], "q", m.q_b.rows, True)
        at[4] = numbers(y, &v[4], "y", m.output.rows, True)
        for i in (1, 2):
            apart(&v[i], &v[3])
            apart(&v[i], &v[4])
        apart(&v[3], &v[4])
        with nogil:
            code = ktl_mla_token(pool.pool, isa_number, &m, at[1], at[2], v[2].shape[0], stride,
                                 at[3], at[4])
        if code != KTL_OK:
            fail(code, "mla_token", mla.matrices[1], isa)
    finally:
        for i in range(5):
            PyBuffer_Release(&v[i])


def route(Pool pool not None, Router router not None, x, ids, weights):
    """The experts that a token x (D) takes, the best first: ids (top_k) int64, weights float32."""
    cdef Py_buffer v[3]
    cdef float *at_x
    cdef float *at_weights
    cdef int code, i, isa_number = isa_of(router.isa)
    memset(v, 0, sizeof(v))
    try:
        at_x = numbers(x, &v[0], "x", router.gate.m.cols, False)
        take(ids, &v[1], "ids", 1, b'q', b'q', "1 dimension of int64", True)
        whole(&v[1], "ids")
        if v[1].shape[0] != router.r.top_k:
            raise ValueError(f"ids: expected {router.r.top_k} numbers, found {v[1].shape[0]}")
        at_weights = numbers(weights, &v[2], "weights", router.r.top_k, True)
        with nogil:
            code = ktl_route(pool.pool, isa_number, &router.r, at_x, <int64_t *>v[1].buf, at_weights)
        if code != KTL_OK:
            fail(code, "route", router.gate, router.isa)
    finally:
        for i in range(3):
            PyBuffer_Release(&v[i])


def layers_token(Pool pool not None, list layers not None, list turns not None, x, list keys not None, y):
    """One token x (D) through the layers, one after the other, to y (D). turns, keys: one a layer, as in
    mla_token."""
    cdef Py_ssize_t i, count = len(layers), taken = 0
    cdef ktl_layer_place *at
    cdef Py_buffer *v
    cdef Layer layer
    cdef MLA mla
    cdef float *from_x
    cdef float *to_y
    cdef int64_t hidden
    cdef int code
    if count < 1 or len(turns) != count or len(keys) != count:
        raise ValueError(f"expected layers, and turns and keys for each, found {count} layers, "
                         f"{len(turns)} turns and {len(keys)} keys")
    at = <ktl_layer_place *>calloc(<size_t>count, sizeof(ktl_layer_place))
    v = <Py_buffer *>calloc(<size_t>(2 * count + 2), sizeof(Py_buffer))
    try:
        if at == NULL or v == NULL:
            raise MemoryError()
        hidden = (<MLA>(<Layer?>layers[0]).parts[0]).m.output.rows
        from_x = numbers(x, &v[0], "x", hidden, False)
        to_y = numbers(y, &v[1], "y", hidden, True)
        apart(&v[0], &v[1])
        for i in range(count):
            layer = <Layer?>layers[i]
            mla = layer.parts[0]
            if mla.m.output.rows != hidden:
                raise ValueError(f"layer {i}: expected {hidden} rows of output, found {mla.m.output.rows}")
            at[i].layer = &layer.l
            at[i].turns = numbers(turns[i], &v[2 + 2 * i], "turns", mla.m.kv_a.rows - mla.m.k_b.rows, False)
            at[i].keys = take_keys(keys[i], &v[3 + 2 * i], &mla.m, &at[i].stride)
            at[i].positions = v[3 + 2 * i].shape[0]
            apart(&v[3 + 2 * i], &v[1])
        with nogil:
            code = ktl_layers_token(pool.pool, at, count, from_x, to_y)
        if code != KTL_OK:
            fail(code, "layers_token", mla.matrices[1], "")
    finally:
        for i in range(2 * count + 2):
            if v != NULL:
                PyBuffer_Release(&v[i])
        free(v)
        free(at)
