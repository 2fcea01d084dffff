/* Many tokens against decoded tiles, a scale for every 16 or 32 columns, in sums of 16 bits. Included by
 * many.inc.h, in the words of kernel.inc.h and
 *     MAXI DIVF ROUND(v)              signed lanes; ROUND: to the nearest integer
 *     WHERE_MORE WHERE_MOST(a, b, yes, no)   lanes of `yes` where a > b, where a <= b
 *     TOP_HALVES(top, low)            the upper 16 bits of each lane from `top`
 *     ADD_PRODUCTS16(sum, a, b)       sum + both products of 16 bits
 *
 * AVX-512: where a product costs more than an addition or a shift: AMD's cores, whose two units for products
 * have all of VPDPBUSD, VPMADDWD and FMA, and stand beside two that add. Scales are products too. Instead of two
 * or three FMAs a sum (many.inc.h), the sums of two neighbouring units (what one pair of scales covers, 16 or 32
 * columns) become 16 bits each, side by side in a lane of 32; their scales are made from a row's and a token's,
 * 16 bits each, by one VPMULHRSW; one VPMADDWD scales and adds both. The rest is additions and shifts.
 *
 * AVX2: VPMADDUBSW leaves two sums of 16 bits a lane, the halves of one unit. They stay 16 bits to the unit's
 * end, instead of becoming one of 32 with every product, and the VPMADDWD that adds them scales them too. As all
 * that is integers to the end of 256 columns, sixteen registers last.
 *
 * Sums of codes less their centre fit 16 bits, or (AVX-512) lose up to four bits below what the rounding of the
 * activations loses. Scales are 15 bits of the largest of their kind in 256 columns: 3e-5 of it; AVX2's 11 bits
 * for codes of 6, 12 for 5, 13 for 4: so that 256 columns fit 32. */

/* A tile's scales: in a lane the first of two units above the second, or one of them twice (AVX2); the same for
 * the offsets of two sub-blocks. unit, offset_unit: what one of their steps is. */
struct KTL_ALIGNED pair_scales {
    int32_t scale[PAIRS == KTL_AVX2 ? 2 * KTL_PAIRS : KTL_PAIRS][KTL_PANEL], offset[KTL_PAIRS][KTL_PANEL];
    float unit[KTL_PANEL], offset_unit[KTL_PANEL];
};

/* So many that as many offsets times 16 bits fit 32. */
#define OFFSET_STEPS(count) ((count) > 8 ? 4095.0f : 8191.0f)

/* `count` numbers of LANES rows, each of them for `each` of a pair's two, to pairs of 16 bits; zeros up to 256
 * columns. */
KTL_INLINE void pair_rows(const float *from, int count, int each, int32_t *to, int whole, float steps,
                          float *unit) {
    /* On the bits: integers compare as magnitudes do, and what is no number is more than any. */
    VI four[4] = {SET1I(0), SET1I(0), SET1I(0), SET1I(0)}; /* one chain would be waited for */
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        four[i % 4] = MAXI(four[i % 4], ANDI(LOADI(from + i * KTL_PANEL), SET1I(0x7fffffff)));
    const VF most = AS_FLOAT(MAXI(MAXI(four[0], four[1]), MAXI(four[2], four[3])));
    const VF by = WHERE_MORE(most, SET1F(1e-30f), DIVF(SET1F(steps), most), ZEROF());
    /* An infinity shows in every product: it becomes NaN, as what is no number already. */
    const VF finite = WHERE_MORE(most, SET1F(1e-30f), MULF(most, SET1F(1.0f / steps)), ZEROF());
    STOREF(unit, WHERE_MOST(most, SET1F(3.4028235e38f), finite, SET1F(__builtin_nanf(""))));
    VI above = SET1I(0);
#pragma GCC unroll 32
    for (int i = 0; i < whole * each; i++) {
        const VI v = i / each < count ? ROUND(MULF(LOADF(from + i / each * KTL_PANEL), by)) : SET1I(0);
        if (i % 2) STOREI(to + i / 2 * KTL_PANEL, TOP_HALVES(above, v));
        above = UPI(v, 16);
    }
}

/* Codes are meant less their centre: offsets change with it. */
KTL_INLINE void pair_tile(int sub, int fine, int centre, int groups, const ktl_tile *tile, pair_scales *pairs) {
    const int count = groups * KTL_GROUP / sub, whole = KTL_CHUNK / sub;
    float offset[16][KTL_PANEL] KTL_ALIGNED;
    const int units = fine ? sub / KTL_FINE : 1;
    for (int o = 0; o < KTL_PANEL; o += LANES) {
        pair_rows(tile->scale[0] + o, count, PAIRS == KTL_AVX2 ? 2 * units : units, pairs->scale[0] + o, whole,
                  32767.0f, pairs->unit + o);
        if (!centre) continue;
        for (int s = 0; s < count; s++)
            STOREF(offset[s] + o, FMA(SET1F((float)centre), LOADF(tile->scale[s] + o), LOADF(tile->offset[s] + o)));
        pair_rows(offset[0] + o, count, 1, pairs->offset[0] + o, whole, OFFSET_STEPS(whole), pairs->offset_unit + o);
    }
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

KTL_INLINE VI pair_of(const void *p) {
    int32_t two;
    memcpy(&two, p, 4);
    return SET1I(two);
}

/* What the pairs' sums mean, and the offsets, to the float sums. offsets: pairs of them. */
KTL_INLINE void add_pairs(int T, int offsets, VF sum[8][RV], const pair_scales *pairs, const ktl_act *act,
                          float *acc, int64_t stride) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        VI minus[RV] = {SET1I(0), SET1I(0)};
#pragma GCC unroll 8
        for (int s = 0; s < offsets; s++) {
            const VI sums = pair_of(&act[t].pair_sum[2 * s]);
#pragma GCC unroll 2
            for (int r = 0; r < RV; r++)
                minus[r] = ADD_PRODUCTS16(minus[r], LOADI(pairs[r / VN].offset[s] + r % VN * LANES), sums);
        }
#pragma GCC unroll 2
        for (int r = 0; r < RV; r++) {
            const pair_scales *by = pairs + r / VN;
            const int at = r % VN * LANES;
            float *to = acc + t * stride + r * LANES;
            VF all = FMA(MULF(sum[t][r], SET1F(act[t].unit)), LOADF(by->unit + at), LOADF(to));
            if (offsets)
                all = FMA(MULF(TO_FLOAT(minus[r]), SET1F(act[t].sum_unit)), LOADF(by->offset_unit + at), all);
            STOREF(to, all);
        }
    }
}

#if VB == 64
/* Columns [at, at + unit) of PANELS panels times T tokens. */
KTL_INLINE void add_products(int T, int unit, const uint8_t *const codes[PANELS], int64_t at,
                             const ktl_act *act, VI dot[8][PANELS]) {
#pragma GCC unroll 8
    for (int j = 0; j < unit; j += 4) {
        const VI w[PANELS] = {LOADI(codes[0] + (at + j) * 16), LOADI(codes[1] + (at + j) * 16)};
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const VI x = pair_of(act[t].q + at + j);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) dot[t][p] = dot4(dot[t][p], w[p], x);
        }
    }
}

/* T tokens x PANELS tiles. Sums of the first unit move up by 16 bits, those of the second are added below;
 * they start at 2^15 (ktl_act.init), so that nothing is borrowed from above, and one XOR makes them
 * signed again. Where sums lose `dropped` bits, both wait for each other instead. */
KTL_INLINE void multiply_pairs(int T, int unit, int offsets, int dropped, const ktl_tile *tile,
                               const pair_scales *pairs, int groups, const ktl_act *act, float *acc,
                               int64_t stride) {
    const uint8_t *const codes[PANELS] = {tile[0].codes, tile[1].codes};
    const int64_t cols = groups * KTL_GROUP;
    VF sum[8][PANELS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = ZEROF();
    for (int64_t at = 0, i = 0; at < cols; at += 2 * unit, i++) {
        const int64_t second = at + unit;
        VI dot[8][PANELS], above[8][PANELS];
        for (int64_t g = at / KTL_GROUP; g < (at + 2 * unit) / KTL_GROUP; g++) {
            FETCH_ACTS(T, sizeof(ktl_act), 64 * g);
            FETCH_SUMS(T, PANELS, g);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) dot[t][0] = dot[t][1] = pair_of(&act[t].init[at / KTL_FINE]);
        add_products(T, unit, codes, at, act, dot);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const VI start = pair_of(&act[t].init[second / KTL_FINE]);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) {
                above[t][p] = UPI(dot[t][p], 16 - dropped);
                dot[t][p] = dropped ? start : ADDI(above[t][p], start);
            }
        }
        if (second < cols) add_products(T, unit, codes, second, act, dot);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            const VI scale = _mm512_load_si512(pairs[p].scale[i]);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const VI below = _mm512_srli_epi32(dot[t][p], dropped);
                const VI both = dropped ? _mm512_mask_blend_epi16(0xaaaaaaaa, below, above[t][p])
                                             : _mm512_xor_si512(dot[t][p], SET1I(0x8000));
                const VI scales = _mm512_mulhrs_epi16(scale, pair_of(act[t].pair_scale[i]));
                sum[t][p] = ADDF(sum[t][p], TO_FLOAT(_mm512_madd_epi16(both, scales)));
            }
        }
    }
    add_pairs(T, offsets, sum, pairs, act, acc, stride);
}
#else
/* T tokens x PANELS tiles. Both halves of a sum start less the codes' centre (ktl_act.init), modulo 2^16 on the
 * way and within it at the end. */
KTL_INLINE void multiply_pairs(int T, int unit, int offsets, int dropped, const ktl_tile *tile,
                               const pair_scales *pairs, int groups, const ktl_act *act, float *acc,
                               int64_t stride) {
    const uint8_t *codes = tile[0].codes;
    VI all[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) all[t][0] = all[t][1] = SET1I(0);
    for (int64_t at = 0, i = 0; at < groups * KTL_GROUP; at += unit, i++) {
        VI two[8][RV];
        if (unit == KTL_GROUP || i % 2) {
            FETCH_ACTS(T, sizeof(ktl_act), 64 * (at / KTL_GROUP));
            FETCH_SUMS(T, PANELS, at / KTL_GROUP);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) two[t][0] = two[t][1] = pair_of(&act[t].init[at / KTL_FINE]);
#pragma GCC unroll 8
        for (int j = 0; j < unit; j += 4) {
            const VI w[RV] = {LOADI(codes + (at + j) * 16), LOADI(codes + (at + j) * 16 + VB)};
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const VI x = pair_of(act[t].q + at + j);
                add_four(two[t], w, x);
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < RV; r++) {
            const VI scale = LOADI(pairs->scale[i] + r * LANES);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
                all[t][r] = add_scaled(all[t][r], two[t][r], scale, pair_of(act[t].pair_scale[i]));
        }
    }
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int r = 0; r < RV; r++) sum[t][r] = TO_FLOAT(all[t][r]);
    add_pairs(T, offsets, sum, pairs, act, acc, stride);
}
#endif
