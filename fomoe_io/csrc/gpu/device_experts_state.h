/* What the files behind device_experts.h share.
 *
 *     device_experts.c   life, the conversation of a token
 *     device_batch.c     the batches of a prompt
 *     device_fetch.c     experts brought: placed, read, sent up
 *     device_buffers.c   slots, spares, and the moves between the tiers */
#ifndef FOMOE_DEVICE_EXPERTS_STATE_H
#define FOMOE_DEVICE_EXPERTS_STATE_H

#include <assert.h>

#include "device_experts.h"
#include "experts/expert_plan.h"
#include "experts/owned.h"

enum { FOMOE_MOST_PIECES = 32 }; /* reads of an expert */

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
    int32_t reads_left;
    fomoe_buffer *landing; /* where its reads go */
    fomoe_buffer *record;  /* where it is computed from; NULL: not known yet */
} fomoe_wanted;

/* A copy of a whole expert that is decided and not started: reads go first. */
typedef struct {
    int32_t layer, expert, lane;
    fomoe_buffer *host, *device;
} fomoe_transfer;

/* Bytes of an expert's place on the host that a read brings. */
typedef struct {
    uint32_t begin, bytes;
} fomoe_range;

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
    /* [layers], of a table: how often it has been rewritten, what the run at work brings to the device, and what is known
     * to be there */
    uint32_t *version, *brought, *arrived;

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
    int has_read;

    /* a token's layer: what its router picked, what is computed in their place, and the pair's place in the plan */
    int32_t *picked, *posted, *place;
    int misses;

    fomoe_trace *trace; /* NULL: none is written */
    int8_t *found;      /* of it: where each (token, rank) found its expert */
    float *pick_weights; /* [used]: of a token */

    /* a batch's layer: its picks, its pairs by expert, where each expert's pairs begin in the order, who is in the last wave */
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
/* Change who is whose as the moves say, and list the copies that follow from it. */
void fomoe_device_carry_out(fomoe_device_experts *, int layer, const fomoe_move *, int count);
/* Start the copies that are listed, in order. */
void fomoe_device_start_transfers(fomoe_device_experts *);
/* Send up bytes [begin, end) of an expert's place on the host. */
void fomoe_device_send(fomoe_device_experts *, int layer, int expert, fomoe_buffer *host, fomoe_buffer *device,
                       uint64_t begin, uint64_t end);

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
/* Read everything that is placed, and send it up. */
void fomoe_device_fetch(fomoe_device_experts *, int layer);
/* Unpin the first experts of the plan that are not, up to `end`. */
void fomoe_device_release(fomoe_device_experts *, int layer, int end);
/* The layer is done with, or given up: nothing of it is in flight afterwards, what failed is forgotten. */
void fomoe_device_close_layer(fomoe_device_experts *);

#endif
