#include "device_experts.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { REAP_BATCH = 64, IN_DRAM = 1 /* kernels/router.h */, SPINS_BETWEEN_QUERIES = 4096 };

typedef struct {
    fomoe_buffer **items; /* a ring */
    int first, count, capacity;
} queue;

struct fomoe_device_experts {
    int layers, used, pairs, classes, max_experts;
    fomoe_device_layer *layer;
    fomoe_size_class *class;
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_device_copies copies;
    fomoe_buffer *buffers;     /* of all slots and spares */
    fomoe_buffer ***slot;      /* [layers * FOMOE_TIERS]: slot -> its buffer */
    fomoe_buffer **slot_memory;
    queue *spare;              /* [classes * FOMOE_TIERS] */
    fomoe_buffer **spare_memory;
    fomoe_device_expert_counters counters;
    int64_t *picks;
    int tables_changed, error, failed_layer, failed_expert;
    int is_warming; /* nobody computes: what has a place in DRAM stays there */

    /* the layer at work */
    int count;
    int32_t *ids, *index, *weight; /* weight: true picks, what the residency counts */
    int32_t *wanted, *posted; /* [pairs]: the router's picks, and what is computed in their place */
    int misses;
    fomoe_placement *placements;
    fomoe_move *moves;
    fomoe_buffer **landing; /* where each expert's read goes */
    fomoe_buffer **record;  /* where each expert is computed from */
    int32_t *reads_left;
    fomoe_buffer **transient; /* device buffers that are spare again after the layer */
    int transients;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void fail(fomoe_device_experts *e, int layer, int expert, int error) {
    if (e->error) return;
    e->error = error;
    e->failed_layer = layer;
    e->failed_expert = expert;
}

static int has_failed(fomoe_device_experts *e, int layer) {
    if (e->copies.error) fail(e, layer, -1, 1);
    return e->error;
}

/* ---- buffers ---- */

static void push(queue *q, fomoe_buffer *b) { q->items[(q->first + q->count++) % q->capacity] = b; }

static fomoe_buffer *pop(queue *q) {
    fomoe_buffer *b = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->count--;
    return b;
}

static queue *spares_of(fomoe_device_experts *e, int layer, int tier) {
    return &e->spare[e->layer[layer].size_class * FOMOE_TIERS + tier];
}

/* A spare of the device may still be read from or written to: copies to it are ordered behind that. */
static fomoe_buffer *take_device_spare(fomoe_device_experts *e, int layer) {
    queue *q = spares_of(e, layer, FOMOE_TIER_VRAM);
    return q->count ? pop(q) : NULL;
}

/* A spare of the host that nobody touches; waits for one unless `or_none`. */
static fomoe_buffer *take_host_spare(fomoe_device_experts *e, int layer, int or_none) {
    queue *q = spares_of(e, layer, FOMOE_TIER_DRAM);
    if (!q->count) return NULL;
    if (or_none && !fomoe_buffer_is_free(&e->copies, q->items[q->first])) return NULL;
    fomoe_buffer *b = pop(q);
    fomoe_buffer_wait(&e->copies, b);
    return b;
}

static fomoe_buffer **slot_of(fomoe_device_experts *e, int layer, int tier, int slot) {
    return &e->slot[layer * FOMOE_TIERS + tier][slot];
}

/* The pieces of a copy of an expert: one where host and device lay it out alike. */
static int pieces_of(const fomoe_device_layer *l, int expert, fomoe_piece *pieces) {
    const uint32_t *offset = l->part_offset + expert * FOMOE_PARTS;
    int count = 0;
    for (int part = 0; part < FOMOE_PARTS; part++) {
        if (count && offset[part] - l->device_offset[part] == offset[part - 1] - l->device_offset[part - 1]) {
            fomoe_piece *last = &pieces[count - 1];
            last->bytes = l->device_offset[part] + l->part_bytes[part] - last->device_offset;
            continue;
        }
        pieces[count++] = (fomoe_piece){offset[part], l->device_offset[part], l->part_bytes[part]};
    }
    return count;
}

static void copy(fomoe_device_experts *e, int layer, int expert, int lane, fomoe_buffer *host, fomoe_buffer *device) {
    fomoe_piece pieces[FOMOE_PARTS];
    int count = pieces_of(&e->layer[layer], expert, pieces);
    fomoe_copy(&e->copies, lane, host, device, pieces, count);
}

/* ---- life ---- */

static int take_memory(fomoe_device_experts *e, int64_t buffers, int64_t slots, int64_t spares) {
    int64_t pairs = e->pairs;
    e->buffers = calloc(buffers + 1, sizeof *e->buffers);
    e->slot = calloc(e->layers * FOMOE_TIERS + 1, sizeof *e->slot);
    e->slot_memory = calloc(slots + 1, sizeof *e->slot_memory);
    e->spare = calloc(e->classes * FOMOE_TIERS + 1, sizeof *e->spare);
    /* every slot's buffer may be spare at some time */
    e->spare_memory = calloc((int64_t)e->classes * FOMOE_TIERS * (slots + spares + 1), sizeof *e->spare_memory);
    e->picks = calloc((int64_t)e->layers * e->max_experts + 1, sizeof *e->picks);
    e->ids = calloc(pairs, sizeof *e->ids);
    e->posted = calloc(pairs, sizeof *e->posted);
    e->wanted = calloc(pairs, sizeof *e->wanted);
    e->index = malloc(e->max_experts * sizeof *e->index);
    e->weight = calloc(pairs, sizeof *e->weight);
    e->placements = calloc(pairs, sizeof *e->placements);
    e->moves = calloc(2 * pairs, sizeof *e->moves);
    e->landing = calloc(pairs, sizeof *e->landing);
    e->record = calloc(pairs, sizeof *e->record);
    e->reads_left = calloc(pairs, sizeof *e->reads_left);
    e->transient = calloc(pairs, sizeof *e->transient);
    return e->buffers && e->slot && e->slot_memory && e->spare && e->spare_memory && e->picks && e->ids && e->posted && e->wanted && e->index &&
           e->weight && e->placements && e->moves && e->landing && e->record && e->reads_left && e->transient;
}

static void share_out(fomoe_device_experts *e, int64_t capacity) {
    fomoe_buffer *next = e->buffers, **slot = e->slot_memory, **spare = e->spare_memory;
    for (int i = 0; i < e->layers * FOMOE_TIERS; i++) {
        const fomoe_device_layer *l = &e->layer[i / FOMOE_TIERS];
        int tier = i % FOMOE_TIERS;
        if (!l->experts) continue;
        e->slot[i] = slot;
        for (int s = 0; s < fomoe_residency_slots(e->residency, i / FOMOE_TIERS, tier); s++, next++) {
            next->address = l->pool[tier] + s * e->class[l->size_class].slot_bytes[tier];
            *slot++ = next;
        }
    }
    for (int i = 0; i < e->classes * FOMOE_TIERS; i++, spare += capacity) {
        const fomoe_size_class *c = &e->class[i / FOMOE_TIERS];
        int tier = i % FOMOE_TIERS;
        e->spare[i] = (queue){.items = spare, .capacity = capacity};
        for (int s = 0; s < c->spares[tier]; s++, next++) {
            next->address = c->spare[tier] + s * c->slot_bytes[tier];
            push(&e->spare[i], next);
        }
    }
}

fomoe_device_experts *fomoe_device_experts_new(int layers, int used, int pairs, const fomoe_device_layer *layer,
                                               int classes, const fomoe_size_class *class, fomoe_residency *residency,
                                               fomoe_reader *reader, const fomoe_device_copies *copies) {
    fomoe_device_experts *e = calloc(1, sizeof *e);
    int64_t slots = 0, spares = 0;
    if (!e) return NULL;
    e->layers = layers, e->used = used, e->pairs = pairs, e->classes = classes;
    e->residency = residency, e->reader = reader, e->copies = *copies;
    e->layer = calloc(layers + 1, sizeof *e->layer);
    e->class = calloc(classes + 1, sizeof *e->class);
    if (!e->layer || !e->class) goto fail;
    memcpy(e->layer, layer, layers * sizeof *layer);
    memcpy(e->class, class, classes * sizeof *class);
    for (int l = 0; l < layers; l++) {
        if (layer[l].experts > e->max_experts) e->max_experts = layer[l].experts;
        for (int t = 0; t < FOMOE_TIERS && layer[l].experts; t++) slots += fomoe_residency_slots(residency, l, t);
    }
    for (int c = 0; c < classes; c++) spares += class[c].spares[0] + class[c].spares[1];
    if (!take_memory(e, slots + spares, slots, spares)) goto fail;
    for (int i = 0; i < e->max_experts; i++) e->index[i] = -1;
    share_out(e, slots + spares + 1);
    e->tables_changed = 1;
    return e;
fail:
    fomoe_device_experts_free(e);
    return NULL;
}

void fomoe_device_experts_free(fomoe_device_experts *e) {
    if (!e) return;
    void *owned[] = {e->layer,  e->class,      e->buffers, (void *)e->slot,    (void *)e->slot_memory, e->spare,
                     e->ids,    e->posted,     e->wanted,  e->index, e->weight,  e->placements,      e->moves,               e->picks,
                     e->reads_left, (void *)e->spare_memory, (void *)e->landing, (void *)e->record, (void *)e->transient};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(e);
}

const fomoe_device_expert_counters *fomoe_device_experts_count(const fomoe_device_experts *e) { return &e->counters; }
const fomoe_device_copies *fomoe_device_experts_copies(const fomoe_device_experts *e) { return &e->copies; }
const int64_t *fomoe_device_experts_picks(const fomoe_device_experts *e) { return e->picks; }

void fomoe_device_experts_failure(const fomoe_device_experts *e, int *layer, int *expert) {
    *layer = e->failed_layer;
    *expert = e->failed_expert;
}

int fomoe_device_experts_tables_changed(fomoe_device_experts *e) {
    int changed = e->tables_changed;
    e->tables_changed = 0;
    return changed;
}

void fomoe_device_experts_settle(fomoe_device_experts *e) { fomoe_lane_wait(&e->copies, FOMOE_LANE_DOWN); }

/* ---- moves between the tiers ---- */

/* Down: the victim's bytes leave the buffer they lie in, and its slot gets a spare one at once. */
static void demote(fomoe_device_experts *e, int layer, const fomoe_move *m, fomoe_buffer *to) {
    fomoe_buffer **place = slot_of(e, layer, FOMOE_TIER_VRAM, m->from_slot), *from = *place;
    *place = take_device_spare(e, layer); /* never none: each demotion gives one back */
    copy(e, layer, m->expert, FOMOE_LANE_DOWN, to, from);
    push(spares_of(e, layer, FOMOE_TIER_VRAM), from);
}

/* Up: from the DRAM slot it leaves.  In an exchange that slot gets a spare buffer, for what comes down. */
static void promote(fomoe_device_experts *e, int layer, const fomoe_move *m, int is_exchange) {
    fomoe_buffer **below = slot_of(e, layer, FOMOE_TIER_DRAM, m->from_slot), *from = *below;
    if (is_exchange) {
        fomoe_buffer *spare = take_host_spare(e, layer, 0);
        demote(e, layer, m + 1, spare);
        *below = spare;
    }
    copy(e, layer, m->expert, FOMOE_LANE_UP, from, *slot_of(e, layer, FOMOE_TIER_VRAM, m->to_slot));
    if (is_exchange) push(spares_of(e, layer, FOMOE_TIER_DRAM), from);
}

static void carry_out(fomoe_device_experts *e, int layer, const fomoe_move *moves, int count) {
    for (int i = 0; i < count; i++) {
        const fomoe_move *m = &moves[i];
        if (m->from_tier == FOMOE_TIER_VRAM) {
            demote(e, layer, m, *slot_of(e, layer, FOMOE_TIER_DRAM, m->to_slot));
            continue;
        }
        int is_exchange = i + 1 < count && moves[i + 1].from_tier == FOMOE_TIER_VRAM &&
                          moves[i + 1].from_slot == m->to_slot && moves[i + 1].to_slot == m->from_slot;
        promote(e, layer, m, is_exchange);
        i += is_exchange;
    }
}

/* ---- reads ---- */

static int add_reads(fomoe_device_experts *e, int layer, int i, uint8_t *target, fomoe_read *reads) {
    const fomoe_device_layer *l = &e->layer[layer];
    int expert = e->ids[i], count = l->extent_count[expert];
    const fomoe_extent *extent = l->extents + expert * FOMOE_PARTS;
    for (int r = 0; r < count; r++, extent++) {
        reads[r] = (fomoe_read){.tag = (uint64_t)i * FOMOE_PARTS + r, .offset = extent->offset, .bytes = extent->bytes,
                                .target = target + extent->slot_offset, .file = extent->file};
        e->counters.nvme_bytes += extent->bytes;
    }
    e->counters.nvme_reads++;
    return count;
}

/* Where the device will find expert i, and where its read lands: its own slot in DRAM, or a spare on the way to VRAM. */
static int start_read(fomoe_device_experts *e, int layer, int i, int or_none) {
    const fomoe_placement *p = &e->placements[i];
    fomoe_read reads[FOMOE_PARTS];
    if (p->tier == FOMOE_TIER_DRAM) {
        e->landing[i] = *slot_of(e, layer, FOMOE_TIER_DRAM, p->slot);
        fomoe_buffer_wait(&e->copies, e->landing[i]);
    } else {
        e->landing[i] = take_host_spare(e, layer, or_none);
        if (!e->landing[i]) return 0;
    }
    e->reads_left[i] = add_reads(e, layer, i, e->landing[i]->address, reads);
    int error = e->reader->submit(e->reader->self, reads, e->reads_left[i]);
    if (!error) return 1;
    fail(e, layer, e->ids[i], error);
    return 0;
}

/* A buffer of the device for an expert that stays in DRAM, until the layer has been computed. */
static fomoe_buffer *take_transient(fomoe_device_experts *e, int layer, int expert) {
    fomoe_buffer *b = take_device_spare(e, layer);
    if (!b) {
        fail(e, layer, expert, -ENOMEM); /* can't be: a run asks for no more picks than there are slots and spares */
        return NULL;
    }
    return e->transient[e->transients++] = b;
}

static void send_up(fomoe_device_experts *e, int layer, int i, fomoe_buffer *from) {
    const fomoe_placement *p = &e->placements[i];
    int is_resident = p->tier == FOMOE_TIER_VRAM;
    if (!is_resident && e->is_warming) return;
    e->record[i] = is_resident ? *slot_of(e, layer, FOMOE_TIER_VRAM, p->slot) : take_transient(e, layer, p->expert);
    if (!e->record[i]) return;
    copy(e, layer, p->expert, FOMOE_LANE_UP, from, e->record[i]);
    if (is_resident) push(spares_of(e, layer, FOMOE_TIER_DRAM), from);
}

static int reap(fomoe_device_experts *e, int layer, int wait) {
    fomoe_completion done[REAP_BATCH];
    uint64_t start = now_ns();
    int count = e->reader->reap(e->reader->self, done, REAP_BATCH, wait);
    if (wait) e->counters.nvme_stall_ns += now_ns() - start;
    if (count < 0) fail(e, layer, -1, count);
    for (int c = 0; c < count; c++) {
        int i = done[c].tag / FOMOE_PARTS;
        if (done[c].error) fail(e, layer, e->ids[i], done[c].error);
        if (--e->reads_left[i] == 0 && !e->error) send_up(e, layer, i, e->landing[i]);
    }
    return count;
}

/* Read every expert of e->placements that is nowhere, and send each up as soon as it has landed. */
static void fetch(fomoe_device_experts *e, int layer) {
    int in_flight = 0, next = 0;
    while (!has_failed(e, layer)) {
        for (; next < e->count; next++) {
            if (e->placements[next].source != FOMOE_TIER_NVME) continue;
            if (!start_read(e, layer, next, in_flight > 0)) break;
            in_flight += e->reads_left[next];
        }
        if (!in_flight) break;
        int got = reap(e, layer, 1);
        if (got <= 0) {
            fail(e, layer, -1, -EIO);
            return;
        }
        in_flight -= got;
    }
    while (in_flight > 0) { /* after a failure: their targets are ours until they have come */
        int got = reap(e, layer, 1);
        if (got <= 0) return;
        in_flight -= got;
    }
}

/* ---- a layer ---- */

static void collect(fomoe_device_experts *e, int layer, int tokens) {
    int64_t *picks = e->picks + (int64_t)layer * e->max_experts;
    int swaps = 0;
    e->count = 0;
    for (int t = 0; t < tokens; t++) {
        const int32_t *wanted = e->wanted + t * e->used, *ids = e->posted + t * e->used;
        fomoe_residency_touch(e->residency, layer, tokens - 1 - t, wanted, e->used);
        for (int k = 0; k < e->used; k++) {
            int id = ids[k];
            picks[wanted[k]]++;
            swaps += id != wanted[k];
            if (e->index[id] < 0) {
                e->index[id] = e->count;
                e->weight[e->count] = 0;
                e->ids[e->count++] = id;
            }
            e->weight[e->index[id]] += id == wanted[k];
        }
    }
    fomoe_residency_substituted(e->residency, swaps);
}

/* The layer's table, as the next run will read it. */
static void rewrite_table(fomoe_device_experts *e, int layer) {
    const fomoe_device_layer *l = &e->layer[layer];
    for (int id = 0; id < l->experts; id++) {
        int32_t slot;
        int tier = fomoe_residency_find(e->residency, layer, id, &slot);
        l->table[id] = tier == FOMOE_TIER_VRAM ? (uint64_t)(uintptr_t)(*slot_of(e, layer, tier, slot))->address
                       : tier == FOMOE_TIER_DRAM ? IN_DRAM
                                                 : 0;
    }
    e->tables_changed = 1;
}

static void bring(fomoe_device_experts *e, int layer) {
    int moves = 0;
    if (fomoe_residency_resolve(e->residency, layer, e->ids, e->weight, e->count, e->placements, e->moves, &moves)) {
        fail(e, layer, e->ids[0], -ENOMEM); /* can't be: a run asks for no more picks than there are slots */
        return;
    }
    carry_out(e, layer, e->moves, moves);
    for (int i = 0; i < e->count; i++) {
        const fomoe_placement *p = &e->placements[i];
        e->record[i] = NULL;
        if (p->source == FOMOE_TIER_NVME) continue;
        if (p->tier == FOMOE_TIER_VRAM)
            e->record[i] = *slot_of(e, layer, FOMOE_TIER_VRAM, p->slot);
        else
            send_up(e, layer, i, *slot_of(e, layer, FOMOE_TIER_DRAM, p->slot));
    }
    fetch(e, layer);
    uint64_t start = now_ns();
    fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    e->counters.copy_stall_ns += now_ns() - start;
    for (int i = 0; i < e->count && e->error; i++)
        if (e->placements[i].source == FOMOE_TIER_NVME) fomoe_residency_drop(e->residency, layer, e->ids[i]);
    fomoe_residency_release(e->residency, layer, e->ids, e->count);
    while (e->transients) push(spares_of(e, layer, FOMOE_TIER_VRAM), e->transient[--e->transients]);
}

static void answer(fomoe_device_experts *e, int layer, uint32_t run, const int32_t *ids, int pairs) {
    const fomoe_device_layer *l = &e->layer[layer];
    uint64_t *records = (uint64_t *)(l->answer + 2);
    for (int pair = 0; pair < pairs; pair++) {
        int i = e->index[ids[pair]];
        int was_here = e->placements[i].source == FOMOE_TIER_VRAM;
        records[pair] = was_here ? 0 : (uint64_t)(uintptr_t)e->record[i]->address;
    }
    __atomic_store_n(l->answer, run, __ATOMIC_RELEASE);
    e->counters.served_layers++;
}

static void serve(fomoe_device_experts *e, int layer, uint32_t run, int tokens) {
    const fomoe_device_layer *l = &e->layer[layer];
    int pairs = tokens * e->used;
    for (int pair = 0; pair < pairs; pair++)
        if (e->posted[pair] >= l->experts || e->wanted[pair] >= l->experts) {
            fail(e, layer, e->posted[pair], -ERANGE);
            return;
        }
    collect(e, layer, tokens);
    bring(e, layer);
    e->counters.layers++;
    if (!has_failed(e, layer) && e->misses) answer(e, layer, run, e->posted, pairs);
    if (e->misses || e->error) rewrite_table(e, layer);
    for (int i = 0; i < e->count; i++) e->index[e->ids[i]] = -1;
}

/* Spin until a word of a post is this run's; notice a device that will never write it. */
static uint32_t wait_for_word(fomoe_device_experts *e, int layer, const uint64_t *word, uint32_t run, void *compute) {
    uint64_t value;
    for (uint32_t spins = 1; (value = __atomic_load_n(word, __ATOMIC_ACQUIRE)) >> 32 != run; spins++) {
        if (spins % SPINS_BETWEEN_QUERIES) continue;
        int code = e->copies.calls.stream_query(compute);
        /* done, and yet it has said nothing */
        if (!code && __atomic_load_n(word, __ATOMIC_ACQUIRE) >> 32 != run) code = -1;
        if (code && code != e->copies.calls.not_ready) {
            fomoe_device_check(&e->copies, code, "hipStreamQuery");
            fail(e, layer, -1, 1);
            return 0;
        }
        sched_yield();
    }
    return (uint32_t)value;
}

static void wait_for_post(fomoe_device_experts *e, int layer, uint32_t run, int tokens, void *compute) {
    const uint64_t *post = e->layer[layer].post;
    uint64_t start = now_ns();
    e->misses = (int)wait_for_word(e, layer, post, run, compute);
    for (int pair = 0; pair < tokens * e->used && !e->error; pair++) {
        uint32_t word = wait_for_word(e, layer, post + 1 + pair, run, compute);
        e->wanted[pair] = word & 0xFFFF;
        e->posted[pair] = word >> 16;
    }
    e->counters.route_wait_ns += now_ns() - start;
}

int fomoe_device_experts_serve(fomoe_device_experts *e, uint32_t run, int tokens, void *compute, volatile uint32_t *stop) {
    e->error = e->copies.error ? 1 : 0;
    fomoe_residency_tick(e->residency, tokens);
    for (int layer = 0; layer < e->layers && !e->error; layer++) {
        if (!e->layer[layer].experts) continue;
        wait_for_post(e, layer, run, tokens, compute);
        if (!e->error) serve(e, layer, run, tokens);
    }
    if (e->error) *stop = 1;
    return e->error;
}

/* ---- warm start ---- */

int fomoe_device_experts_warm(fomoe_device_experts *e, int layer, const int32_t *experts, const double *scores, int count) {
    e->error = e->copies.error ? 1 : 0;
    e->is_warming = 1;
    for (int begin = 0; begin < count && !e->error;) {
        e->count = 0;
        for (; begin < count && e->count < e->pairs; begin++) {
            fomoe_placement p = fomoe_residency_seed(e->residency, layer, experts[begin], scores[begin]);
            if (p.tier == FOMOE_TIER_NVME) continue;
            e->ids[e->count] = experts[begin];
            e->placements[e->count++] = p;
        }
        fetch(e, layer);
        for (int i = 0; i < e->count && e->error; i++) fomoe_residency_drop(e->residency, layer, e->ids[i]);
    }
    e->is_warming = 0;
    fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    has_failed(e, layer);
    rewrite_table(e, layer);
    return e->error;
}
