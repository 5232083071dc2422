/* The routed experts of all layers: where each lies on disk, the DRAM slots it is read into, and the
 * order in which a batch's experts are computed (resident ones first, misses as they land). */
#ifndef FOMOE_EXPERTS_H
#define FOMOE_EXPERTS_H

#include <stdint.h>

#include "experts/car.h"
#include "experts/expert_reads.h"
#include "experts/recall.h"
#include "experts/residency.h"
#include "math/dot.h"
#include "read/watch.h"

typedef struct {
    int32_t experts;                     /* 0: not a layer of experts */
    const fomoe_type *type[FOMOE_PARTS]; /* of gate, up, down */
    int64_t row_bytes[FOMOE_PARTS];
    const fomoe_extent *extents;   /* [experts][FOMOE_PARTS] */
    const int32_t *extent_count;   /* [experts] */
    const uint32_t *part_offset;   /* [experts][FOMOE_PARTS], in the slot */
    uint8_t *pool;                 /* slots * slot_bytes */
    int64_t slot_bytes;
    int32_t slots;
} fomoe_expert_layer;

typedef struct {
    uint64_t nvme_reads;  /* experts read */
    uint64_t nvme_bytes;
    uint64_t stall_ns;    /* time compute waited for a read */
    uint64_t groups;      /* rounds of expert computation */
    uint64_t prefetches;  /* experts read ahead by lookahead, counted in nvme_reads as well */
    uint64_t prefetch_bytes;
    uint64_t useful, late; /* of them, those that were then picked; and whose read had not ended by then */
    uint64_t wasted_bytes; /* of the others */
} fomoe_expert_counters;

typedef struct fomoe_experts fomoe_experts;

typedef struct {
    int32_t layers;
    int32_t columns; /* of the residual stream */
    int32_t hidden;  /* of an expert */
    int32_t used;    /* experts a token */
    int32_t batch;   /* tokens at most */
    int32_t float_activations;
} fomoe_experts_shape;

/* layer is copied; what it points to stays the caller's.  NULL when memory runs out. */
fomoe_experts *fomoe_experts_new(const fomoe_experts_shape *shape, const fomoe_expert_layer *layer,
                                 fomoe_residency *residency, fomoe_reader *reader);
void fomoe_experts_free(fomoe_experts *);
/* Decisions of steps that ask for them (fomoe_run.substitute) follow this rule; off at first. */
void fomoe_experts_set_car(fomoe_experts *, const fomoe_car *);
/* Once, before the first run: `each` buffers for each size of slots that there is, one size after the other in the
 * order of the layers, for experts that are read ahead.  -1 when memory runs out. */
int fomoe_experts_stage(fomoe_experts *, uint8_t *pool, int each);
/* Read so many of the experts ahead that the next layer's router would pick now; 0 (at first): none.  Changes no
 * placement and no count but the reads'. */
void fomoe_experts_set_lookahead(fomoe_experts *, int ranks);
const fomoe_recall *fomoe_experts_recall(const fomoe_experts *); /* [layers] */
/* Bytes that fomoe_experts_new allocates for a batch's activations. */
int64_t fomoe_experts_workspace_bytes(const fomoe_experts_shape *shape);
const fomoe_expert_counters *fomoe_experts_count(const fomoe_experts *);
/* [layers][most experts of a layer]: how often the router picked each, since the start */
const int64_t *fomoe_experts_picks(const fomoe_experts *);
/* Read these experts of a layer into free slots (warm start), hottest first.  0, or a negative errno: -ECANCELED when
 * the watch (or NULL) ended it. */
int fomoe_experts_warm(fomoe_experts *, int layer, const int32_t *experts, const double *scores, int count,
                       fomoe_watch *);
/* After a run that failed: wait for what is in flight (its targets are slots), forget what was being read. */
void fomoe_experts_abandon(fomoe_experts *);
/* Layer and expert of the last failed read. */
void fomoe_experts_failure(const fomoe_experts *, int *layer, int *expert);

#endif
