/* Whether work that may take long shall end before its time: another thread has set the stop word, or whoever is asked
 * now and then (Python, whose signal handlers run only when somebody lets them) says so. */
#ifndef FOMOE_WATCH_H
#define FOMOE_WATCH_H

#include <stdint.h>
#include <time.h>

enum { FOMOE_POLL_MS = 50 };

typedef struct {
    int32_t stop;           /* not 0: end; written with __atomic_store_n by any thread */
    int (*poll)(void *);    /* not 0: end; called by the thread that does the work.  NULL: nobody is asked */
    void *argument;
    int64_t polled_ms;
    int32_t done, steps;    /* how far the run is, for the thread that does the work; 0 of 0 before it */
} fomoe_watch;

/* What the work's result is then: -ECANCELED.  Cheap enough for every turn of a loop of microseconds. */
static inline int fomoe_watch_ended(fomoe_watch *watch) {
    if (!watch) return 0;
    if (__atomic_load_n(&watch->stop, __ATOMIC_RELAXED)) return 1;
    if (!watch->poll) return 0;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    int64_t now = t.tv_sec * 1000LL + t.tv_nsec / 1000000;
    if (now - watch->polled_ms < FOMOE_POLL_MS) return 0;
    watch->polled_ms = now;
    return watch->poll(watch->argument);
}

#endif
