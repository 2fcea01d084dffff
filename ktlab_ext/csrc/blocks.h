/* File blocks taken apart and put together again. Plain loops: each instruction set compiles them
 * for itself, and with a constant format the compiler keeps one case.
 *
 * Block definitions: github.com/ggml-org/ggml, src/ggml-common.h. */
#ifndef KTL_BLOCKS_H
#define KTL_BLOCKS_H

#include "internal.h"

/* q4_k and q5_k: eight 6-bit scales and eight 6-bit minima in 12 bytes. The first four of each lie
 * in the low 6 bits of bytes 0-3 and 4-7; the others have their low 4 bits in bytes 8-11 and their
 * high 2 bits on top of bytes 0-7. */
KTL_INLINE void ktl_scales_k4(const uint8_t *p, uint8_t *scale, uint8_t *min) {
    uint32_t a, b, c;
    memcpy(&a, p, 4);
    memcpy(&b, p + 4, 4);
    memcpy(&c, p + 8, 4);
    uint32_t s0 = a & 0x3f3f3f3f, s1 = (c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030);
    uint32_t m0 = b & 0x3f3f3f3f, m1 = ((c >> 4) & 0x0f0f0f0f) | ((b >> 2) & 0x30303030);
    memcpy(scale, &s0, 4);
    memcpy(scale + 4, &s1, 4);
    memcpy(min, &m0, 4);
    memcpy(min + 4, &m1, 4);
}

KTL_INLINE void ktl_scales_k4_back(const uint8_t *scale, const uint8_t *min, uint8_t *p) {
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(scale[i] | (scale[i + 4] >> 4) << 6);
        p[i + 4] = (uint8_t)(min[i] | (min[i + 4] >> 4) << 6);
        p[i + 8] = (uint8_t)((scale[i + 4] & 15) | (min[i + 4] & 15) << 4);
    }
}

/* q3_k: sixteen 6-bit scales in 12 bytes: low 4 bits of 0-7 and 8-15 in the two nibbles of bytes
 * 0-7, high 2 bits of i at bits 2(i/4) of byte 8 + i%4. Stored + 32. */
KTL_INLINE void ktl_scales_k3(const uint8_t *p, uint8_t *scale) {
    uint32_t low[2], high;
    memcpy(low, p, 8);
    memcpy(&high, p + 8, 4);
    for (int w = 0; w < 4; w++) {
        uint32_t four = (low[w & 1] >> (w < 2 ? 0 : 4) & 0x0f0f0f0f) |
                        (high >> (2 * w) & 0x03030303) << 4;
        /* 32 less in each byte, modulo 64 and then sign-extended from 6 bits. */
        four ^= 0x20202020;
        four |= (four & 0x20202020) << 1 | (four & 0x20202020) << 2;
        memcpy(scale + 4 * w, &four, 4);
    }
}

KTL_INLINE void ktl_scales_k3_back(const uint8_t *scale, uint8_t *p) {
    memset(p, 0, 12);
    for (int i = 0; i < 16; i++) {
        int v = (uint8_t)(scale[i] + 32);
        p[i & 7] |= (uint8_t)((v & 15) << (i < 8 ? 0 : 4));
        p[8 + (i & 3)] |= (uint8_t)((v >> 4 & 3) << (2 * (i >> 2)));
    }
}

/* `cols` columns (a multiple of the block, at most 256; any number for int8_channel) of one row that
 * starts at `row`, from column `column` (a multiple of 256). Codes beyond `cols` are left as they
 * are. */
KTL_INLINE void ktl_raw_from_blocks(int format, const uint8_t *row, int64_t column, int cols,
                                    ktl_raw *raw) {
    const ktl_format_info *f = &ktl_formats[format];
    const uint8_t *p = f->block_cols ? row + column / f->block_cols * f->block_bytes : row;
    uint8_t *code = raw->code;
    switch (format) {
        case KTL_Q8_0:
            for (int b = 0; b < cols / 32; b++, p += 34) {
                raw->d[b] = ktl_load16(p);
                for (int i = 0; i < 32; i++) code[32 * b + i] = p[2 + i] ^ 0x80;
            }
            break;
        case KTL_Q4_0:
        case KTL_IQ4_NL:
        case KTL_INT4_GROUP32:
            for (int b = 0; b < cols / 32; b++, p += 18) {
                raw->d[b] = ktl_load16(p);
                for (int i = 0; i < 16; i++) {
                    code[32 * b + i] = p[2 + i] & 15;
                    code[32 * b + 16 + i] = p[2 + i] >> 4;
                }
            }
            break;
        case KTL_INT4_GROUP128:
            for (int b = 0; b < cols / 128; b++, p += 66) {
                raw->d[b] = ktl_load16(p);
                for (int i = 0; i < 64; i++) {
                    code[128 * b + i] = p[2 + i] & 15;
                    code[128 * b + 64 + i] = p[2 + i] >> 4;
                }
            }
            break;
        case KTL_Q5_0:
            for (int b = 0; b < cols / 32; b++, p += 22) {
                uint32_t high;
                raw->d[b] = ktl_load16(p);
                memcpy(&high, p + 2, 4);
                for (int i = 0; i < 16; i++) {
                    code[32 * b + i] = (uint8_t)((p[6 + i] & 15) | (high >> i & 1) << 4);
                    code[32 * b + 16 + i] = (uint8_t)(p[6 + i] >> 4 | (high >> (16 + i) & 1) << 4);
                }
            }
            break;
        case KTL_Q2_K: /* scales[16], qs[64], d, dmin */
            memcpy(raw->scale, p, 16);
            for (int h = 0; h < 2; h++)
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < 32; i++)
                        code[128 * h + 32 * j + i] = p[16 + 32 * h + i] >> (2 * j) & 3;
            raw->d[0] = ktl_load16(p + 80);
            raw->dmin = ktl_load16(p + 82);
            break;
        case KTL_Q3_K: /* hmask[32], qs[64], scales[12], d */
            for (int h = 0; h < 2; h++)
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < 32; i++)
                        code[128 * h + 32 * j + i] =
                            (uint8_t)((p[32 + 32 * h + i] >> (2 * j) & 3) |
                                      (p[i] >> (4 * h + j) & 1) << 2);
            ktl_scales_k3(p + 96, raw->scale);
            raw->d[0] = ktl_load16(p + 108);
            break;
        case KTL_Q4_K: /* d, dmin, scales[12], qs[128] */
            raw->d[0] = ktl_load16(p);
            raw->dmin = ktl_load16(p + 2);
            ktl_scales_k4(p + 4, raw->scale, raw->min);
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 32; i++) {
                    code[64 * j + i] = p[16 + 32 * j + i] & 15;
                    code[64 * j + 32 + i] = p[16 + 32 * j + i] >> 4;
                }
            break;
        case KTL_Q5_K: /* d, dmin, scales[12], qh[32], qs[128] */
            raw->d[0] = ktl_load16(p);
            raw->dmin = ktl_load16(p + 2);
            ktl_scales_k4(p + 4, raw->scale, raw->min);
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 32; i++) {
                    int high = p[16 + i] >> (2 * j);
                    code[64 * j + i] = (uint8_t)((p[48 + 32 * j + i] & 15) | (high & 1) << 4);
                    code[64 * j + 32 + i] = (uint8_t)(p[48 + 32 * j + i] >> 4 | (high & 2) << 3);
                }
            break;
        case KTL_Q6_K: /* ql[128], qh[64], scales[16], d */
            for (int h = 0; h < 2; h++) {
                const uint8_t *ql = p + 64 * h, *qh = p + 128 + 32 * h;
                uint8_t *c = code + 128 * h;
                for (int i = 0; i < 32; i++) {
                    c[i] = (uint8_t)((ql[i] & 15) | (qh[i] & 3) << 4);
                    c[32 + i] = (uint8_t)((ql[32 + i] & 15) | (qh[i] & 12) << 2);
                    c[64 + i] = (uint8_t)(ql[i] >> 4 | (qh[i] & 48));
                    c[96 + i] = (uint8_t)(ql[32 + i] >> 4 | (qh[i] & 192) >> 2);
                }
            }
            memcpy(raw->scale, p + 192, 16);
            raw->d[0] = ktl_load16(p + 208);
            break;
        case KTL_IQ4_XS: { /* d, scales_h (16 bits), scales_l[4], qs[128] */
            uint16_t high = ktl_load16(p + 2);
            raw->d[0] = ktl_load16(p);
            for (int b = 0; b < 8; b++) {
                int low = p[4 + b / 2] >> (4 * (b & 1)) & 15;
                raw->scale[b] = (uint8_t)((low | (high >> (2 * b) & 3) << 4) - 32);
                for (int i = 0; i < 16; i++) {
                    code[32 * b + i] = p[8 + 16 * b + i] & 15;
                    code[32 * b + 16 + i] = p[8 + 16 * b + i] >> 4;
                }
            }
            break;
        }
        case KTL_INT8_CHANNEL:
            memcpy(&raw->row_scale, p, 4);
            for (int i = 0; i < cols; i++) code[i] = p[4 + column + i] ^ 0x80;
            break;
    }
}

/* The inverse, bit for bit. */
static inline void ktl_raw_to_blocks(int format, const ktl_raw *raw, int64_t column, int cols,
                                     uint8_t *row) {
    const ktl_format_info *f = &ktl_formats[format];
    uint8_t *p = f->block_cols ? row + column / f->block_cols * f->block_bytes : row;
    const uint8_t *code = raw->code;
    switch (format) {
        case KTL_Q8_0:
            for (int b = 0; b < cols / 32; b++, p += 34) {
                memcpy(p, &raw->d[b], 2);
                for (int i = 0; i < 32; i++) p[2 + i] = code[32 * b + i] ^ 0x80;
            }
            break;
        case KTL_Q4_0:
        case KTL_IQ4_NL:
        case KTL_INT4_GROUP32:
            for (int b = 0; b < cols / 32; b++, p += 18) {
                memcpy(p, &raw->d[b], 2);
                for (int i = 0; i < 16; i++)
                    p[2 + i] = (uint8_t)(code[32 * b + i] | code[32 * b + 16 + i] << 4);
            }
            break;
        case KTL_INT4_GROUP128:
            for (int b = 0; b < cols / 128; b++, p += 66) {
                memcpy(p, &raw->d[b], 2);
                for (int i = 0; i < 64; i++)
                    p[2 + i] = (uint8_t)(code[128 * b + i] | code[128 * b + 64 + i] << 4);
            }
            break;
        case KTL_Q5_0:
            for (int b = 0; b < cols / 32; b++, p += 22) {
                uint32_t high = 0;
                memcpy(p, &raw->d[b], 2);
                for (int i = 0; i < 32; i++) high |= (uint32_t)(code[32 * b + i] >> 4 & 1) << i;
                memcpy(p + 2, &high, 4);
                for (int i = 0; i < 16; i++)
                    p[6 + i] =
                        (uint8_t)((code[32 * b + i] & 15) | (code[32 * b + 16 + i] & 15) << 4);
            }
            break;
        case KTL_Q2_K:
            memcpy(p, raw->scale, 16);
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < 32; i++) {
                    int v = 0;
                    for (int j = 0; j < 4; j++) v |= (code[128 * h + 32 * j + i] & 3) << (2 * j);
                    p[16 + 32 * h + i] = (uint8_t)v;
                }
            memcpy(p + 80, &raw->d[0], 2);
            memcpy(p + 82, &raw->dmin, 2);
            break;
        case KTL_Q3_K:
            for (int i = 0; i < 32; i++) {
                int mask = 0;
                for (int hj = 0; hj < 8; hj++) mask |= (code[32 * hj + i] >> 2 & 1) << hj;
                p[i] = (uint8_t)mask;
            }
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < 32; i++) {
                    int v = 0;
                    for (int j = 0; j < 4; j++) v |= (code[128 * h + 32 * j + i] & 3) << (2 * j);
                    p[32 + 32 * h + i] = (uint8_t)v;
                }
            ktl_scales_k3_back(raw->scale, p + 96);
            memcpy(p + 108, &raw->d[0], 2);
            break;
        case KTL_Q4_K:
            memcpy(p, &raw->d[0], 2);
            memcpy(p + 2, &raw->dmin, 2);
            ktl_scales_k4_back(raw->scale, raw->min, p + 4);
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 32; i++)
                    p[16 + 32 * j + i] = (uint8_t)(code[64 * j + i] | code[64 * j + 32 + i] << 4);
            break;
        case KTL_Q5_K:
            memcpy(p, &raw->d[0], 2);
            memcpy(p + 2, &raw->dmin, 2);
            ktl_scales_k4_back(raw->scale, raw->min, p + 4);
            for (int i = 0; i < 32; i++) {
                int high = 0;
                for (int s = 0; s < 8; s++) high |= (code[32 * s + i] >> 4 & 1) << s;
                p[16 + i] = (uint8_t)high;
            }
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 32; i++)
                    p[48 + 32 * j + i] =
                        (uint8_t)((code[64 * j + i] & 15) | (code[64 * j + 32 + i] & 15) << 4);
            break;
        case KTL_Q6_K:
            for (int h = 0; h < 2; h++) {
                uint8_t *ql = p + 64 * h, *qh = p + 128 + 32 * h;
                const uint8_t *c = code + 128 * h;
                for (int i = 0; i < 32; i++) {
                    ql[i] = (uint8_t)((c[i] & 15) | (c[64 + i] & 15) << 4);
                    ql[32 + i] = (uint8_t)((c[32 + i] & 15) | (c[96 + i] & 15) << 4);
                    qh[i] = (uint8_t)(c[i] >> 4 | (c[32 + i] >> 4) << 2 | (c[64 + i] >> 4) << 4 |
                                      (c[96 + i] >> 4) << 6);
                }
            }
            memcpy(p + 192, raw->scale, 16);
            memcpy(p + 208, &raw->d[0], 2);
            break;
        case KTL_IQ4_XS: {
            uint16_t high = 0;
            memcpy(p, &raw->d[0], 2);
            memset(p + 4, 0, 4);
            for (int b = 0; b < 8; b++) {
                int v = (uint8_t)(raw->scale[b] + 32);
                high |= (uint16_t)((v >> 4 & 3) << (2 * b));
                p[4 + b / 2] |= (uint8_t)((v & 15) << (4 * (b & 1)));
                for (int i = 0; i < 16; i++)
                    p[8 + 16 * b + i] = (uint8_t)(code[32 * b + i] | code[32 * b + 16 + i] << 4);
            }
            memcpy(p + 2, &high, 2);
            break;
        }
        case KTL_INT8_CHANNEL:
            if (column == 0) memcpy(p, &raw->row_scale, 4);
            for (int i = 0; i < cols; i++) p[4 + column + i] = code[i] ^ 0x80;
            break;
    }
}

/* float32 scales and -minima of one row's sub-blocks (16, 8, 2 or 1 of them for 256 columns). */
KTL_INLINE void ktl_raw_scales(int format, const ktl_raw *raw, int cols, float *scale,
                               float *offset) {
    const ktl_format_info *f = &ktl_formats[format];
    if (format == KTL_INT8_CHANNEL) {
        scale[0] = raw->row_scale;
        return;
    }
    if (!f->has_scale) {
        int n = cols / f->d_cols;
        for (int s = 0; s < n; s++) scale[s] = ktl_f16(raw->d[s]);
        return;
    }
    float d = ktl_f16(raw->d[0]), dmin = ktl_has_dmin(format) ? ktl_f16(raw->dmin) : 0;
    if (format == KTL_Q2_K)
        for (int s = 0; s < 16; s++) {
            scale[s] = d * (float)(raw->scale[s] & 15);
            offset[s] = -dmin * (float)(raw->scale[s] >> 4);
        }
    else if (f->has_min)
        for (int s = 0; s < 8; s++) {
            scale[s] = d * (float)raw->scale[s];
            offset[s] = -dmin * (float)raw->min[s];
        }
    else
        for (int s = 0; s < KTL_CHUNK / f->sub; s++) scale[s] = d * (float)(int8_t)raw->scale[s];
}

#endif
