/* What decoding does between its matrices: attention of one token, and all of latent attention in one
 * call.
 *
 * Attention of one token over a cache that all heads share (absorbed MLA): softmax(q K^T) V.
 *
 * The positions are cut into parts, one a task; a part's result is its own softmax with the largest
 * score and the sum that it divided by, and parts are put together in their order. The number of
 * parts depends on the positions alone, so the bits do not depend on the number of threads. */
#include "arithmetic.h"

#include <math.h>

enum { MOST_PARTS = 16, LEAST_POSITIONS = 64, SLOT_PARTS = 0, SMALL_WORK = 1 << 16 };

typedef struct {
    ktl_pool *pool;
    const ktl_kernels *kernels;
    const float *q, *keys;
    int64_t heads, cols, values, stride, positions, part;
    float scale;
    float *parts, *most, *total; /* [part][head][value]; [part][head] */
    float *y;
} attend_work;

static void attend_part(void *context, int64_t part, int worker) {
    attend_work *w = context;
    const int64_t first = part * w->part, rest = w->positions - first;
    const ktl_attend_part a = {
        .q = w->q, .keys = w->keys + first * w->stride, .heads = w->heads, .cols = w->cols,
        .values = w->values, .stride = w->stride, .n = rest < w->part ? rest : w->part,
        .scale = w->scale, .weights = ktl_pool_scratch(w->pool, worker, 0),
        .out = w->parts + part * w->heads * w->values, .most = w->most + part * w->heads,
        .total = w->total + part * w->heads};
    w->kernels->attend(&a);
}

static void put_together(void *context, int64_t head, int worker) {
    attend_work *w = context;
    (void)worker;
    const int64_t parts = ktl_ceil(w->positions, w->part);
    float most = w->most[head], total = 0, *y = w->y + head * w->values;
    for (int64_t p = 1; p < parts; p++) {
        const float m = w->most[p * w->heads + head];
        most = m > most ? m : most;
    }
    memset(y, 0, (size_t)w->values * sizeof(float));
    for (int64_t p = 0; p < parts; p++) {
        const float factor = ktl_exp(w->most[p * w->heads + head] - most);
        const float *part = w->parts + (p * w->heads + head) * w->values;
        total += factor * w->total[p * w->heads + head];
        for (int64_t v = 0; v < w->values; v++) y[v] += factor * part[v];
    }
    w->kernels->scale_row(y, 1.0f / total, w->values);
}

static void rms_norm(const float *x, const float *weight, int64_t cols, float eps, float *y) {
    float sums[16] = {0}, total = 0;
    const int64_t whole = cols / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    for (int64_t i = whole; i < cols; i++) sums[i - whole] += x[i] * x[i];
    for (int j = 0; j < 16; j++) total += sums[j];
    const float scale = 1.0f / sqrtf(total / (float)cols + eps);
    for (int64_t i = 0; i < cols; i++) y[i] = x[i] * scale * weight[i];
}

int ktl_attend(ktl_pool *pool, int isa, const float *q, int64_t heads, int64_t cols,
               const float *keys, int64_t positions, int64_t stride, int64_t values, float scale,
               float *y) {
    if (isa < 0 || isa >= KTL_ISAS || *ktl_isa_reason(isa)) return KTL_ERR_ISA;
    if (heads < 1 || cols < 1 || positions < 1 || values < 1 || values > cols) return KTL_ERR_SHAPE;
    const int64_t part = ktl_ceil(ktl_ceil(positions, MOST_PARTS), LEAST_POSITIONS) * LEAST_POSITIONS;
    const int64_t parts = ktl_ceil(positions, part);
    attend_work w = {.pool = pool, .kernels = ktl_kernels_of(isa, 1), .q = q, .keys = keys,
                     .heads = heads, .cols = cols, .values = values, .stride = stride,
                     .positions = positions, .part = part, .scale = scale, .y = y};
    int error = KTL_OK;
    ktl_pool_lock(pool);
    w.parts = ktl_pool_scratch(pool, ktl_pool_threads(pool) + SLOT_PARTS,
                               (size_t)(parts * heads * (values + 2)) * sizeof(float));
    if (!w.parts) error = KTL_ERR_MEMORY;
    for (int i = 0; i < ktl_pool_threads(pool) && !error; i++)
        if (!ktl_pool_scratch(pool, i, (size_t)(heads * part) * sizeof(float))) error = KTL_ERR_MEMORY;
    if (!error) {
        w.most = w.parts + parts * heads * values;
        w.total = w.most + parts * heads;
        if (heads * positions * cols < SMALL_WORK) {
            for (int64_t p = 0; p < parts; p++) attend_part(&w, p, 0);
            for (int64_t h = 0; h < heads; h++) put_together(&w, h, 0);
        } else {
            ktl_pool_run(pool, attend_part, &w, parts);
            ktl_pool_run(pool, put_together, &w, heads);
        }
    }
    ktl_pool_unlock(pool);
    return error;
}

/* ---- latent attention of one token ----------------------------------------------------------------- */
enum { SLOT_TOKEN = 6 }; /* linear and attend use the first */

static void rotate(const ktl_mla *m, int64_t size, const float *x, float *y) {
    const int64_t pairs = size / 2;
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t a = m->halves ? i : 2 * i, b = m->halves ? i + pairs : 2 * i + 1;
        const float c = m->turns[2 * i], s = m->turns[2 * i + 1];
        y[a] = x[a] * c - x[b] * s;
        y[b] = x[a] * s + x[b] * c;
    }
}

static int row_times(ktl_pool *pool, int isa, const ktl_matrix *w, const float *x, float *y) {
    return ktl_linear(pool, isa, 1, w, 0, 1, x, KTL_X_F32, 1, w->cols, 0, y, w->rows, 0);
}

static int heads_times(ktl_pool *pool, int isa, const ktl_matrix *w, const float *x, int64_t x_head,
                       float *y, int64_t y_head) {
    return ktl_linear(pool, isa, 1, w, 0, w->experts, x, KTL_X_F32, 1, 0, x_head, y, 0, y_head);
}

int ktl_mla_token(ktl_pool *pool, int isa, const ktl_mla *m, const float *x, float *keys,
                  int64_t positions, int64_t stride, float *q, float *y) {
    const int64_t heads = m->k_b->experts, rank = m->k_b->rows, nope = m->k_b->cols;
    const int64_t rope = m->kv_a->rows - rank, compressed = m->q_a ? m->q_a->rows : 0;
    const int64_t width = rank + rope, values = m->v_b->rows;
    if (positions < 1 || rope < 0 || rope % 2 || m->q_b->rows != heads * (nope + rope) ||
        m->v_b->experts != heads || m->v_b->cols != rank || m->output->cols != heads * values ||
        m->q_b->cols != (m->q_a ? compressed : m->kv_a->cols) ||
        (m->q_a && m->q_a->cols != m->kv_a->cols))
        return KTL_ERR_SHAPE;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    float *c = ktl_pool_scratch(pool, ktl_pool_threads(pool) + SLOT_TOKEN,
                                (size_t)(compressed + width + heads * (width + rank + values)) * 4);
    if (!c) error = KTL_ERR_MEMORY;
    float *kv = c + compressed, *turned = kv + width, *mixed = turned + heads * width;
    float *out = mixed + heads * rank, *key = keys + (positions - 1) * stride;
    if (!error && m->q_a) {
        error = row_times(pool, isa, m->q_a, x, c);
        if (!error) rms_norm(c, m->q_a_norm, compressed, m->eps, c);
    }
    if (!error) error = row_times(pool, isa, m->q_b, m->q_a ? c : x, q);
    if (!error) error = row_times(pool, isa, m->kv_a, x, kv);
    if (!error) error = heads_times(pool, isa, m->k_b, q, nope + rope, turned, width);
    if (!error) {
        rms_norm(kv, m->kv_a_norm, rank, m->eps, key);
        rotate(m, rope, kv + rank, key + rank);
        for (int64_t h = 0; h < heads; h++)
            rotate(m, rope, q + h * (nope + rope) + nope, turned + h * width + rank);
        error = ktl_attend(pool, isa, turned, heads, width, keys, positions, stride, rank, m->scale,
                           mixed);
    }
    if (!error) error = heads_times(pool, isa, m->v_b, mixed, rank, out, values);
    if (!error) error = row_times(pool, isa, m->output, out, y);
    ktl_pool_unlock(pool);
    return error;
}
