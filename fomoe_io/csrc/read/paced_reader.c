#include "paced_reader.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"

enum {
    REAP_BATCH = 64,
    WAIT_MS = 100,
    SPIN_NS = 200000 /* nearer than that the wait spins: a sleep overshoots by 50 us */
};

typedef struct {
    uint64_t tag, due_ns;
    int32_t error;
    int32_t is_done; /* the other reader has delivered it */
} paced_read;

struct fomoe_paced_reader {
    fomoe_reader *inner;
    double ns_per_byte;
    uint64_t latency_ns, free_ns; /* when the drive has done all that was submitted */
    paced_read *reads;            /* in flight, in the order in which they were submitted, so that dues ascend */
    int count, capacity;
    fomoe_paced_counters counters;
};

static int grow(fomoe_paced_reader *p, int count) {
    if (p->count + count <= p->capacity) return 0;
    int capacity = 2 * (p->count + count);
    paced_read *reads = realloc(p->reads, capacity * sizeof *reads);
    if (!reads) return -ENOMEM;
    p->reads = reads;
    p->capacity = capacity;
    return 0;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_paced_reader *p = self;
    int error = grow(p, count);
    if (!error) error = p->inner->submit(p->inner->self, reads, count);
    if (error) return error;
    uint64_t ready_ns = fomoe_now_ns() + p->latency_ns;
    for (int i = 0; i < count; i++) {
        if (p->free_ns < ready_ns) p->free_ns = ready_ns;
        p->free_ns += (uint64_t)(reads[i].bytes * p->ns_per_byte);
        p->reads[p->count++] = (paced_read){.tag = reads[i].tag, .due_ns = p->free_ns};
        p->counters.reads++;
        p->counters.bytes += reads[i].bytes;
    }
    return 0;
}

/* What the other reader has delivered.  Returns a count, or a negative errno. */
static int collect(fomoe_paced_reader *p, int wait) {
    fomoe_completion done[REAP_BATCH];
    int count = p->inner->reap(p->inner->self, done, REAP_BATCH, wait);
    uint64_t now = count > 0 ? fomoe_now_ns() : 0;
    for (int c = 0; c < count; c++)
        for (int i = 0; i < p->count; i++) {
            paced_read *r = &p->reads[i];
            if (r->is_done || r->tag != done[c].tag) continue;
            r->is_done = 1;
            r->error = done[c].error;
            if (now > r->due_ns) {
                p->counters.late++;
                p->counters.late_ns += now - r->due_ns;
            }
            break;
        }
    return count;
}

static int take_due(fomoe_paced_reader *p, fomoe_completion *completions, int max) {
    int taken = 0, kept = 0;
    uint64_t now = fomoe_now_ns();
    for (int i = 0; i < p->count; i++) {
        paced_read *r = &p->reads[i];
        if (r->is_done && r->due_ns <= now && taken < max)
            completions[taken++] = (fomoe_completion){.tag = r->tag, .error = r->error};
        else
            p->reads[kept++] = *r;
    }
    p->count = kept;
    return taken;
}

static const paced_read *first_done(const fomoe_paced_reader *p) {
    for (int i = 0; i < p->count; i++)
        if (p->reads[i].is_done) return &p->reads[i];
    return NULL;
}

static void sleep_ns(uint64_t ns) {
    nanosleep(&(struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000}, NULL);
}

static int wait_for(void *self, int milliseconds) {
    fomoe_paced_reader *p = self;
    uint64_t now = fomoe_now_ns(), end = now + milliseconds * 1000000ULL;
    for (; now < end; now = fomoe_now_ns()) {
        int error = collect(p, 0);
        if (error < 0) return error;
        const paced_read *r = first_done(p);
        if (!p->count || (r && r->due_ns <= now)) return 1;
        uint64_t until = r && r->due_ns < end ? r->due_ns : end, left_ns = until > now ? until - now : 0;
        if (!r && (error = p->inner->wait(p->inner->self, 1 + (int)(left_ns / 1000000))) < 0) return error;
        if (r && left_ns > SPIN_NS) sleep_ns(left_ns - SPIN_NS / 2);
    }
    return 0;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fomoe_paced_reader *p = self;
    while (p->count) {
        int error = collect(p, 0);
        if (error < 0) return error;
        int taken = take_due(p, completions, max);
        if (taken || !wait) return taken;
        if ((error = wait_for(p, WAIT_MS)) < 0) return error;
    }
    return 0;
}

static void promote(void *self, uint64_t tag) {
    fomoe_paced_reader *p = self;
    p->inner->promote(p->inner->self, tag);
}

static void cancel(void *self, uint64_t tag) {
    fomoe_paced_reader *p = self;
    p->inner->cancel(p->inner->self, tag);
}

fomoe_paced_reader *fomoe_paced_reader_new(fomoe_reader *inner, double bandwidth, uint64_t latency_ns) {
    fomoe_paced_reader *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->inner = inner;
    p->ns_per_byte = 1e9 / bandwidth;
    p->latency_ns = latency_ns;
    return p;
}

void fomoe_paced_reader_free(fomoe_paced_reader *p) {
    if (!p) return;
    free(p->reads);
    free(p);
}

void fomoe_paced_reader_table(fomoe_paced_reader *p, fomoe_reader *table) {
    *table = (fomoe_reader){
        .self = p, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel, .wait = wait_for};
}

const fomoe_paced_counters *fomoe_paced_reader_count(const fomoe_paced_reader *p) { return &p->counters; }
