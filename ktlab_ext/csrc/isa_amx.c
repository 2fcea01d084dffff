/* AMX: TDPBSUD (1024 products of bytes a cycle and more) and TDPBF16PS. Few tokens and all decoding
 * run on AVX-512, which every processor with AMX has. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2,prefer-vector-width=512")
#endif
#include <immintrin.h>

#include "internal.h"

/* GCC's intrinsics do not say what memory these read: without the constraint and the barrier the
 * compiler may leave the configuration or the operands in registers. */
#define TILE_CONFIG(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(config)) : "memory")
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride)             \
    do {                                    \
        __asm__ volatile("" : : : "memory"); \
        _tile_loadd(t, p, stride);          \
    } while (0)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT_S8U8(c, a, b) _tile_dpbsud(c, a, b)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_RELEASE() _tile_release()
#define ROWS_FMA(a, b, c) ((rows_f)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DECODE ktl_kernels_avx512

#include "amx.inc.h"

const ktl_kernels ktl_kernels_amx_int8 = INT8_KERNELS;
const ktl_kernels ktl_kernels_amx_bf16 = BF16_KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
