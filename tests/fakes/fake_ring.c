/* A reader with faults, built by tests/fakes/__init__.py from this file and csrc/read/read_table.c.
 *
 * Everything about reads is the real read table's; only the drives are made up: each piece takes a random time on
 * a clock of its own, may be cut short, interrupted, refused or fail, and finishes in any order.  What lands in
 * memory is read from the real files in the moment of completion; until then the target holds garbage, so that a
 * byte used too early is a wrong byte. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../fomoe_io/csrc/read/read_table.h"

enum { GARBAGE = 0xA5, PAGE = 4096 };

typedef struct {
    double short_share, interrupted_share, refused_share; /* of the answers */
    uint64_t bad_offset, bad_bytes;                       /* this range of bad_file answers EIO */
    int32_t bad_file;                                     /* -1: none */
    uint64_t seed;
} fake_faults;

typedef struct {
    int32_t piece;
    double due;
} flight;

typedef struct {
    fomoe_read_table *table;
    int drives, places, count;
    int *descriptors;
    int32_t *drive_of_file;
    double *page_time, *busy_until, clock; /* of each drive: how long a page takes, when it is free */
    fake_faults faults;
    uint64_t random;
    flight *flights;
} fake_ring;

static double uniform(fake_ring *f) { /* xorshift64* */
    f->random ^= f->random >> 12;
    f->random ^= f->random << 25;
    f->random ^= f->random >> 27;
    return (double)((f->random * 2685821657736338717u) >> 11) / 9007199254740992.0;
}

static void fill(fake_ring *f) {
    for (int drive = 0; drive < f->drives; drive++) {
        int32_t piece;
        while ((piece = fomoe_read_table_start(f->table, drive)) >= 0) {
            const fomoe_piece *p = fomoe_read_table_piece(f->table, piece);
            double start = f->busy_until[drive] > f->clock ? f->busy_until[drive] : f->clock;
            double work = (p->asked - p->done) / (double)PAGE * f->page_time[drive];
            memset(p->target + p->done, GARBAGE, p->asked - p->done);
            f->busy_until[drive] = start + work;
            f->flights[f->count++] = (flight){piece, start + work * (1 + uniform(f))};
        }
    }
}

static int32_t answer(fake_ring *f, const fomoe_piece *p) {
    uint64_t offset = p->offset + p->done, bytes = p->asked - p->done;
    if (uniform(f) < f->faults.interrupted_share) return -EINTR;
    if (uniform(f) < f->faults.refused_share) return -EAGAIN;
    if (p->file == f->faults.bad_file && offset < f->faults.bad_offset + f->faults.bad_bytes &&
        offset + bytes > f->faults.bad_offset)
        return -EIO;
    if (uniform(f) < f->faults.short_share) bytes = (uint64_t)(bytes * uniform(f)) / 512 * 512;
    if (!bytes) bytes = 512;
    ssize_t n = pread(f->descriptors[p->file], p->target + p->done, bytes, offset);
    return n < 0 ? -errno : (int32_t)n;
}

/* The piece that is due first arrives; 0 when nothing is under way. */
static int step(fake_ring *f) {
    int first = 0;
    if (!f->count) return 0;
    for (int i = 1; i < f->count; i++)
        if (f->flights[i].due < f->flights[first].due) first = i;
    flight done = f->flights[first];
    f->flights[first] = f->flights[--f->count];
    if (done.due > f->clock) f->clock = done.due;
    fomoe_read_table_finish(f->table, done.piece, answer(f, fomoe_read_table_piece(f->table, done.piece)));
    return 1;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fake_ring *f = self;
    int error = fomoe_read_table_submit(f->table, reads, count);
    if (!error) fill(f);
    return error;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fake_ring *f = self;
    do {
        fill(f);
        if (!wait && uniform(f) < 0.5) break;
    } while (!fomoe_read_table_done(f->table) && step(f));
    fill(f);
    return fomoe_read_table_collect(f->table, completions, max);
}

static void promote(void *self, uint64_t tag) { fomoe_read_table_promote(((fake_ring *)self)->table, tag); }
static void cancel(void *self, uint64_t tag) { fomoe_read_table_cancel(((fake_ring *)self)->table, tag); }

static int wait_for(void *self, int milliseconds) { return self != NULL && milliseconds >= 0; }

void fake_ring_free(fake_ring *f) {
    if (!f) return;
    while (f->count && step(f)) fill(f);
    fomoe_read_table_free(f->table);
    free(f->descriptors);
    free(f->page_time);
    free(f->busy_until);
    free(f->flights);
    free(f);
}

fake_ring *fake_ring_new(int files, const int *descriptors, const uint64_t *file_bytes, const int32_t *drive,
                         const int32_t *mirror, int drives, const double *page_time, int depth, uint32_t piece_bytes,
                         const fake_faults *faults, fomoe_reader *table) {
    fomoe_read_options options = {.files = files,
                                  .drives = drives,
                                  .depth = depth,
                                  .piece_bytes = piece_bytes,
                                  .file_bytes = file_bytes,
                                  .drive = drive,
                                  .mirror = mirror};
    fake_ring *f = calloc(1, sizeof *f);
    f->table = fomoe_read_table_new(&options);
    f->drives = drives;
    f->descriptors = calloc(files, sizeof *f->descriptors);
    f->page_time = calloc(drives, sizeof *f->page_time);
    f->busy_until = calloc(drives, sizeof *f->busy_until);
    f->flights = calloc(depth * drives, sizeof *f->flights);
    memcpy(f->descriptors, descriptors, files * sizeof *descriptors);
    memcpy(f->page_time, page_time, drives * sizeof *page_time);
    f->faults = *faults;
    f->random = faults->seed * 0x9E3779B97F4A7C15u + 1;
    *table = (fomoe_reader){
        .self = f, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel, .wait = wait_for};
    return f;
}

double fake_ring_clock(const fake_ring *f) { return f->clock; }
const fomoe_read_counters *fake_ring_count(const fake_ring *f) { return fomoe_read_table_count(f->table); }
