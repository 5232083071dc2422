#include "device_copies.h"

#include <assert.h>

int fomoe_device_check(fomoe_device_copies *d, int code, const char *call) {
    if (code && !d->error) {
        d->error = code;
        d->failed_call = call;
    }
    return code;
}

void fomoe_use_device(fomoe_device_copies *d, int which) {
    if (d->devices > 1) fomoe_device_check(d, d->calls.set_device(d->ordinal[which]), "hipSetDevice");
}

static void *event_of(fomoe_lane *lane, int device, uint64_t ticket) {
    return lane->events[device][ticket % FOMOE_LANE_EVENTS];
}

/* Whether all devices have passed a ticket's events.  A query that fails says nothing. */
static int is_passed(fomoe_device_copies *d, fomoe_lane *lane, uint64_t ticket) {
    for (int r = 0; r < d->devices; r++) {
        fomoe_use_device(d, r);
        int code = d->calls.event_query(event_of(lane, r, ticket));
        if (code == d->calls.not_ready || fomoe_device_check(d, code, "hipEventQuery")) return 0;
    }
    return 1;
}

/* Move `done` up to what the devices say; events of one stream come in order. */
int fomoe_lane_has_done(fomoe_device_copies *d, int which, uint64_t ticket) {
    fomoe_lane *lane = &d->lane[which];
    assert(ticket <= lane->issued && lane->done <= lane->issued);
    for (; lane->done < ticket; lane->done++)
        if (!is_passed(d, lane, lane->done + 1)) return 0;
    return 1;
}

static const char *const WAITED_FOR[FOMOE_LANES] = {"a copy to the device", "a copy to the host", "a batch's kernels"};

int fomoe_lane_wait_for(fomoe_device_copies *d, int which, uint64_t ticket) {
    uint64_t done = d->lane[which].done;
    fomoe_wait wait = {0};
    while (!fomoe_lane_has_done(d, which, ticket)) {
        if (d->error) return 0;
        if (done != d->lane[which].done) {
            done = d->lane[which].done;
            wait = (fomoe_wait){0};
        }
        if (!fomoe_look_again(d->patience, &wait)) fomoe_device_check(d, FOMOE_STUCK, WAITED_FOR[which]);
    }
    return 1;
}

/* A device's stream of one lane goes on only after another's of a lane. */
static void follow(fomoe_device_copies *d, int which, int device, int other, int of, uint64_t ticket) {
    void *stream = d->lane[which].stream[device], *event = event_of(&d->lane[other], of, ticket);
    if (which == other && device == of) return;
    fomoe_use_device(d, device);
    fomoe_device_check(d, d->calls.stream_wait_event(stream, event, 0), "hipStreamWaitEvent");
}

void fomoe_lane_follow(fomoe_device_copies *d, int which, int other, uint64_t ticket) {
    if (which == other || fomoe_lane_has_done(d, other, ticket) || d->error) return;
    for (int device = 0; device < d->devices; device++) follow(d, which, device, other, device, ticket);
}

/* Each device's after those of all: of a buffer of the host one device may have what is another's share of the next
 * expert, for experts do not begin at the same place of it. */
static void follow_all(fomoe_device_copies *d, int which, int other, uint64_t ticket) {
    if ((which == other && d->devices == 1) || fomoe_lane_has_done(d, other, ticket) || d->error) return;
    for (int device = 0; device < d->devices; device++)
        for (int of = 0; of < d->devices; of++) follow(d, which, device, other, of, ticket);
}

/* An event is used again only when nobody can ask for its last ticket. */
static int has_event(fomoe_device_copies *d, int which) {
    uint64_t issued = d->lane[which].issued;
    return issued < FOMOE_LANE_EVENTS || fomoe_lane_wait_for(d, which, issued + 1 - FOMOE_LANE_EVENTS);
}

uint64_t fomoe_lane_mark(fomoe_device_copies *d, int which) {
    fomoe_lane *lane = &d->lane[which];
    if (d->error || !has_event(d, which)) return 0;
    uint64_t ticket = lane->issued + 1;
    for (int r = 0; r < d->devices; r++) {
        fomoe_use_device(d, r);
        if (fomoe_device_check(d, d->calls.event_record(event_of(lane, r, ticket), lane->stream[r]), "hipEventRecord"))
            return 0;
    }
    return lane->issued = ticket;
}

uint64_t fomoe_copy(fomoe_device_copies *d, int which, fomoe_buffer *host, fomoe_buffer *device,
                    const fomoe_piece *piece, int pieces) {
    assert(which < FOMOE_COPY_LANES && host != device);
    if (d->error) return 0;
    for (int other = 0; other < FOMOE_LANES; other++) {
        follow_all(d, which, other, host->touched[other]);
        fomoe_lane_follow(d, which, other, device->touched[other]);
    }
    for (int i = 0; i < pieces; i++, piece++) {
        uint8_t *h = host->address + piece->host_offset;
        uint8_t *g = device->address + d->distance[piece->which] + piece->device_offset;
        void *stream = d->lane[which].stream[piece->which];
        fomoe_use_device(d, piece->which);
        if (which == FOMOE_LANE_UP)
            fomoe_device_check(d, d->calls.memcpy_in(g, h, piece->bytes, stream), "hipMemcpyHtoDAsync");
        else
            fomoe_device_check(d, d->calls.memcpy_out(h, g, piece->bytes, stream), "hipMemcpyDtoHAsync");
        d->bytes[which] += piece->bytes;
    }
    uint64_t ticket = fomoe_lane_mark(d, which);
    if (ticket) host->touched[which] = device->touched[which] = ticket;
    return ticket;
}

int fomoe_buffer_is_free(fomoe_device_copies *d, const fomoe_buffer *b) {
    if (b->claims) return 0;
    for (int lane = 0; lane < FOMOE_LANES; lane++)
        if (!fomoe_lane_has_done(d, lane, b->touched[lane])) return 0;
    return 1;
}

int fomoe_buffer_wait(fomoe_device_copies *d, const fomoe_buffer *b) {
    assert(!b->claims);
    for (int lane = 0; lane < FOMOE_LANES; lane++)
        if (!fomoe_lane_wait_for(d, lane, b->touched[lane])) return 0;
    return 1;
}

void fomoe_lane_wait(fomoe_device_copies *d, int which) { fomoe_lane_wait_for(d, which, d->lane[which].issued); }

int fomoe_streams_query(fomoe_device_copies *d, void *const *stream) {
    int code = d->calls.not_ready;
    for (int r = 0; r < d->devices && code == d->calls.not_ready; r++) {
        fomoe_use_device(d, r);
        code = d->calls.stream_query(stream[r]);
    }
    return code;
}

static int wait_for_stream(fomoe_device_copies *d, void *stream) {
    fomoe_wait wait = {0};
    int code;
    while ((code = d->calls.stream_query(stream)) == d->calls.not_ready)
        if (!fomoe_look_again(d->patience, &wait)) return FOMOE_STUCK;
    return code ? code : d->calls.stream_synchronize(stream); /* done: this makes what it wrote ours */
}

int fomoe_streams_wait(fomoe_device_copies *d, void *const *stream) {
    int first = 0;
    for (int r = 0; r < d->devices; r++) {
        fomoe_use_device(d, r);
        int code = wait_for_stream(d, stream[r]);
        if (!first) first = code;
    }
    return first;
}
