/* Blocks to packed and back, to the formats made at load, and to float32. */
#include "arithmetic.h"
#include "blocks.h"

/* One code vector is 64 bytes: four columns of 16 rows. */
static void planes_from_codes(int base, int high, const uint8_t *vectors, uint8_t *p) {
    const int vectors_per_base = 8 / base, vectors_per_high = high ? 8 / high : 0;
    const uint8_t base_mask = (uint8_t)((1 << base) - 1);
    memset(p, 0, (size_t)(64 * (base + high)));
    for (int v = 0; v < 8; v++) {
        const uint8_t *code = vectors + 64 * v;
        uint8_t *low = p + 64 * (v / vectors_per_base);
        const int shift = base * (v % vectors_per_base);
        for (int i = 0; i < 64; i++) low[i] |= (uint8_t)((code[i] & base_mask) << shift);
        if (!high) continue;
        uint8_t *top = p + 64 * base + 64 * (v / vectors_per_high);
        const int top_shift = high * (v % vectors_per_high);
        for (int i = 0; i < 64; i++) top[i] |= (uint8_t)(code[i] >> base << top_shift);
    }
}

static void codes_from_planes(int base, int high, const uint8_t *p, uint8_t *vectors) {
    const int vectors_per_base = 8 / base, vectors_per_high = high ? 8 / high : 1;
    const uint8_t base_mask = (uint8_t)((1 << base) - 1), high_mask = (uint8_t)((1 << high) - 1);
    for (int v = 0; v < 8; v++) {
        uint8_t *code = vectors + 64 * v;
        const uint8_t *low = p + 64 * (v / vectors_per_base);
        const uint8_t *top = p + 64 * base + 64 * (v / vectors_per_high);
        const int shift = base * (v % vectors_per_base), top_shift = high * (v % vectors_per_high);
        for (int i = 0; i < 64; i++) {
            code[i] = low[i] >> shift & base_mask;
            if (high) code[i] |= (uint8_t)((top[i] >> top_shift & high_mask) << base);
        }
    }
}

/* The parts of a packed chunk behind its codes. */
typedef struct {
    int64_t scale, min, d, dmin;
    int subs, ds;
} chunk_parts;

static chunk_parts parts_of(int format, int groups) {
    const ktl_format_info *f = &ktl_formats[format];
    chunk_parts c = {.subs = f->has_scale ? groups * KTL_GROUP / f->sub : 0,
                     .ds = f->d_cols ? (int)ktl_ceil((int64_t)groups * KTL_GROUP, f->d_cols) : 0};
    c.scale = (int64_t)groups * 64 * (f->base_bits + f->high_bits);
    c.min = c.scale + (int64_t)c.subs * KTL_PANEL * f->has_scale;
    c.d = c.min + (int64_t)c.subs * KTL_PANEL * f->has_min;
    c.dmin = c.d + (int64_t)c.ds * 2 * KTL_PANEL;
    return c;
}

/* A word of 32 bits is a float32 or two neighbours of 16 bits: both lie as [word][row]. */
static void pack_float_chunk(int format, const uint8_t *row, int64_t row_bytes, int rows,
                             int64_t column, int cols, int groups, uint8_t *p) {
    const int size = ktl_formats[format].block_bytes, words = cols * size / 4;
    memset(p, 0, (size_t)ktl_chunk_bytes(format, groups));
    for (int first = 0; first < words; first += 16) /* sixteen words of a row are a line */
        for (int r = 0; r < rows; r++)
            for (int w = first; w < first + 16 && w < words; w++)
                memcpy(p + (w * KTL_PANEL + r) * 4, row + r * row_bytes + column * size + 4 * w, 4);
    if (cols * size % 4) /* the last of an odd number of 16-bit values */
        for (int r = 0; r < rows; r++)
            memcpy(p + (words * KTL_PANEL + r) * 4, row + r * row_bytes + column * size + 4 * words, 2);
}

static void unpack_float_chunk(int format, const uint8_t *p, int64_t row_bytes, int rows,
                               int64_t column, int cols, uint8_t *row) {
    const int size = ktl_formats[format].block_bytes, words = cols * size / 4;
    for (int r = 0; r < rows; r++) {
        uint8_t *to = row + r * row_bytes + column * size;
        for (int w = 0; w < words; w++) memcpy(to + 4 * w, p + (w * KTL_PANEL + r) * 4, 4);
        if (cols * size % 4) memcpy(to + 4 * words, p + (words * KTL_PANEL + r) * 4, 2);
    }
}

KTL_INLINE void pack_chunk_as(int format, const uint8_t *row, int64_t row_bytes, int rows,
                              int64_t column, int cols, int groups, uint8_t *head, uint8_t *p) {
    const ktl_format_info *f = &ktl_formats[format];
    const chunk_parts part = parts_of(format, groups);
    /* The code of "nothing": a zero value, or 0 where codes index a table or have a minimum. */
    const int nothing = f->table ? 0 : f->zero;
    uint8_t vectors[KTL_CHUNK * KTL_PANEL] KTL_ALIGNED;
    memset(p + part.scale, 0, (size_t)(ktl_chunk_bytes(format, groups) - part.scale));
    for (int r = 0; r < KTL_PANEL; r++) {
        ktl_raw raw;
        if (r < rows) {
            ktl_raw_from_blocks(format, row + r * row_bytes, column, cols, &raw);
            memset(raw.code + cols, nothing, (size_t)(KTL_CHUNK - cols));
        } else {
            memset(&raw, 0, sizeof raw);
            memset(raw.code, nothing, KTL_CHUNK);
        }
        for (int g = 0; g < groups * 8; g++) memcpy(vectors + 64 * g + 4 * r, raw.code + 4 * g, 4);
        for (int s = 0; s < part.subs; s++) {
            p[part.scale + s * KTL_PANEL + r] = raw.scale[s];
            if (f->has_min) p[part.min + s * KTL_PANEL + r] = raw.min[s];
        }
        for (int s = 0; s < part.ds; s++) memcpy(p + part.d + (s * KTL_PANEL + r) * 2, &raw.d[s], 2);
        if (ktl_has_dmin(format)) memcpy(p + part.dmin + 2 * r, &raw.dmin, 2);
        if (format == KTL_INT8_CHANNEL && !column) memcpy(head + 4 * r, &raw.row_scale, 4);
    }
    for (int g = 0; g < groups; g++)
        planes_from_codes(f->base_bits, f->high_bits, vectors + 512 * g,
                          p + (int64_t)g * 64 * (f->base_bits + f->high_bits));
}

KTL_INLINE void unpack_chunk_as(int format, const uint8_t *head, const uint8_t *p,
                                int64_t row_bytes, int rows, int64_t column, int cols, int groups,
                                uint8_t *row) {
    const ktl_format_info *f = &ktl_formats[format];
    const chunk_parts part = parts_of(format, groups);
    uint8_t vectors[KTL_CHUNK * KTL_PANEL] KTL_ALIGNED;
    for (int g = 0; g < groups; g++)
        codes_from_planes(f->base_bits, f->high_bits,
                          p + (int64_t)g * 64 * (f->base_bits + f->high_bits), vectors + 512 * g);
    for (int r = 0; r < rows; r++) {
        ktl_raw raw;
        for (int g = 0; g < groups * 8; g++) memcpy(raw.code + 4 * g, vectors + 64 * g + 4 * r, 4);
        for (int s = 0; s < part.subs; s++) {
            raw.scale[s] = p[part.scale + s * KTL_PANEL + r];
            if (f->has_min) raw.min[s] = p[part.min + s * KTL_PANEL + r];
        }
        for (int s = 0; s < part.ds; s++) memcpy(&raw.d[s], p + part.d + (s * KTL_PANEL + r) * 2, 2);
        if (ktl_has_dmin(format)) memcpy(&raw.dmin, p + part.dmin + 2 * r, 2);
        if (format == KTL_INT8_CHANNEL) memcpy(&raw.row_scale, head + 4 * r, 4);
        ktl_raw_to_blocks(format, &raw, column, cols, row + r * row_bytes);
    }
}

#define EACH_INTEGER_FORMAT(X) X(KTL_Q8_0) X(KTL_Q4_0) X(KTL_Q5_0) X(KTL_Q2_K) X(KTL_Q3_K)   \
    X(KTL_Q4_K) X(KTL_Q5_K) X(KTL_Q6_K) X(KTL_IQ4_NL) X(KTL_IQ4_XS) X(KTL_INT8_CHANNEL)      \
    X(KTL_INT4_GROUP32) X(KTL_INT4_GROUP128)

static void pack_chunk(int format, const uint8_t *row, int64_t row_bytes, int rows, int64_t column,
                       int cols, int groups, uint8_t *head, uint8_t *p) {
    switch (format) {
#define X(F) case F: pack_chunk_as(F, row, row_bytes, rows, column, cols, groups, head, p); break;
        EACH_INTEGER_FORMAT(X)
#undef X
        default: pack_float_chunk(format, row, row_bytes, rows, column, cols, groups, p);
    }
}

static void unpack_chunk(int format, const uint8_t *head, const uint8_t *p, int64_t row_bytes,
                         int rows, int64_t column, int cols, int groups, uint8_t *row) {
    switch (format) {
#define X(F) case F: unpack_chunk_as(F, head, p, row_bytes, rows, column, cols, groups, row); break;
        EACH_INTEGER_FORMAT(X)
#undef X
        default: unpack_float_chunk(format, p, row_bytes, rows, column, cols, row);
    }
}

typedef struct {
    const ktl_matrix *src;
    uint8_t *dst;
    int format;
    int64_t panels, row_bytes, panel_bytes, matrix_bytes;
} layout_work;

/* A task is one panel of one expert. */
static void layout_task(void *context, int64_t task, int worker) {
    const layout_work *w = context;
    const ktl_matrix *m = w->src;
    const int64_t expert = task / w->panels, panel = task % w->panels, row0 = panel * KTL_PANEL;
    const int rows = (int)(m->rows - row0 < KTL_PANEL ? m->rows - row0 : KTL_PANEL);
    const int64_t head = ktl_head_bytes(m->format);
    const int64_t chunk_bytes = ktl_chunk_bytes(m->format, KTL_CHUNK / KTL_GROUP);
    const int packing = m->layout == KTL_GGML_BLOCKS;
    const uint8_t *from = m->data + expert * m->expert_stride;
    uint8_t *to = w->dst + expert * w->matrix_bytes;
    (void)worker;
    for (int64_t c = 0; c < m->cols; c += KTL_CHUNK) {
        const int cols = (int)(m->cols - c < KTL_CHUNK ? m->cols - c : KTL_CHUNK);
        const int groups = (cols + KTL_GROUP - 1) / KTL_GROUP;
        const int64_t at = panel * w->panel_bytes + head + c / KTL_CHUNK * chunk_bytes;
        if (packing)
            pack_chunk(m->format, from + row0 * w->row_bytes, w->row_bytes, rows, c, cols, groups,
                       to + panel * w->panel_bytes, to + at);
        else
            unpack_chunk(m->format, from + panel * w->panel_bytes, from + at, w->row_bytes, rows, c,
                         cols, groups, to + row0 * w->row_bytes);
    }
}

static int change_layout(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes,
                         int from) {
    if (src->layout != from) return KTL_ERR_LAYOUT;
    layout_work w = {src, dst, src->format, ktl_ceil(src->rows, KTL_PANEL),
                     ktl_row_bytes(src->format, src->cols), ktl_panel_bytes(src->format, src->cols), 0};
    w.matrix_bytes = from == KTL_GGML_BLOCKS ? w.panels * w.panel_bytes : src->rows * w.row_bytes;
    if (dst_bytes != src->experts * w.matrix_bytes) return KTL_ERR_SHAPE;
    if (from == KTL_GGML_BLOCKS && ((uintptr_t)dst & 63)) return KTL_ERR_ALIGN;
    ktl_pool_lock(pool);
    ktl_pool_run(pool, layout_task, &w, src->experts * w.panels);
    ktl_pool_unlock(pool);
    return KTL_OK;
}

int ktl_pack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes) {
    return change_layout(pool, src, dst, dst_bytes, KTL_GGML_BLOCKS);
}

int ktl_unpack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes) {
    return change_layout(pool, src, dst, dst_bytes, KTL_PACKED);
}

/* ---- exact values ------------------------------------------------------------------------------ */
/* Up to 256 columns of one row in blocks form. */
static void row_values(int format, const uint8_t *row, int64_t column, int cols, float *dst) {
    if (ktl_is_float(format)) {
        const uint8_t *p = row + column * ktl_formats[format].block_bytes;
        if (format == KTL_F32) memcpy(dst, p, (size_t)cols * 4);
        else if (format == KTL_BF16)
            for (int i = 0; i < cols; i++) dst[i] = ktl_bf16(ktl_load16(p + 2 * i));
        else
            for (int i = 0; i < cols; i++) dst[i] = ktl_f16(ktl_load16(p + 2 * i));
        return;
    }
    ktl_raw raw;
    float scale[16], offset[16] = {0};
    const int sub = ktl_formats[format].sub;
    ktl_raw_from_blocks(format, row, column, cols, &raw);
    ktl_raw_scales(format, &raw, cols, scale, offset);
    for (int i = 0; i < cols; i++)
        dst[i] = scale[i / sub] * (float)ktl_code_value(format, raw.code[i]) + offset[i / sub];
}

int ktl_dequantize(const ktl_matrix *src, int64_t expert, int64_t row, int64_t count, float *dst) {
    if (expert < 0 || expert >= src->experts || row < 0 || count < 0 || row > src->rows - count)
        return KTL_ERR_SHAPE;
    const int packed = src->layout == KTL_PACKED;
    const int64_t row_bytes = ktl_row_bytes(src->format, src->cols);
    const int64_t panel_bytes = ktl_panel_bytes(src->format, src->cols);
    const int64_t chunk_bytes = ktl_chunk_bytes(src->format, KTL_CHUNK / KTL_GROUP);
    const uint8_t *data = src->data + expert * src->expert_stride;
    for (int64_t c = 0; c < src->cols; c += KTL_CHUNK) {
        const int cols = (int)(src->cols - c < KTL_CHUNK ? src->cols - c : KTL_CHUNK);
        const int groups = (cols + KTL_GROUP - 1) / KTL_GROUP;
        if (!packed)
            for (int64_t r = 0; r < count; r++)
                row_values(src->format, data + (row + r) * row_bytes, c, cols, dst + r * src->cols + c);
        else
            for (int64_t r = 0; r < count;) {
                /* Bring back this chunk of the panel as blocks, then read those. */
                uint8_t blocks[KTL_PANEL][KTL_CHUNK * 4 + 64];
                const uint8_t *panel = data + (row + r) / KTL_PANEL * panel_bytes;
                const int at = (int)((row + r) % KTL_PANEL);
                unpack_chunk(src->format, panel,
                             panel + ktl_head_bytes(src->format) + c / KTL_CHUNK * chunk_bytes,
                             sizeof blocks[0], KTL_PANEL, 0, cols, groups, blocks[0]);
                for (int p = at; p < KTL_PANEL && r < count; p++, r++)
                    row_values(src->format, blocks[p], 0, cols, dst + r * src->cols + c);
            }
    }
    return KTL_OK;
}

/* ---- formats made at load ------------------------------------------------------------------------ */
uint16_t ktl_to_f16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00; /* rounds beyond 65504 */
    if (u < 0x38800000) {                      /* subnormal: adding 0.5 aligns the mantissa */
        float half = 0.5f, magnitude;
        memcpy(&magnitude, &u, 4);
        magnitude += half;
        memcpy(&u, &magnitude, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    u += 0x00000fff + (u >> 13 & 1);
    return (uint16_t)(sign | (u - 0x38000000) >> 13);
}

static void to_int8_channel(const float *x, int64_t cols, uint8_t *row) {
    const float most = ktl_largest(x, cols);
    const int finite = most <= 3.4028235e38f;
    const float scale = finite ? most / 127.0f : most;
    memcpy(row, &scale, 4);
    if (!finite || !(scale > 0)) {
        memset(row + 4, 0, (size_t)cols);
        return;
    }
    for (int64_t i = 0; i < cols; i++) {
        /* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, into the low bits. */
        float shifted = x[i] / scale + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        row[4 + i] = (uint8_t)(bits - 0x4b400000);
    }
}

static void to_int4_group(const float *x, int64_t cols, int size, uint8_t *row) {
    for (int64_t g = 0; g < cols; g += size, row += 2 + size / 2) {
        float most = 0, signed_most = 0;
        for (int i = 0; i < size; i++) {
            float v = x[g + i], a = v < 0 ? -v : v;
            if (a > most) most = a, signed_most = v;
        }
        const uint16_t half = ktl_to_f16(signed_most / -8.0f);
        const float d = ktl_f16(half);
        uint8_t code[128];
        for (int i = 0; i < size; i++) {
            float c = d != 0 ? x[g + i] / d + 8.5f : 8;
            code[i] = c >= 15 ? 15 : c > 0 ? (uint8_t)c : 0;
        }
        memcpy(row, &half, 2);
        for (int i = 0; i < size / 2; i++) row[2 + i] = (uint8_t)(code[i] | code[size / 2 + i] << 4);
    }
}

/* A task is one row; its values are in the worker's scratch. */
typedef struct {
    ktl_pool *pool;
    const ktl_matrix *src;
    uint8_t *dst;
    int format;
    int64_t row_bytes, out_bytes;
} convert_work;

static void convert_task(void *context, int64_t task, int worker) {
    const convert_work *w = context;
    const ktl_matrix *m = w->src;
    float *x = ktl_pool_scratch(w->pool, worker, 0);
    const uint8_t *row = m->data + task / m->rows * m->expert_stride + task % m->rows * w->row_bytes;
    for (int64_t c = 0; c < m->cols; c += KTL_CHUNK)
        row_values(m->format, row, c, (int)(m->cols - c < KTL_CHUNK ? m->cols - c : KTL_CHUNK), x + c);
    if (w->format == KTL_INT8_CHANNEL) to_int8_channel(x, m->cols, w->dst + task * w->out_bytes);
    else
        to_int4_group(x, m->cols, ktl_formats[w->format].block_cols, w->dst + task * w->out_bytes);
}

int ktl_convert(ktl_pool *pool, const ktl_matrix *src, int format, uint8_t *dst, int64_t dst_bytes) {
    if (src->layout != KTL_GGML_BLOCKS) return KTL_ERR_LAYOUT;
    if (format != KTL_INT8_CHANNEL && format != KTL_INT4_GROUP32 && format != KTL_INT4_GROUP128)
        return KTL_ERR_FORMAT;
    convert_work w = {pool, src, dst, format, ktl_row_bytes(src->format, src->cols),
                      ktl_row_bytes(format, src->cols)};
    if (w.out_bytes < 0) return (int)w.out_bytes;
    if (dst_bytes != src->experts * src->rows * w.out_bytes) return KTL_ERR_SHAPE;
    int error = KTL_OK;
    ktl_pool_lock(pool);
    for (int i = 0; i < ktl_pool_threads(pool); i++)
        if (!ktl_pool_scratch(pool, i, (size_t)src->cols * sizeof(float) + 64)) error = KTL_ERR_MEMORY;
    if (!error) ktl_pool_run(pool, convert_task, &w, src->experts * src->rows);
    ktl_pool_unlock(pool);
    return error;
}
