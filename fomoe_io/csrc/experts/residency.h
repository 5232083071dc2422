/* Which expert lies in which slot of which tier, and who must go.  Bookkeeping alone: no bytes are
 * touched here, so the engine (which moves bytes) and the simulator (which moves none) run the same code
 * and count the same.  One thread calls it; nothing is allocated after creation. */
#ifndef FOMOE_RESIDENCY_H
#define FOMOE_RESIDENCY_H

#include <stdint.h>

enum { FOMOE_TIER_VRAM = 0, FOMOE_TIER_DRAM = 1, FOMOE_TIERS = 2, FOMOE_TIER_NVME = 2 };

/* A placement's source when a read that an offer started is still under way: wait for it, start no other.  Engines wait
 * for a layer's offers before they resolve it. */
enum { FOMOE_TIER_COMING = 3 };

/* Who leaves first.  Frequencies and recency are those of the router's true picks. */
enum fomoe_policy {
    FOMOE_POLICY_LRU = 0,     /* least recently picked */
    FOMOE_POLICY_LFU = 1,     /* least often picked since the start */
    FOMOE_POLICY_DECAYED = 2, /* least picks a token, by two exponentially decayed averages: the default */
    FOMOE_POLICY_LFRU = 3,    /* least picks / (tokens since the last one + 1) */
};

/* The averages of FOMOE_POLICY_DECAYED: one that remembers, one that follows the last tokens, and the share of the
 * second in the sum.  Factors per token, in (0, 1). */
typedef struct {
    double slow, fast, fast_share;
} fomoe_decay;

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

/* requests = hits[0] + hits[1] + hits[2] + substitutions, always.
 *
 * A request is one token's wish for one expert of one layer.  When several tokens of a batch want the same
 * expert, the first of them counts for where it was found, the others as hits of the tier it is computed from:
 * hits[2] is thus the number of requests that waited for NVMe, one for each read. */
typedef struct {
    uint64_t requests;
    uint64_t hits[3]; /* by source tier; [2] = read from NVMe (on demand, or still coming from an offer) */
    uint64_t evictions;
    uint64_t promotions, demotions;
    uint64_t substitutions;
    uint64_t offers; /* slots given to experts before anybody asked for them */
} fomoe_residency_counters;

typedef struct fomoe_residency fomoe_residency;

/* slots: [layers][FOMOE_TIERS] slot counts.  decay: copied, unused by other policies.  NULL when memory runs out. */
fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy,
                                     const fomoe_decay *decay);
void fomoe_residency_free(fomoe_residency *);

/* A batch of tokens begins: the clock of recency and decay stands at its last token from now on. */
void fomoe_residency_tick(fomoe_residency *, int64_t tokens);
/* The router's true picks of a layer, counted whether or not they are resident or will be computed.
 * age: how many tokens of the batch come after this one (0: it is the last). */
void fomoe_residency_touch(fomoe_residency *, int layer, int64_t age, const int32_t *experts, int count);

/* Find or make a place for count distinct experts of a layer; with those pinned or coming already they must not
 * exceed the layer's slots.  All are pinned until fomoe_residency_release: no one of them is evicted by another.
 * weight[i] (may be NULL = 1): how many requests stand behind expert i; 0 for one that only stands in for another.
 * moves: room for 2 * count entries; *move_count is set.  Returns 0, or -1 (and changes nothing) without room. */
int fomoe_residency_resolve(fomoe_residency *, int layer, const int32_t *experts, const int32_t *weight, int count,
                            fomoe_placement *placements, fomoe_move *moves, int *move_count);
void fomoe_residency_release(fomoe_residency *, int layer, const int32_t *experts, int count);
/* Requests that were answered with another expert. */
void fomoe_residency_substituted(fomoe_residency *, int count);
/* The read of an expert failed: forget it (its slot is free again). */
void fomoe_residency_drop(fomoe_residency *, int layer, int32_t expert);

/* A slot for an expert that nobody waits for (back-fill): a free one, or that of the least worthy expert
 * of the slowest tier, if that one is worth less; at least `spare` slots of the layer stay unpinned.
 * source == FOMOE_TIER_NVME: read it into (tier, slot), then say arrived, or drop.  Until then nobody sees it as
 * resident and it is not evicted.  tier == FOMOE_TIER_NVME: no place, or no need. */
fomoe_placement fomoe_residency_offer(fomoe_residency *, int layer, int32_t expert, int spare);
void fomoe_residency_arrived(fomoe_residency *, int layer, int32_t expert);

/* Where an expert is now: tier (FOMOE_TIER_NVME when nowhere or still coming); *slot is set when resident. */
int fomoe_residency_find(const fomoe_residency *, int layer, int32_t expert, int32_t *slot);
/* The same for all experts of a layer, for the substitution. */
const int8_t *fomoe_residency_tiers(const fomoe_residency *, int layer);
/* Warm start: give the expert a score (picks per token) and, while free slots last, the next free slot (fastest tier
 * first).  Call hottest first.  Returns as fomoe_placement with source NVME, or tier = FOMOE_TIER_NVME when full. */
fomoe_placement fomoe_residency_seed(fomoe_residency *, int layer, int32_t expert, double score);
/* Scores of all experts of a layer at the present clock: picks per token (DECAYED), or picks. */
void fomoe_residency_scores(const fomoe_residency *, int layer, double *scores);
const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *);
int fomoe_residency_slots(const fomoe_residency *, int layer, int tier);

#endif
