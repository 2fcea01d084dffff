/* What the C tests share: a check that names itself, and random numbers that are the same each run. */
#ifndef KTL_CHECK_H
#define KTL_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition, ...)                                                                        \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            fprintf(stderr, "%s:%d: expected %s; ", __FILE__, __LINE__, #condition);                 \
            fprintf(stderr, __VA_ARGS__);                                                            \
            fprintf(stderr, "\n");                                                                   \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

/* xorshift64* (Vigna 2016) */
typedef struct {
    uint64_t state;
} dice;

static inline uint64_t roll(dice *d) {
    d->state ^= d->state >> 12;
    d->state ^= d->state << 25;
    d->state ^= d->state >> 27;
    return d->state * UINT64_C(0x2545F4914F6CDD1D);
}

static inline int64_t below(dice *d, int64_t limit) {
    return (int64_t)(roll(d) >> 11) % limit;
}

#endif
