/* The table of formats, their sizes, and the exact values. */
#include "blocks.h"
#include "internal.h"

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

int64_t ktl_chunk_bytes(int format, int groups) { return ktl_chunk_bytes_as(format, groups); }

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
    /* bfloat16 would cost these the precision that they are chosen for. */
    if (isa == KTL_AVX512_BF16 || isa == KTL_AMX_BF16 || isa == KTL_AMX_BF16_EMULATED)
        return format != KTL_F32 && format != KTL_F16;
    return 1;
}

const ktl_kernels *ktl_kernels_of(int isa, int few) {
    switch (isa) {
        case KTL_AVX2: return &ktl_kernels_avx2;
        case KTL_AVX512_VNNI: return &ktl_kernels_avx512;
        case KTL_AVX512_BF16: return few ? &ktl_kernels_avx512 : &ktl_kernels_avx512_bf16;
        case KTL_AMX_INT8: return few ? &ktl_kernels_avx512 : &ktl_kernels_amx_int8;
        case KTL_AMX_BF16: return few ? &ktl_kernels_avx512 : &ktl_kernels_amx_bf16;
        case KTL_AMX_INT8_EMULATED:
            return few ? &ktl_kernels_serial : &ktl_kernels_amx_int8_emulated;
        case KTL_AMX_BF16_EMULATED:
            return few ? &ktl_kernels_serial : &ktl_kernels_amx_bf16_emulated;
        default: return &ktl_kernels_serial;
    }
}
