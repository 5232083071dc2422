#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    CQE_BATCH = 64,
    POLL_THREAD_IDLE_MS = 100, /* SQPOLL: the kernel's thread sleeps after so long without work */
};
static const size_t BUFFER_BYTES = 1 << 30; /* the kernel's limit of one registered buffer */

struct fomoe_ring {
    struct io_uring uring;
    fomoe_read_table *table;
    int drives, depth, write;
    int disabled; /* a ring of one issuer starts with its first submission, and belongs to that thread */
    uintptr_t fixed_start, fixed_end; /* registered memory; empty when there is none */
    fomoe_ring_counters counters;
    uint64_t *depths;
    pid_t process; /* completions are this one's: after a fork the other must not touch them */
};

/* ---- starting ---- */

/* The registered buffer that holds all of [target, target + bytes), or -1. */
static int buffer_of(const fomoe_ring *r, const uint8_t *target, size_t bytes) {
    uintptr_t start = (uintptr_t)target;
    if (start < r->fixed_start || start + bytes > r->fixed_end) return -1;
    size_t first = (start - r->fixed_start) / BUFFER_BYTES, last = (start + bytes - 1 - r->fixed_start) / BUFFER_BYTES;
    return first == last ? (int)first : -1;
}

static void prepare(fomoe_ring *r, struct io_uring_sqe *sqe, int32_t index) {
    const fomoe_piece *p = fomoe_read_table_piece(r->table, index);
    uint8_t *target = p->target + p->done;
    uint32_t bytes = p->asked - p->done;
    int buffer = buffer_of(r, target, bytes);
    if (r->write && buffer >= 0)
        io_uring_prep_write_fixed(sqe, p->file, target, bytes, p->offset + p->done, buffer);
    else if (r->write)
        io_uring_prep_write(sqe, p->file, target, bytes, p->offset + p->done);
    else if (buffer >= 0)
        io_uring_prep_read_fixed(sqe, p->file, target, bytes, p->offset + p->done, buffer);
    else
        io_uring_prep_read(sqe, p->file, target, bytes, p->offset + p->done);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = index;
}

/* An error of the call leaves the entries in the ring: the next submit or wait takes them along. */
static void flush(fomoe_ring *r) {
    r->counters.submits++;
    io_uring_submit(&r->uring);
}

/* Start what may start, one system call a read: the kernel holds back what a call submits until all of it is prepared,
 * and virtual drives report it when all of it is done, so calls that bring several leave a drive idle (docs/io.md). */
static void fill(fomoe_ring *r) {
    int added = 0;
    for (int drive = 0; drive < r->drives; drive++)
        while (io_uring_sq_space_left(&r->uring)) {
            int32_t index = fomoe_read_table_start(r->table, drive);
            if (index < 0) break;
            prepare(r, io_uring_get_sqe(&r->uring), index);
            flush(r);
            added++;
        }
    if (added) r->depths[fomoe_read_table_in_flight(r->table)]++;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_ring *r = self;
    int error = fomoe_read_table_submit(r->table, reads, count);
    if (error) return error;
    if (r->disabled) {
        /* io_uring_enable_rings: liburing.so.2 of version 2.3 does not export it */
        syscall(__NR_io_uring_register, r->uring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
        r->disabled = 0;
    }
    fill(r);
    return 0;
}

/* ---- finishing ---- */

static void drain(fomoe_ring *r) {
    struct io_uring_cqe *cqes[CQE_BATCH];
    unsigned got;
    if (r->uring.flags & IORING_SETUP_IOPOLL) io_uring_get_events(&r->uring); /* looks at the drive's queue */
    while ((got = io_uring_peek_batch_cqe(&r->uring, cqes, CQE_BATCH))) {
        for (unsigned i = 0; i < got; i++) fomoe_read_table_finish(r->table, (int32_t)cqes[i]->user_data, cqes[i]->res);
        io_uring_cq_advance(&r->uring, got);
    }
}

/* Whether a wait that returned this may be repeated. */
static int worth_waiting(int result) {
    return result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fomoe_ring *r = self;
    for (;;) {
        drain(r);
        fill(r);
        if (fomoe_read_table_done(r->table) || !wait || !fomoe_read_table_in_flight(r->table))
            return fomoe_read_table_collect(r->table, completions, max);
        r->counters.waits++;
        int error = io_uring_submit_and_wait(&r->uring, 1);
        if (!worth_waiting(error)) return error;
    }
}

static int has_answer(const fomoe_ring *r) {
    return fomoe_read_table_done(r->table) || !fomoe_read_table_in_flight(r->table);
}

static int wait_for(void *self, int milliseconds) {
    fomoe_ring *r = self;
    struct io_uring_cqe *cqe;
    struct __kernel_timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000LL};
    int error;
    drain(r);
    fill(r);
    if (has_answer(r)) return 1;
    r->counters.waits++;
    if (r->uring.features & IORING_FEAT_EXT_ARG)
        error = io_uring_submit_and_wait_timeout(&r->uring, &cqe, 1, &time, NULL);
    else /* before Linux 5.11: a signal ends the wait, time does not */
        error = io_uring_submit_and_wait(&r->uring, 1);
    if (error != -ETIME && !worth_waiting(error)) return error;
    drain(r);
    fill(r);
    return has_answer(r);
}

static void promote(void *self, uint64_t tag) {
    fomoe_ring *r = self;
    fomoe_read_table_promote(r->table, tag);
    fill(r); /* a demand need not wait until the drive is nearly empty */
}

static void cancel(void *self, uint64_t tag) {
    fomoe_ring *r = self;
    fomoe_read_table_cancel(r->table, tag);
}

/* ---- life ---- */

int fomoe_ring_new(const fomoe_read_options *options, const int *descriptors, unsigned setup_flags, int write,
                   fomoe_ring **ring) {
    int one_issuer = (setup_flags & IORING_SETUP_SINGLE_ISSUER) != 0;
    struct io_uring_params parameters = {.flags = setup_flags | (one_issuer ? IORING_SETUP_R_DISABLED : 0),
                                         .sq_thread_idle = POLL_THREAD_IDLE_MS};
    fomoe_ring *r = calloc(1, sizeof *r);
    if (!r) return -ENOMEM;
    r->drives = options->drives;
    r->depth = options->depth;
    r->write = write;
    r->process = getpid();
    r->disabled = one_issuer;
    r->table = fomoe_read_table_new(options);
    r->depths = calloc(options->depth * options->drives + 1, sizeof *r->depths);
    int error = !r->table || !r->depths
                    ? -ENOMEM
                    : io_uring_queue_init_params(options->depth * options->drives, &r->uring, &parameters);
    if (!error) {
        error = io_uring_register_files(&r->uring, descriptors, options->files);
        if (error) io_uring_queue_exit(&r->uring);
    }
    if (error) {
        fomoe_read_table_free(r->table);
        free(r->depths);
        free(r);
        return error;
    }
    *ring = r;
    return 0;
}

void fomoe_ring_free(fomoe_ring *r) {
    if (!r) return;
    if (r->process == getpid())
        for (drain(r); fomoe_read_table_in_flight(r->table); drain(r))
            if (!worth_waiting(io_uring_submit_and_wait(&r->uring, 1))) break;
    io_uring_queue_exit(&r->uring);
    fomoe_read_table_free(r->table);
    free(r->depths);
    free(r);
}

void fomoe_ring_table(fomoe_ring *r, fomoe_reader *table) {
    *table = (fomoe_reader){
        .self = r, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel, .wait = wait_for};
}

int fomoe_ring_register_buffers(fomoe_ring *r, void *start, size_t bytes) {
    unsigned count = (bytes + BUFFER_BYTES - 1) / BUFFER_BYTES;
    struct iovec *pieces = calloc(count + 1, sizeof *pieces);
    if (!pieces) return -ENOMEM;
    for (unsigned i = 0; i < count; i++) {
        size_t begin = i * BUFFER_BYTES;
        pieces[i].iov_base = (uint8_t *)start + begin;
        pieces[i].iov_len = bytes - begin < BUFFER_BYTES ? bytes - begin : BUFFER_BYTES;
    }
    if (r->fixed_end) io_uring_unregister_buffers(&r->uring);
    r->fixed_start = r->fixed_end = 0;
    int error = io_uring_register_buffers(&r->uring, pieces, count);
    free(pieces);
    if (error) return error;
    r->fixed_start = (uintptr_t)start;
    r->fixed_end = r->fixed_start + bytes;
    return 0;
}

/* ---- counts ---- */

const fomoe_read_counters *fomoe_ring_reads(const fomoe_ring *r) { return fomoe_read_table_count(r->table); }
const fomoe_ring_counters *fomoe_ring_calls(const fomoe_ring *r) { return &r->counters; }
const uint64_t *fomoe_ring_depths(const fomoe_ring *r, int *count) {
    *count = r->depth * r->drives + 1;
    return r->depths;
}
