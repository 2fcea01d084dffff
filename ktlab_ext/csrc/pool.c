/* The thread pool: contiguous ranges, then stealing; a short spin, then sleep (futex).
 *
 * A run is open while `gate` is odd. A worker that sees an open gate enters (`inside` + 1), looks
 * at the gate again, and takes tasks until none is left anywhere; the caller does the same, shuts
 * the gate, and waits for `inside` to fall to zero. So a run never waits for a worker that has not
 * begun (a sleeper that the kernel wakes late finds the gate shut), and a late worker never touches
 * the tasks of a run that is over. Gate and `inside` are sequentially consistent: either the caller
 * sees the worker inside, or the worker sees the gate shut.
 */
#define _GNU_SOURCE
#include "ktl.h"

#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 64, HUGE_PAGE = 2 << 20, SPIN_NS = 50000, PAUSES_PER_LOOK = 16, MOST_THREADS = 1024 };

/* Tasks of one worker not yet taken: [next, end). A line each, or takers would slow each other. */
typedef struct {
    _Alignas(LINE) _Atomic int64_t next;
    int64_t end;
} range;

typedef struct {
    void *data;
    size_t bytes;
} scratch;

typedef struct {
    ktl_pool *pool;
    int worker;
    pthread_t thread;
} seat;

struct ktl_pool {
    _Alignas(LINE) _Atomic uint32_t gate; /* odd while a run is open; workers sleep on it */
    _Atomic int sleepers;
    _Alignas(LINE) _Atomic uint32_t inside; /* workers in the run; the caller sleeps on it */
    _Atomic int caller_sleeps;

    _Alignas(LINE) ktl_task task; /* written while the gate is shut */
    void *context;
    unsigned mxcsr; /* the caller's rounding and denormal modes hold for all: same bits from each */
    int caller_cpu;
    _Atomic int stop;

    int threads, started, running, spin_ns, cpu_count;
    int *cpus;
    range *ranges;
    seat *seats;
    scratch *slots;
    pthread_mutex_t turn;
    _Atomic(pthread_t) owner; /* meaningful while depth > 0 */
    _Atomic int depth;
    ktl_pool *next; /* in the list of all pools */
};

/* Which pool's task this thread is in: a run from inside a task is done inline. */
static _Thread_local const ktl_pool *in_pool;
static _Thread_local int in_worker;

static int owned(const ktl_pool *pool) {
    return atomic_load(&pool->depth) > 0 && pthread_equal(atomic_load(&pool->owner), pthread_self());
}

/* ---- fork: the child has the caller's thread only ------------------------------------------------ */
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static ktl_pool *pools;

static void reset(ktl_pool *pool) {
    atomic_store(&pool->gate, 0);
    atomic_store(&pool->inside, 0);
    atomic_store(&pool->sleepers, 0);
    atomic_store(&pool->caller_sleeps, 0);
    atomic_store(&pool->depth, 0);
    pool->started = pool->running = 0;
    pthread_mutex_init(&pool->turn, NULL);
}

/* A fork waits for the runs of other threads: the child would find their scratch half replaced. Not
 * when it comes from inside a run, which would wait for itself. */
static int takes_turn(ktl_pool *pool) { return !in_pool && !owned(pool); }
static void before_fork(void) {
    pthread_mutex_lock(&pools_lock);
    for (ktl_pool *pool = pools; pool; pool = pool->next)
        if (takes_turn(pool)) pthread_mutex_lock(&pool->turn);
}
static void after_fork_parent(void) {
    for (ktl_pool *pool = pools; pool; pool = pool->next)
        if (takes_turn(pool)) pthread_mutex_unlock(&pool->turn);
    pthread_mutex_unlock(&pools_lock);
}
static void after_fork_child(void) {
    pthread_mutex_init(&pools_lock, NULL);
    for (ktl_pool *pool = pools; pool; pool = pool->next)
        reset(pool);
    in_pool = NULL;
}
static void watch_forks(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* ---- waiting --------------------------------------------------------------------------------------- */
static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void futex_wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Spins until *word & mask differs from `value`, at most spin_ns; returns whether it does. */
static int spin(_Atomic uint32_t *word, uint32_t mask, uint32_t value, int spin_ns) {
    int64_t end = spin_ns ? now_ns() + spin_ns : 0;
    do {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) & mask) != value)
                return 1;
            _mm_pause();
        }
    } while (spin_ns && now_ns() < end);
    return 0;
}

/* ---- work ------------------------------------------------------------------------------------------ */
static void work(ktl_pool *pool, int worker) {
    const ktl_pool *outer = in_pool;
    int outer_worker = in_worker;
    in_pool = pool;
    in_worker = worker;
    for (int i = 0; i < pool->threads; i++) { /* own range first, then the others in a circle */
        int victim = worker + i;
        range *r = &pool->ranges[victim < pool->threads ? victim : victim - pool->threads];
        while (atomic_load_explicit(&r->next, memory_order_relaxed) < r->end) {
            int64_t task = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed);
            if (task < r->end)
                pool->task(pool->context, task, worker);
        }
    }
    in_pool = outer;
    in_worker = outer_worker;
}

static void leave(ktl_pool *pool) {
    if (atomic_fetch_sub(&pool->inside, 1) == 1 && atomic_load(&pool->caller_sleeps))
        futex_wake(&pool->inside, 1);
}

/* A busy kernel may wake a worker on the caller's own cpu, where one of them then waits for the
 * other (16 tasks of 10 us on 2 threads beside two compilers: 218 us instead of 97). The worker
 * moves to the other cpus, and stays there until the caller comes by again. */
static void step_aside(const ktl_pool *pool, cpu_set_t home) {
    int cpu = sched_getcpu();
    if (cpu != pool->caller_cpu || cpu < 0 || cpu >= CPU_SETSIZE || !pool->spin_ns)
        return;
    CPU_CLR(cpu, &home);
    if (CPU_COUNT(&home) > 0)
        sched_setaffinity(0, sizeof home, &home);
}

static void *worker_main(void *argument) {
    seat *s = argument;
    ktl_pool *pool = s->pool;
    cpu_set_t home;
    CPU_ZERO(&home);
    for (int i = 0; i < pool->cpu_count; i++)
        CPU_SET(pool->cpus[i], &home);
    if (pool->cpu_count)
        sched_setaffinity(0, sizeof home, &home);
    sched_getaffinity(0, sizeof home, &home);
    uint32_t seen = 0; /* the last gate that this worker is done with */
    for (;;) {
        uint32_t gate = atomic_load(&pool->gate); /* before stop: who sets stop moves it after */
        if (atomic_load(&pool->stop))
            return NULL;
        if (gate == seen || !(gate & 1)) {
            if (spin(&pool->gate, ~0u, gate, pool->spin_ns))
                continue;
            atomic_fetch_add(&pool->sleepers, 1);
            futex_wait(&pool->gate, gate); /* returns at once if the gate has moved */
            atomic_fetch_sub(&pool->sleepers, 1);
            continue;
        }
        atomic_fetch_add(&pool->inside, 1);
        gate = atomic_load(&pool->gate);
        if (gate & 1) {
            step_aside(pool, home);
            if (_mm_getcsr() != pool->mxcsr)
                _mm_setcsr(pool->mxcsr);
            work(pool, s->worker);
            seen = gate;
        }
        leave(pool);
    }
}

/* Starts the workers that are missing. Too few (a limit of the system) is no error: stealing does
 * the work of those who are not there. */
static void start(ktl_pool *pool) {
    pool->started = 1;
    sigset_t all, before; /* signals are the caller's business: Python handles them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int w = 1; w < pool->threads; w++) {
        pool->seats[w] = (seat){.pool = pool, .worker = w};
        if (pthread_create(&pool->seats[w].thread, NULL, worker_main, &pool->seats[w]) != 0)
            break;
        pool->running = w;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}


static void run_inline(ktl_task task, void *context, int64_t tasks, int worker) {
    for (int64_t i = 0; i < tasks; i++)
        task(context, i, worker);
}

void ktl_pool_run(ktl_pool *pool, ktl_task task, void *context, int64_t tasks) {
    if (in_pool == pool) {
        run_inline(task, context, tasks, in_worker);
        return;
    }
    int mine = owned(pool);
    if (!mine)
        ktl_pool_lock(pool);
    if (pool->threads == 1 || tasks <= 1) {
        const ktl_pool *outer = in_pool;
        int outer_worker = in_worker;
        in_pool = pool;
        in_worker = 0;
        run_inline(task, context, tasks, 0);
        in_pool = outer;
        in_worker = outer_worker;
    } else {
        if (!pool->started)
            start(pool);
        pool->task = task;
        pool->context = context;
        pool->mxcsr = _mm_getcsr();
        pool->caller_cpu = sched_getcpu();
        for (int w = 0; w < pool->threads; w++) {
            int64_t each = tasks / pool->threads, extra = tasks % pool->threads;
            int64_t begin = each * w + (w < extra ? w : extra);
            pool->ranges[w].end = begin + each + (w < extra);
            atomic_store_explicit(&pool->ranges[w].next, begin, memory_order_relaxed);
        }
        atomic_fetch_add(&pool->gate, 1);
        if (atomic_load(&pool->sleepers) > 0)
            futex_wake(&pool->gate, tasks - 1 < pool->threads ? (int)tasks - 1 : pool->threads);
        work(pool, 0);
        atomic_fetch_add(&pool->gate, 1);
        uint32_t left;
        while ((left = atomic_load(&pool->inside)) != 0) {
            if (spin(&pool->inside, ~0u, left, pool->spin_ns))
                continue;
            atomic_store(&pool->caller_sleeps, 1);
            left = atomic_load(&pool->inside);
            if (left != 0)
                futex_wait(&pool->inside, left);
            atomic_store(&pool->caller_sleeps, 0);
        }
    }
    if (!mine)
        ktl_pool_unlock(pool);
}

/* ---- turns and scratch ----------------------------------------------------------------------------- */
void ktl_pool_lock(ktl_pool *pool) {
    if (!owned(pool)) {
        pthread_mutex_lock(&pool->turn);
        atomic_store(&pool->owner, pthread_self());
    }
    atomic_fetch_add(&pool->depth, 1);
}

void ktl_pool_unlock(ktl_pool *pool) {
    if (atomic_fetch_sub(&pool->depth, 1) == 1)
        pthread_mutex_unlock(&pool->turn);
}

void *ktl_pool_scratch(ktl_pool *pool, int slot, size_t bytes) {
    if (slot < 0 || slot >= pool->threads + KTL_SHARED)
        return NULL;
    scratch *s = &pool->slots[slot];
    if (s->data && s->bytes >= bytes)
        return s->data;
    size_t align = bytes >= HUGE_PAGE ? HUGE_PAGE : LINE;
    if (bytes > SIZE_MAX - align)
        return NULL;
    size_t room = bytes ? (bytes + align - 1) / align * align : align;
    void *data = aligned_alloc(align, room);
    if (!data)
        return NULL;
    if (align == HUGE_PAGE) /* fewer TLB misses; a refusal costs nothing */
        madvise(data, room, MADV_HUGEPAGE);
    free(s->data);
    *s = (scratch){.data = data, .bytes = room};
    return data;
}

/* ---- life ------------------------------------------------------------------------------------------ */
static int allowed_cpus(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

ktl_pool *ktl_pool_new(int threads, const int *cpus, int cpu_count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads < 1 || threads > MOST_THREADS || cpu_count < 0 || (cpus && cpu_count == 0))
        return NULL;
    for (int i = 0; cpus && i < cpu_count; i++)
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE || cpus[i] >= sysconf(_SC_NPROCESSORS_CONF))
            return NULL;
    ktl_pool *pool = aligned_alloc(LINE, sizeof *pool);
    if (!pool)
        return NULL;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->cpu_count = cpus ? cpu_count : 0;
    pool->cpus = calloc((size_t)pool->cpu_count + 1, sizeof *pool->cpus);
    pool->ranges = aligned_alloc(LINE, (size_t)threads * sizeof *pool->ranges);
    pool->seats = calloc((size_t)threads, sizeof *pool->seats);
    pool->slots = calloc((size_t)threads + KTL_SHARED, sizeof *pool->slots);
    pthread_mutex_init(&pool->turn, NULL);
    if (!pool->cpus || !pool->ranges || !pool->seats || !pool->slots) {
        ktl_pool_free(pool);
        return NULL;
    }
    if (pool->cpu_count)
        memcpy(pool->cpus, cpus, (size_t)cpu_count * sizeof *cpus);
    memset(pool->ranges, 0, (size_t)threads * sizeof *pool->ranges);
    /* With more threads than cpus a spin would take the cpu from the thread that is waited for. */
    int room = pool->cpu_count ? pool->cpu_count : allowed_cpus();
    pool->spin_ns = threads <= room ? SPIN_NS : 0;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pools_lock);
    pool->next = pools;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

void ktl_pool_free(ktl_pool *pool) {
    if (!pool)
        return;
    pthread_mutex_lock(&pools_lock);
    for (ktl_pool **p = &pools; *p; p = &(*p)->next)
        if (*p == pool) {
            *p = pool->next;
            break;
        }
    pthread_mutex_unlock(&pools_lock);
    if (pool->running) {
        atomic_store(&pool->stop, 1);
        atomic_fetch_add(&pool->gate, 2); /* moves, and stays shut */
        futex_wake(&pool->gate, pool->threads);
        for (int w = 1; w <= pool->running; w++)
            pthread_join(pool->seats[w].thread, NULL);
    }
    for (int i = 0; pool->slots && i < pool->threads + KTL_SHARED; i++)
        free(pool->slots[i].data);
    pthread_mutex_destroy(&pool->turn);
    free(pool->cpus);
    free(pool->ranges);
    free(pool->seats);
    free(pool->slots);
    free(pool);
}

int ktl_pool_threads(const ktl_pool *pool) { return pool->threads; }
