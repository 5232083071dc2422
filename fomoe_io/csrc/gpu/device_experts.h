/* The routed experts of a model on a GPU: the host's side of the conversation with kernels/router.h and experts.h.
 *
 * Every layer's router posts its picks.  The host counts them, and when some are not in VRAM it moves experts between
 * the tiers as csrc/experts/residency.c says, reads from NVMe what is nowhere, and answers with the addresses.  Slots
 * are exchanged, never waited for: a victim's bytes go down from the buffer it had, while the newcomer gets a spare. */
#ifndef FOMOE_DEVICE_EXPERTS_H
#define FOMOE_DEVICE_EXPERTS_H

#include <stdint.h>

#include "device_copies.h"
#include "experts/expert_reads.h"
#include "experts/recall.h"
#include "experts/residency.h"
#include "experts/trace.h"

/* How many of the layers that follow a layer guesses at (models/recorder.py). */
#define FOMOE_LAYERS_AHEAD 2

/* What a device's kernels read of a layer: host memory that it sees. */
typedef struct {
    uint64_t *table; /* [experts]: the host's copy of record_of */
    uint8_t *answer; /* kernels/experts.h, struct answer */
    uint8_t *answer_on_device; /* the same, as the device sees it */
} fomoe_device_words;

typedef struct {
    int32_t experts; /* 0: not a layer of experts */
    int32_t size_class;
    const fomoe_extent *extents; /* [experts][FOMOE_PARTS], as in expert_reads.h */
    const int32_t *extent_count;
    const uint32_t *part_offset; /* [experts][FOMOE_PARTS]: in a host slot */
    /* on a device, where each has its share of every part, and bytes of a whole part */
    uint32_t device_offset[FOMOE_PARTS], part_bytes[FOMOE_PARTS];
    int32_t is_alike; /* the parts of every expert lie on the host as they do on the device, but for where they begin */
    uint8_t *pool[FOMOE_TIERS]; /* slots of VRAM (the first device's) and of DRAM */
    fomoe_device_words words[FOMOE_MOST_DEVICES];
    /* host memory that the first device writes: misses, experts, weights of the picks; the run in the upper halves.
     * All route alike. */
    const uint64_t *post;
    /* lookahead: what is guessed of the picks in the layer before this one, and in the one before that: experts
     * with the run in the upper halves (and FOMOE_STANDS_IN, gpu/kernels/car_rule.h); NULL: nothing */
    const uint64_t *guess[FOMOE_LAYERS_AHEAD];
} fomoe_device_layer;

/* Layers whose slots have the same sizes share spare buffers. */
typedef struct {
    int64_t slot_bytes[FOMOE_TIERS];
    uint8_t *spare[FOMOE_TIERS]; /* spares * slot_bytes */
    int32_t spares[FOMOE_TIERS];
} fomoe_size_class;

typedef struct {
    uint64_t nvme_reads, nvme_bytes;
    uint64_t nvme_stall_ns; /* waiting for reads */
    uint64_t layers, served_layers; /* served: with experts that were not in VRAM */
    /* of a token: such experts, what the host itself did for them, and what it waited for copies to the device; in
     * layers with reads, from the post to the first read, and from the end of the last one to the answer */
    uint64_t misses, host_ns, copy_stall_ns, before_reads_ns, after_reads_ns;
    uint64_t post_stall_ns; /* waiting for the device's picks */
    /* experts read ahead, in nvme_reads and nvme_bytes as well; those that were missed then, and whose reads had not
     * ended by then; bytes of the others */
    uint64_t prefetches, prefetch_useful, prefetch_late, prefetch_bytes, prefetch_wasted_bytes;
    /* experts of which something was sent up ahead, those that were wanted then, and bytes of the others */
    uint64_t sent_ahead, sent_ahead_useful, sent_ahead_wasted_bytes;
    uint64_t back_filled_bytes; /* read into DRAM after others had stood in for the experts */
} fomoe_device_expert_counters;

typedef struct fomoe_device_experts fomoe_device_experts;

/* Everything is copied but what the layers point to.  used: picks of a token.  NULL: out of memory. */
fomoe_device_experts *fomoe_device_experts_new(int layers, int used, const fomoe_device_layer *layer, int classes,
                                               const fomoe_size_class *, fomoe_residency *, fomoe_reader *,
                                               const fomoe_device_copies *);
void fomoe_device_experts_free(fomoe_device_experts *);

/* Serve all layers of one token, run number `run`, whose kernels have been enqueued on each device's `compute`.  0, a
 * negative errno (a read failed), or 1 (a device call failed: see fomoe_device_experts_copies).  After an error every
 * device's *stop is set. */
int fomoe_device_experts_serve(fomoe_device_experts *, uint32_t run, void *const *compute,
                               volatile uint32_t *const *stop);

/* A tile of a batch (kernels/tile.h): up to FOMOE_TILE_PAIRS pairs (token * used + rank) of one expert. */
enum { FOMOE_TILE_PAIRS = 32 };
typedef struct {
    uint64_t record; /* where the expert lies on the first device */
    uint32_t first, count; /* its pairs: order[first .. first + count) */
} fomoe_tile;

/* A batch of so many tokens begins, whose kernels go to each device's stream `compute`. */
void fomoe_device_batch_begin(fomoe_device_experts *, int tokens, void *const *compute);
/* Count a layer's picks, [tokens][used], sort its pairs by expert into order, and give experts their places.  weights:
 * those of the picks, for the trace; all three stay as they are until the layer is done.  Returns as serve; after an
 * error the layer is closed. */
int fomoe_device_batch_layer(fomoe_device_experts *, int layer, const int32_t *picks, const float *weights, int tokens,
                             int32_t *order);
/* Tiles of the layer's experts that are on the device now, or will be when the stream gets there; *count: how many, 0
 * when all have been handed out.  The caller enqueues their kernels before he asks again.  Returns as serve. */
int fomoe_device_batch_next(fomoe_device_experts *, int layer, fomoe_tile *tiles, int *count);
/* Read these experts into free slots, hottest first.  Returns as above. */
int fomoe_device_experts_warm(fomoe_device_experts *, int layer, const int32_t *experts, const double *scores,
                              int count);
/* Reads of experts are cut into pieces of about so many bytes, each sent up as it lands. */
void fomoe_device_experts_set_piece_bytes(fomoe_device_experts *, uint32_t bytes);
/* Whether a copy's stream tells a waiting kernel that it has come (where the device can), or the host. */
void fomoe_device_experts_signal_by_stream(fomoe_device_experts *, int by_stream);
/* A token's kernels read experts of DRAM where they lie, as far as those lie there as on the device; distance: from
 * the host's address of that memory to the device's.  On promotion they are copied all the same, and nobody waits. */
void fomoe_device_experts_read_in_place(fomoe_device_experts *, int in_place, int64_t distance);
/* Runs from now on write their records to a trace, batches of up to so many tokens.  -1 when memory runs out. */
int fomoe_device_experts_set_trace(fomoe_device_experts *, fomoe_trace *, int tokens);
/* Once, before the first run: the device may guess so many picks of each layer.  Up to `staged` host spares of a class
 * (there are so many more) are used for reading them, up to `sent` spares of the device for what has been read or lies
 * in DRAM.  in_turn: the layer before each of these is another device's, and what is guessed there comes last.  Changes
 * no placement and no count but the reads' and the copies'.  -1 when memory runs out. */
int fomoe_device_experts_look_ahead(fomoe_device_experts *, int ranks, int staged, int sent, int in_turn);
const fomoe_recall *fomoe_device_experts_recall(const fomoe_device_experts *); /* [layers]; NULL without lookahead */
/* So many picks of a layer are read after others stood in for them (cache-aware routing); 0 (at first): none. */
void fomoe_device_experts_back_fill(fomoe_device_experts *, int most);
/* Wait for all copies to the host. */
void fomoe_device_experts_settle(fomoe_device_experts *);
/* Whether each layer's table has changed since it last arrived, for the run that comes: changed[layers].  What was read
 * after others had stood in for it is in them. */
void fomoe_device_experts_changed_tables(fomoe_device_experts *, uint32_t *changed);
/* That run has succeeded. */
void fomoe_device_experts_tables_arrived(fomoe_device_experts *);

const fomoe_device_expert_counters *fomoe_device_experts_count(const fomoe_device_experts *);
fomoe_device_copies *fomoe_device_experts_copies(fomoe_device_experts *);
const int64_t *fomoe_device_experts_picks(const fomoe_device_experts *); /* [layers][most experts of a layer] */
void fomoe_device_experts_failure(const fomoe_device_experts *, int *layer, int *expert);

#endif
