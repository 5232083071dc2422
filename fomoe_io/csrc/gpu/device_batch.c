#include <errno.h>
#include <string.h>

#include "device_experts_state.h"

/* A wave waits for so many experts while others are read: few enough that the device does not idle, and more than the
 * launch of a wave costs. */
enum { LEAST_WAVE = 8 };

void fomoe_device_batch_begin(fomoe_device_experts *e, int tokens, void *const *compute) {
    fomoe_device_begin(e);
    fomoe_device_settle_offers(e);
    e->is_batch = 1;
    for (int r = 0; r < e->copies.devices; r++) e->copies.lane[FOMOE_LANE_COMPUTE].stream[r] = compute[r];
    fomoe_residency_tick(e->residency, tokens);
}

/* The distinct experts, those of memory first, and each one's pairs in the order. */
static void plan(fomoe_device_experts *e, int layer, const int32_t *picks, int tokens, int32_t *order) {
    int64_t *seen = e->picks + (int64_t)layer * e->max_experts;
    int pairs = tokens * e->used, first = 0;
    for (int t = 0; t < tokens; t++)
        fomoe_residency_touch(e->residency, layer, tokens - 1 - t, picks + t * e->used, e->used);
    fomoe_plan_begin(&e->plan);
    for (int pair = 0; pair < pairs; pair++) {
        seen[picks[pair]]++;
        fomoe_plan_add(&e->plan, picks[pair], 1);
    }
    fomoe_plan_partition(&e->plan, e->residency, layer);
    for (int i = 0; i < e->plan.count; first += e->plan.pairs[i++]) e->first[i] = first;
    for (int pair = 0; pair < pairs; pair++) order[e->first[e->plan.index[picks[pair]]]++] = pair;
    for (int i = 0; i < e->plan.count; i++) e->first[i] -= e->plan.pairs[i];
}

static int slots_of(const fomoe_device_experts *e, int layer) {
    return fomoe_residency_slots(e->residency, layer, FOMOE_TIER_VRAM) +
           fomoe_residency_slots(e->residency, layer, FOMOE_TIER_DRAM);
}

static int end_batch(fomoe_device_experts *e, int layer) {
    fomoe_device_close_layer(e);
    if (e->has_moved || e->error) fomoe_device_rewrite_table(e, layer);
    int error = fomoe_device_has_failed(e, layer);
    if (!error) fomoe_guesses_of_batch(e, e->ahead); /* also where nothing was waited for */
    return error;
}

int fomoe_device_batch_layer(fomoe_device_experts *e, int layer, const int32_t *picks, const float *weights, int tokens,
                             int32_t *order) {
    for (int pair = 0; pair < tokens * e->used; pair++)
        if (picks[pair] < 0 || picks[pair] >= e->layer[layer].experts) {
            fomoe_device_fail(e, layer, picks[pair], -ERANGE);
            return e->error;
        }
    fomoe_device_open_layer(e, layer);
    plan(e, layer, picks, tokens, order);
    fomoe_guesses_expire(e, layer);
    e->ahead = fomoe_device_next_layer(e, layer);
    e->batch_picks = picks, e->order = order, e->tokens = tokens;
    for (int t = 0; t < tokens && e->trace; t++)
        fomoe_trace_picks(e->trace, t, picks + t * e->used, weights + t * e->used);
    int slots = slots_of(e, layer);
    fomoe_device_place(e, layer, e->plan.hits);
    fomoe_device_place(e, layer, e->plan.count < slots ? e->plan.count : slots);
    e->has_moved |= e->plan.hits < e->plan.count;
    e->counters.layers++;
    e->counters.served_layers += e->has_moved;
    e->handed = e->wave_count = 0;
    return e->error ? end_batch(e, layer) : 0;
}

/* The kernels of the last wave have been enqueued: what they read may be overwritten behind them.  Every expert that is
 * done gives its slot to the next one that waits, one at a time and in the plan's order. */
static void end_wave(fomoe_device_experts *e, int layer) {
    uint64_t ticket = e->wave_count ? fomoe_lane_mark(&e->copies, FOMOE_LANE_COMPUTE) : 0;
    for (int k = 0; k < e->wave_count; k++) {
        fomoe_wanted *w = &e->wanted[e->wave[k]];
        w->record->touched[FOMOE_LANE_COMPUTE] = ticket;
        if (w->record->use == FOMOE_BUFFER_LENT) fomoe_device_give_spare(e, layer, FOMOE_TIER_VRAM, w->record);
        w->record = NULL;
    }
    e->wave_count = 0;
    while (!fomoe_device_has_failed(e, layer) && e->released < e->placed &&
           e->wanted[e->released].progress == FOMOE_HANDED) {
        fomoe_device_release(e, layer, e->released + 1);
        if (e->placed < e->plan.count) fomoe_device_place(e, layer, e->placed + 1);
    }
}

static int count_ready(const fomoe_device_experts *e) {
    int count = 0;
    for (int i = e->released; i < e->placed; i++) count += e->wanted[i].progress == FOMOE_SENT;
    return count;
}

static void await_wave(fomoe_device_experts *e, int layer) {
    int least = e->handed ? LEAST_WAVE : 1;
    for (;;) {
        fomoe_device_read_on(e, layer);
        fomoe_device_lift(e, layer);
        if (!e->in_flight || e->error || count_ready(e) >= least) break;
        fomoe_device_reap(e, layer);
    }
    /* can't be without a failure: spares and slots are free when nothing is under way */
    if (!fomoe_device_has_failed(e, layer) && !count_ready(e))
        fomoe_device_fail(e, layer, e->plan.ids[e->released], -ENOMEM);
}

/* Tiles of all that are ready; the kernels go behind the copies that bring them. */
static int take_wave(fomoe_device_experts *e, fomoe_tile *tiles) {
    uint64_t ticket = 0;
    int count = 0;
    for (int i = e->released; i < e->placed; i++) {
        fomoe_wanted *w = &e->wanted[i];
        if (w->progress != FOMOE_SENT) continue;
        uint64_t record = (uint64_t)(uintptr_t)w->record->address;
        for (int first = e->first[i], left = e->plan.pairs[i]; left > 0;
             first += FOMOE_TILE_PAIRS, left -= FOMOE_TILE_PAIRS)
            tiles[count++] = (fomoe_tile){record, first, left < FOMOE_TILE_PAIRS ? left : FOMOE_TILE_PAIRS};
        if (w->record->touched[FOMOE_LANE_UP] > ticket) ticket = w->record->touched[FOMOE_LANE_UP];
        w->progress = FOMOE_HANDED;
        e->wave[e->wave_count++] = i;
    }
    e->handed += e->wave_count;
    fomoe_lane_follow(&e->copies, FOMOE_LANE_COMPUTE, FOMOE_LANE_UP, ticket);
    return count;
}

/* The first who wants an expert finds it where it was, the others where it is computed from. */
static void trace(fomoe_device_experts *e, int layer) {
    for (int i = 0; i < e->plan.count; i++) {
        const fomoe_placement *p = &e->wanted[i].at;
        const int32_t *pair = e->order + e->first[i];
        for (int j = 0; j < e->plan.pairs[i]; j++) e->found[pair[j]] = (int8_t)(j ? p->tier : p->source);
    }
    fomoe_trace_batch(e->trace, layer, e->tokens, (const uint8_t *)e->batch_picks,
                      e->used * (int64_t)sizeof *e->batch_picks, e->found);
}

int fomoe_device_batch_next(fomoe_device_experts *e, int layer, fomoe_tile *tiles, int *count) {
    *count = 0;
    end_wave(e, layer);
    if (!e->error && e->handed < e->plan.count) await_wave(e, layer);
    if (fomoe_device_has_failed(e, layer)) return end_batch(e, layer);
    if (e->handed == e->plan.count) {
        if (e->trace) trace(e, layer);
        return end_batch(e, layer);
    }
    *count = take_wave(e, tiles);
    return fomoe_device_has_failed(e, layer) ? end_batch(e, layer) : 0;
}
