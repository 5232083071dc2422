#include "residency.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PINNED = 1, COMING = 2 }; /* bits of held */
enum { AGES = 2048 };            /* tokens for which the decay is looked up: a search compares hundreds of experts */

typedef struct {
    int32_t experts;
    int32_t slots[FOMOE_TIERS];
    int32_t used[FOMOE_TIERS];
    int32_t *occupant[FOMOE_TIERS]; /* slot -> expert, -1 = free */
    int32_t held_count;             /* experts with a bit of held: the next victims are among the others */
    int8_t *held;                   /* PINNED by the step at work, COMING from an offer */
    int8_t *tier;                   /* expert -> tier as others see it, FOMOE_TIER_NVME when nowhere or coming */
    int8_t *home;                   /* expert -> tier of its slot, FOMOE_TIER_NVME when nowhere */
    int32_t *slot;                  /* expert -> slot of its home */
    double *slow, *fast;            /* picks, decayed as of touched; other policies keep plain picks in slow */
    int64_t *touched;               /* token clock of the last pick */
    int64_t *order;                 /* sequence of the last pick: decides among equals */
} layer_state;

struct fomoe_residency {
    int layers, policy;
    fomoe_decay decay;
    double log_slow, log_fast;
    double slow_of[AGES], fast_of[AGES]; /* decay by age */
    int64_t clock, sequence;
    layer_state *layer;
    fomoe_residency_counters counters;
};

/* ---- what always holds, between calls ---- */

#ifndef NDEBUG
/* Slots and experts name each other, each expert lies in one place, others see it there unless it is still coming, and
 * the counts are those of what they count. */
static int is_consistent(const layer_state *l) {
    int held = 0, lodged = 0;
    for (int e = 0; e < l->experts; e++) {
        int home = l->home[e];
        held += l->held[e] != 0;
        if (l->held[e] & ~(PINNED | COMING)) return 0;
        if (l->tier[e] != (l->held[e] & COMING ? FOMOE_TIER_NVME : home)) return 0;
        if (home == FOMOE_TIER_NVME) continue;
        lodged++;
        if (l->slot[e] < 0 || l->slot[e] >= l->slots[home] || l->occupant[home][l->slot[e]] != e) return 0;
    }
    return held == l->held_count && lodged == l->used[FOMOE_TIER_VRAM] + l->used[FOMOE_TIER_DRAM];
}
#endif

/* ---- life ---- */

static int allocate(layer_state *l) {
    for (int t = 0; t < FOMOE_TIERS; t++) {
        l->occupant[t] = malloc((l->slots[t] + 1) * sizeof **l->occupant);
        if (!l->occupant[t]) return 0;
        for (int i = 0; i < l->slots[t]; i++) l->occupant[t][i] = -1;
    }
    size_t n = l->experts + 1;
    l->held = calloc(n, 1);
    l->tier = malloc(n);
    l->home = malloc(n);
    l->slot = calloc(n, sizeof *l->slot);
    l->slow = calloc(n, sizeof *l->slow);
    l->fast = calloc(n, sizeof *l->fast);
    l->touched = calloc(n, sizeof *l->touched);
    l->order = calloc(n, sizeof *l->order);
    if (!l->held || !l->tier || !l->home || !l->slot || !l->slow || !l->fast || !l->touched || !l->order) return 0;
    memset(l->tier, FOMOE_TIER_NVME, n);
    memset(l->home, FOMOE_TIER_NVME, n);
    return 1;
}

fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy,
                                     const fomoe_decay *decay) {
    fomoe_residency *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->layers = layers;
    r->policy = policy;
    r->decay = *decay;
    if (policy == FOMOE_POLICY_DECAYED) {
        r->log_slow = log(decay->slow);
        r->log_fast = log(decay->fast);
    }
    for (int age = 0; age < AGES; age++) {
        r->slow_of[age] = exp(r->log_slow * age);
        r->fast_of[age] = exp(r->log_fast * age);
    }
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
        void *owned[] = {l->occupant[0], l->occupant[1], l->held, l->tier,    l->home,
                         l->slot,        l->slow,        l->fast, l->touched, l->order};
        for (size_t j = 0; j < sizeof owned / sizeof *owned; j++) free(owned[j]);
    }
    free(r->layer);
    free(r);
}

/* ---- worth ---- */

void fomoe_residency_tick(fomoe_residency *r, int64_t tokens) { r->clock += tokens; }

static double slow_after(const fomoe_residency *r, int64_t age) {
    return (uint64_t)age < AGES ? r->slow_of[age] : exp(r->log_slow * (double)age);
}

static double fast_after(const fomoe_residency *r, int64_t age) {
    return (uint64_t)age < AGES ? r->fast_of[age] : exp(r->log_fast * (double)age);
}

void fomoe_residency_touch(fomoe_residency *r, int layer, int64_t age, const int32_t *experts, int count) {
    layer_state *l = &r->layer[layer];
    int64_t now = r->clock - age;
    for (int i = 0; i < count; i++) {
        int e = experts[i];
        l->slow[e] = l->slow[e] * slow_after(r, now - l->touched[e]) + 1;
        l->fast[e] = l->fast[e] * fast_after(r, now - l->touched[e]) + 1;
        l->touched[e] = now;
        l->order[e] = ++r->sequence;
    }
}

/* What the policy compares.  DECAYED: picks per token; a steady rate p gives p / (1 - decay) decayed picks. */
static double worth(const fomoe_residency *r, const layer_state *l, int expert) {
    int64_t age = r->clock - l->touched[expert];
    switch (r->policy) {
    case FOMOE_POLICY_LRU: return (double)l->order[expert];
    case FOMOE_POLICY_DECAYED:
        return (1 - r->decay.fast_share) * (1 - r->decay.slow) * (l->slow[expert] * slow_after(r, age)) +
               r->decay.fast_share * (1 - r->decay.fast) * (l->fast[expert] * fast_after(r, age));
    case FOMOE_POLICY_LFRU: return l->slow[expert] / (double)(age + 1);
    default: return l->slow[expert];
    }
}

/* Whether a goes before b: worth less, or among equals picked longer ago. */
static int goes_before(const fomoe_residency *r, const layer_state *l, int a, int b) {
    double worth_a = worth(r, l, a), worth_b = worth(r, l, b);
    return worth_a < worth_b || (worth_a == worth_b && l->order[a] < l->order[b]);
}

/* The slot of the tier's first to go, -1 when all are held. */
static int victim(const fomoe_residency *r, const layer_state *l, int tier) {
    const int32_t *occupant = l->occupant[tier];
    double least = 0;
    int best = -1;
    for (int i = 0; i < l->slots[tier]; i++) {
        int e = occupant[i];
        if (e < 0 || l->held[e]) continue;
        double w = worth(r, l, e);
        if (best >= 0 && (w > least || (w == least && l->order[e] > l->order[occupant[best]]))) continue;
        best = i;
        least = w;
    }
    return best;
}

/* ---- slots ---- */

static int free_slot(const layer_state *l, int tier) {
    if (l->used[tier] == l->slots[tier]) return -1;
    for (int i = 0; i < l->slots[tier]; i++)
        if (l->occupant[tier][i] < 0) return i;
    return -1;
}

static void put(layer_state *l, int expert, int tier, int slot) {
    assert(slot >= 0 && slot < l->slots[tier] && l->occupant[tier][slot] < 0);
    assert(l->home[expert] == FOMOE_TIER_NVME);
    l->occupant[tier][slot] = expert;
    l->home[expert] = tier;
    l->slot[expert] = slot;
    l->tier[expert] = l->held[expert] & COMING ? FOMOE_TIER_NVME : tier;
    l->used[tier]++;
}

static void take_out(layer_state *l, int expert) {
    int tier = l->home[expert];
    assert(tier != FOMOE_TIER_NVME && l->occupant[tier][l->slot[expert]] == expert);
    l->occupant[tier][l->slot[expert]] = -1;
    l->used[tier]--;
    l->home[expert] = l->tier[expert] = FOMOE_TIER_NVME;
}

static void hold(layer_state *l, int expert, int bit) {
    l->held_count += !l->held[expert];
    l->held[expert] |= bit;
}

static void let_go(layer_state *l, int expert, int bit) {
    if (!(l->held[expert] & bit)) return;
    l->held[expert] &= ~bit;
    l->held_count -= !l->held[expert];
}

static void evict(fomoe_residency *r, layer_state *l, int expert) {
    assert(!l->held[expert]);
    take_out(l, expert);
    r->counters.evictions++;
}

static void record_move(fomoe_move *moves, int *count, int expert, int from_tier, int from_slot, int to_tier,
                        int to_slot) {
    moves[(*count)++] = (fomoe_move){expert, from_tier, from_slot, to_tier, to_slot};
}

/* An empty slot of DRAM: a free one, or that of its first to go, which is forgotten.  -1: all are held. */
static int room_in_dram(fomoe_residency *r, layer_state *l) {
    int slot = free_slot(l, FOMOE_TIER_DRAM);
    if (slot >= 0) return slot;
    slot = victim(r, l, FOMOE_TIER_DRAM);
    if (slot >= 0) evict(r, l, l->occupant[FOMOE_TIER_DRAM][slot]);
    return slot;
}

/* An empty slot of VRAM: a free one, or that of its first to go.  It goes down to DRAM, unless it is worth less than
 * every other there: then it is forgotten at once.  -1: all are held. */
static int room_in_vram(fomoe_residency *r, layer_state *l, fomoe_move *moves, int *move_count) {
    int slot = free_slot(l, FOMOE_TIER_VRAM);
    if (slot >= 0) return slot;
    slot = victim(r, l, FOMOE_TIER_VRAM);
    if (slot < 0) return -1;
    int loser = l->occupant[FOMOE_TIER_VRAM][slot], below = free_slot(l, FOMOE_TIER_DRAM);
    if (below < 0) {
        int other = victim(r, l, FOMOE_TIER_DRAM);
        if (other >= 0 && goes_before(r, l, l->occupant[FOMOE_TIER_DRAM][other], loser)) {
            evict(r, l, l->occupant[FOMOE_TIER_DRAM][other]);
            below = other;
        }
    }
    if (below < 0) {
        evict(r, l, loser);
        return slot;
    }
    take_out(l, loser);
    put(l, loser, FOMOE_TIER_DRAM, below);
    record_move(moves, move_count, loser, FOMOE_TIER_VRAM, slot, FOMOE_TIER_DRAM, below);
    r->counters.demotions++;
    return slot;
}

/* A DRAM hit moves up: into a free slot of VRAM, or in exchange for VRAM's first to go. */
static void promote(fomoe_residency *r, layer_state *l, int expert, fomoe_move *moves, int *move_count) {
    int from = l->slot[expert], slot = free_slot(l, FOMOE_TIER_VRAM), loser = -1;
    assert(l->home[expert] == FOMOE_TIER_DRAM && !(l->held[expert] & COMING));
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

/* ---- requests ---- */

static int slots_of(const layer_state *l) { return l->slots[FOMOE_TIER_VRAM] + l->slots[FOMOE_TIER_DRAM]; }

static int pin_all(layer_state *l, const int32_t *experts, int count) {
    int fresh = 0;
    for (int i = 0; i < count; i++) fresh += !l->held[experts[i]];
    if (l->held_count + fresh > slots_of(l)) return 0;
    for (int i = 0; i < count; i++) hold(l, experts[i], PINNED);
    return 1;
}

/* Each one wanted is pinned by now and there is a slot for each, so one of the two tiers has room. */
static void bring_in(fomoe_residency *r, layer_state *l, int expert, fomoe_move *moves, int *move_count) {
    int tier = FOMOE_TIER_VRAM, slot = room_in_vram(r, l, moves, move_count);
    if (slot < 0) {
        tier = FOMOE_TIER_DRAM;
        slot = room_in_dram(r, l);
    }
    assert(slot >= 0);
    put(l, expert, tier, slot);
}

int fomoe_residency_resolve(fomoe_residency *r, int layer, const int32_t *experts, const int32_t *weight, int count,
                            fomoe_placement *placements, fomoe_move *moves, int *move_count) {
    layer_state *l = &r->layer[layer];
    *move_count = 0;
    if (!pin_all(l, experts, count)) return -1;
    for (int i = 0; i < count; i++) {
        int e = experts[i], requests = weight ? weight[i] : 1;
        int source = l->held[e] & COMING ? FOMOE_TIER_COMING : l->tier[e];
        placements[i].source = source;
        if (source == FOMOE_TIER_NVME)
            bring_in(r, l, e, moves, move_count);
        else if (source == FOMOE_TIER_DRAM)
            promote(r, l, e, moves, move_count);
        if (!requests) continue;
        r->counters.requests += requests;
        r->counters.hits[source == FOMOE_TIER_COMING ? FOMOE_TIER_NVME : source]++;
        r->counters.hits[l->home[e]] += requests - 1;
    }
    for (int i = 0; i < count; i++) {
        placements[i].expert = experts[i];
        placements[i].tier = l->home[experts[i]];
        placements[i].slot = l->slot[experts[i]];
        assert(placements[i].tier != FOMOE_TIER_NVME && l->held[experts[i]] & PINNED);
    }
    assert(*move_count <= 2 * count && is_consistent(l));
    return 0;
}

void fomoe_residency_release(fomoe_residency *r, int layer, const int32_t *experts, int count) {
    for (int i = 0; i < count; i++) let_go(&r->layer[layer], experts[i], PINNED);
}

void fomoe_residency_substituted(fomoe_residency *r, int count) {
    r->counters.requests += count;
    r->counters.substitutions += count;
}

void fomoe_residency_drop(fomoe_residency *r, int layer, int32_t expert) {
    layer_state *l = &r->layer[layer];
    if (l->home[expert] != FOMOE_TIER_NVME) take_out(l, expert);
    let_go(l, expert, PINNED);
    let_go(l, expert, COMING);
    assert(is_consistent(l));
}

fomoe_placement fomoe_residency_offer(fomoe_residency *r, int layer, int32_t expert, int spare) {
    layer_state *l = &r->layer[layer];
    fomoe_placement none = {expert, FOMOE_TIER_NVME, FOMOE_TIER_NVME, -1};
    if (l->home[expert] != FOMOE_TIER_NVME || slots_of(l) - l->held_count - 1 < spare) return none;
    int tier = FOMOE_TIER_DRAM, slot = free_slot(l, tier);
    if (slot < 0) slot = free_slot(l, tier = FOMOE_TIER_VRAM);
    if (slot < 0) {
        tier = l->slots[FOMOE_TIER_DRAM] ? FOMOE_TIER_DRAM : FOMOE_TIER_VRAM;
        slot = victim(r, l, tier);
        if (slot < 0 || !goes_before(r, l, l->occupant[tier][slot], expert)) return none;
        evict(r, l, l->occupant[tier][slot]);
    }
    hold(l, expert, COMING);
    put(l, expert, tier, slot);
    r->counters.offers++;
    assert(is_consistent(l));
    return (fomoe_placement){expert, FOMOE_TIER_NVME, tier, slot};
}

void fomoe_residency_arrived(fomoe_residency *r, int layer, int32_t expert) {
    layer_state *l = &r->layer[layer];
    assert(l->held[expert] & COMING && l->home[expert] != FOMOE_TIER_NVME);
    let_go(l, expert, COMING);
    l->tier[expert] = l->home[expert];
    assert(is_consistent(l));
}

/* ---- questions ---- */

int fomoe_residency_find(const fomoe_residency *r, int layer, int32_t expert, int32_t *slot) {
    const layer_state *l = &r->layer[layer];
    if (l->tier[expert] != FOMOE_TIER_NVME) *slot = l->slot[expert];
    return l->tier[expert];
}

const int8_t *fomoe_residency_tiers(const fomoe_residency *r, int layer) { return r->layer[layer].tier; }

fomoe_placement fomoe_residency_seed(fomoe_residency *r, int layer, int32_t expert, double score) {
    layer_state *l = &r->layer[layer];
    fomoe_placement p = {expert, FOMOE_TIER_NVME, FOMOE_TIER_NVME, -1};
    int rated = r->policy == FOMOE_POLICY_DECAYED;
    l->slow[expert] = rated ? score / (1 - r->decay.slow) : score;
    l->fast[expert] = rated ? score / (1 - r->decay.fast) : score;
    l->touched[expert] = r->clock;
    /* recency of seeds: the hottest is the last to go, and everybody picked since stands above them */
    l->order[expert] = -r->sequence++;
    if (l->home[expert] != FOMOE_TIER_NVME) return p;
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
    for (int e = 0; e < l->experts; e++) scores[e] = r->policy == FOMOE_POLICY_DECAYED ? worth(r, l, e) : l->slow[e];
}

const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *r) { return &r->counters; }

int fomoe_residency_slots(const fomoe_residency *r, int layer, int tier) { return r->layer[layer].slots[tier]; }
