#include <errno.h>
#include <string.h>

#include "device_experts_state.h"

/* Experts that come in before they are computed with: enough to keep drives and link busy, few enough that the device
 * computes with some while others are read. */
enum { WAVE_EXPERTS = 64 };

void fomoe_device_batch_begin(fomoe_device_experts *e, int tokens) {
    e->error = e->copies.error ? 1 : 0;
    fomoe_residency_tick(e->residency, tokens);
}

/* batch_weight: how many pairs want each expert; batch_first: where they begin in the order. */
static void count_pairs(fomoe_device_experts *e, int layer, const int32_t *picks, int pairs) {
    int64_t *seen = e->picks + (int64_t)layer * e->max_experts;
    int experts = e->layer[layer].experts;
    memset(e->batch_weight, 0, experts * sizeof *e->batch_weight);
    for (int pair = 0; pair < pairs; pair++) {
        e->batch_weight[picks[pair]]++;
        seen[picks[pair]]++;
    }
    e->batch_first[0] = 0;
    for (int id = 0; id < experts; id++) e->batch_first[id + 1] = e->batch_first[id] + e->batch_weight[id];
}

/* The experts by where they are: those in DRAM before the others, who might push them out. */
static void list_experts(fomoe_device_experts *e, int layer) {
    const int8_t *tiers = fomoe_residency_tiers(e->residency, layer);
    e->batch_count = e->batch_next = 0;
    for (int tier = FOMOE_TIER_VRAM; tier <= FOMOE_TIER_NVME; tier++)
        for (int id = 0; id < e->layer[layer].experts; id++)
            if (e->batch_weight[id] && tiers[id] == tier) e->batch_ids[e->batch_count++] = id;
}

int fomoe_device_batch_layer(fomoe_device_experts *e, int layer, const int32_t *picks, int tokens, int32_t *order) {
    int pairs = tokens * e->used;
    for (int pair = 0; pair < pairs; pair++)
        if (picks[pair] < 0 || picks[pair] >= e->layer[layer].experts) {
            fomoe_device_fail(e, layer, picks[pair], -ERANGE);
            return e->error;
        }
    for (int t = 0; t < tokens; t++)
        fomoe_residency_touch(e->residency, layer, tokens - 1 - t, picks + t * e->used, e->used);
    count_pairs(e, layer, picks, pairs);
    list_experts(e, layer);
    for (int pair = 0; pair < pairs; pair++) order[e->batch_first[picks[pair]]++] = pair;
    for (int id = 0; id < e->layer[layer].experts; id++) e->batch_first[id] -= e->batch_weight[id];
    e->counters.layers++;
    return e->error;
}

/* The next experts: all that are in VRAM; then some that are not, no more than have slots there. */
static void take_wave(fomoe_device_experts *e, int layer) {
    const int8_t *tiers = fomoe_residency_tiers(e->residency, layer);
    int is_here = tiers[e->batch_ids[e->batch_next]] == FOMOE_TIER_VRAM;
    int most = fomoe_residency_slots(e->residency, layer, FOMOE_TIER_VRAM);
    if (!is_here && most > WAVE_EXPERTS) most = WAVE_EXPERTS;
    for (e->count = 0; e->batch_next < e->batch_count && e->count < most; e->batch_next++) {
        int id = e->batch_ids[e->batch_next];
        if (is_here && tiers[id] != FOMOE_TIER_VRAM) break;
        e->ids[e->count] = id;
        e->weight[e->count++] = e->batch_weight[id];
    }
    if (!is_here) e->misses = 1;
}

int fomoe_device_batch_next(fomoe_device_experts *e, int layer, void *computed, fomoe_tile *tiles, int *count) {
    *count = 0;
    if (!e->batch_next) e->misses = 0;
    if (e->batch_next == e->batch_count) {
        e->counters.served_layers += e->misses;
        return fomoe_device_has_failed(e, layer);
    }
    take_wave(e, layer);
    if (computed) {
        void *up = e->copies.lane[FOMOE_LANE_UP].stream;
        fomoe_device_check(&e->copies, e->copies.calls.stream_wait_event(up, computed, 0), "hipStreamWaitEvent");
    }
    fomoe_device_bring(e, layer);
    if (e->misses) fomoe_device_rewrite_table(e, layer);
    if (fomoe_device_has_failed(e, layer)) return e->error;
    for (int i = 0; i < e->count; i++) {
        int first = e->batch_first[e->ids[i]], left = e->weight[i];
        for (; left > 0; first += FOMOE_TILE_PAIRS, left -= FOMOE_TILE_PAIRS)
            tiles[(*count)++] = (fomoe_tile){(uint64_t)(uintptr_t)e->record[i]->address, first,
                                             left < FOMOE_TILE_PAIRS ? left : FOMOE_TILE_PAIRS};
    }
    return 0;
}
