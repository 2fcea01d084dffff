/* What the C files share: the table of formats, the blocks that kernels work on, the interface of
 * one instruction set. Letters as in ktl.h. */
#ifndef KTL_INTERNAL_H
#define KTL_INTERNAL_H

#include <string.h>

#include "ktl.h"
#include "packed.h"

#define KTL_INLINE static inline __attribute__((always_inline))
#define KTL_ALIGNED __attribute__((aligned(64)))

KTL_INLINE int64_t ktl_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* What kernels need to know of a format, in the words of packed.h. The table is in this header so
 * that a constant format leaves constants only. */
typedef struct {
    const char *name;
    int block_cols;  /* of a block in the file; 0: a row is the block */
    int block_bytes; /* int8_channel: bytes before the codes */
    int base_bits, high_bits; /* 0: a float format, of `block_bytes` a number */
    int zero;                 /* code of the value 0 */
    int table;                /* codes index the iq4_nl table */
    int sub;                  /* columns that share a scale */
    int has_scale, has_min;   /* bytes per (sub, row) in packed form */
    int d_cols;               /* columns that share d; 0: none */
} ktl_format_info;

/* name, block columns, block bytes, base, high, zero, table, sub, scale, min, d columns */
static const ktl_format_info ktl_formats[KTL_FORMATS] = {
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
static const int8_t ktl_iq4_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

KTL_INLINE int ktl_is_float(int format) { return format <= KTL_BF16; }

/* ---- one row's share of a chunk, taken apart but not computed -------------------------------- */
typedef struct {
    uint8_t code[KTL_CHUNK];
    uint8_t scale[16]; /* per sub-block; int8 for q3_k, q6_k, iq4_xs */
    uint8_t min[16];
    uint16_t d[8]; /* float16 */
    uint16_t dmin;
    float row_scale; /* int8_channel */
} ktl_raw;

/* ---- activations ------------------------------------------------------------------------------ */
/* 256 activations of one token as int8 with a scale per group of columns (ktl_act_key), which stands at
 * each KTL_FINE of them. `init`, at the first KTL_FINE columns of what shares the scales of both sides (else
 * 0): `start` - zero * (sum of q), from which the integer sums start, so that unsigned codes turn back into
 * signed ones. `sum`, per sub-block: the sum of scale * q.
 * For pairs.inc.h all are 16 bits: scales and sums in steps of `unit` (2^15 of them to a scale of a pair's
 * product) and `sum_unit`, of two that follow one another the second first. Where the two of a lane are halves
 * of one unit, each scale stands there twice, and `init` has one for each half.
 * For row_avx2.inc.h scales are 16 bits in steps of `line_unit`, and `line_sum` has the sums of q, both of the even
 * KTL_FINE columns first and then of the odd ones; `line_start`: what scaled sums of KTL_GROUP start from. */
enum { KTL_FINE = 16, KTL_PAIRS = KTL_CHUNK / KTL_FINE / 2 };
#define KTL_START 12582912.0f /* 1.5 * 2^23: many.inc.h's integer sums start from it */
enum { KTL_START_BITS = 0x4b400000 };
typedef struct KTL_ALIGNED {
    int8_t q[KTL_CHUNK];
    union {
        float scale[KTL_CHUNK / KTL_FINE];
        int16_t pair_scale[KTL_CHUNK / KTL_FINE][2];
        struct {
            int16_t line_scale[KTL_CHUNK / KTL_FINE];
            float line_unit;
        };
    };
    union {
        float sum[16];
        struct {
            float unit, sum_unit;
            int16_t pair_sum[16];
        };
    };
    union {
        int32_t init[KTL_CHUNK / KTL_FINE];
        struct {
            int16_t line_sum[KTL_CHUNK / KTL_FINE];
            int32_t line_start[KTL_CHUNK / KTL_GROUP];
        };
    };
} ktl_act;

/* For words_avx2.inc.h: with 11 bits and a sign, of each four columns the first, the third, the second, the last. */
typedef struct KTL_ALIGNED {
    int16_t q[KTL_CHUNK];
    float scale;
} ktl_words;

typedef enum { KTL_ACT_INT8, KTL_ACT_WORDS, KTL_ACT_F32, KTL_ACT_BF16 } ktl_act_kind;
enum { KTL_HALVES = -1, KTL_LINES = -2 };

/* int8_channel's activations share a scale so far: the integer sums of two chunks can be one. */
enum { KTL_SPAN = 2 * KTL_CHUNK };

/* How a kernel wants its activations: equal keys can share them. */
typedef struct {
    int kind;
    int sub, zero; /* int8 only */
    int group;     /* int8: columns that share a scale, KTL_FINE or more; KTL_SPAN: two chunks do */
    /* int8: 2 adds what rounding left over, rounded once more: 16 bits in all. For q8_0, whose users
     * want its values and not twice its rounding error. */
    int terms;
    /* int8: 0; for pairs.inc.h KTL_HALVES, or 1 and the bits that sums of 16 bits drop; for row_avx2.inc.h
     * KTL_LINES, with the largest magnitude of a code as `zero` where a block has 256 columns. */
    int pairs;
    int start; /* int8: what is in `init` beside that, 0 or KTL_START_BITS */
} ktl_act_key;

KTL_INLINE ktl_act_key ktl_act_int8(int format, int zero) {
    const int sub = ktl_formats[format].sub;
    const int group = format == KTL_INT8_CHANNEL ? KTL_SPAN : sub > KTL_GROUP ? sub : KTL_GROUP;
    return (ktl_act_key){KTL_ACT_INT8, sub, zero, group, format == KTL_Q8_0 ? 2 : 1, 0, 0};
}

/* The middle of the codes, where minima do not say what zero is. */
KTL_INLINE int ktl_centre(int format) {
    const ktl_format_info *f = &ktl_formats[format];
    return f->zero ? f->zero : 1 << (f->base_bits + f->high_bits - 1);
}

/* The same activations for pairs.inc.h as `isa` has it. Sums of so many codes and activations fit 16 bits
 * rounded; products of two codes of 8 bits do not. */
KTL_INLINE ktl_act_key ktl_in_pairs(int isa, int format, ktl_act_key key) {
    const int unit = key.sub < key.group ? key.sub : key.group, zero = ktl_centre(format);
    if (isa == KTL_AVX2 && zero == 128) return key;
    key.zero = zero;
    key.pairs = isa == KTL_AVX2 ? KTL_HALVES : 1;
    if (key.pairs == KTL_HALVES) return key;
    while (unit * key.zero * 127 >> (key.pairs - 1) > INT16_MAX) key.pairs++;
    return key;
}

/* Formats in blocks of 32 or 256 columns: what rows.inc.h and row_avx2.inc.h take. */
KTL_INLINE int ktl_has_rows(int format) {
    return ktl_formats[format].block_cols == KTL_GROUP || ktl_formats[format].block_cols == KTL_CHUNK;
}

/* The same activations for row_avx2.inc.h. */
KTL_INLINE ktl_act_key ktl_in_lines(int format, ktl_act_key key) {
    const ktl_format_info *f = &ktl_formats[format];
    if (!ktl_has_rows(format)) return key;
    const int is_signed = f->zero == 128, whole = f->block_cols == KTL_CHUNK;
    key.zero = is_signed ? (whole ? 127 : 0) : f->zero ? f->zero : (1 << (f->base_bits + f->high_bits)) - 1;
    key.pairs = KTL_LINES;
    return key;
}

/* The same activations for words_avx2.inc.h, where codes have 8 bits. */
KTL_INLINE ktl_act_key ktl_in_words(int format, ktl_act_key key) {
    const ktl_act_key words = {KTL_ACT_WORDS, 0, 0, KTL_CHUNK, 1, 0, 0};
    return key.kind == KTL_ACT_INT8 && ktl_formats[format].zero == 128 ? words : key;
}

/* What a step of the integers is, in the i-th KTL_FINE columns; not for pairs.inc.h. */
KTL_INLINE float ktl_act_scale(const ktl_act_key *key, const ktl_act *a, int i) {
    return key->pairs == KTL_LINES ? (float)a->line_scale[i / 2 + i % 2 * 8] * a->line_unit : a->scale[i];
}

KTL_INLINE size_t ktl_act_bytes(int kind) {
    return kind == KTL_ACT_INT8    ? sizeof(ktl_act)
           : kind == KTL_ACT_WORDS ? sizeof(ktl_words)
           : kind == KTL_ACT_F32   ? KTL_CHUNK * sizeof(float)
                                   : KTL_CHUNK * sizeof(uint16_t);
}

/* ---- a tile: 16 rows x 256 columns, ready to multiply ------------------------------------------ */
typedef struct KTL_ALIGNED {
    union {
        uint8_t code[KTL_CHUNK * KTL_PANEL];   /* [column/4][row][4] */
        float f32[KTL_CHUNK * KTL_PANEL];      /* [column][row], float formats */
        uint16_t bf16[KTL_CHUNK * KTL_PANEL];  /* [column/2][row][2], for TDPBF16PS */
    };
    float scale[16][KTL_PANEL];  /* [sub][row] */
    float offset[16][KTL_PANEL]; /* -min; formats with minima */
    const uint8_t *codes; /* `code`, or the packed data itself where that is the same */
} ktl_tile;

enum { KTL_TILES = 4 }; /* tiles that are decoded at a time */
enum { KTL_FAR = 8192 }; /* bytes that few tokens ask for in advance */

/* Memory that will be read after this: `pieces` of `lines` x 64 bytes, `stride` bytes apart. */
typedef struct {
    const uint8_t *data;
    int64_t stride;
    int pieces, lines, line; /* `line`: the next of the first piece */
} ktl_ahead;

/* The same address, three cycles later. Requests to memory that leave in the same cycle get in each other's way:
 * a Xeon of the sixth generation reads a sixth to a third faster if each waits for the one before. */
KTL_INLINE const uint8_t *ktl_later(const uint8_t *p) {
#ifdef __x86_64__
    __asm__("imul $1, %0, %0" : "+r"(p));
#endif
    return p;
}

/* Lines for each of so many passes. */
KTL_INLINE int64_t ktl_share(const ktl_ahead *a, int64_t passes) {
    return ktl_ceil((int64_t)a->lines * a->pieces, passes);
}

/* Asks for the next `lines` of it, into L2. */
KTL_INLINE void ktl_fetch(ktl_ahead *a, int64_t lines) {
    while (lines > 0 && a->pieces > 0) {
        const uint8_t *p = a->data + a->line * 64;
        const int64_t rest = a->lines - a->line, n = lines < rest ? lines : rest;
        for (int64_t i = 0; i < n; i++, p = ktl_later(p + 64)) __builtin_prefetch(p, 0, 2);
        lines -= n;
        a->line += (int)n;
        if (a->line < a->lines) return;
        a->line = 0;
        a->pieces--;
        a->data += a->stride;
    }
}

/* Tokens against tiles: row i multiplies act row act_index[i] (i if NULL) into the sums at
 * acc + acc_index[i] * acc_stride (i if NULL); the indices of acc are distinct. */
typedef struct {
    const void *act; /* of the chunk: rows of ktl_act_bytes */
    int64_t act_next; /* bytes from there to the next chunk's, where `multiply` takes two */
    int fine; /* whether the activations have a scale every KTL_FINE columns */
    int kind, pairs; /* of ktl_act_key */
    const int32_t *act_index;
    float *acc;
    int64_t acc_stride;
    const int32_t *acc_index;
    int64_t n;
    ktl_ahead ahead; /* for `multiply` to fetch on the way */
    const uint8_t *end, *then; /* for `dot_packed`: where the part ends, and what will be read after it */
    int terms; /* for few tokens: of a token's activations, and bytes from one to the next */
    int64_t term_bytes;
} ktl_job;

KTL_INLINE float *ktl_sums(const ktl_job *job, int64_t i) {
    return job->acc + (job->acc_index ? job->acc_index[i] : i) * job->acc_stride;
}

/* Queries of all heads against a part of the cached positions. */
typedef struct {
    const float *q, *keys; /* heads x cols; n rows, `stride` floats apart */
    int64_t heads, cols, values /* the first columns of keys */, stride, n;
    float scale;
    float *weights;            /* scratch: ktl_attend_floats, in words ktl_words_floats, on tiles ktl_tiled_floats */
    int laid;                  /* whether that holds the queries already, from a call before */
    float *out, *most, *total; /* heads x values, not yet divided by total = sum of exp(score - most) */
} ktl_attend_part;

/* Weights and queries of heads in groups of KTL_ATTEND_LANES, n positions. */
enum { KTL_ATTEND_LANES = 16 };
KTL_INLINE size_t ktl_attend_floats(int64_t heads, int64_t cols, int64_t n) {
    return (size_t)(ktl_ceil(heads, KTL_ATTEND_LANES) * KTL_ATTEND_LANES * (n + cols));
}

/* The same in integers of 16 bits, two to a word (attend_words.inc.h): up to KTL_WORD_POSITIONS positions, columns in
 * multiples of 32, values of 16. */
enum { KTL_WORD_POSITIONS = 128, KTL_WORD_COLS = 32, KTL_WORD_VALUES = 16 };
typedef struct {
    int32_t *q, *keys, *values, *weights; /* [group][pair][16]; [position][pair]; [pair][value]; [group][pair][16] */
    float *q_step, *key_step, *step, *scores; /* what an integer is; [group][position][16] */
} ktl_words_room;

KTL_INLINE ktl_words_room ktl_words_room_in(int64_t heads, int64_t cols, int64_t values, float *scratch) {
    const int64_t lanes = ktl_ceil(heads, KTL_ATTEND_LANES) * KTL_ATTEND_LANES;
    ktl_words_room r;
    r.q = (int32_t *)scratch;
    r.keys = r.q + lanes * cols / 2;
    r.values = r.keys + KTL_WORD_POSITIONS * cols / 2;
    r.weights = r.values + KTL_WORD_POSITIONS / 2 * values;
    r.q_step = (float *)(r.weights + lanes * KTL_WORD_POSITIONS / 2);
    r.key_step = r.q_step + lanes;
    r.step = r.key_step + KTL_WORD_POSITIONS;
    r.scores = r.step + lanes;
    return r;
}

KTL_INLINE size_t ktl_words_floats(int64_t heads, int64_t cols, int64_t values) {
    const int64_t lanes = ktl_ceil(heads, KTL_ATTEND_LANES) * KTL_ATTEND_LANES, pairs = KTL_WORD_POSITIONS / 2;
    return (size_t)(lanes * (cols / 2 + 3 * pairs + 2) + pairs * (cols + values + 2));
}

/* ---- many queries of a head over the latent ------------------------------------------------------- */
/* Positions whose keys and values are made at a time, and numbers from row to row of their scores: a
 * power of two apart, rows would share cache sets. */
enum { KTL_MANY_RUN = 512, KTL_MANY_ROW = KTL_MANY_RUN + 32 };

/* Sizes rounded up to whole tiles; dims: nope and rope, each by itself. */
typedef struct {
    int64_t rank, nope, dims, values, tokens;
} ktl_many_sizes;

KTL_INLINE ktl_many_sizes ktl_many_sizes_of(const ktl_many *m) {
    const int64_t nope = ktl_ceil(m->nope, 32) * 32;
    return (ktl_many_sizes){ktl_ceil(m->rank, 32) * 32, nope, nope + ktl_ceil(m->rope, 32) * 32,
                            ktl_ceil(m->values, 32) * 32, ktl_ceil(m->tokens, 16) * 16};
}

/* A head's scratch: weights, keys and values as tiles; queries, sums, scores and weights by row. */
typedef struct {
    uint16_t *k_b, *v_b, *keys, *values, *q, *weights;
    float *out, *scores, *most, *total;
} ktl_many_room;

KTL_INLINE ktl_many_room ktl_many_room_in(const ktl_many_sizes *z, uint8_t *scratch) {
    ktl_many_room r;
    r.k_b = (uint16_t *)scratch;
    r.v_b = r.k_b + z->rank * z->nope;
    r.keys = r.v_b + z->rank * z->values;
    r.values = r.keys + KTL_MANY_RUN * z->dims;
    r.q = r.values + KTL_MANY_RUN * z->values;
    r.weights = r.q + z->tokens * z->dims;
    r.out = (float *)(r.weights + 16 * KTL_MANY_ROW);
    r.scores = r.out + z->tokens * z->values;
    r.most = r.scores + 16 * KTL_MANY_ROW;
    r.total = r.most + z->tokens;
    return r;
}

KTL_INLINE size_t ktl_many_bytes(const ktl_many_sizes *z) {
    const int64_t halves = z->rank * (z->nope + z->values) + KTL_MANY_RUN * (z->dims + z->values) +
                           z->tokens * z->dims + 16 * KTL_MANY_ROW;
    return (size_t)(2 * halves + 4 * (z->tokens * (z->values + 2) + 16 * KTL_MANY_ROW));
}

/* The same for one query a head (ktl_attend_part) of up to KTL_MANY_RUN positions. */
typedef struct {
    int64_t heads, cols, values;
} ktl_tiled_sizes;

KTL_INLINE ktl_tiled_sizes ktl_tiled_sizes_of(int64_t heads, int64_t cols, int64_t values) {
    return (ktl_tiled_sizes){ktl_ceil(heads, 16) * 16, ktl_ceil(cols, 32) * 32, ktl_ceil(values, 32) * 32};
}

/* `rows`: keys of 16 positions; `tiles`: keys of 32 or values of 128. */
typedef struct {
    uint16_t *q, *rows, *tiles, *weights;
    float *scores, *out;
} ktl_tiled_room;

KTL_INLINE ktl_tiled_room ktl_tiled_room_in(const ktl_tiled_sizes *z, float *scratch) {
    const int64_t keys = 32 * z->cols, values = 128 * z->values;
    ktl_tiled_room r;
    r.q = (uint16_t *)scratch;
    r.rows = r.q + z->heads * z->cols;
    r.tiles = r.rows + 16 * z->cols;
    r.weights = r.tiles + (keys > values ? keys : values);
    r.scores = (float *)(r.weights + z->heads * KTL_MANY_ROW);
    r.out = r.scores + z->heads * KTL_MANY_ROW;
    return r;
}

KTL_INLINE size_t ktl_tiled_floats(const ktl_tiled_sizes *z) {
    const int64_t tiles = 32 * z->cols > 128 * z->values ? 32 * z->cols : 128 * z->values;
    return (size_t)(((z->heads + 16) * z->cols + z->heads * KTL_MANY_ROW + tiles) / 2 +
                    z->heads * (KTL_MANY_ROW + z->values));
}

typedef struct {
    const ktl_many *m;
    int64_t head;
    const uint16_t *latent; /* positions rounded up to 32, ktl_many_sizes.rank columns: bfloat16 */
    uint8_t *scratch;
} ktl_many_head;

/* ---- one instruction set ------------------------------------------------------------------------- */
typedef struct {
    ktl_act_key (*act_key)(int format);
    /* One row's `cols` (at most 256) activations to an act row; the rest is zero. `most`: the
     * largest magnitude of the span, for groups that are longer than a chunk. */
    void (*prepare)(ktl_act_key key, const float *x, int cols, float most, void *act);
    /* A packed chunk of `groups` groups of 32 columns; `head` is the panel's. */
    void (*decode_packed)(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                          ktl_tile *tile);
    /* The same from `rows` (1..16) rows in blocks form, columns [column, column + cols). */
    void (*decode_blocks)(int format, const uint8_t *row, int64_t row_bytes, int rows,
                          int64_t column, int cols, ktl_tile *tile);
    /* `panels` tiles (KTL_TILES, or padded to them by the caller) times job->n tokens, whose
     * activations and sums lie one after the other (act_index and acc_index NULL). */
    void (*multiply)(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job);
    /* Few tokens on blocks: sums[i * stride + r] += row r . act row, for `rows` rows, all columns.
     * act is [chunk][token row]; chunk_bytes apart. NULL: none, tiles do. */
    void (*dot_blocks)(int format, const uint8_t *row, int64_t row_bytes, int rows, int64_t cols,
                       const void *act, int64_t chunk_bytes, const ktl_job *job);
    /* The same on a packed panel: sums[i * stride + 0..15] +=. NULL: none, tiles do. */
    void (*dot_packed)(int format, const uint8_t *panel, int64_t cols, const void *act, int64_t chunk_bytes,
                       const ktl_job *job);
    int spans; /* whether `multiply` takes packed int8_channel by two chunks, `groups` up to 16 */
    int pairs; /* the instruction set in whose way `multiply` takes sums in pairs, or 0 */
    int lines; /* whether `dot_blocks` takes one row after the other (ktl_in_lines) */
    int words; /* whether `multiply` takes codes of 8 bits in words (ktl_in_words) */
    int fine;  /* where activations have a scale every KTL_FINE columns: 1 where that costs little, 2 always */
    int start; /* what `multiply` wants its sums of short scales to start from (ktl_act_key), but in pairs */
    /* to = silu(gate) * up * factor */
    void (*silu_mul)(float *to, const float *gate, const float *up, float factor, int64_t count);
    void (*scale_row)(float *x, float factor, int64_t count);
    void (*add_row)(float *x, const float *more, int64_t count);
    void (*attend)(const ktl_attend_part *part);
    void (*attend_words)(const ktl_attend_part *part); /* NULL: none */
    void (*attend_many)(const ktl_many_head *head); /* NULL: none */
} ktl_kernels;

extern const ktl_kernels ktl_kernels_serial, ktl_kernels_avx2, ktl_kernels_avx512, ktl_kernels_avx512_bf16,
    ktl_kernels_amx_int8, ktl_kernels_amx_bf16, ktl_kernels_amx_int8_emulated,
    ktl_kernels_amx_bf16_emulated;

/* The kernels of an isa for many tokens, or for few (amx_* and avx512_bf16: those of avx512, or serial). */
const ktl_kernels *ktl_kernels_of(int isa, int few);

/* ---- small shared arithmetic ----------------------------------------------------------------------- */

KTL_INLINE uint16_t ktl_load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

/* float16 bits to float32, exact, infinities and NaN included. Written so that loops over it
 * vectorise: rebias the exponent by a multiplication, which also normalises subnormals. */
KTL_INLINE float ktl_f16(uint16_t h) {
    union { uint32_t u; float f; } magic = {.u = 0x77800000u /* 2^112 */}, v;
    v.u = (uint32_t)(h & 0x7fff) << 13;
    v.f *= magic.f;
    v.u |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    v.u |= (uint32_t)(h & 0x8000) << 16;
    return v.f;
}

KTL_INLINE float ktl_bf16(uint16_t h) {
    union { uint32_t u; float f; } v = {.u = (uint32_t)h << 16};
    return v.f;
}

/* Nearest, ties to even; a NaN stays one. */
KTL_INLINE uint16_t ktl_to_bf16(float x) {
    union { float f; uint32_t u; } v = {.f = x};
    uint32_t rounded = (v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16;
    return (v.u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((v.u >> 16) | 0x40) : (uint16_t)rounded;
}

uint16_t ktl_to_f16(float x); /* nearest, ties to even */

/* Value of a code before its scale. */
KTL_INLINE int ktl_code_value(int format, int code) {
    return ktl_formats[format].table ? ktl_iq4_table[code & 15] : code - ktl_formats[format].zero;
}

KTL_INLINE int ktl_has_dmin(int format) {
    return format == KTL_Q2_K || format == KTL_Q4_K || format == KTL_Q5_K;
}

/* Bytes of a packed chunk of so many groups of 32 columns; where the format is a constant, so is this. */
KTL_INLINE int64_t ktl_chunk_bytes_as(int format, int groups) {
    const ktl_format_info *f = &ktl_formats[format];
    if (ktl_is_float(format)) return (int64_t)groups * KTL_GROUP * KTL_PANEL * f->block_bytes;
    int64_t bytes = (int64_t)groups * 64 * (f->base_bits + f->high_bits);
    int subs = groups * KTL_GROUP / (f->sub > KTL_GROUP ? KTL_GROUP : f->sub);
    bytes += (int64_t)(f->has_scale + f->has_min) * subs * KTL_PANEL;
    if (f->d_cols) bytes += ktl_ceil((int64_t)groups * KTL_GROUP, f->d_cols) * 2 * KTL_PANEL;
    if (ktl_has_dmin(format)) bytes += 2 * KTL_PANEL;
    return ktl_ceil(bytes, 64) * 64;
}
int64_t ktl_chunk_bytes(int format, int groups);
/* Bytes of a panel's head. */
KTL_INLINE int64_t ktl_head_bytes(int format) { return format == KTL_INT8_CHANNEL ? 64 : 0; }
/* Bytes of a packed panel of a matrix with `cols` columns. */
int64_t ktl_panel_bytes(int format, int64_t cols);

#endif
