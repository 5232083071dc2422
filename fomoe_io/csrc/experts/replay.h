/* A routing trace played through the residency bookkeeping, in the very calls that csrc/cpu/experts.c makes, and
 * Belady's bound of the same trace.  For the simulator (fomoe_io/simulator.py). */
#ifndef FOMOE_REPLAY_H
#define FOMOE_REPLAY_H

#include <stdint.h>

#include "residency.h"

/* One layer's batches, one after another. */
typedef struct {
    int32_t layer, experts, slots, used;
    const int64_t *tokens;  /* [batches]; 0: the layer has no part in the batch */
    const uint16_t *picks;  /* [all tokens][used]: the router's */
    const uint16_t *chosen; /* the same shape: what was computed; equal to the picks when routing is exact */
    int8_t *found;          /* out, the same shape: source of each, see fomoe_io/trace.py */
} fomoe_replay_layer;

/* batch_tokens: [batches], how far each moves the clock.  0, or -1 when memory runs out. */
int fomoe_replay(fomoe_residency *, const fomoe_replay_layer *layers, int count, int64_t batches,
                 const int64_t *batch_tokens);

/* Fewest misses of any policy that keeps what a batch needs until the batch is done, for one layer.  Who is needed last
 * goes first (Belady 1966).  found: 1 for a hit, 2 for a miss. */
int fomoe_replay_belady(const fomoe_replay_layer *, int64_t batches);

#endif
