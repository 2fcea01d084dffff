/* linear and moe: how the work is cut into tasks, for any instruction set.
 *
 * Every sum of the result is formed by one task in a fixed order, so the bits depend neither on the
 * number of threads nor on who steals what. */
#include "arithmetic.h"

enum {
    MAX_TOKENS = 2048,   /* of one pass; more are done in several */
    MAX_TASK_ROWS = 256,
    TASKS_PER_WORKER = 8,
    FUSED_ON_AVX512 = 5,
    SPREAD = 16, /* floats between rows of sums: a power of two apart they share cache sets */
    SMALL_WORK = 1 << 17 /* multiplications below which another thread's part costs more than it saves */
};

/* How a matrix meets its tokens: decoded into tiles by the kernels for many or for few, or decoded and
 * multiplied at once by those for few. LISTS: gate and up may differ in each. */
typedef enum { MANY, FEW, FUSED, WAYS, LISTS = 2 * WAYS } way;

/* Shared scratch slots, counted from ktl_pool_threads(). */
enum {
    SLOT_ACTS = 0, /* LISTS of them */
    SLOT_GATHERED = LISTS,
    SLOT_HIDDEN = 2 * LISTS,
    SLOT_GROUPS,
    SLOT_HIDDEN_ACTS /* WAYS of them */
};

static void run(ktl_pool *pool, int small, ktl_task task, void *context, int64_t tasks) {
    if (small)
        for (int64_t i = 0; i < tasks; i++) task(context, i, 0);
    else
        ktl_pool_run(pool, task, context, tasks);
}

/* Prepared activations: [chunk][term][row] of ktl_act_bytes. */
typedef struct {
    ktl_act_key key;
    const ktl_kernels *kernels;
    uint8_t *base;
    int64_t term_bytes, chunk_bytes;
} acts;

static int64_t chunks_of(int64_t cols) { return ktl_ceil(cols, KTL_CHUNK); }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int acts_alloc(ktl_pool *pool, int slot, acts *a, int64_t rows, int64_t cols) {
    a->term_bytes = rows * (int64_t)ktl_act_bytes(a->key.kind);
    a->chunk_bytes = a->term_bytes * a->key.terms;
    a->base = ktl_pool_scratch(pool, ktl_pool_threads(pool) + slot,
                               (size_t)(chunks_of(cols) * a->chunk_bytes) + 64);
    return a->base ? KTL_OK : KTL_ERR_MEMORY;
}

static void acts_fill(const acts *a, int64_t row, const void *x, int x_type, int64_t cols) {
    const size_t bytes = ktl_act_bytes(a->key.kind);
    float line[KTL_SPAN], most = 0;
    for (int64_t c = 0; c < cols; c += KTL_CHUNK) {
        const int64_t start = c - c % KTL_SPAN;
        const float *from = (const float *)x + start;
        const int span = (int)(cols - start < KTL_SPAN ? cols - start : KTL_SPAN);
        const int n = (int)(cols - c < KTL_CHUNK ? cols - c : KTL_CHUNK);
        if (x_type == KTL_X_BF16) {
            for (int i = 0; i < span && c == start; i++)
                line[i] = ktl_bf16(((const uint16_t *)x)[start + i]);
            from = line;
        }
        if (c == start && a->key.group == KTL_SPAN) most = ktl_largest(from, span);
        from += c - start;
        uint8_t *to = a->base + c / KTL_CHUNK * a->chunk_bytes + (size_t)row * bytes;
        a->kernels->prepare(a->key, from, n, most, to);
        if (a->key.terms < 2) continue;
        const ktl_act *first = (const ktl_act *)to;
        float rest[KTL_CHUNK];
        for (int i = 0; i < n; i++)
            rest[i] = from[i] - (float)first->q[i] * ktl_act_scale(&a->key, first, i / KTL_FINE);
        a->kernels->prepare(a->key, rest, n, 0, to + a->term_bytes);
    }
}

static const void *x_row(const void *x, int x_type, int64_t stride, int64_t row) {
    return (const uint8_t *)x + row * stride * (x_type == KTL_X_BF16 ? 2 : 4);
}

/* Up to `few` tokens, avx* fuse decoding and products; amx_* and avx512_bf16 leave the tokens to avx512,
 * which fuses up to the number from which a tile that is decoded once pays. */
static way way_of(int isa, int few, int64_t tokens) {
    if (tokens > few) return MANY;
    return ktl_kernels_of(isa, 1)->dot_packed && (isa <= KTL_AVX512_VNNI || tokens <= FUSED_ON_AVX512)
               ? FUSED : FEW;
}

/* How activations are wanted. A scale every 16 columns instead of 32 loses a fifth less. Where weights are
 * decoded and multiplied at once it costs no time: memory is waited for. On tiles it takes 3 to 6 % of an
 * expert's time in `down` alone, whose input has SwiGLU's heavy tails: worth it there, and not elsewhere. For
 * the same tails `down` has no scale over two chunks. */
static ktl_act_key key_of(const ktl_kernels *kernels, way w, const ktl_matrix *m, int down, int most_terms) {
    const int format = m->format;
    ktl_act_key key = kernels->act_key(format);
    if (key.terms > most_terms) key.terms = most_terms;
    const int fine = w == FUSED || down ? kernels->fine > 0 : kernels->fine > 1;
    if (key.group == KTL_GROUP && fine) key.group = KTL_FINE;
    if (key.group > KTL_CHUNK && down) key.group = KTL_CHUNK;
    if (w == FUSED && m->layout == KTL_GGML_BLOCKS && kernels->lines) return ktl_in_lines(format, key);
    if (w == MANY && kernels->words) key = ktl_in_words(format, key);
    /* A second term is for what pairs would lose. */
    const int short_scales = key.kind == KTL_ACT_INT8 && key.group <= KTL_GROUP && key.terms == 1;
    const int pairs = w == MANY && short_scales && kernels->pairs && ktl_pairs(kernels->pairs);
    return pairs ? ktl_in_pairs(kernels->pairs, format, key) : key;
}

/* Rows [row, row + rows) of one matrix of a stack. */
typedef struct {
    const ktl_matrix *m;
    int64_t expert, row, rows;
} part_of;

/* Where they begin; in packed form the panel of the first. */
static const uint8_t *begin_of(const part_of *part) {
    const ktl_matrix *m = part->m;
    return m->data + part->expert * m->expert_stride +
           (m->layout == KTL_PACKED ? part->row / KTL_PANEL * ktl_panel_bytes(m->format, m->cols)
                                    : part->row * ktl_row_bytes(m->format, m->cols));
}

/* The memory of KTL_TILES tiles: `cols` columns from `column` on of the part's rows from `row` on. */
static ktl_ahead tiles_of(const part_of *part, int64_t row, int64_t column, int cols) {
    const ktl_matrix *m = part->m;
    const uint8_t *data = m->data + part->expert * m->expert_stride;
    const int64_t row0 = part->row + row, left = part->rows - row;
    const int64_t rows = left > KTL_TILES * KTL_PANEL ? KTL_TILES * KTL_PANEL : left;
    if (m->layout == KTL_PACKED) {
        const int64_t chunk = ktl_chunk_bytes(m->format, KTL_CHUNK / KTL_GROUP);
        const int64_t panel = ktl_panel_bytes(m->format, m->cols);
        return (ktl_ahead){.data = data + row0 / KTL_PANEL * panel + ktl_head_bytes(m->format) +
                                   column / KTL_CHUNK * chunk,
                           .stride = panel, .pieces = (int)ktl_ceil(rows, KTL_PANEL),
                           .lines = (int)(chunk / 64 * (cols / KTL_CHUNK))};
    }
    const ktl_format_info *f = &ktl_formats[m->format];
    const int64_t row_bytes = ktl_row_bytes(m->format, m->cols);
    /* A row starts somewhere in a line, mostly at a multiple of 16. */
    const int64_t unit = f->block_cols ? f->block_cols : 1, bytes = f->block_cols ? f->block_bytes : 1;
    return (ktl_ahead){.data = data + row0 * row_bytes + column / unit * bytes, .stride = row_bytes,
                       .pieces = (int)rows, .lines = (int)((cols / unit * bytes + 47) / 64 + 1)};
}

/* job->acc += a part of a matrix times the prepared activations. A chunk of 256 columns is decoded four
 * panels at a time (they stay in L1) against all tokens (whose chunk stays in L2 while the task's panels
 * pass by). `then`: what will be read afterwards. */
static void rows_times(const ktl_kernels *kernels, int fuse, part_of part_rows, const acts *a, int64_t first_act,
                       const ktl_job *job, ktl_tile *tiles, part_of then) {
    const ktl_matrix *m = part_rows.m;
    const int64_t row0 = part_rows.row, rows = part_rows.rows;
    const uint8_t *data = m->data + part_rows.expert * m->expert_stride;
    const uint8_t *act = a->base + first_act * (int64_t)ktl_act_bytes(a->key.kind);
    const int packed = m->layout == KTL_PACKED;
    const int64_t row_bytes = ktl_row_bytes(m->format, m->cols);
    const int64_t panel_bytes = packed ? ktl_panel_bytes(m->format, m->cols) : 0;
    const int64_t chunk_bytes = ktl_chunk_bytes(m->format, KTL_CHUNK / KTL_GROUP);
    if (fuse) { /* the weights are read once, in the order of memory */
        ktl_job part = *job;
        const uint8_t *end = data + ktl_ceil(row0 + rows, KTL_PANEL) * panel_bytes;
        for (int64_t r = 0; packed && r < rows; r += KTL_PANEL) {
            const uint8_t *panel = data + (row0 + r) / KTL_PANEL * panel_bytes;
            part.acc = job->acc + r;
            for (int64_t c = 0; c < chunks_of(m->cols); c++)
                for (int term = 0; term < a->key.terms; term++) {
                    const int64_t groups = ktl_ceil(m->cols - c * KTL_CHUNK, KTL_GROUP);
                    const uint8_t *chunk = panel + ktl_head_bytes(m->format) + c * chunk_bytes;
                    part.act = act + c * a->chunk_bytes + term * a->term_bytes;
                    part.far = chunk + KTL_FAR;
                    if (part.far >= end) part.far = begin_of(&then) + (part.far - end);
                    kernels->dot_packed(m->format, panel, chunk,
                                        groups < KTL_CHUNK / KTL_GROUP ? (int)groups : KTL_CHUNK / KTL_GROUP,
                                        &part);
                }
        }
        part.terms = a->key.terms;
        part.term_bytes = a->term_bytes;
        if (!packed)
            kernels->dot_blocks(m->format, data + row0 * row_bytes, row_bytes, (int)rows, m->cols, act,
                                a->chunk_bytes, &part);
        return;
    }
    const int span = packed && kernels->spans && a->key.group == KTL_SPAN ? KTL_SPAN : KTL_CHUNK;
    for (int64_t c = 0; c < m->cols; c += span) {
        const int cols = (int)(m->cols - c < span ? m->cols - c : span);
        const int groups = (cols + KTL_GROUP - 1) / KTL_GROUP;
        ktl_job part = *job;
        part.fine = a->key.group == KTL_FINE;
        part.kind = a->key.kind;
        part.pairs = a->key.pairs;
        const uint8_t *terms = act + c / KTL_CHUNK * a->chunk_bytes;
        for (int64_t first = 0; first < rows; first += KTL_TILES * KTL_PANEL) {
            int used = 0;
            for (int64_t r = first; r < rows && used < KTL_TILES; r += KTL_PANEL, used++) {
                ktl_tile *tile = &tiles[used];
                const uint8_t *panel = data + (row0 + r) / KTL_PANEL * panel_bytes;
                const uint8_t *chunk =
                    panel + ktl_head_bytes(m->format) + c / KTL_CHUNK * chunk_bytes;
                if (packed) {
                    kernels->decode_packed(m->format, panel, chunk, groups, tile);
                } else {
                    int here = (int)(rows - r < KTL_PANEL ? rows - r : KTL_PANEL);
                    kernels->decode_blocks(m->format, data + (row0 + r) * row_bytes, row_bytes,
                                           here, c, cols, tile);
                }
            }
            for (; used < KTL_TILES; used++) {
                memset(&tiles[used], 0, sizeof(ktl_tile));
                tiles[used].codes = tiles[used].code;
            }
            const int64_t next = first + KTL_TILES * KTL_PANEL < rows ? first + KTL_TILES * KTL_PANEL : 0;
            part.ahead = next || c + span < m->cols ? tiles_of(&part_rows, next, c + !next * span, span)
                                                    : tiles_of(&then, 0, 0, span);
            part.act_next = a->chunk_bytes;
            part.acc = job->acc + first;
            for (int term = 0; term < a->key.terms; term++) {
                part.act = terms + term * a->term_bytes;
                kernels->multiply(m->format, tiles, used, groups, &part);
            }
        }
    }
}

/* Rows of a task: as many as keep every worker busy to the end. */
static int64_t task_rows(const ktl_pool *pool, int64_t rows, int64_t matrices) {
    int64_t size = MAX_TASK_ROWS;
    while (size > KTL_TILES * KTL_PANEL &&
           ktl_ceil(rows, size) * matrices < TASKS_PER_WORKER * ktl_pool_threads(pool))
        size /= 2;
    return size;
}

/* Each worker's private scratch: tiles, then room for sums. */
static int worker_scratch(ktl_pool *pool, int64_t sums) {
    size_t bytes = KTL_TILES * sizeof(ktl_tile) + (size_t)sums * sizeof(float) + 64;
    for (int w = 0; w < ktl_pool_threads(pool); w++)
        if (!ktl_pool_scratch(pool, w, bytes)) return KTL_ERR_MEMORY;
    return KTL_OK;
}

/* ---- linear ---------------------------------------------------------------------------------------- */
typedef struct {
    ktl_pool *pool;
    const ktl_kernels *kernels;
    int x_type;
    way way;
    const ktl_matrix *w;
    int64_t first, heads, tokens, x_stride, x_head, y_stride, y_head, task_rows;
    const void *x;
    float *y;
    acts a;
} linear_work;

/* Prepared rows lie head by head. */
static void linear_prepare(void *context, int64_t row, int worker) {
    linear_work *l = context;
    (void)worker;
    const void *x = x_row(l->x, l->x_type, l->x_head, row / l->tokens);
    acts_fill(&l->a, row, x_row(x, l->x_type, l->x_stride, row % l->tokens), l->x_type, l->w->cols);
}

static part_of linear_part(const linear_work *l, int64_t task) {
    const int64_t size = l->task_rows, tasks = ktl_ceil(l->w->rows, size), row = task % tasks * size;
    return (part_of){l->w, l->first + task / tasks, row, least(l->w->rows - row, size)};
}

static void linear_rows(void *context, int64_t task, int worker) {
    linear_work *l = context;
    ktl_tile *tiles = ktl_pool_scratch(l->pool, worker, 0);
    float *acc = (float *)(tiles + KTL_TILES);
    const int64_t size = l->task_rows, tasks = ktl_ceil(l->w->rows, size), head = task / tasks;
    const int64_t stride = size + SPREAD;
    memset(acc, 0, (size_t)(l->tokens * stride) * sizeof(float));
    ktl_job job = {.acc = acc, .acc_stride = stride, .n = l->tokens};
    const int64_t after = task + 1 < l->heads * tasks ? task + 1 : task; /* mostly this worker's */
    const part_of part = linear_part(l, task), then = linear_part(l, after);
    rows_times(l->kernels, l->way == FUSED, part, &l->a, head * l->tokens, &job, tiles, then);
    float *y = l->y + head * l->y_head + part.row;
    for (int64_t t = 0; t < l->tokens; t++)
        memcpy(y + t * l->y_stride, acc + t * stride, (size_t)part.rows * sizeof(float));
}

int ktl_linear(ktl_pool *pool, int isa, int few, const ktl_matrix *w, int64_t first, int64_t heads,
               const void *x, int x_type, int64_t tokens, int64_t x_stride, int64_t x_head,
               float *y, int64_t y_stride, int64_t y_head) {
    if (isa < 0 || isa >= KTL_ISAS || *ktl_isa_reason(isa)) return KTL_ERR_ISA;
    if (!ktl_isa_computes(isa, w->format)) return KTL_ERR_FORMAT;
    if (first < 0 || heads < 0 || first + heads > w->experts || tokens < 0) return KTL_ERR_SHAPE;
    if (!tokens || !heads || !w->rows) return KTL_OK;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    for (int64_t t = 0; t < tokens && !error; t += MAX_TOKENS) {
        int64_t n = tokens - t < MAX_TOKENS ? tokens - t : MAX_TOKENS;
        linear_work l = {.pool = pool, .kernels = ktl_kernels_of(isa, n <= few),
                         .way = way_of(isa, few, n), .x_type = x_type, .w = w, .first = first,
                         .heads = heads, .tokens = n, .x_stride = x_stride, .x_head = x_head,
                         .y_stride = y_stride, .y_head = y_head,
                         .task_rows = task_rows(pool, w->rows, heads),
                         .x = x_row(x, x_type, x_stride, t), .y = y + t * y_stride};
        l.a.kernels = l.kernels;
        l.a.key = key_of(l.kernels, l.way, w, 0, 2);
        error = acts_alloc(pool, SLOT_ACTS, &l.a, n * heads, w->cols);
        if (!error) error = worker_scratch(pool, n * (l.task_rows + SPREAD));
        if (error) break;
        int small = n * heads * w->rows * w->cols < SMALL_WORK;
        run(pool, small || n * heads * w->cols < SMALL_WORK / 4, linear_prepare, &l, n * heads);
        run(pool, small, linear_rows, &l, heads * ktl_ceil(w->rows, l.task_rows));
    }
    ktl_pool_unlock(pool);
    return error;
}

/* ---- moe ------------------------------------------------------------------------------------------- */
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
