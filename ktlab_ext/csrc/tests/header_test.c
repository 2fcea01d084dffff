/* Packed headers with changed bytes: refused, or read as exactly what they say. Seeds are fixed. */
#include "../ktl.h"
#include "check.h"

#include <string.h>
#include <time.h>

enum { WHY = 160, CHECKSUM_AT = 184 };

/* As header.c states it: FNV-1a, 64 bits. A fuzzer that cannot repair it tests nothing else. */
static void repair(uint8_t *raw) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (int i = 0; i < CHECKSUM_AT; i++)
        hash = (hash ^ raw[i]) * UINT64_C(0x100000001b3);
    memcpy(raw + CHECKSUM_AT, &hash, sizeof hash);
}

static int64_t valid(dice *d, ktl_header *h, uint8_t *raw) {
    for (;;) {
        memset(h, 0, sizeof *h);
        int format = (int)below(d, KTL_FORMATS);
        strcpy(h->format, ktl_format_name(format));
        h->experts = 1 + below(d, 300);
        h->rows = 1 + below(d, 8000);
        h->cols = 32 * (1 + below(d, 300));
        for (int64_t i = below(d, 64); i-- > 0;)
            h->source[i] = (char)('0' + below(d, 10));
        int64_t bytes = ktl_packed_bytes(format, h->rows, h->cols);
        if (bytes < 0)
            continue;
        CHECK(bytes % 64 == 0, "%s: %lld bytes", h->format, (long long)bytes);
        CHECK(ktl_header_write(h, raw) == KTL_OK, "%s refused", h->format);
        return KTL_HEADER_BYTES + h->experts * bytes;
    }
}

/* Whatever is accepted must write back to the bytes that were read. */
static int accepted(const uint8_t *raw, int64_t total) {
    ktl_header h;
    char *why = malloc(WHY); /* exactly as much as promised, for the sanitizer to guard */
    uint8_t again[KTL_HEADER_BYTES];
    memset(why, 0xee, WHY);
    int code = ktl_header_read(raw, total, &h, why);
    if (code == KTL_OK) {
        CHECK(ktl_header_write(&h, again) == KTL_OK, "read but not written: %s", h.format);
        CHECK(memcmp(raw, again, KTL_HEADER_BYTES) == 0, "read as something else: %s", h.format);
    } else {
        CHECK(code == KTL_ERR_HEADER, "code %d", code);
        CHECK(memchr(why, 0, WHY) && strlen(why) > 10, "no reason");
    }
    free(why);
    return code == KTL_OK;
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 2.0;
    static const int64_t EXTREME[] = {0, -1, 1, INT64_MAX, INT64_MIN, INT64_MAX / 2, INT32_MAX};
    dice d = {20240607};
    int64_t tried = 0, taken = 0;
    uint8_t *raw = malloc(KTL_HEADER_BYTES);
    for (clock_t end = clock() + (clock_t)(seconds * CLOCKS_PER_SEC); clock() < end; tried++) {
        ktl_header h;
        int64_t total = valid(&d, &h, raw);
        CHECK(accepted(raw, total), "its own header refused");
        CHECK(!accepted(raw, total - 1) && !accepted(raw, total + 1), "a wrong size accepted");
        for (int64_t i = below(&d, 8); i >= 0; i--)
            raw[below(&d, KTL_HEADER_BYTES)] = (uint8_t)roll(&d);
        if (below(&d, 4) == 0) { /* a number that is likely to overflow something */
            int64_t number = EXTREME[below(&d, sizeof EXTREME / sizeof *EXTREME)];
            memcpy(raw + 32 + 8 * below(&d, 4), &number, sizeof number);
        }
        if (below(&d, 4) != 0)
            repair(raw);
        if (below(&d, 8) == 0)
            total = (int64_t)roll(&d);
        taken += accepted(raw, total);
    }
    CHECK(!accepted(raw, 0) && !accepted(raw, -1) && !accepted(raw, KTL_HEADER_BYTES - 1), "too short");
    free(raw);
    CHECK(tried > 100, "%lld tries only", (long long)tried);
    printf("header: ok, %lld changed headers, %lld still consistent\n", (long long)tried,
           (long long)taken);
    return 0;
}
