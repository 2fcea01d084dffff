/* Many tokens against decoded tiles, a scale for every 16 or 32 columns, without an instruction that multiplies
 * bytes and adds four products: VPMADDUBSW makes sums of two in 16 bits, VPMADDWD would make each of them 32.
 * Codes of six bits and less leave room to add some of them first. Included by many.inc.h for AVX2.
 *
 * Sixteen registers do not hold integer sums and float sums: the integer sums of 256 columns come first, into
 * L1, and are scaled after. */

/* The integer sums of `unit` columns: [unit][token][vector of rows]. */
KTL_INLINE void add_units(int T, int unit, int run, const ktl_tile *tile, int groups, const ktl_act *act,
                          VI *to, const float *acc, int64_t stride) {
    const uint8_t *codes[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; p++) codes[p] = tile[p].codes;
    for (int64_t at = 0; at < groups * KTL_GROUP; at += unit, to += T * RV) {
        VI dot[8][RV], two[8][RV];
        if (at % KTL_GROUP == 0) {
            FETCH_ACTS(T, sizeof(ktl_act), 2 * at);
            FETCH_SUMS(T, PANELS, at / KTL_GROUP);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) dot[t][r] = SET1I(0);
        STEP_OF(T, RV, unit, run)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int r = 0; r < RV; r++) to[t * RV + r] = dot[t][r];
    }
}

/* T tokens x PANELS tiles. fine: activations with a scale for every 16. */
KTL_INLINE void multiply_short(int T, int sub, int mins, int run, int fine, const ktl_tile *tile,
                               int groups, const ktl_act *act, float *acc, int64_t stride) {
    const int unit = fine ? KTL_FINE : sub;
    VI dots[KTL_CHUNK / KTL_FINE * 8 * RV];
    const VI *dot = dots;
    add_units(T, unit, run, tile, groups, act, dots, acc, stride);
    VF sum[8][RV];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) sum[t][r] = LOADF(acc + t * stride + r * (VB / 4));
    for (int64_t at = 0; at < groups * KTL_GROUP; at += unit, dot += T * RV) {
        const int64_t s = at / sub, i = at / KTL_FINE;
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) {
            const VF scale = LOADF(SCALE_OF(r, s));
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const VI all = mins ? dot[t * RV + r] : ADDI(dot[t * RV + r], SET1I(act[t].init[i]));
                sum[t][r] = FMA(MULF(TO_FLOAT(all), SET1F(act[t].scale[i])), scale, sum[t][r]);
            }
            if (!mins || (at + unit) % sub) continue;
            const VF offset = LOADF(tile[r / VN].offset[s] + r % VN * (VB / 4));
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[t][r] = FMA(offset, SET1F(act[t].sum[s]), sum[t][r]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RV; r++) STOREF(acc + t * stride + r * (VB / 4), sum[t][r]);
}
