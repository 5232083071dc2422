/* The load of `fomoe-bench io`: keeps a reader at a depth with reads from a plan, and counts latencies. */
#ifndef FOMOE_IO_LOAD_H
#define FOMOE_IO_LOAD_H

#include "reader.h"

enum {
    /* Latencies in ns, log-linear: 64 steps an octave, 1.6 % apart at most. */
    FOMOE_LATENCY_STEP_BITS = 6,
    FOMOE_LATENCY_BINS = (64 - FOMOE_LATENCY_STEP_BITS + 1) << FOMOE_LATENCY_STEP_BITS,
    FOMOE_MOST_LOAD_DEPTH = 4096,
};

typedef struct {
    uint64_t offset;
    uint32_t bytes;
    uint32_t file;
} fomoe_planned_read;

typedef struct {
    const fomoe_planned_read *plan; /* walked from the start, again and again */
    uint64_t plan_count;
    uint64_t most_reads;   /* stop after so many; 0: no limit */
    uint64_t duration_ns;  /* stop after so long; 0: no limit */
    uint64_t ramp_ns;      /* before that nothing is counted */
    uint8_t *buffers;      /* depth of them */
    uint64_t buffer_bytes; /* each: no read is larger */
    int depth;
} fomoe_load;

typedef struct {
    uint64_t min_ns, max_ns;
    double sum_ns, square_sum;
} fomoe_span_sum;

/* Written by the load, read by a thread that shows progress. */
typedef struct {
    _Atomic uint64_t reads, bytes;
    _Atomic int stop; /* set from outside */
    uint64_t issued;  /* reads started, those of the ramp included */
    uint64_t started_ns, ended_ns;
    uint64_t submit_ns, submit_calls; /* in submit(); reads start several at a time */
    uint64_t latency_min_ns, latency_max_ns; /* submitted to completed (fio's clat): a read that the kernel finished */
    double latency_sum_ns, latency_square_sum; /* inside the call that submitted it was complete before that returned */
    uint64_t latency[FOMOE_LATENCY_BINS];
    fomoe_span_sum submission, total; /* the call that submitted it (slat), and from its begin to the end (lat) */
    uint64_t in_flight[FOMOE_MOST_LOAD_DEPTH + 1]; /* reads in flight when a read was started, itself included */
} fomoe_load_counts;

/* 0, or the negative errno of the first read that failed; nothing is in flight afterwards. */
int fomoe_load_run(const fomoe_reader *, const fomoe_load *, fomoe_load_counts *);

#endif
