#define _GNU_SOURCE
#include "threads.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define pause_cpu() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_cpu() __asm__ volatile("yield")
#else
#define pause_cpu() ((void)0)
#endif

/* Turns of the spin loop before a thread sleeps: some 50 us on current processors, longer than any step of a
 * decode leaves a thread idle, shorter than a wait for the drive. */
enum { SPINS = 2000, MOST_THREADS = 256 };

struct fomoe_team {
    int threads, started;
    pid_t process; /* the threads' */
    int spins; /* 0 when there are more threads than processors: spinning would hold up the one that works */
    pthread_t *thread;
    void (*work)(void *, int);
    void *argument;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation; /* of the barrier */
    _Alignas(64) atomic_int sleepers;   /* of the barrier */
    _Alignas(64) atomic_uint round;     /* of work */
    atomic_int stop;
    _Alignas(64) atomic_int idle;       /* threads asleep waiting for a round */
};

typedef struct {
    fomoe_team *team;
    int index;
} start_argument;

static void futex_wait(atomic_uint *word, unsigned expected) {
    syscall(SYS_futex, (unsigned *)word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake_all(atomic_uint *word) {
    syscall(SYS_futex, (unsigned *)word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Wait until *word differs from seen: spin, then sleep.  sleepers lets the waker skip the system call. */
static void wait_change(const fomoe_team *team, atomic_uint *word, unsigned seen, atomic_int *sleepers) {
    for (int i = 0; i < team->spins; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
        pause_cpu();
    }
    /* sequentially consistent against the waker's store to *word and load of *sleepers */
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(word) == seen) futex_wait(word, seen);
    atomic_fetch_sub(sleepers, 1);
}

void fomoe_team_barrier(fomoe_team *team) {
    if (team->threads == 1) return;
    unsigned generation = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->threads - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store(&team->generation, generation + 1);
        if (atomic_load(&team->sleepers)) futex_wake_all(&team->generation);
    } else {
        wait_change(team, &team->generation, generation, &team->sleepers);
    }
}

static void *thread_main(void *argument) {
    fomoe_team *team = ((start_argument *)argument)->team;
    int index = ((start_argument *)argument)->index;
    free(argument);
    for (unsigned round = 0;; round++) {
        wait_change(team, &team->round, round, &team->idle);
        if (atomic_load(&team->stop)) return NULL;
        team->work(team->argument, index);
        fomoe_team_barrier(team);
    }
}

fomoe_team *fomoe_team_new(int threads) {
    if (threads < 1 || threads > MOST_THREADS) return NULL;
    fomoe_team *team = aligned_alloc(64, (sizeof *team + 63) / 64 * 64);
    if (!team) return NULL;
    *team = (fomoe_team){.threads = threads, .started = 0, .process = getpid()};
    cpu_set_t cpus;
    int processors = sched_getaffinity(0, sizeof cpus, &cpus) ? threads : CPU_COUNT(&cpus);
    team->spins = threads <= processors ? SPINS : 0;
    team->thread = calloc(threads, sizeof *team->thread);
    if (!team->thread) goto fail;
    for (int i = 1; i < threads; i++) {
        start_argument *argument = malloc(sizeof *argument);
        if (!argument) goto fail;
        *argument = (start_argument){team, i};
        if (pthread_create(&team->thread[i], NULL, thread_main, argument)) {
            free(argument);
            goto fail;
        }
        team->started++;
    }
    return team;
fail:
    fomoe_team_free(team);
    return NULL;
}

void fomoe_team_free(fomoe_team *team) {
    if (!team) return;
    if (team->process != getpid()) team->started = 0; /* after a fork there are none to wait for */
    atomic_store(&team->stop, 1);
    atomic_fetch_add(&team->round, 1);
    futex_wake_all(&team->round);
    for (int i = 1; i <= team->started; i++) pthread_join(team->thread[i], NULL);
    free(team->thread);
    free(team);
}

int fomoe_team_size(const fomoe_team *team) { return team->threads; }

void fomoe_team_run(fomoe_team *team, void (*work)(void *, int), void *argument) {
    team->work = work;
    team->argument = argument;
    if (team->threads > 1) {
        atomic_fetch_add(&team->round, 1);
        if (atomic_load(&team->idle)) futex_wake_all(&team->round);
    }
    work(argument, 0);
    fomoe_team_barrier(team);
}
