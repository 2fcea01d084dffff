/* The kernels of one instruction set with vectors of VB bytes. Included by isa_avx2.c and
 * isa_avx512_vnni.c, which define before:
 *     VB           bytes of a vector; VN = 64 / VB vectors hold 16 lanes of 32 bits
 *     TOKENS       tokens that one pass of the inner loop keeps in registers, at most 8
 *     PANELS       panels of 16 rows that it keeps, 1 or 2
 *     PAIRS        the name of the instruction set, for pairs.inc.h
 *     LINES        whether few tokens take file blocks one row after the other (row_avx2.inc.h)
 *     CODE_WORDS   whether many tokens take codes of 8 bits in words (words_avx2.inc.h)
 *     LONG_TOKENS, LONG_PANELS   the same where a scale holds for 128 or 256 columns
 *     FLOAT_TOKENS tokens of float32
 *     MOST_RUN     products that are summed in 16 bits as long as they fit
 *     VI, VF       integer and float vector types
 *     DOT(sum, u, s)       32-bit sums += four products of unsigned and signed bytes
 *     DOT_RUN(sum, two, n, run, u, s)   the same, the n-th: into `two`, and from there to the
 *                          sums after `run` of them
 *     DOT_WIDE(sum, u, s)  the same where u exceeds 127 (may want `u` and `s` both signed: WIDE_ZERO)
 *     DOT_AT(sum, two, n, run, u, p)    DOT_RUN, or DOT_WIDE where `run` is 0, by four bytes at p for all lanes
 *     WIDE_ZERO    the zero that codes have in DOT_WIDE: 128 (unsigned) or 0 (it flips the sign bit)
 *     FMA(a, b, c) FNMA(a, b, c)      a * b + c, c - a * b, rounded once
 *     SET1F SET1I LOADI LOADF STOREF ZEROF TO_FLOAT AS_FLOAT (the bits) ADDF SUBF
 *     STOREI MULF ADDI SUBI ANDI ORI XORI
 *     UPI DOWNI(v, by)     32-bit lanes << and >> (zeros come in)
 *     LOOKUP(codes)                   iq4 levels + 128
 *     U8_LANES(p) I8_LANES(p)         bytes to 32-bit lanes
 *     row_chunk    256 columns of one row of blocks: codes (table codes looked up), float32 scales
 *                  and -minima per sub-block
 *     row_load(format, row, column, cols, chunk)   row_store(chunk, code, scale, offset)
 *     dot_row(format, chunk, act, sum)             the chunk times one token's
 *     and what rows.inc.h names
 *     TRANSPOSE16(src, stride, dst)   16 x 16 words of 32 bits
 *     F16X16(src, dst) BF16X16(src, dst)   16 float16 or bfloat16 to float32
 */
#include "arithmetic.h"
#include "blocks.h"

enum { VN = 64 / VB, LANES = VB / 4 };

typedef uint16_t lanes16 __attribute__((vector_size(VB), may_alias, aligned(1)));
typedef uint16_t halves_16 __attribute__((vector_size(32), may_alias, aligned(1)));
typedef uint32_t words_16 __attribute__((vector_size(64), may_alias, aligned(1)));

/* `n` numbers of f32, f16 or bf16 to float32. */
KTL_INLINE void to_floats(int format, const uint8_t *p, int n, float *to) {
    int i = 0;
    if (format == KTL_F32) {
        memcpy(to, p, (size_t)n * 4);
        return;
    }
    for (; i + 16 <= n; i += 16)
        if (format == KTL_F16) F16X16(p + 2 * i, to + i);
        else BF16X16(p + 2 * i, to + i);
    for (; i < n; i++) {
        const uint16_t h = ktl_load16(p + 2 * i);
        to[i] = format == KTL_F16 ? ktl_f16(h) : ktl_bf16(h);
    }
}

/* Two packed columns of 16 rows, a row's two f16 or bf16 side by side, to float32. */
KTL_INLINE void pair_to_floats(int format, const uint8_t *p, float *first, float *second) {
    const words_16 w = *(const words_16 *)p;
    if (format == KTL_BF16) {
        *(words_16 *)first = w << 16;
        *(words_16 *)second = w & 0xffff0000u;
        return;
    }
    const halves_16 low = __builtin_convertvector(w, halves_16);
    const halves_16 high = __builtin_convertvector(w >> 16, halves_16);
    F16X16((const uint8_t *)&low, first);
    F16X16((const uint8_t *)&high, second);
}

/* Bytes of so many columns in blocks form. */
KTL_INLINE int64_t bytes_of_columns(int format, int64_t cols) {
    const ktl_format_info *f = &ktl_formats[format];
    return f->block_cols ? cols / f->block_cols * f->block_bytes : cols;
}

/* Bytes [from, to) of what begins at p, into L2: L1 has too few buffers to wait for memory in. Of a sequence of
 * such pieces every line is asked for once, with the piece where it begins. */
KTL_INLINE void fetch(const uint8_t *p, size_t from, size_t to) {
    from = (from + 63) / 64 * 64;
    const uint8_t *end = p + to;
    for (p += from; p < end; p = ktl_later(p + 64)) __builtin_prefetch(p, 0, 2);
}

KTL_INLINE int has_offset(int format) {
    return ktl_formats[format].has_min || format == KTL_Q2_K;
}
KTL_INLINE int wide(int format) { return ktl_formats[format].zero == 128; }
KTL_INLINE int zero_of(int format) {
    return wide(format) ? WIDE_ZERO : ktl_formats[format].zero;
}
/* How many products of a lane's two columns are summed before they get 32 bits: up to MOST_RUN that fit 16.
 * 0: not even one does. */
KTL_INLINE int run_of(int format) {
    const int bits = ktl_formats[format].base_bits + ktl_formats[format].high_bits;
    const int fit = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
    return wide(format) ? 0 : fit < MOST_RUN ? fit : MOST_RUN;
}

static ktl_act_key act_key(int format) {
    const ktl_act_key floats = {KTL_ACT_F32, 0, 0, 0, 1, 0, 0};
    return ktl_is_float(format) ? floats : ktl_act_int8(format, zero_of(format));
}

#include "rows.inc.h"

/* ---- tiles -------------------------------------------------------------------------------------- */
/* A group of 32 columns of the o-th VB / 4 rows to eight code vectors; planes as packed.h says. */
KTL_INLINE void unpack_in_registers(int format, const uint8_t *src, int o, VI w[8]) {
    const ktl_format_info *f = &ktl_formats[format];
    const int base = f->base_bits, high = f->high_bits;
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
        w[v] = (VI)c;
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
            pair_to_floats(format, p + 64 * i, tile->f32 + 2 * i * KTL_PANEL,
                           tile->f32 + (2 * i + 1) * KTL_PANEL);
        return;
    }
    tile->codes = f->base_bits == 8 ? p : tile->code;
    if (f->base_bits != 8)
        for (int g = 0; g < groups; g++)
#pragma GCC unroll 2
            for (int o = 0; o < VN; o++) {
                VI w[8];
                unpack_in_registers(format, p + (size_t)g * 64 * (f->base_bits + f->high_bits), o, w);
                /* One by one: memcpy would take them through the stack, and stores are what this waits for. */
#pragma GCC unroll 8
                for (int v = 0; v < 8; v++)
                    *(lanes16 *)(tile->code + 512 * g + 64 * v + o * VB) = (lanes16)w[v];
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
                STOREF(offset, MULF(minus, TO_FLOAT(DOWNI(U8_LANES(b), 4))));
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
            to_floats(format, p, n, line[r]);
            memset(line[r] + n, 0, (size_t)(padded - n) * 4);
        }
        for (int c = 0; c < padded; c += 16)
            TRANSPOSE16((const uint32_t *)line + c, KTL_CHUNK, (uint32_t *)tile->f32 + c * KTL_PANEL);
        return;
    }
    if (ktl_has_rows(format) && rows == KTL_PANEL) {
        for (int o = 0; o < VN; o++)
            decode_rows(format, row + o * LANES * row_bytes, row_bytes, column, cols, o, tile);
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
#define PARTS_BYTES VB
#include "activations.inc.h"

static void prepare(ktl_act_key key, const float *x, int cols, float most, void *out) {
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
    if (key.kind == KTL_ACT_WORDS) quantize_words(x, out);
    else quantize_act(key, x, most, out);
}

#include "few.inc.h"
#include "many.inc.h"
#include "attend.inc.h"
#ifdef ADD_PRODUCTS16_AT
#include "attend_words.inc.h"
#define ATTEND_WORDS attend_words
#else /* a product and an addition for what is one instruction there: no gain over float32 (avx2) */
#define ATTEND_WORDS NULL
#endif

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

static void dot_packed(int format, const uint8_t *panel, int64_t cols, const void *act, int64_t chunk_bytes,
                       const ktl_job *job) {
    switch (format) {
#define X(F) case F: dot_packed_as(F, panel, cols, act, chunk_bytes, job); break;
        EACH_FORMAT(X)
#undef X
    }
}

#define KERNELS                                                                                     \
    {.act_key = act_key, .prepare = prepare, .decode_packed = decode_packed,                        \
     .decode_blocks = decode_blocks, .multiply = multiply, .dot_blocks = dot_blocks,                \
     .dot_packed = dot_packed, .pairs = PAIRS, .lines = LINES, .words = CODE_WORDS, .fine = 1,      \
     .start = KTL_START_BITS, .silu_mul = ktl_silu_mul, .scale_row = ktl_scale_row,                 \
     .add_row = ktl_add_row, .attend = attend, .attend_words = ATTEND_WORDS}
