/* ktlab_ext: the C core. It knows pointers, strides and threads only; ktlab_ext/_native.pyx checks
 * shapes and types, releases the GIL and calls; Python decides.
 *
 * Every function that returns int returns KTL_OK or a negative KTL_ERR_*, and has then written
 * nothing. No function prints, exits or keeps a pointer past its return (pools excepted).
 *
 * Letters: E experts, N rows (output features), K columns (input features), T tokens, S slots
 * (a token times one of its selected experts).
 */
#ifndef KTL_H
#define KTL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KTL_OK = 0,
    KTL_ERR_FORMAT = -1,   /* unknown format, or one without this operation */
    KTL_ERR_LAYOUT = -2,
    KTL_ERR_ISA = -3,      /* not usable on this machine, see ktl_isa_reason */
    KTL_ERR_SHAPE = -4,    /* negative, or not divisible as the format demands */
    KTL_ERR_ALIGN = -5,    /* packed data not 64-byte aligned */
    KTL_ERR_MEMORY = -6,   /* scratch could not be allocated */
    KTL_ERR_ID = -7,       /* an expert id out of range (valid: -1 = nobody, 0..E-1) */
    KTL_ERR_HEADER = -8    /* a packed header that is not ours, or lies */
};

/* ---- formats: how numbers are encoded. Order is ABI within one build only. ------------------- */
typedef enum {
    KTL_F32, KTL_F16, KTL_BF16,
    KTL_Q8_0, KTL_Q4_0, KTL_Q5_0,
    KTL_Q2_K, KTL_Q3_K, KTL_Q4_K, KTL_Q5_K, KTL_Q6_K,
    KTL_IQ4_NL, KTL_IQ4_XS,
    KTL_INT8_CHANNEL,  /* a row: float32 scale, then K int8 codes */
    KTL_INT4_GROUP32,  /* blocks of 32: float16 scale, 16 bytes: element i low nibble of byte i,
                          element 16+i its high nibble; value = scale * (code - 8) (as Q4_0) */
    KTL_INT4_GROUP128, /* blocks of 128: float16 scale, 64 bytes: element i low nibble of byte i,
                          element 64+i its high nibble; value = scale * (code - 8) */
    KTL_FORMATS
} ktl_format;

const char *ktl_format_name(int format);  /* "q4_k"; NULL if out of range */
int ktl_format_of(const char *name);      /* or KTL_ERR_FORMAT */

/* ---- layouts: how the encoded numbers lie in memory ------------------------------------------ */
typedef enum { KTL_GGML_BLOCKS, KTL_PACKED } ktl_layout;

/* Bytes of one row in blocks form, or KTL_ERR_SHAPE if K does not divide into blocks. */
int64_t ktl_row_bytes(int format, int64_t cols);
/* Bytes of ONE matrix (N x K) in packed form, a multiple of 64, header excluded; or an error. */
int64_t ktl_packed_bytes(int format, int64_t rows, int64_t cols);

/* A stack of E matrices (N x K) of one format in one layout. In blocks form row n of expert e
 * starts at data + e * expert_stride + n * ktl_row_bytes(); in packed form expert e starts at
 * data + e * expert_stride, 64-byte aligned. */
typedef struct {
    int format, layout;
    int64_t experts, rows, cols;
    const uint8_t *data;
    int64_t expert_stride; /* bytes */
} ktl_matrix;

int ktl_matrix_check(const ktl_matrix *m, int64_t available_bytes);

/* ---- instruction sets -------------------------------------------------------------------------- */
typedef enum {
    KTL_SERIAL, KTL_AVX2, KTL_AVX512_VNNI, KTL_AVX512_BF16, KTL_AMX_INT8, KTL_AMX_BF16,
    KTL_AMX_INT8_EMULATED, /* the AMX kernel source on emulated tile instructions: runs anywhere */
    KTL_AMX_BF16_EMULATED,
    KTL_ISAS
} ktl_isa;

const char *ktl_isa_name(int isa); /* "avx512_vnni"; NULL if out of range */
int ktl_isa_of(const char *name);
/* "" if usable in this process, else why not, e.g. "the CPU lacks avx512_vnni (cpuid 7.0 ECX 11)"
 * or "the operating system does not grant AMX tiles (arch_prctl(ARCH_REQ_XCOMP_PERM) failed)".
 * The first call asks; the answer is kept. Thread safe. */
const char *ktl_isa_reason(int isa);
const char *ktl_cpu_vendor(void); /* cpuid 0: "AuthenticAMD", "GenuineIntel" */
/* Whether an instruction set scales many tokens' sums two by two as 16 bits (csrc/pairs.inc.h), where scales are for
 * 16 or 32 columns: avx2 always; avx512_vnni, which has fewer products and more additions then, on AMD's
 * processors; others never.
 * ktl_set_pairs, for tests and comparisons: 1, 0, or -1 for that choice; not while work runs. */
int ktl_pairs(int isa);
void ktl_set_pairs(int pairs);
/* Does the instruction set compute this format? 1 or 0 (amx_int8 has no float formats). */
int ktl_isa_computes(int isa, int format);

/* ---- threads ----------------------------------------------------------------------------------- */
typedef struct ktl_pool ktl_pool;
typedef void (*ktl_task)(void *context, int64_t task, int worker);

/* `threads` workers in all, the caller being worker 0. `cpus` (may be NULL): the workers may run on
 * these cpu numbers only (a NUMA node's); the caller is not pinned. NULL on failure. */
ktl_pool *ktl_pool_new(int threads, const int *cpus, int cpu_count);
void ktl_pool_free(ktl_pool *pool);
int ktl_pool_threads(const ktl_pool *pool);
/* Run task(context, i, worker) for i in [0, tasks): contiguous ranges per worker, then stealing.
 * Returns when all are done. Calls from several threads take turns. After fork() a child's first
 * call starts its own workers. Idle workers spin for at most about 50 us, then sleep. */
void ktl_pool_run(ktl_pool *pool, ktl_task task, void *context, int64_t tasks);
/* Take the pool for a series of runs that share scratch; ktl_pool_run inside needs the lock held by
 * the same thread (it does not lock again). */
void ktl_pool_lock(ktl_pool *pool);
void ktl_pool_unlock(ktl_pool *pool);
/* Grow-only, 64-byte aligned, kept by the pool. slot: 0..threads-1 private to workers,
 * threads..threads+KTL_SHARED-1 shared by a series of runs. NULL if memory is short. Needs the
 * lock; a worker may ask for its own slot inside a task. */
enum { KTL_SHARED = 22 }; /* the last five are layer.c's */
void *ktl_pool_scratch(ktl_pool *pool, int slot, size_t bytes);

/* ---- operations ---------------------------------------------------------------------------------- */
typedef enum { KTL_X_F32, KTL_X_BF16 } ktl_x_type;

/* y[h] (T x N) = x[h] (T x K) W[first + h]^T for `heads` matrices of the stack; strides in elements,
 * from token to token and from head to head. Where T <= few the path for few tokens runs, else the
 * one for many (amx_*: below it avx512_vnni computes). */
int ktl_linear(ktl_pool *pool, int isa, int few, const ktl_matrix *w, int64_t first, int64_t heads,
               const void *x, int x_type, int64_t tokens, int64_t x_stride, int64_t x_head,
               float *y, int64_t y_stride, int64_t y_head);

/* y (heads x values) = softmax(scale q K^T) V: one query a head, q (heads x cols), `positions` keys of
 * `cols`, `stride` floats apart, of which the first `values` columns are the values. In float32; from 8 heads and
 * 512 positions on, on tiles of bfloat16 (ktl_attends_many), which loses 0.2 to 0.3 %, or with AVX-512 in integers of
 * 16 bits where cols and values are multiples of 32 and 16, which loses 0.03 to 0.08 %. */
int ktl_attend(ktl_pool *pool, int isa, const float *q, int64_t heads, int64_t cols,
               const float *keys, int64_t positions, int64_t stride, int64_t values, float scale,
               float *y);

/* Many tokens of one sequence over its latent cache: T tokens, the last of S positions, H heads, C
 * latent, N plain and R turned dimensions of a head, V of its value. Token t sees S - T + t + 1
 * positions. k_b and v_b are bfloat16. */
typedef struct {
    const float *q, *q_rope; /* T x H x N and T x H x R; from token to token and head to head: */
    int64_t q_token, q_head, rope_token, rope_head;
    const float *keys; /* S x (C + R), the latent and the turned part, `keys_stride` apart */
    int64_t keys_stride;
    const uint16_t *k_b, *v_b; /* H x C x N; H x V x C */
    int64_t tokens, positions, heads, rank, nope, rope, values;
    float scale;
    float *y; /* T x H x V */
} ktl_many;

/* y = softmax(scale q K^T) V with keys and values made of the latent: K = (latent k_b, turned part), V =
 * latent v_b^T. Only with tiles of bfloat16: KTL_ERR_ISA otherwise, as ktl_attends_many says (0). */
int ktl_attends_many(int isa);
int ktl_attend_many(ktl_pool *pool, int isa, const ktl_many *m);

/* Multi-head latent attention of one layer, absorbed. D hidden, H heads, C = kv_a_norm's numbers. */
typedef struct {
    const ktl_matrix *q_a;  /* Q x D, or NULL: then q_b reads D */
    const ktl_matrix *q_b;  /* H (N + R) x D or Q */
    const ktl_matrix *kv_a; /* C + R x D */
    const ktl_matrix *k_b;  /* H x (C x N) */
    const ktl_matrix *v_b;  /* H x (V x C) */
    const ktl_matrix *output; /* D x H V */
    const float *q_a_norm, *kv_a_norm;
    const float *turns; /* R / 2 complex numbers: by how much each pair is turned */
    int halves;         /* pairs are (i, i + R / 2), not (2 i, 2 i + 1) */
    float eps, scale;
} ktl_mla;

/* y (D) of one token x (D): writes its latent and turned key to the last of `positions` rows of
 * `keys` (C + R numbers, `stride` apart) and attends to all of them. q: H (N + R), the queries before
 * they are turned. The same as the operations one by one, without what lies between them. */
int ktl_mla_token(ktl_pool *pool, int isa, const ktl_mla *m, const float *x, float *keys,
                  int64_t positions, int64_t stride, float *q, float *y);

/* Which experts a token takes: scores are the sigmoid or softmax of
 * gate x; the choice is by score plus bias (may be NULL) among the experts of the `open_groups` best
 * groups; weights are the scores, divided by their sum if `normalise`, times scale. */
typedef struct {
    const ktl_matrix *gate; /* E x D */
    const float *bias;      /* E, or NULL */
    int sigmoid, normalise;
    int64_t groups, open_groups, top_k; /* groups = open_groups = 1: none */
    float scale;
} ktl_router;

/* ids and weights: top_k, the best first. */
int ktl_route(ktl_pool *pool, int isa, const ktl_router *r, const float *x, int64_t *ids,
              float *weights);

/* Experts, or one that everybody takes: ktl_moe's matrices and how they are computed. */
typedef struct {
    const ktl_matrix *gate, *up, *down;
    int isa, few;
} ktl_feed;

/* A layer: x + attention(norm x), then that + experts(norm of that). eps is mla's. */
typedef struct {
    const float *attention_norm, *mlp_norm;
    ktl_mla mla;       /* without turns */
    int mla_isa;
    ktl_router router; /* no gate: `routed` is a dense network, expert 0 of one */
    int router_isa;
    ktl_feed routed, shared; /* shared: no gate, none */
} ktl_layer;

/* Where a token stands in a layer: its turns, and the keys as in ktl_mla_token. */
typedef struct {
    const ktl_layer *layer;
    const float *turns;
    float *keys;
    int64_t positions, stride;
} ktl_layer_place;

/* y (D) of one token x (D) through `count` layers, one after the other. x and y are apart. */
int ktl_layers_token(ktl_pool *pool, const ktl_layer_place *at, int64_t count, const float *x, float *y);

/* y (T x D) = sum over k of weights[t,k] * down(silu(gate(x)) * up(x)) of expert ids[t,k]; id -1 is
 * nobody; an id may repeat within a token. gate, up: E x (F x D), down: E x (D x F). `few` counts
 * the tokens of one expert. ids and weights are contiguous (T x top_k). */
int ktl_moe(ktl_pool *pool, int isa, int few, const ktl_matrix *gate, const ktl_matrix *up,
            const ktl_matrix *down, const void *x, int x_type, int64_t tokens, int64_t x_stride,
            const int64_t *ids, const float *weights, int64_t top_k, float *y, int64_t y_stride);

/* ---- layout and format changes --------------------------------------------------------------------- */
/* Blocks of `src` (KTL_GGML_BLOCKS) to packed at dst (E * ktl_packed_bytes); and back, bit-exact. */
int ktl_pack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes);
int ktl_unpack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes);
/* Any format in blocks form to int8_channel or int4_group* in blocks form. */
int ktl_convert(ktl_pool *pool, const ktl_matrix *src, int format, uint8_t *dst, int64_t dst_bytes);
/* Rows [row, row + count) of expert `expert` as float32 (count x K), any layout: the exact values. */
int ktl_dequantize(const ktl_matrix *src, int64_t expert, int64_t row, int64_t count, float *dst);

/* The header of a packed tensor in a file or buffer: 192 bytes, data follows. */
enum { KTL_HEADER_BYTES = 192, KTL_PACK_VERSION = 1 };
typedef struct {
    char format[16];
    int64_t experts, rows, cols;
    char source[64]; /* digest of the model file and tensor that this was packed from, hex, or "" */
} ktl_header;
int ktl_header_write(const ktl_header *h, uint8_t *dst /* KTL_HEADER_BYTES */);
/* Trusts nothing: magic, version, checksum, format, shape, and that total_bytes is exactly what the
 * shape needs. On KTL_ERR_HEADER `why` (at least 160 bytes) says what was expected and found. */
int ktl_header_read(const uint8_t *src, int64_t total_bytes, ktl_header *h, char *why);

/* ---- ceilings, measured with the same threads ------------------------------------------------------- */
/* Operations per second (multiply and add are two) of the instruction set's own dot instruction on
 * registers: serial/avx2 float FMA resp. maddubs, avx512_vnni VPDPBUSD, amx_* tile products.
 * `loading`, amx_* only (0.0 otherwise): with three tile loads for two products, as the kernels do. */
double ktl_peak_ops(ktl_pool *pool, int isa, int loading, double seconds);
double ktl_peak_fma(ktl_pool *pool, double seconds);              /* float32 FLOP/s */
/* Bytes per second read by all workers from a buffer of `bytes` (give several times the cache). */
double ktl_peak_read(ktl_pool *pool, const uint8_t *buffer, int64_t bytes, double seconds);

#ifdef __cplusplus
}
#endif
#endif
