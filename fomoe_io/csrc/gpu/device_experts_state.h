/* What the files behind device_experts.h share.
 *
 *     device_experts.c   life, the conversation of a token
 *     device_batch.c     the batches of a prompt
 *     device_answers.c   what a waiting kernel is told
 *     device_fetch.c     experts brought: placed, read, sent up
 *     device_back_fill.c picks read that others stood in for
 *     device_guesses.c   experts read before anybody has asked for them
 *     device_ahead.c     and sent up
 *     device_buffers.c   slots, spares, and the moves between the tiers */
#ifndef FOMOE_DEVICE_EXPERTS_STATE_H
#define FOMOE_DEVICE_EXPERTS_STATE_H

#include <assert.h>

#include "device_experts.h"
#include "experts/expert_plan.h"
#include "experts/offers.h"
#include "experts/owned.h"

enum { FOMOE_MOST_PIECES = 32 }; /* reads of an expert */

/* Tags of reads ahead.  Those of offers are FOMOE_OFFER_TAG; the others are of experts that somebody waits for. */
#define FOMOE_GUESS_TAG ((uint64_t)1 << 41)

typedef struct {
    fomoe_buffer **items; /* a ring */
    int first, count, capacity;
} fomoe_buffer_queue;

/* How far an expert of the layer at work has come.
 *
 *     UNREAD -> READING -> SENT (-> HANDED)      its slot is in VRAM, or a token waits for it
 *     UNREAD -> READING -> LANDED -> SENT ...    its slot is in DRAM: whole there before it is sent, or not at all
 *     READING -> LOST                            a read failed */
enum fomoe_progress {
    FOMOE_UNREAD,  /* placed, and nowhere */
    FOMOE_READING, /* reads are under way; what has landed is sent up at once where there is a record */
    FOMOE_LANDED,  /* whole in its slot of DRAM */
    FOMOE_SENT,    /* whole in its record for whoever waits for the lane, or there from the start */
    FOMOE_HANDED,  /* in a tile that the batch's kernels compute */
    FOMOE_LOST
};

/* An expert of the layer at work, in the plan's order. */
typedef struct {
    fomoe_placement at;
    int32_t progress;
    int32_t reads_left, inputs_left; /* those with bytes of gate or up */
    int32_t is_in_place;             /* kernels read it in DRAM, and wait for nothing */
    int32_t said;                    /* to the waiting kernel: 1 has_inputs, 2 is_whole */
    int32_t is_spoilt;               /* a read ahead has failed, of which this was to be made: it is read anew */
    uint64_t begin;                  /* of what is in DRAM: where the bytes begin that have not been sent ahead */
    fomoe_buffer *landing; /* where its reads go */
    fomoe_buffer *record;  /* where it is computed from; NULL: not known yet */
} fomoe_wanted;

/* A copy of a whole expert that is decided and not started: reads go first. */
typedef struct {
    int32_t layer, expert, lane;
    fomoe_buffer *host, *device;
    uint64_t begin; /* of the host's: what lies before that has been sent */
} fomoe_transfer;

/* A word of an answer that comes true with a copy's ticket. */
typedef struct {
    uint32_t *word;
    uint64_t ticket;
} fomoe_signal;

/* A buffer that will be a spare of that layer's class. */
typedef struct {
    int32_t layer, tier;
    fomoe_buffer *buffer;
} fomoe_resting;

/* Bytes of an expert's place on the host that a read brings. */
typedef struct {
    uint32_t begin, bytes;
} fomoe_range;

/* An expert that is read before its layer's router has picked it, into a spare of the host, or that lies in DRAM; and
 * sent up into a spare of the device, piece after piece.  The residency knows nothing of it: who is picked is a miss,
 * or a hit of DRAM, which takes for its own what has been done. */
typedef struct {
    int32_t layer, expert; /* layer -1: unused */
    int32_t taker;         /* whose reads they are now, of the layer at work; -1: nobody's */
    int32_t pieces, left;  /* reads in all, and those that are not back */
    uint32_t back, failed, handed; /* a bit a read: has come back, with an error, and the taker has it */
    int32_t has_failed, is_expired; /* is_expired: nobody will take it */
    uint64_t bytes;        /* that have come */
    fomoe_buffer *landing;
    int32_t is_resident;   /* in DRAM: landing is its slot's, and all has come */
    uint32_t sent;         /* a bit a read, or a piece of what is resident: is on its way up, or there */
    uint64_t sent_bytes;
    fomoe_buffer *record;  /* where it is sent; NULL: nothing has been */
} fomoe_guess;

/* The last layer of the run whose guesses by a layer so far before it have been seen (-1: none), those, and how many of
 * them have been read or need not be. */
typedef struct {
    int32_t layer, considered;
    int32_t *experts;
    int8_t *is_replaced; /* of each: another expert would stand in for it */
} fomoe_seen_guesses;

struct fomoe_device_experts {
    int layers, used, classes, max_experts;
    fomoe_device_layer *layer;
    fomoe_size_class *class;
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_device_copies copies;
    fomoe_owned owned; /* all arrays below */
    uint32_t piece_bytes;

    fomoe_buffer *buffers; /* of all slots and spares */
    fomoe_buffer ***slot;  /* [layers * FOMOE_TIERS]: slot -> its buffer */
    fomoe_buffer_queue *spare; /* [classes * FOMOE_TIERS] */
    fomoe_transfer *transfers;
    int transfer_count, most_transfers;

    fomoe_device_expert_counters counters;
    int64_t *picks;
    int error, failed_layer, failed_expert;
    /* [layers], of a table: how often it has been rewritten, what the run at work brings to the device, and what is
     * known to be there */
    uint32_t *version, *brought, *arrived;
    uint8_t *is_unsettled; /* [layers]: copies to DRAM are under way, behind which it will name more places */
    int reads_in_place;
    int64_t distance; /* from the host's address of DRAM to the device's */
    fomoe_resting *resting;
    int resting_count, most_resting;

    /* The layer at work, -1: none.  0 <= released <= placed <= plan.count, and unread <= placed: experts whose slots
     * others may have, that have slots, and before which no one is UNREAD. */
    int open_layer;
    fomoe_expert_plan plan;
    int placed, released, unread, in_flight; /* in_flight: reads */
    int is_warming;                          /* nobody computes: what has a place in DRAM stays there */
    int is_batch;                            /* experts come and go while the layer is at work */
    fomoe_wanted *wanted;
    fomoe_range *ranges;         /* by the tag of a read */
    fomoe_placement *placements; /* scratch of a resolve */
    fomoe_move *moves;
    uint64_t opened_ns, landed_ns; /* when the layer began, and when its last read had landed */
    int has_read, has_moved; /* has_moved: some were not in VRAM */

    /* lookahead: experts that the device guesses of a layer (0: off), spares that may hold such, and do; the layer that
     * may be read ahead of the one at work (-1: none) */
    int ranks, most_staged, staged, guess_count, ahead, in_turn;
    int most_sent, sent; /* spares of the device that may hold such, and do */
    fomoe_seen_guesses seen[FOMOE_LAYERS_AHEAD]; /* by the layer before, by the one before that */
    fomoe_guess *guesses;
    fomoe_range *guess_ranges; /* by the tag of a read */
    fomoe_recall *recall;

    int back_fill; /* most picks of a layer that are read after others stood in for them */
    fomoe_offers offers;

    /* a token's layer: what its router picked, what is computed in their place, and the pair's place in the plan */
    int32_t *picked, *posted, *place;
    int misses;
    /* misses: a kernel waits.  Words that become the run's number: by the stream of the copies, or by the host, in the
     * order of their tickets. */
    int is_answering, answers_by_stream, signal_count;
    uint32_t run;
    fomoe_signal *signals; /* [2 * used] */

    fomoe_trace *trace; /* NULL: none is written */
    int8_t *found; /* of it: where each (token, rank) found its expert */
    float *pick_weights; /* [used]: of a token */

    /* a batch's layer: its picks, its pairs by expert, where each expert's pairs begin in the order, who is in the last
     * wave */
    const int32_t *batch_picks, *order;
    int32_t *first, *wave;
    int tokens, handed, wave_count;
};

/* ---- device_experts.c ---- */

/* The first failure of a run is kept: a negative errno, or 1 for a device call. */
void fomoe_device_fail(fomoe_device_experts *, int layer, int expert, int error);
int fomoe_device_has_failed(fomoe_device_experts *, int layer);
/* A run, a batch or a warm start begins: what the last one may have left open is closed. */
void fomoe_device_begin(fomoe_device_experts *);
/* The next layer that has experts; e->layers where there is none. */
int fomoe_device_next_layer(const fomoe_device_experts *, int layer);
/* The layer's table, as the next run will read it. */
void fomoe_device_rewrite_table(fomoe_device_experts *, int layer);

/* ---- device_buffers.c ---- */

int fomoe_device_share_buffers(fomoe_device_experts *); /* 0: memory has run out */
fomoe_buffer **fomoe_device_slot(fomoe_device_experts *, int layer, int tier, int slot);
void fomoe_device_give_spare(fomoe_device_experts *, int layer, int tier, fomoe_buffer *);
/* A spare of the host that nobody touches; waits for one unless `or_none`.  NULL: none, or the device has failed. */
fomoe_buffer *fomoe_device_take_host_spare(fomoe_device_experts *, int layer, int or_none);
/* Room on the device for an expert that stays in DRAM; NULL: none is left. */
fomoe_buffer *fomoe_device_borrow(fomoe_device_experts *, int layer);
/* Room on the device for what nobody has asked for, which nobody touches; NULL: none is left. */
fomoe_buffer *fomoe_device_borrow_ahead(fomoe_device_experts *, int layer);
/* The layer at work is done with this buffer once the device has computed it: then it is a spare. */
void fomoe_device_rest(fomoe_device_experts *, int layer, int tier, fomoe_buffer *);
/* The layer whose buffers rest has been computed. */
void fomoe_device_end_rest(fomoe_device_experts *);
/* Whether the kernels of the token at work read this expert where it lies. */
int fomoe_device_is_in_place(const fomoe_device_experts *, int layer, int expert);
/* A slot gets the buffer that its expert has been read into (of DRAM), or sent to (of VRAM), and its own becomes a
 * spare. */
void fomoe_device_exchange(fomoe_device_experts *, int layer, int tier, int slot, fomoe_buffer *);
/* Change who is whose as the moves say, and list the copies that follow from it. */
void fomoe_device_carry_out(fomoe_device_experts *, int layer, const fomoe_move *, int count);
/* Start the copies that are listed, in order. */
void fomoe_device_start_transfers(fomoe_device_experts *);
/* Send up bytes [begin, end) of an expert's place on the host. */
void fomoe_device_send(fomoe_device_experts *, int layer, int expert, fomoe_buffer *host, fomoe_buffer *device,
                       uint64_t begin, uint64_t end);

/* ---- device_answers.c ---- */

/* Tell the kernel that waits for this layer, if one does, what has been sent up since the last time.  What is listed
 * and not started has not. */
void fomoe_device_answer(fomoe_device_experts *, int layer);
/* Write the words whose copies are done. */
void fomoe_device_pass_on(fomoe_device_experts *);

/* ---- device_fetch.c ---- */

void fomoe_device_open_layer(fomoe_device_experts *, int layer);
/* Give experts [placed, end) of the plan their places. */
void fomoe_device_place(fomoe_device_experts *, int layer, int end);
/* The next expert of the plan has this place. */
void fomoe_device_adopt(fomoe_device_experts *, int layer, const fomoe_placement *);
/* Begin reads, in the plan's order, as far as there is room for them. */
void fomoe_device_read_on(fomoe_device_experts *, int layer);
/* Send up what has landed in DRAM, as far as there is room. */
void fomoe_device_lift(fomoe_device_experts *, int layer);
/* Wait for a read to come back, and deal with all that have. */
void fomoe_device_reap(fomoe_device_experts *, int layer);
/* The reads of an expert into a buffer, tagged from `tag` on, cut so that its first bytes are on their way up while the
 * last are still read; ranges: what each of them brings.  Returns how many; *bytes grows by what they read. */
int fomoe_device_list_reads(fomoe_device_experts *, int layer, int expert, uint8_t *target, uint64_t tag,
                            fomoe_read *reads, fomoe_range *ranges, uint64_t *bytes);
/* Whether a read brings what the first products of an expert need. */
int fomoe_device_holds_inputs(const fomoe_device_experts *, int layer, int expert, const fomoe_range *);
/* A read of the wanted expert i is back; has_failed: as if it had not been made, when the others are back; is_sent: has
 * been sent up, too. */
void fomoe_device_land(fomoe_device_experts *, int layer, int i, const fomoe_range *, int has_failed, int is_sent);
/* Read everything that is placed, and send it up. */
void fomoe_device_fetch(fomoe_device_experts *, int layer);
/* Unpin the first experts of the plan that are not, up to `end`. */
void fomoe_device_release(fomoe_device_experts *, int layer, int end);
/* The layer is done with, or given up: nothing of it is in flight afterwards, what failed is forgotten. */
void fomoe_device_close_layer(fomoe_device_experts *);

/* ---- device_guesses.c: all return at once where there is no lookahead ---- */

/* A run begins: guesses of the last one are nobody's. */
void fomoe_guesses_forget(fomoe_device_experts *);
/* See whether the device has guessed this layer, and begin to read what is nowhere, as far as there is room, and then
 * of the layer after it; if this one may not be read, nothing of it will be. */
void fomoe_guesses_look(fomoe_device_experts *, int layer, int may_read);
/* A batch has asked for all of its layer: read of the next one what will be wanted, where its tokens are so many that
 * nearly every expert is. */
void fomoe_guesses_of_batch(fomoe_device_experts *, int layer);
/* Count how many of the layer's picks were guessed. */
void fomoe_guesses_count(fomoe_device_experts *, int layer);
/* The layer is planned: what it does not miss will be taken by nobody, nor what is of layers before. */
void fomoe_guesses_expire(fomoe_device_experts *, int layer);
/* Whether the wanted expert i, which is to be read, takes reads that have begun.  What has come of them is his with the
 * next handing over: no copy that is listed and not started may still need his record. */
int fomoe_guesses_take(fomoe_device_experts *, int layer, int i);
void fomoe_guesses_hand_over(fomoe_device_experts *);
/* A completion whose tag has FOMOE_GUESS_TAG. */
void fomoe_guesses_completed(fomoe_device_experts *, const fomoe_completion *);
/* Between layers: collect what has come, and let the reader go on. */
void fomoe_guesses_reap(fomoe_device_experts *);

/* ---- device_ahead.c: as device_guesses.c ---- */

/* An expert of DRAM is guessed. */
void fomoe_ahead_offer(fomoe_device_experts *, int layer, int expert, fomoe_buffer *);
/* If nothing is under way up, a piece of what is guessed of this layer goes there. */
void fomoe_ahead_send(fomoe_device_experts *, int layer);
/* The guess is nobody's, or its taker's. */
void fomoe_ahead_drop(fomoe_device_experts *, fomoe_guess *);
/* Whether something of an expert of DRAM has been sent ahead: *record, which is the caller's now, and the place of
 * the first byte that has not been, past all where all have been. */
int fomoe_ahead_take(fomoe_device_experts *, int layer, int expert, fomoe_buffer **record, uint64_t *begin);
/* The wanted expert takes what has been sent of a guess whose reads it takes. */
void fomoe_ahead_hand_over(fomoe_device_experts *, fomoe_guess *, fomoe_wanted *);
/* One that nobody uses; NULL: there is none. */
fomoe_guess *fomoe_guesses_unused(fomoe_device_experts *);
fomoe_range *fomoe_guesses_ranges(const fomoe_device_experts *, const fomoe_guess *);

/* ---- device_back_fill.c ---- */

/* The layer at work has all it waits for: begin to read those of its picks that others stand in for. */
void fomoe_device_back_fill(fomoe_device_experts *, int layer);
/* A run begins, and its tables have not been sent: what was read so is resident from now on. */
void fomoe_device_settle_offers(fomoe_device_experts *);
/* Collect what nobody waits for, when nothing else is under way; wait: until something comes, or it is an error.
 * Whether something has. */
int fomoe_device_reap_aside(fomoe_device_experts *, int wait);

#endif
