/* Every format x layout x instruction set on odd shapes, for the sanitizers: buffers end exactly where
 * the data ends, weights are random bytes (so scales are infinite or NaN at times), activations too.
 * What the numbers are is tested from Python; here: nothing is read or written outside, all of the
 * output is written, threads change no bit, packing loses none, and errors are refused before
 * anything is written.
 */
#include "../ktl.h"
#include "check.h"

#include <math.h>
#include <string.h>

enum { EXPERTS = 3, TOP_K = 2, X_GAP = 3, Y_GAP = 5, SLOW_NUMBERS = 50000 };
static const uint32_t POISON = 0x7fc0dead;
static const struct {
    int64_t rows, cols;
} SHAPES[] = {{1, 32}, {17, 96}, {33, 128}, {5, 256}, {70, 256}, {18, 1408}, {131, 768}};
static dice d = {42};
static long long cases;

static void *exactly(int64_t bytes) {
    void *p = NULL;
    CHECK(posix_memalign(&p, 64, (size_t)bytes) == 0, "no %lld bytes", (long long)bytes);
    return p;
}

static void fill(uint8_t *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++)
        p[i] = (uint8_t)(roll(&d) >> 32);
}

/* ---- matrices ------------------------------------------------------------------------------------- */
static ktl_matrix random_blocks(int format, int64_t rows, int64_t cols) {
    int64_t each = rows * ktl_row_bytes(format, cols);
    uint8_t *data = exactly(EXPERTS * each);
    fill(data, EXPERTS * each);
    return (ktl_matrix){format, KTL_GGML_BLOCKS, EXPERTS, rows, cols, data, each};
}

static int64_t bytes_of(const ktl_matrix *m) { return m->experts * m->expert_stride; }

static ktl_matrix packed_of(ktl_pool *pool, const ktl_matrix *m) {
    int64_t each = ktl_packed_bytes(m->format, m->rows, m->cols), blocks = bytes_of(m);
    uint8_t *data = exactly(EXPERTS * each), *back = exactly(blocks);
    ktl_matrix p = {m->format, KTL_PACKED, EXPERTS, m->rows, m->cols, data, each};
    CHECK(ktl_pack(pool, m, data, EXPERTS * each) == KTL_OK, "pack %s", ktl_format_name(m->format));
    CHECK(ktl_unpack(pool, &p, back, blocks) == KTL_OK, "unpack");
    CHECK(memcmp(back, m->data, (size_t)blocks) == 0, "%s %lld x %lld came back changed",
          ktl_format_name(m->format), (long long)m->rows, (long long)m->cols);
    CHECK(ktl_pack(pool, m, data, EXPERTS * each - 1) < 0, "packed into too little");
    CHECK(ktl_unpack(pool, &p, back, blocks - 1) < 0, "unpacked into too little");
    CHECK(ktl_matrix_check(&p, EXPERTS * each) == KTL_OK, "its own size refused");
    CHECK(ktl_matrix_check(&p, EXPERTS * each - 1) != KTL_OK, "a short buffer accepted");
    p.data += 32;
    CHECK(ktl_matrix_check(&p, EXPERTS * each) == KTL_ERR_ALIGN, "a misaligned buffer accepted");
    p.data -= 32;
    free(back);
    return p;
}

/* ---- runs ------------------------------------------------------------------------------------------ */
typedef struct {
    float *data;
    int64_t tokens, cols, stride, count;
} output;

static output poisoned(int64_t tokens, int64_t cols) {
    output y = {NULL, tokens, cols, cols + Y_GAP, (tokens - 1) * (cols + Y_GAP) + cols};
    y.data = exactly(y.count * 4);
    for (int64_t i = 0; i < y.count; i++)
        memcpy(y.data + i, &POISON, 4);
    return y;
}

static void check_written(const output *y, int wanted, const char *what) {
    for (int64_t i = 0; i < y->count; i++) {
        uint32_t bits;
        memcpy(&bits, y->data + i, 4);
        int inside = i % y->stride < y->cols;
        CHECK((bits == POISON) != (wanted && inside), "%s: element %lld %s", what, (long long)i,
              bits == POISON ? "not written" : "written");
    }
}

static void *random_x(int x_type, int64_t tokens, int64_t cols, int wild) {
    int64_t count = (tokens - 1) * (cols + X_GAP) + cols;
    float *x = exactly(count * 4);
    uint16_t *half = exactly(count * 2);
    for (int64_t i = 0; i < count; i++)
        x[i] = (float)(below(&d, 2001) - 1000) / 250.0f;
    if (wild)
        fill((uint8_t *)x, count * 4);
    for (int64_t i = 0; i < count; i++)
        memcpy(half + i, (uint8_t *)(x + i) + 2, 2);
    free(x_type == KTL_X_BF16 ? (void *)x : (void *)half);
    return x_type == KTL_X_BF16 ? (void *)half : (void *)x;
}

typedef struct {
    ktl_pool *one, *many;
    int isa, few, x_type;
    int64_t tokens;
} run;

static void linear(const run *r, const ktl_matrix *m, const void *x, const char *what) {
    output a = poisoned(r->tokens, m->rows), b = poisoned(r->tokens, m->rows);
    for (int i = 0; i < 2; i++) {
        int code = ktl_linear(i ? r->many : r->one, r->isa, r->few, m, 1, 1, x, r->x_type, r->tokens,
                              m->cols + X_GAP, 0, i ? b.data : a.data, a.stride, 0);
        CHECK(code == KTL_OK, "%s: code %d", what, code);
    }
    check_written(&a, 1, what);
    CHECK(memcmp(a.data, b.data, (size_t)a.count * 4) == 0, "%s: threads changed bits", what);
    /* By head: matrices 0 and 1 on the same x, a token's two results side by side. */
    output both = poisoned(r->tokens, 2 * m->rows);
    int code = ktl_linear(r->many, r->isa, r->few, m, 0, 2, x, r->x_type, r->tokens, m->cols + X_GAP,
                          0, both.data, both.stride, m->rows);
    CHECK(code == KTL_OK, "%s by head: code %d", what, code);
    check_written(&both, 1, what);
    for (int64_t t = 0; t < r->tokens; t++)
        CHECK(memcmp(both.data + t * both.stride + m->rows, a.data + t * a.stride,
                     (size_t)m->rows * 4) == 0, "%s by head: another result", what);
    free(both.data);
    free(a.data);
    free(b.data);
}

/* All tokens to expert 0, nobody, an id twice; expert 1 gets none. */
static void moe(const run *r, const ktl_matrix *gate, const ktl_matrix *down, const void *x,
                const char *what) {
    int64_t *ids = exactly(r->tokens * TOP_K * 8);
    float *weights = exactly(r->tokens * TOP_K * 4);
    for (int64_t i = 0; i < r->tokens * TOP_K; i++) {
        ids[i] = i % TOP_K == 0 ? 0 : below(&d, 3) - 1;
        ids[i] += ids[i] == 1;
        weights[i] = (float)below(&d, 100) / 100.0f;
    }
    output y[3];
    for (int i = 0; i < 3; i++) {
        y[i] = poisoned(r->tokens, down->rows);
        if (i == 2)
            ids[r->tokens * TOP_K - 1] = below(&d, 2) ? EXPERTS : -2;
        int code = ktl_moe(i ? r->many : r->one, r->isa, r->few, gate, gate, down, x, r->x_type,
                           r->tokens, gate->cols + X_GAP, ids, weights, TOP_K, y[i].data, y[i].stride);
        CHECK(code == (i == 2 ? KTL_ERR_ID : KTL_OK), "%s: code %d", what, code);
        check_written(&y[i], i != 2, what);
    }
    CHECK(memcmp(y[0].data, y[1].data, (size_t)y[0].count * 4) == 0, "%s: threads changed bits", what);
    for (int i = 0; i < 3; i++)
        free(y[i].data);
    free(ids);
    free(weights);
}

static void all_isas(run r, const ktl_matrix *m, const ktl_matrix *down) {
    static const int64_t TOKENS[] = {1, 3, 19};
    char what[160];
    for (r.isa = 0; r.isa < KTL_ISAS; r.isa++) {
        /* What computes one number at a time would take a minute for the largest shape. */
        int slow = r.isa == KTL_SERIAL || r.isa >= KTL_AMX_INT8_EMULATED;
        if (*ktl_isa_reason(r.isa) || !ktl_isa_computes(r.isa, m->format) ||
            (slow && m->rows * m->cols > SLOW_NUMBERS))
            continue;
        for (int t = 0; t < 3; t++) {
            r.tokens = TOKENS[t];
            r.few = (int)below(&d, 2) * 100;
            ktl_set_pairs((int)below(&d, 2));
            r.x_type = (int)below(&d, 2);
            snprintf(what, sizeof what, "%s %s %s %lld x %lld, %lld tokens, few %d, pairs %d, x %d",
                     ktl_format_name(m->format), m->layout == KTL_PACKED ? "packed" : "ggml_blocks",
                     ktl_isa_name(r.isa), (long long)m->rows, (long long)m->cols,
                     (long long)r.tokens, r.few, ktl_pairs(r.isa), r.x_type);
            void *x = random_x(r.x_type, r.tokens, m->cols, cases % 2);
            linear(&r, m, x, what);
            if (ktl_isa_computes(r.isa, down->format))
                moe(&r, m, down, x, what);
            free(x);
            cases++;
        }
    }
}

/* ---- the rest of the interface ---------------------------------------------------------------------- */
static void values_and_changes(ktl_pool *pool, const ktl_matrix *m, const ktl_matrix *p) {
    float *a = exactly(m->rows * m->cols * 4), *b = exactly(m->rows * m->cols * 4);
    CHECK(ktl_dequantize(m, 2, 0, m->rows, a) == KTL_OK, "blocks to float");
    CHECK(ktl_dequantize(p, 2, 0, m->rows, b) == KTL_OK, "packed to float");
    CHECK(memcmp(a, b, (size_t)(m->rows * m->cols) * 4) == 0, "%s: two layouts, two values",
          ktl_format_name(m->format));
    CHECK(ktl_dequantize(m, 2, 1, m->rows, a) < 0 && ktl_dequantize(m, EXPERTS, 0, 1, a) < 0, "outside");
    free(a);
    free(b);
    for (int to = KTL_INT8_CHANNEL; to < KTL_FORMATS; to++) {
        int64_t bytes = EXPERTS * m->rows * ktl_row_bytes(to, m->cols);
        if (bytes < 0)
            continue;
        uint8_t *out = exactly(bytes);
        int code = ktl_convert(pool, m, to, out, bytes);
        CHECK(code == KTL_OK, "%s to %s: code %d", ktl_format_name(m->format), ktl_format_name(to), code);
        CHECK(ktl_convert(pool, m, to, out, bytes - 1) < 0, "converted into too little");
        free(out);
    }
}

static void refusals(ktl_pool *pool) {
    float x[32] = {0}, y[4];
    memcpy(y, &POISON, 4);
    ktl_matrix m = random_blocks(KTL_F32, 4, 32);
    CHECK(ktl_linear(pool, KTL_ISAS, 1, &m, 0, 1, x, 0, 1, 32, 0, y, 4, 0) == KTL_ERR_ISA, "an isa too many");
    CHECK(ktl_linear(pool, 0, 1, &m, EXPERTS, 1, x, 0, 1, 32, 0, y, 4, 0) < 0, "an expert too many");
    CHECK(ktl_linear(pool, 0, 1, &m, 0, 1, x, 0, -1, 32, 0, y, 4, 0) < 0, "tokens below zero");
    CHECK(ktl_linear(pool, 0, 1, &m, 0, 1, x, 0, 0, 32, 0, y, 4, 0) == KTL_OK, "zero tokens");
    CHECK(memcmp(y, &POISON, 4) == 0, "y was written");
    CHECK(ktl_row_bytes(KTL_Q4_K, 100) < 0 && ktl_row_bytes(KTL_FORMATS, 256) < 0, "row bytes");
    CHECK(ktl_packed_bytes(KTL_Q4_K, -1, 256) < 0 && ktl_packed_bytes(-1, 1, 256) < 0, "packed bytes");
    CHECK(ktl_format_of("q9_k") == KTL_ERR_FORMAT && !ktl_format_name(-1), "format names");
    for (int f = 0; f < KTL_FORMATS; f++)
        CHECK(ktl_format_of(ktl_format_name(f)) == f, "format %d", f);
    free((void *)m.data);
}

/* Heads and positions that fill tiles and that do not; keys in rows of a wider cache. */
static void attention(const run *r) {
    static const struct {
        int64_t heads, positions, cols, values;
    } sizes[] = {{1, 1, 1, 1}, {8, 70, 80, 64}, {9, 1100, 37, 37}, {13, 129, 100, 51},
               {17, 545, 33, 17}, {41, 545, 33, 17}, {16, 40, 576 - X_GAP, 512}};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int isa = 0; isa < KTL_ISAS; isa++) {
            if (*ktl_isa_reason(isa))
                continue;
            const int64_t heads = sizes[s].heads, cols = sizes[s].cols, values = sizes[s].values;
            void *q = random_x(KTL_X_F32, 1, heads * cols, (int)(s % 2));
            void *keys = random_x(KTL_X_F32, sizes[s].positions, cols, (int)(s % 2));
            float *y[2];
            for (int i = 0; i < 2; i++) {
                y[i] = exactly(heads * values * 4);
                int code = ktl_attend(i ? r->many : r->one, isa, q, heads, cols, keys,
                                      sizes[s].positions, cols + X_GAP, values, 0.1f, y[i]);
                CHECK(code == KTL_OK, "attend: code %d", code);
            }
            CHECK(memcmp(y[0], y[1], (size_t)(heads * values) * 4) == 0, "attend: threads changed bits");
            CHECK(ktl_attend(r->one, isa, q, heads, cols, keys, 0, cols, values, 1, y[0]) < 0, "no keys");
            free(q);
            free(keys);
            free(y[0]);
            free(y[1]);
            cases++;
        }
}

/* A prompt over its latent cache: sizes that fill tiles and that do not, two runs of positions; numbers
 * that are none in every second case. */
static void prompts(const run *r) {
    static const int64_t SIZES[][7] = {/* heads, rank, nope, rope, values, tokens, positions */
        {1, 1, 1, 0, 1, 1, 1}, {2, 40, 24, 8, 24, 7, 33}, {3, 33, 33, 5, 17, 18, 18}, {1, 32, 16, 8, 16, 20, 540}};
    for (size_t s = 0; s < sizeof SIZES / sizeof *SIZES; s++)
        for (int isa = 0; isa < KTL_ISAS; isa++) {
            if (*ktl_isa_reason(isa)) continue;
            ktl_many m = {.heads = SIZES[s][0], .rank = SIZES[s][1], .nope = SIZES[s][2], .rope = SIZES[s][3],
                          .values = SIZES[s][4], .tokens = SIZES[s][5], .positions = SIZES[s][6], .scale = 0.1f};
            const int64_t k_bytes = m.heads * m.rank * m.nope * 2, v_bytes = m.heads * m.rank * m.values * 2;
            uint8_t *k_b = exactly(k_bytes), *v_b = exactly(v_bytes);
            fill(k_b, k_bytes);
            fill(v_b, v_bytes);
            m.k_b = (uint16_t *)k_b;
            m.v_b = (uint16_t *)v_b;
            void *q = random_x(KTL_X_F32, m.tokens, m.heads * m.nope, (int)(s % 2));
            void *q_rope = random_x(KTL_X_F32, m.tokens, m.heads * m.rope + 1, (int)(s % 2));
            void *keys = random_x(KTL_X_F32, m.positions, m.rank + m.rope, (int)(s % 2));
            m.q = q;
            m.q_rope = q_rope;
            m.keys = keys;
            m.q_head = m.nope;
            m.q_token = m.heads * m.nope + X_GAP;
            m.rope_head = m.rope;
            m.rope_token = m.heads * m.rope + 1 + X_GAP;
            m.keys_stride = m.rank + m.rope + X_GAP;
            output y[2];
            for (int i = 0; i < 2; i++) {
                y[i] = poisoned(1, m.tokens * m.heads * m.values);
                m.y = y[i].data;
                const int code = ktl_attend_many(i ? r->many : r->one, isa, &m);
                CHECK(code == (ktl_attends_many(isa) ? KTL_OK : KTL_ERR_ISA), "attend_many: code %d", code);
                check_written(&y[i], ktl_attends_many(isa), "attend_many");
            }
            CHECK(memcmp(y[0].data, y[1].data, (size_t)y[0].count * 4) == 0, "attend_many: threads changed bits");
            m.positions = m.tokens - 1;
            CHECK(ktl_attend_many(r->one, isa, &m) != KTL_OK, "fewer positions than tokens");
            free(k_b);
            free(v_b);
            free(q);
            free(q_rope);
            free(keys);
            free(y[0].data);
            free(y[1].data);
            cases++;
        }
}

static ktl_matrix random_floats(int64_t experts, int64_t rows, int64_t cols) {
    float *data = exactly(experts * rows * cols * 4);
    for (int64_t i = 0; i < experts * rows * cols; i++)
        data[i] = (float)(int32_t)(roll(&d) >> 32) * 0x1p-31f;
    return (ktl_matrix){KTL_F32, KTL_GGML_BLOCKS, experts, rows, cols, (uint8_t *)data, rows * cols * 4};
}

/* A token through whole layers: with and without compressed queries, router, groups, shared expert;
 * activations that are numbers and that are not. */
static void layers(const run *r) {
    enum { D = 32, H = 3, N = 16, R = 6, C = 24, V = 20, Q = 12, E = 6, F = 20, S = 70 };
    ktl_matrix q_a = random_floats(1, Q, D), q_b[2] = {random_floats(1, H * (N + R), D),
                                                       random_floats(1, H * (N + R), Q)};
    ktl_matrix kv_a = random_floats(1, C + R, D), k_b = random_floats(H, C, N);
    ktl_matrix v_b = random_floats(H, V, C), output = random_floats(1, D, H * V);
    ktl_matrix gate = random_floats(1, E, D), inner = random_floats(E, F, D);
    ktl_matrix outer = random_floats(E, D, F), one = inner, one_out = outer;
    ktl_matrix norms = random_floats(1, 1, D + C + Q + E + R);
    one.experts = one_out.experts = 1;
    const float *norm = (const float *)norms.data;
    for (int kind = 0; kind < 16; kind++) {
        ktl_layer l = {.attention_norm = norm, .mlp_norm = norm,
                       .mla = {.q_b = &q_b[kind & 1], .kv_a = &kv_a, .k_b = &k_b, .v_b = &v_b,
                               .output = &output, .kv_a_norm = norm + D, .halves = kind & 1,
                               .eps = 1e-6f, .scale = 0.2f}};
        if (kind & 1) l.mla.q_a = &q_a, l.mla.q_a_norm = norm + D + C;
        l.routed = (ktl_feed){&one, &one, &one_out, 0, 8};
        if (kind & 2) {
            l.router = (ktl_router){&gate, kind & 4 ? norm + D + C + Q : NULL, kind & 4, kind & 8,
                                    kind & 8 ? 3 : 1, kind & 8 ? 2 : 1, 4, 2.5f};
            l.routed = (ktl_feed){&inner, &inner, &outer, 0, 8};
        }
        if (kind & 4) l.shared = (ktl_feed){&one, &one, &one_out, 0, 8};
        for (int bad = 0; bad < 2; bad++) {
            ktl_matrix x = random_floats(1, 1, D), cache = random_floats(1, S, C + R);
            if (bad) ((float *)x.data)[3] = NAN;
            float *keys = exactly(S * (C + R) * 4), *y[2] = {exactly(D * 4), exactly(D * 4)};
            for (int i = 0; i < 2; i++) {
                memcpy(keys, cache.data, S * (C + R) * 4);
                const ktl_layer_place at = {&l, norm + D + C + Q + E, keys, S, C + R};
                int code = ktl_layers_token(i ? r->many : r->one, &at, 1, (float *)x.data, y[i]);
                CHECK(code == KTL_OK, "layer %d: code %d", kind, code);
            }
            CHECK(memcmp(y[0], y[1], D * 4) == 0, "layer %d: threads changed bits", kind);
            /* Three layers in one call, and one after the other. */
            float *more[3] = {exactly(D * 4), exactly(D * 4), exactly(D * 4)};
            float *copies = exactly(3 * S * (C + R) * 4);
            ktl_layer_place at[3];
            for (int i = 0; i < 6; i++) {
                float *cached = copies + i % 3 * S * (C + R);
                at[i % 3] = (ktl_layer_place){&l, norm + D + C + Q + E, cached, S, C + R};
                memcpy(cached, cache.data, S * (C + R) * 4);
                if (i < 3) ktl_layers_token(r->many, &at[i], 1, i ? more[i - 1] : (float *)x.data, more[i]);
            }
            CHECK(ktl_layers_token(r->many, at, 3, (float *)x.data, y[0]) == KTL_OK, "three layers");
            CHECK(memcmp(y[0], more[2], D * 4) == 0, "layers %d: not as one by one", kind);
            CHECK(ktl_layers_token(r->one, at, 0, (float *)x.data, y[0]) == KTL_ERR_SHAPE, "no layer");
            for (int i = 0; i < 3; i++) free(more[i]);
            free(copies);
            free(keys);
            free(y[0]);
            free(y[1]);
            free((void *)x.data);
            free((void *)cache.data);
            cases++;
        }
        int64_t ids[E + 1];
        float weights[E + 1];
        l.router.top_k = E + 1;
        CHECK(!l.router.gate || ktl_route(r->one, 0, &l.router, norm, ids, weights) == KTL_ERR_SHAPE,
              "more experts than there are");
    }
    const ktl_matrix all[] = {q_a, q_b[0], q_b[1], kv_a, k_b, v_b, output, gate, inner, outer, norms};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free((void *)all[i].data);
}

int main(int argc, char **argv) {
    int only = argc > 1 ? ktl_format_of(argv[1]) : -1;
    CHECK(argc < 2 || only >= 0, "a format, found %s", argv[1]);
    run r = {.one = ktl_pool_new(1, NULL, 0), .many = ktl_pool_new(3, NULL, 0)};
    refusals(r.many);
    attention(&r);
    prompts(&r);
    layers(&r);
    for (int format = 0; format < KTL_FORMATS; format++)
        for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
            int64_t rows = SHAPES[s].rows, cols = SHAPES[s].cols;
            if ((only >= 0 && format != only) || ktl_row_bytes(format, cols) < 0)
                continue;
            ktl_matrix m = random_blocks(format, rows, cols), p = packed_of(r.many, &m);
            int fits = ktl_row_bytes(format, rows) > 0; /* float32 has rows of any length */
            ktl_matrix down = random_blocks(fits ? format : KTL_F32, 21, rows);
            ktl_matrix down_p = packed_of(r.many, &down);
            values_and_changes(r.many, &m, &p);
            all_isas(r, &m, s % 2 ? &down_p : &down);
            all_isas(r, &p, s % 2 ? &down : &down_p);
            free((void *)m.data);
            free((void *)p.data);
            free((void *)down.data);
            free((void *)down_p.data);
        }
    ktl_pool_free(r.one);
    ktl_pool_free(r.many);
    printf("kernels: ok, %lld cases\n", cases);
    return 0;
}
