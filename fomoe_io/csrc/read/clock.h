/* The clock of all counters. */
#ifndef FOMOE_CLOCK_H
#define FOMOE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t fomoe_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

#endif
