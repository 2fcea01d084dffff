/* Many tokens against decoded tiles, a scale for every 16 or 32 columns, where a product costs more than
 * an addition or a shift: AMD's cores, whose two units for products have all of VPDPBUSD, VPMADDWD and FMA,
 * and stand beside two that add. Included by many.inc.h for AVX-512.
 *
 * Scales are products too. Instead of two or three FMAs a sum (many.inc.h), the sums of two neighbouring
 * units (what one pair of scales covers, 16 or 32 columns) become 16 bits each, side by side in a lane of
 * 32; their scales are made from a row's and a token's, 16 bits each, by one VPMULHRSW; one VPMADDWD scales
 * and adds both. The rest is additions and shifts.
 *
 * Sums of codes less their centre fit 16 bits, or lose up to four bits below what the rounding of the
 * activations loses. Scales are 15 bits of the largest of their kind in 256 columns: 3e-5 of it. */

/* A tile's scales: in a lane the first of two units above the second, the same for the offsets of two
 * sub-blocks. unit, offset_unit: what one of their steps is. */
typedef struct KTL_ALIGNED {
    int32_t scale[KTL_PAIRS][KTL_PANEL], offset[KTL_PAIRS][KTL_PANEL];
    float unit[KTL_PANEL], offset_unit[KTL_PANEL];
} pair_scales;

/* So many that as many offsets times 16 bits fit 32. */
#define OFFSET_STEPS(count) ((count) > 8 ? 4095.0f : 8191.0f)

/* `count` vectors of 16 rows, each of them in `each` units, to pairs of 16 bits; zeros up to 256 columns. */
KTL_INLINE void pair_rows(const float (*from)[KTL_PANEL], int count, int each, int32_t (*to)[KTL_PANEL],
                          int whole, float steps, float *unit) {
    /* On the bits: integers compare as magnitudes do, and what is no number is more than any. */
    __m512i four[4] = {SET1I(0), SET1I(0), SET1I(0), SET1I(0)}; /* one chain would be waited for */
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        four[i % 4] = _mm512_max_epi32(four[i % 4], ANDI(LOADI(from[i]), SET1I(0x7fffffff)));
    const __m512 most = AS_FLOAT(_mm512_max_epi32(_mm512_max_epi32(four[0], four[1]),
                                                  _mm512_max_epi32(four[2], four[3])));
    const __mmask16 some = _mm512_cmp_ps_mask(most, SET1F(1e-30f), _CMP_GT_OQ);
    const __m512 by = _mm512_maskz_div_ps(some, SET1F(steps), most);
    /* An infinity shows in every product: it becomes NaN, as what is no number already. */
    const __mmask16 finite = _mm512_cmp_ps_mask(most, SET1F(3.4028235e38f), _CMP_LE_OQ);
    STOREF(unit, _mm512_mask_mul_ps(SET1F(__builtin_nanf("")), finite, _mm512_maskz_mov_ps(some, most),
                                    SET1F(1.0f / steps)));
    __m512i above = SET1I(0);
#pragma GCC unroll 16
    for (int i = 0; i < whole * each; i++) {
        const __m512i v = i / each < count ? _mm512_cvtps_epi32(MULF(LOADF(from[i / each]), by)) : SET1I(0);
        if (i % 2) _mm512_store_si512(to[i / 2], _mm512_mask_blend_epi16(0xaaaaaaaa, v, above));
        above = _mm512_slli_epi32(v, 16);
    }
}

/* Codes are meant less their centre: offsets change with it. */
KTL_INLINE void pair_tile(int sub, int fine, int centre, int groups, const ktl_tile *tile, pair_scales *pairs) {
    const int count = groups * KTL_GROUP / sub, whole = KTL_CHUNK / sub;
    float offset[16][KTL_PANEL] KTL_ALIGNED;
    pair_rows(tile->scale, count, fine ? sub / KTL_FINE : 1, pairs->scale, whole, 32767.0f, pairs->unit);
    if (!centre) return;
    for (int s = 0; s < count; s++)
        STOREF(offset[s], FMA(SET1F((float)centre), LOADF(tile->scale[s]), LOADF(tile->offset[s])));
    pair_rows(offset, count, 1, pairs->offset, whole, OFFSET_STEPS(whole), pairs->offset_unit);
}

static void pair_tiles(int format, int fine, int panels, int groups, const ktl_tile *tiles,
                       pair_scales *pairs) {
    const int sub = ktl_formats[format].sub, centre = has_offset(format) ? ktl_centre(format) : 0;
    for (int p = 0; p < panels; p++) /* whole ones by constants */
        if (groups < KTL_CHUNK / KTL_GROUP) pair_tile(sub, fine, centre, groups, tiles + p, pairs + p);
        else if (sub == 16) pair_tile(16, 0, centre, 8, tiles + p, pairs + p);
        else if (fine) pair_tile(32, 1, centre, 8, tiles + p, pairs + p);
        else pair_tile(32, 0, centre, 8, tiles + p, pairs + p);
}

KTL_INLINE __m512i pair_of(const void *p) {
    int32_t two;
    memcpy(&two, p, 4);
    return SET1I(two);
}

/* Columns [at, at + unit) of PANELS panels times T tokens. */
KTL_INLINE void add_products(int T, int unit, const uint8_t *const codes[PANELS], int64_t at,
                             const ktl_act *act, __m512i dot[8][PANELS]) {
#pragma GCC unroll 8
    for (int j = 0; j < unit; j += 4) {
        const __m512i w[PANELS] = {LOADI(codes[0] + (at + j) * 16), LOADI(codes[1] + (at + j) * 16)};
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512i x = pair_of(act[t].q + at + j);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) dot[t][p] = dot4(dot[t][p], w[p], x);
        }
    }
}

/* T tokens x PANELS tiles. Sums of the first unit move up by 16 bits, those of the second are added below;
 * they start at 2^15 (ktl_act.init), so that nothing is borrowed from above, and one XOR makes them
 * signed again. Where sums lose `dropped` bits, both wait for each other instead.
 * offsets: pairs of them. */
KTL_INLINE void multiply_pairs(int T, int unit, int offsets, int dropped, const ktl_tile *tile,
                               const pair_scales *pairs, int groups, const ktl_act *act, float *acc,
                               int64_t stride) {
    const uint8_t *const codes[PANELS] = {tile[0].codes, tile[1].codes};
    const int64_t cols = groups * KTL_GROUP;
    __m512 sum[8][PANELS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = ZEROF();
    for (int64_t at = 0, i = 0; at < cols; at += 2 * unit, i++) {
        const int64_t second = at + unit;
        __m512i dot[8][PANELS], above[8][PANELS];
        for (int64_t g = at / KTL_GROUP; g < (at + 2 * unit) / KTL_GROUP; g++) {
            FETCH_ACTS(T, sizeof(ktl_act), 64 * g);
            FETCH_SUMS(T, PANELS, g);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) dot[t][0] = dot[t][1] = pair_of(&act[t].init[at / KTL_FINE]);
        add_products(T, unit, codes, at, act, dot);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512i start = pair_of(&act[t].init[second / KTL_FINE]);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) {
                above[t][p] = _mm512_slli_epi32(dot[t][p], 16 - dropped);
                dot[t][p] = dropped ? start : ADDI(above[t][p], start);
            }
        }
        if (second < cols) add_products(T, unit, codes, second, act, dot);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            const __m512i scale = _mm512_load_si512(pairs[p].scale[i]);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const __m512i below = _mm512_srli_epi32(dot[t][p], dropped);
                const __m512i both = dropped ? _mm512_mask_blend_epi16(0xaaaaaaaa, below, above[t][p])
                                             : _mm512_xor_si512(dot[t][p], SET1I(0x8000));
                const __m512i scales = _mm512_mulhrs_epi16(scale, pair_of(&act[t].pair_scale[2 * i]));
                sum[t][p] = ADDF(sum[t][p], TO_FLOAT(_mm512_madd_epi16(both, scales)));
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        __m512i minus[PANELS] = {SET1I(0), SET1I(0)};
#pragma GCC unroll 8
        for (int s = 0; s < offsets; s++) {
            const __m512i sums = pair_of(&act[t].pair_sum[2 * s]);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++)
                minus[p] = _mm512_dpwssd_epi32(minus[p], _mm512_load_si512(pairs[p].offset[s]), sums);
        }
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            float *to = acc + t * stride + p * KTL_PANEL;
            __m512 all = FMA(MULF(sum[t][p], SET1F(act[t].unit)), LOADF(pairs[p].unit), LOADF(to));
            if (offsets)
                all = FMA(MULF(TO_FLOAT(minus[p]), SET1F(act[t].sum_unit)), LOADF(pairs[p].offset_unit), all);
            STOREF(to, all);
        }
    }
}
