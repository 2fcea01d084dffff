/* AVX-512 (F, BW, DQ, VL) with VNNI: VPDPBUSD, 64 products an instruction. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2,prefer-vector-width=512")
#endif
#include <immintrin.h>

#include "arithmetic.h"
#include "blocks.h"

#define VB 64
#define TOKENS 6
#define PANELS 2
#define PAIRS KTL_AVX512_VNNI
#define LINES 0
#define CODE_WORDS 0
#define LONG_TOKENS 5
#define LONG_PANELS 4
#define FLOAT_TOKENS 6
#define MOST_RUN 1
#define VI __m512i
#define VF __m512
/* Not the intrinsic: GCC copies its sum from register to register, every third product. */
KTL_INLINE __m512i dot4(__m512i sum, __m512i u, __m512i s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
}
KTL_INLINE __m512i products16(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
/* By four bytes for all lanes. */
typedef int32_t one_lane __attribute__((may_alias));
KTL_INLINE __m512i dot4_at(__m512i sum, __m512i u, const void *p) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*(const one_lane *)p));
    return sum;
}
KTL_INLINE __m512i products16_at(__m512i sum, __m512i a, const void *p) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*(const one_lane *)p));
    return sum;
}
KTL_INLINE __m512i low_to_top(void) { return _mm512_set4_epi32(0x0d0c0000, 0x09080000, 0x05040000, 0x01000000); }
#define DOT(sum, u, s) dot4(sum, u, s)
#define DOT_WIDE(sum, u, s) dot4(sum, u, s)
#define DOT_RUN(sum, two, n, run, u, s) ((void)(two), dot4(sum, u, s))
#define DOT_AT(sum, two, n, run, u, p) ((void)(two), (void)(run), dot4_at(sum, u, p))
#define WIDE_ZERO 128
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FNMA(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define ADDF(a, b) _mm512_add_ps(a, b)
#define SUBF(a, b) _mm512_sub_ps(a, b)
#define MULF(a, b) _mm512_mul_ps(a, b)
#define ADDI(a, b) _mm512_add_epi32(a, b)
#define AS_FLOAT(v) _mm512_castsi512_ps(v)
#define SUBI(a, b) _mm512_sub_epi32(a, b)
#define ANDI(a, b) _mm512_and_si512(a, b)
#define ORI(a, b) _mm512_or_si512(a, b)
#define XORI(a, b) _mm512_xor_si512(a, b)
#define UPI(a, by) _mm512_slli_epi32(a, (unsigned)(by))
#define DOWNI(a, by) _mm512_srli_epi32(a, (unsigned)(by))
#define U8_LANES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define I8_LANES(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define SET1F(x) _mm512_set1_ps(x)
#define SET1I(x) _mm512_set1_epi32(x)
#define LOADI(p) _mm512_loadu_si512(p)
#define LOADF(p) _mm512_loadu_ps(p)
/* For pairs.inc.h */
#define MAXI(a, b) _mm512_max_epi32(a, b)
#define DIVF(a, b) _mm512_div_ps(a, b)
#define ROUND(v) _mm512_cvtps_epi32(v)
#define WHERE_MORE(a, b, yes, no) _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes)
#define WHERE_MOST(a, b, yes, no) _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), yes)
#define TOP_HALVES(top, low) _mm512_mask_blend_epi16(0xaaaaaaaa, low, top)
#define ADD_PRODUCTS16(sum, a, b) products16(sum, a, b)
#define ADD_PRODUCTS16_AT(sum, a, p) products16_at(sum, a, p)
#define LOW_HALVES(top, low) _mm512_mask_shuffle_epi8(low, 0xccccccccccccccccull, top, low_to_top())
#define STOREI(p, v) _mm512_storeu_si512(p, v)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define ZEROF() _mm512_setzero_ps()
#define TO_FLOAT(v) _mm512_cvtepi32_ps(v)
#define SUMF(v) _mm512_reduce_add_ps(v)
#define F16X16(src, dst) \
    _mm512_storeu_ps(dst, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src))))
#define BF16X16(src, dst) \
    _mm512_storeu_si512(dst, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(src))), 16))

/* The table's levels + 128: codes that VPDPBUSD takes as unsigned, with zero = 128. */
KTL_INLINE __m512i lookup(__m512i codes) {
    const __m128i levels = _mm_xor_si128(_mm_loadu_si128((const __m128i *)ktl_iq4_table),
                                         _mm_set1_epi8((char)0x80));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), codes);
}
#define LOOKUP(codes) lookup(codes)

/* For rows.inc.h */
#define ROW_WORDS(p) _mm512_inserti64x4(_mm512_castsi256_si512(two_words(p(0), p(1))), two_words(p(2), p(3)), 1)
#define LOW32(a, b) _mm512_unpacklo_epi32(a, b)
#define TOP32(a, b) _mm512_unpackhi_epi32(a, b)
#define LOW64(a, b) _mm512_unpacklo_epi64(a, b)
#define TOP64(a, b) _mm512_unpackhi_epi64(a, b)
#define CHOOSE_BITS(mask, a, b) _mm512_ternarylogic_epi32(b, a, mask, 0xd8)
#define EACH128(v) _mm512_broadcast_i32x4(v)
#define SHUFFLE8(v, by) _mm512_shuffle_epi8(v, by)
#define ADD_WHERE(v, bits, ones, more) _mm512_mask_add_epi8(v, _mm512_test_epi8_mask(bits, ones), v, more)
#define LOW_F16(v) _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v))
KTL_INLINE __m256i two_words(__m128i low, __m128i top) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), top, 1);
}

KTL_INLINE void transpose16(const uint32_t *src, int stride, uint32_t *dst) {
    __m512i v[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(src + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* v[4q + j] now holds, in its 128-bit part p, rows 4q..4q+3 of column 4p + j. */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + 16 * i, b[i]);
}

#define TRANSPOSE16(src, stride, dst) transpose16(src, stride, dst)

/* ---- one row of a file block in registers ------------------------------------------------------------ */
KTL_INLINE __m512i twice(const uint8_t *p) { /* 32 bytes in both halves */
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}

KTL_INLINE __m512i halves(const uint8_t *low, const uint8_t *high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)),
                              _mm256_loadu_si256((const __m256i *)high), 1);
}

/* Bits of each 32-byte half moved down by `low` and `high`, then masked. */
KTL_INLINE __m512i field(__m512i v, int low, int high, int mask) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16((short)low),
                                          _mm256_set1_epi16((short)high), 1);
    return _mm512_and_si512(_mm512_srlv_epi16(v, by), _mm512_set1_epi8((char)mask));
}

/* Two blocks of 16 bytes to 64 nibbles: low and high of the first, low and high of the second. */
KTL_INLINE __m512i nibbles(const uint8_t *first, const uint8_t *second) {
    const __m512i v = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)first))),
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)second)), 1);
    const __m512i by = _mm512_setr_epi64(0, 0, 0x4000400040004, 0x4000400040004, 0, 0,
                                         0x4000400040004, 0x4000400040004);
    return _mm512_and_si512(_mm512_srlv_epi16(v, by), _mm512_set1_epi8(15));
}

/* Adds `value` to the codes whose bit `low` (first half), `high` (second half) is set in `bits`. */
KTL_INLINE __m512i with_bit(__m512i codes, __m512i bits, int low, int high, int value) {
    const __m512i which = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << low)),
                                             _mm256_set1_epi8((char)(1 << high)), 1);
    const __mmask64 set = _mm512_test_epi8_mask(bits, which);
    return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8((char)value));
}

KTL_INLINE __m512 f16_at(const uint8_t *p) { return _mm512_set1_ps(_cvtsh_ss(ktl_load16(p))); }

/* Eight float16 that lie `stride` bytes apart; the upper lanes are zero. */
KTL_INLINE __m512 eight_f16(const uint8_t *p, int stride) {
    const __m128i h = _mm_setr_epi16(
        (short)ktl_load16(p), (short)ktl_load16(p + stride), (short)ktl_load16(p + 2 * stride),
        (short)ktl_load16(p + 3 * stride), (short)ktl_load16(p + 4 * stride),
        (short)ktl_load16(p + 5 * stride), (short)ktl_load16(p + 6 * stride),
        (short)ktl_load16(p + 7 * stride));
    return _mm512_zextps256_ps512(_mm256_cvtph_ps(h));
}

typedef struct {
    __m512i code[4];
    __m512 scale, offset;
} row_chunk;

/* A whole chunk of 256 columns. */
KTL_INLINE void row_load_whole(int format, const uint8_t *row, int64_t column, row_chunk *chunk) {
    __m512i *code = chunk->code;
    __m512 *scale = &chunk->scale, *offset = &chunk->offset;
    const ktl_format_info *f = &ktl_formats[format];
    const uint8_t *p = f->block_cols ? row + column / f->block_cols * f->block_bytes : row;
    *offset = _mm512_setzero_ps();
    if (format == KTL_Q4_K || format == KTL_Q5_K) {
        /* As ktl_scales_k4, without a detour through memory: x has scales and minima 0-3 (bytes 0-7),
         * y has those of 4-7. */
        const __m128i v = _mm_loadu_si128((const __m128i *)(p + 4));
        const __m128i x = _mm_and_si128(v, _mm_set1_epi8(63));
        const __m128i low = _mm_and_si128(
            _mm_srlv_epi16(_mm_shuffle_epi32(v, 0xaa), _mm_setr_epi16(0, 0, 4, 4, 0, 0, 0, 0)),
            _mm_set1_epi8(15));
        const __m128i y = _mm_or_si128(
            low, _mm_and_si128(_mm_srli_epi16(v, 2), _mm_set1_epi8(48)));
        const __m512i sm = _mm512_cvtepu8_epi32(_mm_unpacklo_epi32(x, y)); /* 8 scales, 8 minima */
        int32_t two;
        memcpy(&two, p, 4); /* d, dmin */
        const __m512 d = _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(two))));
        *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(sm), d);
        *offset = _mm512_sub_ps(ZEROF(), _mm512_shuffle_f32x4(*scale, *scale, 0xee));
        const uint8_t *q = p + (format == KTL_Q4_K ? 16 : 48);
        const __m512i high = twice(p + 16);
        for (int v = 0; v < 4; v++) {
            code[v] = field(twice(q + 32 * v), 0, 4, 15);
            if (format == KTL_Q5_K) code[v] = with_bit(code[v], high, 2 * v, 2 * v + 1, 16);
        }
    } else if (format == KTL_Q6_K) {
        *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(I8_LANES(p + 192)), f16_at(p + 208));
        for (int h = 0; h < 2; h++) {
            const __m512i low = _mm512_loadu_si512(p + 64 * h), high = twice(p + 128 + 32 * h);
            code[2 * h] = _mm512_or_si512(field(low, 0, 0, 15),
                                          _mm512_slli_epi16(field(high, 0, 2, 3), 4));
            code[2 * h + 1] = _mm512_or_si512(field(low, 4, 4, 15),
                                              _mm512_slli_epi16(field(high, 4, 6, 3), 4));
        }
    } else if (format == KTL_Q2_K || format == KTL_Q3_K) {
        const uint8_t *q = p + (format == KTL_Q2_K ? 16 : 32);
        if (format == KTL_Q2_K) {
            const __m512i sm = U8_LANES(p);
            *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(ANDI(sm, SET1I(15))), f16_at(p + 80));
            *offset = _mm512_mul_ps(_mm512_cvtepi32_ps(DOWNI(sm, 4)),
                                    _mm512_sub_ps(ZEROF(), f16_at(p + 82)));
        } else {
            uint8_t s[16];
            ktl_scales_k3(p + 96, s);
            *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(I8_LANES(s)), f16_at(p + 108));
        }
        const __m512i mask = twice(p);
        for (int v = 0; v < 4; v++) {
            code[v] = field(twice(q + 32 * (v / 2)), v % 2 * 4, v % 2 * 4 + 2, 3);
            if (format == KTL_Q3_K) code[v] = with_bit(code[v], mask, 2 * v, 2 * v + 1, 4);
        }
    } else if (format == KTL_IQ4_XS) {
        uint32_t low;
        memcpy(&low, p + 4, 4);
        const uint64_t s = _pdep_u64(low, 0x0f0f0f0f0f0f0f0f) |
                           _pdep_u64(ktl_load16(p + 2), 0x0303030303030303) << 4;
        const __m512i lanes = _mm512_cvtepu8_epi32(_mm_cvtsi64_si128((long long)s));
        *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(lanes, SET1I(32))), f16_at(p));
        for (int v = 0; v < 4; v++) code[v] = nibbles(p + 8 + 32 * v, p + 24 + 32 * v);
    } else if (format == KTL_INT8_CHANNEL) {
        float s;
        memcpy(&s, p, 4);
        *scale = _mm512_set1_ps(s);
        for (int v = 0; v < 4; v++) code[v] = _mm512_loadu_si512(p + 4 + column + 64 * v);
    } else if (format == KTL_INT4_GROUP128) {
        *scale = _mm512_mask_blend_ps(2, f16_at(p), f16_at(p + 66));
        for (int v = 0; v < 4; v++)
            code[v] = field(_mm512_loadu_si512(p + 2 + 66 * (v / 2)), v % 2 * 4, v % 2 * 4, 15);
    } else { /* eight blocks of 32 */
        const int bytes = f->block_bytes;
        *scale = eight_f16(p, bytes);
        for (int v = 0; v < 4; v++, p += 2 * bytes)
            if (format == KTL_Q8_0) {
                code[v] = halves(p + 2, p + bytes + 2);
            } else if (format == KTL_Q5_0) {
                uint32_t a, b;
                memcpy(&a, p + 2, 4);
                memcpy(&b, p + bytes + 2, 4);
                code[v] = nibbles(p + 6, p + bytes + 6);
                code[v] = _mm512_mask_add_epi8(code[v], (__mmask64)b << 32 | a, code[v],
                                               _mm512_set1_epi8(16));
            } else {
                code[v] = nibbles(p + 2, p + bytes + 2);
            }
    }
    for (int v = 0; v < 4; v++) {
        if (f->table) code[v] = lookup(code[v]);
        if (f->base_bits == 8) code[v] = _mm512_xor_si512(code[v], _mm512_set1_epi8((char)0x80));
    }
}

KTL_INLINE void row_load(int format, const uint8_t *row, int64_t column, int cols,
                         row_chunk *chunk) {
    if (cols == KTL_CHUNK) {
        row_load_whole(format, row, column, chunk);
        return;
    }
    const ktl_format_info *f = &ktl_formats[format];
    if (f->block_cols == 32) { /* the rest are blocks of zeros */
        uint8_t blocks[8 * 34] = {0};
        memcpy(blocks, row + column / 32 * f->block_bytes, (size_t)(cols / 32 * f->block_bytes));
        row_load_whole(format, blocks, 0, chunk);
        return;
    }
    ktl_raw raw;
    float scale[16] = {0}, offset[16] = {0};
    memset(&raw, 0, sizeof raw);
    ktl_raw_from_blocks(format, row, column, cols, &raw);
    ktl_raw_scales(format, &raw, cols, scale, offset);
    chunk->scale = _mm512_loadu_ps(scale);
    chunk->offset = _mm512_loadu_ps(offset);
    for (int v = 0; v < 4; v++) {
        const __m512i c = _mm512_loadu_si512(raw.code + 64 * v);
        chunk->code[v] = ktl_formats[format].table ? lookup(c) : c;
    }
}

KTL_INLINE void row_store(const row_chunk *chunk, uint8_t *code, float *scale, float *offset) {
    for (int v = 0; v < 4; v++) _mm512_storeu_si512(code + 64 * v, chunk->code[v]);
    _mm512_storeu_ps(scale, chunk->scale);
    _mm512_storeu_ps(offset, chunk->offset);
}

/* 256 codes of one row against one token: four vectors of 16 sums, each of four columns. */
KTL_INLINE __m512 dot_row(int format, const row_chunk *chunk, const ktl_act *act, __m512 sum) {
    const int sub = ktl_formats[format].sub, zero = ktl_formats[format].zero;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    /* Weight scales are per `sub` columns, activation scales per 16. */
    const __m512i whose = _mm512_srli_epi32(lane, sub == 16 ? 0 : sub == 32 ? 1 : sub == 128 ? 3 : 4);
    const __m512 both = MULF(_mm512_permutexvar_ps(whose, chunk->scale), LOADF(act->scale));
    /* Without a starting value (lanes are columns here) the zero of the codes is one more offset. */
    const __mmask16 subs = (__mmask16)((1u << (KTL_CHUNK / sub)) - 1);
    const __m512 offset = zero ? MULF(chunk->scale, SET1F(-(float)zero)) : chunk->offset;
    /* Two sums of their own: a chain through all chunks would be waited for. */
    __m512 part[2] = {_mm512_maskz_mul_ps(subs, offset, LOADF(act->sum))};
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        const __m512i d = _mm512_dpbusd_epi32(_mm512_setzero_si512(), chunk->code[v],
                                              LOADI(act->q + 64 * v));
        /* Lane l of vector v holds columns 64v + 4l to 64v + 4l + 3. */
        const __m512i which = _mm512_srli_epi32(_mm512_add_epi32(lane, SET1I(16 * v)), 2);
        const __m512 scale = _mm512_permutexvar_ps(which, both);
        __m512 *to = &part[(v + 1) % 2];
        *to = v ? FMA(TO_FLOAT(d), scale, *to) : MULF(TO_FLOAT(d), scale);
    }
    return ADDF(sum, ADDF(part[0], part[1]));
}

#include "kernel.inc.h"

const ktl_kernels ktl_kernels_avx512 = KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
