#include "read_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    PAGE_BYTES = 4096,
    MOST_TRIES = 100,        /* interrupted, refused or empty answers in a row: then it is an error */
    ERRORS_TO_AVOID_A_FILE = 3, /* in a row: its mirror is asked first from then on */
    FIRST_CAPACITY = 256,
    /* What prefetches may fill a drive up to, demands counted: what is in a drive can't be called back, and a demand
     * that comes next waits for it.  1.2 MB keep a drive of 14.5 GB/s and 80 us busy; the rest is for the 50 us in
     * which nobody may have looked.  (With 4 MB a token takes 1 to 3 % longer on an H200 beside such a drive.) */
    PREFETCH_BYTES = 2 << 20,
    PREFETCH_PIECE_BYTES = PREFETCH_BYTES / 8, /* so that what is left when one is back keeps the drive busy */
};

typedef struct {
    int32_t first, last;
} queue;

typedef struct {
    uint64_t tag, offset;
    uint8_t *target;
    uint32_t asked, wanted, issued; /* issued: bytes that have become pieces */
    int32_t next, error, pieces;    /* pieces: unfinished ones */
    uint16_t file;
    uint8_t priority;
} operation;

typedef struct {
    queue waiting[2]; /* operations with bytes to issue: demands, prefetches */
    queue again;      /* pieces that were cut short or moved here from a mirror */
    int in_flight;
    uint64_t in_flight_bytes;
    uint64_t outstanding_bytes; /* of operations sent here */
} drive_state;

struct fomoe_read_table {
    fomoe_read_options options;
    uint64_t *file_bytes;
    int32_t *drive, *mirror, *errors_in_a_row;
    uint32_t *restart;
    drive_state *drives;
    operation *operations;
    int32_t capacity, free_operations, left;
    fomoe_piece *pieces;
    int32_t free_pieces;
    int in_flight;
    queue done;
    fomoe_read_counters counters;
};

/* ---- queues: linked through operation.next or piece.next ---- */

static int32_t *operation_link(fomoe_read_table *t, int32_t i) { return &t->operations[i].next; }
static int32_t *piece_link(fomoe_read_table *t, int32_t i) { return &t->pieces[i].next; }
typedef int32_t *(*link_of)(fomoe_read_table *, int32_t);

static void push(fomoe_read_table *t, link_of link, queue *q, int32_t i) {
    *link(t, i) = NONE;
    if (q->last >= 0)
        *link(t, q->last) = i;
    else
        q->first = i;
    q->last = i;
}

static int32_t pop(fomoe_read_table *t, link_of link, queue *q) {
    int32_t i = q->first;
    if (i < 0) return NONE;
    q->first = *link(t, i);
    if (q->first < 0) q->last = NONE;
    return i;
}

/* Take operation i out of the middle; 0 when it was not there. */
static int unlink_operation(fomoe_read_table *t, queue *q, int32_t i) {
    for (int32_t at = q->first, before = NONE; at >= 0; before = at, at = t->operations[at].next) {
        if (at != i) continue;
        if (before < 0)
            q->first = t->operations[at].next;
        else
            t->operations[before].next = t->operations[at].next;
        if (q->last == at) q->last = before;
        return 1;
    }
    return 0;
}

/* ---- life ---- */

static void *copy_of(const void *source, size_t bytes) {
    void *copy = malloc(bytes ? bytes : 1);
    if (copy) memcpy(copy, source, bytes);
    return copy;
}

static int grow(fomoe_read_table *t, int32_t needed) {
    int32_t capacity = t->capacity ? t->capacity : FIRST_CAPACITY;
    while (capacity < needed) capacity *= 2;
    if (capacity == t->capacity) return 0;
    operation *operations = realloc(t->operations, capacity * sizeof *operations);
    if (!operations) return -ENOMEM;
    t->operations = operations;
    for (int32_t i = capacity - 1; i >= t->capacity; i--) {
        operations[i].next = t->free_operations;
        t->free_operations = i;
    }
    t->capacity = capacity;
    return 0;
}

fomoe_read_table *fomoe_read_table_new(const fomoe_read_options *options) {
    fomoe_read_table *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    /* twice the depth: a piece that waits to be started again keeps its place */
    int32_t places = 2 * options->depth * options->drives;
    t->options = *options;
    t->free_operations = t->free_pieces = NONE;
    t->done = (queue){NONE, NONE};
    t->file_bytes = copy_of(options->file_bytes, options->files * sizeof *t->file_bytes);
    t->drive = copy_of(options->drive, options->files * sizeof *t->drive);
    t->mirror = copy_of(options->mirror, options->files * sizeof *t->mirror);
    t->restart = calloc(options->files + 1, sizeof *t->restart);
    t->errors_in_a_row = calloc(options->files + 1, sizeof *t->errors_in_a_row);
    t->drives = calloc(options->drives + 1, sizeof *t->drives);
    t->pieces = calloc(places + 1, sizeof *t->pieces);
    if (!t->file_bytes || !t->drive || !t->mirror || !t->restart || !t->errors_in_a_row || !t->drives || !t->pieces ||
        grow(t, 1)) {
        fomoe_read_table_free(t);
        return NULL;
    }
    for (int i = 0; i < options->files; i++) t->restart[i] = options->restart ? options->restart[i] : PAGE_BYTES;
    for (int d = 0; d < options->drives; d++)
        t->drives[d].waiting[0] = t->drives[d].waiting[1] = t->drives[d].again = (queue){NONE, NONE};
    for (int32_t i = places - 1; i >= 0; i--) {
        t->pieces[i].next = t->free_pieces;
        t->free_pieces = i;
    }
    return t;
}

void fomoe_read_table_free(fomoe_read_table *t) {
    if (!t) return;
    void *owned[] = {t->file_bytes, t->drive,      t->mirror, t->restart, t->errors_in_a_row,
                     t->drives,     t->operations, t->pieces, t};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

/* ---- reads come in ---- */

static void remember_error(fomoe_read_table *t, int file, uint64_t offset, int32_t error) {
    t->counters.errors++;
    t->counters.error_file = file;
    t->counters.error_offset = offset;
    t->counters.error_code = -error;
}

/* The copy to read from: the one that works, then the one whose drive has less to do. */
static int choose_copy(const fomoe_read_table *t, int file) {
    int other = t->mirror[file];
    if (other < 0) return file;
    int avoid = t->errors_in_a_row[file] >= ERRORS_TO_AVOID_A_FILE;
    if (avoid != (t->errors_in_a_row[other] >= ERRORS_TO_AVOID_A_FILE)) return avoid ? other : file;
    uint64_t mine = t->drives[t->drive[file]].outstanding_bytes, others = t->drives[t->drive[other]].outstanding_bytes;
    return others < mine ? other : file;
}

int fomoe_read_table_submit(fomoe_read_table *t, const fomoe_read *reads, int count) {
    for (int i = 0; i < count; i++) {
        const fomoe_read *r = &reads[i];
        if (r->file < t->options.files && r->offset < t->file_bytes[r->file] && r->bytes &&
            !(r->offset % t->restart[r->file]))
            continue;
        remember_error(t, r->file < t->options.files ? r->file : t->options.files - 1, r->offset, -EINVAL);
        return -EINVAL;
    }
    int error = grow(t, t->left + count);
    if (error) return error;
    for (int i = 0; i < count; i++) {
        const fomoe_read *r = &reads[i];
        int32_t index = t->free_operations;
        operation *o = &t->operations[index];
        uint64_t left = t->file_bytes[r->file] - r->offset;
        t->free_operations = o->next;
        *o = (operation){.tag = r->tag,
                         .offset = r->offset,
                         .target = r->target,
                         .asked = r->bytes,
                         .wanted = left < r->bytes ? left : r->bytes,
                         .file = choose_copy(t, r->file),
                         .priority = r->priority != 0};
        drive_state *d = &t->drives[t->drive[o->file]];
        d->outstanding_bytes += o->wanted;
        push(t, operation_link, &d->waiting[o->priority], index);
    }
    t->left += count;
    t->counters.reads += count;
    return 0;
}

/* ---- pieces start ---- */

static uint32_t next_bytes(const fomoe_read_table *t, const operation *o) {
    uint32_t most = t->options.piece_bytes, left = o->asked - o->issued;
    if (o->priority && (!most || most > PREFETCH_PIECE_BYTES)) most = PREFETCH_PIECE_BYTES;
    return most && left > most ? most : left;
}

/* The next piece of the read at the head of a queue; the read leaves the queue with its last piece. */
static int32_t cut(fomoe_read_table *t, queue *q) {
    int32_t index = t->free_pieces;
    operation *o = &t->operations[q->first];
    fomoe_piece *p = &t->pieces[index];
    uint32_t asked = next_bytes(t, o), wanted = o->wanted - o->issued;
    t->free_pieces = p->next;
    if (wanted > asked) wanted = asked;
    *p = (fomoe_piece){.offset = o->offset + o->issued,
                       .target = o->target + o->issued,
                       .asked = asked,
                       .wanted = wanted,
                       .operation = q->first,
                       .file = o->file};
    o->issued += wanted;
    o->pieces++;
    t->counters.pieces++;
    if (o->issued == o->wanted) pop(t, operation_link, q);
    return index;
}

/* Whether a prefetch is next on a drive, and may start. */
static int may_prefetch(const fomoe_read_table *t, const drive_state *d) {
    int32_t next = d->waiting[1].first;
    if (next < 0 || d->waiting[0].first >= 0) return 0;
    return !d->in_flight || d->in_flight_bytes + next_bytes(t, &t->operations[next]) <= PREFETCH_BYTES;
}

int fomoe_read_table_ready(const fomoe_read_table *t, int drive) {
    const drive_state *d = &t->drives[drive];
    if (d->in_flight == t->options.depth) return 0;
    return d->again.first >= 0 || (t->free_pieces >= 0 && (d->waiting[0].first >= 0 || may_prefetch(t, d)));
}

int32_t fomoe_read_table_start(fomoe_read_table *t, int drive) {
    drive_state *d = &t->drives[drive];
    if (!fomoe_read_table_ready(t, drive)) return NONE;
    int32_t index = pop(t, piece_link, &d->again);
    if (index < 0) index = cut(t, &d->waiting[d->waiting[0].first < 0]);
    const fomoe_piece *p = &t->pieces[index];
    d->in_flight_bytes += p->asked - p->done;
    d->in_flight++;
    t->in_flight++;
    return index;
}

fomoe_piece *fomoe_read_table_piece(fomoe_read_table *t, int32_t piece) { return &t->pieces[piece]; }

/* ---- answers ---- */

/* A read whose last piece is back, and of which nothing more will be issued, is done. */
static void close_operation(fomoe_read_table *t, int32_t index) {
    operation *o = &t->operations[index];
    if (o->pieces || o->issued < o->wanted) return;
    t->drives[t->drive[o->file]].outstanding_bytes -= o->wanted;
    if (o->error == -ECANCELED) t->counters.cancelled++;
    push(t, operation_link, &t->done, index);
}

/* Issue nothing more of a read that failed or was cancelled. */
static void give_up(fomoe_read_table *t, int32_t index, int32_t error) {
    operation *o = &t->operations[index];
    if (o->issued < o->wanted) {
        unlink_operation(t, &t->drives[t->drive[o->file]].waiting[o->priority], index);
        o->issued = o->wanted;
    } else if (error == -ECANCELED) {
        return; /* all of it is under way: let it arrive */
    }
    if (!o->error) o->error = error;
}

static void start_again(fomoe_read_table *t, int32_t index) {
    push(t, piece_link, &t->drives[t->drive[t->pieces[index].file]].again, index);
}

/* Ask the mirror for what is left of a piece; 0 when there is none, or it has failed as well. */
static int fail_over(fomoe_read_table *t, fomoe_piece *p) {
    int other = t->mirror[p->file];
    t->errors_in_a_row[p->file]++;
    if (other < 0 || p->failed_over) return 0;
    t->counters.failovers++;
    p->file = other;
    p->done -= p->done % t->restart[other];
    p->failed_over = 1;
    p->tries = 0;
    return 1;
}

void fomoe_read_table_finish(fomoe_read_table *t, int32_t index, int32_t result) {
    fomoe_piece *p = &t->pieces[index];
    operation *o = &t->operations[p->operation];
    drive_state *d = &t->drives[t->drive[p->file]];
    int32_t owner = p->operation, error = 0;
    d->in_flight_bytes -= p->asked - p->done;
    d->in_flight--;
    t->in_flight--;
    if (result > 0) {
        t->counters.bytes += result;
        uint32_t before = p->done;
        p->done += result;
        if (p->done < p->wanted) { /* short: go on from the last whole block, as direct reads must */
            t->counters.short_reads++;
            p->done -= p->done % t->restart[p->file];
            p->tries = p->done > before ? 0 : p->tries + 1;
            if (p->tries <= MOST_TRIES && !o->error) {
                start_again(t, index);
                return;
            }
            error = -ENODATA; /* less than a block again and again: the file was cut within it */
        } else {
            t->errors_in_a_row[p->file] = 0;
        }
    } else if (result == -EAGAIN || result == -EINTR || result == -ENOMEM) {
        t->counters.retries++;
        if (++p->tries <= MOST_TRIES && !o->error) {
            start_again(t, index);
            return;
        }
        error = result;
    } else {
        error = result ? result : -ENODATA; /* nothing where there should be something: the file was cut */
    }
    if (error && !o->error) {
        remember_error(t, p->file, p->offset + p->done, error);
        if (fail_over(t, p)) {
            start_again(t, index);
            return;
        }
        give_up(t, owner, error);
    }
    o->pieces--;
    p->next = t->free_pieces;
    t->free_pieces = index;
    close_operation(t, owner);
}

int fomoe_read_table_collect(fomoe_read_table *t, fomoe_completion *completions, int max) {
    int count = 0;
    while (count < max) {
        int32_t index = pop(t, operation_link, &t->done);
        if (index < 0) break;
        operation *o = &t->operations[index];
        completions[count++] = (fomoe_completion){o->tag, o->error};
        o->next = t->free_operations;
        t->free_operations = index;
        t->left--;
    }
    return count;
}

/* ---- changes of mind: only reads that still wait are found ---- */

static int32_t find_waiting(fomoe_read_table *t, uint64_t tag, int priority) {
    for (int d = 0; d < t->options.drives; d++)
        for (int32_t i = t->drives[d].waiting[priority].first; i >= 0; i = t->operations[i].next)
            if (t->operations[i].tag == tag) return i;
    return NONE;
}

void fomoe_read_table_promote(fomoe_read_table *t, uint64_t tag) {
    int32_t index = find_waiting(t, tag, 1);
    if (index < 0) return;
    drive_state *d = &t->drives[t->drive[t->operations[index].file]];
    unlink_operation(t, &d->waiting[1], index);
    t->operations[index].priority = 0;
    push(t, operation_link, &d->waiting[0], index);
}

int fomoe_read_table_cancel(fomoe_read_table *t, uint64_t tag) {
    int32_t index = find_waiting(t, tag, 1);
    if (index < 0) index = find_waiting(t, tag, 0);
    if (index < 0) return 0;
    give_up(t, index, -ECANCELED);
    close_operation(t, index);
    return 1;
}

/* ---- counts ---- */

int fomoe_read_table_in_flight(const fomoe_read_table *t) { return t->in_flight; }
int fomoe_read_table_left(const fomoe_read_table *t) { return t->left; }
int fomoe_read_table_done(const fomoe_read_table *t) { return t->done.first >= 0; }
const fomoe_read_counters *fomoe_read_table_count(const fomoe_read_table *t) { return &t->counters; }
