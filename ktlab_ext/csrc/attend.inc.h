/* One query a head against a run of cached positions, in the words of kernel.inc.h: what decoding
 * with absorbed MLA does, where all heads share the keys and values are the keys' first columns. */

enum {
    /* Keys come from L2 for every group of heads, so many heads share what is loaded; with four
     * heads and four positions a tile waits for L2. */
    A_HEADS = VB == 64 ? 8 : 4,
    A_TILE = 2, /* positions of a tile of scores, vectors of a tile of values */
    A_BLOCK = 64 /* positions that stay in L2 while all heads pass by */
};

/* `ahead`: a row that is needed in the next block, fetched on the way, or NULL. */
KTL_INLINE void score_tile(int P, int H, const ktl_attend_part *a, const float *q, const float *key,
                           const float *ahead, float *w) {
    VF s[A_TILE][A_HEADS];
    for (int p = 0; p < P; p++)
        for (int h = 0; h < H; h++) s[p][h] = ZEROF();
    int64_t c = 0;
    for (; c + LANES <= a->cols; c += LANES) {
        if (ahead) __builtin_prefetch(ahead + c, 0, 2);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            VF x = LOADF(q + h * a->cols + c);
            __asm__("" : "+v"(x)); /* or the compiler loads it once for each position */
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) s[p][h] = FMA(LOADF(key + p * a->stride + c), x, s[p][h]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int h = 0; h < H; h++) {
            float sum = SUMF(s[p][h]);
            for (int64_t i = c; i < a->cols; i++) sum += key[p * a->stride + i] * q[h * a->cols + i];
            w[h * a->n + p] = sum * a->scale;
        }
}

/* out (H rows of `values`) += weights of `n` positions times N vectors of their keys. */
KTL_INLINE void mix_tile(int H, int N, const ktl_attend_part *a, const float *w, const float *key,
                         int64_t n, float *out) {
    VF sum[A_HEADS][A_TILE];
    for (int h = 0; h < H; h++)
        for (int i = 0; i < N; i++) sum[h][i] = LOADF(out + h * a->values + i * LANES);
    for (int64_t p = 0; p < n; p++) {
        VF k[A_TILE];
#pragma GCC unroll 2
        for (int i = 0; i < N; i++) k[i] = LOADF(key + p * a->stride + i * LANES);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const VF x = SET1F(w[h * a->n + p]);
#pragma GCC unroll 2
            for (int i = 0; i < N; i++) sum[h][i] = FMA(x, k[i], sum[h][i]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int i = 0; i < N; i++) STOREF(out + h * a->values + i * LANES, sum[h][i]);
}

KTL_INLINE void mix_heads(int H, const ktl_attend_part *a, const float *w, const float *key, int64_t n,
                          float *out) {
    int64_t v = 0;
    for (; v + A_TILE * LANES <= a->values; v += A_TILE * LANES) mix_tile(H, A_TILE, a, w, key + v, n, out + v);
    for (; v + LANES <= a->values; v += LANES) mix_tile(H, 1, a, w, key + v, n, out + v);
    for (; v < a->values; v++)
        for (int h = 0; h < H; h++)
            for (int64_t p = 0; p < n; p++)
                out[h * a->values + v] += w[h * a->n + p] * key[p * a->stride + v];
}

static void attend(const ktl_attend_part *a) {
    for (int64_t first = 0; first < a->n; first += A_BLOCK) {
        const int64_t n = a->n - first < A_BLOCK ? a->n - first : A_BLOCK;
        const float *keys = a->keys + first * a->stride;
        int64_t h = 0, p;
        for (; h + A_HEADS <= a->heads; h += A_HEADS) {
            const float *q = a->q + h * a->cols;
            float *w = a->weights + h * a->n + first;
            /* The first two groups of heads fetch a row each of the two that lie a block ahead. */
            const float *ahead = h < A_TILE * A_HEADS ? keys + (A_BLOCK + h / A_HEADS) * a->stride : NULL;
            for (p = 0; p + A_TILE <= n; p += A_TILE)
                score_tile(A_TILE, A_HEADS, a, q, keys + p * a->stride,
                           ahead ? ahead + p * a->stride : NULL, w + p);
            for (; p < n; p++) score_tile(1, A_HEADS, a, q, keys + p * a->stride, NULL, w + p);
        }
        for (; h < a->heads; h++)
            for (p = 0; p < n; p++)
                score_tile(1, 1, a, a->q + h * a->cols, keys + p * a->stride, NULL,
                           a->weights + h * a->n + first + p);
    }
    ktl_attend_softmax(a);
    memset(a->out, 0, (size_t)(a->heads * a->values) * sizeof(float));
    for (int64_t first = 0; first < a->n; first += A_BLOCK) {
        const int64_t n = a->n - first < A_BLOCK ? a->n - first : A_BLOCK;
        const float *keys = a->keys + first * a->stride;
        int64_t h = 0;
        for (; h + A_HEADS <= a->heads; h += A_HEADS)
            mix_heads(A_HEADS, a, a->weights + h * a->n + first, keys, n, a->out + h * a->values);
        for (; h < a->heads; h++)
            mix_heads(1, a, a->weights + h * a->n + first, keys, n, a->out + h * a->values);
    }
}
