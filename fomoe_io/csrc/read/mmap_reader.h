/* Reads as copies out of a memory map, for comparison in `fomoe-bench io`.  A copy happens when it is reaped:
 * page faults have no queue.  One thread; the files must not shrink. */
#ifndef FOMOE_MMAP_READER_H
#define FOMOE_MMAP_READER_H

#include "reader.h"

typedef struct fomoe_mmap_reader fomoe_mmap_reader;

/* random_access: MADV_RANDOM, no read-ahead.  0, or a negative errno. */
int fomoe_mmap_reader_new(const int *descriptors, const uint64_t *file_bytes, int files, int depth, int random_access,
                          fomoe_mmap_reader **);
void fomoe_mmap_reader_free(fomoe_mmap_reader *);
void fomoe_mmap_reader_table(fomoe_mmap_reader *, fomoe_reader *table);

#endif
