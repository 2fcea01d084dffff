/* AVX-512 (F, BW, DQ, VL) with VNNI: VPDPBUSD, 64 products an instruction. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>

#include "arithmetic.h"

#define VB 64
#define TOKENS 6
#define PANELS 2
#define VI __m512i
#define VF __m512
#define DOT(sum, u, s) _mm512_dpbusd_epi32(sum, u, s)
#define DOT_WIDE(sum, u, s) _mm512_dpbusd_epi32(sum, u, s)
#define WIDE_ZERO 128
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ADDF(a, b) _mm512_add_ps(a, b)
#define MULF(a, b) _mm512_mul_ps(a, b)
#define SET1F(x) _mm512_set1_ps(x)
#define SET1I(x) _mm512_set1_epi32(x)
#define LOADI(p) _mm512_loadu_si512(p)
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define ZEROF() _mm512_setzero_ps()
#define TO_FLOAT(v) _mm512_cvtepi32_ps(v)
#define SUMF(v) _mm512_reduce_add_ps(v)
#define F16X16(src, dst) \
    _mm512_storeu_ps(dst, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src))))

/* The table's levels + 128: codes that VPDPBUSD takes as unsigned, with zero = 128. */
KTL_INLINE __m512i lookup(__m512i codes) {
    const __m128i levels = _mm_xor_si128(_mm_loadu_si128((const __m128i *)ktl_iq4_table),
                                         _mm_set1_epi8((char)0x80));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), codes);
}
#define LOOKUP(codes) lookup(codes)

KTL_INLINE void transpose16(const uint32_t *src, int stride, uint32_t *dst) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(src + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4q + j] now holds, in its 128-bit part p, rows 4q..4q+3 of column 4p + j. */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(dst + 16 * j, _mm512_shuffle_i32x4(even, even2, 0x88));
        _mm512_storeu_si512(dst + 16 * (4 + j), _mm512_shuffle_i32x4(odd, odd2, 0x88));
        _mm512_storeu_si512(dst + 16 * (8 + j), _mm512_shuffle_i32x4(even, even2, 0xdd));
        _mm512_storeu_si512(dst + 16 * (12 + j), _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
}
#define TRANSPOSE16(src, stride, dst) transpose16(src, stride, dst)

/* 256 codes of one row against one token: four vectors of 16 sums, each of four columns. */
KTL_INLINE __m512 dot_row(int sub, int table, int is_wide, const uint8_t *code, const float *scale,
                          const float *offset, const ktl_act *act, __m512 sum) {
    (void)is_wide;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int shift = sub == 16 ? 1 : 0; /* act scales per 32 columns, weight scales per 16 */
    __m512 both = _mm512_mul_ps(
        _mm512_loadu_ps(scale),
        _mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), _mm512_castps256_ps512(
                                                                  _mm256_loadu_ps(act->scale))));
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m512i c = _mm512_loadu_si512(code + 64 * v);
        if (table) c = lookup(c);
        __m512i d = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c,
                                        _mm512_loadu_si512(act->q + 64 * v));
        /* lane l of vector v holds columns 64v + 4l .. +3 */
        __m512i which = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * v)),
                                          sub == 16 ? 2 : sub == 32 ? 3 : sub == 128 ? 5 : 6);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_permutexvar_ps(which, both), sum);
    }
    const __mmask16 subs = (__mmask16)((1u << (KTL_CHUNK / sub)) - 1);
    return _mm512_mask3_fmadd_ps(_mm512_loadu_ps(offset), _mm512_loadu_ps(act->sum), sum, subs);
}

#include "kernel.inc.h"

const ktl_kernels ktl_kernels_avx512 = KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
