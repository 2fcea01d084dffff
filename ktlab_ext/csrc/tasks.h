/* What linear.c and moe.c share: activations prepared, how a matrix meets its tokens, and a part of a matrix
 * times them, for any instruction set. */
#ifndef KTL_TASKS_H
#define KTL_TASKS_H

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

KTL_INLINE void run(ktl_pool *pool, int small, ktl_task task, void *context, int64_t tasks) {
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

KTL_INLINE int64_t chunks_of(int64_t cols) { return ktl_ceil(cols, KTL_CHUNK); }
KTL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

KTL_INLINE int acts_alloc(ktl_pool *pool, int slot, acts *a, int64_t rows, int64_t cols) {
    a->term_bytes = rows * (int64_t)ktl_act_bytes(a->key.kind);
    a->chunk_bytes = a->term_bytes * a->key.terms;
    a->base = ktl_pool_scratch(pool, ktl_pool_threads(pool) + slot,
                               (size_t)(chunks_of(cols) * a->chunk_bytes) + 64);
    return a->base ? KTL_OK : KTL_ERR_MEMORY;
}

KTL_INLINE void acts_fill(const acts *a, int64_t row, const void *x, int x_type, int64_t cols) {
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

KTL_INLINE const void *x_row(const void *x, int x_type, int64_t stride, int64_t row) {
    return (const uint8_t *)x + row * stride * (x_type == KTL_X_BF16 ? 2 : 4);
}

/* Up to `few` tokens, avx* fuse decoding and products; amx_* and avx512_bf16 leave the tokens to avx512,
 * which fuses up to the number from which a tile that is decoded once pays. */
KTL_INLINE way way_of(int isa, int few, int64_t tokens) {
    if (tokens > few) return MANY;
    return ktl_kernels_of(isa, 1)->dot_packed && (isa <= KTL_AVX512_VNNI || tokens <= FUSED_ON_AVX512)
               ? FUSED : FEW;
}

/* How activations are wanted. A scale every 16 columns instead of 32 loses a fifth less. Where weights are
 * decoded and multiplied at once it costs no time: memory is waited for. On tiles it takes 3 to 6 % of an
 * expert's time in `down` alone, whose input has SwiGLU's heavy tails: worth it there, and not elsewhere. For
 * the same tails `down` has no scale over two chunks. */
KTL_INLINE ktl_act_key key_of(const ktl_kernels *kernels, way w, const ktl_matrix *m, int down, int most_terms) {
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
    if (pairs) return ktl_in_pairs(kernels->pairs, format, key);
    if (w != FUSED && key.kind == KTL_ACT_INT8 && key.group <= KTL_GROUP) key.start = kernels->start;
    return key;
}

/* Rows [row, row + rows) of one matrix of a stack. */
typedef struct {
    const ktl_matrix *m;
    int64_t expert, row, rows;
} part_of;

/* Where they begin; in packed form the panel of the first. */
KTL_INLINE const uint8_t *begin_of(const part_of *part) {
    const ktl_matrix *m = part->m;
    return m->data + part->expert * m->expert_stride +
           (m->layout == KTL_PACKED ? part->row / KTL_PANEL * ktl_panel_bytes(m->format, m->cols)
                                    : part->row * ktl_row_bytes(m->format, m->cols));
}

/* The memory of KTL_TILES tiles: `cols` columns from `column` on of the part's rows from `row` on. */
KTL_INLINE ktl_ahead tiles_of(const part_of *part, int64_t row, int64_t column, int cols) {
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
        part.terms = a->key.terms;
        part.term_bytes = a->term_bytes;
        if (!packed) {
            kernels->dot_blocks(m->format, data + row0 * row_bytes, row_bytes, (int)rows, m->cols, act,
                                a->chunk_bytes, &part);
            return;
        }
        part.end = data + ktl_ceil(row0 + rows, KTL_PANEL) * panel_bytes;
        part.then = begin_of(&then);
        for (int64_t r = 0; r < rows; r += KTL_PANEL) {
            part.acc = job->acc + r;
            kernels->dot_packed(m->format, data + (row0 + r) / KTL_PANEL * panel_bytes, m->cols, act, a->chunk_bytes,
                                &part);
        }
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
KTL_INLINE int64_t task_rows(const ktl_pool *pool, int64_t rows, int64_t matrices) {
    int64_t size = MAX_TASK_ROWS;
    while (size > KTL_TILES * KTL_PANEL &&
           ktl_ceil(rows, size) * matrices < TASKS_PER_WORKER * ktl_pool_threads(pool))
        size /= 2;
    return size;
}

/* Each worker's private scratch: tiles, then room for sums. */
KTL_INLINE int worker_scratch(ktl_pool *pool, int64_t sums) {
    size_t bytes = KTL_TILES * sizeof(ktl_tile) + (size_t)sums * sizeof(float) + 64;
    for (int w = 0; w < ktl_pool_threads(pool); w++)
        if (!ktl_pool_scratch(pool, w, bytes)) return KTL_ERR_MEMORY;
    return KTL_OK;
}

#endif
