/* Copies between host and device on two streams of their own (up, down), ordered by tickets.
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
    FOMOE_LANE_EVENTS = 64
};

/* The device's calls, by HIP's names (the CUDA driver's have the same arguments). */
typedef struct {
    int (*memcpy_in)(void *to, const void *from, size_t bytes, void *stream);
    int (*memcpy_out)(void *to, const void *from, size_t bytes, void *stream);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*stream_wait_event)(void *stream, void *event, unsigned flags);
    int (*stream_query)(void *stream);
    int (*stream_synchronize)(void *stream);
    int not_ready; /* the code of a query whose answer is: not yet */
} fomoe_device_calls;

/* Whose a buffer is now.  Asserted at every change. */
enum fomoe_buffer_use {
    FOMOE_BUFFER_SPARE,   /* in a queue of spares */
    FOMOE_BUFFER_SLOT,    /* the bytes of a slot */
    FOMOE_BUFFER_LANDING, /* reads go into it, on their way to the device */
    FOMOE_BUFFER_LENT,    /* on the device, of an expert whose slot is in DRAM, while the layer is computed */
};

typedef struct {
    uint8_t *address;
    uint64_t touched[FOMOE_LANES]; /* tickets */
    int32_t claims;                /* copies of it that are listed and not started: its tickets do not speak for those */
    int32_t use;                   /* enum fomoe_buffer_use */
} fomoe_buffer;

typedef struct {
    void *stream;
    void *events[FOMOE_LANE_EVENTS];
    uint64_t issued, done;
} fomoe_lane;

typedef struct {
    fomoe_device_calls calls;
    fomoe_lane lane[FOMOE_LANES];
    uint64_t bytes[FOMOE_COPY_LANES];
    int error;               /* the first error code of a call, or FOMOE_STUCK; 0 = none */
    const char *failed_call; /* which one */
    fomoe_patience *patience;
} fomoe_device_copies;

/* One piece of a copy: offsets of the same bytes in the host's and the device's buffer. */
typedef struct {
    size_t host_offset, device_offset, bytes;
} fomoe_piece;

/* Start copying; both buffers are taken until the ticket (returned, 0 = an error occurred) is done. */
uint64_t fomoe_copy(fomoe_device_copies *, int lane, fomoe_buffer *host, fomoe_buffer *device, const fomoe_piece *,
                    int pieces);
/* A ticket that is done when all has been done that was given to the lane's stream; 0 = an error occurred. */
uint64_t fomoe_lane_mark(fomoe_device_copies *, int lane);
/* The lane's stream goes on only after another lane's ticket. */
void fomoe_lane_follow(fomoe_device_copies *, int lane, int other, uint64_t ticket);
/* Whether nobody touches a buffer, as far as is known. */
int fomoe_buffer_is_free(fomoe_device_copies *, const fomoe_buffer *);
/* Wait until nobody does, or an error has occurred: then nobody knows, and 0 is returned. */
int fomoe_buffer_wait(fomoe_device_copies *, const fomoe_buffer *);
/* Wait until a lane has done everything, or an error has occurred. */
void fomoe_lane_wait(fomoe_device_copies *, int lane);
/* Wait until a stream has done everything.  Also after an error; returns this wait's own code. */
int fomoe_stream_wait(fomoe_device_copies *, void *stream);
/* Remember the first failure; returns code. */
int fomoe_device_check(fomoe_device_copies *, int code, const char *call);

#endif
