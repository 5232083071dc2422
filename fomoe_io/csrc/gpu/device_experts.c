#include "device_experts.h"

#include <errno.h>
#include <string.h>

#include "device_experts_state.h"
#include "read/clock.h"

enum {
    SPINS_BETWEEN_QUERIES = 4096,
    SPINS_BETWEEN_REAPS = 256,
    /* what comes last of an expert of 7 MB is an eighth of it on its way up (2 MB: 1 to 2 % slower on one and two H200s
     * beside a drive of 14.5 GB/s; 512 KB: exact the same, 3 % slower with cache-aware routing) */
    PIECE_BYTES = 1 << 20,
    IN_DRAM = 1            /* kernels/router.h */
};

/* ---- life ---- */

static int allocate(fomoe_device_experts *e) {
    fomoe_owned *o = &e->owned;
    int most = e->max_experts > e->used ? e->max_experts : e->used;
    e->picks = fomoe_own(o, (size_t)e->layers * e->max_experts, sizeof *e->picks);
    e->version = fomoe_own(o, e->layers, sizeof *e->version);
    e->brought = fomoe_own(o, e->layers, sizeof *e->brought);
    e->arrived = fomoe_own(o, e->layers, sizeof *e->arrived);
    e->is_unsettled = fomoe_own(o, e->layers, sizeof *e->is_unsettled);
    e->most_resting = most + e->used;
    e->resting = fomoe_own(o, e->most_resting, sizeof *e->resting);
    e->picked = fomoe_own(o, e->used, sizeof *e->picked);
    e->posted = fomoe_own(o, e->used, sizeof *e->posted);
    e->place = fomoe_own(o, e->used, sizeof *e->place);
    e->signals = fomoe_own(o, 2 * (size_t)e->used * e->copies.devices, sizeof *e->signals);
    e->pick_weights = fomoe_own(o, e->used, sizeof *e->pick_weights);
    e->wanted = fomoe_own(o, most, sizeof *e->wanted);
    e->ranges = fomoe_own(o, (size_t)most * FOMOE_MOST_PIECES, sizeof *e->ranges);
    e->placements = fomoe_own(o, most, sizeof *e->placements);
    e->moves = fomoe_own(o, 2 * (size_t)most, sizeof *e->moves);
    e->most_transfers = 2 * most;
    e->transfers = fomoe_own(o, e->most_transfers, sizeof *e->transfers);
    e->first = fomoe_own(o, most, sizeof *e->first);
    e->wave = fomoe_own(o, most, sizeof *e->wave);
    return !o->is_incomplete && !fomoe_plan_new(&e->plan, most) && fomoe_device_share_buffers(e);
}

fomoe_device_experts *fomoe_device_experts_new(int layers, int used, const fomoe_device_layer *layer, int classes,
                                               const fomoe_size_class *class, fomoe_residency *residency,
                                               fomoe_reader *reader, const fomoe_device_copies *copies) {
    fomoe_device_experts *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->layers = layers, e->used = used, e->classes = classes;
    e->residency = residency, e->reader = reader, e->copies = *copies;
    e->piece_bytes = PIECE_BYTES;
    e->open_layer = e->ahead = -1;
    fomoe_offers_start(&e->offers, residency, reader);
    e->layer = fomoe_own(&e->owned, layers, sizeof *e->layer);
    e->class = fomoe_own(&e->owned, classes, sizeof *e->class);
    if (e->owned.is_incomplete) goto fail;
    memcpy(e->layer, layer, layers * sizeof *layer);
    memcpy(e->class, class, classes * sizeof *class);
    for (int l = 0; l < layers; l++)
        if (layer[l].experts > e->max_experts) e->max_experts = layer[l].experts;
    if (!allocate(e)) goto fail;
    for (int l = 0; l < layers; l++) e->version[l] = 1;
    return e;
fail:
    fomoe_device_experts_free(e);
    return NULL;
}

void fomoe_device_experts_free(fomoe_device_experts *e) {
    if (!e) return;
    fomoe_plan_free(&e->plan);
    fomoe_give_back(&e->owned);
    free(e);
}

void fomoe_device_experts_set_piece_bytes(fomoe_device_experts *e, uint32_t bytes) { e->piece_bytes = bytes; }

void fomoe_device_experts_signal_by_stream(fomoe_device_experts *e, int by_stream) {
    e->answers_by_stream = by_stream && e->copies.calls.write_value;
}

void fomoe_device_experts_read_in_place(fomoe_device_experts *e, int in_place, int64_t distance) {
    e->reads_in_place = in_place;
    e->distance = distance;
    for (int l = 0; l < e->layers; l++)
        if (e->layer[l].experts) fomoe_device_rewrite_table(e, l);
}

int fomoe_device_experts_set_trace(fomoe_device_experts *e, fomoe_trace *trace, int tokens) {
    e->trace = trace;
    if (trace) e->found = fomoe_own(&e->owned, (size_t)tokens * e->used, sizeof *e->found);
    return e->owned.is_incomplete ? -1 : 0;
}

const fomoe_device_expert_counters *fomoe_device_experts_count(const fomoe_device_experts *e) { return &e->counters; }
fomoe_device_copies *fomoe_device_experts_copies(fomoe_device_experts *e) { return &e->copies; }
const int64_t *fomoe_device_experts_picks(const fomoe_device_experts *e) { return e->picks; }

void fomoe_device_experts_settle(fomoe_device_experts *e) {
    fomoe_device_begin(e);
    fomoe_lane_wait(&e->copies, FOMOE_LANE_DOWN);
}

void fomoe_device_begin(fomoe_device_experts *e) {
    fomoe_device_end_rest(e);
    fomoe_device_close_layer(e); /* a batch's caller may have left in the middle of one */
    e->is_batch = e->is_warming = e->is_answering = e->signal_count = 0;
    e->ahead = -1;
    fomoe_guesses_forget(e);
    e->error = e->copies.error ? 1 : 0;
}

/* ---- failures ---- */

void fomoe_device_fail(fomoe_device_experts *e, int layer, int expert, int error) {
    if (e->error) return;
    e->error = error;
    e->failed_layer = layer;
    e->failed_expert = expert;
}

int fomoe_device_has_failed(fomoe_device_experts *e, int layer) {
    if (e->copies.error) fomoe_device_fail(e, layer, -1, 1);
    if (e->copies.patience->is_interrupted) fomoe_device_fail(e, layer, -1, -ECANCELED);
    return e->error;
}

void fomoe_device_experts_failure(const fomoe_device_experts *e, int *layer, int *expert) {
    *layer = e->failed_layer;
    *expert = e->failed_expert;
}

/* ---- tables ---- */

/* An expert in DRAM: with an address where kernels may read it, once its bytes have come. */
static uint64_t dram_entry(fomoe_device_experts *e, int layer, int id, const fomoe_buffer *b) {
    const fomoe_device_layer *l = &e->layer[layer];
    uint32_t begin = l->part_offset[id * FOMOE_PARTS];
    if (!e->reads_in_place || !l->is_alike || begin % 16) return IN_DRAM;
    if (b->claims || !fomoe_lane_has_done(&e->copies, FOMOE_LANE_DOWN, b->touched[FOMOE_LANE_DOWN])) {
        e->is_unsettled[layer] = 1;
        return IN_DRAM;
    }
    return ((uint64_t)(uintptr_t)b->address + e->distance + begin - l->device_offset[0]) | IN_DRAM;
}

void fomoe_device_rewrite_table(fomoe_device_experts *e, int layer) {
    const fomoe_device_layer *l = &e->layer[layer];
    e->is_unsettled[layer] = 0;
    for (int id = 0; id < l->experts; id++) {
        int32_t slot;
        int tier = fomoe_residency_find(e->residency, layer, id, &slot);
        const fomoe_buffer *b = tier == FOMOE_TIER_NVME ? NULL : *fomoe_device_slot(e, layer, tier, slot);
        uint64_t below = tier == FOMOE_TIER_DRAM ? dram_entry(e, layer, id, b) : 0;
        for (int r = 0; r < e->copies.devices; r++)
            l->words[r].table[id] =
                tier == FOMOE_TIER_VRAM ? (uint64_t)(uintptr_t)b->address + e->copies.distance[r] : below;
    }
    e->version[layer]++;
}

void fomoe_device_experts_changed_tables(fomoe_device_experts *e, uint32_t *changed) {
    fomoe_device_begin(e);
    fomoe_device_settle_offers(e);
    for (int l = 0; l < e->layers; l++) {
        if (e->is_unsettled[l]) fomoe_device_rewrite_table(e, l);
        e->brought[l] = e->version[l];
        changed[l] = e->version[l] != e->arrived[l];
    }
}

void fomoe_device_experts_tables_arrived(fomoe_device_experts *e) {
    memcpy(e->arrived, e->brought, e->layers * sizeof *e->arrived);
}

/* ---- a token ---- */

/* The distinct experts, those of memory first; what the router picked is counted, whatever is computed. */
static void plan(fomoe_device_experts *e, int layer) {
    int64_t *seen = e->picks + (int64_t)layer * e->max_experts;
    int swaps = 0;
    fomoe_residency_touch(e->residency, layer, 0, e->picked, e->used);
    fomoe_plan_begin(&e->plan);
    for (int k = 0; k < e->used; k++) {
        int is_pick = e->posted[k] == e->picked[k];
        seen[e->picked[k]]++;
        swaps += !is_pick;
        fomoe_plan_add(&e->plan, e->posted[k], is_pick);
    }
    fomoe_residency_substituted(e->residency, swaps);
    fomoe_plan_partition(&e->plan, e->residency, layer);
    for (int k = 0; k < e->used; k++) e->place[k] = e->plan.index[e->posted[k]];
}

static void trace(fomoe_device_experts *e, int layer) {
    fomoe_trace_picks(e->trace, 0, e->picked, e->pick_weights);
    for (int k = 0; k < e->used; k++) e->found[k] = (int8_t)e->wanted[e->place[k]].at.source;
    fomoe_trace_batch(e->trace, layer, 1, (const uint8_t *)e->posted, 0, e->found);
}

static int is_in_range(const fomoe_device_experts *e, int layer) {
    for (int k = 0; k < e->used; k++)
        if (e->posted[k] >= e->layer[layer].experts || e->picked[k] >= e->layer[layer].experts) return 0;
    return 1;
}

/* Where the time of a layer with misses went: what was not waited for is the host's own work. */
static void count_time(fomoe_device_experts *e, uint64_t read_stall_ns) {
    fomoe_device_expert_counters *c = &e->counters;
    uint64_t start = fomoe_now_ns();
    /* not for what is sent ahead behind them */
    for (; e->signal_count && !e->copies.error; fomoe_device_pass_on(e))
        fomoe_lane_wait_for(&e->copies, FOMOE_LANE_UP, e->signals[0].ticket);
    uint64_t now = fomoe_now_ns();
    c->copy_stall_ns += now - start;
    c->host_ns += start - e->opened_ns - (c->nvme_stall_ns - read_stall_ns);
    c->misses += e->misses;
    if (e->has_read) c->after_reads_ns += now - e->landed_ns;
}

int fomoe_device_next_layer(const fomoe_device_experts *e, int layer) {
    do layer++;
    while (layer < e->layers && !e->layer[layer].experts);
    return layer;
}

static void serve(fomoe_device_experts *e, int layer) {
    if (!is_in_range(e, layer)) {
        fomoe_device_fail(e, layer, e->posted[0], -ERANGE);
        return;
    }
    uint64_t read_stall_ns = e->counters.nvme_stall_ns;
    fomoe_device_open_layer(e, layer);
    e->is_answering = e->misses > 0;
    plan(e, layer);
    fomoe_guesses_count(e, layer);
    fomoe_guesses_expire(e, layer);
    fomoe_device_place(e, layer, e->plan.hits);
    fomoe_device_answer(e, layer); /* what has been sent ahead is there already */
    fomoe_device_place(e, layer, e->plan.count);
    e->ahead = fomoe_device_next_layer(e, layer);
    fomoe_device_fetch(e, layer);
    if (!e->error) fomoe_device_back_fill(e, layer);
    e->counters.layers++;
    if (e->trace && !e->error) trace(e, layer);
    if (e->misses) {
        e->counters.served_layers++;
        count_time(e, read_stall_ns);
        fomoe_device_has_failed(e, layer);
    }
    fomoe_device_close_layer(e);
    if (e->has_moved || e->error) fomoe_device_rewrite_table(e, layer);
}

/* Spin until a word of a post is this run's; notice a device that will never write it, and an interrupt. */
static uint32_t wait_for_word(fomoe_device_experts *e, int layer, const uint64_t *word, uint32_t run,
                              void *const *compute) {
    fomoe_wait wait = {0};
    uint64_t value;
    for (uint32_t spins = 1; (value = __atomic_load_n(word, __ATOMIC_ACQUIRE)) >> 32 != run; spins++) {
        fomoe_guesses_look(e, layer, 1);
        if (spins % SPINS_BETWEEN_REAPS == 0) {
            fomoe_guesses_reap(e);
            fomoe_ahead_send(e, layer);
        }
        if (spins % SPINS_BETWEEN_QUERIES) continue;
        int code = fomoe_streams_query(&e->copies, compute);
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

static void wait_for_post(fomoe_device_experts *e, int layer, uint32_t run, void *const *compute) {
    const uint64_t *post = e->layer[layer].post;
    e->misses = (int)wait_for_word(e, layer, post, run, compute);
    fomoe_guesses_look(e, layer, 0);
    for (int k = 0; k < e->used && !e->error; k++) {
        uint32_t word = wait_for_word(e, layer, post + 1 + k, run, compute);
        e->picked[k] = word & 0xFFFF;
        e->posted[k] = word >> 16;
    }
    for (int k = 0; k < e->used && e->trace && !e->error; k++) {
        uint32_t word = wait_for_word(e, layer, post + 1 + e->used + k, run, compute);
        memcpy(&e->pick_weights[k], &word, sizeof word);
    }
}

int fomoe_device_experts_serve(fomoe_device_experts *e, uint32_t run, void *const *compute,
                               volatile uint32_t *const *stop) {
    fomoe_device_begin(e);
    e->run = run;
    fomoe_residency_tick(e->residency, 1);
    for (int layer = 0; layer < e->layers && !e->error; layer++) {
        if (!e->layer[layer].experts) continue;
        uint64_t start = fomoe_now_ns();
        wait_for_post(e, layer, run, compute);
        e->counters.post_stall_ns += fomoe_now_ns() - start;
        if (!e->error) serve(e, layer);
    }
    for (int r = 0; e->error && r < e->copies.devices; r++) *stop[r] = 1;
    return e->error;
}

/* ---- warm start ---- */

int fomoe_device_experts_warm(fomoe_device_experts *e, int layer, const int32_t *experts, const double *scores,
                              int count) {
    fomoe_device_begin(e);
    fomoe_device_settle_offers(e);
    fomoe_device_open_layer(e, layer);
    e->is_warming = 1;
    fomoe_plan_begin(&e->plan);
    for (int i = 0; i < count; i++) {
        fomoe_placement p = fomoe_residency_seed(e->residency, layer, experts[i], scores[i]);
        if (p.tier == FOMOE_TIER_NVME) continue;
        fomoe_plan_add(&e->plan, p.expert, 1);
        fomoe_device_adopt(e, layer, &p);
    }
    fomoe_device_fetch(e, layer);
    fomoe_lane_wait(&e->copies, FOMOE_LANE_UP);
    fomoe_device_has_failed(e, layer);
    fomoe_device_close_layer(e);
    fomoe_device_rewrite_table(e, layer);
    return e->error;
}
