/* Where an expert lies on the drive, and the reads that bring it. */
#ifndef FOMOE_EXPERT_READS_H
#define FOMOE_EXPERT_READS_H

#include "read/reader.h"

enum { FOMOE_PARTS = 3, FOMOE_GATE = 0, FOMOE_UP = 1, FOMOE_DOWN = 2 };

/* One aligned read of an expert's record; a packed record is one, an in-place expert up to three. */
typedef struct {
    uint64_t offset;
    uint32_t bytes;
    uint32_t slot_offset;
    int32_t file;
    int32_t unused;
} fomoe_extent;

/* The expert's place in the caller's list, from the tag of one of its reads. */
static inline int fomoe_expert_of_tag(uint64_t tag) { return (int)(tag / FOMOE_PARTS); }

/* The reads of `expert`, the i-th of the caller's list, into a slot.  extents: [experts][FOMOE_PARTS].  Returns how
 * many, at most FOMOE_PARTS; *bytes grows by what they read. */
static inline int fomoe_expert_reads(const fomoe_extent *extents, const int32_t *extent_count, int expert, int i,
                                     uint8_t *slot, fomoe_read *reads, uint64_t *bytes) {
    const fomoe_extent *extent = extents + (int64_t)expert * FOMOE_PARTS;
    int count = extent_count[expert];
    for (int r = 0; r < count; r++, extent++) {
        reads[r] = (fomoe_read){.tag = (uint64_t)i * FOMOE_PARTS + r,
                                .offset = extent->offset,
                                .bytes = extent->bytes,
                                .target = slot + extent->slot_offset,
                                .file = extent->file};
        *bytes += extent->bytes;
    }
    return count;
}

#endif
