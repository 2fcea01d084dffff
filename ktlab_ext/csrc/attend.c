/* Attention of one token over a cache that all heads share (absorbed MLA): softmax(q K^T) V.
 *
 * The positions are cut into parts, one a task, and a part into blocks that stay in L2 between their
 * scores and their values. A block's result is its own softmax with the largest score and the sum that
 * it divided by; results are put together in their order. What is cut depends on the positions alone,
 * so the bits do not depend on the number of threads. */
#include "arithmetic.h"

enum {
    MOST_PARTS = 16,
    LEAST_POSITIONS = 64,
    BLOCK = KTL_WORD_POSITIONS,
    /* From so many on, products of 16 bits pay for making words or tiles of keys and values. */
    SHORT_HEADS = 8,
    SHORT_POSITIONS = 512,
    SLOT_PARTS = 0,
    SMALL_WORK = 1 << 16
};

typedef struct {
    ktl_pool *pool;
    const ktl_kernels *kernels;
    const float *q, *keys;
    int64_t heads, cols, values, stride, positions, part;
    enum { FLOATS, WORDS, TILES } as;
    int64_t block; /* positions at a time */
    float scale;
    float *parts, *most, *total; /* [part][head][value]; [part][head] */
    float *y;
} attend_work;

/* out = out * old + add * more, by the instruction set at hand; `add` is spent. */
static void add_scaled(const ktl_kernels *kernels, float *out, float old, float *add, float more, int64_t count) {
    if (old != 1.0f) kernels->scale_row(out, old, count);
    if (more != 1.0f) kernels->scale_row(add, more, count);
    kernels->add_row(out, add, count);
}

/* One more block's result to those before it. */
static void join(const ktl_kernels *kernels, const ktl_attend_part *to, const ktl_attend_part *from) {
    for (int64_t h = 0; h < to->heads; h++) {
        const float most = from->most[h] > to->most[h] ? from->most[h] : to->most[h];
        const float old = ktl_exp(to->most[h] - most), more = ktl_exp(from->most[h] - most);
        add_scaled(kernels, to->out + h * to->values, old, from->out + h * to->values, more, to->values);
        to->total[h] = to->total[h] * old + from->total[h] * more;
        to->most[h] = most;
    }
}

/* Floats of a kernel's scratch, then of a block's result. */
static size_t kernel_floats(const attend_work *w) {
    const ktl_tiled_sizes tiled = ktl_tiled_sizes_of(w->heads, w->cols, w->values);
    switch (w->as) {
        case TILES: return ktl_tiled_floats(&tiled);
        case WORDS: return ktl_words_floats(w->heads, w->cols, w->values);
        default: return ktl_attend_floats(w->heads, w->cols, BLOCK);
    }
}

static size_t block_floats(const attend_work *w) {
    return kernel_floats(w) + (size_t)(w->heads * (w->values + 2));
}

static void attend_part(void *context, int64_t part, int worker) {
    attend_work *w = context;
    const int64_t first = part * w->part, rest = w->positions - first;
    const int64_t end = first + (rest < w->part ? rest : w->part), each = w->heads * w->values;
    float *scratch = ktl_pool_scratch(w->pool, worker, 0);
    ktl_attend_part all = {
        .q = w->q, .heads = w->heads, .cols = w->cols, .values = w->values, .stride = w->stride,
        .scale = w->scale, .weights = scratch, .out = w->parts + part * each,
        .most = w->most + part * w->heads, .total = w->total + part * w->heads};
    ktl_attend_part block = all;
    block.out = scratch + kernel_floats(w);
    block.most = block.out + each;
    block.total = block.most + w->heads;
    for (int64_t at = first; at < end; at += w->block) {
        ktl_attend_part *here = at == first ? &all : &block;
        here->keys = w->keys + at * w->stride;
        here->n = end - at < w->block ? end - at : w->block;
        here->laid = at > first;
        if (w->as == WORDS) w->kernels->attend_words(here);
        else w->kernels->attend(here);
        if (here == &block) join(w->kernels, &all, &block);
    }
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
        total += factor * w->total[p * w->heads + head];
        add_scaled(w->kernels, y, 1.0f, w->parts + (p * w->heads + head) * w->values, factor, w->values);
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
    const int many = heads >= SHORT_HEADS && positions >= SHORT_POSITIONS, tiles = many && ktl_attends_many(isa);
    attend_work w = {.pool = pool, .kernels = ktl_kernels_of(isa, !tiles), .q = q, .keys = keys,
                     .block = tiles ? KTL_MANY_RUN : BLOCK, .heads = heads, .cols = cols,
                     .values = values, .stride = stride, .positions = positions, .part = part,
                     .scale = scale, .y = y};
    const int fits = cols % KTL_WORD_COLS == 0 && values % KTL_WORD_VALUES == 0;
    w.as = tiles ? TILES : many && fits && w.kernels->attend_words ? WORDS : FLOATS;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    w.parts = ktl_pool_scratch(pool, ktl_pool_threads(pool) + SLOT_PARTS,
                               (size_t)(parts * heads * (values + 2)) * sizeof(float));
    if (!w.parts) error = KTL_ERR_MEMORY;
    for (int i = 0; i < ktl_pool_threads(pool) && !error; i++)
        if (!ktl_pool_scratch(pool, i, block_floats(&w) * sizeof(float))) error = KTL_ERR_MEMORY;
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
