#include "residency.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t experts;
    int32_t slots[FOMOE_TIERS];
    int32_t used[FOMOE_TIERS];
    int32_t *occupant[FOMOE_TIERS]; /* slot -> expert, -1 = free */
    int8_t *tier;                   /* expert -> tier, FOMOE_TIER_NVME when nowhere */
    int8_t *pinned;                 /* by the step at work */
    int32_t *slot;                  /* expert -> slot */
    double *score;                  /* picks, decayed to the time of touched */
    int64_t *touched;               /* token clock of the last pick */
    int64_t *order;                 /* sequence of the last use: recency within a token */
} layer_state;

struct fomoe_residency {
    int layers, policy;
    double log_decay;
    int64_t clock, sequence;
    layer_state *layer;
    fomoe_residency_counters counters;
};

static int allocate(layer_state *l) {
    for (int t = 0; t < FOMOE_TIERS; t++) {
        l->occupant[t] = malloc((l->slots[t] + 1) * sizeof **l->occupant);
        if (!l->occupant[t]) return 0;
        for (int i = 0; i < l->slots[t]; i++) l->occupant[t][i] = -1;
    }
    size_t n = l->experts + 1;
    l->tier = malloc(n);
    l->pinned = calloc(n, 1);
    l->slot = calloc(n, sizeof *l->slot);
    l->score = calloc(n, sizeof *l->score);
    l->touched = calloc(n, sizeof *l->touched);
    l->order = calloc(n, sizeof *l->order);
    if (!l->tier || !l->pinned || !l->slot || !l->score || !l->touched || !l->order) return 0;
    memset(l->tier, FOMOE_TIER_NVME, n);
    return 1;
}

fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy, double decay) {
    fomoe_residency *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->layers = layers;
    r->policy = policy;
    r->log_decay = log(decay);
    r->layer = calloc(layers, sizeof *r->layer);
    for (int i = 0; r->layer && i < layers; i++) {
        r->layer[i].experts = experts[i];
        for (int t = 0; t < FOMOE_TIERS; t++) r->layer[i].slots[t] = slots[i * FOMOE_TIERS + t];
        if (!allocate(&r->layer[i])) goto fail;
    }
    if (r->layer) return r;
fail:
    fomoe_residency_free(r);
    return NULL;
}

void fomoe_residency_free(fomoe_residency *r) {
    if (!r) return;
    for (int i = 0; r->layer && i < r->layers; i++) {
        layer_state *l = &r->layer[i];
        for (int t = 0; t < FOMOE_TIERS; t++) free(l->occupant[t]);
        free(l->tier);
        free(l->pinned);
        free(l->slot);
        free(l->score);
        free(l->touched);
        free(l->order);
    }
    free(r->layer);
    free(r);
}

void fomoe_residency_tick(fomoe_residency *r, int64_t tokens) { r->clock += tokens; }

static double decayed(const fomoe_residency *r, const layer_state *l, int expert) {
    return l->score[expert] * exp(r->log_decay * (double)(r->clock - l->touched[expert]));
}

void fomoe_residency_touch(fomoe_residency *r, int layer, const int32_t *experts, int count) {
    layer_state *l = &r->layer[layer];
    for (int i = 0; i < count; i++) {
        int e = experts[i];
        l->score[e] = (r->policy == FOMOE_POLICY_DECAYED ? decayed(r, l, e) : l->score[e]) + 1;
        l->touched[e] = r->clock;
        l->order[e] = ++r->sequence;
    }
}

/* The lower the worth, the sooner it goes. */
static double worth(const fomoe_residency *r, const layer_state *l, int expert) {
    switch (r->policy) {
    case FOMOE_POLICY_LRU:
        return (double)l->order[expert];
    case FOMOE_POLICY_LFU:
        return l->score[expert];
    case FOMOE_POLICY_LFRU:
        return l->score[expert] / (double)(r->clock - l->touched[expert] + 1);
    default:
        /* log of the decayed frequency less the part that is the same for all: no exp per candidate */
        return l->score[expert] > 0 ? log(l->score[expert]) - r->log_decay * (double)l->touched[expert] : -HUGE_VAL;
    }
}

/* The slot of the tier's least worthy unpinned expert, -1 when all are pinned; equals: the one used longest ago. */
static int victim(const fomoe_residency *r, const layer_state *l, int tier) {
    int best = -1;
    double least = HUGE_VAL;
    for (int i = 0; i < l->slots[tier]; i++) {
        int e = l->occupant[tier][i];
        if (e < 0 || l->pinned[e]) continue;
        double w = worth(r, l, e);
        if (best < 0 || w < least || (w == least && l->order[e] < l->order[l->occupant[tier][best]])) {
            best = i;
            least = w;
        }
    }
    return best;
}

static int free_slot(const layer_state *l, int tier) {
    if (l->used[tier] == l->slots[tier]) return -1;
    for (int i = 0; i < l->slots[tier]; i++)
        if (l->occupant[tier][i] < 0) return i;
    return -1;
}

static void put(layer_state *l, int expert, int tier, int slot) {
    l->occupant[tier][slot] = expert;
    l->tier[expert] = tier;
    l->slot[expert] = slot;
    l->used[tier]++;
}

static void take_out(layer_state *l, int expert) {
    int tier = l->tier[expert];
    l->occupant[tier][l->slot[expert]] = -1;
    l->used[tier]--;
    l->tier[expert] = FOMOE_TIER_NVME;
}

/* An empty slot of DRAM: a free one, or that of its least worthy expert, who is forgotten. -1: all are pinned. */
static int room_in_dram(fomoe_residency *r, layer_state *l) {
    int slot = free_slot(l, FOMOE_TIER_DRAM);
    if (slot >= 0) return slot;
    slot = victim(r, l, FOMOE_TIER_DRAM);
    if (slot < 0) return -1;
    take_out(l, l->occupant[FOMOE_TIER_DRAM][slot]);
    r->counters.evictions++;
    return slot;
}

static void record_move(fomoe_move *moves, int *count, int expert, int from_tier, int from_slot, int to_tier, int to_slot) {
    moves[(*count)++] = (fomoe_move){expert, from_tier, from_slot, to_tier, to_slot};
}

/* An empty slot of VRAM: a free one, or that of its least worthy expert, who goes down to DRAM when there is room. */
static int room_in_vram(fomoe_residency *r, layer_state *l, fomoe_move *moves, int *move_count) {
    int slot = free_slot(l, FOMOE_TIER_VRAM);
    if (slot >= 0) return slot;
    slot = victim(r, l, FOMOE_TIER_VRAM);
    if (slot < 0) return -1;
    int loser = l->occupant[FOMOE_TIER_VRAM][slot], below = room_in_dram(r, l);
    take_out(l, loser);
    if (below >= 0) {
        put(l, loser, FOMOE_TIER_DRAM, below);
        record_move(moves, move_count, loser, FOMOE_TIER_VRAM, slot, FOMOE_TIER_DRAM, below);
        r->counters.demotions++;
    } else {
        r->counters.evictions++;
    }
    return slot;
}

/* A DRAM hit moves up: into a free slot of VRAM, or in exchange for VRAM's least worthy. */
static void promote(fomoe_residency *r, layer_state *l, int expert, fomoe_move *moves, int *move_count) {
    int from = l->slot[expert], slot = free_slot(l, FOMOE_TIER_VRAM), loser = -1;
    if (slot < 0) {
        slot = victim(r, l, FOMOE_TIER_VRAM);
        if (slot < 0) return;
        loser = l->occupant[FOMOE_TIER_VRAM][slot];
        take_out(l, loser);
    }
    take_out(l, expert);
    put(l, expert, FOMOE_TIER_VRAM, slot);
    record_move(moves, move_count, expert, FOMOE_TIER_DRAM, from, FOMOE_TIER_VRAM, slot);
    r->counters.promotions++;
    if (loser < 0) return;
    put(l, loser, FOMOE_TIER_DRAM, from);
    record_move(moves, move_count, loser, FOMOE_TIER_VRAM, slot, FOMOE_TIER_DRAM, from);
    r->counters.demotions++;
}

int fomoe_residency_resolve(fomoe_residency *r, int layer, const int32_t *experts, const int32_t *weight, int count,
                            fomoe_placement *placements, fomoe_move *moves, int *move_count) {
    layer_state *l = &r->layer[layer];
    *move_count = 0;
    for (int i = 0; i < count; i++) {
        l->pinned[experts[i]] = 1;
        placements[i].source = l->tier[experts[i]];
    }
    for (int i = 0; i < count; i++) {
        int e = experts[i], source = l->tier[e], requests = weight ? weight[i] : 1;
        if (source == FOMOE_TIER_NVME) {
            int tier = l->slots[FOMOE_TIER_VRAM] ? FOMOE_TIER_VRAM : FOMOE_TIER_DRAM;
            int slot = tier == FOMOE_TIER_VRAM ? room_in_vram(r, l, moves, move_count) : -1;
            if (slot < 0) {
                tier = FOMOE_TIER_DRAM;
                slot = room_in_dram(r, l);
            }
            if (slot < 0) return -1;
            put(l, e, tier, slot);
        } else if (source == FOMOE_TIER_DRAM && l->slots[FOMOE_TIER_VRAM]) {
            promote(r, l, e, moves, move_count);
        }
        r->counters.requests += requests;
        r->counters.hits[source]++;
        /* the other tokens of the batch find it where it now is */
        r->counters.hits[l->tier[e]] += requests - 1;
    }
    /* last, because a later expert's demotion may have moved an earlier one's neighbour, never a pinned one itself */
    for (int i = 0; i < count; i++)
        placements[i] = (fomoe_placement){experts[i], placements[i].source, l->tier[experts[i]], l->slot[experts[i]]};
    return 0;
}

void fomoe_residency_release(fomoe_residency *r, int layer, const int32_t *experts, int count) {
    for (int i = 0; i < count; i++) r->layer[layer].pinned[experts[i]] = 0;
}

void fomoe_residency_drop(fomoe_residency *r, int layer, int32_t expert) {
    layer_state *l = &r->layer[layer];
    if (l->tier[expert] != FOMOE_TIER_NVME) take_out(l, expert);
    l->pinned[expert] = 0;
}

int fomoe_residency_find(const fomoe_residency *r, int layer, int32_t expert, int32_t *slot) {
    const layer_state *l = &r->layer[layer];
    if (l->tier[expert] != FOMOE_TIER_NVME) *slot = l->slot[expert];
    return l->tier[expert];
}

fomoe_placement fomoe_residency_seed(fomoe_residency *r, int layer, int32_t expert, double score) {
    layer_state *l = &r->layer[layer];
    fomoe_placement p = {expert, FOMOE_TIER_NVME, FOMOE_TIER_NVME, -1};
    l->score[expert] = score;
    l->touched[expert] = r->clock;
    /* recency of seeds: the hottest is the last to go */
    l->order[expert] = -r->sequence++;
    if (l->tier[expert] != FOMOE_TIER_NVME) return p;
    for (int tier = 0; tier < FOMOE_TIERS; tier++) {
        int slot = free_slot(l, tier);
        if (slot < 0) continue;
        put(l, expert, tier, slot);
        p.tier = tier;
        p.slot = slot;
        break;
    }
    return p;
}

void fomoe_residency_scores(const fomoe_residency *r, int layer, double *scores) {
    const layer_state *l = &r->layer[layer];
    for (int e = 0; e < l->experts; e++)
        scores[e] = r->policy == FOMOE_POLICY_DECAYED ? decayed(r, l, e) : l->score[e];
}

const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *r) { return &r->counters; }

int fomoe_residency_slots(const fomoe_residency *r, int layer, int tier) { return r->layer[layer].slots[tier]; }
