/* The io_uring reader: one persistent ring for all drives, registered files, registered buffers.
 *
 * One ring is enough: the drives' places are kept apart by the read table, and a single wait sees them all. */
#ifndef FOMOE_RING_H
#define FOMOE_RING_H

#include <stddef.h>

#include "read_table.h"

typedef struct fomoe_ring fomoe_ring;

typedef struct {
    uint64_t submits, waits; /* system calls: to start reads; to wait (and start some) */
} fomoe_ring_counters;

/* setup_flags: IORING_SETUP_*.  write: the targets are written to the files instead (benchmarks only).
 * 0, or a negative errno. */
int fomoe_ring_new(const fomoe_read_options *, const int *descriptors, unsigned setup_flags, int write,
                   fomoe_ring **ring);
/* Waits for reads in flight, unless the ring came here by a fork. */
void fomoe_ring_free(fomoe_ring *);
void fomoe_ring_table(fomoe_ring *, fomoe_reader *table);
/* Pin this memory once, in place of what was registered before.  0, or a negative errno: then reads into it work
 * all the same, and are pinned one by one. */
int fomoe_ring_register_buffers(fomoe_ring *, void *start, size_t bytes);

const fomoe_read_counters *fomoe_ring_reads(const fomoe_ring *);
const fomoe_ring_counters *fomoe_ring_calls(const fomoe_ring *);
/* [0 .. depth * drives]: how often the ring was left with so many pieces in flight. */
const uint64_t *fomoe_ring_depths(const fomoe_ring *, int *count);

#endif
