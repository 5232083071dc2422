#include "device_experts_state.h"

/* ---- what is sent ---- */

/* In pieces as reads come in: a demand's copy waits for no more than one of them. */
void fomoe_ahead_offer(fomoe_device_experts *e, int layer, int expert, fomoe_buffer *slot) {
    fomoe_guess *g = e->most_sent && !fomoe_device_is_in_place(e, layer, expert) ? fomoe_guesses_unused(e) : NULL;
    if (!g) return;
    uint64_t bytes = e->class[e->layer[layer].size_class].slot_bytes[FOMOE_TIER_DRAM];
    uint64_t step = bytes / FOMOE_MOST_PIECES + 1;
    if (step < e->piece_bytes) step = e->piece_bytes;
    *g = (fomoe_guess){.layer = layer, .expert = expert, .taker = -1, .landing = slot, .is_resident = 1};
    for (uint64_t begin = 0; begin < bytes; begin += step) {
        g->back |= (uint32_t)1 << g->pieces;
        fomoe_guesses_ranges(e, g)[g->pieces++] =
            (fomoe_range){(uint32_t)begin, (uint32_t)(bytes - begin < step ? bytes - begin : step)};
    }
}

/* The first piece that has come and has not been sent; -1: none. */
static int next_piece(const fomoe_guess *g) {
    uint32_t ready = g->back & ~g->failed & ~g->sent;
    return ready ? __builtin_ctz(ready) : -1;
}

/* Whether a copy from there waits for nobody. */
static int is_settled(fomoe_device_experts *e, const fomoe_buffer *host) {
    return !host->claims && fomoe_lane_has_done(&e->copies, FOMOE_LANE_DOWN, host->touched[FOMOE_LANE_DOWN]);
}

static fomoe_buffer *record_of(fomoe_device_experts *e, fomoe_guess *g) {
    if (!g->record && e->sent < e->most_sent && (g->record = fomoe_device_borrow_ahead(e, g->layer))) {
        e->sent++;
        e->counters.sent_ahead++;
    }
    return g->record;
}

void fomoe_ahead_send(fomoe_device_experts *e, int layer) {
    if (!e->most_sent || e->is_batch || e->error) return;
    assert(!e->transfer_count);
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++) {
        int piece = next_piece(g);
        if (g->layer != layer || g->is_expired || g->taker >= 0 || g->has_failed || piece < 0) continue;
        if (!fomoe_lane_has_done(&e->copies, FOMOE_LANE_UP, e->copies.lane[FOMOE_LANE_UP].issued)) return;
        if (!is_settled(e, g->landing) || !record_of(e, g)) continue;
        const fomoe_range *r = &fomoe_guesses_ranges(e, g)[piece];
        uint64_t before = e->copies.bytes[FOMOE_LANE_UP];
        fomoe_device_send(e, layer, g->expert, g->landing, g->record, r->begin, (uint64_t)r->begin + r->bytes);
        g->sent_bytes += e->copies.bytes[FOMOE_LANE_UP] - before;
        g->sent |= (uint32_t)1 << piece;
        return;
    }
}

/* ---- what becomes of it ---- */

void fomoe_ahead_drop(fomoe_device_experts *e, fomoe_guess *g) {
    if (!g->record) return;
    e->counters.sent_ahead_wasted_bytes += g->sent_bytes;
    fomoe_device_give_spare(e, g->layer, FOMOE_TIER_VRAM, g->record);
    g->record = NULL;
    e->sent--;
}

/* Its record is somebody's. */
static fomoe_buffer *give_away(fomoe_device_experts *e, fomoe_guess *g) {
    fomoe_buffer *record = g->record;
    g->record = NULL;
    e->sent--;
    e->counters.sent_ahead_useful++;
    return record;
}

int fomoe_ahead_take(fomoe_device_experts *e, int layer, int expert, fomoe_buffer **record, uint64_t *begin) {
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++) {
        if (g->layer != layer || g->expert != expert || g->is_expired || !g->is_resident || !g->record) continue;
        int piece = next_piece(g); /* they went in order */
        *begin = piece < 0 ? UINT64_MAX : fomoe_guesses_ranges(e, g)[piece].begin;
        *record = give_away(e, g);
        g->layer = -1;
        return 1;
    }
    return 0;
}

void fomoe_ahead_hand_over(fomoe_device_experts *e, fomoe_guess *g, fomoe_wanted *w) {
    if (!g->record) return;
    w->record = give_away(e, g);
    if (w->at.tier == FOMOE_TIER_VRAM) fomoe_device_exchange(e, g->layer, FOMOE_TIER_VRAM, w->at.slot, w->record);
}
