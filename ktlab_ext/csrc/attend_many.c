/* Attention of many tokens over the latent cache: a task for each head. */
#include "internal.h"

enum { SLOT_LATENT = 0 };

typedef struct {
    ktl_pool *pool;
    const ktl_kernels *kernels;
    const ktl_many *m;
    ktl_many_sizes sizes;
    uint16_t *latent;
} many_work;

/* One position's latent, which all heads read. */
static void round_latent(void *context, int64_t position, int worker) {
    many_work *w = context;
    (void)worker;
    uint16_t *to = w->latent + position * w->sizes.rank;
    const int64_t rank = position < w->m->positions ? w->m->rank : 0;
    const float *from = w->m->keys + position * w->m->keys_stride;
    for (int64_t c = 0; c < rank; c++) to[c] = ktl_to_bf16(from[c]);
    memset(to + rank, 0, (size_t)(w->sizes.rank - rank) * 2);
}

static void head(void *context, int64_t head, int worker) {
    many_work *w = context;
    const ktl_many_head h = {w->m, head, w->latent, ktl_pool_scratch(w->pool, worker, 0)};
    w->kernels->attend_many(&h);
}

int ktl_attends_many(int isa) {
    return isa >= 0 && isa < KTL_ISAS && ktl_kernels_of(isa, 0)->attend_many != NULL;
}

int ktl_attend_many(ktl_pool *pool, int isa, const ktl_many *m) {
    if (isa < 0 || isa >= KTL_ISAS || *ktl_isa_reason(isa) || !ktl_attends_many(isa)) return KTL_ERR_ISA;
    if (m->tokens < 1 || m->positions < m->tokens || m->heads < 1 || m->rank < 1 || m->nope < 1 ||
        m->rope < 0 || m->values < 1)
        return KTL_ERR_SHAPE;
    many_work w = {pool, ktl_kernels_of(isa, 0), m, ktl_many_sizes_of(m), NULL};
    const int64_t rows = ktl_ceil(m->positions, 32) * 32;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    w.latent = ktl_pool_scratch(pool, ktl_pool_threads(pool) + SLOT_LATENT,
                                (size_t)(rows * w.sizes.rank) * 2);
    if (!w.latent) error = KTL_ERR_MEMORY;
    for (int i = 0; i < ktl_pool_threads(pool) && !error; i++)
        if (!ktl_pool_scratch(pool, i, ktl_many_bytes(&w.sizes))) error = KTL_ERR_MEMORY;
    if (!error) {
        ktl_pool_run(pool, round_latent, &w, rows);
        ktl_pool_run(pool, head, &w, m->heads);
    }
    ktl_pool_unlock(pool);
    return error;
}
