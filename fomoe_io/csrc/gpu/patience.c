#include "patience.h"

#include <sched.h>
#include <time.h>

enum { ROUNDS_BETWEEN_CLOCKS = 32, SPIN_NS = 20000000, NAP_NS = 50000 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

int fomoe_look_again(fomoe_patience *p, fomoe_wait *w) {
    sched_yield();
    if (w->since_ns && ++w->rounds % ROUNDS_BETWEEN_CLOCKS) return 1;
    uint64_t now = now_ns();
    if (!w->since_ns) w->since_ns = now;
    if (!p->is_interrupted && fomoe_watch_ended(p->watch)) p->is_interrupted = 1;
    if (now - w->since_ns >= (p->is_interrupted ? p->interrupted_limit_ns : p->limit_ns)) return 0;
    /* who has waited so long is not held up by a nap, and others want the processor */
    if (now - w->since_ns >= SPIN_NS) {
        w->rounds = ROUNDS_BETWEEN_CLOCKS - 1;
        nanosleep(&(struct timespec){0, NAP_NS}, 0);
    }
    return 1;
}
