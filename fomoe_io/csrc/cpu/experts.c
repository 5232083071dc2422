#include "experts_state.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "experts/routing.h"
#include "math/vector_ops.h"
#include "read/clock.h"

/* Experts computed together.  While misses wait for a free slot, resident experts are done in smaller
 * groups, so that their slots come free and the drive does not idle. */
enum { GROUP_WHILE_MISSES_WAIT = 8, REAP_BATCH = 64 };

static int64_t workspace_rows(const fomoe_experts_shape *s) { return (int64_t)s->batch * s->used; }

int64_t fomoe_experts_workspace_bytes(const fomoe_experts_shape *s) {
    return workspace_rows(s) * (3 * (int64_t)s->hidden + s->columns) * sizeof(float);
}

static int allocate(fomoe_experts *e) {
    const fomoe_experts_shape *s = &e->shape;
    fomoe_owned *o = &e->owned;
    size_t rows = workspace_rows(s), most = e->max_experts;
    e->activation_bytes = (int64_t)s->hidden * sizeof(float); /* enough for any activation type */
    e->gate = fomoe_own(o, rows * s->hidden, sizeof *e->gate);
    e->up = fomoe_own(o, rows * s->hidden, sizeof *e->up);
    e->down = fomoe_own(o, rows * s->columns, sizeof *e->down);
    e->activation = fomoe_own(o, rows, e->activation_bytes);
    e->picks = fomoe_own(o, s->layers * most, sizeof *e->picks);
    e->left = fomoe_own(o, most, sizeof *e->left);
    e->replaced = fomoe_own(o, s->used, sizeof *e->replaced);
    e->first = fomoe_own(o, most + 1, sizeof *e->first);
    e->members = fomoe_own(o, rows, sizeof *e->members);
    e->slot = fomoe_own(o, most, sizeof *e->slot);
    e->source = fomoe_own(o, most, sizeof *e->source);
    e->tier = fomoe_own(o, most, sizeof *e->tier);
    e->done = fomoe_own(o, most, sizeof *e->done);
    e->found = fomoe_own(o, rows, sizeof *e->found);
    e->reads_left = fomoe_own(o, most, sizeof *e->reads_left);
    e->ready = fomoe_own(o, most, sizeof *e->ready);
    e->group = fomoe_own(o, most, sizeof *e->group);
    e->guesses = fomoe_own(o, most, sizeof *e->guesses);
    e->recall = fomoe_own(o, s->layers, sizeof *e->recall);
    e->guess_weights = fomoe_own(o, most, sizeof *e->guess_weights);
    e->guess_replaced = fomoe_own(o, most, sizeof *e->guess_replaced);
    e->placements = fomoe_own(o, most, sizeof *e->placements);
    e->moves = fomoe_own(o, 2 * most, sizeof *e->moves);
    e->reads = fomoe_own(o, FOMOE_PARTS * most, sizeof *e->reads);
    return !o->is_incomplete && !fomoe_plan_new(&e->plan, (int)most);
}

static int allocate_physical(fomoe_experts *e) {
    int64_t total = 0;
    for (int l = 0; l < e->shape.layers; l++) total += e->layer[l].slots;
    e->physical = fomoe_own(&e->owned, (size_t)e->shape.layers * FOMOE_TIERS, sizeof *e->physical);
    uint8_t **table = fomoe_own(&e->owned, total + 1, sizeof *table);
    if (e->owned.is_incomplete) return 0;
    for (int l = 0; l < e->shape.layers; l++) {
        int slot = 0;
        for (int tier = 0; tier < FOMOE_TIERS && e->layer[l].experts; tier++) {
            e->physical[l * FOMOE_TIERS + tier] = table;
            for (int i = fomoe_residency_slots(e->residency, l, tier); i > 0; i--)
                *table++ = e->layer[l].pool + slot++ * e->layer[l].slot_bytes;
        }
    }
    return 1;
}

fomoe_experts *fomoe_experts_new(const fomoe_experts_shape *shape, const fomoe_expert_layer *layer,
                                 fomoe_residency *residency, fomoe_reader *reader) {
    fomoe_experts *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->shape = *shape;
    e->residency = residency;
    e->reader = reader;
    e->first_layer = e->open_layer = e->guessed_layer = -1;
    fomoe_offers_start(&e->offers, residency, reader);
    e->layer = fomoe_own(&e->owned, shape->layers, sizeof *e->layer);
    if (!e->layer) goto fail;
    memcpy(e->layer, layer, shape->layers * sizeof *e->layer);
    for (int l = 0; l < shape->layers; l++) {
        if (layer[l].experts > e->max_experts) e->max_experts = layer[l].experts;
        if (layer[l].experts && e->first_layer < 0) e->first_layer = l;
    }
    if (!allocate(e) || !allocate_physical(e)) goto fail;
    return e;
fail:
    fomoe_experts_free(e);
    return NULL;
}

void fomoe_experts_free(fomoe_experts *e) {
    if (!e) return;
    fomoe_plan_free(&e->plan);
    fomoe_give_back(&e->owned);
    free(e);
}

void fomoe_experts_set_car(fomoe_experts *e, const fomoe_car *car) { e->car = *car; }
void fomoe_experts_set_lookahead(fomoe_experts *e, int ranks) { e->lookahead = ranks; }
const fomoe_expert_counters *fomoe_experts_count(const fomoe_experts *e) { return &e->counters; }
const int64_t *fomoe_experts_picks(const fomoe_experts *e) { return e->picks; }

void fomoe_experts_failure(const fomoe_experts *e, int *layer, int *expert) {
    *layer = e->failed_layer;
    *expert = e->failed_expert;
}

/* ---- residency: slots are exchanged, bytes never move ---- */

static void carry_out(fomoe_experts *e, int layer, const fomoe_move *moves, int count) {
    uint8_t ***physical = e->physical + layer * FOMOE_TIERS;
    for (int i = 0; i < count; i++) {
        const fomoe_move *m = &moves[i];
        uint8_t **a = &physical[m->from_tier][m->from_slot], **b = &physical[m->to_tier][m->to_slot], *swap = *a;
        *a = *b;
        *b = swap;
        /* a swap of two experts comes as a move and its inverse: one exchange does both */
        if (i + 1 < count && moves[i + 1].from_tier == m->to_tier && moves[i + 1].from_slot == m->to_slot &&
            moves[i + 1].to_tier == m->from_tier && moves[i + 1].to_slot == m->from_slot)
            i++;
    }
}

static uint8_t **slot_of(const fomoe_experts *e, int layer, const fomoe_placement *p) {
    assert(p->slot >= 0 && p->slot < fomoe_residency_slots(e->residency, layer, p->tier));
    return &e->physical[layer * FOMOE_TIERS + p->tier][p->slot];
}

static int add_reads(fomoe_experts *e, int layer, int expert, int i, uint8_t *slot, fomoe_read *reads) {
    const fomoe_expert_layer *l = &e->layer[layer];
    e->counters.nvme_reads++;
    return fomoe_expert_reads(l->extents, l->extent_count, expert, i, slot, reads, &e->counters.nvme_bytes);
}

static void fail(fomoe_experts *e, int layer, int i, int error) {
    if (!e->error) {
        e->error = error;
        e->failed_layer = layer;
        e->failed_expert = e->plan.ids[i];
    }
}

/* Find places for experts [begin, end) of the batch and add the reads of those that are not there to e->reads. */
static void place(fomoe_experts *e, int layer, int begin, int end, int *reads) {
    int moves = 0;
    if (begin == end) return;
    if (fomoe_residency_resolve(e->residency, layer, e->plan.ids + begin, e->plan.requests + begin, end - begin,
                                e->placements, e->moves, &moves)) {
        fail(e, layer, begin, -ENOMEM); /* can't be: place() is never asked for more than there is room for */
        return;
    }
    carry_out(e, layer, e->moves, moves);
    for (int i = begin; i < end; i++) {
        const fomoe_placement *p = &e->placements[i - begin];
        uint8_t **slot = slot_of(e, layer, p);
        e->slot[i] = *slot;
        e->source[i] = p->source;
        e->tier[i] = p->tier;
        e->reads_left[i] = 0;
        assert(p->source != FOMOE_TIER_COMING); /* see settle */
        if (p->source != FOMOE_TIER_NVME || fomoe_ahead_take(e, layer, i, slot)) continue;
        e->reads_left[i] = add_reads(e, layer, e->plan.ids[i], i, *slot, e->reads + *reads);
        *reads += e->reads_left[i];
    }
    assert(e->submitted == begin && end <= e->plan.count);
    e->submitted = end;
}

static void submit(fomoe_experts *e, int layer, int begin, int reads) {
    int error = reads ? e->reader->submit(e->reader->self, e->reads, reads) : 0;
    if (error) fail(e, layer, begin, error);
}

/* The first wave: resident experts, then as many misses as there are slots. */
static void place_first(fomoe_experts *e, int layer) {
    int room = e->layer[layer].slots - e->plan.hits, misses = e->plan.count - e->plan.hits, reads = 0;
    place(e, layer, 0, e->plan.hits, &reads);
    if (!e->error) place(e, layer, e->plan.hits, e->plan.hits + (misses < room ? misses : room), &reads);
    submit(e, layer, e->plan.hits, reads);
}

/* Later waves: every expert that is done gives its slot to the next one that waits.  One at a time and in the order
 * of the batch, whatever the order in which reads came back, so that who is evicted does not depend on the drive. */
static void replace_done(fomoe_experts *e, int layer) {
    int begin = e->submitted, reads = 0;
    while (!e->error && e->released < e->submitted && e->done[e->released]) {
        fomoe_residency_release(e->residency, layer, &e->plan.ids[e->released++], 1);
        if (e->submitted < e->plan.count) place(e, layer, e->submitted, e->submitted + 1, &reads);
    }
    submit(e, layer, begin, reads);
}

/* ---- the plan of a layer: thread 0 ---- */

static void count_picks(fomoe_experts *e, int layer, const fomoe_rows *ids, int tokens) {
    int64_t *picks = e->picks + (int64_t)layer * e->max_experts;
    for (int t = 0; t < tokens; t++) {
        const int32_t *row = (const int32_t *)fomoe_row(ids, t);
        fomoe_residency_touch(e->residency, layer, tokens - 1 - t, row, e->shape.used);
        for (int k = 0; k < e->shape.used; k++) picks[row[k]]++;
    }
}

/* Cache-aware routing of one token's `used` picks of a layer, where it is asked for: they and their weights become
 * those of what will be computed, replaced is as in experts/car.h. */
static int substitute(fomoe_experts *e, const fomoe_run *run, const fomoe_router *router, int layer,
                      const float *values, int used, int32_t *ids, float *weights, int32_t *replaced) {
    int asked =
        run->substitute && run->tokens == 1 && e->car.rule != FOMOE_CAR_OFF && run->positions[0] >= e->car.warmup;
    const float *p = NULL;
    memset(replaced, -1, used * sizeof *replaced);
    if (!asked) return 0;
    if (!fomoe_follows_logits(router)) {
        float *scratch = run->scratch[0];
        fomoe_scores(router, values, scratch, scratch + router->experts);
        p = scratch, values = scratch + router->experts;
    }
    return fomoe_car_choose(&e->car, e->layer[layer].experts, used,
                            router->normalise || router->score == FOMOE_SCORE_LOGITS, values, p,
                            fomoe_residency_tiers(e->residency, layer), ids, weights, replaced);
}

/* The distinct experts of the batch: resident ones first. */
static void collect(fomoe_experts *e, int layer, const fomoe_rows *ids, int tokens) {
    fomoe_plan_begin(&e->plan);
    for (int t = 0; t < tokens; t++) {
        const int32_t *row = (const int32_t *)fomoe_row(ids, t);
        for (int k = 0; k < e->shape.used; k++) fomoe_plan_add(&e->plan, row[k], e->replaced[k] < 0);
    }
    fomoe_plan_partition(&e->plan, e->residency, layer);
}

/* members: for every expert the (token, rank) pairs that chose it */
static void list_members(fomoe_experts *e, const fomoe_rows *ids, int tokens) {
    const fomoe_expert_plan *p = &e->plan;
    int used = e->shape.used, total = 0;
    for (int i = 0; i < p->count; i++) {
        e->first[i] = total;
        e->left[i] = p->pairs[i];
        total += p->pairs[i];
    }
    e->first[p->count] = total;
    for (int t = tokens - 1; t >= 0; t--) {
        const int32_t *row = (const int32_t *)fomoe_row(ids, t);
        for (int k = used - 1; k >= 0; k--) {
            int i = p->index[row[k]];
            e->members[e->first[i] + --e->left[i]] = t * used + k;
        }
    }
    fomoe_plan_end(&e->plan);
}

/* Wait until a read has come back; a failure when the watch ends the work before. */
static void await(fomoe_experts *e, int layer, fomoe_watch *watch) {
    int64_t start = fomoe_now_ns();
    int ready = 0, ended = 0;
    while (!ready && !(ended = fomoe_watch_ended(watch))) ready = e->reader->wait(e->reader->self, FOMOE_POLL_MS);
    e->counters.stall_ns += fomoe_now_ns() - start;
    if (ended || ready < 0) fail(e, layer, 0, ended ? -ECANCELED : ready);
}

/* A read ahead has failed, which expert i has taken for its own: what is wrong is said if this fails, too. */
static void read_again(fomoe_experts *e, int layer, int i) {
    e->reads_left[i] = add_reads(e, layer, e->plan.ids[i], i, (uint8_t *)e->slot[i], e->reads);
    submit(e, layer, i, e->reads_left[i]);
}

/* Collect what has come back. */
static void reap(fomoe_experts *e, int layer) {
    fomoe_completion done[REAP_BATCH];
    int count = e->reader->reap(e->reader->self, done, REAP_BATCH, 0);
    if (count < 0) fail(e, layer, 0, count);
    for (int c = 0; c < count; c++) {
        if (done[c].tag & FOMOE_OFFER_TAG) {
            fomoe_offers_completed(&e->offers, &done[c]);
            continue;
        }
        if (done[c].tag & FOMOE_AHEAD_TAG) {
            int again = fomoe_ahead_completed(e, &done[c]);
            if (again >= 0) read_again(e, layer, again);
            continue;
        }
        int i = fomoe_expert_of_tag(done[c].tag);
        assert(i < e->submitted && e->reads_left[i] > 0);
        e->reads_left[i]--;
        if (done[c].error) fail(e, layer, i, done[c].error);
        if (!e->reads_left[i]) e->ready[e->ready_count++] = i;
    }
}

/* Drop the reads of experts [begin, end) of the batch that have not begun, wait for the others. */
static void drain(fomoe_experts *e, int begin, int end) {
    fomoe_completion done[REAP_BATCH];
    int count;
    for (int tag = begin * FOMOE_PARTS; tag < end * FOMOE_PARTS; tag++) e->reader->cancel(e->reader->self, tag);
    while ((count = e->reader->reap(e->reader->self, done, REAP_BATCH, 1)) > 0)
        for (int c = 0; c < count; c++) {
            if (done[c].tag & FOMOE_OFFER_TAG) fomoe_offers_completed(&e->offers, &done[c]);
            if (done[c].tag & FOMOE_AHEAD_TAG) fomoe_ahead_completed(e, &done[c]);
        }
}

void fomoe_experts_abandon(fomoe_experts *e) {
    int layer = e->open_layer;
    if (layer < 0) return;
    e->open_layer = -1;
    drain(e, e->plan.hits, e->submitted);
    fomoe_residency_release(e->residency, layer, e->plan.ids, e->submitted);
    for (int i = e->plan.hits; i < e->submitted; i++) fomoe_residency_drop(e->residency, layer, e->plan.ids[i]);
}

static int looks_ahead(const fomoe_experts *e, const fomoe_run *run) {
    return run->tokens == 1 && e->lookahead && !e->rest;
}

/* Picks of this layer that others stood in for become resident at the same point of the text whatever the drive's
 * speed, because what stands in for what must not depend on it. */
static void settle(fomoe_experts *e, const fomoe_step *step, const fomoe_run *run) {
    int layer = step->as.experts.layer;
    while (fomoe_offers_hurry(&e->offers, layer) && !e->error) {
        await(e, layer, run->watch);
        reap(e, layer);
    }
    fomoe_offers_settle(&e->offers, layer);
}

/* Begin to read an expert that nobody waits for, if the policy has a place for it.  Returns 1 if so. */
static int read_aside(fomoe_experts *e, int layer, int32_t expert) {
    if (!fomoe_offers_room(&e->offers)) return 0;
    fomoe_placement p = fomoe_residency_offer(e->residency, layer, expert, e->shape.used);
    if (p.tier == FOMOE_TIER_NVME) return 0;
    int reads = add_reads(e, layer, expert, 0, *slot_of(e, layer, &p), e->reads);
    fomoe_offers_begin(&e->offers, layer, expert, e->reads, reads);
    return 1;
}

/* Picks that another expert stands in for, best first. */
static void back_fill(fomoe_experts *e, int layer) {
    int left = e->car.backfill;
    for (int k = 0; k < e->shape.used && left; k++)
        if (e->replaced[k] >= 0) left -= read_aside(e, layer, e->replaced[k]);
}

/* What the next layer's router makes of what this layer's experts will be added to. */
void fomoe_step_lookahead(const fomoe_step *step, fomoe_run *run, int thread) {
    fomoe_experts *e = step->as.lookahead.experts;
    const fomoe_matrix *router = &step->as.lookahead.router;
    if (!looks_ahead(e, run)) return;
    float *x = run->scratch[thread], *row = x + router->columns,
          *logits = fomoe_float_row(&step->as.lookahead.logits, 0);
    int64_t begin, end;
    fomoe_rms_norm(router->columns, fomoe_float_row(&step->as.lookahead.input, 0), step->as.lookahead.weight,
                   step->as.lookahead.epsilon, x);
    while (fomoe_take_of(run, thread, &run->next[run->step], router->rows, 32, &begin, &end))
        for (int64_t r = begin; r < end; r++) {
            router->type->to_float(router->data + r * router->row_bytes, row, router->columns);
            fomoe_type_of(run->kernels, 0)->dot(router->columns, &logits[r], 0, row, 0, x, 0, 1);
        }
    fomoe_team_barrier(run->team);
    if (thread || fomoe_failed(run)) return;
    fomoe_router how = step->as.lookahead.how;
    how.used = e->lookahead;
    if (step->as.lookahead.logit_bias) fomoe_add(how.experts, step->as.lookahead.logit_bias, logits);
    fomoe_route_by(&how, logits, run->scratch[0], e->guesses, e->guess_weights);
    int layer = e->guessed_layer = step->as.lookahead.layer;
    e->guess_count = e->lookahead;
    substitute(e, run, &how, layer, logits, e->lookahead, e->guesses, e->guess_weights, e->guess_replaced);
    for (int k = 0; k < e->lookahead; k++)
        if (e->guess_replaced[k] >= 0)
            e->guesses[k] = e->guess_replaced[k]; /* another would stand in for it: it is guessed, but not read */
        else
            fomoe_ahead_begin(e, layer, e->guesses[k]);
}

void fomoe_step_experts_begin(const fomoe_step *step, fomoe_run *run, int thread) {
    fomoe_experts *e = step->as.experts.experts;
    int layer = step->as.experts.layer;
    if (thread) return;
    if (layer == e->first_layer) {
        fomoe_residency_tick(e->residency, run->tokens);
        fomoe_ahead_review(e);
    }
    e->submitted = e->computed = e->released = e->grouped_hits = e->ready_count = e->group_count = e->error = 0;
    e->plan.hits = 0;
    e->open_layer = layer;
    settle(e, step, run);
    count_picks(e, layer, &step->as.experts.ids, run->tokens);
    int swaps = substitute(e, run, &step->as.experts.router, layer, fomoe_float_row(&step->as.experts.logits, 0),
                           e->shape.used, (int32_t *)fomoe_row(&step->as.experts.ids, 0),
                           fomoe_float_row(&step->as.experts.weights, 0), e->replaced);
    fomoe_residency_substituted(e->residency, swaps);
    collect(e, layer, &step->as.experts.ids, run->tokens);
    fomoe_ahead_count(e, layer, (const int32_t *)fomoe_row(&step->as.experts.ids, 0));
    fomoe_ahead_expire(e, layer);
    list_members(e, &step->as.experts.ids, run->tokens);
    memset(e->done, 0, e->plan.count);
    place_first(e, layer);
    if (!e->error) back_fill(e, layer);
    if (e->error) fomoe_fail(run, e->error);
}

/* Of every (token, rank): its expert's first request found it where it was, the others where it is computed from. */
static void trace_batch(fomoe_experts *e, const fomoe_step *step, fomoe_run *run) {
    const fomoe_rows *ids = &step->as.experts.ids;
    for (int i = 0; i < e->plan.count; i++)
        for (int j = e->first[i]; j < e->first[i + 1]; j++)
            e->found[e->members[j]] = j == e->first[i] ? e->source[i] : e->tier[i];
    fomoe_trace_batch(run->trace, step->as.experts.layer, run->tokens, ids->data, ids->stride, e->found);
}

/* Give up the slots of the group that was computed, keep the drive busy, choose what to compute next (or nothing: all
 * is done). */
static void next_group(fomoe_experts *e, const fomoe_step *step, fomoe_run *run) {
    int layer = step->as.experts.layer, computed = e->group_count;
    e->group_count = 0;
    if (fomoe_failed(run)) return;
    for (int g = 0; g < computed; g++) {
        assert(!e->done[e->group[g]] && !e->reads_left[e->group[g]]);
        e->done[e->group[g]] = 1;
    }
    e->computed += computed;
    assert(e->released <= e->computed && e->computed <= e->submitted && e->submitted <= e->plan.count);
    replace_done(e, layer);
    if (e->computed == e->plan.count) {
        if (run->trace) trace_batch(e, step, run);
        e->open_layer = -1;
        return;
    }
    if (e->submitted > e->plan.hits) reap(e, layer);
    while (!e->error && e->grouped_hits == e->plan.hits && !e->ready_count) {
        await(e, layer, run->watch);
        reap(e, layer);
    }
    if (e->error) {
        fomoe_fail(run, e->error);
        return;
    }
    int limit = e->submitted < e->plan.count ? GROUP_WHILE_MISSES_WAIT : e->plan.count;
    while (e->grouped_hits < e->plan.hits && e->group_count < limit) e->group[e->group_count++] = e->grouped_hits++;
    for (int i = 0; i < e->ready_count; i++) e->group[e->group_count++] = e->ready[i];
    e->ready_count = 0;
    e->counters.groups++;
    atomic_store_explicit(&e->next_up, 0, memory_order_relaxed);
    atomic_store_explicit(&e->next_activation, 0, memory_order_relaxed);
    atomic_store_explicit(&e->next_down, 0, memory_order_relaxed);
}

void fomoe_step_experts(const fomoe_step *step, fomoe_run *run, int thread) {
    fomoe_experts *e = step->as.experts.experts;
    for (;;) {
        if (!thread) next_group(e, step, run);
        fomoe_team_barrier(run->team);
        if (!e->group_count) return;
        fomoe_experts_compute_group(e, step, run, thread);
    }
}

/* ---- warm start ---- */

static int by_place(const void *a, const void *b) {
    const fomoe_read *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Slots are given hottest first, reads go through the files in order: in a packed store, whose records lie hottest
 * first, that is one sequential pass. */
int fomoe_experts_warm(fomoe_experts *e, int layer, const int32_t *experts, const double *scores, int count,
                       fomoe_watch *watch) {
    int placed = 0, reads = 0;
    e->error = e->ready_count = 0;
    for (int i = 0; i < count; i++) {
        fomoe_placement p = fomoe_residency_seed(e->residency, layer, experts[i], scores[i]);
        if (p.tier == FOMOE_TIER_NVME) continue;
        e->plan.ids[placed] = experts[i];
        e->reads_left[placed] = add_reads(e, layer, experts[i], placed, *slot_of(e, layer, &p), e->reads + reads);
        reads += e->reads_left[placed++];
    }
    e->submitted = placed;
    if (!reads) return 0;
    qsort(e->reads, reads, sizeof *e->reads, by_place);
    int error = e->reader->submit(e->reader->self, e->reads, reads);
    if (error) fail(e, layer, 0, error);
    while (!e->error && e->ready_count < placed) {
        await(e, layer, watch);
        reap(e, layer);
    }
    if (e->error) drain(e, 0, placed);
    for (int i = 0; i < placed && e->error; i++) fomoe_residency_drop(e->residency, layer, e->plan.ids[i]);
    return e->error;
}
