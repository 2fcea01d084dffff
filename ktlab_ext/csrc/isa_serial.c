/* No vectors at all: the judge in C, and what runs where nothing else does. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-vectorize")
#endif
#include "arithmetic.h"
#include "blocks.h"

static void transpose16(const uint32_t *src, int stride, uint32_t *dst) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) dst[16 * j + i] = src[i * stride + j];
}
#define TRANSPOSE16(src, stride, dst) transpose16(src, stride, dst)
#define PARTS_BYTES 64
#include "activations.inc.h"

static ktl_act_key act_key(int format) {
    const ktl_act_key floats = {KTL_ACT_F32, 0, 0, 0, 1, 0, 0};
    return ktl_is_float(format) ? floats : ktl_act_int8(format, ktl_formats[format].zero);
}

static void prepare(ktl_act_key key, const float *x, int cols, float most, void *out) {
    float padded[KTL_CHUNK] = {0};
    memcpy(padded, x, (size_t)cols * sizeof(float));
    if (key.kind == KTL_ACT_F32) memcpy(out, padded, sizeof padded);
    else quantize_act(key, padded, most, out);
}

/* A table's levels are made unsigned by adding 128, so that every format has codes and a zero. */
static uint8_t level(int format, uint8_t code) {
    return ktl_formats[format].table ? (uint8_t)(ktl_iq4_table[code & 15] + 128) : code;
}

static void decode_packed(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                          ktl_tile *tile) {
    const ktl_format_info *f = &ktl_formats[format];
    const int cols = groups * KTL_GROUP;
    tile->codes = tile->code;
    if (ktl_is_float(format)) {
        for (int c = 0; c < cols; c++)
            for (int r = 0; r < KTL_PANEL; r++) {
                if (format == KTL_F32) {
                    memcpy(&tile->f32[c * KTL_PANEL + r], chunk + (c * KTL_PANEL + r) * 4, 4);
                    continue;
                }
                uint16_t h = ktl_load16(chunk + (c / 2 * 2 * KTL_PANEL + 2 * r + c % 2) * 2);
                tile->f32[c * KTL_PANEL + r] = format == KTL_BF16 ? ktl_bf16(h) : ktl_f16(h);
            }
        return;
    }
    for (int g = 0; g < groups; g++) {
        const uint8_t *base = chunk + (size_t)g * 64 * (f->base_bits + f->high_bits);
        const uint8_t *high = base + 64 * f->base_bits;
        for (int v = 0; v < 8; v++)
            for (int i = 0; i < 64; i++) {
                int in_base = 8 / f->base_bits, in_high = f->high_bits ? 8 / f->high_bits : 1;
                int code = base[64 * (v / in_base) + i] >> (f->base_bits * (v % in_base)) &
                           ((1 << f->base_bits) - 1);
                if (f->high_bits)
                    code |= (high[64 * (v / in_high) + i] >> (f->high_bits * (v % in_high)) &
                             ((1 << f->high_bits) - 1)) << f->base_bits;
                tile->code[512 * g + 64 * v + i] = level(format, (uint8_t)code);
            }
    }
    const uint8_t *p = chunk + (size_t)groups * 64 * (f->base_bits + f->high_bits);
    if (format == KTL_INT8_CHANNEL) {
        memcpy(tile->scale[0], head, 64);
        return;
    }
    const int subs = f->has_scale ? cols / f->sub : (int)ktl_ceil(cols, f->d_cols);
    const uint8_t *d = p + (size_t)subs * KTL_PANEL * (f->has_scale + f->has_min);
    for (int s = 0; s < subs; s++)
        for (int r = 0; r < KTL_PANEL; r++) {
            const uint8_t byte = f->has_scale ? p[s * KTL_PANEL + r] : 0;
            const float dr = ktl_f16(ktl_load16(d + 2 * (f->has_scale ? r : s * KTL_PANEL + r)));
            float scale = dr, offset = 0;
            if (format == KTL_Q2_K) {
                scale = dr * (float)(byte & 15);
                offset = -ktl_f16(ktl_load16(d + 32 + 2 * r)) * (float)(byte >> 4);
            } else if (f->has_min) {
                scale = dr * (float)byte;
                offset = -ktl_f16(ktl_load16(d + 32 + 2 * r)) *
                         (float)p[(subs + s) * KTL_PANEL + r];
            } else if (f->has_scale) {
                scale = dr * (float)(int8_t)byte;
            }
            tile->scale[s][r] = scale;
            tile->offset[s][r] = offset;
        }
}

static void decode_blocks(int format, const uint8_t *row, int64_t row_bytes, int rows,
                          int64_t column, int cols, ktl_tile *tile) {
    const int padded = (cols + KTL_GROUP - 1) / KTL_GROUP * KTL_GROUP;
    tile->codes = tile->code;
    for (int r = 0; r < KTL_PANEL; r++) {
        const uint8_t *p = row + r * row_bytes;
        if (ktl_is_float(format)) {
            const int size = ktl_formats[format].block_bytes;
            for (int c = 0; c < padded; c++) {
                float v = 0;
                if (r < rows && c < cols) {
                    const uint8_t *at = p + (column + c) * size;
                    if (format == KTL_F32) memcpy(&v, at, 4);
                    else v = format == KTL_BF16 ? ktl_bf16(ktl_load16(at)) : ktl_f16(ktl_load16(at));
                }
                tile->f32[c * KTL_PANEL + r] = v;
            }
            continue;
        }
        ktl_raw raw = {.row_scale = 0};
        float scale[16] = {0}, offset[16] = {0};
        if (r < rows) {
            ktl_raw_from_blocks(format, p, column, cols, &raw);
            ktl_raw_scales(format, &raw, cols, scale, offset);
        }
        for (int c = 0; c < padded; c++)
            tile->code[c / 4 * 64 + 4 * r + c % 4] = c < cols ? level(format, raw.code[c]) : 0;
        for (int s = 0; s < 16; s++) {
            tile->scale[s][r] = scale[s];
            tile->offset[s][r] = offset[s];
        }
    }
}

static void multiply(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job) {
    const ktl_format_info *f = &ktl_formats[format];
    const int cols = groups * KTL_GROUP;
    const int has_offset = f->has_min || format == KTL_Q2_K;
    for (int64_t t = 0; t < job->n; t++) {
        float *acc = ktl_sums(job, t);
        for (int row = 0; row < panels * KTL_PANEL; row++) {
            const ktl_tile *tile = &tiles[row / KTL_PANEL];
            const int r = row % KTL_PANEL;
            float sum = acc[row];
            if (ktl_is_float(format)) {
                const float *x = (const float *)job->act + t * KTL_CHUNK;
                for (int c = 0; c < cols; c++) sum += tile->f32[c * KTL_PANEL + r] * x[c];
            } else {
                const ktl_act *a = (const ktl_act *)job->act + t;
                for (int first = 0; first < cols; first += KTL_FINE) {
                    const int s = first / f->sub;
                    int32_t dot = a->init[first / KTL_FINE];
                    for (int c = first; c < first + KTL_FINE; c++)
                        dot += tile->codes[c / 4 * 64 + 4 * r + c % 4] * a->q[c];
                    sum += (float)dot * tile->scale[s][r] * a->scale[first / KTL_FINE];
                    if (has_offset && first % f->sub == 0) sum += tile->offset[s][r] * a->sum[s];
                }
            }
            acc[row] = sum;
        }
    }
}

static void attend(const ktl_attend_part *a) {
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t p = 0; p < a->n; p++) {
            float sum = 0;
            for (int64_t c = 0; c < a->cols; c++)
                sum += a->q[h * a->cols + c] * a->keys[p * a->stride + c];
            a->weights[h * a->n + p] = sum * a->scale;
        }
    ktl_attend_softmax(a);
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t v = 0; v < a->values; v++) {
            float sum = 0;
            for (int64_t p = 0; p < a->n; p++)
                sum += a->weights[h * a->n + p] * a->keys[p * a->stride + v];
            a->out[h * a->values + v] = sum;
        }
}

const ktl_kernels ktl_kernels_serial = {
    .act_key = act_key, .prepare = prepare, .decode_packed = decode_packed, .decode_blocks = decode_blocks,
    .multiply = multiply, .fine = 2, .silu_mul = ktl_silu_mul, .scale_row = ktl_scale_row, .add_row = ktl_add_row,
    .attend = attend};
