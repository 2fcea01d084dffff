/* Many queries of a head over the latent cache, on bf16 tiles. Keys and values are made of the latent,
 * a run of positions at a time, and lie as tiles that the next product reads as they are; the softmax
 * goes on from run to run. The causal half is not computed. */

enum {
    TILE = 512, /* numbers of a tile */
    PART = 32,  /* columns of an A tile, positions of a tile of values */
    ROWS_AHEAD = 8 /* a head's rows lie far apart in queries and result: nothing else fetches them */
};

KTL_INLINE void fetch_row(const float *row, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(row + i);
}

#define EACH_LANE(f, s)                                                                             \
    {f(s, 0), f(s, 1), f(s, 2),  f(s, 3),  f(s, 4),  f(s, 5),  f(s, 6),  f(s, 7),                   \
     f(s, 8), f(s, 9), f(s, 10), f(s, 11), f(s, 12), f(s, 13), f(s, 14), f(s, 15)}
#define FROM_UPPER(s, e) ((e) & (s) ? 16 + (e) - (s) : (e))
#define FROM_LOWER(s, e) ((e) & (s) ? 16 + (e) : (e) + (s))

/* line[i][j] and line[j][i] change places: halves, quarters, and so on. */
KTL_INLINE void transpose_lines(rows_u *line) {
    static const rows_i upper[4] = {EACH_LANE(FROM_UPPER, 8), EACH_LANE(FROM_UPPER, 4),
                                    EACH_LANE(FROM_UPPER, 2), EACH_LANE(FROM_UPPER, 1)},
                        lower[4] = {EACH_LANE(FROM_LOWER, 8), EACH_LANE(FROM_LOWER, 4),
                                    EACH_LANE(FROM_LOWER, 2), EACH_LANE(FROM_LOWER, 1)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int step = 8 >> k;
            if (i & step) continue;
            const rows_u a = line[i], b = line[i + step];
            line[i] = __builtin_shuffle(a, b, upper[k]);
            line[i + step] = __builtin_shuffle(a, b, lower[k]);
        }
}

/* Nearest, ties away from zero, as bf16_pair. */
KTL_INLINE void bf16_row(const float *x, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        to[i] = (uint16_t)((bits + 0x8000) >> 16);
    }
}

/* k_b of the head (rank x nope) as B tiles [column / 32][dimension / 16]; zeros beyond. */
static void key_weights(const uint16_t *k_b, const ktl_many *m, const ktl_many_sizes *z, uint16_t *to) {
    memset(to, 0, (size_t)(z->rank * z->nope) * 2);
    for (int64_t c = 0; c < m->rank; c++)
        for (int64_t n = 0; n < m->nope; n += 16) {
            const uint16_t *from = k_b + c * m->nope + n;
            uint16_t *line = to + ((c / PART) * (z->nope / 16) + n / 16) * TILE + c % PART / 2 * 32 + c % 2;
            const int64_t count = m->nope - n;
            if (count >= 16)
                for (int i = 0; i < 16; i++) line[2 * i] = from[i];
            else
                for (int64_t i = 0; i < count; i++) line[2 * i] = from[i];
        }
}

/* v_b of the head (values x rank) as B tiles [column / 32][value / 16]; zeros beyond. */
static void value_weights(const uint16_t *v_b, const ktl_many *m, const ktl_many_sizes *z, uint16_t *to) {
    for (int64_t v = 0; v < z->values; v += 16)
        for (int64_t c = 0; c < z->rank; c += PART) {
            rows_u line[16];
            memset(line, 0, sizeof line);
            const int64_t count = m->rank - c < PART ? m->rank - c : PART;
            for (int64_t i = 0; i < 16 && v + i < m->values; i++)
                memcpy(&line[i], v_b + (v + i) * m->rank + c, (size_t)count * 2);
            transpose_lines(line);
            memcpy(to + (c / PART * (z->values / 16) + v / 16) * TILE, line, sizeof line);
        }
}

/* 16 positions' rows of 32 dimensions to a B tile of the scores: [dimension / 2][position][2]. */
KTL_INLINE void key_tile(const float *rows, uint16_t *tile) {
    rows_u line[16];
    for (int i = 0; i < 16; i++) {
        uint16_t row[PART];
        bf16_row(rows + i * PART, PART, row);
        memcpy(&line[i], row, sizeof row);
    }
    transpose_lines(line);
    memcpy(tile, line, sizeof line);
}

/* 16 positions (`latent`: their rows) times two B tiles of weights a 32 columns, to rows of 32 floats. */
KTL_INLINE void made_of(const uint16_t *latent, int64_t rank, const uint16_t *weights, int64_t step,
                        float *rows) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    for (int64_t c = 0; c < rank; c += PART, weights += step)
        TWO_PRODUCTS(latent + c, rank * 2, weights, weights + TILE, TILE_DOT_BF16, (void)0);
    TILE_STORE(0, rows, PART * sizeof(float));
    TILE_STORE(1, rows + 16, PART * sizeof(float));
}

/* Keys and values of `n` positions from `from` on, n rounded up to 32. */
static void keys_and_values(const ktl_many_head *h, const ktl_many_sizes *z, const ktl_many_room *r,
                            int64_t from, int64_t n) {
    const ktl_many *m = h->m;
    float rows[16 * PART] KTL_ALIGNED;
    const int64_t parts = z->dims / PART, vectors = z->values / 16;
    for (int64_t d = 0; d < z->nope; d += PART)
        for (int64_t s = 0; s < n; s += 16) {
            made_of(h->latent + (from + s) * z->rank, z->rank, r->k_b + d / 16 * TILE,
                    z->nope / 16 * TILE, rows);
            key_tile(rows, r->keys + (s / 16 * parts + d / PART) * TILE);
        }
    for (int64_t d = 0; z->nope + d < z->dims; d += PART)
        for (int64_t s = 0; s < n; s += 16) {
            memset(rows, 0, sizeof rows);
            const int64_t count = m->rope - d < PART ? m->rope - d : PART;
            for (int64_t i = 0; i < 16 && from + s + i < m->positions; i++)
                memcpy(rows + i * PART, m->keys + (from + s + i) * m->keys_stride + m->rank + d,
                       (size_t)count * sizeof(float));
            key_tile(rows, r->keys + (s / 16 * parts + (z->nope + d) / PART) * TILE);
        }
    for (int64_t v = 0; v < z->values; v += PART)
        for (int64_t s = 0; s < n; s += 16) {
            made_of(h->latent + (from + s) * z->rank, z->rank, r->v_b + v / 16 * TILE,
                    vectors * TILE, rows);
            rows_u *to = (rows_u *)(r->values + (s / PART * vectors + v / 16) * TILE) + s % PART / 2;
            const rows_f *row = (const rows_f *)rows;
            for (int i = 0; i < 8; i++, row += 4, to++) {
                to[0] = bf16_pair(row[0], row[2]);
                to[TILE / 32] = bf16_pair(row[1], row[3]);
            }
        }
}

/* Scores of n positions to weights exp(score - most) in bfloat16, zeros up to `padded`; most and total
 * go on from the runs before. Returns by how much what was summed before shrinks. */
static float softmax_on(float *w, int64_t n, int64_t padded, float *most, float *total, uint16_t *to) {
    float tops[16], sums[16] = {0}, top = *most, sum = 0;
    for (int i = 0; i < 16; i++) tops[i] = top;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) tops[j] = w[i + j] > tops[j] ? w[i + j] : tops[j];
    for (; i < n; i++) top = w[i] > top ? w[i] : top;
    for (int j = 0; j < 16; j++) top = tops[j] > top ? tops[j] : top;
    for (i = 0; i < n; i++) w[i] = ktl_exp(w[i] - top);
    for (; i < padded; i++) w[i] = 0;
    for (i = 0; i < padded; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += w[i + j];
    for (int j = 0; j < 16; j++) sum += sums[j];
    bf16_row(w, padded, to);
    const float factor = ktl_exp(*most - top);
    *total = *total * factor + sum;
    *most = top;
    return factor;
}

/* 16 tokens from `token` on against the run of positions [from, from + n). */
static void sixteen_tokens(const ktl_many *m, const ktl_many_sizes *z, const ktl_many_room *r,
                           int64_t token, int64_t from, int64_t n) {
    const int64_t first = m->positions - m->tokens, parts = z->dims / PART, vectors = z->values / 16;
    const int64_t last = token + 16 < m->tokens ? token + 16 : m->tokens;
    const int64_t seen = first + last - from < n ? first + last - from : n;
    if (seen <= 0) return;
    const int64_t padded = ktl_ceil(seen, PART) * PART;
    const uint16_t *q = r->q + token * z->dims;
    for (int64_t s = 0; s < padded; s += 32) {
        const uint16_t *keys = r->keys + s / 16 * parts * TILE;
        TILE_ZERO(0);
        TILE_ZERO(1);
        for (int64_t d = 0; d < parts; d++)
            TWO_PRODUCTS(q + d * PART, z->dims * 2, keys + d * TILE, keys + (parts + d) * TILE,
                         TILE_DOT_BF16, (void)0);
        TILE_STORE(0, r->scores + s, KTL_MANY_ROW * sizeof(float));
        TILE_STORE(1, r->scores + s + 16, KTL_MANY_ROW * sizeof(float));
    }
    float *out = r->out + token * z->values;
    for (int64_t i = 0; i < 16; i++) {
        const int64_t own = first + token + i + 1 - from;
        float *scores = r->scores + i * KTL_MANY_ROW;
        uint16_t *weights = r->weights + i * KTL_MANY_ROW;
        if (token + i >= last || own <= 0) {
            memset(weights, 0, (size_t)padded * 2);
            continue;
        }
        const float factor = softmax_on(scores, own < seen ? own : seen, padded, r->most + token + i,
                                        r->total + token + i, weights);
        if (from) ktl_scale_row(out + i * z->values, factor, z->values);
    }
    for (int64_t v = 0; v < z->values; v += PART) {
        TILE_LOAD(0, out + v, z->values * sizeof(float));
        TILE_LOAD(1, out + v + 16, z->values * sizeof(float));
        for (int64_t s = 0; s < padded; s += PART) {
            const uint16_t *values = r->values + (s / PART * vectors + v / 16) * TILE;
            TWO_PRODUCTS(r->weights + s, KTL_MANY_ROW * 2, values, values + TILE, TILE_DOT_BF16, (void)0);
        }
        TILE_STORE(0, out + v, z->values * sizeof(float));
        TILE_STORE(1, out + v + 16, z->values * sizeof(float));
    }
}

static void bf16_attend_many(const ktl_many_head *h) {
    const ktl_many *m = h->m;
    const ktl_many_sizes z = ktl_many_sizes_of(m);
    const ktl_many_room r = ktl_many_room_in(&z, h->scratch);
    tile_config config = config_for(16, 64);
    key_weights(m->k_b + h->head * m->rank * m->nope, m, &z, r.k_b);
    value_weights(m->v_b + h->head * m->rank * m->values, m, &z, r.v_b);
    memset(r.q, 0, (size_t)(z.tokens * z.dims) * 2);
    memset(r.out, 0, (size_t)(z.tokens * z.values) * sizeof(float));
    for (int64_t t = 0; t < m->tokens; t++) {
        const float *nope = m->q + t * m->q_token + h->head * m->q_head;
        const float *rope = m->q_rope + t * m->rope_token + h->head * m->rope_head;
        uint16_t *q = r.q + t * z.dims;
        if (t + ROWS_AHEAD < m->tokens) {
            fetch_row(nope + ROWS_AHEAD * m->q_token, m->nope);
            fetch_row(rope + ROWS_AHEAD * m->rope_token, m->rope);
        }
        for (int64_t i = 0; i < m->nope; i++) q[i] = ktl_to_bf16(nope[i] * m->scale);
        for (int64_t i = 0; i < m->rope; i++) q[z.nope + i] = ktl_to_bf16(rope[i] * m->scale);
        r.most[t] = -3.4028235e38f;
        r.total[t] = 0;
    }
    TILE_CONFIG(&config);
    for (int64_t from = 0; from < m->positions; from += KTL_MANY_RUN) {
        const int64_t left = m->positions - from, n = left < KTL_MANY_RUN ? left : KTL_MANY_RUN;
        keys_and_values(h, &z, &r, from, ktl_ceil(n, PART) * PART);
        for (int64_t t = 0; t < m->tokens; t += 16) sixteen_tokens(m, &z, &r, t, from, n);
    }
    TILE_RELEASE();
    for (int64_t t = 0; t < m->tokens; t++) {
        const float share = 1.0f / r.total[t], *out = r.out + t * z.values;
        float *y = m->y + (t * m->heads + h->head) * m->values;
        if (t + ROWS_AHEAD < m->tokens) fetch_row(y + ROWS_AHEAD * m->heads * m->values, m->values);
        for (int64_t v = 0; v < m->values; v++) y[v] = out[v] * share;
    }
}

/* ---- one query a head: attend.c's part of the positions ------------------------------------------------ */
enum { MIXED = 128 /* positions whose values are tiles at a time */ };

/* 16 rows of a run of positions, as many as there are, to bf16 tiles of all columns. Rows are read in the
 * order of memory, and those of the next two calls fetched; `rows`: room for 16. */
static void key_tiles(const ktl_attend_part *a, int64_t first, int64_t cols, uint16_t *rows,
                      uint16_t *tiles) {
    for (int64_t i = 0; i < 16; i++) {
        const float *key = a->keys + (first + i) * a->stride;
        uint16_t *row = rows + i * cols;
        const int64_t count = first + i < a->n ? a->cols : 0;
        const uint8_t *far = (const uint8_t *)(key + 32 * a->stride);
        for (int64_t c = 0; c < count; c += 16, far = ktl_later(far + 64)) __builtin_prefetch(far, 0, 2);
        bf16_row(key, count, row);
        memset(row + count, 0, (size_t)(cols - count) * 2);
    }
    for (int64_t c = 0; c < cols; c += PART) {
        rows_u line[16];
        for (int i = 0; i < 16; i++) memcpy(&line[i], rows + i * cols + c, sizeof line[i]);
        transpose_lines(line);
        memcpy(tiles + c / PART * TILE, line, sizeof line);
    }
}

/* Values of 32 positions from `first` on to tiles; zeros beyond the last. */
static void value_tiles(const ktl_attend_part *a, int64_t first, int64_t values, uint16_t *tiles) {
    for (int i = 0; i < 16; i++) {
        const int64_t s = first + 2 * i;
        const float *even = a->keys + s * a->stride, *odd = even + a->stride;
        for (int64_t v = 0; v < values; v += 16) {
            rows_u *line = (rows_u *)(tiles + v / 16 * TILE) + i;
            const int64_t count = a->values - v;
            if (count >= 16 && s + 1 < a->n) {
                *line = bf16_pair(*(const rows_f *)(even + v), *(const rows_f *)(odd + v));
                continue;
            }
            rows_f low = {0}, high = {0};
            const size_t bytes = (size_t)(count < 16 ? count : 16) * sizeof(float);
            if (count > 0 && s < a->n) memcpy(&low, even + v, bytes);
            if (count > 0 && s + 1 < a->n) memcpy(&high, odd + v, bytes);
            *line = bf16_pair(low, high);
        }
    }
}

static void bf16_attend(const ktl_attend_part *a) {
    const ktl_tiled_sizes z = ktl_tiled_sizes_of(a->heads, a->cols, a->values);
    const ktl_tiled_room r = ktl_tiled_room_in(&z, a->weights);
    const int64_t parts = z.cols / PART, vectors = z.values / 16, padded = ktl_ceil(a->n, PART) * PART;
    tile_config config = config_for(16, 64);
    memset(r.q, 0, (size_t)(z.heads * z.cols) * 2);
    memset(r.out, 0, (size_t)(z.heads * z.values) * sizeof(float));
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t c = 0; c < a->cols; c++)
            r.q[h * z.cols + c] = ktl_to_bf16(a->q[h * a->cols + c] * a->scale);
    TILE_CONFIG(&config);
    for (int64_t s = 0; s < padded; s += 32) {
        key_tiles(a, s, z.cols, r.rows, r.tiles);
        key_tiles(a, s + 16, z.cols, r.rows, r.tiles + parts * TILE);
        for (int64_t h = 0; h < z.heads; h += 16) {
            TILE_ZERO(0);
            TILE_ZERO(1);
            for (int64_t c = 0; c < parts; c++)
                TWO_PRODUCTS(r.q + h * z.cols + c * PART, z.cols * 2, r.tiles + c * TILE,
                             r.tiles + (parts + c) * TILE, TILE_DOT_BF16, (void)0);
            TILE_STORE(0, r.scores + h * KTL_MANY_ROW + s, KTL_MANY_ROW * sizeof(float));
            TILE_STORE(1, r.scores + h * KTL_MANY_ROW + s + 16, KTL_MANY_ROW * sizeof(float));
        }
    }
    memset(r.weights, 0, (size_t)(z.heads * KTL_MANY_ROW) * 2);
    for (int64_t h = 0; h < a->heads; h++) {
        a->most[h] = -3.4028235e38f;
        a->total[h] = 0;
        softmax_on(r.scores + h * KTL_MANY_ROW, a->n, padded, a->most + h, a->total + h,
                   r.weights + h * KTL_MANY_ROW);
    }
    for (int64_t first = 0; first < padded; first += MIXED) {
        const int64_t steps = (padded - first < MIXED ? padded - first : MIXED) / PART;
        for (int64_t i = 0; i < steps; i++)
            value_tiles(a, first + i * PART, z.values, r.tiles + i * vectors * TILE);
        for (int64_t h = 0; h < z.heads; h += 16)
            for (int64_t v = 0; v < z.values; v += PART) {
                float *out = r.out + h * z.values + v;
                TILE_LOAD(0, out, z.values * sizeof(float));
                TILE_LOAD(1, out + 16, z.values * sizeof(float));
                for (int64_t i = 0; i < steps; i++) {
                    const uint16_t *tile = r.tiles + (i * vectors + v / 16) * TILE;
                    TWO_PRODUCTS(r.weights + h * KTL_MANY_ROW + first + i * PART, KTL_MANY_ROW * 2, tile,
                                 tile + TILE, TILE_DOT_BF16, (void)0);
                }
                TILE_STORE(0, out, z.values * sizeof(float));
                TILE_STORE(1, out + 16, z.values * sizeof(float));
            }
    }
    TILE_RELEASE();
    for (int64_t h = 0; h < a->heads; h++)
        memcpy(a->out + h * a->values, r.out + h * z.values, (size_t)a->values * sizeof(float));
}
