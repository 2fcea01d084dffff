/* Many tokens against codes of 8 bits, in words of 16 bits, AVX2. Included by many.inc.h.
 *
 * VPMADDUBSW's sums of two such products do not fit 16 bits, and signs must be moved first: four instructions for
 * 32 products, three of them in the two units that multiply. VPMADDWD on words takes four, too, two of them there,
 * and words have bits to spare: weights take 13 of them, with their scales in, and activations 12, so that all of
 * 256 columns is one sum of 32 bits, scaled once. It loses less as well: a tenth of what activations of 8 bits
 * lose (4e-4 of the norm).
 *
 * A tile's words: of each four columns the first and the third of 16 rows, then the others, as unpacking by shifts
 * leaves them; ktl_words has them so. 2^13 * 2^11 * 256 products are less than 2^31 by a little: no more of them. */

/* One tile's codes to words, and what a step of each row's is. */
KTL_INLINE void widen(int format, int groups, const ktl_tile *tile, int16_t *words, float *unit) {
    const int whole = format == KTL_INT8_CHANNEL;
    int32_t ratio[KTL_CHUNK / KTL_GROUP][KTL_PANEL] KTL_ALIGNED; /* a scale of 15 bits, twice */
    const VI top = _mm256_set1_epi16((int16_t)0xff00), flip = _mm256_set1_epi8((char)0x80);
    for (int o = 0; o < KTL_PANEL; o += LANES) {
        if (whole) STOREF(unit + o, LOADF(tile->scale[0] + o));
        else {
            pair_rows(tile->scale[0] + o, groups, 2, ratio[0] + o, KTL_CHUNK / KTL_GROUP, 32767.0f, unit + o);
            STOREF(unit + o, MULF(LOADF(unit + o), SET1F(1024.0f)));
        }
        for (int g = 0; g < groups; g++) {
            const VI by = whole ? top : LOADI(ratio[g] + o);
#pragma GCC unroll 8
            for (int c = g * KTL_GROUP; c < (g + 1) * KTL_GROUP; c += 4) {
                const VI code = XORI(LOADI(tile->codes + c * 16 + o * 4), flip);
                const VI even = _mm256_slli_epi16(code, 8), odd = ANDI(code, top);
                int16_t *to = words + c * 16 + o * 2;
                /* 2^13 of what 2^7 * 2^15 makes. */
                STOREI(to, whole ? _mm256_srai_epi16(even, 8) : _mm256_mulhrs_epi16(_mm256_srai_epi16(even, 3), by));
                STOREI(to + 32, whole ? _mm256_srai_epi16(odd, 8) : _mm256_mulhrs_epi16(_mm256_srai_epi16(odd, 3), by));
            }
        }
    }
}

/* As add_four in isa_avx2.c. */
KTL_INLINE void add_words(VI sum[2], const VI w[2], VI x) {
    VI product[2];
    __asm__("vpmaddwd %6, %4, %2\n\tvpmaddwd %6, %5, %3\n\tvpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(product[0]), "=&x"(product[1])
            : "x"(w[0]), "x"(w[1]), "x"(x));
}

KTL_INLINE void multiply_words_of(int T, int groups, const int16_t *words, const float *unit, const ktl_words *act,
                                  float *acc, int64_t stride) {
    VI sum[TOKENS][RV];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = SET1I(0);
    for (int64_t at = 0; at < groups * KTL_GROUP; at += KTL_GROUP) {
        FETCH_ACTS(T, sizeof(ktl_words), 2 * at);
        FETCH_SUMS(T, PANELS, at / KTL_GROUP);
#pragma GCC unroll 16
        for (int64_t c = at; c < at + KTL_GROUP; c += 2) {
            const VI w[RV] = {LOADI(words + c * 16), LOADI(words + c * 16 + VB / 2)};
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) add_words(sum[t], w, pair_of(act[t].q + c));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int r = 0; r < RV; r++) {
            float *to = acc + t * stride + r * LANES;
            const VF by = MULF(LOADF(unit + r * LANES), SET1F(act[t].scale));
            STOREF(to, FMA(TO_FLOAT(sum[t][r]), by, LOADF(to)));
        }
}

/* A tile after the other: as words four of them would fill L1. */
static __attribute__((noinline)) void multiply_words(int format, const ktl_tile *tiles, int panels, int groups,
                                                     const ktl_job *job) {
    int16_t words[KTL_CHUNK * KTL_PANEL] KTL_ALIGNED;
    float unit[KTL_PANEL] KTL_ALIGNED;
    ktl_ahead ahead = job->ahead;
    const int64_t share = ktl_share(&ahead, ktl_ceil(job->n, TOKENS) * panels);
    for (int p = 0; p < panels; p++) {
        widen(format, groups, tiles + p, words, unit);
        for (int64_t t = 0; t < job->n;) {
            const int64_t left = job->n - t, T = ktl_ceil(left, ktl_ceil(left, TOKENS));
            const ktl_words *act = (const ktl_words *)job->act + t;
            float *acc = job->acc + t * job->acc_stride + p * KTL_PANEL;
            ktl_fetch(&ahead, share);
#define PASS(T) case T: multiply_words_of(T, groups, words, unit, act, acc, job->acc_stride); break;
            switch (T) { PASS(1) PASS(2) PASS(3) PASS(4) }
#undef PASS
            t += T;
        }
    }
}
