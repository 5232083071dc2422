#include "../../gpu/kernels/car_rule.h"
#include "device_experts_state.h"

/* ---- tags ---- */

static uint64_t tag_of(const fomoe_device_experts *e, const fomoe_guess *g, int piece) {
    return FOMOE_GUESS_TAG | ((uint64_t)(g - e->guesses) * FOMOE_MOST_PIECES + piece);
}

fomoe_range *fomoe_guesses_ranges(const fomoe_device_experts *e, const fomoe_guess *g) {
    return e->guess_ranges + (g - e->guesses) * FOMOE_MOST_PIECES;
}

/* ---- life ---- */

int fomoe_device_experts_look_ahead(fomoe_device_experts *e, int ranks, int staged, int sent, int in_turn) {
    fomoe_owned *o = &e->owned;
    e->in_turn = in_turn;
    e->ranks = ranks, e->most_staged = staged, e->most_sent = sent, e->guess_count = staged + ranks + e->used;
    for (fomoe_seen_guesses *s = e->seen; s < e->seen + FOMOE_LAYERS_AHEAD; s++)
        *s = (fomoe_seen_guesses){.layer = -1,
                                  .experts = fomoe_own(o, ranks, sizeof *s->experts),
                                  .is_replaced = fomoe_own(o, ranks, sizeof *s->is_replaced)};
    e->guesses = fomoe_own(o, e->guess_count, sizeof *e->guesses);
    e->guess_ranges = fomoe_own(o, (size_t)e->guess_count * FOMOE_MOST_PIECES, sizeof *e->guess_ranges);
    e->recall = fomoe_own(o, e->layers, sizeof *e->recall);
    for (int g = 0; g < e->guess_count && !o->is_incomplete; g++) e->guesses[g].layer = -1;
    return o->is_incomplete ? -1 : 0;
}

const fomoe_recall *fomoe_device_experts_recall(const fomoe_device_experts *e) { return e->recall; }

/* Its buffer is a spare like others again. */
static void give_back(fomoe_device_experts *e, fomoe_guess *g) {
    assert(!g->left && g->taker < 0);
    fomoe_ahead_drop(e, g);
    if (!g->is_resident) {
        fomoe_device_give_spare(e, g->layer, FOMOE_TIER_DRAM, g->landing);
        e->counters.prefetch_wasted_bytes += g->bytes;
        e->staged--;
    }
    g->layer = -1;
}

/* Nobody will want it: what has not begun is not read. */
static void expire(fomoe_device_experts *e, fomoe_guess *g) {
    g->is_expired = 1;
    for (int piece = 0; g->left && piece < g->pieces; piece++)
        if (!(g->back >> piece & 1)) e->reader->cancel(e->reader->self, tag_of(e, g, piece));
    if (!g->left) give_back(e, g);
}

void fomoe_guesses_expire(fomoe_device_experts *e, int layer) {
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++) {
        if (g->layer < 0 || g->is_expired || g->taker >= 0) continue;
        int first = g->is_resident ? 0 : e->plan.hits;
        int is_wanted = g->layer == layer && !g->has_failed && e->plan.index[g->expert] >= first;
        if (g->layer <= layer && !is_wanted) expire(e, g);
    }
}

/* ---- reading ahead ---- */

fomoe_guess *fomoe_guesses_unused(fomoe_device_experts *e) {
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++)
        if (g->layer < 0) return g;
    return NULL;
}

/* Into a spare that nobody needs now, behind all that somebody waits for; an error is whoever wants the expert's.  0:
 * there is no room yet. */
static int read_ahead(fomoe_device_experts *e, int layer, int expert) {
    fomoe_read reads[FOMOE_MOST_PIECES];
    fomoe_guess *g = e->staged < e->most_staged ? fomoe_guesses_unused(e) : NULL;
    fomoe_buffer *landing = g ? fomoe_device_take_host_spare(e, layer, 1) : NULL;
    uint64_t bytes = 0;
    if (!landing) return 0;
    *g = (fomoe_guess){.layer = layer, .expert = expert, .taker = -1, .landing = landing};
    g->pieces = fomoe_device_list_reads(e, layer, expert, landing->address, tag_of(e, g, 0), reads,
                                        fomoe_guesses_ranges(e, g), &bytes);
    for (int r = 0; r < g->pieces; r++) reads[r].priority = !e->is_batch; /* what a batch guesses is wanted for sure */
    e->staged++;
    if (e->reader->submit(e->reader->self, reads, g->pieces)) {
        give_back(e, g);
        return 1;
    }
    g->left = g->pieces;
    e->counters.nvme_reads++;
    e->counters.prefetches++;
    return 1;
}

static int is_guessed(const fomoe_device_experts *e, int layer, int expert) {
    for (const fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++)
        if (g->layer == layer && g->expert == expert && !g->is_expired) return 1;
    return 0;
}

/* Whether the device has said in the run at work what it guesses of this layer. */
static int has_guessed(const fomoe_device_experts *e, fomoe_seen_guesses *s, const uint64_t *words) {
    for (int k = 0; k < e->ranks; k++) {
        uint64_t word = __atomic_load_n(&words[k], __ATOMIC_ACQUIRE);
        if (word >> 32 != e->run) return 0;
        s->experts[k] = (int32_t)(word & ~FOMOE_STANDS_IN);
        s->is_replaced[k] = (word & FOMOE_STANDS_IN) != 0;
    }
    return 1;
}

/* 0: it is to be read, and there is no room yet. */
static int consider(fomoe_device_experts *e, int layer, int32_t expert, int is_next) {
    int32_t slot;
    if (expert < 0 || expert >= e->layer[layer].experts) return 1; /* a device that makes no sense is told later */
    int tier = fomoe_residency_find(e->residency, layer, expert, &slot);
    if (tier == FOMOE_TIER_DRAM && is_next && !is_guessed(e, layer, expert))
        fomoe_ahead_offer(e, layer, expert, *fomoe_device_slot(e, layer, tier, slot));
    return tier != FOMOE_TIER_NVME || is_guessed(e, layer, expert) || read_ahead(e, layer, expert);
}

/* Of what is guessed two layers ahead the likelier half: of the others most would be read in vain. */
static int ranks_of(const fomoe_device_experts *e, int before) { return before ? (e->ranks + 1) / 2 : e->ranks; }

/* Whether all that a layer so far before this one guesses of it has been read, or is not to be. */
static int look(fomoe_device_experts *e, int before, int layer, int may_read) {
    fomoe_seen_guesses *s = &e->seen[before];
    int ranks = ranks_of(e, before), is_next = !before || e->in_turn; /* in turn, all guesses are of the next */
    if (layer >= e->layers || !e->layer[layer].guess[before]) return 1;
    if (s->layer != layer) {
        if (!has_guessed(e, s, e->layer[layer].guess[before])) return 0;
        s->layer = layer;
        s->considered = 0;
    }
    if (!may_read) s->considered = ranks;
    for (; s->considered < ranks; s->considered++)
        if (!s->is_replaced[s->considered] && !consider(e, layer, s->experts[s->considered], is_next)) return 0;
    return 1;
}

void fomoe_guesses_look(fomoe_device_experts *e, int layer, int may_read) {
    if (layer < 0 || !e->ranks) return;
    if (e->in_turn) { /* what this device has guessed of it long ago, until word comes from the other's layer */
        for (int before = FOMOE_LAYERS_AHEAD - 1; before >= 0; before--) look(e, before, layer, may_read);
        return;
    }
    /* the layer after it not right before what this one's picks want of the drive */
    for (int before = 0; before < FOMOE_LAYERS_AHEAD && look(e, before, layer, may_read) && may_read; before++)
        layer = fomoe_device_next_layer(e, layer);
}

void fomoe_guesses_count(fomoe_device_experts *e, int layer) {
    const fomoe_seen_guesses *s = &e->seen[0];
    if (e->ranks && s->layer == layer) fomoe_recall_count(&e->recall[layer], e->picked, e->used, s->experts, e->ranks);
}

/* ---- of a batch ---- */

/* Pairs for each expert of a layer from which on hardly one is wanted by no token: one that is picked as often as
 * others is left out once in e^8 times. */
enum { SURE_PAIRS = 8 };

/* Of what is nowhere, and not on its way, the expert that has been picked most; -1: there is none. */
static int likeliest(const fomoe_device_experts *e, int layer) {
    const int64_t *seen = e->picks + (int64_t)layer * e->max_experts;
    int best = -1;
    for (int id = 0; id < e->layer[layer].experts; id++) {
        int32_t slot;
        if (best >= 0 && seen[id] <= seen[best]) continue;
        if (fomoe_residency_find(e->residency, layer, id, &slot) == FOMOE_TIER_NVME && !is_guessed(e, layer, id))
            best = id;
    }
    return best;
}

void fomoe_guesses_of_batch(fomoe_device_experts *e, int layer) {
    if (layer < 0 || layer >= e->layers) return;
    if ((int64_t)e->tokens * e->used < (int64_t)SURE_PAIRS * e->layer[layer].experts) return;
    while (e->staged < e->most_staged) {
        int expert = likeliest(e, layer), staged = e->staged;
        if (expert < 0 || !read_ahead(e, layer, expert)) return;
        if (e->staged > staged) continue;
        e->ahead = -1; /* refused: not again and again, but by whoever wants it */
        return;
    }
}

/* ---- taking ---- */

/* Its reads are those of wanted expert i from now on. */
static void take(fomoe_device_experts *e, fomoe_guess *g, int i) {
    fomoe_wanted *w = &e->wanted[i];
    w->landing = g->landing;
    fomoe_ahead_hand_over(e, g, w);
    w->progress = FOMOE_READING;
    w->reads_left = g->pieces;
    for (int piece = 0; piece < g->pieces; piece++) {
        w->inputs_left += fomoe_device_holds_inputs(e, g->layer, g->expert, &fomoe_guesses_ranges(e, g)[piece]);
        if (!(g->back >> piece & 1)) e->reader->promote(e->reader->self, tag_of(e, g, piece));
    }
    if (w->at.tier == FOMOE_TIER_DRAM) fomoe_device_exchange(e, g->layer, FOMOE_TIER_DRAM, w->at.slot, g->landing);
    e->in_flight += g->pieces;
    e->staged--;
    e->counters.prefetch_useful++;
    e->counters.prefetch_late += g->left > 0;
    g->taker = i;
}

int fomoe_guesses_take(fomoe_device_experts *e, int layer, int i) {
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++) {
        if (g->layer != layer || g->expert != e->wanted[i].at.expert || g->is_expired || g->has_failed ||
            g->is_resident)
            continue;
        assert(g->taker < 0);
        take(e, g, i);
        return 1;
    }
    return 0;
}

/* What has come for the taker is his. */
static void hand_over(fomoe_device_experts *e, fomoe_guess *g) {
    for (int piece = 0; piece < g->pieces; piece++) {
        uint32_t bit = (uint32_t)1 << piece;
        if (!(g->back & ~g->handed & bit)) continue;
        g->handed |= bit;
        fomoe_device_land(e, g->layer, g->taker, &fomoe_guesses_ranges(e, g)[piece], (g->failed & bit) != 0,
                          (g->sent & bit) != 0);
    }
    if (!g->left) g->layer = -1;
}

void fomoe_guesses_hand_over(fomoe_device_experts *e) {
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++)
        if (g->layer >= 0 && g->taker >= 0) hand_over(e, g);
}

/* ---- completions ---- */

void fomoe_guesses_completed(fomoe_device_experts *e, const fomoe_completion *done) {
    uint64_t number = done->tag & ~FOMOE_GUESS_TAG;
    fomoe_guess *g = &e->guesses[number / FOMOE_MOST_PIECES];
    int piece = (int)(number % FOMOE_MOST_PIECES);
    uint32_t bit = (uint32_t)1 << piece, bytes = done->error ? 0 : fomoe_guesses_ranges(e, g)[piece].bytes;
    assert(g->layer >= 0 && g->left > 0 && !(g->back & bit));
    g->left--;
    g->back |= bit;
    if (done->error) g->failed |= bit, g->has_failed = 1;
    g->bytes += bytes;
    e->counters.nvme_bytes += bytes;
    e->counters.prefetch_bytes += bytes;
    if (g->taker >= 0)
        hand_over(e, g);
    else if (g->is_expired && !g->left)
        give_back(e, g);
}

void fomoe_guesses_reap(fomoe_device_experts *e) {
    assert(e->open_layer < 0);
    if (e->staged || (e->back_fill && fomoe_offers_under_way(&e->offers))) fomoe_device_reap_aside(e, 0);
}

void fomoe_guesses_forget(fomoe_device_experts *e) {
    for (fomoe_seen_guesses *s = e->seen; s < e->seen + FOMOE_LAYERS_AHEAD; s++) s->layer = -1;
    for (fomoe_guess *g = e->guesses; g < e->guesses + e->guess_count; g++)
        if (g->layer >= 0 && g->taker >= 0) g->layer = -1; /* the reader has lost its reads, and with them its buffer */
    fomoe_guesses_expire(e, e->layers);
}
