/* The AMX kernels, on the processor's tiles (isa_amx.c), on emulated ones (isa_amx_emulated.c), and those
 * of bfloat16 on vectors (isa_avx512_bf16.c). The source is the same, so the emulation tests it where no
 * AMX is.
 *
 * A tile holds 16 rows of 64 bytes. A: 16 tokens x 64 activations. B: 64 columns of 16 weight rows,
 * four (bf16: two) columns a line, which is how packed data and decoded tiles lie. C: 16 x 16 sums.
 * One A and two B tiles make two C tiles: four tiles in all. Two by two on all eight would need a load
 * less for four products, but was measured to take 32 ns a product most of the time where four tiles
 * take 14 (7.4 either way in moments): perhaps a neighbour on the core holds renamed tiles. (A Xeon of the sixth
 * generation, to itself: 4.9 in any way.)
 *
 * The file that includes this defines TILE_CONFIG(config) TILE_ZERO(t) TILE_LOAD(t, p, stride)
 * TILE_STORE(t, p, stride) TILE_DOT_S8U8(c, a, b) TILE_DOT_BF16(c, a, b) TILE_RELEASE()
 * with literal tile numbers (or NO_INT8_TILES, and TWO_PRODUCTS in place of the products), ROWS_FMA(a, b, c) for a * b + c rounded once, and DECODE, the kernels that
 * decode for it. */
#include "arithmetic.h"
#include "blocks.h"

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} tile_config;

/* C 0 and 1, A 2, B 3; `tokens` (1..16) rows, k bytes of a token a product. */
KTL_INLINE tile_config config_for(int tokens, int k) {
    tile_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    c.rows[0] = c.rows[1] = c.rows[2] = (uint8_t)tokens;
    c.rows[3] = (uint8_t)(k / 4);
    c.colsb[0] = c.colsb[1] = c.colsb[3] = 64;
    c.colsb[2] = (uint16_t)k;
    return c;
}

/* 16 rows of weights at once; compiled to what the target has, and bit for bit the same. */
typedef float rows_f __attribute__((vector_size(64), may_alias, aligned(4)));
typedef int32_t rows_i __attribute__((vector_size(64), may_alias, aligned(4)));
typedef uint32_t rows_u __attribute__((vector_size(64), may_alias, aligned(4)));

/* The products of an A and two B tiles, and after each what `between` does. */
#ifndef TWO_PRODUCTS
#define TWO_PRODUCTS(a, stride, b0, b1, DOT, between)                                               \
    do {                                                                                            \
        TILE_LOAD(2, a, stride);                                                                    \
        TILE_LOAD(3, b0, 64);                                                                       \
        DOT(0, 2, 3);                                                                               \
        between;                                                                                    \
        TILE_LOAD(3, b1, 64);                                                                       \
        DOT(1, 2, 3);                                                                               \
        between;                                                                                    \
    } while (0)
#endif

#ifndef NO_INT8_TILES
/* ---- int8 ---------------------------------------------------------------------------------------- */
static ktl_act_key int8_act_key(int format) {
    return ktl_act_int8(format, ktl_formats[format].zero);
}

static void int8_prepare(ktl_act_key key, const float *x, int cols, float most, void *act) {
    DECODE.prepare(key, x, cols, most, act);
}

/* Columns of which the integer sums are one: two chunks where the activations' scale is one. */
KTL_INLINE int sub_of(int format) {
    return format == KTL_INT8_CHANNEL ? KTL_SPAN : ktl_formats[format].sub;
}

/* Which sums: of `tokens` (up to 16) from t on, 2 panels from p on, sub-block s. `next`: bytes to
 * the second chunk's activations, 0 if there is none. */
typedef struct {
    int64_t t, next;
    int tokens, p, s;
} place;

/* Such sums, waiting to be added to the result. That is done a few rows after each product of the
 * next ones: the processor reorders less than one round of them. */
typedef struct KTL_ALIGNED {
    int32_t dot[2][16][16]; /* [B][token][row] */
} waiting;

KTL_INLINE void take(waiting *w) {
    TILE_STORE(0, w->dot[0], 64);
    TILE_STORE(1, w->dot[1], 64);
}

/* Adds `rows` tokens of them, from row `from` on. */
KTL_INLINE void int8_add(int format, const waiting *w, place at, int from, int rows,
                         const ktl_tile *tiles, const ktl_job *job) {
    const int sub = sub_of(format), first = at.s * sub / KTL_FINE; /* the place of its scale */
    const int has_offset = ktl_formats[format].has_min || format == KTL_Q2_K, s = at.s;
    const ktl_tile *tile = tiles + at.p;
    const rows_f scales[2] = {*(const rows_f *)tile[0].scale[s], *(const rows_f *)tile[1].scale[s]};
    const int end = from + rows < at.tokens ? from + rows : at.tokens;
    for (int i = from; i < end; i++) {
        const ktl_act *a = (const ktl_act *)job->act + at.t + i;
        int32_t init = a->init[first];
        if (at.next) init += ((const ktl_act *)((const uint8_t *)a + at.next))->init[first];
        const float scale = a->scale[first], sum = a->sum[s];
        rows_f *to = (rows_f *)(ktl_sums(job, at.t + i) + at.p * KTL_PANEL);
#pragma GCC unroll 2
        for (int b = 0; b < 2; b++) {
            const rows_i dot = *(const rows_i *)w->dot[b][i] + init;
            rows_f v = ROWS_FMA(__builtin_convertvector(dot, rows_f), scales[b] * scale, to[b]);
            if (has_offset) v = ROWS_FMA(*(const rows_f *)tile[b].offset[s], (rows_f){0} + sum, v);
            to[b] = v;
        }
    }
}

/* Tokens from `first` on in blocks of `tokens`, up to 16, against all panels: a pair of them stays in L1 while all
 * tokens pass by. */
KTL_INLINE void int8_blocks(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job,
                            int64_t first, int tokens, ktl_ahead *ahead, int64_t share) {
    const int cols = groups * KTL_GROUP, sub = sub_of(format), k = sub < 64 ? sub : 64;
    const int rows = sub < 64 ? 0 : 8 * k / sub; /* to add after a product; few products: after all */
    waiting sums[2];
    place last = {0}, here = {.next = cols > KTL_CHUNK ? job->act_next : 0, .tokens = tokens};
    int turn = 0;
    uint8_t half[2][1024] KTL_ALIGNED; /* the last 32 columns, padded to 64 */
    tile_config config = config_for(tokens, k);
    TILE_CONFIG(&config);
    for (here.p = 0; here.p < panels; here.p += 2)
        for (here.t = first; here.t + tokens <= job->n; here.t += tokens) {
            const int8_t *a = ((const ktl_act *)job->act)[here.t].q;
            for (here.s = 0; here.s * sub < cols; here.s++) {
                const uint8_t *codes[2] = {tiles[here.p].codes, tiles[here.p + 1].codes};
                int row = 0;
                TILE_ZERO(0);
                TILE_ZERO(1);
                const int start = here.s * sub, end = start + sub < cols ? start + sub : cols;
                for (int c = start; c < end; c += k) {
                    const uint8_t *b0 = codes[0] + c * 16, *b1 = codes[1] + c * 16;
                    if (c + k > end) {
                        memcpy(half[0], b0, 512);
                        memcpy(half[1], b1, 512);
                        memset(half[0] + 512, 0, 512);
                        memset(half[1] + 512, 0, 512);
                        b0 = half[0];
                        b1 = half[1];
                    }
                    const int64_t at = c < KTL_CHUNK ? c : here.next + c - KTL_CHUNK;
                    ktl_fetch(ahead, share);
                    TWO_PRODUCTS(a + at, sizeof(ktl_act), b0, b1, TILE_DOT_S8U8, ({
                                     int8_add(format, &sums[!turn], last, row, rows, tiles, job);
                                     row += rows;
                                 }));
                }
                int8_add(format, &sums[!turn], last, row, 16, tiles, job);
                take(&sums[turn]);
                last = here;
                turn ^= 1;
            }
        }
    int8_add(format, &sums[!turn], last, 0, 16, tiles, job);
}

KTL_INLINE void int8_multiply_as(int format, const ktl_tile *tiles, int panels, int groups,
                                 const ktl_job *job) {
    const int sub = sub_of(format), k = sub < 64 ? sub : 64;
    ktl_ahead ahead = job->ahead;
    const int64_t passes = ktl_ceil(job->n, 16) * (panels / 2) * ktl_ceil(groups * KTL_GROUP, k);
    const int64_t share = ktl_share(&ahead, passes), whole = job->n / 16 * 16;
    /* A configuration waits for the tiles: one for whole blocks, and one for what is left. */
    if (whole) int8_blocks(format, tiles, panels, groups, job, 0, 16, &ahead, share);
    if (whole < job->n)
        int8_blocks(format, tiles, panels, groups, job, whole, (int)(job->n - whole), &ahead, share);
    TILE_RELEASE();
}

static void int8_multiply(int format, const ktl_tile *tiles, int panels, int groups,
                          const ktl_job *job) {
    switch (format) {
#define X(F) case F: int8_multiply_as(F, tiles, panels, groups, job); break;
        X(KTL_Q8_0) X(KTL_Q4_0) X(KTL_Q5_0) X(KTL_Q2_K) X(KTL_Q3_K) X(KTL_Q4_K) X(KTL_Q5_K)
        X(KTL_Q6_K) X(KTL_IQ4_NL) X(KTL_IQ4_XS) X(KTL_INT8_CHANNEL) X(KTL_INT4_GROUP32)
        X(KTL_INT4_GROUP128)
#undef X
    }
}

static void int8_decode_packed(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                               ktl_tile *tile) {
    if (format == KTL_INT8_CHANNEL) { /* packed it is the B tile already, of any number of chunks */
        memcpy(tile->scale[0], head, sizeof tile->scale[0]);
        tile->codes = chunk;
        return;
    }
    DECODE.decode_packed(format, head, chunk, groups, tile);
}

static void int8_decode_blocks(int format, const uint8_t *row, int64_t row_bytes, int rows,
                               int64_t column, int cols, ktl_tile *tile) {
    DECODE.decode_blocks(format, row, row_bytes, rows, column, cols, tile);
}

#endif

/* ---- bf16: any format, decoded to bfloat16 in the cache, without a scale in the inner loop --------- */
static ktl_act_key bf16_act_key(int format) {
    (void)format;
    return (ktl_act_key){KTL_ACT_BF16, 0, 0, 0, 1, 0, 0};
}

static void bf16_prepare(ktl_act_key key, const float *x, int cols, float most, void *act) {
    uint16_t *to = act;
    (void)key;
    (void)most;
    for (int i = 0; i < cols; i++) to[i] = ktl_to_bf16(x[i]);
    memset(to + cols, 0, (size_t)(KTL_CHUNK - cols) * 2);
}

/* Floats to the two halves of words, nearest (ties away from zero: one case in 65536). */
KTL_INLINE rows_u bf16_pair(rows_f low, rows_f high) {
    return (((rows_u)low + 0x8000) >> 16) | (((rows_u)high + 0x8000) & 0xffff0000u);
}

KTL_INLINE void bf16_from_codes(int zero, int sub, int has_offset, int groups, const ktl_tile *from,
                                ktl_tile *tile) {
    const rows_u *codes = (const rows_u *)from->codes;
    rows_u *to = (rows_u *)tile->bf16;
    for (int c = 0; c < groups * 8; c++) { /* four columns of 16 rows */
        const int s = 4 * c / sub;
        const rows_f scale = *(const rows_f *)from->scale[s];
        rows_f offset = scale * -(float)zero;
        if (has_offset) offset = *(const rows_f *)from->offset[s];
        const rows_u four = codes[c];
        rows_f v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            rows_u code = four >> (8 * j);
            if (j < 3) code &= 255;
            v[j] = ROWS_FMA(__builtin_convertvector((rows_i)code, rows_f), scale, offset);
        }
        to[2 * c] = bf16_pair(v[0], v[1]);
        to[2 * c + 1] = bf16_pair(v[2], v[3]);
    }
    tile->codes = (const uint8_t *)tile->bf16;
}

static void bf16_from_tile(int format, int groups, const ktl_tile *from, ktl_tile *tile) {
    const ktl_format_info *f = &ktl_formats[format];
    const int offset = f->has_min || format == KTL_Q2_K;
    if (f->sub == 16 && offset) bf16_from_codes(0, 16, 1, groups, from, tile);
    else if (f->sub == 16) bf16_from_codes(f->zero, 16, 0, groups, from, tile);
    else if (f->sub == 32 && offset) bf16_from_codes(0, 32, 1, groups, from, tile);
    else if (f->sub == 32) bf16_from_codes(f->zero, 32, 0, groups, from, tile);
    else bf16_from_codes(f->zero, f->sub, 0, groups, from, tile);
}

static void bf16_from_f32(int groups, const ktl_tile *from, ktl_tile *tile) {
    const rows_f *columns = (const rows_f *)from->f32;
    rows_u *to = (rows_u *)tile->bf16;
    for (int c = 0; c < groups * KTL_GROUP; c += 2)
        to[c / 2] = bf16_pair(columns[c], columns[c + 1]);
    tile->codes = (const uint8_t *)tile->bf16;
}

static void bf16_decode_packed(int format, const uint8_t *head, const uint8_t *chunk, int groups,
                               ktl_tile *tile) {
    if (format == KTL_BF16) { /* packed bf16 is the B tile already */
        tile->codes = chunk;
        return;
    }
    ktl_tile from;
    DECODE.decode_packed(format, head, chunk, groups, &from);
    bf16_from_tile(format, groups, &from, tile);
}

static void bf16_decode_blocks(int format, const uint8_t *row, int64_t row_bytes, int rows,
                               int64_t column, int cols, ktl_tile *tile) {
    ktl_tile from;
    const int groups = (cols + KTL_GROUP - 1) / KTL_GROUP;
    DECODE.decode_blocks(format, row, row_bytes, rows, column, cols, &from);
    if (format == KTL_BF16) bf16_from_f32(groups, &from, tile);
    else bf16_from_tile(format, groups, &from, tile);
}

/* Tokens from `first` on in blocks of `tokens`, up to 16, against all panels. A pair of panels stays in L1 while
 * all tokens pass by; their sums are loaded into the tiles, added to and stored again. */
KTL_INLINE void bf16_blocks(const ktl_tile *tiles, int panels, int groups, const ktl_job *job, int64_t first,
                            int tokens, ktl_ahead *ahead, int64_t share) {
    const uint16_t *acts = job->act;
    const int64_t sums_bytes = job->acc_stride * (int64_t)sizeof(float);
    tile_config config = config_for(tokens, 64);
    TILE_CONFIG(&config);
    for (int p = 0; p < panels; p += 2)
        for (int64_t t = first; t + tokens <= job->n; t += tokens) {
            const uint16_t *a = acts + t * KTL_CHUNK;
            float *sums = job->acc + t * job->acc_stride + p * KTL_PANEL;
            const uint8_t *b0 = tiles[p].codes, *b1 = tiles[p + 1].codes;
            ktl_fetch(ahead, share);
            TILE_LOAD(0, sums, sums_bytes);
            TILE_LOAD(1, sums + KTL_PANEL, sums_bytes);
            for (int g = 0; g < groups; g++)
                TWO_PRODUCTS(a + g * KTL_GROUP, KTL_CHUNK * 2, b0 + g * 1024, b1 + g * 1024, TILE_DOT_BF16,
                             (void)0);
            TILE_STORE(0, sums, sums_bytes);
            TILE_STORE(1, sums + KTL_PANEL, sums_bytes);
        }
}

static void bf16_multiply(int format, const ktl_tile *tiles, int panels, int groups, const ktl_job *job) {
    ktl_ahead ahead = job->ahead;
    const int64_t share = ktl_share(&ahead, ktl_ceil(job->n, 16) * (panels / 2)), whole = job->n / 16 * 16;
    (void)format;
    /* A configuration waits for the tiles: one for whole blocks, and one for what is left. */
    if (whole) bf16_blocks(tiles, panels, groups, job, 0, 16, &ahead, share);
    if (whole < job->n) bf16_blocks(tiles, panels, groups, job, whole, (int)(job->n - whole), &ahead, share);
    TILE_RELEASE();
}

#include "attend_many.inc.h"

#define INT8_KERNELS                                                                                        \
    {.act_key = int8_act_key, .prepare = int8_prepare, .decode_packed = int8_decode_packed,                 \
     .decode_blocks = int8_decode_blocks, .multiply = int8_multiply, .spans = 1, .silu_mul = ktl_silu_mul,  \
     .scale_row = ktl_scale_row, .add_row = ktl_add_row}
#define BF16_KERNELS                                                                                        \
    {.act_key = bf16_act_key, .prepare = bf16_prepare, .decode_packed = bf16_decode_packed,                 \
     .decode_blocks = bf16_decode_blocks, .multiply = bf16_multiply, .silu_mul = ktl_silu_mul,              \
     .scale_row = ktl_scale_row, .add_row = ktl_add_row, .attend = bf16_attend,                             \
     .attend_many = bf16_attend_many}
