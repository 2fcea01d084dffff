/* moe: tokens grouped by expert; gate and up, SwiGLU, down, each cut into tasks. As in linear.c every sum is
 * formed by one task in a fixed order. */
#include "tasks.h"

typedef struct {
    int64_t expert, first, n; /* slots [first, first + n) */
    way way;
} group;

typedef struct {
    ktl_pool *pool;
    const ktl_kernels *kernels[WAYS];
    const ktl_matrix *gate, *up, *down;
    const void *x;
    int x_type;
    int64_t tokens, x_stride, y_stride, slots, groups, inner_rows, outer_rows;
    float *y;
    group *group;
    int32_t *token;  /* of a slot */
    int32_t *group_of; /* of a slot */
    float *weight;   /* of a slot */
    acts list[LISTS], gathered[LISTS]; /* rows are tokens; slots in expert order */
    int lists, gather;
    int inner_acts[WAYS][2]; /* [way][gate, up], index into list */
    float *hidden;           /* [slot][F] */
    acts hidden_acts[WAYS];
} moe_work;

/* Slots in expert order, tokens ascending within an expert; a token that names an expert twice
 * gets one slot with the summed weight. Returns KTL_ERR_* or KTL_OK. */
static int moe_group(moe_work *m, const int64_t *ids, const float *weights, int64_t top_k, int isa,
                     int few) {
    const int64_t experts = m->gate->experts, all = m->tokens * top_k;
    const size_t bytes = (size_t)(experts + 1) * (sizeof(int64_t) + sizeof(group)) +
                         (size_t)all * (2 * sizeof(int32_t) + sizeof(float)) + 64;
    int64_t *next = ktl_pool_scratch(m->pool, ktl_pool_threads(m->pool) + SLOT_GROUPS, bytes);
    if (!next) return KTL_ERR_MEMORY;
    m->group = (group *)(next + experts + 1);
    m->token = (int32_t *)(m->group + experts + 1);
    m->group_of = m->token + all;
    m->weight = (float *)(m->group_of + all);
    memset(next, 0, (size_t)(experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < all; i++) {
        int repeated = 0;
        for (int64_t j = i - i % top_k; j < i; j++) repeated |= ids[j] == ids[i];
        if (ids[i] >= 0 && !repeated) next[ids[i] + 1]++;
    }
    m->groups = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t n = next[e + 1];
        if (n) m->group[m->groups++] = (group){e, next[e], n, way_of(isa, few, n)};
        next[e + 1] += next[e];
    }
    m->slots = next[experts];
    for (int64_t i = 0; i < all; i++) {
        if (ids[i] < 0) continue;
        int64_t *place = &next[ids[i]], t = i / top_k, j = i - i % top_k;
        while (ids[j] != ids[i]) j++;
        if (j < i) { /* seen before in this token: its slot is the last one placed */
            m->weight[*place - 1] += weights[i];
            continue;
        }
        m->token[*place] = (int32_t)t;
        m->weight[*place] = weights[i];
        ++*place;
    }
    for (int64_t g = 0; g < m->groups; g++)
        for (int64_t i = 0; i < m->group[g].n; i++) m->group_of[m->group[g].first + i] = (int32_t)g;
    return KTL_OK;
}

/* Index of the prepared activations that this kernel wants for x; shared where the key is. */
static int moe_acts(moe_work *m, way w, const ktl_matrix *matrix) {
    acts a = {key_of(m->kernels[w], w, matrix, 0, 2), m->kernels[w], NULL, 0, 0};
    for (int i = 0; i < m->lists; i++)
        if (!memcmp(&m->list[i].key, &a.key, sizeof a.key)) return i;
    int error = acts_alloc(m->pool, SLOT_ACTS + m->lists, &a, m->tokens, m->gate->cols);
    m->list[m->lists] = m->gathered[m->lists] = a;
    m->gathered[m->lists].base = NULL;
    return error ? error : m->lists++;
}

static void moe_prepare(void *context, int64_t token, int worker) {
    moe_work *m = context;
    (void)worker;
    for (int i = 0; i < m->lists; i++)
        acts_fill(&m->list[i], token, x_row(m->x, m->x_type, m->x_stride, token), m->x_type,
                  m->gate->cols);
}

/* An expert's tokens one after the other: the inner loops of many tokens read them again and again. */
static void moe_gather(void *context, int64_t slot, int worker) {
    moe_work *m = context;
    const group *g = &m->group[m->group_of[slot]];
    (void)worker;
    if (g->way == FUSED) return;
    for (int i = 0; i < m->lists; i++) {
        const acts *from = &m->list[i], *to = &m->gathered[i];
        if (i != m->inner_acts[g->way][0] && i != m->inner_acts[g->way][1]) continue;
        const size_t bytes = ktl_act_bytes(from->key.kind);
        for (int64_t c = 0; c < chunks_of(m->gate->cols); c++)
            for (int term = 0; term < from->key.terms; term++)
                memcpy(to->base + c * to->chunk_bytes + term * to->term_bytes + (size_t)slot * bytes,
                       from->base + c * from->chunk_bytes + term * from->term_bytes +
                           (size_t)m->token[slot] * bytes,
                       bytes);
    }
}

/* A task's rows of gate or up. */
static part_of moe_inner_part(const moe_work *m, int64_t task, const ktl_matrix *matrix) {
    const int64_t size = m->inner_rows, blocks = ktl_ceil(matrix->rows, size), row = task % blocks * size;
    return (part_of){matrix, m->group[task / blocks].expert, row, least(matrix->rows - row, size)};
}

static void moe_gate_up(void *context, int64_t task, int worker) {
    moe_work *m = context;
    const int64_t width = m->gate->rows, size = m->inner_rows, blocks = ktl_ceil(width, size);
    const group *g = &m->group[task / blocks];
    const int64_t stride = size + SPREAD;
    const int64_t after = task + 1 < m->groups * blocks ? task + 1 : task; /* mostly this worker's */
    const part_of parts[3] = {moe_inner_part(m, task, m->gate), moe_inner_part(m, task, m->up),
                              moe_inner_part(m, after, m->gate)};
    const ktl_kernels *kernels = m->kernels[g->way];
    const int fuse = g->way == FUSED;
    ktl_tile *tiles = ktl_pool_scratch(m->pool, worker, 0);
    float *sums[2] = {(float *)(tiles + KTL_TILES), (float *)(tiles + KTL_TILES) + g->n * stride};
    memset(sums[0], 0, (size_t)(2 * g->n * stride) * sizeof(float));
    for (int i = 0; i < 2; i++) {
        const int list = m->inner_acts[g->way][i];
        ktl_job job = {.act_index = fuse ? m->token + g->first : NULL, .acc = sums[i],
                       .acc_stride = stride, .n = g->n};
        rows_times(kernels, fuse, parts[i], fuse ? &m->list[list] : &m->gathered[list], fuse ? 0 : g->first, &job,
                   tiles, parts[i + 1]);
    }
    for (int64_t i = 0; i < g->n; i++) /* down is linear: the routing weight goes on its narrow side */
        kernels->silu_mul(m->hidden + (g->first + i) * width + parts[0].row, sums[0] + i * stride,
                          sums[1] + i * stride, m->weight[g->first + i], parts[0].rows);
}

static void moe_prepare_hidden(void *context, int64_t slot, int worker) {
    moe_work *m = context;
    (void)worker;
    acts_fill(&m->hidden_acts[m->group[m->group_of[slot]].way], slot,
              m->hidden + slot * m->down->cols, KTL_X_F32, m->down->cols);
}

static void moe_down(void *context, int64_t task, int worker) {
    moe_work *m = context;
    const int64_t size = m->outer_rows, stride = size + SPREAD, row0 = task * size;
    const int64_t hidden = m->down->rows;
    const int64_t rows = hidden - row0 < size ? hidden - row0 : size;
    ktl_tile *tiles = ktl_pool_scratch(m->pool, worker, 0);
    float *acc = (float *)(tiles + KTL_TILES);
    memset(acc, 0, (size_t)(m->tokens * stride) * sizeof(float));
    for (int64_t i = 0; i < m->groups; i++) {
        const group *g = &m->group[i];
        const int32_t *token = m->token + g->first;
        const int fuse = g->way == FUSED;
        ktl_job job = {.acc = acc, .acc_stride = stride, .acc_index = token, .n = g->n};
        if (!fuse) { /* rows one after the other, as tiles want them */
            job.acc = acc + m->tokens * stride;
            job.acc_index = NULL;
            memset(job.acc, 0, (size_t)(g->n * stride) * sizeof(float));
        }
        const part_of part = {m->down, g->expert, row0, rows};
        part_of then = part;
        if (i + 1 < m->groups) then.expert = m->group[i + 1].expert;
        else if (row0 + rows < hidden)
            then = (part_of){m->down, m->group[0].expert, row0 + rows, least(hidden - row0 - rows, size)};
        rows_times(m->kernels[g->way], fuse, part, &m->hidden_acts[g->way], g->first, &job, tiles, then);
        for (int64_t t = 0; !fuse && t < g->n; t++)
            m->kernels[g->way]->add_row(acc + token[t] * stride, job.acc + t * stride, rows);
    }
    for (int64_t t = 0; t < m->tokens; t++)
        memcpy(m->y + t * m->y_stride + row0, acc + t * stride, (size_t)rows * sizeof(float));
}

static int moe_pass(moe_work *m, const int64_t *ids, const float *weights, int64_t top_k, int isa,
                    int few) {
    int error = moe_group(m, ids, weights, top_k, isa, few);
    if (error) return error;
    int64_t largest = 0;
    int used[WAYS] = {0};
    for (int64_t g = 0; g < m->groups; g++) {
        used[m->group[g].way] = 1;
        largest = largest > m->group[g].n ? largest : m->group[g].n;
    }
    for (way w = 0; w < WAYS; w++) {
        if (!used[w]) continue;
        for (int i = 0; i < 2; i++) {
            error = moe_acts(m, w, i ? m->up : m->gate);
            if (error < 0) return error;
            m->inner_acts[w][i] = error;
        }
        /* A second term in `down` is lost behind what gate and up round away with one. */
        int terms = 2;
        for (int i = 0; i < 2; i++)
            if (m->list[m->inner_acts[w][i]].key.terms < terms) terms = 1;
        const ktl_act_key key = key_of(m->kernels[w], w, m->down, 1, terms);
        m->hidden_acts[w] = (acts){key, m->kernels[w], NULL, 0, 0};
        error = acts_alloc(m->pool, SLOT_HIDDEN_ACTS + w, &m->hidden_acts[w], m->slots, m->down->cols);
        if (error) return error;
    }
    for (int64_t g = 0; g < m->groups; g++)
        for (int i = 0; m->group[g].way != FUSED && i < 2; i++) {
            const int list = m->inner_acts[m->group[g].way][i];
            acts *a = &m->gathered[list];
            m->gather = 1;
            if (a->base) continue;
            error = acts_alloc(m->pool, SLOT_GATHERED + list, a, m->slots, m->gate->cols);
            if (error) return error;
        }
    const int64_t width = m->gate->rows;
    m->hidden = ktl_pool_scratch(m->pool, ktl_pool_threads(m->pool) + SLOT_HIDDEN,
                                 (size_t)(m->slots * width) * sizeof(float) + 64);
    if (!m->hidden) return KTL_ERR_MEMORY;
    m->inner_rows = task_rows(m->pool, width, m->groups);
    m->outer_rows = task_rows(m->pool, m->down->rows, 1);
    const int64_t inner = 2 * largest * (m->inner_rows + SPREAD);
    const int64_t outer = (m->tokens + largest) * (m->outer_rows + SPREAD);
    if ((error = worker_scratch(m->pool, inner > outer ? inner : outer))) return error;

    const int small = m->slots * width * m->gate->cols * 3 < SMALL_WORK;
    run(m->pool, m->tokens * m->gate->cols < SMALL_WORK / 4, moe_prepare, m, m->tokens);
    if (m->gather) run(m->pool, small, moe_gather, m, m->slots);
    run(m->pool, small, moe_gate_up, m, m->groups * ktl_ceil(width, m->inner_rows));
    run(m->pool, m->slots * width < SMALL_WORK / 4, moe_prepare_hidden, m, m->slots);
    run(m->pool, small, moe_down, m, ktl_ceil(m->down->rows, m->outer_rows));
    return KTL_OK;
}

int ktl_moe(ktl_pool *pool, int isa, int few, const ktl_matrix *gate, const ktl_matrix *up,
            const ktl_matrix *down, const void *x, int x_type, int64_t tokens, int64_t x_stride,
            const int64_t *ids, const float *weights, int64_t top_k, float *y, int64_t y_stride) {
    if (isa < 0 || isa >= KTL_ISAS || *ktl_isa_reason(isa)) return KTL_ERR_ISA;
    if (!ktl_isa_computes(isa, gate->format) || !ktl_isa_computes(isa, up->format) ||
        !ktl_isa_computes(isa, down->format))
        return KTL_ERR_FORMAT;
    if (gate->experts != up->experts || gate->experts != down->experts || gate->rows != up->rows ||
        gate->cols != up->cols || down->cols != gate->rows || tokens < 0 || top_k < 0)
        return KTL_ERR_SHAPE;
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (ids[i] < -1 || ids[i] >= gate->experts) return KTL_ERR_ID;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    for (int64_t t = 0; t < tokens && !error; t += MAX_TOKENS) {
        moe_work m = {.pool = pool, .gate = gate, .up = up, .down = down, .x_type = x_type,
                      .x_stride = x_stride, .y_stride = y_stride, .y = y + t * y_stride,
                      .x = x_row(x, x_type, x_stride, t),
                      .tokens = tokens - t < MAX_TOKENS ? tokens - t : MAX_TOKENS};
        for (way w = 0; w < WAYS; w++) m.kernels[w] = ktl_kernels_of(isa, w != MANY);
        error = moe_pass(&m, ids + t * top_k, weights + t * top_k, top_k, isa, few);
    }
    ktl_pool_unlock(pool);
    return error;
}
