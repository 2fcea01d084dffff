/* attend.inc.h with products of 16 bits, twice as many an instruction as of float32. Keys and queries become
 * integers by a scale for each position and each head, weights by one for each head and W_RUN positions: scales so
 * small that no sum exceeds 32 bits (Cauchy and Schwarz), which leaves 10 to 12 bits to a usual number.
 * Loses 1e-5 of |q| |k| in a score; of the result 3e-4, and 8e-4 where softmax is sharp. In the words of kernel.inc.h, and
 *     ADD_PRODUCTS16(sum, a, b)     32-bit sums += two products of 16-bit numbers
 *     ADD_PRODUCTS16_AT(sum, a, p)  the same by two numbers at p for all lanes
 *     LOW_HALVES(top, low)          lanes of the low halves of both */

enum {
    W_STEP = 2 * LANES, /* columns that become pairs together: LANES of them with the LANES that follow */
    W_RUN = 64,         /* positions whose weights share a scale, and whose sums stay integers */
    W_PAIRS = A_STRIDE / 2,
    /* Rows from those that are made integers to those asked for meanwhile, and lines asked for while one is made.
     * Scores and values ask for one a step: so reading is spread over all, and a block asks for its own number. */
    W_AHEAD = 56,
    W_LINES = 7
};
#define W_NORM 32000.0f /* of a query's or a key's integers */
#define W_SUM 65000.0f  /* of a run's weights: W_NORM * W_SUM < 2^31 */
#define W_MOST 32767.0f

/* A float as an integer in the low half. */
KTL_INLINE VI word_of(VF x, VF scale) {
    return (VI)FMA(x, scale, SET1F(KTL_START)); /* 1.5 * 2^23 leaves the integer in the mantissa's low bits */
}

/* What a row is multiplied by, and what an integer then is. */
KTL_INLINE float word_scale(const float *x, int64_t cols, float *step) {
    VF sum[2] = {ZEROF(), ZEROF()};
    for (int64_t c = 0; c < cols; c += W_STEP)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) sum[i] = FMA(LOADF(x + c + i * LANES), LOADF(x + c + i * LANES), sum[i]);
    const float norm = __builtin_sqrtf(SUMF(ADDF(sum[0], sum[1])));
    *step = norm / W_NORM;
    return norm > 0 ? W_NORM / norm : 0.0f;
}

/* Queries to [group][pair of columns][16 heads]; zeros beyond the last. */
static void lay_out_words(const ktl_attend_part *a, const ktl_words_room *r) {
    const int64_t pairs = a->cols / 2;
    memset(r->q, 0, (size_t)(ktl_ceil(a->heads, A_LANES) * A_LANES * pairs) * 4);
    memset(r->q_step, 0, (size_t)(ktl_ceil(a->heads, A_LANES) * A_LANES) * 4);
    for (int64_t h = 0; h < a->heads; h++) {
        const float *q = a->q + h * a->cols;
        const VF scale = SET1F(word_scale(q, a->cols, &r->q_step[h]));
        int32_t *to = r->q + h / A_LANES * A_LANES * pairs + h % A_LANES, line[LANES] KTL_ALIGNED;
        r->q_step[h] *= a->scale;
        for (int64_t c = 0; c < a->cols; c += W_STEP) {
            STOREI(line, LOW_HALVES(word_of(LOADF(q + c + LANES), scale), word_of(LOADF(q + c), scale)));
            for (int i = 0; i < LANES; i++) to[(c / 2 + i) * A_LANES] = line[i];
        }
    }
}

/* Two positions' keys to pairs of columns, and their values to pairs of the two. `second`: whether there is one. */
KTL_INLINE void two_to_words(const ktl_attend_part *a, const ktl_words_room *r, int64_t p, int second,
                             const float *far) {
    const int64_t pairs = a->cols / 2;
    const float *x[2] = {a->keys + p * a->stride, a->keys + (p + second) * a->stride};
    int32_t *key[2] = {r->keys + p * pairs, r->keys + (p + 1) * pairs}, *value = r->values + p / 2 * a->values;
    VF scale[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        for (int i = 0; i < W_LINES; i++) __builtin_prefetch(far + (j * W_LINES + i) * 16, 0, 2);
        scale[j] = SET1F(word_scale(x[j], a->cols, &r->key_step[p + j]));
    }
    if (!second) scale[1] = ZEROF(), r->key_step[p + 1] = 0;
    for (int64_t c = 0; c < a->cols; c += W_STEP) {
        VI w[2][2]; /* position, half */
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) w[j][i] = word_of(LOADF(x[j] + c + i * LANES), scale[j]);
            STOREI(key[j] + c / 2, LOW_HALVES(w[j][1], w[j][0]));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            if (c + i * LANES < a->values) STOREI(value + c + i * LANES, LOW_HALVES(w[1][i], w[0][i]));
    }
}

/* Scores of A_POSITIONS positions to w[position][head]. */
KTL_INLINE void word_scores(int64_t pairs, const int32_t *q, const float *q_step, const int32_t *key,
                            const float *key_step, const float *far, float *w) {
    VI s[A_POSITIONS][VN];
#pragma GCC unroll 16
    for (int p = 0; p < A_POSITIONS; p++)
#pragma GCC unroll 2
        for (int i = 0; i < VN; i++) s[p][i] = SET1I(0);
    for (int64_t c = 0; c < pairs; c++) {
        VI x[VN];
        if (far) __builtin_prefetch(far + 16 * c, 0, 2);
#pragma GCC unroll 2
        for (int i = 0; i < VN; i++) x[i] = LOADI(q + c * A_LANES + i * LANES);
#pragma GCC unroll 16
        for (int p = 0; p < A_POSITIONS; p++)
#pragma GCC unroll 2
            for (int i = 0; i < VN; i++) s[p][i] = ADD_PRODUCTS16_AT(s[p][i], x[i], key + p * pairs + c);
    }
#pragma GCC unroll 16
    for (int p = 0; p < A_POSITIONS; p++)
#pragma GCC unroll 2
        for (int i = 0; i < VN; i++)
            STOREF(w + p * A_LANES + i * LANES,
                   MULF(TO_FLOAT(s[p][i]), MULF(LOADF(q_step + i * LANES), SET1F(key_step[p]))));
}

/* A group's weights of a run, times the positions' steps, to [pair of positions][head]. */
static void weights_to_words(const float *w, const float *key_step, int64_t n, int32_t *to, float *step) {
    for (int i = 0; i < A_PARTS; i++) {
        parts_f total = {0}, top = {0}, scale;
        for (int64_t p = 0; p < n; p++) {
            const parts_f one = *(const parts_f *)(w + p * A_LANES + i * LANES) * key_step[p];
            total += one;
            top = (parts_f)LARGER(one, top);
        }
        for (int l = 0; l < LANES; l++) {
            const float by_sum = W_SUM / total[l], by_most = W_MOST / top[l];
            scale[l] = !(total[l] > 0) ? 0.0f : by_sum < by_most ? by_sum : by_most;
            step[i * LANES + l] = total[l] > 0 ? 1.0f / scale[l] : total[l];
        }
        for (int64_t p = 0; p < n; p += 2) {
            VI word[2] = {SET1I(0), SET1I(0)};
            for (int j = 0; j < 2 && p + j < n; j++)
                word[j] = word_of((VF)(*(const parts_f *)(w + (p + j) * A_LANES + i * LANES) * key_step[p + j]),
                                  (VF)scale);
            STOREI(to + p / 2 * A_LANES + i * LANES, LOW_HALVES(word[1], word[0]));
        }
    }
}

/* out (H rows of `values`) += what the weights of n pairs of positions give of N vectors of their values. */
KTL_INLINE void word_values(int H, int N, int64_t values, const int32_t *w, const float *step, const int32_t *value,
                            int64_t n, const float *far, float *out) {
    VI sum[A_HEADS][A_VECTORS];
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) sum[h][i] = SET1I(0);
    for (int64_t p = 0; p < n; p++, value += values, w += A_LANES) {
        VI v[A_VECTORS];
        if (far) __builtin_prefetch(far + 16 * p, 0, 2);
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) v[i] = LOADI(value + i * LANES);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const VI x = SET1I(w[h]);
#pragma GCC unroll 3
            for (int i = 0; i < N; i++) sum[h][i] = ADD_PRODUCTS16(sum[h][i], v[i], x);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 3
        for (int i = 0; i < N; i++) {
            float *to = out + h * values + i * LANES;
            STOREF(to, FMA(TO_FLOAT(sum[h][i]), SET1F(step[h]), LOADF(to)));
        }
}

/* N vectors of the values of a run, all heads; returns what is to be asked for next. */
KTL_INLINE const float *word_columns(int N, const ktl_attend_part *a, const ktl_words_room *r, int64_t pairs,
                                     const int32_t *value, int64_t v, const float *far) {
    for (int64_t h = 0; h < a->heads;) {
        const int32_t *w = r->weights + h / A_LANES * A_LANES * (W_RUN / 2) + h % A_LANES;
        float *out = a->out + h * a->values + v;
        if (h + A_HEADS > a->heads) {
            word_values(1, N, a->values, w, r->step + h, value, pairs, NULL, out);
            h++;
        } else {
            const float *asked = h < A_LANES ? far : NULL;
            word_values(A_HEADS, N, a->values, w, r->step + h, value, pairs, asked, out);
            if (asked) far += 16 * pairs;
            h += A_HEADS;
        }
    }
    return far;
}

static void attend_words(const ktl_attend_part *a) {
    const int64_t groups = ktl_ceil(a->heads, A_LANES), pairs = a->cols / 2;
    const ktl_words_room r = ktl_words_room_in(a->heads, a->cols, a->values, a->weights);
    const float *far = a->keys + W_AHEAD * a->stride;
    if (!a->laid) lay_out_words(a, &r);
    for (int64_t first = 0; first < a->n; first += A_POSITIONS) {
        for (int64_t p = first; p < first + A_POSITIONS; p += 2)
            if (p < a->n) {
                two_to_words(a, &r, p, p + 1 < a->n, far);
                far += 2 * W_LINES * 16;
            } else { /* nobody's: scores that are not looked at */
                memset(r.keys + p * pairs, 0, (size_t)pairs * 8);
                r.key_step[p] = r.key_step[p + 1] = 0;
            }
        for (int64_t g = 0; g < groups; g++) {
            const int32_t *q = r.q + g * A_LANES * pairs, *key = r.keys + first * pairs;
            float *w = r.scores + (g * KTL_WORD_POSITIONS + first) * A_LANES;
            if (pairs == W_PAIRS) /* addresses that are constants */
                word_scores(W_PAIRS, q, r.q_step + g * A_LANES, key, r.key_step + first, g ? NULL : far, w);
            else word_scores(pairs, q, r.q_step + g * A_LANES, key, r.key_step + first, g ? NULL : far, w);
        }
        far += 16 * pairs;
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * A_LANES, left = a->heads - first;
        softmax_group(r.scores + g * KTL_WORD_POSITIONS * A_LANES, a->n, left < A_LANES ? left : A_LANES,
                      a->most + first, a->total + first);
    }
    memset(a->out, 0, (size_t)(a->heads * a->values) * sizeof(float));
    for (int64_t first = 0; first < a->n; first += W_RUN) {
        const int64_t n = a->n - first < W_RUN ? a->n - first : W_RUN;
        const int32_t *value = r.values + first / 2 * a->values;
        for (int64_t g = 0; g < groups; g++)
            weights_to_words(r.scores + (g * KTL_WORD_POSITIONS + first) * A_LANES, r.key_step + first, n,
                             r.weights + g * A_LANES * (W_RUN / 2), r.step + g * A_LANES);
        int64_t v = 0;
        for (; v + A_VECTORS * LANES <= a->values; v += A_VECTORS * LANES)
            far = word_columns(A_VECTORS, a, &r, ktl_ceil(n, 2), value + v, v, far);
        for (; v < a->values; v += LANES) far = word_columns(1, a, &r, ktl_ceil(n, 2), value + v, v, far);
    }
}
