/* The kernels of one instruction set with vectors of VB bytes. Included by isa_avx2.c and
 * isa_avx512_vnni.c, which define before:
 *     VB           bytes of a vector; VN = 64 / VB vectors hold 16 lanes of 32 bits
 *     TOKENS       tokens that one pass of the inner loop keeps in registers, at most 8
 *     PANELS       panels of 16 rows that it keeps, 1 or 2
 *     VI, VF       integer and float vector types
 *     DOT(sum, u, s)       32-bit sums += four products of unsigned and signed bytes
 *     DOT_WIDE(sum, u, s)  the same where u exceeds 127 (may want `u` and `s` both signed: WIDE_ZERO)
 *     WIDE_ZERO    the zero that codes have in DOT_WIDE: 128 (unsigned) or 0 (it flips the sign bit)
 *     FMA(a, b, c) FNMA(a, b, c)      a * b + c, c - a * b, rounded once
 *     SET1F SET1I LOADI LOADF STOREF ZEROF TO_FLOAT ADDF SUBF MULF ANDI
 *     SHIFT4I(v)   32-bit lanes >> 4
 *     LOOKUP(codes)                   iq4 levels + 128
 *     U8_LANES(p) I8_LANES(p)         bytes to 32-bit lanes
 *     row_chunk    256 columns of one row of blocks: codes (table codes looked up), float32 scales
 *                  and -minima per sub-block
 *     row_load(format, row, column, cols, chunk)   row_store(chunk, code, scale, offset)
 *     dot_row(format, chunk, act, sum)             the chunk times one token's
 *     TRANSPOSE16(src, stride, dst)   16 x 16 words of 32 bits
 *     F16X16(src, dst)                16 float16 to float32
 */
#include "arithmetic.h"
#include "blocks.h"

enum { VN = 64 / VB };

typedef uint16_t lanes16 __attribute__((vector_size(VB), may_alias, aligned(1)));

/* Bytes of so many columns in blocks form. */
KTL_INLINE int64_t bytes_of_columns(int format, int64_t cols) {
    const ktl_format_info *f = &ktl_formats[format];
    return f->block_cols ? cols / f->block_cols * f->block_bytes : cols;
}

KTL_INLINE void fetch(const void *p, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch((const uint8_t *)p + at);
}

KTL_INLINE int has_offset(int format) {
    return ktl_formats[format].has_min || format == KTL_Q2_K;
}
KTL_INLINE int wide(int format) { return ktl_formats[format].zero == 128; }
KTL_INLINE int zero_of(int format) {
    return wide(format) ? WIDE_ZERO : ktl_formats[format].zero;
}

static ktl_act_key act_key(int format) {
    const ktl_act_key floats = {KTL_ACT_F32, 0, 0, 1};
    return ktl_is_float(format) ? floats : ktl_act_int8(format, zero_of(format));
}

/* ---- tiles -------------------------------------------------------------------------------------- */
/* A group of 32 columns of 16 rows to eight code vectors; planes as packed.h says. */
KTL_INLINE void unpack_in_registers(int format, const uint8_t *src, VI w[8][VN]) {
    const ktl_format_info *f = &ktl_formats[format];
    const int base = f->base_bits, high = f->high_bits;
    for (int o = 0; o < VN; o++)
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) {
            lanes16 c = *(const lanes16 *)(src + 64 * (v * base / 8) + o * VB);
            if (base != 8) c = (c >> (v * base % 8)) & (uint16_t)(((1 << base) - 1) * 0x0101);
            if (high) {
                const int from = v * high % 8, to = base;
                lanes16 h = *(const lanes16 *)(src + 64 * (base + v * high / 8) + o * VB);
                h = to >= from ? h << (to >= from ? to - from : 0) : h >> (from > to ? from - to : 0);
                c |= h & (uint16_t)((((1 << high) - 1) << base) * 0x0101);
            }
            if (f->table) c = (lanes16)LOOKUP((VI)c);
            w[v][o] = (VI)c;
        }
}

KTL_INLINE void decode_packed_as(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                                 ktl_tile *tile) {
    const ktl_format_info *f = &ktl_formats[format];
    const uint8_t *p = chunk;
    if (ktl_is_float(format)) {
        int pairs = groups * KTL_GROUP / 2;
        if (format == KTL_F32) {
            memcpy(tile->f32, p, (size_t)pairs * 2 * KTL_PANEL * sizeof(float));
            return;
        }
        for (int i = 0; i < pairs; i++)
            for (int j = 0; j < 2; j++)
                for (int r = 0; r < KTL_PANEL; r++) {
                    uint16_t h = (uint16_t)(((const uint32_t *)(const void *)p)[16 * i + r] >> 16 * j);
                    tile->f32[(2 * i + j) * KTL_PANEL + r] =
                        format == KTL_BF16 ? ktl_bf16(h) : ktl_f16(h);
                }
        return;
    }
    tile->codes = f->base_bits == 8 ? p : tile->code;
    if (f->base_bits != 8)
        for (int g = 0; g < groups; g++) {
            VI w[8][VN];
            unpack_in_registers(format, p + (size_t)g * 64 * (f->base_bits + f->high_bits), w);
            memcpy(tile->code + 512 * g, w, sizeof w);
        }
    p += (size_t)groups * 64 * (f->base_bits + f->high_bits);
    if (format == KTL_INT8_CHANNEL) {
        memcpy(tile->scale[0], head, 64);
        return;
    }
    if (!f->has_scale) {
        int n = (int)ktl_ceil((int64_t)groups * KTL_GROUP, f->d_cols);
        for (int s = 0; s < n; s++) F16X16(p + 32 * s, tile->scale[s]);
        return;
    }
    const int subs = KTL_CHUNK / f->sub;
    const uint8_t *scale = p, *min = p + subs * KTL_PANEL;
    float d[KTL_PANEL] KTL_ALIGNED, dmin[KTL_PANEL] KTL_ALIGNED;
    p += subs * KTL_PANEL * (1 + f->has_min);
    F16X16(p, d);
    if (ktl_has_dmin(format)) F16X16(p + 32, dmin);
    for (int v = 0; v < VN; v++) {
        const int at = v * (VB / 4);
        const VF dv = LOADF(d + at), minus = ktl_has_dmin(format) ? SUBF(ZEROF(), LOADF(dmin + at)) : dv;
#pragma GCC unroll 16
        for (int s = 0; s < subs; s++) {
            const uint8_t *b = scale + s * KTL_PANEL + at;
            float *to = tile->scale[s] + at, *offset = tile->offset[s] + at;
            if (format == KTL_Q2_K) {
                STOREF(to, MULF(dv, TO_FLOAT(ANDI(U8_LANES(b), SET1I(15)))));
                STOREF(offset, MULF(minus, TO_FLOAT(SHIFT4I(U8_LANES(b)))));
            } else if (f->has_min) {
                STOREF(to, MULF(dv, TO_FLOAT(U8_LANES(b))));
                STOREF(offset, MULF(minus, TO_FLOAT(U8_LANES(min + s * KTL_PANEL + at))));
            } else {
                STOREF(to, MULF(dv, TO_FLOAT(I8_LANES(b))));
            }
        }
    }
}

KTL_INLINE void decode_blocks_as(int format, const uint8_t *row, int64_t row_bytes, int rows,
                                 int64_t column, int cols, ktl_tile *tile) {
    if (ktl_is_float(format)) {
        float line[KTL_PANEL][KTL_CHUNK] KTL_ALIGNED;
        int padded = (cols + 31) / 32 * 32;
        for (int r = 0; r < KTL_PANEL; r++) {
            const uint8_t *p = row + r * row_bytes + column * ktl_formats[format].block_bytes;
            int n = r < rows ? cols : 0;
            if (format == KTL_F32) memcpy(line[r], p, (size_t)n * 4);
            else
                for (int i = 0; i < n; i++)
                    line[r][i] = format == KTL_BF16 ? ktl_bf16(ktl_load16(p + 2 * i))
                                                    : ktl_f16(ktl_load16(p + 2 * i));
            memset(line[r] + n, 0, (size_t)(padded - n) * 4);
        }
        for (int c = 0; c < padded; c += 16)
            TRANSPOSE16((const uint32_t *)line + c, KTL_CHUNK, (uint32_t *)tile->f32 + c * KTL_PANEL);
        return;
    }
    struct KTL_ALIGNED {
        uint8_t code[KTL_PANEL][KTL_CHUNK];
        float scale[KTL_PANEL][16], offset[KTL_PANEL][16];
    } lines;
    for (int r = 0; r < rows; r++) {
        row_chunk chunk;
        row_load(format, row + r * row_bytes, column, cols, &chunk);
        row_store(&chunk, lines.code[r], lines.scale[r], lines.offset[r]);
    }
    for (int r = rows; r < KTL_PANEL; r++) {
        memset(lines.code[r], 0, KTL_CHUNK);
        memset(lines.scale[r], 0, 64);
        memset(lines.offset[r], 0, 64);
    }
    for (int c = 0; c < cols; c += 64)
        TRANSPOSE16((const uint32_t *)lines.code + c / 4, KTL_CHUNK / 4,
                    (uint32_t *)tile->code + c * 4);
    TRANSPOSE16((const uint32_t *)lines.scale, 16, (uint32_t *)tile->scale);
    if (has_offset(format))
        TRANSPOSE16((const uint32_t *)lines.offset, 16, (uint32_t *)tile->offset);
    tile->codes = tile->code;
}

/* ---- activations ---------------------------------------------------------------------------------- */
static void prepare(ktl_act_key key, const float *x, int cols, void *out) {
    float padded[KTL_CHUNK] KTL_ALIGNED;
    if (key.kind == KTL_ACT_F32) {
        memcpy(out, x, (size_t)cols * 4);
        memset((float *)out + cols, 0, (size_t)(KTL_CHUNK - cols) * 4);
        return;
    }
    if (cols < KTL_CHUNK) {
        memcpy(padded, x, (size_t)cols * 4);
        memset(padded + cols, 0, (size_t)(KTL_CHUNK - cols) * 4);
        x = padded;
    }
    ktl_quantize_act(key, x, (ktl_act *)out);
}

/* ---- the inner loops --------------------------------------------------------------------------------- */
enum { RV = PANELS * VN }; /* vectors of one column: PANELS x 16 rows */

/* The integer sums start from 1.5 * 2^23, as the bits of that float: what they hold is then a float
 * already, 1.5 * 2^23 + sum, as long as |sum| < 2^22 (32 columns of codes up to 255: 2^20). One FMA
 * scales it and takes the start off again, exactly, because a float16 scale leaves bits to spare. */
enum { FLOAT_START = 0x4b400000 };

/* What the next pass reads lies beyond L1 and is fetched meanwhile: a line of its tokens' activations
 * for every 32 columns, and the lines of its sums. */
#define FETCH_ACTS(T, bytes, at)                                                                    \
    _Pragma("GCC unroll 8") for (int t = 0; t < (T); t++)                                           \
        __builtin_prefetch((const uint8_t *)act + ((T) + t) * (bytes) + (at))
#define FETCH_SUMS(T, panels)                                                                       \
    _Pragma("GCC unroll 8") for (int t = 0; t < (T); t++)                                           \
        _Pragma("GCC unroll 4") for (int p = 0; p < (panels); p++)                                  \
            __builtin_prefetch(next[t] + p * KTL_PANEL)

#define STEP_OF(T, R, columns, is_wide)                                                             \
    _Pragma("GCC unroll 8") for (int j = 0; j < (columns); j += 4) {                                \
        VI w[R];                                                                                    \
        _Pragma("GCC unroll 4") for (int r = 0; r < (R); r++)                                       \
            w[r] = LOADI(codes[r / VN] + at * 16 + (j * 16 + r % VN * VB));                         \
        _Pragma("GCC unroll 8") for (int t = 0; t < (T); t++) {                                     \
            int32_t four;                                                                           \
            memcpy(&four, act[t].q + at + j, 4);                                                        \
            const VI xt = SET1I(four);                                                              \
            _Pragma("GCC unroll 4") for (int r = 0; r < (R); r++)                                   \
                dot[t][r] = (is_wide) ? DOT_WIDE(dot[t][r], w[r], xt) : DOT(dot[t][r], w[r], xt);   \
        }                                                                                           \
    }

/* T tokens x PANELS tiles, a scale for every 16 or 32 columns: the float sums stay in registers. */
KTL_INLINE void multiply_short(int T, int sub, int mins, int is_wide, const ktl_tile *tile,
                               int groups, const ktl_act *act, float *const *acc,
                               float *const *next) {
    const uint8_t *codes[PANELS];
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) sum[t][r] = LOADF(acc[t] + r * (VB / 4));
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; p++) codes[p] = tile[p].codes;
    FETCH_SUMS(T, PANELS);
    for (int64_t g = 0; g < groups; g++) {
        VF part[8][RV], start[RV];
        const int64_t s0 = g * (KTL_GROUP / sub);
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) {
            VF scales = LOADF(tile[r / VN].scale[s0] + r % VN * (VB / 4));
            if (sub < KTL_GROUP)
                scales = ADDF(scales, LOADF(tile[r / VN].scale[s0 + 1] + r % VN * (VB / 4)));
            start[r] = MULF(scales, SET1F(-12582912.0f));
        }
        FETCH_ACTS(T, sizeof(ktl_act), 64 * g);
#pragma GCC unroll 2
        for (int h = 0; h < KTL_GROUP / sub; h++) {
            VI dot[8][RV];
            const int64_t s = s0 + h, at = g * KTL_GROUP + h * sub;
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const VI init = mins ? SET1I(FLOAT_START) : ADDI(SET1I(act[t].init[s]), SET1I(FLOAT_START));
#pragma GCC unroll 4
                for (int r = 0; r < RV; r++) dot[t][r] = init;
            }
            STEP_OF(T, RV, sub, is_wide)
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) {
                const VF scale = LOADF(tile[r / VN].scale[s] + r % VN * (VB / 4));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    part[t][r] = FMA(AS_FLOAT(dot[t][r]), scale, h ? part[t][r] : start[r]);
                if (!mins) continue;
                const VF offset = LOADF(tile[r / VN].offset[s] + r % VN * (VB / 4));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    sum[t][r] = FMA(offset, SET1F(act[t].sum[s]), sum[t][r]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const VF scale = SET1F(act[t].scale[g]);
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) sum[t][r] = FMA(part[t][r], scale, sum[t][r]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) STOREF(acc[t] + r * (VB / 4), sum[t][r]);
}

/* T tokens x LONG_PANELS tiles, a scale for 128 or 256 columns: the registers are worth more to the
 * integer sums, the more of them the fewer loads a product. */
enum { LV = LONG_PANELS * VN };
KTL_INLINE void multiply_long(int T, int sub, int is_wide, const ktl_tile *tile, int groups,
                              const ktl_act *act, float *const *acc, float *const *next) {
    const int64_t cols = groups * KTL_GROUP;
    const uint8_t *codes[LONG_PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < LONG_PANELS; p++) codes[p] = tile[p].codes;
    FETCH_SUMS(T, LONG_PANELS);
    for (int64_t c = 0; c < cols; c += sub) {
        const int64_t s = c / sub, end = c + sub < cols ? c + sub : cols;
        VI dot[8][LV];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const VI init = SET1I(act[t].init[s]);
#pragma GCC unroll 4
            for (int r = 0; r < LV; r++) dot[t][r] = init;
        }
        for (int64_t at = c; at < end; at += KTL_GROUP) {
            FETCH_ACTS(T, sizeof(ktl_act), 2 * at);
            STEP_OF(T, LV, KTL_GROUP, is_wide)
        }
#pragma GCC unroll 4
        for (int r = 0; r < LV; r++) {
            const VF scale = LOADF(tile[r / VN].scale[s] + r % VN * (VB / 4));
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                float *to = acc[t] + r * (VB / 4);
                STOREF(to, FMA(MULF(TO_FLOAT(dot[t][r]), scale), SET1F(act[t].scale[s]), LOADF(to)));
            }
        }
    }
}

KTL_INLINE void multiply_f32(int T, const ktl_tile *tile, int groups, const float *act,
                             float *const *acc, float *const *next) {
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) sum[t][r] = LOADF(acc[t] + r * (VB / 4));
    FETCH_SUMS(T, PANELS);
    for (int c = 0; c < groups * KTL_GROUP; c++) {
        if (c % 16 == 0) FETCH_ACTS(T, KTL_CHUNK * sizeof(float), 4 * c);
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
        for (int r = 0; r < RV; r++) STOREF(acc[t] + r * (VB / 4), sum[t][r]);
}

/* `next`: the sums of the pass after this one. */
typedef void (*inner_loop)(const ktl_tile *, int, const void *act, float *const *acc,
                           float *const *next);

#define LOOP(name, call)                                                                            \
    static void name(const ktl_tile *tile, int groups, const void *act, float *const *acc,          \
                     float *const *next) {                                                          \
        call;                                                                                       \
    }
#define SHORT_LOOP(T, sub, mins, is_wide)                                                           \
    LOOP(int8_##sub##_##mins##is_wide##_##T,                                                        \
         multiply_short(T, sub, mins, is_wide, tile, groups, act, acc, next))
#define LONG_LOOP(T, sub, is_wide)                                                                  \
    LOOP(int8_##sub##_0##is_wide##_##T, multiply_long(T, sub, is_wide, tile, groups, act, acc, next))
#define F32_LOOP(T) \
    LOOP(f32_##T, multiply_f32(T, tile, groups, act, acc, next))
/* One copy for each number of tokens; those that one pass does not take are no copies. */
#define UP_TO_3(L, ...) L(1, ##__VA_ARGS__) L(2, ##__VA_ARGS__) L(3, ##__VA_ARGS__)
#define UP_TO_5(L, ...) UP_TO_3(L, ##__VA_ARGS__) L(4, ##__VA_ARGS__) L(5, ##__VA_ARGS__)
#define UP_TO_6(L, ...) UP_TO_5(L, ##__VA_ARGS__) L(6, ##__VA_ARGS__)
#define TABLE_3(name) {name##_1, name##_2, name##_3}
#define TABLE_5(name) {name##_1, name##_2, name##_3, name##_4, name##_5}
#define TABLE_6(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
JOIN(UP_TO_, TOKENS)(SHORT_LOOP, 16, 0, 0)
JOIN(UP_TO_, TOKENS)(SHORT_LOOP, 16, 1, 0)
JOIN(UP_TO_, TOKENS)(SHORT_LOOP, 32, 0, 0)
JOIN(UP_TO_, TOKENS)(SHORT_LOOP, 32, 0, 1)
JOIN(UP_TO_, TOKENS)(SHORT_LOOP, 32, 1, 0)
JOIN(UP_TO_, TOKENS)(F32_LOOP)
JOIN(UP_TO_, LONG_TOKENS)(LONG_LOOP, 128, 0)
JOIN(UP_TO_, LONG_TOKENS)(LONG_LOOP, 256, 1)

static const inner_loop *loops_of(int format) {
#define SHORTS JOIN(TABLE_, TOKENS)
#define LONGS JOIN(TABLE_, LONG_TOKENS)
    static const inner_loop f32[] = SHORTS(f32), s16[] = SHORTS(int8_16_00),
                            s16m[] = SHORTS(int8_16_10), s32[] = SHORTS(int8_32_00),
                            s32w[] = SHORTS(int8_32_01), s32m[] = SHORTS(int8_32_10),
                            s128[] = LONGS(int8_128_00), s256[] = LONGS(int8_256_01);
    const ktl_format_info *f = &ktl_formats[format];
    if (ktl_is_float(format)) return f32;
    if (f->sub == 16) return format == KTL_Q2_K ? s16m : s16;
    if (f->sub == 32) return f->has_min ? s32m : wide(format) ? s32w : s32;
    return f->sub == 128 ? s128 : s256;
}

static void multiply(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job) {
    const inner_loop *loops = loops_of(format);
    const size_t act_bytes = ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    const int is_long = ktl_formats[format].sub > KTL_GROUP;
    const int most = is_long ? LONG_TOKENS : TOKENS, step = is_long ? LONG_PANELS : PANELS;
    ktl_ahead ahead = job->ahead;
    float *acc[8], *next[8];
    for (int64_t t = 0; t < job->n;) {
        /* Even shares: 7 tokens are 4 and 3, not 6 and 1. */
        const int64_t left = job->n - t;
        const int T = (int)ktl_ceil(left, ktl_ceil(left, most));
        for (int i = 0; i < T; i++) {
            acc[i] = ktl_sums(job, t + i);
            next[i] = ktl_sums(job, t + T + i < job->n ? t + T + i : t);
        }
        const uint8_t *act = (const uint8_t *)job->act + (size_t)t * act_bytes;
        for (int p = 0; p < panels; p += step) {
            ktl_fetch(&ahead, T * step, job->n * panels);
            loops[T - 1](tiles + p, groups, act, acc, next);
            for (int i = 0; i < T; i++) {
                acc[i] += step * KTL_PANEL;
                next[i] += step * KTL_PANEL;
            }
        }
        t += T;
    }
}

/* ---- few tokens on file blocks: one row at a time, no tile ------------------------------------------ */
KTL_INLINE void dot_blocks_as(int format, const uint8_t *row, int64_t row_bytes, int rows,
                              int64_t cols, const void *act, int64_t chunk_bytes,
                              const ktl_job *job) {
    const ktl_format_info *f = &ktl_formats[format];
    const size_t act_bytes = ktl_act_bytes(ktl_is_float(format) ? KTL_ACT_F32 : KTL_ACT_INT8);
    for (int64_t first = 0; first < job->n; first += TOKENS) {
        const int T = (int)(job->n - first < TOKENS ? job->n - first : TOKENS);
        for (int r = 0; r < rows; r++) {
            VF sum[TOKENS];
            for (int t = 0; t < TOKENS; t++) sum[t] = ZEROF();
            const uint8_t *p = row + r * row_bytes;
            for (int64_t column = 0; column < cols; column += KTL_CHUNK) {
                const uint8_t *x = (const uint8_t *)act + column / KTL_CHUNK * chunk_bytes;
                int n = (int)(cols - column < KTL_CHUNK ? cols - column : KTL_CHUNK);
                if (ktl_is_float(format)) {
                    float line[KTL_CHUNK] KTL_ALIGNED;
                    const uint8_t *q = p + column * f->block_bytes;
                    if (n < KTL_CHUNK) memset(line, 0, sizeof line);
                    if (format == KTL_F32) memcpy(line, q, (size_t)n * 4);
                    else if (format == KTL_BF16)
                        for (int i = 0; i < n; i++) line[i] = ktl_bf16(ktl_load16(q + 2 * i));
                    else
                        for (int i = 0; i < n; i++) line[i] = ktl_f16(ktl_load16(q + 2 * i));
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
                /* Rows follow each other in memory: what comes 2 KB on is fetched meanwhile. */
                fetch(p + bytes_of_columns(format, column) + 2048,
                      (size_t)bytes_of_columns(format, KTL_CHUNK));
                row_load(format, p, column, n, &chunk);
                for (int t = 0; t < T; t++) {
                    int64_t a = job->act_index ? job->act_index[first + t] : first + t;
                    sum[t] = dot_row(format, &chunk, (const ktl_act *)(x + (size_t)a * act_bytes),
                                     sum[t]);
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
enum { FEW = 4 /* tokens a pass */, FAR = 4096 };

KTL_INLINE void dot_packed_int8(int format, int T, const uint8_t *head, const uint8_t *p, int groups,
                                const ktl_act *const *act, float *const *acc) {
    const ktl_format_info *f = &ktl_formats[format];
    const int sub = f->sub, half = sub < KTL_GROUP ? sub : KTL_GROUP;
    const int group_bytes = 64 * (f->base_bits + f->high_bits), subs = KTL_CHUNK / sub;
    const uint8_t *scales = p + groups * group_bytes;
    const uint8_t *mins = scales + subs * KTL_PANEL;
    float d[KTL_PANEL] KTL_ALIGNED, dmin[KTL_PANEL] KTL_ALIGNED;
    const int share = (int)(ktl_chunk_bytes(format, KTL_CHUNK / KTL_GROUP) * KTL_GROUP / KTL_CHUNK);
    VF sum[FEW][VN];
    VI dot[FEW][VN];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) sum[t][o] = LOADF(acc[t] + o * (VB / 4));
    if (f->has_scale) {
        F16X16(scales + subs * KTL_PANEL * (1 + f->has_min), d);
        if (ktl_has_dmin(format)) F16X16(scales + subs * KTL_PANEL * (1 + f->has_min) + 32, dmin);
    }
    for (int g = 0; g < groups; g++) {
        VI w[8][VN];
        /* What comes FAR bytes on: the memory must not idle while this is computed. */
        fetch(p + FAR + g * share, (size_t)share);
        unpack_in_registers(format, p + g * group_bytes, w);
        if (!f->has_scale && f->d_cols && g * KTL_GROUP % f->d_cols == 0)
            F16X16(scales + 32 * (g * KTL_GROUP / f->d_cols), d);
#pragma GCC unroll 2
        for (int h = 0; h < KTL_GROUP; h += half) {
            const int s = (g * KTL_GROUP + h) / sub;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const ktl_act *a = act[t];
#pragma GCC unroll 2
                for (int o = 0; o < VN; o++) {
                    if ((g * KTL_GROUP + h) % sub == 0) dot[t][o] = SET1I(a->init[s]);
#pragma GCC unroll 8
                    for (int v = h / 4; v < (h + half) / 4; v++) {
                        int32_t four;
                        memcpy(&four, a->q + g * KTL_GROUP + 4 * v, 4);
                        dot[t][o] = wide(format) ? DOT_WIDE(dot[t][o], w[v][o], SET1I(four))
                                                 : DOT(dot[t][o], w[v][o], SET1I(four));
                    }
                }
            }
            if (sub > KTL_GROUP && (g + 1) * KTL_GROUP % sub && g + 1 < groups) continue;
            const int group = sub > KTL_GROUP ? sub : KTL_GROUP;
#pragma GCC unroll 2
            for (int o = 0; o < VN; o++) {
                const int at = o * (VB / 4);
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
                        VI m = format == KTL_Q2_K ? SHIFT4I(U8_LANES(b))
                                                  : U8_LANES(mins + s * KTL_PANEL + at);
                        offset = MULF(LOADF(dmin + at), TO_FLOAT(m));
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    const ktl_act *a = act[t];
                    const VF x = MULF(scale, SET1F(a->scale[(g * KTL_GROUP + h) / group]));
                    sum[t][o] = FMA(TO_FLOAT(dot[t][o]), x, sum[t][o]);
                    if (has_offset(format))
                        sum[t][o] = FNMA(offset, SET1F(a->sum[s]), sum[t][o]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int o = 0; o < VN; o++) STOREF(acc[t] + o * (VB / 4), sum[t][o]);
}

KTL_INLINE void dot_packed_float(int format, int T, const uint8_t *chunk, int groups,
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
        if (format == KTL_F32) memcpy(w, p, sizeof w);
        else
            for (int r = 0; r < KTL_PANEL; r++) {
                uint32_t pair;
                memcpy(&pair, p + 4 * r, 4);
                w[0][r] = format == KTL_BF16 ? ktl_bf16((uint16_t)pair) : ktl_f16((uint16_t)pair);
                w[1][r] = format == KTL_BF16 ? ktl_bf16((uint16_t)(pair >> 16))
                                             : ktl_f16((uint16_t)(pair >> 16));
            }
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
            dot_packed_float(format, T, chunk, groups, (const float *const *)a, acc);               \
        else dot_packed_int8(format, T, head, chunk, groups, (const ktl_act *const *)a, acc);       \
        break;
        switch (T) { PASS(1) PASS(2) PASS(3) PASS(4) }
#undef PASS
    }
}

/* ---- one copy of each per format, chosen by a constant ------------------------------------------------- */
#define EACH_FORMAT(X) X(KTL_F32) X(KTL_F16) X(KTL_BF16) X(KTL_Q8_0) X(KTL_Q4_0) X(KTL_Q5_0) \
    X(KTL_Q2_K) X(KTL_Q3_K) X(KTL_Q4_K) X(KTL_Q5_K) X(KTL_Q6_K) X(KTL_IQ4_NL) X(KTL_IQ4_XS)  \
    X(KTL_INT8_CHANNEL) X(KTL_INT4_GROUP32) X(KTL_INT4_GROUP128)

static void decode_packed(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                          ktl_tile *tile) {
    switch (format) {
#define X(F) case F: decode_packed_as(F, head, chunk, groups, tile); break;
        EACH_FORMAT(X)
#undef X
    }
}

static void decode_blocks(int format, const uint8_t *row, int64_t row_bytes, int rows,
                          int64_t column, int cols, ktl_tile *tile) {
    switch (format) {
#define X(F) case F: decode_blocks_as(F, row, row_bytes, rows, column, cols, tile); break;
        EACH_FORMAT(X)
#undef X
    }
}

static void dot_blocks(int format, const uint8_t *row, int64_t row_bytes, int rows, int64_t cols,
                       const void *act, int64_t chunk_bytes, const ktl_job *job) {
    switch (format) {
#define X(F) case F: dot_blocks_as(F, row, row_bytes, rows, cols, act, chunk_bytes, job); break;
        EACH_FORMAT(X)
#undef X
    }
}

static void dot_packed(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                       const ktl_job *job) {
    switch (format) {
#define X(F) case F: dot_packed_as(F, head, chunk, groups, job); break;
        EACH_FORMAT(X)
#undef X
    }
}

#define KERNELS                                                                                     \
    {act_key,    prepare,    decode_packed, decode_blocks, multiply,                                \
     dot_blocks, dot_packed, ktl_silu_mul,  ktl_scale_row}
