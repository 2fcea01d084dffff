/* File blocks, as many rows at a time as a vector has lanes: what they have at the same place becomes its
 * lanes. So scales are taken apart for all of them at once, and codes come as a tile has them: to be stored
 * in one (many tokens), or multiplied at once (few). In the words of kernel.inc.h, and
 *     ROW_WORDS(p, bytes)  16 bytes each from p, 4 rows on, and so on: a row a lane of 128 bits
 *     LOW32 TOP32 LOW64 TOP64(a, b)   lanes of both in turn, within 128 bits
 *     CHOOSE_BITS(mask, a, b)         a where mask has ones
 *     EACH128(v) SHUFFLE8(v, by)      128 bits everywhere; bytes chosen within them
 *     ADD_WHERE(v, bits, ones, more)  more in bytes where `bits` has all of `ones`, of which there is one
 *     LOW_F16(v)                      float16 in the low halves of lanes */

/* Every fourth row, and bytes from one to the next: an address of each row for an instruction, where 16 of
 * them would not fit the registers. */
typedef struct {
    const uint8_t *fourth[LANES / 4];
    int64_t bytes;
} lane_rows;

KTL_INLINE lane_rows rows_at(const uint8_t *row, int64_t row_bytes) {
    lane_rows r = {.bytes = row_bytes};
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; i++) {
        r.fourth[i] = row + 4 * i * row_bytes;
        __asm__("" : "+r"(r.fourth[i])); /* or GCC goes back to the first */
    }
    return r;
}

KTL_INLINE void skip(lane_rows *r, int64_t bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; i++) r->fourth[i] += bytes;
}

/* 16 bytes of each row from `at` on: v[j] has the rows' j-th words. Rows are put together by loading: 16
 * whole lines take twice the shuffles. */
KTL_INLINE void load_words(const lane_rows *r, int at, VI v[4]) {
    VI b[4];
#define WORDS(f) _mm_loadu_si128((const __m128i *)(r->fourth[f] + i * r->bytes + at))
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = ROW_WORDS(WORDS);
#undef WORDS
    b[0] = LOW32(v[0], v[1]);
    b[1] = TOP32(v[0], v[1]);
    b[2] = LOW32(v[2], v[3]);
    b[3] = TOP32(v[2], v[3]);
    v[0] = LOW64(b[0], b[2]);
    v[1] = TOP64(b[0], b[2]);
    v[2] = LOW64(b[1], b[3]);
    v[3] = TOP64(b[1], b[3]);
}

KTL_INLINE VI bytes_of(int value) { return SET1I((int)((unsigned)value * 0x01010101u)); }

/* Bits of words up or, below zero, down. */
KTL_INLINE VI moved(VI v, int by) { return by < 0 ? DOWNI(v, -by) : UPI(v, by); }

/* The words that begin with the upper half of `low`. */
KTL_INLINE VI astride(VI low, VI high) { return ORI(moved(low, -16), moved(high, 16)); }

/* Bytes of `bits` bits: below `base` from `low`, the others from `high`. */
KTL_INLINE VI joined(VI low, VI high, int base, int bits) {
    return ANDI(CHOOSE_BITS(bytes_of((1 << base) - 1), low, high), bytes_of((1 << bits) - 1));
}

/* The four bytes of words (below 128), less `zero`, as floats, times `by`. They stay at their place in the
 * word, and `by` is divided by a power of two. */
KTL_INLINE void byte_floats(VI v, int zero, VF by, VF *to) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int unit = 1 << 8 * j;
        const VI byte = SUBI(ANDI(v, SET1I(127 * unit)), SET1I(zero * unit));
        to[j] = MULF(TO_FLOAT(byte), MULF(by, SET1F(1.0f / (float)unit)));
    }
}

/* ---- a block of each row -------------------------------------------------------------------------------- */
typedef struct {
    VF scale[16], offset[16]; /* of its sub-blocks */
    VI high[8];              /* q5_0: rows' 32 high bits; q5_k, q3_k: 32 bytes of them */
} lane_block;

KTL_INLINE void load_block(int format, const lane_rows *r, lane_block *b) {
    VI v[4], w[4];
    VF *scale = b->scale, *offset = b->offset;
    if (format == KTL_Q4_K || format == KTL_Q5_K) { /* ktl_scales_k4 */
        load_words(r, 0, v);
        const VF d = LOW_F16(v[0]), minus = SUBF(ZEROF(), LOW_F16(moved(v[0], -16)));
        byte_floats(ANDI(v[1], bytes_of(63)), 0, d, scale);
        byte_floats(ANDI(v[2], bytes_of(63)), 0, minus, offset);
        byte_floats(joined(v[3], moved(v[1], -2), 4, 6), 0, d, scale + 4);
        byte_floats(joined(moved(v[3], -4), moved(v[2], -2), 4, 6), 0, minus, offset + 4);
    } else if (format == KTL_Q6_K) {
        load_words(r, 192, v);
        load_words(r, 194, w);
        /* Signed bytes: each to the top of its word. */
        const VF d = MULF(LOW_F16(moved(w[3], -16)), SET1F(1.0f / (1 << 24)));
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++)
            scale[s] = MULF(TO_FLOAT(ANDI(moved(v[s / 4], 24 - s % 4 * 8), SET1I(-(1 << 24)))), d);
    } else if (format == KTL_Q2_K) {
        load_words(r, 0, v);
        load_words(r, 68, w);
        const VF d = LOW_F16(w[3]), minus = SUBF(ZEROF(), LOW_F16(moved(w[3], -16)));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            byte_floats(ANDI(v[i], bytes_of(15)), 0, d, scale + 4 * i);
            byte_floats(ANDI(moved(v[i], -4), bytes_of(15)), 0, minus, offset + 4 * i);
        }
    } else if (format == KTL_Q3_K) { /* ktl_scales_k3 */
        load_words(r, 94, v);
        const VF d = LOW_F16(moved(v[3], -16));
        const VI low[2] = {astride(v[0], v[1]), astride(v[1], v[2])}, high = astride(v[2], v[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            byte_floats(joined(moved(low[i % 2], i < 2 ? 0 : -4), moved(high, 4 - 2 * i), 4, 6), 32, d,
                        scale + 4 * i);
    } else if (format == KTL_IQ4_XS) {
        load_words(r, 0, v);
        const VF d = LOW_F16(v[0]);
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++) {
            const VI low = ANDI(moved(v[1], -4 * s), SET1I(15));
            const VI high = ANDI(moved(v[0], -12 - 2 * s), SET1I(48));
            scale[s] = MULF(TO_FLOAT(SUBI(ORI(low, high), SET1I(32))), d);
        }
    } else { /* 32 columns */
        load_words(r, 0, v);
        scale[0] = LOW_F16(v[0]);
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
KTL_INLINE VI with_bits(VI codes, VI bits, int at) {
    const VI words = EACH128(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const VI byte = SHUFFLE8(bits, ADDI(words, bytes_of(at / 8)));
    return ADD_WHERE(codes, byte, SET1I(at % 8 ? (int)0x80402010 : 0x08040201), bytes_of(16));
}

/* Piece i: code[f][k] is the code vector of columns column_of(format, i, f) + 4k to + 4k + 3. */
KTL_INLINE void load_piece(int format, const lane_rows *r, const lane_block *b, int i, VI code[4][4]) {
    const ktl_format_info *info = &ktl_formats[format];
    const int six = format == KTL_Q6_K, fields = fields_of(format), base = info->base_bits;
    const int at = codes_at(format) + 16 * i + (six ? i / 2 * 32 : 0);
    VI low[2][4], more[4];
    const VI *high = six ? more : b->high + i % 2 * 4;
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
            VI c = moved(low[six ? f % 2 : 0][k], -base * (six ? f / 2 : f));
            if (info->high_bits && in_pairs(format))
                c = joined(c, moved(high[k], base - bit), base, base + info->high_bits);
            else if (base == 8) c = XORI(c, bytes_of(0x80));
            else c = ANDI(c, bytes_of((1 << base) - 1));
            if (format == KTL_Q5_0) c = with_bits(c, b->high[0], 16 * f + 4 * k);
            code[f][k] = info->table ? LOOKUP(c) : c;
        }
}

/* ---- many tokens: columns [column, column + cols) of the o-th LANES rows to a tile --------------------- */
KTL_INLINE void decode_rows(int format, const uint8_t *row, int64_t row_bytes, int64_t column, int cols, int o,
                            ktl_tile *tile) {
    const ktl_format_info *info = &ktl_formats[format];
    uint8_t *to = tile->code + o * VB;
    lane_rows r = rows_at(row + column / info->block_cols * info->block_bytes, row_bytes);
    for (int c = 0; c < cols; c += info->block_cols, skip(&r, info->block_bytes)) {
        lane_block b;
        load_block(format, &r, &b);
#pragma GCC unroll 16
        for (int s = 0; s < info->block_cols / info->sub; s++) {
            STOREF(tile->scale[c / info->sub + s] + o * LANES, b.scale[s]);
            if (ktl_has_dmin(format)) STOREF(tile->offset[c / info->sub + s] + o * LANES, b.offset[s]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < pieces_of(format); i++) {
            VI code[4][4];
            load_piece(format, &r, &b, i, code);
#pragma GCC unroll 4
            for (int f = 0; f < fields_of(format); f++)
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    STOREI(to + 16 * (c + column_of(format, i, f)) + 64 * k, code[f][k]);
        }
    }
    tile->codes = tile->code;
}

/* ---- few tokens ---------------------------------------------------------------------------------------- */
/* A block of each row against T tokens; its first column in the chunk. far: the next line to ask for; the rows that
 * come next are fetched in the order of memory as these are read, up to `end` before this block. */
KTL_INLINE void dot_block(int format, int T, const lane_rows *r, const uint8_t **far, const uint8_t *end, int first,
                          const ktl_act *const *act, VF *sum) {
    const ktl_format_info *info = &ktl_formats[format];
    const int sub = info->sub, pieces = pieces_of(format);
    const int run = run_of(format) < 4 ? run_of(format) : 4;
    VF part[4][4]; /* of each field, token: what shares the weights' scale */
    lane_block b;
    load_block(format, r, &b);
#pragma GCC unroll 8
    for (int i = 0; i < pieces; i++) {
        VI code[4][4];
        load_piece(format, r, &b, i, code);
        for (; *far < end + LANES * (i + 1) * info->block_bytes / pieces; *far = ktl_later(*far + 64))
            __builtin_prefetch(*far, 0, 2);
#pragma GCC unroll 4
        for (int f = 0; f < fields_of(format); f++) {
            const int at = column_of(format, i, f), s = at / sub, p = in_pairs(format) ? f : 0;
            __asm__ volatile("" ::: "memory"); /* GCC takes 20 times as long to compile it in one piece */
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int fine = (first + at) / KTL_FINE;
                VI two, dot = SET1I(act[t]->init[fine]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    dot = DOT_AT(dot, two, k, run, code[f][k], act[t]->q + first + at + 4 * k);
                const VF one = TO_FLOAT(dot), by = SET1F(act[t]->scale[fine]);
                part[p][t] = at % sub ? FMA(one, by, part[p][t]) : MULF(one, by);
                if ((at + KTL_FINE) % sub) continue;
                sum[t] = FMA(part[p][t], b.scale[s], sum[t]);
                if (ktl_has_dmin(format)) sum[t] = FMA(b.offset[s], SET1F(act[t]->sum[s]), sum[t]);
            }
        }
    }
}

/* All columns of LANES rows against T tokens (up to 4): acc[t] += the products. */
KTL_INLINE void dot_rows(int format, int T, const uint8_t *row, int64_t row_bytes, int64_t cols,
                         const uint8_t *const *x, int64_t chunk_bytes, float *const *acc) {
    const ktl_format_info *info = &ktl_formats[format];
    VF sum[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = ZEROF();
    lane_rows r = rows_at(row, row_bytes);
    const uint8_t *end = row + LANES * row_bytes, *far = end;
    for (int64_t c = 0; c < cols; c += KTL_CHUNK) {
        const int n = cols - c < KTL_CHUNK ? (int)(cols - c) : KTL_CHUNK;
        const ktl_act *act[4];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) act[t] = (const ktl_act *)(x[t] + c / KTL_CHUNK * chunk_bytes);
        for (int first = 0; first < n; first += info->block_cols) {
            dot_block(format, T, &r, &far, end, first, act, sum);
            end += LANES * info->block_bytes;
            skip(&r, info->block_bytes);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) STOREF(acc[t], ADDF(LOADF(acc[t]), sum[t]));
}
