/* AVX-512 BF16: VDPBF16PS, 32 products of bfloat16 an instruction. The source is that of the AMX tiles:
 * two products of tiles are 512 of these instructions, for eight tokens at a time with their sums in
 * registers. Few tokens and
 * all decoding run on avx512_vnni. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma,bmi2,prefer-vector-width=512")
#endif
#include <immintrin.h>

#include "internal.h"

/* The two C tiles. A and B tiles are read where they lie. */
static __thread struct {
    float sum[2][16][16] KTL_ALIGNED;
    int rows, words; /* of A: tokens, and pairs of bfloat16 a token */
} c_tiles;

KTL_INLINE void load(int t, const float *p, int64_t stride) {
    for (int r = 0; r < c_tiles.rows; r++)
        _mm512_store_ps(c_tiles.sum[t][r], _mm512_loadu_ps(p + r * stride));
}

KTL_INLINE void store(int t, float *p, int64_t stride) {
    for (int r = 0; r < c_tiles.rows; r++)
        _mm512_storeu_ps(p + r * stride, _mm512_load_ps(c_tiles.sum[t][r]));
}

/* `rows` tokens from r on against two B tiles, whose lines lie end to end. */
KTL_INLINE void dot_rows(int rows, int r, const uint8_t *a, int64_t stride, const uint8_t *b0,
                         const uint8_t *b1) {
    __m512 sum[2][8];
    const int words = c_tiles.words;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        sum[0][i] = _mm512_load_ps(c_tiles.sum[0][r + i]);
        sum[1][i] = _mm512_load_ps(c_tiles.sum[1][r + i]);
    }
    a += r * stride;
    for (int k = 0; k < words; k++, a += 4, b0 += 64, b1 += 64) {
        const __m512bh column[2] = {(__m512bh)_mm512_loadu_si512(b0), (__m512bh)_mm512_loadu_si512(b1)};
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, a + i * stride, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            sum[0][i] = _mm512_dpbf16_ps(sum[0][i], column[0], x);
            sum[1][i] = _mm512_dpbf16_ps(sum[1][i], column[1], x);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        _mm512_store_ps(c_tiles.sum[0][r + i], sum[0][i]);
        _mm512_store_ps(c_tiles.sum[1][r + i], sum[1][i]);
    }
}

static void two_products(const void *a, int64_t stride, const void *b0, const void *b1) {
    int r = 0;
    for (; r + 8 <= c_tiles.rows; r += 8) dot_rows(8, r, a, stride, b0, b1);
    for (; r + 3 <= c_tiles.rows; r += 3) dot_rows(3, r, a, stride, b0, b1);
    for (; r < c_tiles.rows; r++) dot_rows(1, r, a, stride, b0, b1);
}

#define NO_INT8_TILES
#define TILE_CONFIG(config) (c_tiles.rows = (config)->rows[0], c_tiles.words = (config)->colsb[2] / 4)
#define TILE_ZERO(t) memset(c_tiles.sum[t], 0, sizeof c_tiles.sum[t])
#define TILE_LOAD(t, p, stride) load(t, p, (int64_t)(stride) / 4)
#define TILE_STORE(t, p, stride) store(t, p, (int64_t)(stride) / 4)
#define TWO_PRODUCTS(a, stride, b0, b1, dot, between) \
    do {                                              \
        two_products(a, stride, b0, b1);              \
        between;                                      \
        between;                                      \
    } while (0)
#define TILE_RELEASE() (void)0
#define ROWS_FMA(a, b, c) ((rows_f)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DECODE ktl_kernels_avx512

#include "amx.inc.h"

const ktl_kernels ktl_kernels_avx512_bf16 = BF16_KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
