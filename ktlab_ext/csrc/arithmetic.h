/* Arithmetic that every instruction set compiles for itself, written so that loops vectorise. */
#ifndef KTL_ARITHMETIC_H
#define KTL_ARITHMETIC_H

#include "internal.h"

/* e^x within 2 units in the last place; 0 below -87, infinity above 88.7, NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r (Taylor, remainder
 * below 2^-25 there). */
KTL_INLINE float ktl_exp(float x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float bounded = x > 88.8f ? 88.8f : x;
    bounded = bounded < -87.4f ? -87.4f : bounded; /* a NaN passes both comparisons */
    float n = bounded * 1.44269504f + round - round;
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666667e-2f +
              r * (8.3333333e-3f + r * 1.3888889e-3f)))));
    /* 2^n in two halves, so that n = 128 does not overflow before the product does. */
    int32_t k = (int32_t)(x != x ? 0.0f : n), h = k >> 1;
    union { int32_t i; float f; } a = {.i = (h + 127) << 23}, b = {.i = (k - h + 127) << 23};
    return p * a.f * b.f;
}

/* The largest magnitude, a NaN counting as more than infinity. On the bits: integers compare as the
 * magnitudes do, without a NaN's exceptions, so that the loop vectorises. */
KTL_INLINE float ktl_largest(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value;
}

static inline void ktl_silu_mul(float *to, const float *gate, const float *up, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = gate[i] / (1.0f + ktl_exp(-gate[i])) * up[i] * factor;
}

static inline void ktl_scale_row(float *x, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

static inline void ktl_add_row(float *x, const float *more, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += more[i];
}

/* Scores of a part to exp(score - most), most and total a head. */
static inline void ktl_attend_softmax(const ktl_attend_part *a) {
    for (int64_t h = 0; h < a->heads; h++) {
        float *w = a->weights + h * a->n, sums[16] = {0}, tops[16], most = w[0], total = 0;
        for (int i = 0; i < 16; i++) tops[i] = most;
        for (int64_t i = 0; i + 16 <= a->n; i += 16)
            for (int j = 0; j < 16; j++) tops[j] = w[i + j] > tops[j] ? w[i + j] : tops[j];
        for (int64_t i = a->n / 16 * 16; i < a->n; i++) most = w[i] > most ? w[i] : most;
        for (int i = 0; i < 16; i++) most = tops[i] > most ? tops[i] : most;
        for (int64_t i = 0; i < a->n; i++) w[i] = ktl_exp(w[i] - most);
        for (int64_t i = 0; i < a->n; i++) sums[i % 16] += w[i];
        for (int i = 0; i < 16; i++) total += sums[i];
        a->most[h] = most;
        a->total[h] = total;
    }
}

#endif
