# The routed experts of a CPU engine, and traces of what they did; part of _cpu.pyx.

cdef class Experts:
    """The routed experts: slots, residency and reads.  layers: one dict a layer (None for a dense layer)."""
    cdef fomoe_experts *c
    cdef fomoe_residency *residency
    cdef fomoe_expert_layer *layer
    cdef fomoe_experts_shape shape
    cdef readonly Kernels kernels
    cdef readonly int most
    cdef readonly tuple counts
    cdef readonly bint substitutes
    cdef object keep

    def __cinit__(
        self, Kernels kernels not None, dict shape, list layers, slots, int policy, decay, uintptr_t reader, keep
    ):
        cdef int32_t[:, ::1] slot_view = slots
        cdef int32_t[::1] experts = np.array([0 if l is None else l["experts"] for l in layers], np.int32)
        cdef const uint8_t[::1] extents
        cdef const int32_t[::1] extent_count
        cdef const uint32_t[:, ::1] part_offset
        cdef int i, part
        cdef fomoe_decay decays
        decays.slow, decays.fast, decays.fast_share = decay
        self.shape.layers = len(layers)
        self.shape.columns = shape["columns"]
        self.shape.hidden = shape["hidden"]
        self.shape.used = shape["used"]
        self.shape.batch = shape["batch"]
        self.shape.float_activations = shape["float_activations"]
        self.keep = (layers, keep)
        self.kernels = kernels
        self.counts = tuple(experts)
        self.most = max(self.counts)
        self.layer = <fomoe_expert_layer *>calloc(len(layers), sizeof(fomoe_expert_layer))
        if self.layer == NULL:
            raise MemoryError
        for i, source in enumerate(layers):
            if source is None:
                continue
            self.layer[i].experts = source["experts"]
            for part in range(FOMOE_PARTS):
                self.layer[i].type[part] = fomoe_type_of(kernels.c, source["types"][part])
                self.layer[i].row_bytes[part] = source["row_bytes"][part]
            extents = source["extents"].view(np.uint8).reshape(-1)
            extent_count = source["extent_count"]
            part_offset = source["part_offset"]
            self.layer[i].extents = <const fomoe_extent *>&extents[0]
            self.layer[i].extent_count = &extent_count[0]
            self.layer[i].part_offset = &part_offset[0, 0]
            self.layer[i].pool = <uint8_t *><uintptr_t>source["pool"]
            self.layer[i].slot_bytes = source["slot_bytes"]
            self.layer[i].slots = slot_view[i, 0] + slot_view[i, 1]
        self.residency = fomoe_residency_new(len(layers), &experts[0], &slot_view[0, 0], policy, &decays)
        if self.residency == NULL:
            raise MemoryError
        self.c = fomoe_experts_new(&self.shape, self.layer, self.residency, <fomoe_reader *>reader)
        if self.c == NULL:
            raise MemoryError

    def __dealloc__(self):
        fomoe_experts_free(self.c)
        fomoe_residency_free(self.residency)
        free(self.layer)

    @staticmethod
    def workspace_bytes(dict shape):
        cdef fomoe_experts_shape s
        s.layers = 0
        s.columns = shape["columns"]
        s.hidden = shape["hidden"]
        s.used = shape["used"]
        s.batch = shape["batch"]
        s.float_activations = shape["float_activations"]
        return fomoe_experts_workspace_bytes(&s)

    def warm(self, int layer, const int32_t[::1] experts, const double[::1] scores, Gate gate=None):
        cdef int error, count = experts.shape[0]
        cdef fomoe_watch *watch = NULL if gate is None else &gate.watch
        if count == 0:
            return 0
        with nogil:
            error = fomoe_experts_warm(self.c, layer, &experts[0], &scores[0], count, watch)
        return error

    def stage(self, uintptr_t pool, int each):
        """Buffers for experts that are read ahead, so many for each size of slots."""
        if fomoe_experts_stage(self.c, <uint8_t *>pool, each):
            raise MemoryError

    def set_lookahead(self, int ranks):
        fomoe_experts_set_lookahead(self.c, ranks)

    def recall(self):
        """int64 [layers, 2]: picks of layers that were guessed, and how many of them had been guessed."""
        cdef const fomoe_recall *r = fomoe_experts_recall(self.c)
        return np.array([(r[i].picks, r[i].guessed) for i in range(self.shape.layers)], np.int64)

    def set_car(self, uintptr_t car):
        """The address of a fomoe_car, which is copied."""
        fomoe_experts_set_car(self.c, <const fomoe_car *>car)
        self.substitutes = True

    def counters(self):
        cdef const fomoe_residency_counters *r = fomoe_residency_count(self.residency)
        cdef const fomoe_expert_counters *e = fomoe_experts_count(self.c)
        return {
            "requests": r.requests, "vram_hits": r.hits[0], "dram_hits": r.hits[1], "nvme_hits": r.hits[2],
            "evictions": r.evictions, "promotions": r.promotions, "demotions": r.demotions,
            "substitutions": r.substitutions, "prefetches": e.prefetches, "prefetch_bytes": e.prefetch_bytes,
            "prefetch_useful": e.useful, "prefetch_late": e.late,
            "prefetch_wasted_bytes": e.wasted_bytes,
            "nvme_reads": e.nvme_reads, "nvme_bytes": e.nvme_bytes, "stall_ns": e.stall_ns, "groups": e.groups,
        }

    def picks(self):
        cdef const int64_t *p = fomoe_experts_picks(self.c)
        return np.array(<const int64_t[:self.shape.layers, :self.most]>p)

    def tiers(self):
        cdef int layer, count
        tiers = np.full((self.shape.layers, self.most), FOMOE_TIER_NVME, np.int8)
        for layer in range(self.shape.layers):
            count = self.counts[layer]
            if count:
                tiers[layer, :count] = <const int8_t[:count]>fomoe_residency_tiers(self.residency, layer)
        return tiers

    def scores(self, int layer):
        scores = np.zeros(self.most)
        cdef double[::1] view = scores
        fomoe_residency_scores(self.residency, layer, &view[0])
        return scores[:self.counts[layer]]

    def failure(self):
        cdef int layer, expert
        fomoe_experts_failure(self.c, &layer, &expert)
        return layer, expert


cdef class Trace:
    """Appends the records of runs to an open file, which its owner keeps open.

    Or, made by held(), keeps them until another one takes them."""

    def __cinit__(self, int file, int batch, int used, int most, int records=0):
        self.c = fomoe_trace_held(records, batch, used) if records else fomoe_trace_new(file, batch, used, most)
        if self.c == NULL:
            raise MemoryError

    @staticmethod
    def held(int records, int batch, int used):
        """Of so many records of batches of up to so many tokens, between two calls of take()."""
        return Trace(-1, batch, used, 0, records)

    def take(self, list held):
        """The records of all that are held: of every batch the layers in ascending order, whoever computed them."""
        cdef fomoe_trace *all_of[64]
        cdef int i, count = len(held)
        if count > 64:
            raise ValueError("64 at most")
        for i in range(count):
            all_of[i] = (<Trace>held[i]).c
        with nogil:
            fomoe_trace_take(self.c, all_of, count)

    def __dealloc__(self):
        fomoe_trace_free(self.c)

    def seeds(self, int layer, const int32_t[::1] experts, const double[::1] scores):
        cdef int count = experts.shape[0]
        if count != scores.shape[0]:
            raise ValueError("a score for every seed")
        if count:
            fomoe_trace_seeds(self.c, layer, count, &experts[0], &scores[0])

    def flush(self):
        """0, or the negative errno of the first write that failed."""
        cdef int error
        with nogil:
            error = fomoe_trace_flush(self.c)
        return error
