/* The table of formats, their sizes, and the exact values. */
#include "blocks.h"
#include "internal.h"

/* name, block columns, block bytes, base, high, zero, table, sub, scale, min, d columns */
const ktl_format_info ktl_formats[KTL_FORMATS] = {
    [KTL_F32] = {"f32", 1, 4, 0, 0, 0, 0, 0, 0, 0, 0},
    [KTL_F16] = {"f16", 1, 2, 0, 0, 0, 0, 0, 0, 0, 0},
    [KTL_BF16] = {"bf16", 1, 2, 0, 0, 0, 0, 0, 0, 0, 0},
    [KTL_Q8_0] = {"q8_0", 32, 34, 8, 0, 128, 0, 32, 0, 0, 32},
    [KTL_Q4_0] = {"q4_0", 32, 18, 4, 0, 8, 0, 32, 0, 0, 32},
    [KTL_Q5_0] = {"q5_0", 32, 22, 4, 1, 16, 0, 32, 0, 0, 32},
    [KTL_Q2_K] = {"q2_k", 256, 84, 2, 0, 0, 0, 16, 1, 0, 256},
    [KTL_Q3_K] = {"q3_k", 256, 110, 2, 1, 4, 0, 16, 1, 0, 256},
    [KTL_Q4_K] = {"q4_k", 256, 144, 4, 0, 0, 0, 32, 1, 1, 256},
    [KTL_Q5_K] = {"q5_k", 256, 176, 4, 1, 0, 0, 32, 1, 1, 256},
    [KTL_Q6_K] = {"q6_k", 256, 210, 4, 2, 32, 0, 16, 1, 0, 256},
    [KTL_IQ4_NL] = {"iq4_nl", 32, 18, 4, 0, 128, 1, 32, 0, 0, 32},
    [KTL_IQ4_XS] = {"iq4_xs", 256, 136, 4, 0, 128, 1, 32, 1, 0, 256},
    [KTL_INT8_CHANNEL] = {"int8_channel", 0, 4, 8, 0, 128, 0, 256, 0, 0, 0},
    [KTL_INT4_GROUP32] = {"int4_group32", 32, 18, 4, 0, 8, 0, 32, 0, 0, 32},
    [KTL_INT4_GROUP128] = {"int4_group128", 128, 66, 4, 0, 8, 0, 128, 0, 0, 128},
};

/* ggml-common.h, kvalues_iq4nl: 16 levels, denser near zero. */
const int8_t ktl_iq4_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

const char *ktl_format_name(int format) {
    return format >= 0 && format < KTL_FORMATS ? ktl_formats[format].name : NULL;
}

int ktl_format_of(const char *name) {
    for (int f = 0; f < KTL_FORMATS; f++)
        if (!strcmp(name, ktl_formats[f].name)) return f;
    return KTL_ERR_FORMAT;
}

enum { MAX_SIDE = 1 << 30 }; /* rows or columns: far beyond any model, and products fit 63 bits */

static int side_ok(int64_t n) { return n >= 0 && n <= MAX_SIDE; }

int64_t ktl_row_bytes(int format, int64_t cols) {
    if (format < 0 || format >= KTL_FORMATS) return KTL_ERR_FORMAT;
    if (!side_ok(cols)) return KTL_ERR_SHAPE;
    const ktl_format_info *f = &ktl_formats[format];
    if (!f->block_cols) return f->block_bytes + cols;
    if (cols % f->block_cols) return KTL_ERR_SHAPE;
    return cols / f->block_cols * f->block_bytes;
}

int64_t ktl_chunk_bytes(int format, int groups) {
    const ktl_format_info *f = &ktl_formats[format];
    if (ktl_is_float(format)) return (int64_t)groups * KTL_GROUP * KTL_PANEL * f->block_bytes;
    int64_t bytes = (int64_t)groups * 64 * (f->base_bits + f->high_bits);
    int subs = groups * KTL_GROUP / (f->sub > KTL_GROUP ? KTL_GROUP : f->sub);
    bytes += (int64_t)(f->has_scale + f->has_min) * subs * KTL_PANEL;
    if (f->d_cols) bytes += ktl_ceil((int64_t)groups * KTL_GROUP, f->d_cols) * 2 * KTL_PANEL;
    if (ktl_has_dmin(format)) bytes += 2 * KTL_PANEL;
    return ktl_ceil(bytes, 64) * 64;
}

int64_t ktl_panel_bytes(int format, int64_t cols) {
    int64_t whole = cols / KTL_CHUNK;
    int rest = (int)ktl_ceil(cols % KTL_CHUNK, KTL_GROUP);
    return ktl_head_bytes(format) + whole * ktl_chunk_bytes(format, KTL_CHUNK / KTL_GROUP) +
           (rest ? ktl_chunk_bytes(format, rest) : 0);
}

int64_t ktl_packed_bytes(int format, int64_t rows, int64_t cols) {
    int64_t row_bytes = ktl_row_bytes(format, cols);
    if (row_bytes < 0) return row_bytes;
    if (!side_ok(rows)) return KTL_ERR_SHAPE;
    return ktl_ceil(rows, KTL_PANEL) * ktl_panel_bytes(format, cols);
}

int ktl_matrix_check(const ktl_matrix *m, int64_t available_bytes) {
    if (m->format < 0 || m->format >= KTL_FORMATS) return KTL_ERR_FORMAT;
    if (m->layout != KTL_GGML_BLOCKS && m->layout != KTL_PACKED) return KTL_ERR_LAYOUT;
    if (!side_ok(m->rows) || !side_ok(m->experts)) return KTL_ERR_SHAPE;
    int64_t row_bytes = ktl_row_bytes(m->format, m->cols);
    if (row_bytes < 0) return (int)row_bytes;
    int64_t need = m->layout == KTL_PACKED ? ktl_packed_bytes(m->format, m->rows, m->cols)
                                           : m->rows * row_bytes;
    if (!m->experts || !need) return KTL_OK;
    if (m->expert_stride < need || !m->data) return KTL_ERR_SHAPE;
    if ((available_bytes - need) / m->expert_stride < m->experts - 1 || available_bytes < need)
        return KTL_ERR_SHAPE;
    if (m->layout == KTL_PACKED && (((uintptr_t)m->data | (uintptr_t)m->expert_stride) & 63))
        return KTL_ERR_ALIGN;
    return KTL_OK;
}

int ktl_isa_computes(int isa, int format) {
    if (isa < 0 || isa >= KTL_ISAS || format < 0 || format >= KTL_FORMATS) return 0;
    if (isa == KTL_AMX_INT8 || isa == KTL_AMX_INT8_EMULATED) return !ktl_is_float(format);
    return 1;
}

const ktl_kernels *ktl_kernels_of(int isa, int few) {
    switch (isa) {
        case KTL_AVX2: return &ktl_kernels_avx2;
        case KTL_AVX512_VNNI: return &ktl_kernels_avx512;
        case KTL_AMX_INT8: return few ? &ktl_kernels_avx512 : &ktl_kernels_amx_int8;
        case KTL_AMX_BF16: return few ? &ktl_kernels_avx512 : &ktl_kernels_amx_bf16;
        case KTL_AMX_INT8_EMULATED:
            return few ? &ktl_kernels_serial : &ktl_kernels_amx_int8_emulated;
        case KTL_AMX_BF16_EMULATED:
            return few ? &ktl_kernels_serial : &ktl_kernels_amx_bf16_emulated;
        default: return &ktl_kernels_serial;
    }
}
