# Replays a model on a GPU: one graph a batch, the routed experts served beside it, without the GIL.
# Thin on purpose: what is launched is recorded in fomoe_io/gpu/recorder.py, how experts are served is in
# csrc/gpu/device_experts.c.
from libc.stdint cimport int8_t, int32_t, int64_t, intptr_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy as np

from fomoe_io._cpu cimport Trace, fomoe_trace
from fomoe_io._gate cimport Gate
from fomoe_io._hip cimport (
    FOMOE_STUCK, NOT_READY, Event, Graph, Stream, api, check, count_host_sync, fomoe_patience,
    patience_of, stuck,
)
from fomoe_io.errors import DeviceError

cdef extern from "<errno.h>" nogil:
    int ECANCELED

include "_gpu_native.pxi"


cdef class DeviceExperts:
    """The routed experts of all layers.  layers, classes: dicts that fomoe_io/gpu/backend.py makes; keep: what they
    point to.  devices: of each that has a share of every expert, the distance from the first one's memory to its,
    the streams of its copies, the events of each lane."""
    cdef fomoe_device_experts *c
    cdef fomoe_residency *residency
    cdef object keep
    cdef Gate gate
    cdef fomoe_patience own  # the limits of the run at work, and whether the gate has ended it
    cdef Trace tracer
    cdef readonly int most, count
    cdef tuple counts
    cdef int devices
    cdef int device[8]
    cdef uint32_t *changed[8]
    cdef volatile uint32_t *stop[8]
    cdef void *logits_from[8]
    cdef void *logits_to[8]
    cdef size_t logits_bytes[8]
    cdef bint is_lost  # a run could not be ended: the device may still use what the next one would overwrite

    def __cinit__(self, list layers, list classes, slots, int used, int policy, decay,
                  uintptr_t reader, list devices, Gate gate not None, keep):
        cdef fomoe_device_layer *layer = <fomoe_device_layer *>calloc(len(layers), sizeof(fomoe_device_layer))
        cdef fomoe_size_class *size_class = <fomoe_size_class *>calloc(len(classes), sizeof(fomoe_size_class))
        cdef int32_t[:, ::1] slot_view = slots
        cdef int32_t[::1] experts = np.array([0 if l is None else l["experts"] for l in layers], np.int32)
        cdef fomoe_device_copies copies
        cdef fomoe_decay decays
        decays.slow, decays.fast, decays.fast_share = decay
        assert 1 <= len(devices) <= FOMOE_MOST_DEVICES
        self.keep = (layers, classes, devices, keep)
        self.count, self.most, self.counts = len(layers), max(experts), tuple(experts)
        self.devices = len(devices)
        try:
            if layer == NULL or size_class == NULL:
                raise MemoryError
            for i, source in enumerate(layers):
                if source is not None:
                    fill_layer(&layer[i], source)
            for i, source in enumerate(classes):
                for tier in range(FOMOE_TIERS):
                    size_class[i].slot_bytes[tier] = source["slot_bytes"][tier]
                    size_class[i].spare[tier] = <uint8_t *><uintptr_t>source["spare"][tier]
                    size_class[i].spares[tier] = source["spares"][tier]
            fill_copies(&copies, devices)
            for i in range(self.devices):
                self.device[i] = copies.ordinal[i]
            self.gate = gate
            self.begin()
            copies.patience = &self.own
            self.residency = fomoe_residency_new(len(layers), &experts[0], &slot_view[0, 0], policy, &decays)
            if self.residency == NULL:
                raise MemoryError
            self.c = fomoe_device_experts_new(len(layers), used, layer, len(classes), size_class,
                                              self.residency, <fomoe_reader *>reader, &copies)
            if self.c == NULL:
                raise MemoryError
        finally:
            free(layer)
            free(size_class)

    def bind(self, int which, *, uintptr_t changed, uintptr_t stop, uintptr_t logits_from, uintptr_t logits_to,
             size_t logits_bytes):
        """Where a device's runs find their words: changed, uint32 [layers], for the graph's begin_run, and stop, which
        ends its waits, in memory that the device sees too; its logits on the device and on the host."""
        self.changed[which] = <uint32_t *>changed
        self.stop[which] = <volatile uint32_t *>stop
        self.logits_from[which] = <void *>logits_from
        self.logits_to[which] = <void *>logits_to
        self.logits_bytes[which] = logits_bytes

    def allow(self, list streams not None):
        """Before anything is written for a run: its kernels wait for the host.

        A graph that was given up in the run before has ended first, for it reads the same header and waits for answers
        with the number it finds there.  0, or -ECANCELED.
        """
        cdef int drained = 0
        cdef void *compute[8]
        cdef fomoe_device_copies *copies = fomoe_device_experts_copies(self.c)
        self.begin()
        if self.is_lost:
            self.handles(streams, compute)
            with nogil:
                api.hipSetDevice(self.device[0])
                drained = fomoe_streams_wait(copies, compute)
            self.end_of_run(drained)
            if self.own.is_interrupted:
                return -ECANCELED
        for which in range(self.devices):
            self.stop[which][0] = 0
        return 0

    cdef int handles(self, list streams, void **compute) except -1:
        """Of the devices' streams."""
        assert len(streams) == self.devices
        for which in range(self.devices):
            compute[which] = (<Stream>streams[which]).handle
        return 0

    def pass_on(self):
        """From any thread: kernels of the run at work wait no more."""
        for which in range(self.devices):
            self.stop[which][0] = 1

    def trace(self, Trace trace, int tokens):
        """Write what runs from now on do, batches of up to so many tokens; None: nothing."""
        if fomoe_device_experts_set_trace(self.c, NULL if trace is None else trace.c, tokens):
            raise MemoryError
        self.tracer = trace

    def read_in_place(self, bint in_place, int64_t distance):
        """A token's kernels read experts of DRAM where they lie; distance: from the host's address of that memory to
        the device's."""
        with nogil:
            api.hipSetDevice(self.device[0])
            fomoe_device_experts_read_in_place(self.c, in_place, distance)

    def signal_by_stream(self, bint by_stream):
        """Whether a copy's stream tells a waiting kernel that it has come (where the device can), or the host."""
        fomoe_device_experts_signal_by_stream(self.c, by_stream)

    def set_piece_bytes(self, uint32_t nbytes):
        """Reads of experts are cut into pieces of about so many bytes, each sent up as it lands."""
        fomoe_device_experts_set_piece_bytes(self.c, nbytes)

    def back_fill(self, int most):
        """So many picks of a layer are read after others stood in for them."""
        fomoe_device_experts_back_fill(self.c, most)

    def look_ahead(self, int ranks, int staged, int sent, bint in_turn):
        """The device may guess so many picks of a layer, which are read into so many of a class's host spares, and sent
        up into so many of the device's; in_turn: the layer before each is another device's."""
        if fomoe_device_experts_look_ahead(self.c, ranks, staged, sent, in_turn):
            raise MemoryError

    def recall(self):
        """int64 [layers, 2]: picks of layers whose guesses were seen in time, and how many of them had been guessed."""
        cdef const fomoe_recall *r = fomoe_device_experts_recall(self.c)
        if r == NULL:
            return np.zeros((self.count, 2), np.int64)
        return np.array([(r[i].picks, r[i].guessed) for i in range(self.count)], np.int64)

    def __dealloc__(self):
        fomoe_device_experts_free(self.c)
        fomoe_residency_free(self.residency)

    def warm(self, int layer, const int32_t[::1] experts, const double[::1] scores):
        cdef int error, count = experts.shape[0]
        if count == 0:
            return 0
        self.begin()
        with nogil:
            api.hipSetDevice(self.device[0])
            error = fomoe_device_experts_warm(self.c, layer, &experts[0], &scores[0], count)
        return self.checked(error)

    cdef int begin(self) except -1:
        """Work that the gate may end."""
        self.own = patience_of(self.gate)
        return 0

    cdef int checked(self, int error) except? -1:
        """A device call that failed is raised; an error of a read is returned, or that the gate has ended the run."""
        if self.own.is_interrupted:
            return -ECANCELED
        if error == 1:
            self.raise_failure(fomoe_device_experts_copies(self.c).error)
        return error

    cdef int raise_failure(self, int code) except -1:
        call = (<bytes>fomoe_device_experts_copies(self.c).failed_call).decode()
        if code == FOMOE_STUCK:
            raise stuck(call)
        if code < 0:
            raise DeviceError("the device finished without computing: its program was stopped")
        return check(code, call)

    def settle(self):
        """Wait for all copies to the host."""
        with nogil:
            api.hipSetDevice(self.device[0])
            fomoe_device_experts_settle(self.c)
        self.checked(1 if fomoe_device_experts_copies(self.c).error else 0)

    def failure(self):
        cdef int layer = 0, expert = 0
        fomoe_device_experts_failure(self.c, &layer, &expert)
        return layer, expert

    def counters(self):
        cdef const fomoe_residency_counters *r = fomoe_residency_count(self.residency)
        cdef const fomoe_device_expert_counters *e = fomoe_device_experts_count(self.c)
        cdef const fomoe_device_copies *copies = fomoe_device_experts_copies(self.c)
        return {
            "requests": r.requests, "vram_hits": r.hits[0], "dram_hits": r.hits[1], "nvme_hits": r.hits[2],
            "evictions": r.evictions, "promotions": r.promotions, "demotions": r.demotions,
            "substitutions": r.substitutions, "nvme_reads": e.nvme_reads, "nvme_bytes": e.nvme_bytes,
            "stall_ns": e.nvme_stall_ns, "copy_stall_ns": e.copy_stall_ns, "layers": e.layers,
            "served_layers": e.served_layers, "misses": e.misses, "host_ns": e.host_ns,
            "before_reads_ns": e.before_reads_ns, "after_reads_ns": e.after_reads_ns,
            "post_stall_ns": e.post_stall_ns, "up_bytes": copies.bytes[FOMOE_LANE_UP],
            "down_bytes": copies.bytes[FOMOE_LANE_DOWN], "prefetches": e.prefetches,
            "prefetch_useful": e.prefetch_useful, "prefetch_late": e.prefetch_late,
            "prefetch_bytes": e.prefetch_bytes, "prefetch_wasted_bytes": e.prefetch_wasted_bytes,
            "sent_ahead": e.sent_ahead, "sent_ahead_useful": e.sent_ahead_useful,
            "sent_ahead_wasted_bytes": e.sent_ahead_wasted_bytes,
            "back_filled_bytes": e.back_filled_bytes,
        }

    def picks(self):
        """int64 [layers, most experts]: how often the router has picked each."""
        cdef const int64_t *c = fomoe_device_experts_picks(self.c)
        return np.array(<const int64_t[:self.count, :self.most]>c)

    def tiers(self):
        """int8 [layers, most experts]: where each is."""
        cdef int layer, count
        tiers = np.full((self.count, self.most), FOMOE_TIER_NVME, np.int8)
        for layer in range(self.count):
            count = self.counts[layer]
            if count:
                tiers[layer, :count] = <const int8_t[:count]>fomoe_residency_tiers(self.residency, layer)
        return tiers

    def begin_batch(self, int tokens, list streams not None):
        """A batch whose kernels go to these streams, one a device."""
        cdef void *compute[8]
        self.begin()
        self.handles(streams, compute)
        with nogil:
            api.hipSetDevice(self.device[0])
            fomoe_device_batch_begin(self.c, tokens, compute)

    # picks, weights: [tokens, used]; order: [tokens * used], out.  All three stay as they are until the layer is done.
    # 0 or a negative errno of a read.
    def batch_layer(self, int layer, const int32_t[:, ::1] picks, const float[:, ::1] weights, int32_t[::1] order):
        cdef int error, tokens = picks.shape[0]
        with nogil:
            api.hipSetDevice(self.device[0])
            error = fomoe_device_batch_layer(self.c, layer, &picks[0, 0], &weights[0, 0], tokens, &order[0])
        return self.checked(error)

    # tiles: room for those of all experts that are left.  (error as above, number of tiles)
    def next_wave(self, int layer, uint8_t[::1] tiles):
        cdef int error, count = 0
        cdef fomoe_tile *out = <fomoe_tile *>&tiles[0] if tiles.shape[0] else NULL
        with nogil:
            api.hipSetDevice(self.device[0])
            error = fomoe_device_batch_next(self.c, layer, out, &count)
        return self.checked(error), count

    def run(self, list streams not None, list graphs not None, unsigned int number, bint wants_logits,
            uintptr_t logits=0):
        """One replay: the devices' graphs, which begin by fetching header and changed tables, and their logits out, to
        where the first device's are bound or to `logits`, which the devices must reach.

        0 or a negative errno: of a read, or ECANCELED.  After `allow`, in which the graphs of a run that was given up
        come to their end: then what they read may be written again.
        """
        cdef int code = 0, drained = 0, served = 0, which = 0
        cdef void *compute[8]
        cdef intptr_t moved = <intptr_t>(logits - <uintptr_t>self.logits_to[0]) if logits else 0
        cdef fomoe_device_copies *copies = fomoe_device_experts_copies(self.c)
        self.begin()
        self.handles(streams, compute)
        with nogil:
            fomoe_device_experts_changed_tables(self.c, self.changed[0])
        for which in range(1, self.devices):
            memcpy(self.changed[which], self.changed[0], self.count * sizeof(uint32_t))
        call = "hipGraphLaunch"
        for which in range(self.devices):
            code = self.launch(which, graphs[which], compute[which])
            if code:
                break
        # behind all graphs: a device that has begun waits for the others in its first exchange
        if code == 0 and wants_logits:
            call = "hipMemcpyDtoHAsync"
            code = self.fetch_logits(moved, compute)
        with nogil:
            if code == 0:
                served = fomoe_device_experts_serve(self.c, number, compute, self.stop)
            else:
                for which in range(self.devices):
                    self.stop[which][0] = 1
            drained = fomoe_streams_wait(copies, compute)
        count_host_sync()
        self.is_lost = drained != 0  # also when another error is raised
        served = self.checked(served)
        check(code, call)
        self.end_of_run(drained)
        fomoe_device_experts_tables_arrived(self.c)
        return served

    cdef int launch(self, int which, Graph graph, void *stream) except? -1:
        """The device's code."""
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device[which])
            if code == 0:
                code = graph.enqueue(stream)
        return code

    # Every device's own, `moved` bytes from where they are bound.
    cdef int fetch_logits(self, intptr_t moved, void *const *compute) noexcept nogil:
        cdef int code = 0, which
        for which in range(self.devices):
            if self.logits_bytes[which]:
                code = api.hipSetDevice(self.device[which])
                if code == 0:
                    code = api.hipMemcpyDtoHAsync(<uint8_t *>self.logits_to[which] + moved, self.logits_from[which],
                                                  self.logits_bytes[which], compute[which])
            if code:
                break
        return code

    cdef int end_of_run(self, int drained) except -1:
        self.is_lost = drained != 0
        if self.own.is_interrupted:
            return 0
        if drained == FOMOE_STUCK:
            raise stuck("the end of a token")
        return check(drained, "hipStreamSynchronize")


cdef int fill_layer(fomoe_device_layer *layer, dict source) except -1:
    cdef const uint8_t[::1] extents = source["extents"].view(np.uint8).reshape(-1)
    cdef const int32_t[::1] extent_count = source["extent_count"]
    cdef const uint32_t[:, ::1] part_offset = source["part_offset"]
    layer.experts = source["experts"]
    layer.size_class = source["size_class"]
    layer.is_alike = source["is_alike"]
    layer.extents = <const fomoe_extent *>&extents[0]
    layer.extent_count = &extent_count[0]
    layer.part_offset = &part_offset[0, 0]
    for part in range(FOMOE_PARTS):
        layer.device_offset[part] = source["device_offset"][part]
        layer.part_bytes[part] = source["part_bytes"][part]
    for tier in range(FOMOE_TIERS):
        layer.pool[tier] = <uint8_t *><uintptr_t>source["pool"][tier]
    for which, words in enumerate(source["words"]):
        layer.words[which].table = <uint64_t *><uintptr_t>words["table"]
        layer.words[which].answer = <uint8_t *><uintptr_t>words["answer"]
        layer.words[which].answer_on_device = <uint8_t *><uintptr_t>words["answer_on_device"]
    layer.post = <const uint64_t *><uintptr_t>source["post"]
    assert len(source["guess"]) <= FOMOE_LAYERS_AHEAD
    for ahead in range(len(source["guess"])):
        layer.guess[ahead] = <const uint64_t *><uintptr_t>source["guess"][ahead]
    return 0


cdef int fill_copies(fomoe_device_copies *copies, list devices) except -1:
    memset(copies, 0, sizeof(copies[0]))
    copies.devices = len(devices)
    copies.calls.set_device = api.hipSetDevice
    copies.calls.memcpy_in = api.hipMemcpyHtoDAsync
    copies.calls.memcpy_out = api.hipMemcpyDtoHAsync
    copies.calls.event_record = api.hipEventRecord
    copies.calls.event_query = api.hipEventQuery
    copies.calls.stream_wait_event = api.hipStreamWaitEvent
    copies.calls.stream_query = api.hipStreamQuery
    copies.calls.stream_synchronize = api.hipStreamSynchronize
    copies.calls.write_value = api.hipStreamWriteValue32
    copies.calls.not_ready = NOT_READY
    for which, (distance, streams, events) in enumerate(devices):
        copies.ordinal[which] = (<Stream>streams[0]).device
        copies.distance[which] = distance
        for lane in range(FOMOE_LANES):
            if lane < FOMOE_COPY_LANES:
                copies.lane[lane].stream[which] = (<Stream>streams[lane]).handle
            for i in range(FOMOE_LANE_EVENTS):
                copies.lane[lane].events[which][i] = (<Event>events[lane][i]).handle
    return 0


TILE_PAIRS = FOMOE_TILE_PAIRS
TILE_BYTES = sizeof(fomoe_tile)
STREAMS = FOMOE_COPY_LANES
EVENT_RINGS = FOMOE_LANES
LANE_EVENTS = FOMOE_LANE_EVENTS
MOST_DEVICES = FOMOE_MOST_DEVICES
