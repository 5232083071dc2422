/* A pool of threads that answer the reader interface with pread: where io_uring is forbidden. */
#ifndef FOMOE_PREAD_POOL_H
#define FOMOE_PREAD_POOL_H

#include "read_table.h"

typedef struct fomoe_pread_pool fomoe_pread_pool;

/* threads: for each drive.  write: the targets are written to the files instead (benchmarks only).
 * 0, or a negative errno. */
int fomoe_pread_pool_new(const fomoe_read_options *, const int *descriptors, int threads, int write,
                         fomoe_pread_pool **pool);
/* Waits for reads in flight; those that wait are dropped.  Nothing happens to a pool that came here by a fork. */
void fomoe_pread_pool_free(fomoe_pread_pool *);
void fomoe_pread_pool_table(fomoe_pread_pool *, fomoe_reader *table);
fomoe_read_counters fomoe_pread_pool_count(fomoe_pread_pool *);

#endif
