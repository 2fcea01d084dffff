/* One query a head against a run of cached positions, in the words of kernel.inc.h: what decoding
 * with absorbed MLA does, where all heads share the keys and values are the keys' first columns.
 *
 * Scores: sixteen heads are lanes, whose queries are transposed once, and a key's numbers are broadcast, so that no
 * sum goes across lanes and a line of a key serves all sixteen. Values: their columns are lanes. */

enum {
    A_LANES = KTL_ATTEND_LANES,            /* heads of a group */
    A_POSITIONS = VB == 64 ? 16 : 4,       /* of a tile of scores */
    A_HEADS = VB == 64 ? 8 : 4,            /* of a tile of values */
    A_VECTORS = 3,                         /* of their columns */
    A_BLOCK = 64,                          /* positions whose values stay in L1 while all heads pass by */
    A_AHEAD = A_POSITIONS,                 /* positions from a key to the one that is asked for meanwhile */
    A_NEAR = 8,                            /* the same from L2 */
    A_FAR = 128, /* every second of the next block: reading is spread over scores and values */
    A_PARTS = A_LANES / LANES,
    A_STRIDE = 576 /* DeepSeek's 512 + 64: addresses that are constants are a third fewer operations */
};

/* Queries to [group][column][16 heads]; zeros beyond the last. */
static void lay_out_queries(const ktl_attend_part *a, float *to) {
    for (int64_t h = 0; h < a->heads; h += A_LANES, to += A_LANES * a->cols) {
        const int64_t n = a->heads - h < A_LANES ? a->heads - h : A_LANES;
        const float *q = a->q + h * a->cols;
        int64_t c = 0;
        for (; n == A_LANES && c + 16 <= a->cols; c += 16)
            TRANSPOSE16((const uint32_t *)q + c, (int)a->cols, (uint32_t *)to + c * A_LANES);
        for (; c < a->cols; c++)
            for (int64_t i = 0; i < A_LANES; i++) to[c * A_LANES + i] = i < n ? q[i * a->cols + c] : 0.0f;
    }
}

/* Scores of P positions to w[position][head]. `fetched`: whether rows A_AHEAD on are asked for. */
KTL_INLINE void score_tile(int P, int fetched, const ktl_attend_part *a, int64_t stride, const float *q,
                           const float *key, float *w) {
    VF s[A_POSITIONS][VN];
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int i = 0; i < VN; i++) s[p][i] = ZEROF();
    int64_t c = 0;
    for (; c + 4 <= a->cols; c += 4) {
        /* One line of a row for each column, or all are asked for at once. */
        const float *ahead = key + (A_AHEAD + c % 16) * stride + c / 16 * 16;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (fetched && c % 16 + j < P) __builtin_prefetch(ahead + j * stride, 0, 2);
            VF x[VN];
#pragma GCC unroll 2
            for (int i = 0; i < VN; i++) x[i] = LOADF(q + (c + j) * A_LANES + i * LANES);
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) {
                const VF k = SET1F(key[p * stride + c + j]);
#pragma GCC unroll 2
                for (int i = 0; i < VN; i++) s[p][i] = FMA(k, x[i], s[p][i]);
            }
        }
    }
    for (; c < a->cols; c++)
#pragma GCC unroll 16
        for (int p = 0; p < P; p++)
#pragma GCC unroll 2
            for (int i = 0; i < VN; i++)
                s[p][i] = FMA(SET1F(key[p * stride + c]), LOADF(q + c * A_LANES + i * LANES), s[p][i]);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int i = 0; i < VN; i++) STOREF(w + p * A_LANES + i * LANES, MULF(s[p][i], SET1F(a->scale)));
}

static void score_group(const ktl_attend_part *a, int fetched, const float *q, float *w) {
    int64_t p = 0;
    for (; p + A_POSITIONS <= a->n; p += A_POSITIONS) {
        const float *key = a->keys + p * a->stride;
        float *to = w + p * A_LANES;
        if (a->stride == A_STRIDE) {
            if (fetched) score_tile(A_POSITIONS, 1, a, A_STRIDE, q, key, to);
            else score_tile(A_POSITIONS, 0, a, A_STRIDE, q, key, to);
        } else {
            score_tile(A_POSITIONS, 0, a, a->stride, q, key, to);
        }
    }
    for (; p < a->n; p++) score_tile(1, 0, a, a->stride, q, a->keys + p * a->stride, w + p * A_LANES);
}

/* out (H rows of `values`) += weights w[position][head] of `n` positions times N vectors of their keys. */
KTL_INLINE void mix_tile(int H, int N, int fetched, const ktl_attend_part *a, const float *w, const float *key,
                         int64_t n, float *out) {
    VF sum[A_HEADS][A_VECTORS];
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) sum[h][i] = LOADF(out + h * a->values + i * LANES);
    for (int64_t p = 0; p < n; p++, key += a->stride, w += A_LANES) {
        VF k[A_VECTORS];
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) {
            k[i] = LOADF(key + i * LANES);
            if (fetched && i * LANES % 16 == 0) {
                __builtin_prefetch(key + A_NEAR * a->stride + i * LANES);
                if (p % 2) __builtin_prefetch(key + A_FAR * a->stride + i * LANES, 0, 2);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const VF x = SET1F(w[h]);
#pragma GCC unroll 3
            for (int i = 0; i < N; i++) sum[h][i] = FMA(x, k[i], sum[h][i]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) STOREF(out + h * a->values + i * LANES, sum[h][i]);
}

/* N vectors of the values of `n` positions from `first` on, all heads. */
KTL_INLINE void mix_columns(int N, const ktl_attend_part *a, const float *weights, int64_t first, int64_t n,
                            int64_t v) {
    const float *key = a->keys + first * a->stride + v;
    for (int64_t h = 0; h < a->heads;) {
        const float *w = weights + (h / A_LANES * a->n + first) * A_LANES + h % A_LANES;
        float *out = a->out + h * a->values + v;
        if (h + A_HEADS > a->heads) mix_tile(1, N, 0, a, w, key, n, out), h++;
        else if (h) mix_tile(A_HEADS, N, 0, a, w, key, n, out), h += A_HEADS;
        else mix_tile(A_HEADS, N, 1, a, w, key, n, out), h += A_HEADS;
    }
}

static void mix(const ktl_attend_part *a, const float *weights, int64_t first, int64_t n) {
    int64_t v = 0;
    for (; v + A_VECTORS * LANES <= a->values; v += A_VECTORS * LANES) mix_columns(A_VECTORS, a, weights, first, n, v);
    for (; v + LANES <= a->values; v += LANES) mix_columns(1, a, weights, first, n, v);
    for (; v < a->values; v++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t p = first; p < first + n; p++)
                a->out[h * a->values + v] += weights[(h / A_LANES * a->n + p) * A_LANES + h % A_LANES] *
                                             a->keys[p * a->stride + v];
}

/* Scores of a group to exp(score - most), and a head's sum of them. */
static void softmax_group(float *w, int64_t n, int64_t heads, float *most, float *total) {
    parts_f top[A_PARTS], sum[A_PARTS] = {{0}};
    memcpy(top, w, sizeof top);
    for (int64_t p = 0; p < n; p++)
        for (int i = 0; i < A_PARTS; i++) {
            const parts_f one = *(const parts_f *)(w + p * A_LANES + i * LANES);
            top[i] = (parts_f)LARGER(one, top[i]);
        }
    memcpy(most, top, (size_t)heads * sizeof(float));
    for (int64_t p = 0; p < n; p++) {
        float *row = w + p * A_LANES;
        for (int i = 0; i < A_LANES; i++) row[i] = ktl_exp(row[i] - ((const float *)top)[i]);
        for (int i = 0; i < A_PARTS; i++) sum[i] += *(const parts_f *)(row + i * LANES);
    }
    memcpy(total, sum, (size_t)heads * sizeof(float));
}

static void attend(const ktl_attend_part *a) {
    const int64_t groups = ktl_ceil(a->heads, A_LANES);
    float *q = a->weights, *weights = q + groups * A_LANES * a->cols;
    if (!a->laid) lay_out_queries(a, q);
    for (int64_t g = 0; g < groups; g++) {
        float *w = weights + g * A_LANES * a->n;
        const int64_t first = g * A_LANES, left = a->heads - first;
        score_group(a, g == 0, q + g * A_LANES * a->cols, w);
        softmax_group(w, a->n, left < A_LANES ? left : A_LANES, a->most + first, a->total + first);
    }
    memset(a->out, 0, (size_t)(a->heads * a->values) * sizeof(float));
    for (int64_t first = 0; first < a->n; first += A_BLOCK)
        mix(a, weights, first, a->n - first < A_BLOCK ? a->n - first : A_BLOCK);
}
