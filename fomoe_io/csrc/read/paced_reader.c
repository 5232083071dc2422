#include "paced_reader.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "read_table.h"

enum {
    REAP_BATCH = 64,
    WAIT_MS = 100,
    SPIN_NS = 200000 /* nearer than that the wait spins: a sleep overshoots by 50 us */
};

typedef struct {
    uint64_t tag, due_ns;
    int32_t error;
    int8_t is_here;   /* the other reader has delivered it */
    int8_t is_served; /* the drive has, at due_ns */
} paced_read;

/* A piece in the drive. */
typedef struct {
    uint64_t due_ns;
    int32_t piece;
} flight;

struct fomoe_paced_reader {
    fomoe_reader *inner;
    fomoe_read_table *table; /* what waits for the drive, and what may enter it */
    double ns_per_byte;
    uint64_t latency_ns;
    _Atomic uint64_t *free_ns; /* when the drive has done all that has entered, by whichever reader */
    _Atomic uint64_t own_free_ns;
    flight *flights;              /* a ring of `depth`, so that dues ascend */
    int first, in_flight, depth;
    paced_read *reads; /* submitted and not given back */
    int count, capacity;
    uint64_t looked_ns; /* when the other reader was last asked */
    fomoe_paced_counters counters;
};

/* ---- the drive: its time is that of the model, whenever somebody looks ---- */

/* The drive takes some bytes more.  Returns when it has read them. */
static uint64_t serve(fomoe_paced_reader *p, uint64_t ready_ns, uint64_t bytes) {
    uint64_t free_ns = atomic_load(p->free_ns), done_ns;
    do done_ns = (free_ns < ready_ns ? ready_ns : free_ns) + (uint64_t)(bytes * p->ns_per_byte);
    while (!atomic_compare_exchange_weak(p->free_ns, &free_ns, done_ns));
    return done_ns;
}

/* What may enter at this time does. */
static void enter(fomoe_paced_reader *p, uint64_t at_ns) {
    int32_t piece;
    while ((piece = fomoe_read_table_start(p->table, 0)) >= 0) {
        uint64_t due_ns = serve(p, at_ns + p->latency_ns, fomoe_read_table_piece(p->table, piece)->asked);
        p->flights[(p->first + p->in_flight++) % p->depth] = (flight){due_ns, piece};
    }
}

/* The reads that the table is done with were served, or dropped, at this time. */
static void settle(fomoe_paced_reader *p, uint64_t at_ns) {
    fomoe_completion done;
    while (fomoe_read_table_collect(p->table, &done, 1))
        for (int i = 0; i < p->count; i++) {
            paced_read *r = &p->reads[i];
            if (r->is_served || r->tag != done.tag) continue;
            r->is_served = 1;
            r->due_ns = at_ns;
            if (done.error) r->error = done.error;
            break;
        }
}

static void advance(fomoe_paced_reader *p, uint64_t now_ns) {
    while (p->in_flight && p->flights[p->first].due_ns <= now_ns) {
        flight f = p->flights[p->first];
        p->first = (p->first + 1) % p->depth;
        p->in_flight--;
        fomoe_read_table_finish(p->table, f.piece, (int32_t)fomoe_read_table_piece(p->table, f.piece)->asked);
        settle(p, f.due_ns);
        enter(p, f.due_ns);
    }
}

/* ---- reads go in ---- */

static int grow(fomoe_paced_reader *p, int count) {
    if (p->count + count <= p->capacity) return 0;
    int capacity = 2 * (p->count + count);
    paced_read *reads = realloc(p->reads, capacity * sizeof *reads);
    if (!reads) return -ENOMEM;
    p->reads = reads;
    p->capacity = capacity;
    return 0;
}

/* Whether a read makes sense is the other reader's business: to the model it is its bytes. */
static int wait_in_line(fomoe_paced_reader *p, const fomoe_read *reads, int count) {
    int error = grow(p, count);
    for (int i = 0; i < count && !error; i++) {
        fomoe_read r = {.tag = reads[i].tag, .bytes = reads[i].bytes, .priority = reads[i].priority};
        error = fomoe_read_table_submit(p->table, &r, 1);
    }
    return error;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_paced_reader *p = self;
    uint64_t now = fomoe_now_ns();
    advance(p, now);
    int error = wait_in_line(p, reads, count);
    if (!error) error = p->inner->submit(p->inner->self, reads, count);
    if (error) {
        for (int i = 0; i < count; i++) fomoe_read_table_cancel(p->table, reads[i].tag);
        settle(p, now);
        return error;
    }
    for (int i = 0; i < count; i++) p->reads[p->count++] = (paced_read){.tag = reads[i].tag};
    enter(p, now);
    return 0;
}

static void promote(void *self, uint64_t tag) {
    fomoe_paced_reader *p = self;
    uint64_t now = fomoe_now_ns();
    advance(p, now);
    fomoe_read_table_promote(p->table, tag);
    enter(p, now);
    p->inner->promote(p->inner->self, tag);
}

/* What the drive has all of is read, whatever the other reader could still drop. */
static void cancel(void *self, uint64_t tag) {
    fomoe_paced_reader *p = self;
    uint64_t now = fomoe_now_ns();
    advance(p, now);
    if (!fomoe_read_table_cancel(p->table, tag)) return;
    settle(p, now);
    p->inner->cancel(p->inner->self, tag);
}

/* ---- completions come out ---- */

/* What the other reader has delivered.  Returns a count, or a negative errno. */
static int collect(fomoe_paced_reader *p) {
    fomoe_completion done[REAP_BATCH];
    int count = p->inner->reap(p->inner->self, done, REAP_BATCH, 0);
    uint64_t now = fomoe_now_ns();
    advance(p, now);
    for (int c = 0; c < count; c++)
        for (int i = 0; i < p->count; i++) {
            paced_read *r = &p->reads[i];
            if (r->is_here || r->tag != done[c].tag) continue;
            r->is_here = 1;
            if (!r->error) r->error = done[c].error;
            if (r->is_served && r->error != -ECANCELED && p->looked_ns > r->due_ns) {
                p->counters.late++;
                p->counters.late_ns += now - r->due_ns;
            }
            break;
        }
    p->looked_ns = now;
    return count;
}

static int take_due(fomoe_paced_reader *p, fomoe_completion *completions, int max) {
    int taken = 0, kept = 0;
    for (int i = 0; i < p->count; i++) {
        paced_read *r = &p->reads[i];
        if (r->is_here && r->is_served && taken < max)
            completions[taken++] = (fomoe_completion){.tag = r->tag, .error = r->error};
        else
            p->reads[kept++] = *r;
    }
    p->count = kept;
    return taken;
}

/* How many reads the drive has served; due: how many of them have come. */
static int served(const fomoe_paced_reader *p, int *due) {
    int count = *due = 0;
    for (int i = 0; i < p->count; i++) {
        count += p->reads[i].is_served;
        *due += p->reads[i].is_served && p->reads[i].is_here;
    }
    return count;
}

static void sleep_ns(uint64_t ns) {
    nanosleep(&(struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000}, NULL);
}

static int wait_for(void *self, int milliseconds) {
    fomoe_paced_reader *p = self;
    uint64_t now = fomoe_now_ns(), end = now + milliseconds * 1000000ULL;
    for (; now < end; now = fomoe_now_ns()) {
        int due, error = collect(p);
        if (error < 0) return error;
        int waits_for_bytes = served(p, &due) > 0;
        if (!p->count || due) return 1;
        if (waits_for_bytes) {
            if ((error = p->inner->wait(p->inner->self, 1)) < 0) return error;
            continue;
        }
        uint64_t until = p->in_flight ? p->flights[p->first].due_ns : end;
        if (until > end) until = end;
        if (until > now + SPIN_NS) sleep_ns(until - now - SPIN_NS / 2);
    }
    return 0;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fomoe_paced_reader *p = self;
    while (p->count) {
        int error = collect(p);
        if (error < 0) return error;
        int taken = take_due(p, completions, max);
        if (taken || !wait) return taken;
        if ((error = wait_for(p, WAIT_MS)) < 0) return error;
    }
    return 0;
}

/* ---- life ---- */

static fomoe_read_table *table_of_one_drive(int depth) {
    const uint64_t file_bytes = INT64_MAX;
    const int32_t drive = 0, mirror = -1;
    const uint32_t restart = 1;
    return fomoe_read_table_new(&(fomoe_read_options){.files = 1,
                                                      .drives = 1,
                                                      .depth = depth,
                                                      .file_bytes = &file_bytes,
                                                      .drive = &drive,
                                                      .mirror = &mirror,
                                                      .restart = &restart});
}

fomoe_paced_reader *fomoe_paced_reader_new(fomoe_reader *inner, double bandwidth, uint64_t latency_ns, int depth,
                                           fomoe_paced_reader *beside) {
    fomoe_paced_reader *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->inner = inner;
    p->ns_per_byte = 1e9 / bandwidth;
    p->latency_ns = latency_ns;
    p->free_ns = beside ? beside->free_ns : &p->own_free_ns;
    p->depth = depth;
    p->flights = calloc(depth, sizeof *p->flights);
    p->table = table_of_one_drive(depth);
    if (!p->flights || !p->table) {
        fomoe_paced_reader_free(p);
        return NULL;
    }
    return p;
}

void fomoe_paced_reader_free(fomoe_paced_reader *p) {
    if (!p) return;
    fomoe_read_table_free(p->table);
    free(p->flights);
    free(p->reads);
    free(p);
}

void fomoe_paced_reader_table(fomoe_paced_reader *p, fomoe_reader *table) {
    *table = (fomoe_reader){
        .self = p, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel, .wait = wait_for};
}

const fomoe_paced_counters *fomoe_paced_reader_count(const fomoe_paced_reader *p) { return &p->counters; }
