/* Copies between host and device on two streams of their own (up, down), ordered by tickets.
 *
 * Several devices may each hold a share of what a buffer on the device holds: a copy is then one to or from
 * each, and its ticket is done when all of them are.  Their buffers are laid out alike, so that a buffer's address is
 * the first one's, and another's lies at a distance that is the same for all.
 *
 * A ticket is the number of a copy on its stream.  A buffer remembers the last copies that touched it; whoever wants
 * to overwrite it waits for them: the other stream by an event, the host by asking.  Kernels of a batch are a third
 * lane: a mark behind them is the ticket of every buffer that they read. */
#ifndef FOMOE_DEVICE_COPIES_H
#define FOMOE_DEVICE_COPIES_H

#include <stddef.h>
#include <stdint.h>

#include "patience.h"

enum {
    FOMOE_LANE_UP = 0,
    FOMOE_LANE_DOWN = 1,
    FOMOE_COPY_LANES = 2,
    FOMOE_LANE_COMPUTE = 2, /* the stream of a batch's kernels; copies nothing */
    FOMOE_LANES = 3,
    FOMOE_LANE_EVENTS = 64,
    FOMOE_MOST_DEVICES = 8
};

/* The device's calls, by HIP's names (the CUDA driver's have the same arguments). */
typedef struct {
    int (*set_device)(int ordinal); /* of the calling thread */
    int (*memcpy_in)(void *to, const void *from, size_t bytes, void *stream);
    int (*memcpy_out)(void *to, const void *from, size_t bytes, void *stream);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*stream_wait_event)(void *stream, void *event, unsigned flags);
    int (*stream_query)(void *stream);
    int (*stream_synchronize)(void *stream);
    /* behind all that the stream has been given; NULL: the device has no such call */
    int (*write_value)(void *stream, void *word, uint32_t value, unsigned flags);
    int not_ready; /* the code of a query whose answer is: not yet */
} fomoe_device_calls;

/* Whose a buffer is now.  Asserted at every change. */
enum fomoe_buffer_use {
    FOMOE_BUFFER_SPARE,   /* in a queue of spares */
    FOMOE_BUFFER_SLOT,    /* the bytes of a slot */
    FOMOE_BUFFER_LANDING, /* reads go into it, on their way to the device */
    FOMOE_BUFFER_RESTING, /* spare when the layer that was at work has been computed: kernels may still read it */
    FOMOE_BUFFER_LENT,    /* on the device, of an expert whose slot is in DRAM, while the layer is computed; or of one
                             that is sent ahead */
};

typedef struct {
    uint8_t *address;
    uint64_t touched[FOMOE_LANES]; /* tickets */
    int32_t claims; /* copies of it that are listed and not started: its tickets do not speak for those */
    int32_t use; /* enum fomoe_buffer_use */
} fomoe_buffer;

typedef struct {
    void *stream[FOMOE_MOST_DEVICES];
    void *events[FOMOE_MOST_DEVICES][FOMOE_LANE_EVENTS];
    uint64_t issued, done;
} fomoe_lane;

typedef struct {
    fomoe_device_calls calls;
    int devices, ordinal[FOMOE_MOST_DEVICES];
    int64_t distance[FOMOE_MOST_DEVICES]; /* from the first device's address to this one's */
    fomoe_lane lane[FOMOE_LANES];
    uint64_t bytes[FOMOE_COPY_LANES];
    int error; /* the first error code of a call, or FOMOE_STUCK; 0 = none */
    const char *failed_call; /* which one */
    fomoe_patience *patience;
} fomoe_device_copies;

/* One piece of a copy: offsets of the same bytes in the host's and in a device's buffer. */
typedef struct {
    size_t host_offset, device_offset, bytes;
    int which; /* device */
} fomoe_piece;

/* Calls are for this device from now on; one alone has been made current by the caller. */
void fomoe_use_device(fomoe_device_copies *, int which);
/* Start copying, piece after piece; both buffers are taken until the ticket (returned, 0 = an error occurred) is
 * done. */
uint64_t fomoe_copy(fomoe_device_copies *, int lane, fomoe_buffer *host, fomoe_buffer *device, const fomoe_piece *,
                    int pieces);
/* A ticket that is done when all has been done that was given to the lane's streams; 0 = an error occurred. */
uint64_t fomoe_lane_mark(fomoe_device_copies *, int lane);
/* The lane's streams go on only after another lane's ticket. */
void fomoe_lane_follow(fomoe_device_copies *, int lane, int other, uint64_t ticket);
/* Whether a ticket is known to be done. */
int fomoe_lane_has_done(fomoe_device_copies *, int lane, uint64_t ticket);
/* Whether nobody touches a buffer, as far as is known. */
int fomoe_buffer_is_free(fomoe_device_copies *, const fomoe_buffer *);
/* Wait until nobody does, or an error has occurred: then nobody knows, and 0 is returned. */
int fomoe_buffer_wait(fomoe_device_copies *, const fomoe_buffer *);
/* Wait until a lane has done a ticket.  0: an error has occurred, and it may never be done. */
int fomoe_lane_wait_for(fomoe_device_copies *, int lane, uint64_t ticket);
/* Wait until a lane has done everything, or an error has occurred. */
void fomoe_lane_wait(fomoe_device_copies *, int lane);
/* Wait until a stream of each device has done everything.  Also after an error; returns this wait's own code. */
int fomoe_streams_wait(fomoe_device_copies *, void *const *stream);
/* `not_ready` while a stream of each device is at work; 0 or an error when one no longer is. */
int fomoe_streams_query(fomoe_device_copies *, void *const *stream);
/* Remember the first failure; returns code. */
int fomoe_device_check(fomoe_device_copies *, int code, const char *call);

#endif
