# What _gpu.pyx calls: csrc/gpu/device_experts.h and what it stands on.

cdef extern from "csrc/read/reader.h" nogil:
    ctypedef struct fomoe_reader:
        pass

cdef extern from "csrc/experts/residency.h" nogil:
    int FOMOE_TIERS
    ctypedef struct fomoe_residency:
        pass
    ctypedef struct fomoe_residency_counters:
        uint64_t requests
        uint64_t hits[3]
        uint64_t evictions
        uint64_t promotions
        uint64_t demotions
        uint64_t substitutions
    ctypedef struct fomoe_decay:
        double slow
        double fast
        double fast_share
    fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy,
                                         const fomoe_decay *decay)
    void fomoe_residency_free(fomoe_residency *)
    const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *)
    void fomoe_residency_scores(const fomoe_residency *, int layer, double *scores)
    const int8_t *fomoe_residency_tiers(const fomoe_residency *, int layer)
    int FOMOE_TIER_NVME

cdef extern from "csrc/gpu/device_experts.h" nogil:
    enum:
        FOMOE_PARTS, FOMOE_LANES, FOMOE_COPY_LANES, FOMOE_LANE_EVENTS, FOMOE_LANE_UP, FOMOE_LANE_DOWN
        FOMOE_MOST_DEVICES, FOMOE_LAYERS_AHEAD
    ctypedef struct fomoe_extent:
        pass
    ctypedef struct fomoe_device_calls:
        int (*set_device)(int) noexcept nogil
        int (*memcpy_in)(void *, const void *, size_t, void *) noexcept nogil
        int (*memcpy_out)(void *, const void *, size_t, void *) noexcept nogil
        int (*event_record)(void *, void *) noexcept nogil
        int (*event_query)(void *) noexcept nogil
        int (*stream_wait_event)(void *, void *, unsigned int) noexcept nogil
        int (*stream_query)(void *) noexcept nogil
        int (*stream_synchronize)(void *) noexcept nogil
        int (*write_value)(void *, void *, uint32_t, unsigned int) noexcept nogil
        int not_ready
    ctypedef struct fomoe_lane:
        void *stream[8]
        void *events[8][64]
    ctypedef struct fomoe_device_copies:
        fomoe_device_calls calls
        int devices
        int ordinal[8]
        int64_t distance[8]
        fomoe_lane lane[3]
        uint64_t bytes[2]
        int error
        const char *failed_call
        fomoe_patience *patience
    int fomoe_streams_wait(fomoe_device_copies *, void *const *)
    ctypedef struct fomoe_device_words:
        uint64_t *table
        uint8_t *answer
        uint8_t *answer_on_device
    ctypedef struct fomoe_device_layer:
        int32_t experts
        int32_t size_class
        const fomoe_extent *extents
        const int32_t *extent_count
        const uint32_t *part_offset
        uint32_t device_offset[3]
        uint32_t part_bytes[3]
        int32_t is_alike
        uint8_t *pool[2]
        fomoe_device_words words[8]
        const uint64_t *post
        const uint64_t *guess[2]
    ctypedef struct fomoe_size_class:
        int64_t slot_bytes[2]
        uint8_t *spare[2]
        int32_t spares[2]
    ctypedef struct fomoe_device_expert_counters:
        uint64_t nvme_reads, nvme_bytes, nvme_stall_ns, layers, served_layers
        uint64_t misses, host_ns, copy_stall_ns, before_reads_ns, after_reads_ns, post_stall_ns
        uint64_t prefetches, prefetch_useful, prefetch_late, prefetch_bytes, prefetch_wasted_bytes
        uint64_t sent_ahead, sent_ahead_useful, sent_ahead_wasted_bytes
        uint64_t back_filled_bytes
    ctypedef struct fomoe_recall:
        uint64_t picks, guessed
    ctypedef struct fomoe_device_experts:
        pass
    fomoe_device_experts *fomoe_device_experts_new(int layers, int used, const fomoe_device_layer *,
                                                   int classes, const fomoe_size_class *, fomoe_residency *,
                                                   fomoe_reader *, const fomoe_device_copies *)
    void fomoe_device_experts_free(fomoe_device_experts *)
    int fomoe_device_experts_serve(fomoe_device_experts *, uint32_t run, void *const *compute,
                                   volatile uint32_t *const *stop)
    enum:
        FOMOE_TILE_PAIRS
    ctypedef struct fomoe_tile:
        pass
    void fomoe_device_batch_begin(fomoe_device_experts *, int tokens, void *const *compute)
    int fomoe_device_batch_layer(fomoe_device_experts *, int layer, const int32_t *picks, const float *weights,
                                 int tokens, int32_t *order)
    int fomoe_device_batch_next(fomoe_device_experts *, int layer, fomoe_tile *tiles, int *count)
    int fomoe_device_experts_warm(fomoe_device_experts *, int layer, const int32_t *, const double *, int count)
    void fomoe_device_experts_read_in_place(fomoe_device_experts *, int in_place, int64_t distance)
    void fomoe_device_experts_signal_by_stream(fomoe_device_experts *, int)
    int fomoe_device_experts_set_trace(fomoe_device_experts *, fomoe_trace *, int tokens)
    void fomoe_device_experts_set_piece_bytes(fomoe_device_experts *, uint32_t)
    void fomoe_device_experts_back_fill(fomoe_device_experts *, int most)
    int fomoe_device_experts_look_ahead(fomoe_device_experts *, int ranks, int staged, int sent, int in_turn)
    const fomoe_recall *fomoe_device_experts_recall(const fomoe_device_experts *)
    void fomoe_device_experts_settle(fomoe_device_experts *)
    void fomoe_device_experts_changed_tables(fomoe_device_experts *, uint32_t *)
    void fomoe_device_experts_tables_arrived(fomoe_device_experts *)
    const fomoe_device_expert_counters *fomoe_device_experts_count(const fomoe_device_experts *)
    fomoe_device_copies *fomoe_device_experts_copies(const fomoe_device_experts *)
    const int64_t *fomoe_device_experts_picks(const fomoe_device_experts *)
    void fomoe_device_experts_failure(const fomoe_device_experts *, int *layer, int *expert)
