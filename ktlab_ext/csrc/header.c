/* The header of packed data: 192 bytes, little-endian, before the panels.
 *
 *     0  magic "KTLPACK\0"        56  data bytes, int64
 *     8  version, uint32          64  source, 64 bytes, zero-padded
 *    12  header bytes, uint32    128  zeros
 *    16  format, 16 bytes        184  FNV-1a (64 bits) of bytes 0 to 183
 *    32  experts, rows, cols: int64
 */
#include "ktl.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum {
    AT_MAGIC = 0, AT_VERSION = 8, AT_SIZE = 12, AT_FORMAT = 16, AT_SHAPE = 32, AT_DATA_BYTES = 56,
    AT_SOURCE = 64, AT_ZEROS = 128, AT_CHECKSUM = 184, WHY_BYTES = 160
};
static const char MAGIC[8] = "KTLPACK";

static uint64_t checksum(const uint8_t *header) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (int i = 0; i < AT_CHECKSUM; i++)
        hash = (hash ^ header[i]) * UINT64_C(0x100000001b3);
    return hash;
}

/* Bytes of all experts, or an error; nothing overflows, whatever the numbers. */
static int64_t data_bytes(const ktl_header *h) {
    int format = ktl_format_of(h->format);
    int64_t values, bytes;
    if (format < 0)
        return KTL_ERR_FORMAT;
    if (h->experts < 1 || h->rows < 1 || h->cols < 1)
        return KTL_ERR_SHAPE;
    if (__builtin_mul_overflow(h->rows, h->cols, &values) || values > INT64_MAX >> 12)
        return KTL_ERR_SHAPE; /* room for padding and 4 bytes a value */
    bytes = ktl_packed_bytes(format, h->rows, h->cols);
    if (bytes < 0)
        return bytes;
    if (__builtin_mul_overflow(bytes, h->experts, &bytes) || bytes > INT64_MAX - KTL_HEADER_BYTES)
        return KTL_ERR_SHAPE;
    return bytes;
}

/* Printable, then zeros to the end, at least one. */
static int is_text(const char *field, size_t room) {
    size_t used = strnlen(field, room);
    for (size_t i = 0; i < room; i++)
        if (i < used ? field[i] < ' ' || field[i] > '~' : field[i] != 0)
            return 0;
    return used < room;
}

int ktl_header_write(const ktl_header *h, uint8_t *dst) {
    const uint32_t words[2] = {KTL_PACK_VERSION, KTL_HEADER_BYTES};
    const int64_t shape[3] = {h->experts, h->rows, h->cols};
    if (!is_text(h->format, sizeof h->format) || !is_text(h->source, sizeof h->source))
        return KTL_ERR_HEADER;
    int64_t bytes = data_bytes(h);
    if (bytes < 0)
        return (int)bytes;
    memset(dst, 0, KTL_HEADER_BYTES);
    memcpy(dst + AT_MAGIC, MAGIC, sizeof MAGIC);
    memcpy(dst + AT_VERSION, words, sizeof words);
    memcpy(dst + AT_FORMAT, h->format, sizeof h->format);
    memcpy(dst + AT_SHAPE, shape, sizeof shape);
    memcpy(dst + AT_DATA_BYTES, &bytes, sizeof bytes);
    memcpy(dst + AT_SOURCE, h->source, sizeof h->source);
    uint64_t hash = checksum(dst);
    memcpy(dst + AT_CHECKSUM, &hash, sizeof hash);
    return KTL_OK;
}

static int refuse(char *why, const char *form, ...) __attribute__((format(printf, 2, 3)));
static int refuse(char *why, const char *form, ...) {
    va_list arguments;
    va_start(arguments, form);
    vsnprintf(why, WHY_BYTES, form, arguments);
    va_end(arguments);
    return KTL_ERR_HEADER;
}

int ktl_header_read(const uint8_t *src, int64_t total_bytes, ktl_header *h, char *why) {
    uint32_t version, size;
    uint64_t hash;
    int64_t shape[3], stated;
    ktl_header found;
    if (total_bytes < KTL_HEADER_BYTES)
        return refuse(why, "expected at least %d bytes, found %" PRId64, KTL_HEADER_BYTES,
                      total_bytes);
    if (memcmp(src + AT_MAGIC, MAGIC, sizeof MAGIC) != 0)
        return refuse(why, "expected the magic KTLPACK, found other bytes");
    memcpy(&version, src + AT_VERSION, sizeof version);
    memcpy(&size, src + AT_SIZE, sizeof size);
    if (version != KTL_PACK_VERSION)
        return refuse(why, "expected version %d, found %" PRIu32 "; pack again", KTL_PACK_VERSION,
                      version);
    memcpy(&hash, src + AT_CHECKSUM, sizeof hash);
    if (hash != checksum(src))
        return refuse(why, "expected checksum %016" PRIx64 ", found %016" PRIx64 "; pack again",
                      checksum(src), hash);
    if (size != KTL_HEADER_BYTES)
        return refuse(why, "expected a header of %d bytes, found %" PRIu32, KTL_HEADER_BYTES, size);
    for (int i = AT_ZEROS; i < AT_CHECKSUM; i++)
        if (src[i])
            return refuse(why, "expected zeros in bytes %d to %d, found %d at %d", AT_ZEROS,
                          AT_CHECKSUM - 1, src[i], i);
    memcpy(found.format, src + AT_FORMAT, sizeof found.format);
    memcpy(found.source, src + AT_SOURCE, sizeof found.source);
    memcpy(shape, src + AT_SHAPE, sizeof shape);
    memcpy(&stated, src + AT_DATA_BYTES, sizeof stated);
    found.experts = shape[0];
    found.rows = shape[1];
    found.cols = shape[2];
    if (!is_text(found.format, sizeof found.format) || !is_text(found.source, sizeof found.source))
        return refuse(why, "expected printable names of format and source, found other bytes");
    int64_t bytes = data_bytes(&found);
    if (bytes < 0)
        return refuse(why, "expected a known format and a shape that it has, found %s %" PRId64
                      " x %" PRId64 " x %" PRId64, found.format, shape[0], shape[1], shape[2]);
    if (stated != bytes || total_bytes - KTL_HEADER_BYTES != bytes)
        return refuse(why, "expected %" PRId64 " bytes of data for the shape, found %" PRId64
                      " stated and %" PRId64 " there", bytes, stated, total_bytes - KTL_HEADER_BYTES);
    *h = found;
    return KTL_OK;
}
