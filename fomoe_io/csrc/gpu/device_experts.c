#include "device_experts.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device_experts_state.h"

enum { SPINS_BETWEEN_QUERIES = 4096 };

/* ---- life ---- */

static int take_memory(fomoe_device_experts *e, int64_t buffers, int64_t slots, int64_t spares) {
    int64_t most = e->most;
    e->buffers = calloc(buffers + 1, sizeof *e->buffers);
    e->slot = calloc(e->layers * FOMOE_TIERS + 1, sizeof *e->slot);
    e->slot_memory = calloc(slots + 1, sizeof *e->slot_memory);
    e->spare = calloc(e->classes * FOMOE_TIERS + 1, sizeof *e->spare);
    /* every slot's buffer may be spare at some time */
    e->spare_memory = calloc((int64_t)e->classes * FOMOE_TIERS * (slots + spares + 1), sizeof *e->spare_memory);
    e->picks = calloc((int64_t)e->layers * e->max_experts + 1, sizeof *e->picks);
    e->version = calloc(e->layers + 1, sizeof *e->version);
    e->brought = calloc(e->layers + 1, sizeof *e->brought);
    e->arrived = calloc(e->layers + 1, sizeof *e->arrived);
    e->ids = calloc(most, sizeof *e->ids);
    e->posted = calloc(e->used, sizeof *e->posted);
    e->wanted = calloc(e->used, sizeof *e->wanted);
    e->index = malloc(e->max_experts * sizeof *e->index);
    e->weight = calloc(most, sizeof *e->weight);
    e->placements = calloc(most, sizeof *e->placements);
    e->moves = calloc(2 * most, sizeof *e->moves);
    e->landing = calloc(most, sizeof *e->landing);
    e->record = calloc(most, sizeof *e->record);
    e->reads_left = calloc(most, sizeof *e->reads_left);
    e->transient = calloc(most, sizeof *e->transient);
    e->batch_ids = calloc(most, sizeof *e->batch_ids);
    e->batch_weight = calloc(most, sizeof *e->batch_weight);
    e->batch_first = calloc(most + 1, sizeof *e->batch_first);
    return e->buffers && e->slot && e->slot_memory && e->spare && e->spare_memory && e->picks && e->ids && e->posted &&
           e->wanted && e->index && e->weight && e->placements && e->moves && e->landing && e->record &&
           e->reads_left && e->transient && e->batch_ids && e->batch_weight && e->batch_first && e->version &&
           e->brought && e->arrived;
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
        e->spare[i] = (fomoe_buffer_queue){.items = spare, .capacity = capacity};
        for (int s = 0; s < c->spares[tier]; s++, next++) {
            next->address = c->spare[tier] + s * c->slot_bytes[tier];
            fomoe_device_push(&e->spare[i], next);
        }
    }
}

fomoe_device_experts *fomoe_device_experts_new(int layers, int used, const fomoe_device_layer *layer,
                                               int classes, const fomoe_size_class *class, fomoe_residency *residency,
                                               fomoe_reader *reader, const fomoe_device_copies *copies) {
    fomoe_device_experts *e = calloc(1, sizeof *e);
    int64_t slots = 0, spares = 0;
    if (!e) return NULL;
    e->layers = layers, e->used = used, e->classes = classes;
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
    e->most = e->max_experts > used ? e->max_experts : used;
    for (int c = 0; c < classes; c++) spares += class[c].spares[0] + class[c].spares[1];
    if (!take_memory(e, slots + spares, slots, spares)) goto fail;
    for (int i = 0; i < e->max_experts; i++) e->index[i] = -1;
    share_out(e, slots + spares + 1);
    for (int l = 0; l < layers; l++) e->version[l] = 1;
    return e;
fail:
    fomoe_device_experts_free(e);
    return NULL;
}

void fomoe_device_experts_free(fomoe_device_experts *e) {
    if (!e) return;
    void *owned[] = {e->layer,           e->class,           e->buffers,         (void *)e->slot,
                     (void *)e->slot_memory, e->spare,       (void *)e->spare_memory, e->picks,
                     e->ids,             e->posted,          e->wanted,          e->index,
                     e->weight,          e->placements,      e->moves,           (void *)e->landing,
                     (void *)e->record,  e->reads_left,      (void *)e->transient, e->batch_ids,
                     e->batch_weight,    e->batch_first,     e->version,         e->brought,
                     e->arrived};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(e);
}

const fomoe_device_expert_counters *fomoe_device_experts_count(const fomoe_device_experts *e) { return &e->counters; }
fomoe_device_copies *fomoe_device_experts_copies(fomoe_device_experts *e) { return &e->copies; }
const int64_t *fomoe_device_experts_picks(const fomoe_device_experts *e) { return e->picks; }

void fomoe_device_experts_failure(const fomoe_device_experts *e, int *layer, int *expert) {
    *layer = e->failed_layer;
    *expert = e->failed_expert;
}

void fomoe_device_experts_changed_tables(fomoe_device_experts *e, uint32_t *changed) {
    for (int l = 0; l < e->layers; l++) {
        e->brought[l] = e->version[l];
        changed[l] = e->version[l] != e->arrived[l];
    }
}

void fomoe_device_experts_tables_arrived(fomoe_device_experts *e) {
    memcpy(e->arrived, e->brought, e->layers * sizeof *e->arrived);
}

void fomoe_device_experts_settle(fomoe_device_experts *e) { fomoe_lane_wait(&e->copies, FOMOE_LANE_DOWN); }

/* ---- a token ---- */

static void collect(fomoe_device_experts *e, int layer) {
    int64_t *picks = e->picks + (int64_t)layer * e->max_experts;
    int swaps = 0;
    e->count = 0;
    fomoe_residency_touch(e->residency, layer, 0, e->wanted, e->used);
    for (int k = 0; k < e->used; k++) {
        int id = e->posted[k];
        picks[e->wanted[k]]++;
        swaps += id != e->wanted[k];
        if (e->index[id] < 0) {
            e->index[id] = e->count;
            e->weight[e->count] = 0;
            e->ids[e->count++] = id;
        }
        e->weight[e->index[id]] += id == e->wanted[k];
    }
    fomoe_residency_substituted(e->residency, swaps);
}

static void answer(fomoe_device_experts *e, int layer, uint32_t run) {
    const fomoe_device_layer *l = &e->layer[layer];
    uint64_t *records = (uint64_t *)(l->answer + 2);
    for (int k = 0; k < e->used; k++) {
        int i = e->index[e->posted[k]];
        int was_here = e->placements[i].source == FOMOE_TIER_VRAM;
        records[k] = was_here ? 0 : (uint64_t)(uintptr_t)e->record[i]->address;
    }
    __atomic_store_n(l->answer, run, __ATOMIC_RELEASE);
    e->counters.served_layers++;
}

static void serve(fomoe_device_experts *e, int layer, uint32_t run) {
    const fomoe_device_layer *l = &e->layer[layer];
    for (int k = 0; k < e->used; k++)
        if (e->posted[k] >= l->experts || e->wanted[k] >= l->experts) {
            fomoe_device_fail(e, layer, e->posted[k], -ERANGE);
            return;
        }
    collect(e, layer);
    fomoe_device_bring(e, layer);
    e->counters.layers++;
    if (!fomoe_device_has_failed(e, layer) && e->misses) answer(e, layer, run);
    if (e->misses || e->error) fomoe_device_rewrite_table(e, layer);
    for (int i = 0; i < e->count; i++) e->index[e->ids[i]] = -1;
}

/* Spin until a word of a post is this run's; notice a device that will never write it, and an interrupt. */
static uint32_t wait_for_word(fomoe_device_experts *e, int layer, const uint64_t *word, uint32_t run, void *compute) {
    fomoe_wait wait = {0};
    uint64_t value;
    for (uint32_t spins = 1; (value = __atomic_load_n(word, __ATOMIC_ACQUIRE)) >> 32 != run; spins++) {
        if (spins % SPINS_BETWEEN_QUERIES) continue;
        int code = e->copies.calls.stream_query(compute);
        /* done, and yet it has said nothing */
        if (!code && __atomic_load_n(word, __ATOMIC_ACQUIRE) >> 32 != run) code = -1;
        if (code && code != e->copies.calls.not_ready)
            fomoe_device_check(&e->copies, code, "hipStreamQuery");
        else if (!fomoe_look_again(e->copies.patience, &wait))
            fomoe_device_check(&e->copies, FOMOE_STUCK, "the next layer's picks");
        if (fomoe_device_has_failed(e, layer)) return 0;
    }
    return (uint32_t)value;
}

static void wait_for_post(fomoe_device_experts *e, int layer, uint32_t run, void *compute) {
    const uint64_t *post = e->layer[layer].post;
    e->misses = (int)wait_for_word(e, layer, post, run, compute);
    for (int k = 0; k < e->used && !e->error; k++) {
        uint32_t word = wait_for_word(e, layer, post + 1 + k, run, compute);
        e->wanted[k] = word & 0xFFFF;
        e->posted[k] = word >> 16;
    }
}

int fomoe_device_experts_serve(fomoe_device_experts *e, uint32_t run, void *compute, volatile uint32_t *stop) {
    e->error = e->copies.error ? 1 : 0;
    fomoe_residency_tick(e->residency, 1);
    for (int layer = 0; layer < e->layers && !e->error; layer++) {
        if (!e->layer[layer].experts) continue;
        wait_for_post(e, layer, run, compute);
        if (!e->error) serve(e, layer, run);
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
        for (; begin < count && e->count < e->most; begin++) {
            fomoe_placement p = fomoe_residency_seed(e->residency, layer, experts[begin], scores[begin]);
            if (p.tier == FOMOE_TIER_NVME) continue;
            e->ids[e->count] = experts[begin];
            e->placements[e->count++] = p;
        }
        fomoe_device_fetch(e, layer);
        for (int i = 0; i < e->count && e->error; i++) fomoe_residency_drop(e->residency, layer, e->ids[i]);
    }
    e->is_warming = 0;
    fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    fomoe_device_has_failed(e, layer);
    fomoe_device_rewrite_table(e, layer);
    return e->error;
}
