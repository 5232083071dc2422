/* A pool of threads that answer the reader interface with pread: where io_uring is forbidden. */
#ifndef FOMOE_PREAD_POOL_H
#define FOMOE_PREAD_POOL_H

#include "reader.h"

typedef struct fomoe_pread_pool fomoe_pread_pool;

typedef struct {
    uint64_t reads, bytes, short_reads, retries, errors;
    int32_t error_file, error_code;
    uint64_t error_offset;
} fomoe_pread_counters;

/* file_bytes: sizes when the files were opened; both arrays are copied. NULL when it can't be made. */
fomoe_pread_pool *fomoe_pread_pool_new(const int *descriptors, const uint64_t *file_bytes, int files, int threads,
                                       int direct);
/* Waits for reads in flight. */
void fomoe_pread_pool_free(fomoe_pread_pool *);
void fomoe_pread_pool_table(fomoe_pread_pool *, fomoe_reader *table);
fomoe_pread_counters fomoe_pread_pool_count(fomoe_pread_pool *);

#endif
