/* A decoded token through whole layers in one call: norms, latent attention, router, experts.
 *
 * The same operations as one by one, in the same order; what is saved is what lies between them, which
 * for a small model is more than the operations. */
#include "internal.h"

#include <math.h>

/* Shared scratch slots, counted from ktl_pool_threads(): what is called in between has the others. */
enum { SLOT_STREAM = KTL_SHARED - 5, SLOT_TOKEN, SLOT_LAYER, SLOT_IDS, SLOT_ROUTER };

static float *floats(ktl_pool *pool, int slot, int64_t count) {
    return ktl_pool_scratch(pool, ktl_pool_threads(pool) + slot, (size_t)count * sizeof(float));
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

/* ---- latent attention of one token ----------------------------------------------------------------- */

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
    float *c = floats(pool, SLOT_TOKEN, compressed + width + heads * (width + rank + values));
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

/* ---- router ------------------------------------------------------------------------------------------ */
/* Index of the largest number, the first of equals; of one that is not a number if there is nothing
 * else (so that it is passed on instead of read past the end). */
static int64_t largest(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best] || (x[best] != x[best] && x[i] == x[i])) best = i;
    return best;
}

static void score(const ktl_router *r, int64_t experts, float *scores) {
    if (r->sigmoid) {
        for (int64_t e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        return;
    }
    const float most = scores[largest(scores, experts)];
    float total = 0;
    for (int64_t e = 0; e < experts; e++) total += scores[e] = expf(scores[e] - most);
    for (int64_t e = 0; e < experts; e++) scores[e] /= total;
}

/* Experts outside the best groups fall to -inf. A group's score is the sum of its two best where a bias
 * corrects (DeepSeek-V3), else its best (V2). */
static void shut_groups(const ktl_router *r, int64_t experts, float *choice, float *group) {
    const int64_t size = experts / r->groups;
    for (int64_t g = 0; g < r->groups; g++) {
        float *members = choice + g * size;
        const int64_t best = largest(members, size);
        group[g] = members[best];
        if (!r->bias || size < 2) continue;
        const float first = members[best];
        members[best] = -INFINITY;
        group[g] += members[largest(members, size)];
        members[best] = first;
    }
    for (int64_t open = 0; open < r->open_groups; open++) group[largest(group, r->groups)] = -INFINITY;
    for (int64_t g = 0; g < r->groups; g++)
        for (int64_t e = 0; e < size && group[g] != -INFINITY; e++) choice[g * size + e] = -INFINITY;
}

int ktl_route(ktl_pool *pool, int isa, const ktl_router *r, const float *x, int64_t *ids,
              float *weights) {
    const int64_t experts = r->gate->rows;
    if (r->top_k < 1 || r->top_k > experts || r->groups < 1 || experts % r->groups ||
        r->open_groups < 1 || r->open_groups > r->groups)
        return KTL_ERR_SHAPE;
    ktl_pool_lock(pool);
    float *scores = floats(pool, SLOT_ROUTER, 2 * experts + r->groups), total = 0;
    int error = scores ? row_times(pool, isa, r->gate, x, scores) : KTL_ERR_MEMORY;
    if (!error) {
        float *choice = scores + experts;
        score(r, experts, scores);
        for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + (r->bias ? r->bias[e] : 0.0f);
        if (r->groups > 1) shut_groups(r, experts, choice, choice + experts);
        for (int64_t k = 0; k < r->top_k; k++) {
            ids[k] = largest(choice, experts);
            weights[k] = scores[ids[k]];
            choice[ids[k]] = -INFINITY;
            total += weights[k];
        }
        for (int64_t k = 0; k < r->top_k; k++) {
            if (r->normalise) weights[k] /= total + 1e-20f;
            weights[k] *= r->scale;
        }
    }
    ktl_pool_unlock(pool);
    return error;
}

/* ---- layer ------------------------------------------------------------------------------------------- */
static int feed(ktl_pool *pool, const ktl_feed *f, const float *x, const int64_t *ids,
                const float *weights, int64_t top_k, float *y) {
    return ktl_moe(pool, f->isa, f->few, f->gate, f->up, f->down, x, KTL_X_F32, 1, f->gate->cols, ids,
                   weights, top_k, y, f->down->rows);
}

static int layer_token(ktl_pool *pool, const ktl_layer_place *at, const float *x, float *y) {
    static const int64_t first = 0;
    static const float one = 1.0f;
    const ktl_layer *l = at->layer;
    const int64_t hidden = l->mla.output->rows, queries = l->mla.q_b->rows;
    const int64_t top_k = l->router.gate ? l->router.top_k : 0;
    if (l->mla.kv_a->cols != hidden || l->routed.gate->cols != hidden ||
        (l->shared.gate && l->shared.gate->cols != hidden) ||
        (l->router.gate && (l->router.gate->cols != hidden ||
                            l->router.gate->rows != l->routed.gate->experts)))
        return KTL_ERR_SHAPE;
    ktl_mla mla = l->mla;
    mla.turns = at->turns;
    float *weights = floats(pool, SLOT_LAYER, 3 * hidden + queries + top_k);
    int64_t *ids = ktl_pool_scratch(pool, ktl_pool_threads(pool) + SLOT_IDS, (size_t)top_k * 8 + 8);
    int error = weights && ids ? KTL_OK : KTL_ERR_MEMORY;
    float *normed = weights + top_k, *routed = normed + hidden, *shared = routed + hidden;
    float *q = shared + hidden;
    if (!error) {
        rms_norm(x, l->attention_norm, hidden, mla.eps, normed);
        error = ktl_mla_token(pool, l->mla_isa, &mla, normed, at->keys, at->positions, at->stride, q, routed);
    }
    if (!error) {
        for (int64_t i = 0; i < hidden; i++) y[i] = x[i] + routed[i];
        rms_norm(y, l->mlp_norm, hidden, mla.eps, normed);
        if (l->router.gate) {
            error = ktl_route(pool, l->router_isa, &l->router, normed, ids, weights);
            if (!error) error = feed(pool, &l->routed, normed, ids, weights, top_k, routed);
        } else
            error = feed(pool, &l->routed, normed, &first, &one, 1, routed);
    }
    if (!error && l->shared.gate) {
        error = feed(pool, &l->shared, normed, &first, &one, 1, shared);
        for (int64_t i = 0; i < hidden && !error; i++) routed[i] += shared[i];
    }
    for (int64_t i = 0; i < hidden && !error; i++) y[i] += routed[i];
    return error;
}

int ktl_layers_token(ktl_pool *pool, const ktl_layer_place *at, int64_t count, const float *x, float *y) {
    if (count < 1) return KTL_ERR_SHAPE;
    const int64_t hidden = at->layer->mla.output->rows;
    for (int64_t i = 1; i < count; i++)
        if (at[i].layer->mla.output->rows != hidden) return KTL_ERR_SHAPE;
    ktl_pool_lock(pool);
    float *between = floats(pool, SLOT_STREAM, hidden);
    int error = between ? KTL_OK : KTL_ERR_MEMORY;
    for (int64_t i = 0; i < count && !error; i++) { /* the last one's result is y */
        float *to = (count - i) % 2 ? y : between;
        error = layer_token(pool, &at[i], x, to);
        x = to;
    }
    ktl_pool_unlock(pool);
    return error;
}
