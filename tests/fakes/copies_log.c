/* device_copies.c over a device that writes down what it is asked for, and does nothing before it is told to: whether
 * two copies are in order is then a question of what waits for what, and of no clock. */
#include "../../fomoe_io/csrc/gpu/device_copies.c"
#include "../../fomoe_io/csrc/gpu/patience.c"

enum { NOT_READY = 600, BUFFERS = 8, BUFFER_BYTES = 1 << 16, MOST = 4096 };

static const uintptr_t DEVICE = (uintptr_t)1 << 40;

typedef struct {
    int32_t kind, stream, event, begin, end, buffer; /* begin, end: bytes of host memory; buffer: of the device */
} entry;
enum { COPY_IN, COPY_OUT, RECORD, WAIT };

static uint8_t host_bytes[BUFFERS * BUFFER_BYTES];
static fomoe_buffer host[BUFFERS], device[BUFFERS];
static char streams[FOMOE_LANES * FOMOE_MOST_DEVICES], events[FOMOE_LANES * FOMOE_MOST_DEVICES * FOMOE_LANE_EVENTS];
static char is_done[sizeof events];
static entry log_[MOST];
static int logged;
static fomoe_patience patience = {1000000000, 1000000000, NULL, 0};
static fomoe_device_copies copies;

static int note(int kind, void *stream, void *event, const void *begin, size_t bytes, const void *on_device) {
    int at = begin ? (int)((const uint8_t *)begin - host_bytes) : 0;
    int buffer = on_device ? (int)(((uintptr_t)on_device - DEVICE) / BUFFER_BYTES) : -1;
    log_[logged++] = (entry){
        kind, (int)((char *)stream - streams), event ? (int)((char *)event - events) : -1, at, at + (int)bytes, buffer};
    return 0;
}
static int set_device(int ordinal) { return 0; }
static int memcpy_in(void *to, const void *from, size_t bytes, void *s) {
    return note(COPY_IN, s, NULL, from, bytes, to);
}
static int memcpy_out(void *to, const void *from, size_t bytes, void *s) {
    return note(COPY_OUT, s, NULL, to, bytes, from);
}
static int event_record(void *event, void *s) {
    is_done[(char *)event - events] = 0;
    return note(RECORD, s, event, NULL, 0, NULL);
}
static int stream_wait_event(void *s, void *event, unsigned flags) { return note(WAIT, s, event, NULL, 0, NULL); }
static int event_query(void *event) { return is_done[(char *)event - events] ? 0 : NOT_READY; }

void copies_open(int devices) {
    copies = (fomoe_device_copies){.devices = devices, .patience = &patience};
    copies.calls = (fomoe_device_calls){.set_device = set_device,
                                        .memcpy_in = memcpy_in,
                                        .memcpy_out = memcpy_out,
                                        .event_record = event_record,
                                        .event_query = event_query,
                                        .stream_wait_event = stream_wait_event,
                                        .not_ready = NOT_READY};
    for (int lane = 0; lane < FOMOE_LANES; lane++)
        for (int d = 0; d < FOMOE_MOST_DEVICES; d++) {
            copies.lane[lane].stream[d] = &streams[lane * FOMOE_MOST_DEVICES + d];
            for (int i = 0; i < FOMOE_LANE_EVENTS; i++)
                copies.lane[lane].events[d][i] = &events[(lane * FOMOE_MOST_DEVICES + d) * FOMOE_LANE_EVENTS + i];
        }
    for (int i = 0; i < BUFFERS; i++) {
        host[i] = (fomoe_buffer){.address = host_bytes + i * BUFFER_BYTES};
        device[i] = (fomoe_buffer){.address = (uint8_t *)DEVICE + i * BUFFER_BYTES};
    }
    logged = 0;
}
/* An expert that begins at `begin` of a host's buffer: each device has an equal share of it. */
int copies_copy(int lane, int host_buffer, int device_buffer, int begin, int share_bytes) {
    fomoe_piece pieces[FOMOE_MOST_DEVICES];
    for (int d = 0; d < copies.devices; d++) pieces[d] = (fomoe_piece){begin + d * share_bytes, 0, share_bytes, d};
    return fomoe_copy(&copies, lane, &host[host_buffer], &device[device_buffer], pieces, copies.devices) != 0;
}
/* All that has been asked for is done. */
void copies_complete(void) {
    for (size_t i = 0; i < sizeof is_done; i++) is_done[i] = 1;
}
int copies_log(entry *out) {
    for (int i = 0; i < logged; i++) out[i] = log_[i];
    return logged;
}
