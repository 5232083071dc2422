/* What the files behind device_experts.h share: the state, and the moves of one layer's experts (device_fetch.c). */
#ifndef FOMOE_DEVICE_EXPERTS_STATE_H
#define FOMOE_DEVICE_EXPERTS_STATE_H

#include "device_experts.h"

typedef struct {
    fomoe_buffer **items; /* a ring */
    int first, count, capacity;
} fomoe_buffer_queue;

struct fomoe_device_experts {
    int layers, used, classes, max_experts;
    int most; /* experts that are served together at most */
    fomoe_device_layer *layer;
    fomoe_size_class *class;
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_device_copies copies;
    fomoe_buffer *buffers;     /* of all slots and spares */
    fomoe_buffer ***slot;      /* [layers * FOMOE_TIERS]: slot -> its buffer */
    fomoe_buffer **slot_memory;
    fomoe_buffer_queue *spare;              /* [classes * FOMOE_TIERS] */
    fomoe_buffer **spare_memory;
    fomoe_device_expert_counters counters;
    int64_t *picks;
    int error, failed_layer, failed_expert;
    /* [layers], of a table: how often it has been rewritten, what the run at work brings to the device, and what is known
     * to be there */
    uint32_t *version, *brought, *arrived;
    int is_warming; /* nobody computes: what has a place in DRAM stays there */

    /* the layer at work */
    int count;
    int32_t *ids, *index, *weight; /* weight: true picks, what the residency counts */
    int32_t *wanted, *posted; /* [used]: the router's picks, and what is computed in their place */
    int misses;
    fomoe_placement *placements;
    fomoe_move *moves;
    fomoe_buffer **landing; /* where each expert's read goes */
    fomoe_buffer **record;  /* where each expert is computed from */
    int32_t *reads_left;
    fomoe_buffer **transient; /* device buffers that are spare again after the layer */
    int transients;

    /* the batch at work: its distinct experts, those in VRAM first, and where their pairs begin */
    int32_t *batch_ids, *batch_weight, *batch_first;
    int batch_count, batch_next;
};

/* The first failure of a run is kept: a negative errno, or 1 for a device call. */
void fomoe_device_fail(fomoe_device_experts *, int layer, int expert, int error);
int fomoe_device_has_failed(fomoe_device_experts *, int layer);

void fomoe_device_push(fomoe_buffer_queue *, fomoe_buffer *);
/* Put the experts of ids[0 .. count) on the device: e->record[i] says where.  They count as requested weight[i] times. */
void fomoe_device_bring(fomoe_device_experts *, int layer);
/* Read every expert of e->placements that is nowhere. */
void fomoe_device_fetch(fomoe_device_experts *, int layer);
/* The layer's table, as the next run will read it. */
void fomoe_device_rewrite_table(fomoe_device_experts *, int layer);

#endif
