/* AVX2 with FMA and F16C: VPMADDUBSW and VPMADDWD make four products a 32-bit lane. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "arithmetic.h"
#include "blocks.h"

#define VB 32
#define TOKENS 4
#define PAIRS KTL_AVX2
#define LINES 1
#define CODE_WORDS 1
#define PANELS 1
#define LONG_TOKENS 3
#define LONG_PANELS 1
#define FLOAT_TOKENS 6
#define MOST_RUN 8
#define VI __m256i
#define VF __m256
/* VPMADDUBSW saturates its 16-bit sums of two products: harmless for codes up to 127, as
 * 2 * 127 * 127 < 32768. */
#define DOT(sum, u, s) \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)))
/* Where sums of products fit 16 bits too, two instructions instead of three. */
#define DOT_RUN(sum, two, n, run, u, s) dot_run(sum, &(two), n, run, u, s)
/* Codes above 127 are made signed, and the sign moved to the activation. */
#define DOT_WIDE(sum, u, s) dot_wide(sum, u, s)
#define WIDE_ZERO 0
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FNMA(a, b, c) _mm256_fnmadd_ps(a, b, c)
#define ADDF(a, b) _mm256_add_ps(a, b)
#define SUBF(a, b) _mm256_sub_ps(a, b)
#define MULF(a, b) _mm256_mul_ps(a, b)
#define ADDI(a, b) _mm256_add_epi32(a, b)
#define AS_FLOAT(v) _mm256_castsi256_ps(v)
#define SUBI(a, b) _mm256_sub_epi32(a, b)
#define ANDI(a, b) _mm256_and_si256(a, b)
#define ORI(a, b) _mm256_or_si256(a, b)
#define XORI(a, b) _mm256_xor_si256(a, b)
#define UPI(a, by) _mm256_slli_epi32(a, by)
#define DOWNI(a, by) _mm256_srli_epi32(a, by)
#define U8_LANES(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define I8_LANES(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define SET1F(x) _mm256_set1_ps(x)
#define SET1I(x) _mm256_set1_epi32(x)
#define LOADI(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOADF(p) _mm256_loadu_ps(p)
/* For pairs.inc.h */
#define MAXI(a, b) _mm256_max_epi32(a, b)
#define DIVF(a, b) _mm256_div_ps(a, b)
#define ROUND(v) _mm256_cvtps_epi32(v)
#define WHERE_MORE(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ))
#define WHERE_MOST(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LE_OQ))
#define TOP_HALVES(top, low) _mm256_blend_epi16(low, top, 0xaa)
#define ADD_PRODUCTS16(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#define STOREI(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define ZEROF() _mm256_setzero_ps()
#define TO_FLOAT(v) _mm256_cvtepi32_ps(v)
#define F16X16(src, dst) f16x16(src, dst)
#define BF16X16(src, dst) bf16x16(src, dst)
#define SUMF(v) sum_lanes(v)
#define LOOKUP(codes) lookup(codes)
#define TRANSPOSE16(src, stride, dst) transpose16(src, stride, dst)

/* Not the intrinsics: GCC makes a tree of the additions, whose products do not fit the registers. */
KTL_INLINE __m256i add_two(__m256i sum, __m256i u, __m256i s) {
    __m256i product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(u), "x"(s));
    return sum;
}

/* Two of them: with both products before both additions the units that multiply get an even share (Zen 3: 4 %
 * of the time). */
KTL_INLINE void add_four(__m256i sum[2], const __m256i u[2], __m256i s) {
    __m256i product[2];
    __asm__("vpmaddubsw %6, %4, %2\n\tvpmaddubsw %6, %5, %3\n\tvpaddw %2, %0, %0\n\tvpaddw %3, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(product[0]), "=&x"(product[1])
            : "x"(u[0]), "x"(u[1]), "x"(s));
}

/* Sums of 16 bits times their scales, of a row and of a token, to one of 32. */
KTL_INLINE __m256i add_scaled(__m256i sum, __m256i two, __m256i row, __m256i token) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_mulhrs_epi16(row, token)));
}

KTL_INLINE __m256i dot_run(__m256i sum, __m256i *two, int n, int run, __m256i u, __m256i s) {
    if (n % run) *two = add_two(*two, u, s);
    else __asm__("vpmaddubsw %2, %1, %0" : "=x"(*two) : "x"(u), "x"(s));
    if ((n + 1) % run) return sum;
    return _mm256_add_epi32(sum, _mm256_madd_epi16(*two, _mm256_set1_epi16(1)));
}

KTL_INLINE __m256i dot_wide(__m256i sum, __m256i code, __m256i s) {
    __m256i w = _mm256_xor_si256(code, _mm256_set1_epi8((char)0x80));
    return DOT(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(s, w));
}

#define DOT_AT(sum, two, n, run, u, p) dot_at(sum, &(two), n, run, u, p)
KTL_INLINE __m256i dot_at(__m256i sum, __m256i *two, int n, int run, __m256i u, const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m256i s = _mm256_set1_epi32(four);
    return run ? dot_run(sum, two, n, run, u, s) : dot_wide(sum, u, s);
}

KTL_INLINE void f16x16(const uint8_t *src, float *dst) {
    _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)src)));
    _mm256_storeu_ps(dst + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + 16))));
}

KTL_INLINE void bf16x16(const uint8_t *src, float *dst) {
    for (int i = 0; i < 16; i += 8) {
        const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(src + 2 * i)));
        _mm256_storeu_si256((__m256i *)(dst + i), _mm256_slli_epi32(words, 16));
    }
}

KTL_INLINE float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KTL_INLINE __m256i lookup(__m256i codes) {
    const __m128i levels = _mm_xor_si128(_mm_loadu_si128((const __m128i *)ktl_iq4_table),
                                         _mm_set1_epi8((char)0x80));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), codes);
}

KTL_INLINE void transpose16(const uint32_t *src, int stride, uint32_t *dst) {
    for (int half = 0; half < 2; half++)
        for (int quarter = 0; quarter < 4; quarter++) {
            __m128i a[4];
            for (int q = 0; q < 2; q++) {
                const uint32_t *p = src + (8 * half + 4 * q) * stride + 4 * quarter;
                for (int i = 0; i < 4; i++) a[i] = _mm_loadu_si128((const __m128i *)(p + i * stride));
                __m128i b0 = _mm_unpacklo_epi32(a[0], a[1]), b1 = _mm_unpackhi_epi32(a[0], a[1]);
                __m128i b2 = _mm_unpacklo_epi32(a[2], a[3]), b3 = _mm_unpackhi_epi32(a[2], a[3]);
                uint32_t *to = dst + 64 * quarter + 8 * half + 4 * q;
                _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi64(b0, b2));
                _mm_storeu_si128((__m128i *)(to + 16), _mm_unpackhi_epi64(b0, b2));
                _mm_storeu_si128((__m128i *)(to + 32), _mm_unpacklo_epi64(b1, b3));
                _mm_storeu_si128((__m128i *)(to + 48), _mm_unpackhi_epi64(b1, b3));
            }
        }
}

typedef struct {
    uint8_t code[KTL_CHUNK];
    float scale[16], offset[16];
} row_chunk;

KTL_INLINE void row_load(int format, const uint8_t *row, int64_t column, int cols,
                         row_chunk *chunk) {
    ktl_raw raw;
    memset(chunk->scale, 0, sizeof chunk->scale);
    memset(chunk->offset, 0, sizeof chunk->offset);
    ktl_raw_from_blocks(format, row, column, cols, &raw);
    ktl_raw_scales(format, &raw, cols, chunk->scale, chunk->offset);
    memset(raw.code + cols, 0, (size_t)(KTL_CHUNK - cols));
    for (int i = 0; i < KTL_CHUNK; i += VB) {
        __m256i c = LOADI(raw.code + i);
        _mm256_storeu_si256((__m256i *)(chunk->code + i),
                            ktl_formats[format].table ? lookup(c) : c);
    }
}

KTL_INLINE void row_store(const row_chunk *chunk, uint8_t *code, float *scale, float *offset) {
    memcpy(code, chunk->code, sizeof chunk->code);
    memcpy(scale, chunk->scale, sizeof chunk->scale);
    memcpy(offset, chunk->offset, sizeof chunk->offset);
}

/* 256 codes of one row against one token: eight vectors of 8 sums, each of four columns. */
KTL_INLINE __m256 dot_row(int format, const row_chunk *chunk, const ktl_act *act, __m256 sum) {
    const int sub = ktl_formats[format].sub;
    const int is_wide = ktl_formats[format].zero == 128;
    const int zero = is_wide ? WIDE_ZERO : ktl_formats[format].zero;
    for (int v = 0; v < 8; v++) {
        __m256i c = LOADI(chunk->code + 32 * v), q = LOADI(act->q + 32 * v);
        __m256i d = is_wide ? DOT_WIDE(_mm256_setzero_si256(), c, q)
                            : DOT(_mm256_setzero_si256(), c, q);
        const int s = 32 * v / sub;
        __m256 w = _mm256_set1_ps(chunk->scale[s]);
        if (sub == 16) w = _mm256_blend_ps(w, _mm256_set1_ps(chunk->scale[s + 1]), 0xf0);
        w = _mm256_mul_ps(w, _mm256_blend_ps(_mm256_set1_ps(act->scale[2 * v]),
                                             _mm256_set1_ps(act->scale[2 * v + 1]), 0xf0));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), w, sum);
    }
    /* Without a starting value (lanes are columns here) the zero of the codes is one more offset. */
    float rest = 0;
    for (int s = 0; s < KTL_CHUNK / sub; s++)
        rest += (zero ? (float)-zero * chunk->scale[s] : chunk->offset[s]) * act->sum[s];
    return _mm256_add_ps(sum, _mm256_setr_ps(rest, 0, 0, 0, 0, 0, 0, 0));
}

/* For rows.inc.h */
#define ROW_WORDS(p) _mm256_inserti128_si256(_mm256_castsi128_si256(p(0)), p(1), 1)
#define LOW32(a, b) _mm256_unpacklo_epi32(a, b)
#define TOP32(a, b) _mm256_unpackhi_epi32(a, b)
#define LOW64(a, b) _mm256_unpacklo_epi64(a, b)
#define TOP64(a, b) _mm256_unpackhi_epi64(a, b)
#define CHOOSE_BITS(mask, a, b) _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b))
#define EACH128(v) _mm256_broadcastsi128_si256(v)
#define SHUFFLE8(v, by) _mm256_shuffle_epi8(v, by)
#define ADD_WHERE(v, bits, ones, more) \
    _mm256_add_epi8(v, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bits, ones), ones), more))
#define LOW_F16(v) low_f16(v)
KTL_INLINE __m256 low_f16(__m256i v) {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

#include "kernel.inc.h"

const ktl_kernels ktl_kernels_avx2 = KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
