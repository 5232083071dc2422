#include "io_load.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"

/* Values below 64 have a bin each; above, the top bit chooses the octave and the next six bits the step. */
static int latency_bin(uint64_t ns) {
    if (ns < 1u << FOMOE_LATENCY_STEP_BITS) return (int)ns;
    int octave = 63 - __builtin_clzll(ns) - FOMOE_LATENCY_STEP_BITS;
    return ((octave + 1) << FOMOE_LATENCY_STEP_BITS) + (int)((ns >> octave) & ((1 << FOMOE_LATENCY_STEP_BITS) - 1));
}

typedef struct {
    uint64_t begun_ns, submitted_ns;
    uint32_t bytes;
} flight;

typedef struct {
    const fomoe_reader *reader;
    const fomoe_load *load;
    fomoe_load_counts *counts;
    fomoe_read *reads;
    fomoe_completion *done;
    flight *flights; /* of each buffer */
    int32_t *idle;   /* buffers not in use */
    int idle_count;
    uint64_t planned;
    int error, counting;
} run;

static void count_latency(fomoe_load_counts *c, uint64_t ns) {
    c->latency[latency_bin(ns)]++;
    c->latency_sum_ns += (double)ns;
    c->latency_square_sum += (double)ns * (double)ns;
    if (ns < c->latency_min_ns) c->latency_min_ns = ns;
    if (ns > c->latency_max_ns) c->latency_max_ns = ns;
}

static void add_span(fomoe_span_sum *s, uint64_t ns) {
    s->sum_ns += (double)ns;
    s->square_sum += (double)ns * (double)ns;
    if (ns < s->min_ns) s->min_ns = ns;
    if (ns > s->max_ns) s->max_ns = ns;
}

static void start(run *r) {
    const fomoe_load *l = r->load;
    int count = 0, in_flight = l->depth - r->idle_count;
    while (r->idle_count && (!l->most_reads || r->counts->issued < l->most_reads)) {
        const fomoe_planned_read *p = &l->plan[r->planned];
        int32_t buffer = r->idle[--r->idle_count];
        r->planned = r->planned + 1 == l->plan_count ? 0 : r->planned + 1;
        r->counts->issued++;
        r->reads[count++] = (fomoe_read){.tag = buffer,
                                         .offset = p->offset,
                                         .bytes = p->bytes,
                                         .file = p->file,
                                         .target = l->buffers + buffer * l->buffer_bytes};
        if (r->counting) r->counts->in_flight[in_flight + count]++;
    }
    if (!count) return;
    uint64_t before = fomoe_now_ns();
    int error = r->reader->submit(r->reader->self, r->reads, count);
    uint64_t after = fomoe_now_ns();
    if (error) {
        r->error = r->error ? r->error : error;
        for (int i = 0; i < count; i++) r->idle[r->idle_count++] = (int32_t)r->reads[i].tag;
        return;
    }
    if (r->counting) {
        r->counts->submit_ns += after - before;
        r->counts->submit_calls++;
    }
    for (int i = 0; i < count; i++) r->flights[r->reads[i].tag] = (flight){before, after, r->reads[i].bytes};
}

static void finish(run *r) {
    int count = r->reader->reap(r->reader->self, r->done, r->load->depth, 1);
    uint64_t now = fomoe_now_ns();
    if (count <= 0) {
        r->error = r->error ? r->error : count ? count : -EIO;
        r->idle_count = r->load->depth; /* the reader has lost them: do not wait for ever */
        return;
    }
    for (int i = 0; i < count; i++) {
        uint64_t buffer = r->done[i].tag;
        r->idle[r->idle_count++] = (int32_t)buffer;
        if (r->done[i].error && !r->error) r->error = r->done[i].error;
        if (!r->counting || r->done[i].error) continue;
        const flight *f = &r->flights[buffer];
        count_latency(r->counts, now - f->submitted_ns);
        add_span(&r->counts->submission, f->submitted_ns - f->begun_ns);
        add_span(&r->counts->total, now - f->begun_ns);
        atomic_fetch_add_explicit(&r->counts->reads, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&r->counts->bytes, r->flights[buffer].bytes, memory_order_relaxed);
    }
}

static int drive_load(run *r) {
    const fomoe_load *l = r->load;
    fomoe_load_counts *c = r->counts;
    uint64_t begin = fomoe_now_ns(), counted_from = begin + l->ramp_ns;
    uint64_t end = l->duration_ns ? counted_from + l->duration_ns : UINT64_MAX;
    r->counting = !l->ramp_ns;
    c->started_ns = counted_from;
    for (;;) {
        uint64_t now = fomoe_now_ns();
        if (!r->counting && now >= counted_from) {
            r->counting = 1;
            c->started_ns = now; /* a ramp that ends late takes nothing from what is measured */
            if (l->duration_ns) end = now + l->duration_ns;
        }
        int stop = r->error || now >= end || atomic_load_explicit(&c->stop, memory_order_relaxed);
        if (!stop) start(r);
        if (r->idle_count == l->depth) break; /* stopped, failed, or the plan's end, and all are back */
        finish(r);
    }
    c->ended_ns = fomoe_now_ns();
    return r->error;
}

int fomoe_load_run(const fomoe_reader *reader, const fomoe_load *load, fomoe_load_counts *counts) {
    int error = -ENOMEM, depth = load->depth;
    run r = {.reader = reader, .load = load, .counts = counts};
    r.reads = calloc(depth, sizeof *r.reads);
    r.done = calloc(depth, sizeof *r.done);
    r.flights = calloc(depth, sizeof *r.flights);
    r.idle = calloc(depth, sizeof *r.idle);
    counts->latency_min_ns = counts->submission.min_ns = counts->total.min_ns = UINT64_MAX;
    if (r.reads && r.done && r.flights && r.idle) {
        for (int i = depth - 1; i >= 0; i--) r.idle[r.idle_count++] = i;
        error = drive_load(&r);
    }
    free(r.reads);
    free(r.done);
    free(r.flights);
    free(r.idle);
    return error;
}
