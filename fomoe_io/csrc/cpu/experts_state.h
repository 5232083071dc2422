/* What experts.c (which experts, from where, in which order) and experts_compute.c (their arithmetic) share. */
#ifndef FOMOE_EXPERTS_STATE_H
#define FOMOE_EXPERTS_STATE_H

#include "experts.h"
#include "experts/expert_plan.h"
#include "experts/offers.h"
#include "experts/owned.h"
#include "program.h"

struct fomoe_experts {
    fomoe_experts_shape shape;
    fomoe_expert_layer *layer;
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_owned owned;  /* all arrays */
    int32_t **physical; /* [layers * FOMOE_TIERS]: tier slot -> slot of the layer's pool */
    int max_experts;
    int first_layer;
    fomoe_expert_counters counters;
    int64_t *picks;
    int failed_layer, failed_expert;
    int open_layer; /* whose reads are in flight and whose slots are held; -1: none */
    fomoe_car car;
    fomoe_offers offers;
    int lookahead, rest;                       /* ranks read ahead; tokens for which that pauses */
    uint64_t judged_prefetches, judged_useful; /* as of the last time it was asked whether it pays */

    /* The batch's experts of the layer at work: resident ones, then misses.  Thread 0 writes, between barriers. */
    fomoe_expert_plan plan;
    /* 0 <= released <= computed <= submitted <= plan.count, and grouped_hits <= plan.hits */
    int submitted;    /* have a slot */
    int computed;     /* were computed */
    int released;     /* gave their slots to others, or may */
    int grouped_hits; /* resident ones that were handed to a group */
    int ready_count;  /* have landed, and wait for one */
    int error;
    int32_t *left;                  /* while members are listed: pairs of each expert that are not */
    int32_t *replaced;              /* of a single token: true picks that another expert stands in for, or -1 */
    int32_t *first, *members;       /* members[first[i] .. first[i+1]): token * used + rank */
    const uint8_t **slot;           /* where each expert's bytes are */
    int8_t *source, *tier;          /* where each was found, and where it is computed from */
    int8_t *done;                   /* computed */
    int8_t *found;                  /* of the trace: source of every member */
    int32_t *reads_left;
    int32_t *ready; /* read, not yet computed */
    int32_t *group; /* to be computed together */
    int group_count;
    int32_t *guesses; /* of lookahead, and what its routing gives them */
    float *guess_weights;
    fomoe_placement *placements;
    fomoe_move *moves;
    fomoe_read *reads;
    _Atomic int64_t next_up, next_activation, next_down;

    /* one row a (token, rank) */
    float *gate, *up, *down;
    uint8_t *activation;
    int64_t activation_bytes;
};

/* The experts of e->group for all tokens that want them, up to the rows of e->down.  All threads call it; it ends at a
 * barrier. */
void fomoe_experts_compute_group(fomoe_experts *, const fomoe_step *, fomoe_run *, int thread);

#endif
