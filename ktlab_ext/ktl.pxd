"""What _native.pyx calls of csrc/ktl.h, which says what each does."""

from libc.stdint cimport int64_t, uint8_t, uint16_t


cdef extern from "ktl.h" nogil:
    enum:
        KTL_OK, KTL_ERR_FORMAT, KTL_ERR_LAYOUT, KTL_ERR_ISA, KTL_ERR_SHAPE, KTL_ERR_ALIGN
        KTL_ERR_MEMORY, KTL_ERR_ID, KTL_ERR_HEADER
        KTL_FORMATS, KTL_ISAS, KTL_GGML_BLOCKS, KTL_PACKED, KTL_X_F32, KTL_X_BF16
        KTL_HEADER_BYTES
    ctypedef struct ktl_pool:
        pass
    ctypedef struct ktl_matrix:
        int format, layout
        int64_t experts, rows, cols
        const uint8_t *data
        int64_t expert_stride
    ctypedef struct ktl_header:
        char format[16]
        int64_t experts, rows, cols
        char source[64]

    const char *ktl_format_name(int format)
    int ktl_format_of(const char *name)
    int64_t ktl_row_bytes(int format, int64_t cols)
    int64_t ktl_packed_bytes(int format, int64_t rows, int64_t cols)
    int ktl_matrix_check(const ktl_matrix *m, int64_t available_bytes)
    const char *ktl_isa_name(int isa)
    int ktl_isa_of(const char *name)
    const char *ktl_isa_reason(int isa)
    const char *ktl_cpu_vendor()
    int ktl_pairs(int isa)
    void ktl_set_pairs(int pairs)
    int ktl_isa_computes(int isa, int format)
    ktl_pool *ktl_pool_new(int threads, const int *cpus, int cpu_count)
    void ktl_pool_free(ktl_pool *pool)
    int ktl_linear(ktl_pool *pool, int isa, int few, const ktl_matrix *w, int64_t first,
                   int64_t heads, const void *x, int x_type, int64_t tokens, int64_t x_stride,
                   int64_t x_head, float *y, int64_t y_stride, int64_t y_head)
    int ktl_attend(ktl_pool *pool, int isa, const float *q, int64_t heads, int64_t cols,
                   const float *keys, int64_t positions, int64_t stride, int64_t values,
                   float scale, float *y)
    ctypedef struct ktl_many:
        const float *q
        const float *q_rope
        int64_t q_token, q_head, rope_token, rope_head
        const float *keys
        int64_t keys_stride
        const uint16_t *k_b
        const uint16_t *v_b
        int64_t tokens, positions, heads, rank, nope, rope, values
        float scale
        float *y
    int ktl_attends_many(int isa)
    int ktl_attend_many(ktl_pool *pool, int isa, const ktl_many *m)
    ctypedef struct ktl_mla:
        const ktl_matrix *q_a
        const ktl_matrix *q_b
        const ktl_matrix *kv_a
        const ktl_matrix *k_b
        const ktl_matrix *v_b
        const ktl_matrix *output
        const float *q_a_norm
        const float *kv_a_norm
        const float *turns
        int halves
        float eps
        float scale
    int ktl_mla_token(ktl_pool *pool, int isa, const ktl_mla *m, const float *x, float *keys,
                      int64_t positions, int64_t stride, float *q, float *y)
    ctypedef struct ktl_router:
        const ktl_matrix *gate
        const float *bias
        int sigmoid, normalise
        int64_t groups, open_groups, top_k
        float scale
    int ktl_route(ktl_pool *pool, int isa, const ktl_router *r, const float *x, int64_t *ids,
                  float *weights)
    ctypedef struct ktl_feed:
        const ktl_matrix *gate
        const ktl_matrix *up
        const ktl_matrix *down
        int isa, few
    ctypedef struct ktl_layer:
        const float *attention_norm
        const float *mlp_norm
        ktl_mla mla
        int mla_isa
        ktl_router router
        int router_isa
        ktl_feed routed
        ktl_feed shared
    ctypedef struct ktl_layer_place:
        const ktl_layer *layer
        const float *turns
        float *keys
        int64_t positions, stride
    int ktl_layers_token(ktl_pool *pool, const ktl_layer_place *at, int64_t count, const float *x, float *y)
    int ktl_moe(ktl_pool *pool, int isa, int few, const ktl_matrix *gate, const ktl_matrix *up,
                const ktl_matrix *down, const void *x, int x_type, int64_t tokens,
                int64_t x_stride, const int64_t *ids, const float *weights, int64_t top_k,
                float *y, int64_t y_stride)
    int ktl_pack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes)
    int ktl_unpack(ktl_pool *pool, const ktl_matrix *src, uint8_t *dst, int64_t dst_bytes)
    int ktl_convert(ktl_pool *pool, const ktl_matrix *src, int format, uint8_t *dst,
                    int64_t dst_bytes)
    int ktl_dequantize(const ktl_matrix *src, int64_t expert, int64_t row, int64_t count,
                       float *dst)
    int ktl_header_write(const ktl_header *h, uint8_t *dst)
    int ktl_header_read(const uint8_t *src, int64_t total_bytes, ktl_header *h, char *why)
    double ktl_peak_ops(ktl_pool *pool, int isa, int loading, double seconds)
    double ktl_peak_fma(ktl_pool *pool, double seconds)
    double ktl_peak_read(ktl_pool *pool, const uint8_t *buffer, int64_t bytes, double seconds)
