#include "replay.h"

#include <stdlib.h>

#include "expert_plan.h"

typedef struct {
    fomoe_expert_plan plan;
    int32_t *row; /* a token's picks */
    int8_t *source, *tier, *seen;
    fomoe_placement *placements;
    fomoe_move *moves;
} batch;

static void batch_free(batch *b) {
    void *owned[] = {b->row, b->source, b->tier, b->seen, b->placements, b->moves};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    fomoe_plan_free(&b->plan);
}

static int batch_new(batch *b, size_t most) {
    *b = (batch){
        .row = malloc(most * sizeof *b->row),
        .source = malloc(most),
        .tier = malloc(most),
        .seen = malloc(most),
        .placements = malloc(most * sizeof *b->placements),
        .moves = malloc(2 * most * sizeof *b->moves),
    };
    int complete =
        !fomoe_plan_new(&b->plan, most) && b->row && b->source && b->tier && b->seen && b->placements && b->moves;
    if (!complete) batch_free(b);
    return complete;
}

static int is_among(const uint16_t *picks, int used, int id) {
    for (int k = 0; k < used; k++)
        if (picks[k] == id) return 1;
    return 0;
}

/* The number of requests that got another expert. */
static int collect(batch *b, const uint16_t *picks, const uint16_t *chosen, int64_t requests, int used) {
    int substituted = 0;
    fomoe_plan_begin(&b->plan);
    for (int64_t i = 0; i < requests; i++) {
        int is_pick = is_among(picks + i / used * used, used, chosen[i]);
        fomoe_plan_add(&b->plan, chosen[i], is_pick);
        substituted += !is_pick;
    }
    return substituted;
}

/* Experts [begin, end); there is room, as the caller counts slots. */
static void place(batch *b, fomoe_residency *r, int layer, int begin, int end) {
    int moves;
    fomoe_residency_resolve(r, layer, b->plan.ids + begin, b->plan.requests + begin, end - begin, b->placements,
                            b->moves, &moves);
    for (int i = begin; i < end; i++) {
        b->source[i] = b->placements[i - begin].source;
        b->tier[i] = b->placements[i - begin].tier;
    }
}

/* Waves: every expert that is done gives its slot to the next that waits, in the order of the batch. */
static void resolve(batch *b, fomoe_residency *r, const fomoe_replay_layer *l) {
    int room = l->slots - b->plan.hits, misses = b->plan.count - b->plan.hits;
    int placed = b->plan.hits + (misses < room ? misses : room);
    place(b, r, l->layer, 0, b->plan.hits);
    place(b, r, l->layer, b->plan.hits, placed);
    for (int i = 0; i < b->plan.count; i++) {
        fomoe_residency_release(r, l->layer, &b->plan.ids[i], 1);
        if (placed == b->plan.count) continue;
        place(b, r, l->layer, placed, placed + 1);
        placed++;
    }
}

/* The first request finds an expert where it was, the others where it is computed from. */
static void note_found(batch *b, const uint16_t *chosen, int64_t requests, int8_t *found) {
    for (int i = 0; i < b->plan.count; i++) b->seen[i] = 0;
    for (int64_t j = 0; j < requests; j++) {
        int i = b->plan.index[chosen[j]];
        found[j] = b->seen[i] ? b->tier[i] : b->source[i];
        b->seen[i] = 1;
    }
    fomoe_plan_end(&b->plan);
}

static void play(batch *b, fomoe_residency *r, const fomoe_replay_layer *l, int64_t first, int64_t tokens) {
    int64_t at = first * l->used, requests = tokens * l->used;
    for (int64_t t = 0; t < tokens; t++) {
        for (int k = 0; k < l->used; k++) b->row[k] = l->picks[at + t * l->used + k];
        fomoe_residency_touch(r, l->layer, tokens - 1 - t, b->row, l->used);
    }
    int substituted = collect(b, l->picks + at, l->chosen + at, requests, l->used);
    if (substituted) fomoe_residency_substituted(r, substituted);
    fomoe_plan_partition(&b->plan, r, l->layer);
    resolve(b, r, l);
    note_found(b, l->chosen + at, requests, l->found + at);
}

static int most_experts(const fomoe_replay_layer *layers, int count) {
    int most = 1;
    for (int i = 0; i < count; i++) {
        if (layers[i].experts > most) most = layers[i].experts;
        if (layers[i].used > most) most = layers[i].used;
    }
    return most;
}

int fomoe_replay(fomoe_residency *r, const fomoe_replay_layer *layers, int count, int64_t batches,
                 const int64_t *batch_tokens) {
    batch b;
    int64_t *first = calloc(count + 1, sizeof *first);
    if (!first || !batch_new(&b, most_experts(layers, count))) {
        free(first);
        return -1;
    }
    for (int64_t n = 0; n < batches; n++) {
        fomoe_residency_tick(r, batch_tokens[n]);
        for (int i = 0; i < count; i++) {
            int64_t tokens = layers[i].tokens[n];
            if (tokens) play(&b, r, &layers[i], first[i], tokens);
            first[i] += tokens;
        }
    }
    batch_free(&b);
    free(first);
    return 0;
}

/* ---- Belady ---- */

typedef struct {
    int64_t *next;     /* [requests]: the next batch that wants the expert, or batches */
    int64_t *wanted;   /* expert -> the next batch that wants it, as of now */
    int64_t *present;  /* expert -> the last batch that it was in */
    int32_t *resident; /* list */
    int8_t *in;
    int32_t count;
} oracle;

static void look_ahead(oracle *o, const fomoe_replay_layer *l, int64_t batches) {
    int64_t at = 0;
    for (int64_t n = 0; n < batches; n++) at += l->tokens[n] * l->used;
    for (int e = 0; e < l->experts; e++) o->wanted[e] = batches;
    for (int64_t n = batches - 1; n >= 0; n--) {
        int64_t end = at;
        at -= l->tokens[n] * l->used;
        for (int64_t i = at; i < end; i++) o->next[i] = o->wanted[l->chosen[i]];
        for (int64_t i = at; i < end; i++) o->wanted[l->chosen[i]] = n;
    }
}

/* Shrink the cache to its slots: what is wanted last goes first; that of batch n stays unless it alone is too much. */
static void shrink(oracle *o, const fomoe_replay_layer *l, int64_t n, int distinct) {
    int spare = distinct <= l->slots;
    while (o->count > l->slots) {
        int worst = -1;
        for (int i = 0; i < o->count; i++) {
            int e = o->resident[i];
            if (spare && o->present[e] == n) continue;
            if (worst < 0 || o->wanted[e] > o->wanted[o->resident[worst]]) worst = i;
        }
        o->in[o->resident[worst]] = 0;
        o->resident[worst] = o->resident[--o->count];
    }
}

static void foresee(oracle *o, const fomoe_replay_layer *l, int64_t batches) {
    int64_t at = 0;
    for (int64_t n = 0; n < batches; n++) {
        int64_t end = at + l->tokens[n] * l->used;
        int distinct = 0;
        for (; at < end; at++) {
            int e = l->chosen[at];
            l->found[at] = o->in[e] ? FOMOE_TIER_DRAM : FOMOE_TIER_NVME;
            distinct += o->present[e] != n;
            o->present[e] = n;
            o->wanted[e] = o->next[at];
            if (o->in[e]) continue;
            o->in[e] = 1;
            o->resident[o->count++] = e;
        }
        shrink(o, l, n, distinct);
    }
}

int fomoe_replay_belady(const fomoe_replay_layer *l, int64_t batches) {
    int64_t requests = 0;
    for (int64_t n = 0; n < batches; n++) requests += l->tokens[n] * l->used;
    size_t most = l->experts + 1;
    oracle o = {
        .next = malloc((requests + 1) * sizeof *o.next),
        .wanted = malloc(most * sizeof *o.wanted),
        .present = malloc(most * sizeof *o.present),
        .resident = malloc(most * sizeof *o.resident),
        .in = calloc(most, 1),
    };
    int complete = o.next && o.wanted && o.present && o.resident && o.in;
    if (complete) {
        for (int e = 0; e < l->experts; e++) o.present[e] = -1;
        look_ahead(&o, l, batches);
        foresee(&o, l, batches);
    }
    void *owned[] = {o.next, o.wanted, o.present, o.resident, o.in};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    return complete ? 0 : -1;
}
