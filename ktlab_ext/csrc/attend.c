/* Attention of one token over a cache that all heads share (absorbed MLA): softmax(q K^T) V.
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
