/* linear: how the work is cut into tasks. Every sum of the result is formed by one task in a fixed order, so the
 * bits depend neither on the number of threads nor on who steals what. */
#include "tasks.h"

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
