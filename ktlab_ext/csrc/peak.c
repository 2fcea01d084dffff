/* Ceilings, measured: what the machine's arithmetic and memory give when nothing else is in the way.
 * All workers of the pool at once; the median of several rounds.
 *
 * Each loop keeps enough independent sums in registers to cover the instruction's latency. The
 * empty asm statements make values opaque, so that the compiler neither hoists nor folds.
 */
#include "internal.h"

#include <immintrin.h>
#include <stdlib.h>
#include <time.h>

enum { MOST_ROUNDS = 512, TASKS_A_THREAD = 4, PASS_BYTES = 1 << 20 };
static const double ROUND_S = 0.004; /* long against a wake-up, short against other programs' turns */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- arithmetic: each returns the operations (a multiply and an add are two) of `turns` turns ------- */
typedef double (*loop)(int64_t turns);

#define TWELVE(do_one) \
    do_one(0) do_one(1) do_one(2) do_one(3) do_one(4) do_one(5) \
    do_one(6) do_one(7) do_one(8) do_one(9) do_one(10) do_one(11)
#define START(j) sum##j = a;
#define STEP(j) \
    __asm__ volatile("" : "+v"(a)); \
    sum##j = PRODUCT(sum##j); \
    __asm__ volatile("" : "+v"(sum##j));

/* sums of `type`, all starting with `start`; PRODUCT is the instruction, of `values` products. */
#define LOOP(name, targets, type, start, values) \
    __attribute__((target(targets))) static double name(int64_t turns) { \
        type a = start, sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, sum8, sum9, sum10, sum11; \
        TWELVE(START) \
        for (int64_t i = 0; i < turns; i++) { \
            TWELVE(STEP) \
        } \
        return (double)turns * 12 * (values) * 2; \
    }

#define PRODUCT(sum) sum * a + a
LOOP(serial_fma, "sse2", float, 0.5f, 1)
#undef PRODUCT
#define PRODUCT(sum) _mm256_fmadd_ps(sum, a, a)
LOOP(avx2_fma, "avx2,fma", __m256, _mm256_set1_ps(0.5f), 8)
#undef PRODUCT
#define PRODUCT(sum) _mm512_fmadd_ps(sum, a, a)
LOOP(avx512_fma, "avx512f", __m512, _mm512_set1_ps(0.5f), 16)
#undef PRODUCT
/* Without VNNI a product of bytes is two instructions, as long as its sums fit 16 bits (pairs.inc.h). */
#define PRODUCT(sum) _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, a))
LOOP(avx2_maddubs, "avx2", __m256i, _mm256_set1_epi8(1), 32)
#undef PRODUCT
#define PRODUCT(sum) _mm512_dpbusd_epi32(sum, a, a)
LOOP(vnni_dpbusd, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(1), 64)
#undef PRODUCT
#define PRODUCT(sum) _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a)
LOOP(dpbf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(), 32)
#undef PRODUCT

/* Palette 1: eight tiles of 16 rows of 64 bytes. Products alone: four sums from tiles that stay.
 * Products with their loads, from L1: three loads for two products on four tiles, as the kernels do it
 * (amx.inc.h says why not two by two). */
typedef struct {
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

#define LOAD(tile)                       \
    __asm__ volatile("" : : : "memory"); \
    _tile_loadd(tile, zeros, 64)

#define FOUR_SUMS(product)  \
    product(0, 4, 6);       \
    product(1, 4, 7);       \
    product(2, 5, 6);       \
    product(3, 5, 7);
#define WITH_LOADS(product)                                        \
    for (int pair = 0; pair < 2; pair++) {                         \
        LOAD(2);                                                   \
        LOAD(3);                                                   \
        product(0, 2, 3);                                          \
        LOAD(3);                                                   \
        product(1, 2, 3);                                          \
    }

/* `tiles` of them are in use; a turn is four products. */
#define TILE_LOOP(name, targets, product, turn, tiles, columns)                                        \
    __attribute__((target(targets))) static double name(int64_t turns) {                               \
        static const uint8_t zeros[1024] __attribute__((aligned(64))) = {0};                           \
        tile_config config = {.palette = 1};                                                           \
        for (int t = 0; t < tiles; t++) {                                                              \
            config.rows[t] = 16;                                                                       \
            config.row_bytes[t] = 64;                                                                  \
        }                                                                                              \
        __asm__ volatile("ldtilecfg %0" : : "m"(config)); /* the intrinsic reads 8 bytes of it only */ \
        _tile_zero(0);                                                                                 \
        _tile_zero(1);                                                                                 \
        _tile_zero(2);                                                                                 \
        _tile_zero(3);                                                                                 \
        if (tiles == 8) {                                                                              \
            _tile_loadd(4, zeros, 64);                                                                 \
            _tile_loadd(5, zeros, 64);                                                                 \
            _tile_loadd(6, zeros, 64);                                                                 \
            _tile_loadd(7, zeros, 64);                                                                 \
        }                                                                                              \
        for (int64_t i = 0; i < turns; i++) {                                                          \
            turn(product)                                                                              \
        }                                                                                              \
        _tile_release();                                                                               \
        return (double)turns * 4 * 16 * 16 * (columns) * 2;                                            \
    }
TILE_LOOP(amx_int8, "amx-tile,amx-int8", _tile_dpbssd, FOUR_SUMS, 8, 64)
TILE_LOOP(amx_bf16, "amx-tile,amx-bf16", _tile_dpbf16ps, FOUR_SUMS, 8, 32)
TILE_LOOP(amx_int8_loading, "amx-tile,amx-int8", _tile_dpbssd, WITH_LOADS, 4, 64)
TILE_LOOP(amx_bf16_loading, "amx-tile,amx-bf16", _tile_dpbf16ps, WITH_LOADS, 4, 32)

typedef struct {
    loop loop;
    int64_t turns;
} arithmetic;

static void arithmetic_task(void *context, int64_t task, int worker) {
    const arithmetic *a = context;
    (void)task, (void)worker;
    a->loop(a->turns);
}

static double median_rate(ktl_pool *pool, ktl_task task, void *context, int64_t tasks, double work,
                          double seconds) {
    double rates[MOST_ROUNDS];
    int rounds = 0;
    ktl_pool_run(pool, task, context, tasks); /* warms caches and clock, wakes the workers */
    for (double end = now_s() + seconds; rounds < MOST_ROUNDS && (rounds < 3 || now_s() < end);) {
        double begin = now_s();
        ktl_pool_run(pool, task, context, tasks);
        rates[rounds++] = work / (now_s() - begin);
    }
    qsort(rates, (size_t)rounds, sizeof *rates, ascending);
    return rates[rounds / 2];
}

static double peak_of(ktl_pool *pool, loop loop, double seconds) {
    int64_t tasks = (int64_t)ktl_pool_threads(pool) * TASKS_A_THREAD;
    arithmetic a = {.loop = loop, .turns = 1000};
    double took = 0.0;
    for (;; a.turns *= 4) { /* how many turns make a round of about ROUND_S */
        double begin = now_s();
        loop(a.turns);
        took = now_s() - begin;
        if (took > ROUND_S / 16)
            break;
    }
    a.turns = (int64_t)((double)a.turns * ROUND_S / TASKS_A_THREAD / took) + 1;
    double work = loop(1) * (double)a.turns * (double)tasks;
    return median_rate(pool, arithmetic_task, &a, tasks, work, seconds);
}

static int usable(int isa) { return !*ktl_isa_reason(isa); }

double ktl_peak_fma(ktl_pool *pool, double seconds) {
    loop loop = usable(KTL_AVX512_VNNI) ? avx512_fma : usable(KTL_AVX2) ? avx2_fma : serial_fma;
    return peak_of(pool, loop, seconds);
}

double ktl_peak_ops(ktl_pool *pool, int isa, int loading, double seconds) {
    static const loop LOOPS[2][KTL_ISAS] = {
        {
            [KTL_SERIAL] = serial_fma,
            [KTL_AVX2] = avx2_maddubs,
            [KTL_AVX512_VNNI] = vnni_dpbusd,
            [KTL_AVX512_BF16] = dpbf16,
            [KTL_AMX_INT8] = amx_int8,
            [KTL_AMX_BF16] = amx_bf16,
        },
        {[KTL_AMX_INT8] = amx_int8_loading, [KTL_AMX_BF16] = amx_bf16_loading},
    };
    if (isa < 0 || isa >= KTL_ISAS || !LOOPS[!!loading][isa] || !usable(isa))
        return 0.0;
    return peak_of(pool, LOOPS[!!loading][isa], seconds);
}

/* ---- memory ---------------------------------------------------------------------------------------- */
static uint64_t read_serial(const uint8_t *data, int64_t bytes) {
    uint64_t sum[4] = {0}, word[4];
    for (int64_t i = 0; i + 32 <= bytes; i += 32) {
        __builtin_memcpy(word, data + i, sizeof word);
        for (int j = 0; j < 4; j++)
            sum[j] |= word[j];
    }
    return sum[0] | sum[1] | sum[2] | sum[3];
}

/* Some memories give half as much again if what is this far ahead is asked for. */
enum { FETCHED_BYTES = 8192 };

#define READ(name, targets, type, zero, load, either, fold) \
    __attribute__((target(targets))) static uint64_t name(const uint8_t *data, int64_t bytes) { \
        type sum = zero; \
        const uint8_t *far = data + FETCHED_BYTES; \
        for (int64_t i = 0; i < bytes; i += 64, far = ktl_later(far + 64)) { \
            __builtin_prefetch(far, 0, 2); \
            for (int64_t at = 0; at < 64; at += (int64_t)sizeof(type)) \
                sum = either(sum, load((const void *)(data + i + at))); \
        } \
        return (uint64_t)fold; \
    }
READ(read_avx2, "avx2", __m256i, _mm256_setzero_si256(), _mm256_loadu_si256, _mm256_or_si256,
     _mm256_extract_epi64(sum, 0))
READ(read_avx512, "avx512f", __m512i, _mm512_setzero_si512(), _mm512_loadu_si512, _mm512_or_si512,
     _mm512_reduce_or_epi64(sum))

typedef struct {
    const uint8_t *buffer;
    uint64_t (*read)(const uint8_t *data, int64_t bytes);
} memory;

static void memory_task(void *context, int64_t task, int worker) {
    const memory *m = context;
    uint64_t sum = m->read(m->buffer + task * PASS_BYTES, PASS_BYTES);
    (void)worker;
    __asm__ volatile("" : : "r"(sum)); /* read, or the compiler would leave it out */
}

double ktl_peak_read(ktl_pool *pool, const uint8_t *buffer, int64_t bytes, double seconds) {
    memory m = {.buffer = buffer, .read = read_serial};
    int64_t tasks = bytes / PASS_BYTES;
    if (tasks < 1)
        return 0.0;
    if (usable(KTL_AVX2))
        m.read = read_avx2;
    if (usable(KTL_AVX512_VNNI))
        m.read = read_avx512;
    return median_rate(pool, memory_task, &m, tasks, (double)tasks * PASS_BYTES, seconds);
}
