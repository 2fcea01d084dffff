/* 256 activations of a token to int8. Included by kernel.inc.h and isa_serial.c, which define TRANSPOSE16
 * and PARTS_BYTES before; in the compiler's own vectors of so many bytes, so that every instruction set does the
 * same operations. (Of twice as many as it has, GCC compares the lanes one by one.) */
typedef float parts_f __attribute__((vector_size(PARTS_BYTES), may_alias));
typedef int32_t parts_i __attribute__((vector_size(PARTS_BYTES)));
typedef uint32_t parts_u __attribute__((vector_size(PARTS_BYTES)));
typedef uint64_t parts_2 __attribute__((vector_size(PARTS_BYTES)));

enum { TRIES = 5, PARTS = KTL_CHUNK / KTL_FINE, LANES_OF_PARTS = PARTS_BYTES / 4, MAGNITUDE = 0x7fffffff };
#define CHOOSE(which, yes, no) (((which) & (parts_i)(yes)) | (~(which) & (parts_i)(no)))
#define LARGER(a, b) CHOOSE((a) > (b), a, b)
#define NEIGHBOURS(v) ((parts_2)(v) >> 32 | (parts_2)(v) << 32) /* each two lanes exchanged */

/* Nearest: adding KTL_START rounds; the integers are then in the low bits. */
KTL_INLINE void to_int8(const float *x, int count, float factor, int8_t *q) {
    for (int i = 0; i < count; i++) {
        const float shifted = x[i] * factor + KTL_START;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (int8_t)bits;
    }
}

/* The parts of KTL_FINE columns from `first` on are the lanes, a vector has one column of each: groups of KTL_FINE
 * or KTL_GROUP columns, whose largest magnitude becomes an integer from 127 down, whichever of `tries` rounds the
 * others best: with five 8 % less is lost than with 127 alone, with eight 10 %. factor: what turns numbers into
 * integers; step: back; total: the sums of the parts' integers, of which `second`: of columns 2 and 3 of each
 * four. */
KTL_INLINE void quantize_parts(int group, int tries, const uint32_t *columns, int first, float *factor, float *step,
                               int32_t *total, int32_t *second) {
    parts_f column[KTL_FINE];
#pragma GCC unroll 16
    for (int j = 0; j < KTL_FINE; j++) memcpy(&column[j], columns + PARTS * j + first, sizeof column[j]);
    /* On the bits: integers compare as magnitudes do, and a NaN is more than infinity. */
    parts_i four[4] = {{0}}; /* one chain would be waited for */
#pragma GCC unroll 16
    for (int j = 0; j < KTL_FINE; j++) {
        const parts_i bits = (parts_i)column[j] & MAGNITUDE;
        four[j % 4] = LARGER(bits, four[j % 4]);
    }
    parts_i most = LARGER(LARGER(four[0], four[1]), LARGER(four[2], four[3]));
    if (group == KTL_GROUP) {
        const parts_i other = (parts_i)NEIGHBOURS(most);
        most = LARGER(other, most);
    }
    const parts_f one = (parts_f){0} + 1.0f, size = (parts_f)most;
    const parts_i some = (size <= 3.4028235e38f) & (size > 1e-35f);
    const parts_f inverse = (parts_f)(some & (parts_i)(one / size));
    /* Nothing, an infinity, a NaN: 0, NaN, NaN. */
    const parts_f whole = (parts_f)CHOOSE(some, size, (parts_f)(~(size <= 1e-35f) & (parts_i)(size - size)));
    parts_f best = one * 3.4028235e38f, levels = one, back = one;
    for (int k = 0; k < tries; k++) {
        const float n = 127.0f - (float)k, unit = 1.0f / n;
        const parts_f by = inverse * n;
        parts_f lost[4] = {{0}};
#pragma GCC unroll 16
        for (int j = 0; j < KTL_FINE; j++) {
            const parts_f y = column[j] * by, rest = y - (y + KTL_START - KTL_START);
            lost[j % 4] += rest * rest;
        }
        parts_f all = (lost[0] + lost[1]) + (lost[2] + lost[3]);
        if (group == KTL_GROUP) all += (parts_f)NEIGHBOURS(all);
        all *= unit * unit;
        const parts_i better = all < best;
        best = (parts_f)CHOOSE(better, all, best);
        levels = (parts_f)CHOOSE(better, one * n, levels);
        back = (parts_f)CHOOSE(better, one * unit, back);
    }
    levels *= inverse;
    back *= whole;
    parts_u sums[2] = {{0}};
#pragma GCC unroll 16
    for (int j = 0; j < KTL_FINE; j++)
        sums[j / 2 % 2] += (parts_u)(column[j] * levels + KTL_START) - (parts_u)(one * KTL_START);
    sums[1] &= (parts_u)some; /* what a NaN leaves in them would overflow */
    sums[0] = (sums[0] & (parts_u)some) + sums[1];
    memcpy(factor + first, &levels, sizeof levels);
    memcpy(step + first, &back, sizeof back);
    memcpy(total + first, &sums[0], sizeof sums[0]);
    memcpy(second + first, &sums[1], sizeof sums[1]);
}

KTL_INLINE void quantize_short(int group, int tries, const float *x, ktl_act *a, int32_t *total,
                               int32_t *second) {
    uint32_t columns[KTL_CHUNK] KTL_ALIGNED;
    float factor[PARTS] KTL_ALIGNED, scaled[KTL_CHUNK] KTL_ALIGNED;
    TRANSPOSE16((const uint32_t *)x, KTL_FINE, columns);
#pragma GCC unroll 2
    for (int first = 0; first < PARTS; first += LANES_OF_PARTS)
        quantize_parts(group, tries, columns, first, factor, a->scale, total, second);
    for (int i = 0; i < PARTS; i++)
        for (int j = 0; j < KTL_FINE; j++) scaled[i * KTL_FINE + j] = x[i * KTL_FINE + j] * factor[i];
    to_int8(scaled, KTL_CHUNK, 1.0f, a->q);
}

/* Longer groups, where a choice gains nothing: 127. `most`: the largest magnitude of a group that is
 * longer than the chunk. total: of all of a group, at its first part. */
KTL_INLINE void quantize_long(int group, const float *x, float most, ktl_act *a, int32_t *total) {
    const int columns = group < KTL_CHUNK ? group : KTL_CHUNK;
    for (int c = 0; c < KTL_CHUNK; c += columns) {
        if (group <= KTL_CHUNK) most = ktl_largest(x + c, columns);
        const int finite = most <= 3.4028235e38f, some = finite && most > 1e-35f;
        to_int8(x + c, columns, some ? 127.0f / most : 0.0f, a->q + c);
        int32_t sum = 0;
        for (int i = c; i < c + columns; i++) sum += a->q[i];
        for (int i = c / KTL_FINE; i < (c + columns) / KTL_FINE; i++) {
            a->scale[i] = some ? most / 127.0f : finite ? 0.0f : most - most;
            total[i] = i * KTL_FINE == c ? sum : 0;
        }
    }
}

/* Numbers to 16 bits in so many steps to the largest, which are returned: NaN where one of them is no number.
 * In pairs of `twice` the same or of two that follow one another, the second first. */
KTL_INLINE float to_pairs(const float *x, int count, int twice, float most_steps, int16_t *to) {
    const float most = ktl_largest(x, count), finite = 3.4028235e38f;
    const float by = most > 1e-30f && most <= finite ? most_steps / most : 0.0f;
    int32_t steps[16];
    for (int i = 0; i < count; i++) {
        const float shifted = (by > 0 ? x[i] : 0.0f) * by + KTL_START;
        memcpy(steps + i, &shifted, 4);
    }
    for (int i = 0; i < (twice ? 2 * count : count); i++) to[i] = (int16_t)steps[twice ? i / 2 : i ^ 1];
    return by > 0 ? most / most_steps : most <= finite ? 0.0f : most - most;
}

/* Scales and sums in pairs, and what their integer sums start from. halves: of the two of a lane, of which
 * `second` counts what stands in columns 2 and 3 of each four. */
KTL_INLINE void pair_up(int sub, int each, int halves, ktl_act_key key, const int32_t *total,
                        const int32_t *second, ktl_act *a) {
    const int units = PARTS / each, subs = PARTS / sub, dropped = halves ? 0 : key.pairs - 1;
    /* As many steps as let all integer sums of 256 columns fit 32 bits. */
    const float steps = halves && key.zero > 2 ? 66051.0f / (float)key.zero : 32767.0f;
    float scale[PARTS], sum[16];
    for (int u = 0; u < units; u++) {
        const int i = u * each;
        scale[u] = a->scale[i];
        if (!halves) {
            a->init[i] += dropped ? 1 << (dropped - 1) : u % 2 << 15;
            continue;
        }
        int32_t all = 0, half = 0;
        for (int j = i; j < i + each; j++) {
            all += total[j];
            half += second[j];
        }
        const int16_t init[2] = {(int16_t)(-key.zero * (all - half)), (int16_t)(-key.zero * half)};
        memcpy(a->init + i, init, sizeof init);
    }
    memcpy(sum, a->sum, sizeof sum);
    a->unit = to_pairs(scale, units, halves, steps, a->pair_scale[0]) * (float)(1 << (15 + dropped));
    a->sum_unit = to_pairs(sum, subs, 0, 32767.0f, a->pair_sum);
}

/* What row_avx2.inc.h wants. As many steps as let the sums of a lane's 32 columns fit 32 bits. */
KTL_INLINE void line_up(ktl_act_key key, const int32_t *total, ktl_act *a) {
    const float steps = key.zero > 16 ? 528416.0f / (float)key.zero : 32767.0f;
    float scale[PARTS];
    for (int i = 0; i < PARTS; i++) {
        scale[i ^ 1] = a->scale[i % 8 * 2 + i / 8]; /* of two the second comes first there */
        a->line_sum[i] = (int16_t)total[i % 8 * 2 + i / 8];
    }
    a->line_unit = to_pairs(scale, PARTS, 0, steps, a->line_scale);
    for (int i = 0; i < PARTS / 2; i++) {
        const int32_t both = a->line_scale[i] * a->line_sum[i] + a->line_scale[i + 8] * a->line_sum[i + 8];
        a->line_start[i] = key.zero > 16 ? 0 : -key.zero * both; /* more: no block of KTL_GROUP columns */
    }
}

/* What follows from the parts' sums; `sub` and `group` in parts. */
KTL_INLINE void sum_up(int sub, int group, ktl_act_key key, const int32_t *total, const int32_t *second,
                       ktl_act *a) {
    const int shared = sub < group ? sub : group;
#pragma GCC unroll 16
    for (int i = 0; i < PARTS; i += shared) {
        int32_t all = 0;
        for (int j = i; j < i + shared; j++) {
            all += total[j];
            a->init[j] = 0;
        }
        a->init[i] = key.start - key.zero * all;
    }
#pragma GCC unroll 16
    for (int s = 0; s < PARTS / sub; s++) {
        float sum = 0;
        for (int i = s * sub; i < (s + 1) * sub; i++) sum += a->scale[i] * (float)total[i];
        a->sum[s] = sum;
    }
    if (key.pairs == KTL_LINES) line_up(key, total, a);
    else if (key.pairs == KTL_HALVES) pair_up(sub, shared, 1, key, total, second, a);
    else if (key.pairs) pair_up(sub, shared, 0, key, total, second, a);
}

/* To 11 bits and a sign, in the order of ktl_words. */
KTL_INLINE void quantize_words(const float *x, ktl_words *a) {
    uint16_t steps[KTL_CHUNK] KTL_ALIGNED;
    const float most = ktl_largest(x, KTL_CHUNK);
    const int finite = most <= 3.4028235e38f, some = finite && most > 1e-35f;
    const float factor = some ? 2047.0f / most : 0.0f;
    for (int i = 0; i < KTL_CHUNK; i++) {
        const float shifted = x[i] * factor + KTL_START;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        steps[i] = (uint16_t)bits;
    }
    for (int i = 0; i < KTL_CHUNK; i += 4) {
        uint64_t four;
        memcpy(&four, steps + i, 8);
        four = (four & 0xffff00000000ffff) | (four >> 16 & 0xffff0000) | (four & 0xffff0000) << 16;
        memcpy(a->q + i, &four, 8);
    }
    a->scale = some ? most / 2047.0f : finite ? 0.0f : most - most;
}

/* A group with a NaN or an infinity gets the scale NaN, so that it shows in every product. */
KTL_INLINE void quantize_act(ktl_act_key key, const float *x, float most, ktl_act *a) {
    int32_t total[PARTS] KTL_ALIGNED, second[PARTS] KTL_ALIGNED;
    /* A second term takes what any scale leaves over. */
    if (key.group <= KTL_GROUP) quantize_short(key.group, key.terms > 1 ? 1 : TRIES, x, a, total, second);
    else quantize_long(key.group, x, most, a, total);
    const int sub = key.sub / KTL_FINE, group = key.group / KTL_FINE;
    if (sub == 2 && group == 2) sum_up(2, 2, key, total, second, a); /* by constants: half the time */
    else if (sub == 2 && group == 1) sum_up(2, 1, key, total, second, a);
    else if (sub == 1 && group == 2) sum_up(1, 2, key, total, second, a);
    else if (sub == 1 && group == 1) sum_up(1, 1, key, total, second, a);
    else sum_up(sub, group, key, total, second, a);
}
