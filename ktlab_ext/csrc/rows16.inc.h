/* Few tokens on file blocks, 16 rows at a time: what 16 rows have at the same place becomes the lanes of
 * a vector, so scales are taken apart for all of them at once and apply to whole sums. For the k-quants,
 * whose scales take longer than their products where a row is computed by itself (dot_row). */

/* The rows that are fetched meanwhile, one line with each load: asked for all at once, they are waited
 * for. */
enum { ROWS_AHEAD = 32 };

KTL_INLINE void fetch_row(const uint8_t *p, int64_t row_bytes, int i) {
    __builtin_prefetch(p + (ROWS_AHEAD + i) * row_bytes, 0, 2);
}

/* 64 bytes of each row from p on, transposed. */
KTL_INLINE void load_lines(const uint8_t *p, int64_t row_bytes, __m512i v[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        v[i] = _mm512_loadu_si512(p + i * row_bytes);
        fetch_row(p, row_bytes, i);
    }
    transpose_lines(v);
}

/* 16 bytes of each row from p on: v[j] has the rows' j-th words. */
KTL_INLINE void load_words(const uint8_t *p, int64_t row_bytes, __m512i v[4]) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i++) fetch_row(p, row_bytes, i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* rows i, 4 + i, 8 + i, 12 + i */
        v[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(p + i * row_bytes)));
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(p + (4 + i) * row_bytes)), 1);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(p + (8 + i) * row_bytes)), 2);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(p + (12 + i) * row_bytes)), 3);
    }
    b[0] = _mm512_unpacklo_epi32(v[0], v[1]);
    b[1] = _mm512_unpackhi_epi32(v[0], v[1]);
    b[2] = _mm512_unpacklo_epi32(v[2], v[3]);
    b[3] = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(b[0], b[2]);
    v[1] = _mm512_unpackhi_epi64(b[0], b[2]);
    v[2] = _mm512_unpacklo_epi64(b[1], b[3]);
    v[3] = _mm512_unpackhi_epi64(b[1], b[3]);
}

/* float16 in the low halves of words. */
KTL_INLINE __m512 low_f16(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

/* Four bytes of each word as floats, times `by`. */
KTL_INLINE void byte_floats(__m512i v, __m512 by, __m512 *to) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        to[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(ANDI(_mm512_srli_epi32(v, 8 * j), SET1I(255))), by);
}

/* Scales and -minima of 8 sub-blocks of q4_k and q5_k (ktl_scales_k4). */
KTL_INLINE void scales_k4(const uint8_t *p, int64_t row_bytes, __m512 scale[8], __m512 offset[8]) {
    __m512i v[4];
    load_words(p, row_bytes, v);
    const __m512 d = low_f16(v[0]), dmin = SUBF(ZEROF(), low_f16(_mm512_srli_epi32(v[0], 16)));
    const __m512i low6 = SET1I(0x3f3f3f3f), low4 = SET1I(0x0f0f0f0f), two = SET1I(0x30303030);
    byte_floats(ANDI(v[1], low6), d, scale);
    byte_floats(ANDI(v[2], low6), dmin, offset);
    const __m512i high = _mm512_srli_epi32(v[1], 2), high_min = _mm512_srli_epi32(v[2], 2);
    byte_floats(_mm512_or_si512(ANDI(v[3], low4), ANDI(high, two)), d, scale + 4);
    byte_floats(_mm512_or_si512(ANDI(_mm512_srli_epi32(v[3], 4), low4), ANDI(high_min, two)), dmin,
                offset + 4);
}

KTL_INLINE __m512i four(const ktl_act *a, int column) {
    int32_t v;
    memcpy(&v, a->q + column, 4);
    return SET1I(v);
}

/* Sums of 16 columns of sub-block s to the result, the i-th 16 of the block. */
#define ADD_SUB(dot, s, i, mins)                                                                    \
    _Pragma("GCC unroll 4") for (int t = 0; t < T; t++) {                                           \
        sum[t] = FMA(TO_FLOAT(dot[t]), MULF(scale[s], SET1F(act[t]->scale[i])), sum[t]);            \
        if (mins) sum[t] = FMA(offset[s], SET1F(act[t]->sum[s]), sum[t]);                           \
    }

/* One block of 256 columns of q4_k or q5_k, 16 rows. */
KTL_INLINE void dot16_k4(int five, int T, const uint8_t *p, int64_t row_bytes,
                         const ktl_act *const *act, __m512 *sum) {
    const __m512i low4 = SET1I(0x0f0f0f0f), bit = SET1I(0x10101010);
    __m512 scale[8], offset[8];
    __m512i v[16], high[8];
    scales_k4(p, row_bytes, scale, offset);
    if (five) {
        load_lines(p + 16, row_bytes, v); /* 32 bytes of them, one bit a sub-block */
        memcpy(high, v, sizeof high);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        load_lines(p + (five ? 48 : 16) + 64 * h, row_bytes, v);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int s = 4 * h + 2 * half;
            __m512i first[4], second[4];
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                if (k % 4 == 0)
                    for (int t = 0; t < T; t++) first[t] = second[t] = _mm512_setzero_si512();
                const __m512i both = v[8 * half + k];
                __m512i a = ANDI(both, low4), b = ANDI(_mm512_srli_epi32(both, 4), low4);
                if (five) {
                    const __m512i ha = s < 4 ? _mm512_slli_epi32(high[k], s < 4 ? 4 - s : 0)
                                             : _mm512_srli_epi32(high[k], s < 4 ? 0 : s - 4);
                    const __m512i hb = s < 3 ? _mm512_slli_epi32(high[k], s < 3 ? 3 - s : 0)
                                             : _mm512_srli_epi32(high[k], s < 3 ? 0 : s - 3);
                    a = _mm512_or_si512(a, ANDI(ha, bit));
                    b = _mm512_or_si512(b, ANDI(hb, bit));
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    first[t] = _mm512_dpbusd_epi32(first[t], a, four(act[t], 32 * s + 4 * k));
                    second[t] = _mm512_dpbusd_epi32(second[t], b, four(act[t], 32 * s + 32 + 4 * k));
                }
                if (k % 4 < 3) continue;
                ADD_SUB(first, s, 2 * s + k / 4, k == 7)
                ADD_SUB(second, s + 1, 2 * s + 2 + k / 4, k == 7)
            }
        }
    }
}

/* One block of 256 columns of q6_k, 16 rows. */
KTL_INLINE void dot16_q6(int T, const uint8_t *p, int64_t row_bytes, const ktl_act *const *act,
                         __m512 *sum) {
    const __m512i low4 = SET1I(0x0f0f0f0f), two = SET1I(0x30303030);
    __m512 scale[16], *offset = NULL;
    __m512i v[16], high[16];
    load_words(p + 192, row_bytes, v);
    uint16_t d16[16];
    for (int i = 0; i < 16; i++) d16[i] = ktl_load16(p + 208 + i * row_bytes);
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)d16));
#pragma GCC unroll 16
    for (int s = 0; s < 16; s++)
        scale[s] = MULF(TO_FLOAT(_mm512_srai_epi32(_mm512_slli_epi32(v[s / 4], 24 - s % 4 * 8), 24)), d);
    load_lines(p + 128, row_bytes, high);
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        load_lines(p + 64 * n, row_bytes, v);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i dot[4][4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) dot[q][t] = SET1I(act[t]->init[8 * n + 2 * q + half]);
#pragma GCC unroll 4
            for (int k = 4 * half; k < 4 * half + 4; k++) {
                const __m512i h = high[8 * n + k];
                const __m512i code[4] = {
                    _mm512_or_si512(ANDI(v[k], low4), ANDI(_mm512_slli_epi32(h, 4), two)),
                    _mm512_or_si512(ANDI(v[8 + k], low4), ANDI(_mm512_slli_epi32(h, 2), two)),
                    _mm512_or_si512(ANDI(_mm512_srli_epi32(v[k], 4), low4), ANDI(h, two)),
                    _mm512_or_si512(ANDI(_mm512_srli_epi32(v[8 + k], 4), low4),
                                    ANDI(_mm512_srli_epi32(h, 2), two))};
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++)
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++)
                        dot[q][t] = _mm512_dpbusd_epi32(dot[q][t], code[q], four(act[t], 128 * n + 32 * q + 4 * k));
            }
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                const int s = 8 * n + 2 * q + half;
                ADD_SUB(dot[q], s, s, 0)
            }
        }
    }
}

#define HAS_ROWS16(format) ((format) == KTL_Q4_K || (format) == KTL_Q5_K || (format) == KTL_Q6_K)

/* All columns of 16 rows against T tokens (up to 4): acc[t] += the 16 products. */
KTL_INLINE void dot_rows16(int format, int T, const uint8_t *row, int64_t row_bytes, int64_t cols,
                           const uint8_t *const *x, int64_t chunk_bytes, float *const *acc) {
    const int bytes = ktl_formats[format].block_bytes;
    __m512 sum[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = LOADF(acc[t]);
    for (int64_t c = 0; c < cols / KTL_CHUNK; c++) {
        const uint8_t *p = row + c * bytes;
        const ktl_act *act[4];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) act[t] = (const ktl_act *)(x[t] + c * chunk_bytes);
        if (format == KTL_Q6_K) dot16_q6(T, p, row_bytes, act, sum);
        else dot16_k4(format == KTL_Q5_K, T, p, row_bytes, act, sum);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) STOREF(acc[t], sum[t]);
}
