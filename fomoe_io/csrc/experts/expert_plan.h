/* Which experts of a layer a batch wants: the one list that the CPU engine, the GPU engine's host and the replay of a
 * trace make, in one order, so that all of them move the same experts and count the same.
 *
 *     fomoe_plan_begin, fomoe_plan_add for every (token, rank) in order, fomoe_plan_partition, fomoe_plan_end
 */
#ifndef FOMOE_EXPERT_PLAN_H
#define FOMOE_EXPERT_PLAN_H

#include <stdint.h>

#include "residency.h"

typedef struct {
    int count;         /* distinct experts */
    int hits;          /* after the partition: so many of the first are resident */
    int32_t *ids;      /* in order of first appearance; after the partition resident ones first */
    int32_t *pairs;    /* (token, rank) pairs that want each */
    int32_t *requests; /* of them, those whose router picked it: what the residency counts */
    int32_t *index;    /* id -> place in ids, -1: not wanted.  All -1 outside of begin .. end */
    int32_t *missing;  /* scratch: 3 for each expert */
} fomoe_expert_plan;

/* For layers of up to so many experts.  0, or -1 when memory runs out. */
int fomoe_plan_new(fomoe_expert_plan *, int experts);
void fomoe_plan_free(fomoe_expert_plan *);

static inline void fomoe_plan_begin(fomoe_expert_plan *p) { p->count = p->hits = 0; }

/* is_pick: its router chose it; otherwise it stands in for another. */
static inline void fomoe_plan_add(fomoe_expert_plan *p, int32_t id, int is_pick) {
    int32_t i = p->index[id];
    if (i < 0) {
        i = p->index[id] = p->count++;
        p->ids[i] = id;
        p->pairs[i] = p->requests[i] = 0;
    }
    p->pairs[i]++;
    p->requests[i] += is_pick;
}

/* Resident ones to the front, both halves keeping their order. */
void fomoe_plan_partition(fomoe_expert_plan *, const fomoe_residency *, int layer);
void fomoe_plan_end(fomoe_expert_plan *);

#endif
