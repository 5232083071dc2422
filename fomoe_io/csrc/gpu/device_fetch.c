#include <errno.h>

#include "device_experts_state.h"
#include "read/clock.h"

enum { REAP_BATCH = 64, IN_DRAM = 1 /* kernels/router.h */ };

void fomoe_device_fail(fomoe_device_experts *e, int layer, int expert, int error) {
    if (e->error) return;
    e->error = error;
    e->failed_layer = layer;
    e->failed_expert = expert;
}

int fomoe_device_has_failed(fomoe_device_experts *e, int layer) {
    if (e->copies.error) fomoe_device_fail(e, layer, -1, 1);
    if (e->copies.patience->is_interrupted) fomoe_device_fail(e, layer, -1, -EINTR);
    return e->error;
}

/* ---- buffers ---- */

void fomoe_device_push(fomoe_buffer_queue *q, fomoe_buffer *b) { q->items[(q->first + q->count++) % q->capacity] = b; }

static fomoe_buffer *pop(fomoe_buffer_queue *q) {
    fomoe_buffer *b = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->count--;
    return b;
}

static fomoe_buffer_queue *spares_of(fomoe_device_experts *e, int layer, int tier) {
    return &e->spare[e->layer[layer].size_class * FOMOE_TIERS + tier];
}

/* A spare of the device may still be read from or written to: copies to it are ordered behind that. */
static fomoe_buffer *take_device_spare(fomoe_device_experts *e, int layer) {
    fomoe_buffer_queue *q = spares_of(e, layer, FOMOE_TIER_VRAM);
    return q->count ? pop(q) : NULL;
}

/* A spare of the host that nobody touches; waits for one unless `or_none`. */
static fomoe_buffer *take_host_spare(fomoe_device_experts *e, int layer, int or_none) {
    fomoe_buffer_queue *q = spares_of(e, layer, FOMOE_TIER_DRAM);
    if (!q->count) return NULL;
    if (or_none && !fomoe_buffer_is_free(&e->copies, q->items[q->first])) return NULL;
    if (!fomoe_buffer_wait(&e->copies, q->items[q->first])) return NULL;
    return pop(q);
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

/* ---- moves between the tiers ---- */

/* Down: the victim's bytes leave the buffer they lie in, and its slot gets a spare one at once. */
static void demote(fomoe_device_experts *e, int layer, const fomoe_move *m, fomoe_buffer *to) {
    fomoe_buffer **place = slot_of(e, layer, FOMOE_TIER_VRAM, m->from_slot), *from = *place;
    *place = take_device_spare(e, layer); /* never none: each demotion gives one back */
    copy(e, layer, m->expert, FOMOE_LANE_DOWN, to, from);
    fomoe_device_push(spares_of(e, layer, FOMOE_TIER_VRAM), from);
}

/* Up: from the DRAM slot it leaves.  In an exchange that slot gets a spare buffer, for what comes down. */
static void promote(fomoe_device_experts *e, int layer, const fomoe_move *m, int is_exchange) {
    fomoe_buffer **below = slot_of(e, layer, FOMOE_TIER_DRAM, m->from_slot), *from = *below;
    if (is_exchange) {
        fomoe_buffer *spare = take_host_spare(e, layer, 0);
        if (!spare) return; /* the device has failed */
        demote(e, layer, m + 1, spare);
        *below = spare;
    }
    copy(e, layer, m->expert, FOMOE_LANE_UP, from, *slot_of(e, layer, FOMOE_TIER_VRAM, m->to_slot));
    if (is_exchange) fomoe_device_push(spares_of(e, layer, FOMOE_TIER_DRAM), from);
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
    e->counters.nvme_reads++;
    return fomoe_expert_reads(l->extents, l->extent_count, e->ids[i], i, target, reads, &e->counters.nvme_bytes);
}

/* A buffer of the device for an expert that stays in DRAM, until the layer has been computed. */
static fomoe_buffer *take_transient(fomoe_device_experts *e, int layer, int expert) {
    fomoe_buffer *b = take_device_spare(e, layer);
    if (!b) {
        fomoe_device_fail(e, layer, expert, -ENOMEM); /* can't be: a run asks for no more picks than there are slots and spares */
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
    if (is_resident) fomoe_device_push(spares_of(e, layer, FOMOE_TIER_DRAM), from);
}

/* All reads of expert i have come: up with it, or, after a failure, its buffer back to the spares. */
static void landed(fomoe_device_experts *e, int layer, int i) {
    if (!e->error)
        send_up(e, layer, i, e->landing[i]);
    else if (e->placements[i].tier == FOMOE_TIER_VRAM)
        fomoe_device_push(spares_of(e, layer, FOMOE_TIER_DRAM), e->landing[i]);
}

/* Where the device will find expert i, and where its read lands: its own slot in DRAM, or a spare on the way to VRAM. */
static int start_read(fomoe_device_experts *e, int layer, int i, int or_none) {
    const fomoe_placement *p = &e->placements[i];
    fomoe_read reads[FOMOE_PARTS];
    if (p->tier == FOMOE_TIER_DRAM) {
        e->landing[i] = *slot_of(e, layer, FOMOE_TIER_DRAM, p->slot);
        if (!fomoe_buffer_wait(&e->copies, e->landing[i])) return 0;
    } else {
        e->landing[i] = take_host_spare(e, layer, or_none);
        if (!e->landing[i]) return 0;
    }
    e->reads_left[i] = add_reads(e, layer, i, e->landing[i]->address, reads);
    int error = e->reader->submit(e->reader->self, reads, e->reads_left[i]);
    if (!error) return 1;
    fomoe_device_fail(e, layer, e->ids[i], error);
    landed(e, layer, i);
    return 0;
}

static int reap(fomoe_device_experts *e, int layer) {
    fomoe_completion done[REAP_BATCH];
    uint64_t start = fomoe_now_ns();
    int count = e->reader->reap(e->reader->self, done, REAP_BATCH, 1);
    e->counters.nvme_stall_ns += fomoe_now_ns() - start;
    if (count <= 0) fomoe_device_fail(e, layer, -1, count ? count : -EIO);
    for (int c = 0; c < count; c++) {
        int i = fomoe_expert_of_tag(done[c].tag);
        if (done[c].error) fomoe_device_fail(e, layer, e->ids[i], done[c].error);
        if (--e->reads_left[i] == 0) landed(e, layer, i);
    }
    return count;
}

/* Read every expert of e->placements that is nowhere, and send each up as soon as it has landed. */
void fomoe_device_fetch(fomoe_device_experts *e, int layer) {
    int in_flight = 0, next = 0;
    while (next < e->count || in_flight) {
        for (; next < e->count && !fomoe_device_has_failed(e, layer); next++) {
            if (e->placements[next].source != FOMOE_TIER_NVME) continue;
            if (!start_read(e, layer, next, in_flight > 0)) break;
            in_flight += e->reads_left[next];
        }
        if (!in_flight) {
            /* can't be without a failure: every spare is free when nothing is under way */
            if (next < e->count && !fomoe_device_has_failed(e, layer)) fomoe_device_fail(e, layer, e->ids[next], -ENOMEM);
            return;
        }
        /* after a failure, too: what was started is ours only when it has come */
        int got = reap(e, layer);
        if (got <= 0) return;
        in_flight -= got;
    }
}

/* ---- a layer ---- */

/* The layer's table, as the next run will read it. */
void fomoe_device_rewrite_table(fomoe_device_experts *e, int layer) {
    const fomoe_device_layer *l = &e->layer[layer];
    for (int id = 0; id < l->experts; id++) {
        int32_t slot;
        int tier = fomoe_residency_find(e->residency, layer, id, &slot);
        l->table[id] = tier == FOMOE_TIER_VRAM ? (uint64_t)(uintptr_t)(*slot_of(e, layer, tier, slot))->address
                       : tier == FOMOE_TIER_DRAM ? IN_DRAM
                                                 : 0;
    }
    e->version[layer]++;
}

void fomoe_device_bring(fomoe_device_experts *e, int layer) {
    int moves = 0;
    if (fomoe_residency_resolve(e->residency, layer, e->ids, e->weight, e->count, e->placements, e->moves, &moves)) {
        fomoe_device_fail(e, layer, e->ids[0], -ENOMEM); /* can't be: a run asks for no more picks than there are slots */
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
    fomoe_device_fetch(e, layer);
    uint64_t start = fomoe_now_ns();
    fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    e->counters.copy_stall_ns += fomoe_now_ns() - start;
    for (int i = 0; i < e->count && e->error; i++)
        if (e->placements[i].source == FOMOE_TIER_NVME) fomoe_residency_drop(e->residency, layer, e->ids[i]);
    fomoe_residency_release(e->residency, layer, e->ids, e->count);
    while (e->transients) fomoe_device_push(spares_of(e, layer, FOMOE_TIER_VRAM), e->transient[--e->transients]);
}
