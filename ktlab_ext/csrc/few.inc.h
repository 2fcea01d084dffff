/* Few tokens: each weight is read once, decoded and multiplied in registers; in the words of
 * kernel.inc.h. */

enum { FEW = 4 /* tokens a pass on packed data, or on 16 rows of blocks */ };

/* ---- few tokens on file blocks: LANES rows at a time, or one ------------------------------------------- */
#if LINES
#include "row_avx2.inc.h"
#define DOT_ROWS(T) dot_lines(format, T, row, cols, x, chunk_bytes, acc)
enum { ROWS_AT_ONCE = 1 };
#else
#define DOT_ROWS(T) dot_rows(format, T, row, row_bytes, cols, x, chunk_bytes, acc)
enum { ROWS_AT_ONCE = LANES };
#endif

KTL_INLINE void dot_lanes(int format, const uint8_t *row, int64_t row_bytes, int64_t cols, const uint8_t *act,
                          int64_t chunk_bytes, const ktl_job *job, int64_t r) {
    const int64_t all = job->n * job->terms; /* a token's second term is one more token with its sums */
    for (int64_t first = 0; first < all;) {
        const uint8_t *x[FEW];
        float *acc[FEW];
        const int64_t left = all - first;
        const int T = (int)ktl_ceil(left, ktl_ceil(left, FEW)); /* 5 tokens are 3 and 2 */
        for (int t = 0; t < T; t++) {
            const int64_t token = (first + t) / job->terms, term = (first + t) % job->terms;
            const int64_t a = job->act_index ? job->act_index[token] : token;
            x[t] = act + (size_t)a * ktl_act_bytes(KTL_ACT_INT8) + term * job->term_bytes;
            acc[t] = ktl_sums(job, token) + r;
        }
#define PASS(T) case T: DOT_ROWS(T); break;
        switch (T) { PASS(1) PASS(2) PASS(3) PASS(4) }
#undef PASS
        first += T;
    }
}

/* ---- few tokens on file blocks: one row at a time, no tile ------------------------------------------ */
KTL_INLINE void dot_blocks_as(int format, const uint8_t *row, int64_t row_bytes, int rows,
                              int64_t cols, const void *act, int64_t chunk_bytes,
                              const ktl_job *job) {
    const ktl_format_info *f = &ktl_formats[format];
    const size_t act_bytes = ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    int done = 0;
    if (ktl_has_rows(format))
        for (; done + ROWS_AT_ONCE <= rows; done += ROWS_AT_ONCE)
            dot_lanes(format, row + done * row_bytes, row_bytes, cols, act, chunk_bytes, job, done);
    for (int64_t first = 0; first < job->n; first += TOKENS) {
        const int T = (int)(job->n - first < TOKENS ? job->n - first : TOKENS);
        for (int r = done; r < rows; r++) {
            VF sum[TOKENS];
            for (int t = 0; t < TOKENS; t++) sum[t] = ZEROF();
            const uint8_t *p = row + r * row_bytes;
            for (int64_t column = 0; column < cols; column += KTL_CHUNK) {
                const uint8_t *x = (const uint8_t *)act + column / KTL_CHUNK * chunk_bytes;
                int n = (int)(cols - column < KTL_CHUNK ? cols - column : KTL_CHUNK);
                /* Rows follow each other in memory: what comes KTL_FAR bytes on is fetched meanwhile. */
                fetch(p + KTL_FAR, (size_t)bytes_of_columns(format, column),
                      (size_t)bytes_of_columns(format, column + KTL_CHUNK));
                if (ktl_is_float(format)) {
                    float line[KTL_CHUNK] KTL_ALIGNED;
                    if (n < KTL_CHUNK) memset(line, 0, sizeof line);
                    to_floats(format, p + column * f->block_bytes, n, line);
                    for (int t = 0; t < T; t++) {
                        int64_t a = job->act_index ? job->act_index[first + t] : first + t;
                        const float *xa = (const float *)(x + (size_t)a * act_bytes);
                        VF s0 = sum[t], s1 = ZEROF();
                        for (int i = 0; i < KTL_CHUNK; i += VB / 2) {
                            s0 = FMA(LOADF(line + i), LOADF(xa + i), s0);
                            s1 = FMA(LOADF(line + i + VB / 4), LOADF(xa + i + VB / 4), s1);
                        }
                        sum[t] = ADDF(s0, s1);
                    }
                    continue;
                }
                row_chunk chunk;
                row_load(format, p, column, n, &chunk);
                for (int t = 0; t < T; t++) {
                    int64_t a = job->act_index ? job->act_index[first + t] : first + t;
                    const uint8_t *xa = x + (size_t)a * act_bytes;
                    for (int term = 0; term < job->terms; term++, xa += job->term_bytes)
                        sum[t] = dot_row(format, &chunk, (const ktl_act *)xa, sum[t]);
                }
            }
            for (int t = 0; t < T; t++) {
                int64_t y = job->acc_index ? job->acc_index[first + t] : first + t;
                job->acc[y * job->acc_stride + r] += SUMF(sum[t]);
            }
        }
    }
}

/* ---- few tokens on packed data: codes go from memory to the sums without a tile in between ------------ */
/* A chunk of 16 rows: where its parts are, its rows' scales, and the sums of T tokens in units of those. */
typedef struct {
    const uint8_t *codes, *scales, *mins, *far; /* far: NULL where a pass before has asked for it */
    float d[KTL_PANEL] KTL_ALIGNED, dmin[KTL_PANEL] KTL_ALIGNED;
    VF sum[FEW][VN], offset[FEW][VN], part[FEW]; /* part: of what shares the weights' scale */
    VI dot[FEW][VN];
} packed_chunk;

/* Its g-th 32 columns. */
KTL_INLINE void dot_group(int format, int T, int fetched, size_t g, size_t groups, const ktl_act *const *act,
                          packed_chunk *c) {
    const ktl_format_info *f = &ktl_formats[format];
    const size_t sub = (size_t)f->sub, step = sub > KTL_GROUP ? KTL_GROUP : KTL_FINE;
    const size_t share = (size_t)(ktl_chunk_bytes_as(format, KTL_CHUNK / KTL_GROUP) * KTL_GROUP / KTL_CHUNK);
    const int run = run_of(format) < (int)step / 4 ? run_of(format) : (int)step / 4;
    /* The memory must not idle while this is computed. */
    if (fetched) fetch(c->far, g * share, (g + 1) * share);
    if (!f->has_scale && f->d_cols && g * KTL_GROUP % (size_t)f->d_cols == 0)
        F16X16(c->scales + 32 * (g * KTL_GROUP / (size_t)f->d_cols), c->d);
#pragma GCC unroll 2
    for (int o = 0; o < VN; o++) {
        const int at = o * LANES;
        VI w[8], two[FEW];
        unpack_in_registers(format, c->codes + g * 64 * (size_t)(f->base_bits + f->high_bits), o, w);
#pragma GCC unroll 2
        for (size_t h = 0; h < KTL_GROUP; h += step) {
            const size_t column = g * KTL_GROUP + h, s = column / sub;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                if (step == KTL_FINE || column % sub == 0) c->dot[t][o] = SET1I(act[t]->init[column / KTL_FINE]);
#pragma GCC unroll 8
                for (size_t v = h / 4; v < (h + step) / 4; v++)
                    c->dot[t][o] = DOT_AT(c->dot[t][o], two[t], v, run, w[v], act[t]->q + g * KTL_GROUP + 4 * v);
            }
            if (sub > KTL_GROUP && (g + 1) * KTL_GROUP % sub && g + 1 < groups) continue;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const VF one = TO_FLOAT(c->dot[t][o]), by = SET1F(act[t]->scale[column / KTL_FINE]);
                c->part[t] = step == KTL_FINE && column % sub ? FMA(one, by, c->part[t]) : MULF(one, by);
            }
            if (step == KTL_FINE && (column + step) % sub) continue;
            if (!f->has_scale) { /* int8_channel's only at the end */
#pragma GCC unroll 4
                for (int t = 0; t < T; t++)
                    c->sum[t][o] = f->d_cols ? FMA(c->part[t], LOADF(c->d + at), c->sum[t][o])
                                             : ADDF(c->part[t], c->sum[t][o]);
                continue;
            }
            const uint8_t *b = c->scales + s * KTL_PANEL + at;
            const VI lanes = format == KTL_Q2_K ? ANDI(U8_LANES(b), SET1I(15))
                             : f->has_min       ? U8_LANES(b)
                                                : I8_LANES(b);
            const VF scale = TO_FLOAT(lanes);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) c->sum[t][o] = FMA(c->part[t], scale, c->sum[t][o]);
            if (!has_offset(format)) continue;
            const VF min = TO_FLOAT(format == KTL_Q2_K ? DOWNI(U8_LANES(b), 4)
                                                       : U8_LANES(c->mins + s * KTL_PANEL + at));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) c->offset[t][o] = FMA(min, SET1F(act[t]->sum[s]), c->offset[t][o]);
        }
    }
}

KTL_INLINE void dot_packed_int8(int format, int T, const uint8_t *head, const uint8_t *p, int groups,
                                const uint8_t *far, const ktl_act *const *act, float *const *acc) {
    const ktl_format_info *f = &ktl_formats[format];
    const int subs = KTL_CHUNK / f->sub;
    packed_chunk c = {.codes = p, .scales = p + groups * 64 * (f->base_bits + f->high_bits), .far = far};
    c.mins = c.scales + subs * KTL_PANEL;
    if (f->has_scale) {
        F16X16(c.scales + subs * KTL_PANEL * (1 + f->has_min), c.d);
        if (ktl_has_dmin(format)) F16X16(c.scales + subs * KTL_PANEL * (1 + f->has_min) + 32, c.dmin);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int o = 0; o < VN; o++) c.sum[t][o] = c.offset[t][o] = ZEROF();
    /* Where a token is alone, what addresses and counters take would be a third of all instructions. */
    if (T == 1 && far && groups == KTL_CHUNK / KTL_GROUP) {
#pragma GCC unroll 8
        for (size_t g = 0; g < KTL_CHUNK / KTL_GROUP; g++)
            dot_group(format, T, 1, g, KTL_CHUNK / KTL_GROUP, act, &c);
    } else {
        for (size_t g = 0; g < (size_t)groups; g++) dot_group(format, T, far != NULL, g, (size_t)groups, act, &c);
    }
    const float *d = format == KTL_INT8_CHANNEL ? (const float *)head : c.d;
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) /* one by one: a token's second term has its sums too */
#pragma GCC unroll 2
        for (int o = 0; o < VN; o++) {
            const int at = o * LANES;
            VF sum = LOADF(acc[t] + at);
            if (f->has_scale || format == KTL_INT8_CHANNEL) sum = FMA(c.sum[t][o], LOADF(d + at), sum);
            else sum = ADDF(c.sum[t][o], sum);
            if (has_offset(format)) sum = FNMA(c.offset[t][o], LOADF(c.dmin + at), sum);
            STOREF(acc[t] + at, sum);
        }
}

KTL_INLINE void dot_packed_float(int format, int T, const uint8_t *chunk, int groups, const uint8_t *far,
                                 const float *const *act, float *const *acc) {
    const int size = ktl_formats[format].block_bytes;
    VF sum[2][FEW][VN]; /* even and odd columns */
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) {
            sum[0][t][o] = LOADF(acc[t] + o * (VB / 4));
            sum[1][t][o] = ZEROF();
        }
    for (int c = 0; c < groups * KTL_GROUP; c += 2) {
        float w[2][KTL_PANEL] KTL_ALIGNED;
        const uint8_t *p = chunk + c * KTL_PANEL * size;
        if (far) fetch(far, (size_t)(c * KTL_PANEL * size), (size_t)((c + 2) * KTL_PANEL * size));
        if (format == KTL_F32) memcpy(w, p, sizeof w);
        else pair_to_floats(format, p, w[0], w[1]);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const float *x = act[t] + c;
#pragma GCC unroll 2
            for (int o = 0; o < VN; o++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++)
                    sum[j][t][o] = FMA(LOADF(w[j] + o * (VB / 4)), SET1F(x[j]), sum[j][t][o]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) STOREF(acc[t] + o * (VB / 4), ADDF(sum[0][t][o], sum[1][t][o]));
}

KTL_INLINE void dot_packed_as(int format, const uint8_t *panel, int64_t cols, const uint8_t *act,
                              int64_t act_chunk, const ktl_job *job) {
    const int64_t act_bytes = (int64_t)ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    const int64_t all = job->n * job->terms; /* a token's second term is one more token with its sums */
    const int64_t each = ktl_ceil(all, ktl_ceil(all, FEW)); /* 5 tokens are 3 and 2 */
    const uint8_t *chunk = panel + ktl_head_bytes(format);
    for (int64_t column = 0; column < cols; column += KTL_CHUNK, act += act_chunk) {
        const int whole = KTL_CHUNK / KTL_GROUP;
        const int groups = cols - column < KTL_CHUNK ? (int)ktl_ceil(cols - column, KTL_GROUP) : whole;
        const uint8_t *far = chunk + KTL_FAR;
        if (far >= job->end) far = job->then + (far - job->end);
        for (int64_t first = 0; first < all; first += each, far = NULL) {
            const void *a[FEW];
            float *acc[FEW];
            const int T = (int)(all - first < each ? all - first : each);
            for (int t = 0; t < T; t++) {
                int64_t token = first + t, at = 0;
                if (job->terms > 1) at = token % job->terms * job->term_bytes, token /= job->terms;
                a[t] = act + (job->act_index ? job->act_index[token] : token) * act_bytes + at;
                acc[t] = ktl_sums(job, token);
            }
#define PASS(T)                                                                                             \
    case T:                                                                                                 \
        if (ktl_is_float(format))                                                                           \
            dot_packed_float(format, T, chunk, groups, far, (const float *const *)a, acc);                  \
        else dot_packed_int8(format, T, panel, chunk, groups, far, (const ktl_act *const *)a, acc);         \
        break;
            switch (T) { PASS(1) PASS(2) PASS(3) PASS(4) }
#undef PASS
        }
        chunk += ktl_chunk_bytes_as(format, whole);
    }
}
