/* File blocks, 16 rows at a time: what 16 rows have at the same place becomes the lanes of a vector. So
 * scales are taken apart for all of them at once, and codes come as a tile has them: to be stored in one
 * (many tokens), or multiplied at once (few). */

/* Formats in blocks of 32 or 256 columns. */
#define HAS_ROWS16(format) \
    (ktl_formats[format].block_cols == KTL_GROUP || ktl_formats[format].block_cols == KTL_CHUNK)
/* Few tokens, where a row's scales take longer than its products (dot_row). */
#define FEW_ROWS16(format) ((format) == KTL_Q4_K || (format) == KTL_Q5_K || (format) == KTL_Q6_K)

/* Rows 0, 4, 8, 12, and bytes from one to the next: an address of each row for an instruction, where 16 of
 * them would not fit the registers. */
typedef struct {
    const uint8_t *fourth[4];
    int64_t bytes;
} rows16;

KTL_INLINE rows16 rows16_at(const uint8_t *row, int64_t row_bytes) {
    rows16 r = {{row, row + 4 * row_bytes, row + 8 * row_bytes, row + 12 * row_bytes}, row_bytes};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) __asm__("" : "+r"(r.fourth[i])); /* or GCC goes back to the first */
    return r;
}

KTL_INLINE void skip16(rows16 *r, int64_t bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r->fourth[i] += bytes;
}

/* 16 bytes of each row from `at` on: v[j] has the rows' j-th words. Rows are put together by loading: 16
 * whole lines take twice the shuffles. */
KTL_INLINE void load_words(const rows16 *r, int at, __m512i v[4]) {
    __m512i b[4];
#define WORDS(f, i) _mm_loadu_si128((const __m128i *)(r->fourth[f] + (i) * r->bytes + at))
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* rows i, 4 + i, 8 + i, 12 + i */
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(WORDS(0, i)), WORDS(1, i), 1);
        const __m256i top = _mm256_inserti128_si256(_mm256_castsi128_si256(WORDS(2, i)), WORDS(3, i), 1);
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), top, 1);
    }
#undef WORDS
    b[0] = _mm512_unpacklo_epi32(v[0], v[1]);
    b[1] = _mm512_unpackhi_epi32(v[0], v[1]);
    b[2] = _mm512_unpacklo_epi32(v[2], v[3]);
    b[3] = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(b[0], b[2]);
    v[1] = _mm512_unpackhi_epi64(b[0], b[2]);
    v[2] = _mm512_unpacklo_epi64(b[1], b[3]);
    v[3] = _mm512_unpackhi_epi64(b[1], b[3]);
}

KTL_INLINE __m512i bytes_of(int value) { return _mm512_set1_epi8((char)value); }

/* Bits of words up or, below zero, down. */
KTL_INLINE __m512i moved(__m512i v, int by) {
    return by < 0 ? _mm512_srli_epi32(v, (unsigned)-by) : _mm512_slli_epi32(v, (unsigned)by);
}

/* The words that begin with the upper half of `low`. */
KTL_INLINE __m512i astride(__m512i low, __m512i high) {
    return _mm512_or_si512(moved(low, -16), moved(high, 16));
}

/* Bytes of `bits` bits: below `base` from `low`, the others from `high`. */
KTL_INLINE __m512i joined(__m512i low, __m512i high, int base, int bits) {
    const __m512i both = _mm512_ternarylogic_epi32(high, low, bytes_of((1 << base) - 1), 0xd8);
    return ANDI(both, bytes_of((1 << bits) - 1));
}

/* float16 in the low halves of words. */
KTL_INLINE __m512 low_f16(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

/* The four bytes of words (below 128), less `zero`, as floats, times `by`. They stay at their place in the
 * word, and `by` is divided by a power of two. */
KTL_INLINE void byte_floats(__m512i v, int zero, __m512 by, __m512 *to) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int unit = 1 << 8 * j;
        const __m512i byte = _mm512_sub_epi32(ANDI(v, SET1I(127 * unit)), SET1I(zero * unit));
        to[j] = MULF(TO_FLOAT(byte), MULF(by, SET1F(1.0f / (float)unit)));
    }
}

/* ---- a block of 16 rows ---------------------------------------------------------------------------- */
typedef struct {
    __m512 scale[16], offset[16]; /* of its sub-blocks */
    __m512i high[8];              /* q5_0: rows' 32 high bits; q5_k, q3_k: 32 bytes of them */
} block16;

KTL_INLINE void load_block16(int format, const rows16 *r, block16 *b) {
    __m512i v[4], w[4];
    __m512 *scale = b->scale, *offset = b->offset;
    if (format == KTL_Q4_K || format == KTL_Q5_K) { /* ktl_scales_k4 */
        load_words(r, 0, v);
        const __m512 d = low_f16(v[0]), minus = SUBF(ZEROF(), low_f16(moved(v[0], -16)));
        byte_floats(ANDI(v[1], bytes_of(63)), 0, d, scale);
        byte_floats(ANDI(v[2], bytes_of(63)), 0, minus, offset);
        byte_floats(joined(v[3], moved(v[1], -2), 4, 6), 0, d, scale + 4);
        byte_floats(joined(moved(v[3], -4), moved(v[2], -2), 4, 6), 0, minus, offset + 4);
    } else if (format == KTL_Q6_K) {
        load_words(r, 192, v);
        load_words(r, 194, w);
        /* Signed bytes: each to the top of its word. */
        const __m512 d = MULF(low_f16(moved(w[3], -16)), SET1F(1.0f / (1 << 24)));
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++)
            scale[s] = MULF(TO_FLOAT(ANDI(moved(v[s / 4], 24 - s % 4 * 8), SET1I(-(1 << 24)))), d);
    } else if (format == KTL_Q2_K) {
        load_words(r, 0, v);
        load_words(r, 68, w);
        const __m512 d = low_f16(w[3]), minus = SUBF(ZEROF(), low_f16(moved(w[3], -16)));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            byte_floats(ANDI(v[i], bytes_of(15)), 0, d, scale + 4 * i);
            byte_floats(ANDI(moved(v[i], -4), bytes_of(15)), 0, minus, offset + 4 * i);
        }
    } else if (format == KTL_Q3_K) { /* ktl_scales_k3 */
        load_words(r, 94, v);
        const __m512 d = low_f16(moved(v[3], -16));
        const __m512i low[2] = {astride(v[0], v[1]), astride(v[1], v[2])}, high = astride(v[2], v[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            byte_floats(joined(moved(low[i % 2], i < 2 ? 0 : -4), moved(high, 4 - 2 * i), 4, 6), 32, d,
                        scale + 4 * i);
    } else if (format == KTL_IQ4_XS) {
        load_words(r, 0, v);
        const __m512 d = low_f16(v[0]);
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++) {
            const __m512i low = ANDI(moved(v[1], -4 * s), SET1I(15));
            const __m512i high = ANDI(moved(v[0], -12 - 2 * s), SET1I(48));
            scale[s] = MULF(TO_FLOAT(_mm512_sub_epi32(_mm512_or_si512(low, high), SET1I(32))), d);
        }
    } else { /* 32 columns */
        load_words(r, 0, v);
        scale[0] = low_f16(v[0]);
        b->high[0] = astride(v[0], v[1]);
    }
    for (int i = 0; i < 2 && (format == KTL_Q5_K || format == KTL_Q3_K); i++)
        load_words(r, (format == KTL_Q5_K ? 16 : 0) + 16 * i, b->high + 4 * i);
}

/* ---- its codes, in pieces of 16 bytes a row ---------------------------------------------------------- */
/* Fields of bits in a byte (q6_k: in the two bytes that share a byte of high bits), and pieces. */
KTL_INLINE int fields_of(int format) {
    return format == KTL_Q8_0 ? 1 : format == KTL_Q2_K || format == KTL_Q3_K || format == KTL_Q6_K ? 4 : 2;
}
KTL_INLINE int pieces_of(int format) { return ktl_formats[format].block_cols / (16 * fields_of(format)); }

/* Whether a field's columns go on in the next piece: 32 bytes hold 32 columns of each field. */
KTL_INLINE int in_pairs(int format) {
    return ktl_formats[format].block_cols == KTL_CHUNK && format != KTL_IQ4_XS;
}

/* The first of 16 columns: field f of piece i. */
KTL_INLINE int column_of(int format, int i, int f) {
    const int fields = fields_of(format);
    return in_pairs(format) ? 32 * (i / 2 * fields + f) + 16 * (i % 2) : 16 * (i * fields + f);
}

/* Where pieces begin. */
KTL_INLINE int codes_at(int format) {
    switch (format) {
        case KTL_Q6_K: return 0;
        case KTL_Q5_0: return 6;
        case KTL_IQ4_XS: return 8;
        case KTL_Q2_K:
        case KTL_Q4_K: return 16;
        case KTL_Q3_K: return 32;
        case KTL_Q5_K: return 48;
        default: return 2;
    }
}

/* 16 more in byte j of a word whose bit `at` + j of `bits` is set; at is a multiple of 4. */
KTL_INLINE __m512i with_bits(__m512i codes, __m512i bits, int at) {
    const __m512i words = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const __m512i byte = _mm512_shuffle_epi8(bits, _mm512_add_epi8(words, bytes_of(at / 8)));
    const __mmask64 set = _mm512_test_epi8_mask(byte, SET1I(at % 8 ? (int)0x80402010 : 0x08040201));
    return _mm512_mask_add_epi8(codes, set, codes, bytes_of(16));
}

/* Piece i: code[f][k] is the code vector of columns column_of(format, i, f) + 4k to + 4k + 3. */
KTL_INLINE void load_piece16(int format, const rows16 *r, const block16 *b, int i, __m512i code[4][4]) {
    const ktl_format_info *info = &ktl_formats[format];
    const int six = format == KTL_Q6_K, fields = fields_of(format), base = info->base_bits;
    const int at = codes_at(format) + 16 * i + (six ? i / 2 * 32 : 0);
    __m512i low[2][4], more[4];
    const __m512i *high = six ? more : b->high + i % 2 * 4;
    load_words(r, at, low[0]);
    if (six) {
        load_words(r, at + 32, low[1]);
        load_words(r, 128 + 16 * i, more);
    }
#pragma GCC unroll 4
    for (int f = 0; f < fields; f++)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const int bit = six ? 2 * f : i / 2 * fields + f; /* in the bytes of high bits */
            __m512i c = moved(low[six ? f % 2 : 0][k], -base * (six ? f / 2 : f));
            if (info->high_bits && in_pairs(format))
                c = joined(c, moved(high[k], base - bit), base, base + info->high_bits);
            else if (base == 8) c = _mm512_xor_si512(c, bytes_of(0x80));
            else c = ANDI(c, bytes_of((1 << base) - 1));
            if (format == KTL_Q5_0) c = with_bits(c, b->high[0], 16 * f + 4 * k);
            code[f][k] = info->table ? LOOKUP(c) : c;
        }
}

/* ---- many tokens: columns [column, column + cols) of 16 rows to a tile ------------------------------- */
KTL_INLINE void decode_rows16(int format, const uint8_t *row, int64_t row_bytes, int64_t column, int cols,
                              ktl_tile *tile) {
    const ktl_format_info *info = &ktl_formats[format];
    rows16 r = rows16_at(row + column / info->block_cols * info->block_bytes, row_bytes);
    for (int c = 0; c < cols; c += info->block_cols, skip16(&r, info->block_bytes)) {
        block16 b;
        load_block16(format, &r, &b);
#pragma GCC unroll 16
        for (int s = 0; s < info->block_cols / info->sub; s++) {
            STOREF(tile->scale[c / info->sub + s], b.scale[s]);
            if (ktl_has_dmin(format)) STOREF(tile->offset[c / info->sub + s], b.offset[s]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < pieces_of(format); i++) {
            __m512i code[4][4];
            load_piece16(format, &r, &b, i, code);
#pragma GCC unroll 4
            for (int f = 0; f < fields_of(format); f++)
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    _mm512_store_si512(tile->code + 16 * (c + column_of(format, i, f)) + 64 * k, code[f][k]);
        }
    }
    tile->codes = tile->code;
}

/* ---- few tokens ---------------------------------------------------------------------------------------- */
/* The rows that are fetched meanwhile, a line of each with some piece: asked for all at once, they are
 * waited for. */
enum { ROWS_AHEAD = 32 };

KTL_INLINE __m512i four(const ktl_act *a, int column) {
    int32_t v;
    memcpy(&v, a->q + column, 4);
    return SET1I(v);
}

/* A block of 256 columns of 16 rows against T tokens. */
KTL_INLINE void dot_block16(int format, int T, const rows16 *r, const ktl_act *const *act, __m512 *sum) {
    const ktl_format_info *info = &ktl_formats[format];
    const int sub = info->sub, pieces = pieces_of(format), lines = (info->block_bytes + 63) / 64;
    __m512 part[4][4]; /* of each field, token: what shares the weights' scale */
    block16 b;
    load_block16(format, r, &b);
#pragma GCC unroll 8
    for (int i = 0; i < pieces; i++) {
        __m512i code[4][4];
        load_piece16(format, r, &b, i, code);
        for (int l = i * lines / pieces; l < (i + 1) * lines / pieces; l++)
#pragma GCC unroll 16
            for (int n = 0; n < 16; n++)
                __builtin_prefetch(r->fourth[n / 4] + (ROWS_AHEAD + n % 4) * r->bytes + 64 * l, 0, 2);
#pragma GCC unroll 4
        for (int f = 0; f < fields_of(format); f++) {
            const int column = column_of(format, i, f), s = column / sub;
            __asm__ volatile("" ::: "memory"); /* GCC takes 20 times as long to compile it in one piece */
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                __m512i dot = SET1I(act[t]->init[column / KTL_FINE]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    dot = _mm512_dpbusd_epi32(dot, code[f][k], four(act[t], column + 4 * k));
                const __m512 one = TO_FLOAT(dot), by = SET1F(act[t]->scale[column / KTL_FINE]);
                part[f][t] = column % sub ? FMA(one, by, part[f][t]) : MULF(one, by);
                if ((column + KTL_FINE) % sub) continue;
                sum[t] = FMA(part[f][t], b.scale[s], sum[t]);
                if (ktl_has_dmin(format)) sum[t] = FMA(b.offset[s], SET1F(act[t]->sum[s]), sum[t]);
            }
        }
    }
}

/* All columns of 16 rows against T tokens (up to 4): acc[t] += the 16 products. */
KTL_INLINE void dot_rows16(int format, int T, const uint8_t *row, int64_t row_bytes, int64_t cols,
                           const uint8_t *const *x, int64_t chunk_bytes, float *const *acc) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = LOADF(acc[t]);
    rows16 r = rows16_at(row, row_bytes);
    for (int64_t c = 0; c < cols / KTL_CHUNK; c++, skip16(&r, ktl_formats[format].block_bytes)) {
        const ktl_act *act[4];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) act[t] = (const ktl_act *)(x[t] + c * chunk_bytes);
        dot_block16(format, T, &r, act, sum);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) STOREF(acc[t], sum[t]);
}
