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
KTL_INLINE void dot_packed_int8(int format, int T, const uint8_t *head, const uint8_t *p, int groups,
                                const uint8_t *far, const ktl_act *const *act, float *const *acc) {
    const ktl_format_info *f = &ktl_formats[format];
    const int sub = f->sub, step = sub > KTL_GROUP ? KTL_GROUP : KTL_FINE;
    const int group_bytes = 64 * (f->base_bits + f->high_bits), subs = KTL_CHUNK / sub;
    const uint8_t *scales = p + groups * group_bytes;
    const uint8_t *mins = scales + subs * KTL_PANEL;
    float d[KTL_PANEL] KTL_ALIGNED, dmin[KTL_PANEL] KTL_ALIGNED;
    const int share = (int)(ktl_chunk_bytes_as(format, KTL_CHUNK / KTL_GROUP) * KTL_GROUP / KTL_CHUNK);
    VF sum[FEW][VN], part[FEW]; /* part: of what shares the weights' scale */
    VI dot[FEW][VN], two[FEW];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) sum[t][o] = LOADF(acc[t] + o * (VB / 4));
    if (f->has_scale) {
        F16X16(scales + subs * KTL_PANEL * (1 + f->has_min), d);
        if (ktl_has_dmin(format)) F16X16(scales + subs * KTL_PANEL * (1 + f->has_min) + 32, dmin);
    }
    for (int g = 0; g < groups; g++) {
        /* The memory must not idle while this is computed. */
        fetch(far, (size_t)(g * share), (size_t)((g + 1) * share));
        if (!f->has_scale && f->d_cols && g * KTL_GROUP % f->d_cols == 0)
            F16X16(scales + 32 * (g * KTL_GROUP / f->d_cols), d);
#pragma GCC unroll 2
        for (int o = 0; o < VN; o++) {
            const int at = o * (VB / 4);
            VI w[8];
            unpack_in_registers(format, p + g * group_bytes, o, w);
#pragma GCC unroll 2
            for (int h = 0; h < KTL_GROUP; h += step) {
                const int column = g * KTL_GROUP + h, s = column / sub;
                const int run = run_of(format) < step / 4 ? run_of(format) : step / 4;
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    const ktl_act *a = act[t];
                    if (step == KTL_FINE || column % sub == 0) dot[t][o] = SET1I(a->init[column / KTL_FINE]);
#pragma GCC unroll 8
                    for (int v = h / 4; v < (h + step) / 4; v++) {
                        int32_t four;
                        memcpy(&four, a->q + g * KTL_GROUP + 4 * v, 4);
                        dot[t][o] = run ? DOT_RUN(dot[t][o], two[t], v, run, w[v], SET1I(four))
                                        : DOT_WIDE(dot[t][o], w[v], SET1I(four));
                    }
                }
                if (sub > KTL_GROUP && (g + 1) * KTL_GROUP % sub && g + 1 < groups) continue;
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    const VF one = TO_FLOAT(dot[t][o]), by = SET1F(act[t]->scale[column / KTL_FINE]);
                    part[t] = step == KTL_FINE && column % sub ? FMA(one, by, part[t]) : MULF(one, by);
                }
                if (step == KTL_FINE && (column + step) % sub) continue;
                VF scale, offset;
                if (format == KTL_INT8_CHANNEL) {
                    scale = LOADF((const float *)head + at);
                } else if (!f->has_scale) {
                    scale = LOADF(d + at);
                } else {
                    const uint8_t *b = scales + s * KTL_PANEL + at;
                    VI lanes = format == KTL_Q2_K ? ANDI(U8_LANES(b), SET1I(15))
                               : f->has_min       ? U8_LANES(b)
                                                  : I8_LANES(b);
                    scale = MULF(LOADF(d + at), TO_FLOAT(lanes));
                    if (has_offset(format)) {
                        VI m = format == KTL_Q2_K ? DOWNI(U8_LANES(b), 4)
                                                  : U8_LANES(mins + s * KTL_PANEL + at);
                        offset = MULF(LOADF(dmin + at), TO_FLOAT(m));
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    sum[t][o] = FMA(part[t], scale, sum[t][o]);
                    if (has_offset(format))
                        sum[t][o] = FNMA(offset, SET1F(act[t]->sum[s]), sum[t][o]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) STOREF(acc[t] + o * (VB / 4), sum[t][o]);
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
        fetch(far, (size_t)(c * KTL_PANEL * size), (size_t)((c + 2) * KTL_PANEL * size));
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

KTL_INLINE void dot_packed_as(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                              const ktl_job *job) {
    const size_t act_bytes = ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    const void *a[FEW];
    float *acc[FEW];
    for (int64_t first = 0; first < job->n; first += FEW) {
        const int T = (int)(job->n - first < FEW ? job->n - first : FEW);
        for (int t = 0; t < T; t++) {
            int64_t x = job->act_index ? job->act_index[first + t] : first + t;
            int64_t y = job->acc_index ? job->acc_index[first + t] : first + t;
            a[t] = (const uint8_t *)job->act + (size_t)x * act_bytes;
            acc[t] = job->acc + y * job->acc_stride;
        }
#define PASS(T)                                                                                     \
    case T:                                                                                         \
        if (ktl_is_float(format))                                                                   \
            dot_packed_float(format, T, chunk, groups, job->far, (const float *const *)a, acc);     \
        else dot_packed_int8(format, T, head, chunk, groups, job->far, (const ktl_act *const *)a,   \
                             acc);                                                                  \
        break;
        switch (T) { PASS(1) PASS(2) PASS(3) PASS(4) }
#undef PASS
    }
}
