/* The one interface between storage and compute: reads go in, completions come out.
 *
 * A provider (io_uring in _uring.pyx, a pread thread pool in _pread.pyx, a fault-injecting fake in
 * the tests) fills a table of function pointers; the engine calls it from one thread, without the GIL.
 */
#ifndef FOMOE_READER_H
#define FOMOE_READER_H

#include <stdint.h>

/* One read.  offset, bytes and target are multiples of the reader's alignment (4096).  A range that
 * passes the end of the file, as the file was when it was opened, is complete when the file's last
 * byte has been delivered.  priority: 0 = demand, 1 = prefetch (started only when no demand waits, and
 * not beyond what keeps the drive busy). */
typedef struct {
    uint64_t tag;    /* returned with the completion; chosen by the caller, unique while in flight */
    uint64_t offset; /* in the file */
    uint8_t *target;
    uint32_t bytes;
    uint16_t file; /* index into the reader's list of files */
    uint16_t priority;
} fomoe_read;

/* error: 0, or a negative errno.  The details (file name, offset) of a failed read are kept by the
 * provider and reported by its Python face. */
typedef struct {
    uint64_t tag;
    int32_t error;
} fomoe_completion;

typedef struct {
    void *self;
    /* Queue count reads and start as many as the depth allows.  0, or a negative errno when none was
     * accepted.  Never blocks on the device. */
    int (*submit)(void *self, const fomoe_read *reads, int count);
    /* Collect up to max completions, waiting until there is at least one when wait != 0 and something
     * is in flight.  Returns their number (0: nothing was in flight, or nothing ready), or a negative errno. */
    int (*reap)(void *self, fomoe_completion *completions, int max, int wait);
    /* Turn a prefetch, or what waits of it, into a demand; unknown tags are ignored. */
    void (*promote)(void *self, uint64_t tag);
    /* Ask for a read to be dropped.  Its completion still arrives (error 0 or -ECANCELED): the target
     * stays in use until then. */
    void (*cancel)(void *self, uint64_t tag);
    /* Wait for so long that something can be collected, or nothing is in flight: then 1, and reap does not block.  0:
     * the time is over, or a signal came.  A negative errno as reap's. */
    int (*wait)(void *self, int milliseconds);
} fomoe_reader;

#endif
