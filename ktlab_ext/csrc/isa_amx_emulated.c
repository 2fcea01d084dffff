/* The AMX kernels on emulated tiles: a processor's eight tiles as an array, its instructions as
 * loops (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD, TDPBF16PS,
 * TILELOADD). One set of tiles a thread, as in the processor. */
#include <math.h>
#include <stdlib.h>

#include "internal.h"

typedef union {
    uint8_t byte[16][64];
    int32_t word[16][16];
    float real[16][16];
    uint16_t half[16][32];
} tile_data;

static __thread struct {
    tile_data tile[8];
    uint16_t colsb[8];
    uint8_t rows[8];
} amx;

static void load_config(const void *config) {
    const uint8_t *p = config;
    for (int t = 0; t < 8; t++) {
        memcpy(&amx.colsb[t], p + 16 + 2 * t, 2);
        amx.rows[t] = p[48 + t];
        if (amx.rows[t] > 16 || amx.colsb[t] > 64) abort();
        memset(&amx.tile[t], 0, sizeof(tile_data));
    }
}

static void load(int t, const void *p, size_t stride) {
    memset(&amx.tile[t], 0, sizeof(tile_data));
    for (int r = 0; r < amx.rows[t]; r++)
        memcpy(amx.tile[t].byte[r], (const uint8_t *)p + (size_t)r * stride, amx.colsb[t]);
}

static void store(int t, void *p, size_t stride) {
    for (int r = 0; r < amx.rows[t]; r++)
        memcpy((uint8_t *)p + (size_t)r * stride, amx.tile[t].byte[r], amx.colsb[t]);
}

/* Tiles that do not fit each other are an invalid instruction for the processor. */
static void check(int c, int a, int b) {
    if (amx.rows[c] != amx.rows[a] || amx.colsb[c] != amx.colsb[b] || amx.colsb[a] != 4 * amx.rows[b]) abort();
}

static void dot_s8u8(int c, int a, int b) {
    check(c, a, b);
    for (int m = 0; m < amx.rows[c]; m++)
        for (int k = 0; k < amx.colsb[a] / 4; k++)
            for (int n = 0; n < amx.colsb[c] / 4; n++)
                for (int j = 0; j < 4; j++)
                    amx.tile[c].word[m][n] += (int8_t)amx.tile[a].byte[m][4 * k + j] *
                                              amx.tile[b].byte[k][4 * n + j];
}

static float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }

/* Even and odd columns are summed apart by fused multiply-adds, then together, then into C;
 * subnormals count as zero. */
static void dot_bf16(int c, int a, int b) {
    check(c, a, b);
    for (int m = 0; m < amx.rows[c]; m++)
        for (int n = 0; n < amx.colsb[c] / 4; n++) {
            float sum[2] = {0, 0};
            for (int k = 0; k < amx.colsb[a] / 4; k++)
                for (int j = 0; j < 2; j++)
                    sum[j] = flushed(fmaf(flushed(ktl_bf16(amx.tile[a].half[m][2 * k + j])),
                                          flushed(ktl_bf16(amx.tile[b].half[k][2 * n + j])), sum[j]));
            amx.tile[c].real[m][n] = flushed(amx.tile[c].real[m][n] + flushed(sum[0] + sum[1]));
        }
}

typedef float rows_of_floats __attribute__((vector_size(64), may_alias, aligned(4)));

KTL_INLINE rows_of_floats rows_fma(rows_of_floats a, rows_of_floats b, rows_of_floats c) {
    for (int r = 0; r < 16; r++) c[r] = fmaf(a[r], b[r], c[r]);
    return c;
}

#define TILE_CONFIG(config) load_config(config)
#define TILE_ZERO(t) memset(&amx.tile[t], 0, sizeof(tile_data))
#define TILE_LOAD(t, p, stride) load(t, p, stride)
#define TILE_STORE(t, p, stride) store(t, p, stride)
#define TILE_DOT_S8U8(c, a, b) dot_s8u8(c, a, b)
#define TILE_DOT_BF16(c, a, b) dot_bf16(c, a, b)
#define TILE_RELEASE() (void)0
#define ROWS_FMA(a, b, c) rows_fma(a, b, c)
#define DECODE ktl_kernels_serial

#include "amx.inc.h"

const ktl_kernels ktl_kernels_amx_int8_emulated = INT8_KERNELS;
const ktl_kernels ktl_kernels_amx_bf16_emulated = BF16_KERNELS;
