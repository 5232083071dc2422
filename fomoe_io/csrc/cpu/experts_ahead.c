/* Lookahead: experts that are read before their layer's router has picked them, into buffers that no slot has.  The
 * residency knows nothing of it: who is picked is a miss, whose slot exchanges its buffer for the one read into. */
#include <assert.h>
#include <errno.h>

#include "experts_state.h"

static uint64_t tag_of(const fomoe_experts *e, const fomoe_staged *s, int read) {
    return FOMOE_AHEAD_TAG | ((uint64_t)(s - e->staged) * FOMOE_PARTS + read);
}

/* How many sizes of slots there are; size: out, [layers]. */
static int slot_sizes(const fomoe_experts *e, int64_t *size) {
    int count = 0;
    for (int l = 0; l < e->shape.layers; l++) {
        int known = 0;
        if (!e->layer[l].experts) continue;
        for (int i = 0; i < count; i++) known |= size[i] == e->layer[l].slot_bytes;
        if (!known) size[count++] = e->layer[l].slot_bytes;
    }
    return count;
}

int fomoe_experts_stage(fomoe_experts *e, uint8_t *pool, int each) {
    int64_t *size = fomoe_own(&e->owned, e->shape.layers, sizeof *size);
    int sizes = size ? slot_sizes(e, size) : 0;
    fomoe_staged *next = e->staged = fomoe_own(&e->owned, (size_t)sizes * each, sizeof *e->staged);
    if (e->owned.is_incomplete) return -1;
    e->staged_count = sizes * each;
    for (int i = 0; i < e->staged_count; i++, next++) {
        *next = (fomoe_staged){.layer = -1, .place = pool, .slot_bytes = size[i / each]};
        pool += next->slot_bytes;
    }
    return 0;
}

const fomoe_recall *fomoe_experts_recall(const fomoe_experts *e) { return e->recall; }

void fomoe_ahead_count(fomoe_experts *e, int layer, const int32_t *picks) {
    if (e->guessed_layer == layer)
        fomoe_recall_count(&e->recall[layer], picks, e->shape.used, e->guesses, e->guess_count);
    e->guessed_layer = -1;
}

static void give_back(fomoe_experts *e, fomoe_staged *s) {
    e->counters.wasted_bytes += s->bytes;
    s->layer = -1;
}

/* Of the batch's experts, the hits come first. */
static int is_missed(const fomoe_experts *e, int32_t expert) {
    for (int i = e->plan.hits; i < e->plan.count; i++)
        if (e->plan.ids[i] == expert) return 1;
    return 0;
}

void fomoe_ahead_expire(fomoe_experts *e, int layer) {
    for (fomoe_staged *s = e->staged; s < e->staged + e->staged_count; s++) {
        int is_wanted = s->layer == layer && !s->has_failed && is_missed(e, s->expert);
        if (s->layer < 0 || s->is_expired || is_wanted) continue;
        s->is_expired = 1;
        for (int r = 0; s->left && r < s->reads; r++) e->reader->cancel(e->reader->self, tag_of(e, s, r));
        if (!s->left) give_back(e, s);
    }
}

static fomoe_staged *unused(fomoe_experts *e, int layer) {
    for (fomoe_staged *s = e->staged; s < e->staged + e->staged_count; s++)
        if (s->layer < 0 && s->slot_bytes == e->layer[layer].slot_bytes) return s;
    return NULL;
}

void fomoe_ahead_begin(fomoe_experts *e, int layer, int32_t expert) {
    const fomoe_expert_layer *l = &e->layer[layer];
    fomoe_read reads[FOMOE_PARTS];
    uint64_t bytes = 0;
    int32_t slot;
    if (fomoe_residency_find(e->residency, layer, expert, &slot) != FOMOE_TIER_NVME) return;
    fomoe_staged *s = unused(e, layer);
    if (!s) return;
    int count = fomoe_expert_reads(l->extents, l->extent_count, expert, 0, s->place, reads, &bytes);
    for (int r = 0; r < count; r++) {
        reads[r].tag = tag_of(e, s, r);
        reads[r].priority = 1;
        s->read_bytes[r] = reads[r].bytes;
    }
    if (e->reader->submit(e->reader->self, reads, count)) return; /* whoever wants it says what is wrong */
    s->layer = layer, s->expert = expert, s->waiter = -1;
    s->reads = s->left = count;
    s->has_failed = s->is_expired = 0;
    s->bytes = 0;
    e->counters.nvme_reads++;
    e->counters.prefetches++;
}

int fomoe_ahead_take(fomoe_experts *e, int layer, int i, uint8_t **slot) {
    for (fomoe_staged *s = e->staged; s < e->staged + e->staged_count; s++) {
        if (s->layer != layer || s->expert != e->plan.ids[i] || s->is_expired || s->has_failed) continue;
        uint8_t *own = *slot;
        e->slot[i] = *slot = s->place;
        s->place = own;
        e->counters.useful++;
        e->counters.late += s->left > 0;
        e->reads_left[i] = s->left;
        s->waiter = i;
        for (int r = 0; s->left && r < s->reads; r++) e->reader->promote(e->reader->self, tag_of(e, s, r));
        if (!s->left) {
            e->ready[e->ready_count++] = i;
            s->layer = -1;
        }
        return 1;
    }
    return 0;
}

int fomoe_ahead_completed(fomoe_experts *e, const fomoe_completion *done) {
    uint64_t number = done->tag & ~FOMOE_AHEAD_TAG;
    fomoe_staged *s = &e->staged[number / FOMOE_PARTS];
    uint32_t bytes = done->error ? 0 : s->read_bytes[number % FOMOE_PARTS];
    assert(s->layer >= 0 && s->left > 0);
    s->left--;
    s->bytes += bytes;
    e->counters.nvme_bytes += bytes;
    e->counters.prefetch_bytes += bytes;
    if (done->error) s->has_failed = 1;
    if (s->left) return -1;
    if (s->is_expired) give_back(e, s);
    if (s->waiter < 0) return -1;
    int i = s->waiter;
    s->layer = s->waiter = -1;
    e->reads_left[i] = 0;
    if (!s->has_failed) e->ready[e->ready_count++] = i;
    return s->has_failed ? i : -1;
}

void fomoe_ahead_review(fomoe_experts *e) {
    enum { REVIEW_AFTER = 512, PAUSE_TOKENS = 4096 };
    if (e->rest) e->rest--;
    uint64_t issued = e->counters.prefetches - e->judged_prefetches, useful = e->counters.useful - e->judged_useful;
    if (issued < REVIEW_AFTER) return;
    if (2 * useful < issued) e->rest = PAUSE_TOKENS;
    e->judged_prefetches = e->counters.prefetches;
    e->judged_useful = e->counters.useful;
}
