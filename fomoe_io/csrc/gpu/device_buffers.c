#include <errno.h>

#include "device_experts_state.h"

/* ---- queues of spares ---- */

static fomoe_buffer_queue *spares_of(fomoe_device_experts *e, int layer, int tier) {
    return &e->spare[e->layer[layer].size_class * FOMOE_TIERS + tier];
}

static void push(fomoe_buffer_queue *q, fomoe_buffer *b) {
    assert(q->count < q->capacity);
    b->use = FOMOE_BUFFER_SPARE;
    q->items[(q->first + q->count++) % q->capacity] = b;
}

static fomoe_buffer *pop(fomoe_buffer_queue *q, int use) {
    fomoe_buffer *b = q->items[q->first];
    assert(q->count > 0 && b->use == FOMOE_BUFFER_SPARE);
    q->first = (q->first + 1) % q->capacity;
    q->count--;
    b->use = use;
    return b;
}

void fomoe_device_give_spare(fomoe_device_experts *e, int layer, int tier, fomoe_buffer *b) {
    assert(b->use != FOMOE_BUFFER_SPARE && b->use != FOMOE_BUFFER_SLOT);
    push(spares_of(e, layer, tier), b);
}

fomoe_buffer *fomoe_device_take_host_spare(fomoe_device_experts *e, int layer, int or_none) {
    fomoe_buffer_queue *q = spares_of(e, layer, FOMOE_TIER_DRAM);
    if (!q->count) return NULL;
    fomoe_buffer *next = q->items[q->first];
    if (or_none && !fomoe_buffer_is_free(&e->copies, next)) return NULL;
    if (next->claims) fomoe_device_start_transfers(e);
    return fomoe_buffer_wait(&e->copies, next) ? pop(q, FOMOE_BUFFER_LANDING) : NULL;
}

/* One is left for a victim, whose own buffer takes its place. */
fomoe_buffer *fomoe_device_borrow(fomoe_device_experts *e, int layer) {
    fomoe_buffer_queue *q = spares_of(e, layer, FOMOE_TIER_VRAM);
    return q->count > 1 ? pop(q, FOMOE_BUFFER_LENT) : NULL;
}

fomoe_buffer *fomoe_device_borrow_ahead(fomoe_device_experts *e, int layer) {
    fomoe_buffer_queue *q = spares_of(e, layer, FOMOE_TIER_VRAM);
    if (!q->count || !fomoe_buffer_is_free(&e->copies, q->items[q->first])) return NULL;
    return pop(q, FOMOE_BUFFER_LENT);
}

/* ---- slots ---- */

fomoe_buffer **fomoe_device_slot(fomoe_device_experts *e, int layer, int tier, int slot) {
    fomoe_buffer **place = &e->slot[layer * FOMOE_TIERS + tier][slot];
    assert(slot >= 0 && slot < fomoe_residency_slots(e->residency, layer, tier));
    assert((*place)->use == FOMOE_BUFFER_SLOT);
    return place;
}

void fomoe_device_exchange(fomoe_device_experts *e, int layer, int tier, int slot, fomoe_buffer *b) {
    fomoe_buffer **place = fomoe_device_slot(e, layer, tier, slot), *own = *place;
    assert(b->use == (tier == FOMOE_TIER_DRAM ? FOMOE_BUFFER_LANDING : FOMOE_BUFFER_LENT));
    b->use = FOMOE_BUFFER_SLOT;
    *place = b;
    push(spares_of(e, layer, tier), own);
}

/* How many buffers there are: of slots; of spares. */
static int64_t count_buffers(const fomoe_device_experts *e, int64_t *spares) {
    int64_t slots = 0;
    *spares = 0;
    for (int l = 0; l < e->layers; l++)
        for (int t = 0; t < FOMOE_TIERS && e->layer[l].experts; t++) slots += fomoe_residency_slots(e->residency, l, t);
    for (int c = 0; c < e->classes; c++) *spares += e->class[c].spares[0] + e->class[c].spares[1];
    return slots;
}

int fomoe_device_share_buffers(fomoe_device_experts *e) {
    int64_t spares, slots = count_buffers(e, &spares), capacity = slots + spares + 1;
    fomoe_buffer *next = e->buffers = fomoe_own(&e->owned, slots + spares, sizeof *e->buffers);
    fomoe_buffer **slot = fomoe_own(&e->owned, slots, sizeof *slot);
    /* every slot's buffer may be spare at some time */
    fomoe_buffer **spare = fomoe_own(&e->owned, e->classes * FOMOE_TIERS * capacity, sizeof *spare);
    e->slot = fomoe_own(&e->owned, e->layers * FOMOE_TIERS, sizeof *e->slot);
    e->spare = fomoe_own(&e->owned, e->classes * FOMOE_TIERS, sizeof *e->spare);
    if (e->owned.is_incomplete) return 0;
    for (int i = 0; i < e->layers * FOMOE_TIERS; i++) {
        const fomoe_device_layer *l = &e->layer[i / FOMOE_TIERS];
        int tier = i % FOMOE_TIERS;
        if (!l->experts) continue;
        e->slot[i] = slot;
        for (int s = 0; s < fomoe_residency_slots(e->residency, i / FOMOE_TIERS, tier); s++, next++) {
            next->address = l->pool[tier] + s * e->class[l->size_class].slot_bytes[tier];
            next->use = FOMOE_BUFFER_SLOT;
            *slot++ = next;
        }
    }
    for (int i = 0; i < e->classes * FOMOE_TIERS; i++, spare += capacity) {
        const fomoe_size_class *c = &e->class[i / FOMOE_TIERS];
        int tier = i % FOMOE_TIERS;
        e->spare[i] = (fomoe_buffer_queue){.items = spare, .capacity = (int)capacity};
        for (int s = 0; s < c->spares[tier]; s++, next++) {
            next->address = c->spare[tier] + s * c->slot_bytes[tier];
            push(&e->spare[i], next);
        }
    }
    return 1;
}

/* ---- copies of experts ---- */

enum { MOST_COPIES = FOMOE_PARTS * FOMOE_MOST_DEVICES }; /* of an expert */

/* The pieces of a copy of an expert to all devices, each of which has an equal share of every part: one piece where
 * host and device lay it out alike. */
static int pieces_of(const fomoe_device_experts *e, int layer, int expert, fomoe_piece *pieces) {
    const fomoe_device_layer *l = &e->layer[layer];
    const uint32_t *offset = l->part_offset + expert * FOMOE_PARTS;
    int count = 0, devices = e->copies.devices;
    for (int i = 0; i < devices * FOMOE_PARTS; i++) {
        int which = i / FOMOE_PARTS, part = i % FOMOE_PARTS;
        size_t bytes = l->part_bytes[part] / devices, from = offset[part] + which * bytes, to = l->device_offset[part];
        fomoe_piece *last = part ? &pieces[count - 1] : NULL;
        if (last && from - to == last->host_offset - last->device_offset)
            last->bytes = to + bytes - last->device_offset;
        else
            pieces[count++] = (fomoe_piece){from, to, bytes, which};
    }
    return count;
}

static void copy_range(fomoe_device_experts *e, int lane, int layer, int expert, fomoe_buffer *host,
                       fomoe_buffer *device, uint64_t begin, uint64_t end) {
    fomoe_piece pieces[MOST_COPIES];
    int count = pieces_of(e, layer, expert, pieces), kept = 0;
    for (int i = 0; i < count; i++) {
        fomoe_piece p = pieces[i];
        uint64_t first = p.host_offset > begin ? p.host_offset : begin, last = p.host_offset + p.bytes;
        if (last > end) last = end;
        if (first < last)
            pieces[kept++] = (fomoe_piece){first, p.device_offset + (first - p.host_offset), last - first, p.which};
    }
    if (kept) fomoe_copy(&e->copies, lane, host, device, pieces, kept);
}

void fomoe_device_send(fomoe_device_experts *e, int layer, int expert, fomoe_buffer *host, fomoe_buffer *device,
                       uint64_t begin, uint64_t end) {
    copy_range(e, FOMOE_LANE_UP, layer, expert, host, device, begin, end);
}

static void list_transfer(fomoe_device_experts *e, int layer, int expert, int lane, fomoe_buffer *host,
                          fomoe_buffer *device, uint64_t begin) {
    if (e->transfer_count == e->most_transfers) fomoe_device_start_transfers(e);
    e->transfers[e->transfer_count++] = (fomoe_transfer){layer, expert, lane, host, device, begin};
    host->claims++;
    device->claims++;
}

void fomoe_device_start_transfers(fomoe_device_experts *e) {
    for (int i = 0; i < e->transfer_count; i++) {
        const fomoe_transfer *t = &e->transfers[i];
        assert(t->host->claims > 0 && t->device->claims > 0);
        copy_range(e, t->lane, t->layer, t->expert, t->host, t->device, t->begin, UINT64_MAX);
        t->host->claims--;
        t->device->claims--;
    }
    e->transfer_count = 0;
}

/* ---- moves between the tiers ---- */

/* Down: the victim's bytes leave the buffer they lie in, and its slot gets a spare one at once.  That one may still be
 * read from or written to: copies to it are ordered behind that. */
static void demote(fomoe_device_experts *e, int layer, const fomoe_move *m, fomoe_buffer *to) {
    fomoe_buffer_queue *spares = spares_of(e, layer, FOMOE_TIER_VRAM);
    fomoe_buffer **place = fomoe_device_slot(e, layer, FOMOE_TIER_VRAM, m->from_slot), *from = *place;
    *place = pop(spares, FOMOE_BUFFER_SLOT); /* never none: see fomoe_device_borrow */
    list_transfer(e, layer, m->expert, FOMOE_LANE_DOWN, to, from, 0);
    push(spares, from);
}

/* Up: from the DRAM slot it leaves.  In an exchange that slot gets a spare buffer, for what comes down. */
static void promote(fomoe_device_experts *e, int layer, const fomoe_move *m, int is_exchange) {
    fomoe_buffer **below = fomoe_device_slot(e, layer, FOMOE_TIER_DRAM, m->from_slot), *from = *below;
    if (is_exchange) {
        fomoe_buffer *spare = fomoe_device_take_host_spare(e, layer, 0);
        if (!spare) return; /* the device has failed: nothing runs on it any more */
        demote(e, layer, m + 1, spare);
        spare->use = FOMOE_BUFFER_SLOT;
        *below = spare;
    }
    fomoe_buffer *record;
    uint64_t begin = 0;
    if (fomoe_ahead_take(e, layer, m->expert, &record, &begin))
        fomoe_device_exchange(e, layer, FOMOE_TIER_VRAM, m->to_slot, record);
    if (begin != UINT64_MAX)
        list_transfer(e, layer, m->expert, FOMOE_LANE_UP, from,
                      *fomoe_device_slot(e, layer, FOMOE_TIER_VRAM, m->to_slot), begin);
    if (!is_exchange) return; /* the slot keeps it, and no one reads into it while the layer is at work */
    if (!fomoe_device_is_in_place(e, layer, m->expert)) {
        push(spares_of(e, layer, FOMOE_TIER_DRAM), from);
        return;
    }
    fomoe_device_rest(e, layer, FOMOE_TIER_DRAM, from);
}

void fomoe_device_rest(fomoe_device_experts *e, int layer, int tier, fomoe_buffer *b) {
    assert(e->resting_count < e->most_resting);
    b->use = FOMOE_BUFFER_RESTING;
    e->resting[e->resting_count++] = (fomoe_resting){layer, tier, b};
}

void fomoe_device_end_rest(fomoe_device_experts *e) {
    while (e->resting_count) {
        const fomoe_resting *r = &e->resting[--e->resting_count];
        fomoe_device_give_spare(e, r->layer, r->tier, r->buffer);
    }
}

int fomoe_device_is_in_place(const fomoe_device_experts *e, int layer, int expert) {
    uint64_t entry = e->layer[layer].words[0].table[expert];
    return !e->is_batch && !e->is_warming && entry > 1 && entry & 1;
}

void fomoe_device_carry_out(fomoe_device_experts *e, int layer, const fomoe_move *moves, int count) {
    for (int i = 0; i < count && !e->copies.error; i++) {
        const fomoe_move *m = &moves[i];
        if (m->from_tier == FOMOE_TIER_VRAM) {
            demote(e, layer, m, *fomoe_device_slot(e, layer, FOMOE_TIER_DRAM, m->to_slot));
            continue;
        }
        int is_exchange = i + 1 < count && moves[i + 1].from_tier == FOMOE_TIER_VRAM &&
                          moves[i + 1].from_slot == m->to_slot && moves[i + 1].to_slot == m->from_slot;
        promote(e, layer, m, is_exchange);
        i += is_exchange;
    }
}
