/* A reader at the pace of a drive: passes reads on to another, faster reader, and holds each completion back until a
 * drive of the given bandwidth and latency would have made it.  The bytes are the other reader's; what is modelled is
 * one drive behind a read table (read_table.h), which says what waits and what enters the drive, and the drive serves
 * pieces in the order in which they entered:
 *
 *     done(r) = max(done(r - 1), entered(r) + latency) + bytes(r) / bandwidth
 *
 * so that pieces in flight together hide each other's latency, and never each other's bytes.  Several readers of one
 * drive, each of a thread of its own, share its bandwidth. */
#ifndef FOMOE_PACED_READER_H
#define FOMOE_PACED_READER_H

#include "reader.h"

typedef struct fomoe_paced_reader fomoe_paced_reader;

typedef struct {
    uint64_t late; /* completions seen not to be there after their time: the other reader is too slow for this pace */
    uint64_t late_ns; /* by so much, in all */
} fomoe_paced_counters;

/* bandwidth in bytes a second, > 0; depth: reads in the drive, as the other reader has; beside: a reader of the same
 * drive, or NULL.  `inner` and `beside` must outlive the result.  NULL when memory runs out. */
fomoe_paced_reader *fomoe_paced_reader_new(fomoe_reader *inner, double bandwidth, uint64_t latency_ns, int depth,
                                           fomoe_paced_reader *beside);
void fomoe_paced_reader_free(fomoe_paced_reader *);
void fomoe_paced_reader_table(fomoe_paced_reader *, fomoe_reader *table);
const fomoe_paced_counters *fomoe_paced_reader_count(const fomoe_paced_reader *);

#endif
