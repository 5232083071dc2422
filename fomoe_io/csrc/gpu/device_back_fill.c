#include <errno.h>

#include "device_experts_state.h"

enum { REAP_BATCH = 64 };

/* Back-fill: picks that others stood in for are read when the layer at work has all it waits for, into slots that the
 * policy gives up.  They are resident from the next run on, whatever the drive's speed, because what stands in for what
 * must not depend on it: the same calls at the same points of the text as in csrc/cpu/experts.c. */

void fomoe_device_experts_back_fill(fomoe_device_experts *e, int most) { e->back_fill = most; }

int fomoe_device_reap_aside(fomoe_device_experts *e, int wait) {
    fomoe_completion done[REAP_BATCH];
    int count = e->reader->reap(e->reader->self, done, REAP_BATCH, wait);
    assert(!e->in_flight);
    if (wait && count <= 0) fomoe_device_fail(e, -1, -1, count ? count : -EIO);
    for (int c = 0; c < count; c++) {
        if (done[c].tag & FOMOE_OFFER_TAG) fomoe_offers_completed(&e->offers, &done[c]);
        if (done[c].tag & FOMOE_GUESS_TAG) fomoe_guesses_completed(e, &done[c]);
    }
    return count > 0;
}

/* After a failure, too: what was started is ours only when it has come. */
static void await(fomoe_device_experts *e, int layer) {
    while (fomoe_offers_hurry(&e->offers, layer) && fomoe_device_reap_aside(e, 1)) continue;
}

static void begin(fomoe_device_experts *e, int layer, int expert, uint8_t *target) {
    const fomoe_device_layer *l = &e->layer[layer];
    fomoe_read reads[FOMOE_PARTS];
    int count = fomoe_expert_reads(l->extents, l->extent_count, expert, 0, target, reads, &e->counters.nvme_bytes);
    e->counters.nvme_reads++;
    fomoe_offers_begin(&e->offers, layer, expert, reads, count);
}

/* A slot of VRAM (DRAM has none, or VRAM is not full yet): by way of a spare, which nobody may keep. */
static int bring_up(fomoe_device_experts *e, int layer, const fomoe_placement *p) {
    fomoe_buffer *landing = fomoe_device_take_host_spare(e, layer, 0);
    if (!landing) return 0;
    begin(e, layer, p->expert, landing->address);
    await(e, layer);
    fomoe_device_send(e, layer, p->expert, landing, *fomoe_device_slot(e, layer, p->tier, p->slot), 0, UINT64_MAX);
    fomoe_device_give_spare(e, layer, FOMOE_TIER_DRAM, landing);
    return 1;
}

/* 1 if the policy has a place for it. */
static int read_aside(fomoe_device_experts *e, int layer, int expert) {
    if (!fomoe_offers_room(&e->offers)) return 0;
    fomoe_placement p = fomoe_residency_offer(e->residency, layer, expert, e->used);
    if (p.tier == FOMOE_TIER_NVME) return 0;
    e->has_moved = 1;
    fomoe_buffer *slot = *fomoe_device_slot(e, layer, p.tier, p.slot);
    if (p.tier == FOMOE_TIER_VRAM && bring_up(e, layer, &p)) return 1;
    if (p.tier == FOMOE_TIER_VRAM || !fomoe_buffer_wait(&e->copies, slot)) { /* the device has failed */
        fomoe_residency_drop(e->residency, layer, expert);
        return 0;
    }
    uint64_t bytes = e->counters.nvme_bytes;
    begin(e, layer, expert, slot->address);
    e->counters.back_filled_bytes += e->counters.nvme_bytes - bytes;
    return 1;
}

void fomoe_device_back_fill(fomoe_device_experts *e, int layer) {
    int left = e->back_fill;
    assert(!e->in_flight && !e->transfer_count);
    for (int k = 0; k < e->used && left && !fomoe_device_has_failed(e, layer); k++)
        if (e->posted[k] != e->picked[k]) left -= read_aside(e, layer, e->picked[k]);
}

void fomoe_device_settle_offers(fomoe_device_experts *e) {
    for (int layer = 0; layer < e->layers; layer++) {
        if (!fomoe_offers_has(&e->offers, layer)) continue;
        await(e, layer);
        fomoe_offers_settle(&e->offers, layer);
        fomoe_device_rewrite_table(e, layer);
        fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    }
}
