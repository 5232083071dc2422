#include <errno.h>
#include <sched.h>

#include "device_experts_state.h"
#include "read/clock.h"

enum {
    REAP_BATCH = 64,
    SPIN_NS =
        1000000, /* who has waited so long for a drive sleeps: a wake-up costs 5 to 20 us, a fast drive's read 500 */
    STEP_BYTES = 65536 /* pieces begin at multiples of this: no drive's block is larger */
};

/* ---- a layer ---- */

void fomoe_device_open_layer(fomoe_device_experts *e, int layer) {
    assert(e->open_layer < 0 && !e->in_flight && !e->transfer_count);
    e->open_layer = layer;
    e->placed = e->released = e->unread = 0;
    e->has_read = e->has_moved = 0;
    e->ahead = -1;
    fomoe_device_end_rest(e); /* the device has got here: it has computed the layer before */
    e->opened_ns = fomoe_now_ns();
}

void fomoe_device_adopt(fomoe_device_experts *e, int layer, const fomoe_placement *p) {
    fomoe_wanted *w = &e->wanted[e->placed];
    assert(layer == e->open_layer && p->expert == e->plan.ids[e->placed]);
    assert(p->source != FOMOE_TIER_COMING); /* offers are settled when a run begins */
    *w = (fomoe_wanted){.at = *p};
    e->placed++;
    e->has_moved |= p->source != FOMOE_TIER_VRAM;
    w->is_in_place = p->source == FOMOE_TIER_DRAM && fomoe_device_is_in_place(e, layer, p->expert);
    if (p->tier == FOMOE_TIER_VRAM) w->record = *fomoe_device_slot(e, layer, FOMOE_TIER_VRAM, p->slot);
    if (p->source == FOMOE_TIER_NVME)
        w->progress = FOMOE_UNREAD;
    else if (p->tier == FOMOE_TIER_VRAM || w->is_in_place)
        w->progress = FOMOE_SENT; /* it was there, or a transfer brings it */
    else {
        w->progress = FOMOE_LANDED;
        w->landing = *fomoe_device_slot(e, layer, FOMOE_TIER_DRAM, p->slot);
        if (fomoe_ahead_take(e, layer, p->expert, &w->record, &w->begin) && w->begin == UINT64_MAX)
            w->progress = FOMOE_SENT;
    }
}

void fomoe_device_place(fomoe_device_experts *e, int layer, int end) {
    int moves = 0, first = e->placed, count = end - first;
    assert(layer == e->open_layer && count >= 0 && end <= e->plan.count);
    if (!count || e->error) return;
    if (fomoe_residency_resolve(e->residency, layer, e->plan.ids + first, e->plan.requests + first, count,
                                e->placements, e->moves, &moves)) {
        fomoe_device_fail(e, layer, e->plan.ids[first],
                          -ENOMEM); /* can't be: no more is asked for than there are slots */
        return;
    }
    fomoe_device_carry_out(e, layer, e->moves, moves);
    for (int i = 0; i < count; i++) fomoe_device_adopt(e, layer, &e->placements[i]);
}

void fomoe_device_release(fomoe_device_experts *e, int layer, int end) {
    assert(layer == e->open_layer && e->released <= end && end <= e->placed);
    fomoe_residency_release(e->residency, layer, e->plan.ids + e->released, end - e->released);
    e->released = end;
}

/* Whether its bytes are where its place is, once all copies are done. */
static int is_whole(const fomoe_wanted *w) {
    return w->progress == FOMOE_LANDED || w->progress == FOMOE_SENT || w->progress == FOMOE_HANDED;
}

void fomoe_device_close_layer(fomoe_device_experts *e) {
    int layer = e->open_layer;
    if (layer < 0) return;
    while (e->in_flight) fomoe_device_reap(e, layer);
    fomoe_device_start_transfers(e);
    for (int i = 0; i < e->placed; i++) {
        fomoe_wanted *w = &e->wanted[i];
        if (!is_whole(w)) fomoe_residency_drop(e->residency, layer, w->at.expert);
        if (w->record && w->record->use == FOMOE_BUFFER_LENT) fomoe_device_rest(e, layer, FOMOE_TIER_VRAM, w->record);
        w->record = NULL;
    }
    fomoe_device_release(e, layer, e->placed);
    fomoe_plan_end(&e->plan);
    e->open_layer = -1;
}

/* ---- reads ---- */

/* The tag of one of an expert's reads, and back. */
static uint64_t tag_of(int i, int piece) { return (uint64_t)i * FOMOE_MOST_PIECES + piece; }
static int expert_of(uint64_t tag) { return (int)(tag / FOMOE_MOST_PIECES); }

static uint32_t piece_bytes_of(const fomoe_device_experts *e, uint64_t expert_bytes) {
    uint64_t least = expert_bytes / (FOMOE_MOST_PIECES - 2 * FOMOE_PARTS) + 1;
    return e->piece_bytes > least ? e->piece_bytes : (uint32_t)least;
}

static int overlap(const fomoe_device_layer *l, int expert, int part, const fomoe_range *r) {
    uint64_t begin = l->part_offset[expert * FOMOE_PARTS + part];
    return r->begin < begin + l->part_bytes[part] && begin < (uint64_t)r->begin + r->bytes;
}

int fomoe_device_holds_inputs(const fomoe_device_experts *e, int layer, int expert, const fomoe_range *r) {
    const fomoe_device_layer *l = &e->layer[layer];
    return overlap(l, expert, FOMOE_GATE, r) || overlap(l, expert, FOMOE_UP, r);
}

int fomoe_device_list_reads(fomoe_device_experts *e, int layer, int expert, uint8_t *target, uint64_t tag,
                            fomoe_read *reads, fomoe_range *ranges, uint64_t *bytes) {
    const fomoe_device_layer *l = &e->layer[layer];
    fomoe_read whole[FOMOE_PARTS];
    uint64_t all = 0;
    int extents = fomoe_expert_reads(l->extents, l->extent_count, expert, 0, target, whole, &all), count = 0;
    uint32_t piece = piece_bytes_of(e, all), unit = e->piece_bytes < STEP_BYTES ? 4096 : STEP_BYTES;
    for (int x = 0; x < extents; x++) {
        uint32_t pieces = (whole[x].bytes + piece / 2) / piece, left = whole[x].bytes;
        uint32_t step = pieces > 1 ? (left / pieces + unit - 1) / unit * unit : left;
        for (uint32_t done = 0; left; done += step) {
            fomoe_read *r = &reads[count];
            *r = whole[x];
            r->tag = tag + count;
            r->offset += done;
            r->target += done;
            r->bytes = left < step ? left : step;
            left -= r->bytes;
            ranges[count++] = (fomoe_range){(uint32_t)(r->target - target), r->bytes};
        }
    }
    assert(count <= FOMOE_MOST_PIECES);
    *bytes += all;
    return count;
}

/* Where the reads of an expert go: its own slot in DRAM, or a spare on the way to VRAM.  NULL: there is no room yet. */
static fomoe_buffer *take_landing(fomoe_device_experts *e, int layer, const fomoe_placement *p, int or_none) {
    if (p->tier == FOMOE_TIER_VRAM) return fomoe_device_take_host_spare(e, layer, or_none);
    fomoe_buffer *slot = *fomoe_device_slot(e, layer, FOMOE_TIER_DRAM, p->slot);
    if (or_none) return fomoe_buffer_is_free(&e->copies, slot) ? slot : NULL;
    if (slot->claims) fomoe_device_start_transfers(e);
    return fomoe_buffer_wait(&e->copies, slot) ? slot : NULL;
}

/* All reads of expert i have come back, or none has begun. */
static void finish_read(fomoe_device_experts *e, int layer, int i) {
    fomoe_wanted *w = &e->wanted[i];
    e->landed_ns = fomoe_now_ns();
    if (w->at.tier == FOMOE_TIER_VRAM) fomoe_device_give_spare(e, layer, FOMOE_TIER_DRAM, w->landing);
    if (e->error) {
        w->progress = FOMOE_LOST;
    } else if (w->is_spoilt) {
        w->progress = FOMOE_UNREAD;
        w->is_spoilt = w->inputs_left = 0;
        if (i < e->unread) e->unread = i;
    } else {
        w->progress = w->record ? FOMOE_SENT : FOMOE_LANDED;
    }
}

/* The reads of expert i, of which somebody waits for each. */
static void list_reads(fomoe_device_experts *e, int layer, int i, fomoe_read *reads) {
    fomoe_wanted *w = &e->wanted[i];
    fomoe_range *ranges = &e->ranges[tag_of(i, 0)];
    w->reads_left = fomoe_device_list_reads(e, layer, w->at.expert, w->landing->address, tag_of(i, 0), reads, ranges,
                                            &e->counters.nvme_bytes);
    for (int r = 0; r < w->reads_left; r++)
        w->inputs_left += fomoe_device_holds_inputs(e, layer, w->at.expert, &ranges[r]);
    e->counters.nvme_reads++;
}

static int start_read(fomoe_device_experts *e, int layer, int i, int or_none) {
    fomoe_wanted *w = &e->wanted[i];
    fomoe_read reads[FOMOE_MOST_PIECES];
    int is_taken = fomoe_guesses_take(e, layer, i);
    if (!is_taken) w->landing = take_landing(e, layer, &w->at, or_none);
    if (!w->landing) return 0;
    /* in a batch what lies in DRAM gets room on the device when it is whole: there is little of that */
    if (w->at.tier == FOMOE_TIER_DRAM && !w->record && !e->is_warming && !e->is_batch)
        w->record = fomoe_device_borrow(e, layer);
    if (is_taken) return 1;
    w->progress = FOMOE_READING;
    list_reads(e, layer, i, reads);
    if (!e->has_read) e->counters.before_reads_ns += fomoe_now_ns() - e->opened_ns;
    e->has_read = 1;
    int error = e->reader->submit(e->reader->self, reads, w->reads_left);
    if (error) {
        fomoe_device_fail(e, layer, w->at.expert, error);
        finish_read(e, layer, i);
        return 0;
    }
    e->in_flight += w->reads_left;
    return 1;
}

/* or_none: do not wait for room, and not for copies that have not been started. */
static void read_on(fomoe_device_experts *e, int layer, int or_none) {
    for (; e->unread < e->placed && !fomoe_device_has_failed(e, layer); e->unread++)
        if (e->wanted[e->unread].progress == FOMOE_UNREAD &&
            !start_read(e, layer, e->unread, or_none || e->in_flight > 0))
            return;
}

void fomoe_device_read_on(fomoe_device_experts *e, int layer) {
    read_on(e, layer, 1);
    fomoe_device_start_transfers(e); /* behind the first reads: their calls take longer than the drive should idle */
    read_on(e, layer, 0);
    fomoe_guesses_hand_over(e);
}

void fomoe_device_lift(fomoe_device_experts *e, int layer) {
    assert(!e->transfer_count);
    for (int i = e->released; i < e->placed && !e->is_warming && !e->error; i++) {
        fomoe_wanted *w = &e->wanted[i];
        if (w->progress != FOMOE_LANDED) continue;
        if (!w->record) w->record = fomoe_device_borrow(e, layer);
        if (!w->record) return;
        fomoe_device_send(e, layer, w->at.expert, w->landing, w->record, w->begin, UINT64_MAX);
        w->progress = FOMOE_SENT;
    }
}

/* Once all of the layer at work is asked for, and has the spares that it needs, the drive may go on with the next's. */
static void look_ahead(fomoe_device_experts *e) {
    if (e->unread < e->placed || e->error) return;
    if (!e->is_batch) {
        fomoe_guesses_look(e, e->ahead, 1);
        fomoe_ahead_send(e, e->ahead);
    } else if (e->placed == e->plan.count)
        fomoe_guesses_of_batch(e, e->ahead);
}

/* Completions: at once, or after some looks, or after a sleep. */
static int wait_for_reads(fomoe_device_experts *e, fomoe_completion *done) {
    uint64_t start = fomoe_now_ns(), now = start;
    int count = e->reader->reap(e->reader->self, done, REAP_BATCH, 0);
    /* who must tell a kernel that a copy has come does not sleep before it has */
    while (!count && !e->copies.error && (now - start < SPIN_NS || e->signal_count)) {
        look_ahead(e);
        sched_yield();
        fomoe_device_pass_on(e);
        count = e->reader->reap(e->reader->self, done, REAP_BATCH, 0);
        now = fomoe_now_ns();
    }
    if (!count) count = e->reader->reap(e->reader->self, done, REAP_BATCH, 1);
    e->counters.nvme_stall_ns += fomoe_now_ns() - start;
    return count;
}

void fomoe_device_land(fomoe_device_experts *e, int layer, int i, const fomoe_range *range, int has_failed,
                       int is_sent) {
    fomoe_wanted *w = &e->wanted[i];
    assert(i < e->placed && w->progress == FOMOE_READING && w->reads_left > 0 && !e->transfer_count);
    e->in_flight--;
    w->inputs_left -= fomoe_device_holds_inputs(e, layer, w->at.expert, range);
    w->is_spoilt |= has_failed;
    if (!e->error && !has_failed && !is_sent && w->record)
        fomoe_device_send(e, layer, w->at.expert, w->landing, w->record, range->begin,
                          (uint64_t)range->begin + range->bytes);
    if (--w->reads_left == 0) finish_read(e, layer, i);
}

void fomoe_device_reap(fomoe_device_experts *e, int layer) {
    fomoe_completion done[REAP_BATCH];
    int count = wait_for_reads(e, done);
    assert(!e->transfer_count && layer == e->open_layer);
    if (count <= 0) { /* the reader has lost them: nothing comes any more */
        fomoe_device_fail(e, layer, -1, count ? count : -EIO);
        e->in_flight = 0;
    }
    for (int c = 0; c < count; c++) {
        int i = expert_of(done[c].tag);
        if (done[c].tag & FOMOE_OFFER_TAG) {
            fomoe_offers_completed(&e->offers, &done[c]);
            continue;
        }
        if (done[c].tag & FOMOE_GUESS_TAG) {
            fomoe_guesses_completed(e, &done[c]);
            continue;
        }
        if (done[c].error) fomoe_device_fail(e, layer, e->wanted[i].at.expert, done[c].error);
        fomoe_device_land(e, layer, i, &e->ranges[done[c].tag], 0, 0);
    }
}

/* After a failure, too: what was started is ours only when it has come. */
void fomoe_device_fetch(fomoe_device_experts *e, int layer) {
    for (;;) {
        fomoe_device_read_on(e, layer);
        fomoe_device_lift(e, layer);
        fomoe_device_answer(e, layer);
        look_ahead(e);
        if (!e->in_flight) break;
        fomoe_device_reap(e, layer);
    }
    /* can't be without a failure: every spare is free when nothing is under way */
    if (e->unread < e->placed && !fomoe_device_has_failed(e, layer))
        fomoe_device_fail(e, layer, e->plan.ids[e->unread], -ENOMEM);
}
