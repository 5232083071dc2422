/* What experts.c (which experts, from where, in which order) and experts_compute.c (their arithmetic) share. */
#ifndef FOMOE_EXPERTS_STATE_H
#define FOMOE_EXPERTS_STATE_H

#include "experts.h"
#include "experts/expert_plan.h"
#include "experts/offers.h"
#include "experts/owned.h"
#include "program.h"

/* Tags of reads ahead; those of offers are FOMOE_OFFER_TAG. */
#define FOMOE_AHEAD_TAG ((uint64_t)1 << 41)

/* A buffer for an expert that is read before anybody asks for it. */
typedef struct {
    int32_t layer, expert; /* layer -1: it holds nothing */
    int32_t reads, left;   /* in all, and not completed */
    int32_t waiter;        /* which of the batch's experts it has become, while reads are left; -1: none */
    int32_t has_failed, is_expired; /* is_expired: nobody will take it */
    uint32_t read_bytes[FOMOE_PARTS];
    uint64_t bytes; /* that have come */
    uint8_t *place;
    int64_t slot_bytes; /* which layers' slots it may be exchanged with */
} fomoe_staged;

struct fomoe_experts {
    fomoe_experts_shape shape;
    fomoe_expert_layer *layer;
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_owned owned;  /* all arrays */
    uint8_t ***physical; /* [layers * FOMOE_TIERS]: tier slot -> where its bytes are */
    int max_experts;
    int first_layer;
    fomoe_expert_counters counters;
    int64_t *picks;
    int failed_layer, failed_expert;
    int open_layer; /* whose reads are in flight and whose slots are held; -1: none */
    fomoe_car car;
    fomoe_offers offers;
    fomoe_staged *staged;
    int staged_count;
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
    int guess_count, guessed_layer; /* how many guesses there are, and of which layer; -1: none */
    fomoe_recall *recall;           /* [layers] */
    int32_t *guesses; /* of lookahead, and what its routing gives them */
    float *guess_weights;
    int32_t *guess_replaced;
    fomoe_placement *placements;
    fomoe_move *moves;
    fomoe_read *reads;
    _Atomic int64_t next_up, next_activation, next_down;

    /* one row a (token, rank) */
    float *gate, *up, *down;
    uint8_t *activation;
    int64_t activation_bytes;
};

/* ---- experts_ahead.c ---- */

/* Does it pay?  Where less than half of what it reads is wanted, it pauses for a while.  Once a run. */
void fomoe_ahead_review(fomoe_experts *);
/* Begin to read an expert that the layer may want, if it is nowhere and there is a buffer. */
void fomoe_ahead_begin(fomoe_experts *, int layer, int32_t expert);
/* Count how many picks of the layer were guessed, where it was guessed. */
void fomoe_ahead_count(fomoe_experts *, int layer, const int32_t *picks);
/* The layer is planned: what it does not miss will be taken by nobody. */
void fomoe_ahead_expire(fomoe_experts *, int layer);
/* Whether expert i of the batch, which is to be read into this slot, takes reads that have begun. */
int fomoe_ahead_take(fomoe_experts *, int layer, int i, uint8_t **slot);
/* A completion whose tag has FOMOE_AHEAD_TAG.  Which of the batch's experts must be read again because of it, or -1. */
int fomoe_ahead_completed(fomoe_experts *, const fomoe_completion *);

/* The experts of e->group for all tokens that want them, up to the rows of e->down.  All threads call it; it ends at a
 * barrier. */
void fomoe_experts_compute_group(fomoe_experts *, const fomoe_step *, fomoe_run *, int thread);

#endif
