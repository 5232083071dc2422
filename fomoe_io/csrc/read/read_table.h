/* What both readers (ring.c, pread_pool.c) share: the reads that were asked for, in the order in which they
 * start, and what becomes of each answer of the kernel.  No system call is made here; a caller with several
 * threads holds its own lock.
 *
 * A read is cut into pieces of at most piece_bytes; a piece is what the kernel sees.  Every drive has its own
 * queues and its own depth, so that a slow drive never fills the places of a fast one. */
#ifndef FOMOE_READ_TABLE_H
#define FOMOE_READ_TABLE_H

#include "reader.h"

typedef struct {
    int files, drives, depth; /* depth: pieces in flight, for each drive */
    uint32_t piece_bytes;     /* 0: reads are not cut */
    const uint64_t *file_bytes;
    const int32_t *drive;  /* of each file: 0 .. drives - 1 */
    const int32_t *mirror; /* of each file: a file with the same bytes, or -1 */
    /* Of each file: where a read that was cut short may go on, the logical block of direct files and 1 of others;
     * NULL: a page. */
    const uint32_t *restart;
} fomoe_read_options;

typedef struct {
    uint64_t reads, pieces, bytes, short_reads, retries, cancelled, errors, failovers;
    uint64_t error_offset; /* of the last error */
    int32_t error_file, error_code;
} fomoe_read_counters;

/* Part of a read.  It stays where it is from start to finish, so a thread may work on it without a lock. */
typedef struct {
    uint64_t offset;
    uint8_t *target;
    uint32_t asked, wanted; /* wanted: less than asked where the file ends */
    uint32_t done;
    int32_t operation, next;
    uint16_t file;
    uint16_t tries; /* in a row without progress */
    uint8_t failed_over;
} fomoe_piece;

typedef struct fomoe_read_table fomoe_read_table;

fomoe_read_table *fomoe_read_table_new(const fomoe_read_options *);
void fomoe_read_table_free(fomoe_read_table *);

/* The calls of reader.h, without starting or waiting for anything. */
int fomoe_read_table_submit(fomoe_read_table *, const fomoe_read *reads, int count);
int fomoe_read_table_collect(fomoe_read_table *, fomoe_completion *completions, int max);
void fomoe_read_table_promote(fomoe_read_table *, uint64_t tag);
/* Whether something of it waited, and will not be read. */
int fomoe_read_table_cancel(fomoe_read_table *, uint64_t tag);

/* The next piece to start on a drive, which then is in flight; -1: nothing waits, or the drive is at its depth. */
int32_t fomoe_read_table_start(fomoe_read_table *, int drive);
fomoe_piece *fomoe_read_table_piece(fomoe_read_table *, int32_t piece);
/* Whether start would return one. */
int fomoe_read_table_ready(const fomoe_read_table *, int drive);
/* The kernel's answer (bytes, or a negative errno) about a piece in flight.  Afterwards any drive may be ready: the
 * piece may wait to be started again, here or on its mirror's drive, or it has left its place to another. */
void fomoe_read_table_finish(fomoe_read_table *, int32_t piece, int32_t result);

int fomoe_read_table_in_flight(const fomoe_read_table *); /* pieces, on all drives */
int fomoe_read_table_left(const fomoe_read_table *);      /* reads submitted and not collected */
int fomoe_read_table_done(const fomoe_read_table *);      /* whether collect would return something */
const fomoe_read_counters *fomoe_read_table_count(const fomoe_read_table *);

#endif
