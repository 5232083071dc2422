/* A trace of routing: what every token's router picked, what was computed instead, and where it was found.
 * Python writes the file's header and says what the records mean (fomoe_io/trace.py); this side appends
 * records from the run's threads through one buffer.  Nothing is allocated after creation. */
#ifndef FOMOE_TRACE_H
#define FOMOE_TRACE_H

#include <stdint.h>

enum { FOMOE_TRACE_BATCH = 1, FOMOE_TRACE_SEED = 2 };

/* Before every record, little-endian.
 * BATCH: count tokens; then weights f32 [count][used], picks u16, chosen u16, found i8, all [count][used].
 * SEED: count experts of a warm start, hottest first; then scores f64 [count], experts u16 [count]. */
typedef struct {
    uint16_t kind;
    uint16_t layer;
    uint32_t count;
} fomoe_trace_head;

typedef struct fomoe_trace fomoe_trace;

/* Records go to the end of an open file, which stays the caller's.  batch: tokens at most; used: experts a token;
 * most: experts of a layer.  NULL when memory runs out. */
fomoe_trace *fomoe_trace_new(int file, int batch, int used, int most);
/* One that keeps its records, up to so many a batch of so many tokens, until another takes them. */
fomoe_trace *fomoe_trace_held(int records, int batch, int used);
void fomoe_trace_free(fomoe_trace *);
/* Take what each of the held ones has: of every batch the layers in ascending order, whoever computed them. */
void fomoe_trace_take(fomoe_trace *, fomoe_trace *const *held, int count);
/* The router's picks of one token of the batch; several threads may call it, each for tokens of its own. */
void fomoe_trace_picks(fomoe_trace *, int token, const int32_t *experts, const float *weights);
/* The record of a layer: the picks that were given, and for every token and rank the expert that was computed
 * and its source (enum of residency.h).  chosen_stride in bytes. */
void fomoe_trace_batch(fomoe_trace *, int layer, int tokens, const uint8_t *chosen, int64_t chosen_stride,
                       const int8_t *found);
void fomoe_trace_seeds(fomoe_trace *, int layer, int count, const int32_t *experts, const double *scores);
/* Write what is buffered.  0, or the negative errno of the first write that failed, now or earlier. */
int fomoe_trace_flush(fomoe_trace *);

#endif
