#include "trace.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER_BYTES = 256 << 10 };

struct fomoe_trace {
    int file, used, error;
    uint8_t *buffer;
    int64_t filled, capacity;
    int64_t taken; /* of one that is held, while another takes its records */
    uint16_t *picks; /* of the batch at work: [batch][used] */
    float *weights;
};

static int64_t pick_bytes(const fomoe_trace *t) {
    return t->used * (int64_t)(sizeof *t->weights + 2 * sizeof *t->picks + sizeof(int8_t));
}

static fomoe_trace *with_room(fomoe_trace *t, int batch, int64_t bytes) {
    t->capacity = bytes;
    t->buffer = malloc(bytes);
    t->picks = malloc((size_t)batch * t->used * sizeof *t->picks);
    t->weights = malloc((size_t)batch * t->used * sizeof *t->weights);
    if (t->buffer && t->picks && t->weights) return t;
    fomoe_trace_free(t);
    return NULL;
}

fomoe_trace *fomoe_trace_new(int file, int batch, int used, int most) {
    fomoe_trace *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->file = file, t->used = used;
    int64_t of_batch = batch * pick_bytes(t), of_seeds = most * (int64_t)(sizeof(double) + sizeof(uint16_t));
    return with_room(t, batch, BUFFER_BYTES + sizeof(fomoe_trace_head) + (of_batch > of_seeds ? of_batch : of_seeds));
}

fomoe_trace *fomoe_trace_held(int records, int batch, int used) {
    fomoe_trace *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->file = -1, t->used = used;
    return with_room(t, batch, records * ((int64_t)sizeof(fomoe_trace_head) + batch * pick_bytes(t)));
}

void fomoe_trace_free(fomoe_trace *t) {
    if (!t) return;
    free(t->buffer);
    free(t->picks);
    free(t->weights);
    free(t);
}

int fomoe_trace_flush(fomoe_trace *t) {
    for (int64_t done = 0; done < t->filled && !t->error;) {
        ssize_t n = write(t->file, t->buffer + done, t->filled - done);
        if (n > 0)
            done += n;
        else if (n == 0 || errno != EINTR)
            t->error = n ? -errno : -EIO;
    }
    t->filled = 0;
    return t->error;
}

/* Room for a record of this many bytes after its head: a whole one fits an empty buffer. */
static void begin(fomoe_trace *t, int kind, int layer, int count, int64_t bytes) {
    fomoe_trace_head head = {kind, layer, count};
    if (t->filled + (int64_t)sizeof head + bytes > t->capacity) fomoe_trace_flush(t);
    memcpy(t->buffer + t->filled, &head, sizeof head);
    t->filled += sizeof head;
}

static void append(fomoe_trace *t, const void *data, int64_t bytes) {
    memcpy(t->buffer + t->filled, data, bytes);
    t->filled += bytes;
}

static void append_experts(fomoe_trace *t, const int32_t *experts, int count) {
    for (int i = 0; i < count; i++) {
        uint16_t id = experts[i];
        append(t, &id, sizeof id);
    }
}

void fomoe_trace_picks(fomoe_trace *t, int token, const int32_t *experts, const float *weights) {
    int64_t row = (int64_t)token * t->used;
    for (int k = 0; k < t->used; k++) t->picks[row + k] = experts[k];
    memcpy(t->weights + row, weights, t->used * sizeof *weights);
}

void fomoe_trace_batch(fomoe_trace *t, int layer, int tokens, const uint8_t *chosen, int64_t chosen_stride,
                       const int8_t *found) {
    int64_t picks = (int64_t)tokens * t->used;
    begin(t, FOMOE_TRACE_BATCH, layer, tokens, tokens * pick_bytes(t));
    append(t, t->weights, picks * sizeof *t->weights);
    append(t, t->picks, picks * sizeof *t->picks);
    for (int i = 0; i < tokens; i++) append_experts(t, (const int32_t *)(chosen + i * chosen_stride), t->used);
    append(t, found, picks * sizeof *found);
}

void fomoe_trace_seeds(fomoe_trace *t, int layer, int count, const int32_t *experts, const double *scores) {
    begin(t, FOMOE_TRACE_SEED, layer, count, count * (sizeof *scores + sizeof *t->picks));
    append(t, scores, count * sizeof *scores);
    append_experts(t, experts, count);
}

/* The layer of the first record that is left, -1: none is. */
static int next_layer(const fomoe_trace *t, fomoe_trace_head *head) {
    if (t->taken == t->filled) return -1;
    memcpy(head, t->buffer + t->taken, sizeof *head); /* records have any length */
    return head->layer;
}

/* Who has the lowest layer that is left above `layer`. */
static fomoe_trace *holder_of_next(fomoe_trace *const *held, int count, int layer) {
    fomoe_trace_head head;
    fomoe_trace *found = NULL;
    int lowest = INT_MAX;
    for (int i = 0; i < count; i++) {
        int next = next_layer(held[i], &head);
        if (next > layer && next < lowest) found = held[i], lowest = next;
    }
    return found;
}

void fomoe_trace_take(fomoe_trace *t, fomoe_trace *const *held, int count) {
    for (int i = 0; i < count; i++) held[i]->taken = 0;
    for (int layer = -1;;) {
        fomoe_trace *from = holder_of_next(held, count, layer);
        if (!from && layer < 0) break;
        layer = -1; /* none is above it: the next batch begins */
        if (!from) continue;
        fomoe_trace_head head = {0};
        layer = next_layer(from, &head);
        int64_t bytes = head.count * pick_bytes(t);
        begin(t, head.kind, head.layer, head.count, bytes);
        append(t, from->buffer + from->taken + sizeof head, bytes);
        from->taken += sizeof head + bytes;
    }
    for (int i = 0; i < count; i++) held[i]->filled = 0;
}
