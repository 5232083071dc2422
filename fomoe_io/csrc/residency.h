/* Which expert lies in which slot of which tier, and who must go.  Bookkeeping alone: no bytes are
 * touched here, so the engine (which moves bytes) and the simulator (which moves none) run the same code
 * and count the same.  One thread calls it. */
#ifndef FOMOE_RESIDENCY_H
#define FOMOE_RESIDENCY_H

#include <stdint.h>

enum { FOMOE_TIER_VRAM = 0, FOMOE_TIER_DRAM = 1, FOMOE_TIERS = 2, FOMOE_TIER_NVME = 2 };

enum fomoe_policy {
    FOMOE_POLICY_LRU = 0,     /* least recently used */
    FOMOE_POLICY_LFU = 1,     /* least frequently used since the start */
    FOMOE_POLICY_DECAYED = 2, /* exponentially decayed frequency of the true picks: the default */
    FOMOE_POLICY_LFRU = 3,    /* frequency / age */
};

/* Where a wanted expert was found (source) and where it will be computed from (tier, slot).
 * source == FOMOE_TIER_NVME: the caller must read it into (tier, slot) before use. */
typedef struct {
    int32_t expert;
    int32_t source;
    int32_t tier;
    int32_t slot;
} fomoe_placement;

/* An expert that changed tier to make room, to be carried out before the reads and in this order. */
typedef struct {
    int32_t expert;
    int32_t from_tier, from_slot;
    int32_t to_tier, to_slot; /* a swap appears as two moves with from/to exchanged */
} fomoe_move;

typedef struct {
    uint64_t requests;
    uint64_t hits[3]; /* by source tier; [2] = read from NVMe */
    uint64_t evictions;
    uint64_t promotions, demotions;
} fomoe_residency_counters;

typedef struct fomoe_residency fomoe_residency;

/* slots: [layers][FOMOE_TIERS] slot counts.  decay: factor per token of the decayed frequency.
 * NULL when memory runs out. */
fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy, double decay);
void fomoe_residency_free(fomoe_residency *);

/* A token (n tokens) has gone by: the clock of recency and decay. */
void fomoe_residency_tick(fomoe_residency *, int64_t tokens);
/* The router's true picks of a layer, counted whether or not they are resident. */
void fomoe_residency_touch(fomoe_residency *, int layer, const int32_t *experts, int count);

/* Find or make a place for count distinct experts of a layer; count must not exceed the layer's total
 * slots less those pinned.  All are pinned until fomoe_residency_release: no one of them is evicted by another.
 * weight[i] (may be NULL = 1): how many requests (tokens) stand behind expert i, for the counters.
 * moves: room for 2 * count entries; *move_count is set.  Returns 0, or -1 when there is no room. */
int fomoe_residency_resolve(fomoe_residency *, int layer, const int32_t *experts, const int32_t *weight, int count,
                            fomoe_placement *placements, fomoe_move *moves, int *move_count);
void fomoe_residency_release(fomoe_residency *, int layer, const int32_t *experts, int count);
/* The read of an expert failed: forget it (its slot is free again). */
void fomoe_residency_drop(fomoe_residency *, int layer, int32_t expert);

/* Where an expert is now: tier (FOMOE_TIER_NVME when nowhere); *slot is set when resident. */
int fomoe_residency_find(const fomoe_residency *, int layer, int32_t expert, int32_t *slot);
/* Warm start: give the expert a score and, while free slots last, the next free slot (fastest tier first).
 * Call hottest first.  Returns as fomoe_placement with source NVME, or tier = FOMOE_TIER_NVME when full. */
fomoe_placement fomoe_residency_seed(fomoe_residency *, int layer, int32_t expert, double score);
/* Scores of all experts of a layer at the present clock, for saving as a profile. */
void fomoe_residency_scores(const fomoe_residency *, int layer, double *scores);
const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *);
int fomoe_residency_slots(const fomoe_residency *, int layer, int tier);

#endif
