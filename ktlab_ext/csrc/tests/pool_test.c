/* The pool: each task once, whoever calls, from however many threads; stealing, nesting, fork. */
#include "../ktl.h"
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_TASKS = 300, RUNS = 400, CALLERS = 3 };

typedef struct {
    ktl_pool *pool;
    _Atomic int done[MOST_TASKS];
    _Atomic int strange_worker;
    int nested;
} tally;

static void count(void *context, int64_t task, int worker) {
    tally *t = context;
    atomic_fetch_add(&t->done[task], 1);
    if (worker < 0 || worker >= ktl_pool_threads(t->pool))
        atomic_store(&t->strange_worker, 1);
    memset(ktl_pool_scratch(t->pool, worker, 1000), worker, 1000);
    if (t->nested && task < MOST_TASKS / 2) {
        tally inner = {.pool = t->pool};
        ktl_pool_run(t->pool, count, &inner, 3);
        CHECK(inner.done[2] == 1, "a run inside a task did %d", inner.done[2]);
    }
}

static void run_and_check(ktl_pool *pool, int64_t tasks, int nested) {
    tally t = {.pool = pool, .nested = nested};
    ktl_pool_run(pool, count, &t, tasks);
    for (int64_t i = 0; i < MOST_TASKS; i++)
        CHECK(t.done[i] == (i < tasks), "task %d of %d was done %d times", (int)i, (int)tasks,
              t.done[i]);
    CHECK(!t.strange_worker, "a worker number out of range");
}

static void *call_often(void *pool) {
    dice d = {(uintptr_t)&d | 1};
    for (int i = 0; i < RUNS; i++)
        run_and_check(pool, below(&d, MOST_TASKS), i % 8 == 0);
    return NULL;
}

static void several_callers(ktl_pool *pool) {
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        CHECK(pthread_create(&threads[i], NULL, call_often, pool) == 0, "no thread");
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
}

static void wait_a_bit(void *context, int64_t task, int worker) {
    (void)worker;
    usleep(task == 0 ? 20000 : 100);
    atomic_fetch_add((_Atomic int *)context, 1);
}

/* Sleeping workers wake, and the caller sleeps while a worker is late. */
static void sleepers(ktl_pool *pool) {
    for (int i = 0; i < 10; i++) {
        _Atomic int done = 0;
        usleep(2000);
        ktl_pool_run(pool, wait_a_bit, &done, 8);
        CHECK(done == 8, "%d of 8 tasks were done", done);
    }
}

typedef struct {
    int64_t long_tasks; /* the first ones: all in worker 0's range */
    _Atomic int by_worker[64];
} skew;

static void long_first(void *context, int64_t task, int worker) {
    skew *s = context;
    if (task >= s->long_tasks)
        return;
    usleep(10000);
    atomic_fetch_add(&s->by_worker[worker], 1);
}

/* Who has nothing left takes from who has too much. */
static void stealing(ktl_pool *pool) {
    skew s = {.long_tasks = 12};
    ktl_pool_run(pool, long_first, &s, s.long_tasks * ktl_pool_threads(pool));
    int first = s.by_worker[0];
    CHECK(ktl_pool_threads(pool) == 1 ? first == 12 : first <= 9, "worker 0 did %d of 12 itself", first);
}

static void nothing(void *context, int64_t task, int worker) { (void)context, (void)task, (void)worker; }

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double latency_us(ktl_pool *pool, int pause_us) {
    enum { REPEATS = 301 };
    double took[REPEATS];
    for (int i = 0; i < REPEATS; i++) {
        struct timespec a, b;
        if (pause_us)
            usleep((useconds_t)pause_us);
        clock_gettime(CLOCK_MONOTONIC, &a);
        ktl_pool_run(pool, nothing, NULL, 16);
        clock_gettime(CLOCK_MONOTONIC, &b);
        took[i] = (double)(b.tv_sec - a.tv_sec) * 1e6 + (double)(b.tv_nsec - a.tv_nsec) * 1e-3;
    }
    qsort(took, REPEATS, sizeof *took, ascending);
    return took[REPEATS / 2];
}

static void scratch(ktl_pool *pool) {
    int slots = ktl_pool_threads(pool) + KTL_SHARED;
    ktl_pool_lock(pool);
    ktl_pool_lock(pool); /* the same thread again */
    for (int slot = 0; slot < slots; slot++) {
        uint8_t *small = ktl_pool_scratch(pool, slot, 10);
        CHECK(small && (uintptr_t)small % 64 == 0, "scratch at %p", (void *)small);
        memset(small, 1, 10);
        uint8_t *large = ktl_pool_scratch(pool, slot, 3 << 20);
        CHECK(large && (uintptr_t)large % 64 == 0, "scratch at %p", (void *)large);
        memset(large, 1, 3 << 20);
        CHECK(ktl_pool_scratch(pool, slot, 100) == large, "scratch that shrank");
    }
    CHECK(!ktl_pool_scratch(pool, slots, 10) && !ktl_pool_scratch(pool, -1, 10), "no such slot");
    CHECK(!ktl_pool_scratch(pool, 0, SIZE_MAX), "more memory than there is");
    run_and_check(pool, 20, 0);
    ktl_pool_unlock(pool);
    ktl_pool_unlock(pool);
}

/* The child has no workers; it starts its own, also while another thread of the parent runs. That
 * thread neither starts nor ends meanwhile: the sanitizers' own locks do not survive a fork then. */
typedef struct {
    ktl_pool *pool;
    _Atomic int runs, stop;
} busy_caller;

static void *call_until_stopped(void *context) {
    busy_caller *b = context;
    for (; !b->stop; b->runs++)
        run_and_check(b->pool, b->runs % MOST_TASKS, b->runs % 8 == 0);
    return NULL;
}

static void forks(ktl_pool *pool) {
    busy_caller caller = {.pool = pool};
    pthread_t busy;
    CHECK(pthread_create(&busy, NULL, call_until_stopped, &caller) == 0, "no thread");
    while (!caller.runs)
        usleep(100);
    for (int i = 0; i < 10; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(20);
            for (int j = 0; j < 20; j++)
                run_and_check(pool, 50, 1);
            ktl_pool_free(pool);
            _exit(0);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child && status == 0, "a child ended with %d", status);
        run_and_check(pool, 50, 0);
    }
    caller.stop = 1;
    pthread_join(busy, NULL);
}

int main(int argc, char **argv) {
    int with_fork = argc < 2 || strcmp(argv[1], "nofork") != 0;
    const int cpus[] = {0}, none[] = {-1}, missing[] = {100000};
    for (int threads = 1; threads <= 9; threads += threads < 4 ? 1 : 5) {
        ktl_pool *pool = ktl_pool_new(threads, threads == 3 ? cpus : NULL, 1);
        CHECK(pool && ktl_pool_threads(pool) == threads, "no pool of %d", threads);
        for (int tasks = 0; tasks < 20; tasks++)
            run_and_check(pool, tasks, 0);
        several_callers(pool);
        sleepers(pool);
        stealing(pool);
        scratch(pool);
        if (with_fork)
            forks(pool);
        ktl_pool_free(pool);
    }
    CHECK(!ktl_pool_new(0, NULL, 0) && !ktl_pool_new(2, none, 1) && !ktl_pool_new(2, missing, 1),
          "pools that cannot be");
    for (int i = 0; i < 100; i++) { /* born and gone, with and without work */
        ktl_pool *pool = ktl_pool_new(3, NULL, 0);
        if (i % 2)
            run_and_check(pool, 7, 0);
        ktl_pool_free(pool);
    }
    ktl_pool *two = ktl_pool_new(2, NULL, 0);
    printf("pool: ok; an empty run on 2 threads takes %.1f us, %.1f us when they sleep\n",
           latency_us(two, 0), latency_us(two, 1000));
    ktl_pool_free(two);
    return 0;
}
