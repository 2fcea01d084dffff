/* Few tokens on file blocks under AVX2: one row after the other, in the order in which memory has them. Many
 * rows at a time (rows.inc.h) are as many streams: they read 17 GB/s where one reads 25.
 *
 * VPMADDUBSW leaves sums of 16 bits, eight of an even 16 columns and eight of the odd; VPMADDWD scales them as it
 * adds them, by the token's scale (KTL_LINES), for k-quants times the row's: integers to the end of 256 columns. */

typedef struct {
    __m256i code[8]; /* 32 columns each */
    __m256i scale;   /* 16 bits, to the top: of the even units of 16 columns, and of the odd ones above them */
    __m256 min[2];   /* of the sub-blocks */
    float d, dmin;   /* what the scales' and the minima's steps are */
} line;

KTL_INLINE __m128i load16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }

/* Not ktl_f16: q6_k's d is mostly subnormal, which its product takes 100 cycles for. */
KTL_INLINE float half_at(const uint8_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(ktl_load16(p)))); }

/* Eight scales of 32 columns; sixteen of 16. */
KTL_INLINE __m256i scales_of_8(__m128i bytes, int up) {
    return _mm256_broadcastsi128_si256(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), up));
}
KTL_INLINE __m256i scales_of_16(__m128i bytes, int up) {
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, apart)), up);
}
KTL_INLINE __m256 floats_of_8(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }

/* ktl_scales_k4: eight scales, and eight minima above them. */
KTL_INLINE __m128i scales_k4(__m128i block) {
    const __m128i low = _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i top = _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11);
    const __m128i bits = _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
    const __m128i a = _mm_srlv_epi32(_mm_shuffle_epi8(block, low), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i b = _mm_srli_epi16(_mm_shuffle_epi8(block, top), 2);
    return _mm_or_si128(_mm_and_si128(a, bits), _mm_and_si128(b, _mm_set1_epi8(0x30)));
}

/* Bits of bytes, down. */
KTL_INLINE __m256i bits_at(__m256i v, int at, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(v, at), _mm256_set1_epi8((char)mask));
}
KTL_INLINE __m256i two_nibbles(const uint8_t *p) { /* of 16 bytes: the low ones, the high ones */
    const __m128i v = load16(p);
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1),
                            _mm256_set1_epi8(15));
}
KTL_INLINE __m256i spread_bits(const uint8_t *p) { /* 16 where a bit of 32 is set */
    uint32_t bits;
    memcpy(&bits, p, 4);
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
                                          3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte), one);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, one), _mm256_set1_epi8(16));
}

KTL_INLINE __m256i levels_of(__m256i codes) { /* of iq4, signed */
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16((const uint8_t *)ktl_iq4_table)), codes);
}

/* A block of 256 columns. */
KTL_INLINE void load_line(int format, const uint8_t *p, line *l) {
    __m256i *code = l->code;
    if (format == KTL_Q4_K || format == KTL_Q5_K) {
        const __m128i head = load16(p), both = scales_k4(head);
        const __m128 d = _mm_cvtph_ps(head);
        l->scale = scales_of_8(both, 9);
        l->min[0] = floats_of_8(_mm_srli_si128(both, 8));
        l->d = _mm_cvtss_f32(d) * (float)(1 << 6);
        l->dmin = _mm_cvtss_f32(_mm_movehdup_ps(d));
        const __m256i high = LOADI(p + 16);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m256i v = LOADI(p + (format == KTL_Q5_K ? 48 : 16) + 32 * j);
            code[2 * j] = bits_at(v, 0, 15);
            code[2 * j + 1] = bits_at(v, 4, 15);
            if (format == KTL_Q4_K) continue;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int at = 2 * j + i; /* of the bit that becomes 16 */
                const __m256i moved = at < 4 ? _mm256_slli_epi16(high, 4 - at) : _mm256_srli_epi16(high, at - 4);
                code[at] = _mm256_or_si256(code[at], _mm256_and_si256(moved, _mm256_set1_epi8(16)));
            }
        }
    } else if (format == KTL_Q6_K) {
        l->scale = scales_of_16(load16(p + 192), 8);
        l->d = half_at(p + 208) * (float)(1 << 7);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const __m256i a = LOADI(p + 64 * h), b = LOADI(p + 64 * h + 32), high = LOADI(p + 128 + 32 * h);
            const __m256i two = _mm256_set1_epi8(48);
            code[4 * h] = _mm256_or_si256(bits_at(a, 0, 15), _mm256_and_si256(_mm256_slli_epi16(high, 4), two));
            code[4 * h + 1] = _mm256_or_si256(bits_at(b, 0, 15), _mm256_and_si256(_mm256_slli_epi16(high, 2), two));
            code[4 * h + 2] = _mm256_or_si256(bits_at(a, 4, 15), _mm256_and_si256(high, two));
            code[4 * h + 3] = _mm256_or_si256(bits_at(b, 4, 15), bits_at(high, 2, 48));
        }
    } else if (format == KTL_Q2_K) {
        const __m128i both = load16(p), low = _mm_set1_epi8(15);
        const __m128i mins = _mm_and_si128(_mm_srli_epi16(both, 4), low);
        l->scale = scales_of_16(_mm_and_si128(both, low), 11);
        l->min[0] = floats_of_8(mins);
        l->min[1] = floats_of_8(_mm_srli_si128(mins, 8));
        l->d = half_at(p + 80) * (float)(1 << 4);
        l->dmin = half_at(p + 82);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) code[j] = bits_at(LOADI(p + 16 + 32 * (j / 4)), j % 4 * 2, 3);
    } else if (format == KTL_Q3_K) {
        uint8_t scales[16] KTL_ALIGNED;
        ktl_scales_k3(p + 96, scales);
        l->scale = scales_of_16(load16(scales), 10);
        l->d = half_at(p + 108) * (float)(1 << 5);
        const __m256i high = LOADI(p);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m256i bit = j < 2 ? _mm256_slli_epi16(high, 2 - j) : _mm256_srli_epi16(high, j > 2 ? j - 2 : 0);
            code[j] = _mm256_or_si256(bits_at(LOADI(p + 32 + 32 * (j / 4)), j % 4 * 2, 3),
                                      _mm256_and_si256(bit, _mm256_set1_epi8(4)));
        }
    } else if (format == KTL_IQ4_XS) {
        uint64_t scales = 0;
        const int high = ktl_load16(p + 2);
#pragma GCC unroll 8
        for (int b = 0; b < 8; b++) {
            const int low = p[4 + b / 2] >> (4 * (b & 1)) & 15;
            scales |= (uint64_t)(uint8_t)((low | (high >> (2 * b) & 3) << 4) - 32) << (8 * b);
        }
        l->scale = scales_of_8(_mm_cvtsi64_si128((long long)scales), 10);
        l->d = half_at(p) * (float)(1 << 5);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) code[j] = two_nibbles(p + 8 + 16 * j);
    }
    if (!ktl_formats[format].table) return;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) code[j] = levels_of(code[j]);
}

/* Sums of 16 bits of 32 columns, an even unit's and an odd one's, times the scales at `j` of both. */
KTL_INLINE __m256i scaled_dot(int is_signed, __m256i code, const int8_t *q, __m256i scale, int j) {
    const __m256i x = LOADI(q);
    const __m256i two = is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code))
                                  : _mm256_maddubs_epi16(code, x);
    return _mm256_madd_epi16(two, _mm256_shuffle_epi8(scale, _mm256_set1_epi16((short)(2 * j | (2 * j + 1) << 8))));
}

/* 256 columns against a token. */
KTL_INLINE __m256 dot_line(int format, const line *l, const ktl_act *a, __m256 sum) {
    const ktl_format_info *f = &ktl_formats[format];
    const __m256i scale = _mm256_mulhrs_epi16(l->scale, LOADI(a->line_scale));
    __m256i all[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        all[j % 2] = _mm256_add_epi32(all[j % 2], scaled_dot(f->table, l->code[j], a->q + 32 * j, scale, j));
    __m256i dot = _mm256_add_epi32(all[0], all[1]);
    if (f->zero && !f->table) { /* a power of two */
        const __m256i zero = _mm256_madd_epi16(scale, LOADI(a->line_sum));
        dot = _mm256_sub_epi32(dot, _mm256_slli_epi32(zero, __builtin_ctz((unsigned)f->zero)));
    }
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(l->d * a->line_unit), sum);
    if (!has_offset(format)) return sum;
    __m256 minus = _mm256_mul_ps(l->min[0], LOADF(a->sum));
    if (f->sub == KTL_FINE) minus = _mm256_fmadd_ps(l->min[1], LOADF(a->sum + 8), minus);
    return _mm256_fnmadd_ps(minus, _mm256_set1_ps(l->dmin), sum);
}

/* `blocks` of 32 columns against T tokens. Scales of rows are float16: each block's sums become floats. */
KTL_INLINE void dot_short_blocks(int format, int T, int blocks, const uint8_t *p, const ktl_act *const *act,
                                 __m256 *sum) {
    const ktl_format_info *f = &ktl_formats[format];
    const int is_signed = f->zero == 128;
    __m256 part[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) part[t] = ZEROF();
#pragma GCC unroll 8
    for (int j = 0; j < blocks; j++, p += f->block_bytes) {
        const __m256 d = _mm256_cvtph_ps(_mm_set1_epi16((short)ktl_load16(p)));
        __m256i code;
        if (format == KTL_Q8_0) code = LOADI(p + 2);
        else code = two_nibbles(p + (format == KTL_Q5_0 ? 6 : 2));
        if (format == KTL_Q5_0) code = _mm256_or_si256(code, spread_bits(p + 2));
        if (f->table) code = levels_of(code);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            __m256i dot = scaled_dot(is_signed, code, act[t]->q + 32 * j, LOADI(act[t]->line_scale), j);
            const __m128i start = _mm_cvtsi32_si128(act[t]->line_start[j]); /* in one lane of the eight */
            if (!is_signed) dot = _mm256_add_epi32(dot, _mm256_zextsi128_si256(start));
            part[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), d, part[t]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm256_fmadd_ps(part[t], _mm256_set1_ps(act[t]->line_unit), sum[t]);
}

/* A row against T tokens (up to 4), whose activations begin at x: acc[t] += the products. */
KTL_INLINE void dot_lines(int format, int T, const uint8_t *row, int64_t cols, const uint8_t *const *x,
                          int64_t chunk_bytes, float *const *acc) {
    const int64_t bytes = bytes_of_columns(format, KTL_CHUNK);
    __m256 sum[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = ZEROF();
    const uint8_t *far = row + KTL_FAR;
    for (int64_t c = 0, at = 0; c < cols; c += KTL_CHUNK, row += bytes, at += bytes) {
        const ktl_act *act[4];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) act[t] = (const ktl_act *)(x[t] + c / KTL_CHUNK * chunk_bytes);
        fetch(far, (size_t)at, (size_t)(at + bytes));
        if (ktl_formats[format].block_cols == KTL_CHUNK) {
            line l;
            load_line(format, row, &l);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[t] = dot_line(format, &l, act[t], sum[t]);
        } else if (cols - c >= KTL_CHUNK) {
            dot_short_blocks(format, T, KTL_CHUNK / KTL_GROUP, row, act, sum);
        } else {
            dot_short_blocks(format, T, (int)((cols - c) / KTL_GROUP), row, act, sum);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) *acc[t] += SUMF(sum[t]);
}
