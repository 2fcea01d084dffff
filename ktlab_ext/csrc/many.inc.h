/* Many tokens against decoded tiles: the inner loops, in the words of kernel.inc.h. */
enum { RV = PANELS * VN }; /* vectors of one column: PANELS x 16 rows */

/* The integer sums start from 1.5 * 2^23 (KTL_START), as the bits of that float: what they hold is then a
 * float already, 1.5 * 2^23 + sum, as long as |sum| < 2^22 (32 columns of codes up to 255: 2^20). One FMA
 * scales it and takes the start off again, exactly, because a float16 scale leaves bits to spare.
 * Two halves of 16 columns share what is taken off: between them half a unit of the second sum is
 * rounded away, 1e-4 of a product where rounding the activations costs 6e-3. */

/* What the next pass reads lies beyond L1 and is fetched meanwhile: a line of its tokens' activations
 * for every 32 columns, and the lines of its sums. */
#define FETCH_ACTS(T, bytes, at)                                                                    \
    _Pragma("GCC unroll 8") for (int t = 0; t < (T); t++)                                           \
        __builtin_prefetch((const uint8_t *)act + ((T) + t) * (bytes) + (at))
#define FETCH_SUMS(T, panels, g)                                                                    \
    if ((g) < (T))                                                                                  \
        _Pragma("GCC unroll 4") for (int p = 0; p < (panels); p++)                                  \
            __builtin_prefetch(acc + ((T) + (g)) * stride + p * KTL_PANEL)

/* Scales of the r-th vector of rows in sub-block s. */
#define SCALE_OF(r, s) (tile[(r) / VN].scale[s] + (r) % VN * (VB / 4))

/* Columns [at, at + columns) of R vectors of rows times T tokens; run: as run_of says. */
#define STEP_OF(T, R, columns, run)                                                                 \
    _Pragma("GCC unroll 8") for (int j = 0; j < (columns); j += 4) {                                \
        VI w[R];                                                                                    \
        _Pragma("GCC unroll 4") for (int r = 0; r < (R); r++)                                       \
            w[r] = LOADI(codes[r / VN] + at * 16 + (j * 16 + r % VN * VB));                         \
        _Pragma("GCC unroll 8") for (int t = 0; t < (T); t++) {                                     \
            int32_t four;                                                                           \
            memcpy(&four, act[t].q + at + j, 4);                                                    \
            const VI xt = SET1I(four);                                                              \
            _Pragma("GCC unroll 4") for (int r = 0; r < (R); r++)                                   \
                dot[t][r] = (run) ? DOT_RUN(dot[t][r], two[t][r], j / 4, run, w[r], xt)            \
                                  : DOT_WIDE(dot[t][r], w[r], xt);                                  \
        }                                                                                           \
    }

/* T tokens x PANELS tiles, a scale for every 16 or 32 columns: the float sums stay in registers.
 * fine: activations with a scale for every 16. */
KTL_INLINE void multiply_short(int T, int sub, int mins, int run, int fine, const ktl_tile *tile,
                               int groups, const ktl_act *act, float *acc, int64_t stride) {
    const int unit = fine ? KTL_FINE : sub;
    const uint8_t *codes[PANELS];
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) sum[t][r] = LOADF(acc + t * stride + r * (VB / 4));
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; p++) codes[p] = tile[p].codes;
    for (int64_t g = 0; g < groups; g++) {
        VF part[8][RV], start[RV];
        const int64_t s0 = g * (KTL_GROUP / sub);
#pragma GCC unroll 4
        for (int r = 0; r < RV && !fine; r++) {
            VF scales = LOADF(SCALE_OF(r, s0));
            if (sub < KTL_GROUP) scales = ADDF(scales, LOADF(SCALE_OF(r, s0 + 1)));
            start[r] = MULF(scales, SET1F(-KTL_START));
        }
        FETCH_ACTS(T, sizeof(ktl_act), 64 * g);
        FETCH_SUMS(T, PANELS, g);
#pragma GCC unroll 2
        for (int h = 0; h < KTL_GROUP / unit; h++) {
            VI dot[8][RV], two[8][RV];
            const int64_t at = g * KTL_GROUP + h * unit, s = at / sub, i = at / KTL_FINE;
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const VI init = SET1I(mins ? KTL_START_BITS : act[t].init[i]);
#pragma GCC unroll 4
                for (int r = 0; r < RV; r++) dot[t][r] = init;
            }
            STEP_OF(T, RV, unit, run)
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) {
                const VF scale = LOADF(SCALE_OF(r, s)), minus = MULF(scale, SET1F(-KTL_START));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const VF product = AS_FLOAT(dot[t][r]), factor = SET1F(act[t].scale[i]);
                    if (!fine) part[t][r] = FMA(product, scale, h ? part[t][r] : start[r]);
                    else sum[t][r] = FMA(FMA(product, scale, minus), factor, sum[t][r]);
                }
                if (!mins || (at + unit) % sub) continue;
                const VF offset = LOADF(tile[r / VN].offset[s] + r % VN * (VB / 4));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    sum[t][r] = FMA(offset, SET1F(act[t].sum[s]), sum[t][r]);
            }
        }
        if (fine) continue;
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++)
                sum[t][r] = FMA(part[t][r], SET1F(act[t].scale[2 * g]), sum[t][r]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) STOREF(acc + t * stride + r * (VB / 4), sum[t][r]);
}

/* T tokens x LONG_PANELS tiles, a scale for 128 or 256 columns: the registers are worth more to the
 * integer sums, the more of them the fewer loads a product. */
enum { LV = LONG_PANELS * VN };
KTL_INLINE void multiply_long(int T, int sub, int run, const ktl_tile *tile, int groups, const ktl_act *act, float *acc, int64_t stride) {
    const int64_t cols = groups * KTL_GROUP;
    const uint8_t *codes[LONG_PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < LONG_PANELS; p++) codes[p] = tile[p].codes;
    for (int64_t c = 0; c < cols; c += sub) {
        const int64_t s = c / sub, end = c + sub < cols ? c + sub : cols;
        VI dot[8][LV], two[8][LV];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const VI init = SET1I(act[t].init[c / KTL_FINE]);
#pragma GCC unroll 4
            for (int r = 0; r < LV; r++) dot[t][r] = init;
        }
        for (int64_t at = c; at < end; at += KTL_GROUP) {
            FETCH_ACTS(T, sizeof(ktl_act), 2 * at);
            FETCH_SUMS(T, LONG_PANELS, at / KTL_GROUP);
            STEP_OF(T, LV, KTL_GROUP, run)
        }
#pragma GCC unroll 4
        for (int r = 0; r < LV; r++) {
            const VF scale = LOADF(SCALE_OF(r, s));
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                float *to = acc + t * stride + r * (VB / 4);
                STOREF(to, FMA(MULF(TO_FLOAT(dot[t][r]), scale), SET1F(act[t].scale[c / KTL_FINE]), LOADF(to)));
            }
        }
    }
}

KTL_INLINE void multiply_f32(int T, const ktl_tile *tile, int groups, const float *act,
                             float *acc, int64_t stride) {
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) sum[t][r] = LOADF(acc + t * stride + r * (VB / 4));
    for (int c = 0; c < groups * KTL_GROUP; c++) {
        if (c % 16 == 0) {
            FETCH_ACTS(T, KTL_CHUNK * sizeof(float), 4 * c);
            FETCH_SUMS(T, PANELS, c / 16);
        }
        VF w[RV];
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) w[r] = LOADF(tile[r / VN].f32 + c * KTL_PANEL + r % VN * (VB / 4));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            VF x = SET1F(act[t * KTL_CHUNK + c]);
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) sum[t][r] = FMA(w[r], x, sum[t][r]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) STOREF(acc + t * stride + r * (VB / 4), sum[t][r]);
}

typedef struct pair_scales pair_scales;
#include "pairs.inc.h"
#if CODE_WORDS
#include "words_avx2.inc.h"
#endif

typedef void (*inner_loop)(const ktl_tile *, const pair_scales *, int groups, const void *act,
                           float *acc, int64_t stride);

#define LOOP(name, call)                                                                            \
    static void name(const ktl_tile *tile, const pair_scales *pairs, int groups,                    \
                     const void *act, float *acc, int64_t stride) {                                 \
        call;                                                                                       \
    }
#define SHORT_LOOP(T, sub, mins, run, fine)                                                         \
    LOOP(int8_##sub##_##mins##run##fine##_##T,                                                      \
         multiply_short(T, sub, mins, run, fine, tile, groups, act, acc, stride))
#define LONG_LOOP(T, sub, run)                                                                      \
    LOOP(int8_##sub##_##T, multiply_long(T, sub, run, tile, groups, act, acc, stride))
#define PAIR_LOOP(T, unit, offsets, dropped)                                                        \
    LOOP(pairs_##unit##_##offsets##dropped##_##T,                                                   \
         multiply_pairs(T, unit, offsets, dropped, tile, pairs, groups, act, acc, stride))
#define F32_LOOP(T)                                                                                 \
    LOOP(f32_##T, multiply_f32(T, tile, groups, act, acc, stride))
/* One copy for each number of tokens; those that one pass does not take are no copies. */
#define UP_TO_3(L, ...) L(1, ##__VA_ARGS__) L(2, ##__VA_ARGS__) L(3, ##__VA_ARGS__)
#define UP_TO_4(L, ...) UP_TO_3(L, ##__VA_ARGS__) L(4, ##__VA_ARGS__)
#define UP_TO_5(L, ...) UP_TO_4(L, ##__VA_ARGS__) L(5, ##__VA_ARGS__)
#define UP_TO_6(L, ...) UP_TO_5(L, ##__VA_ARGS__) L(6, ##__VA_ARGS__)
#define TABLE_3(name) {name##_1, name##_2, name##_3}
#define TABLE_4(name) {name##_1, name##_2, name##_3, name##_4}
#define TABLE_5(name) {name##_1, name##_2, name##_3, name##_4, name##_5}
#define TABLE_6(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
/* Columns that share a scale, minima, whether a product fits 16 bits: what the formats have. */
#if CODE_WORDS
#define SOME_SHORT(X) X(16, 0, 1) X(16, 1, 1) X(32, 0, 1) X(32, 1, 1)
#else
#define SOME_SHORT(X) X(16, 0, 1) X(16, 1, 1) X(32, 0, 0) X(32, 0, 1) X(32, 1, 1)
#endif
#define X(sub, mins, run)                               \
    JOIN(UP_TO_, TOKENS)(SHORT_LOOP, sub, mins, run, 0) \
    JOIN(UP_TO_, TOKENS)(SHORT_LOOP, sub, mins, run, 1)
SOME_SHORT(X)
#undef X
JOIN(UP_TO_, FLOAT_TOKENS)(F32_LOOP)
JOIN(UP_TO_, LONG_TOKENS)(LONG_LOOP, 128, MOST_RUN)
#if !CODE_WORDS
JOIN(UP_TO_, LONG_TOKENS)(LONG_LOOP, 256, 0)
#endif

/* Sums in pairs: the columns of a unit, pairs of offsets, dropped bits that the formats have. */
#if VB == 64
#define SOME_PAIRS(X) X(16, 0, 0) X(16, 0, 1) X(16, 0, 3) X(16, 4, 0) X(16, 8, 0) X(32, 0, 0) X(32, 0, 1) \
    X(32, 0, 4) X(32, 4, 0) X(32, 4, 1)
#else
#define SOME_PAIRS(X) X(16, 0, 0) X(16, 4, 0) X(16, 8, 0) X(32, 0, 0) X(32, 4, 0)
#endif
#define X(unit, offsets, dropped) JOIN(UP_TO_, TOKENS)(PAIR_LOOP, unit, offsets, dropped)
SOME_PAIRS(X)
#undef X

static const inner_loop *pair_loops_of(int format, int fine, int dropped) {
    const int sub = ktl_formats[format].sub, unit = fine ? KTL_FINE : sub;
    const int offsets = has_offset(format) ? KTL_CHUNK / sub / 2 : 0;
#define X(u, o, d)                                                                              \
    static const inner_loop loops_##u##_##o##d[] = JOIN(TABLE_, TOKENS)(pairs_##u##_##o##d); \
    if (unit == u && offsets == o && dropped == d) return loops_##u##_##o##d;
    SOME_PAIRS(X)
#undef X
    return NULL;
}

static const inner_loop *loops_of(int format, int fine) {
#define SHORTS JOIN(TABLE_, TOKENS)
#define LONGS JOIN(TABLE_, LONG_TOKENS)
    static const inner_loop f32[] = JOIN(TABLE_, FLOAT_TOKENS)(f32), s128[] = LONGS(int8_128);
    const ktl_format_info *f = &ktl_formats[format];
    if (ktl_is_float(format)) return f32;
#define X(s, m, r)                                                                                   \
    static const inner_loop short_##s##m##r[2][TOKENS] = {SHORTS(int8_##s##_##m##r##0),              \
                                                          SHORTS(int8_##s##_##m##r##1)};             \
    if (f->sub == s && has_offset(format) == m && wide(format) != r) return short_##s##m##r[fine];
    SOME_SHORT(X)
#undef X
#if !CODE_WORDS
    static const inner_loop s256[] = LONGS(int8_256);
    if (f->sub == 256) return s256;
#endif
    return s128;
}

static void multiply(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job) {
#if CODE_WORDS
    if (job->kind == KTL_ACT_WORDS) {
        multiply_words(format, tiles, panels, groups, job);
        return;
    }
#endif
    const int dropped = job->pairs > 0 ? job->pairs - 1 : 0;
    const inner_loop *loops = job->pairs ? pair_loops_of(format, job->fine, dropped) : loops_of(format, job->fine);
    pair_scales pairs[KTL_TILES];
    const size_t act_bytes = ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    const int is_long = ktl_formats[format].sub > KTL_GROUP;
    const int most = ktl_is_float(format) ? FLOAT_TOKENS : is_long ? LONG_TOKENS : TOKENS;
    const int step = is_long ? LONG_PANELS : PANELS;
    ktl_ahead ahead = job->ahead;
    if (job->pairs) pair_tiles(format, job->fine, panels, groups, tiles, pairs);
    const int64_t share = ktl_share(&ahead, ktl_ceil(job->n, most) * ktl_ceil(panels, step));
    for (int64_t t = 0; t < job->n;) {
        /* Even shares: 7 tokens are 4 and 3, not 6 and 1. */
        const int64_t left = job->n - t;
        const int T = (int)ktl_ceil(left, ktl_ceil(left, most));
        const inner_loop loop = loops[T - 1];
        const uint8_t *act = (const uint8_t *)job->act + (size_t)t * act_bytes;
        for (int p = 0; p < panels; p += step) {
            ktl_fetch(&ahead, share);
            loop(tiles + p, pairs + p, groups, act, job->acc + t * job->acc_stride + p * KTL_PANEL,
                 job->acc_stride);
        }
        t += T;
    }
}
