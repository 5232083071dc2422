# The Python face of csrc/read/io_load.c and csrc/read/{mmap,paced}_reader.c: what `fomoe-bench io` runs without
# the GIL.
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

import os

import numpy as np

from fomoe_io._reader cimport fomoe_reader

cdef extern from "csrc/read/mmap_reader.h" nogil:
    ctypedef struct fomoe_mmap_reader:
        pass
    int fomoe_mmap_reader_new(const int *, const uint64_t *, int files, int depth, int random_access,
                              fomoe_mmap_reader **)
    void fomoe_mmap_reader_free(fomoe_mmap_reader *)
    void fomoe_mmap_reader_table(fomoe_mmap_reader *, fomoe_reader *)

cdef extern from "csrc/read/paced_reader.h" nogil:
    ctypedef struct fomoe_paced_reader:
        pass
    ctypedef struct fomoe_paced_counters:
        uint64_t late
        uint64_t late_ns
    fomoe_paced_reader *fomoe_paced_reader_new(
        fomoe_reader *inner, double bandwidth, uint64_t latency_ns, int depth, fomoe_paced_reader *beside
    )
    void fomoe_paced_reader_free(fomoe_paced_reader *)
    void fomoe_paced_reader_table(fomoe_paced_reader *, fomoe_reader *)
    const fomoe_paced_counters *fomoe_paced_reader_count(const fomoe_paced_reader *)

cdef extern from "csrc/read/io_load.h" nogil:
    enum:
        FOMOE_LATENCY_STEP_BITS
        FOMOE_LATENCY_BINS
        FOMOE_MOST_LOAD_DEPTH
    ctypedef struct fomoe_planned_read:
        uint64_t offset
        uint32_t bytes
        uint32_t file
    ctypedef struct fomoe_load:
        const fomoe_planned_read *plan
        uint64_t plan_count
        uint64_t most_reads
        uint64_t duration_ns
        uint64_t ramp_ns
        uint8_t *buffers
        uint64_t buffer_bytes
        int depth
    ctypedef struct fomoe_span_sum:
        uint64_t min_ns
        uint64_t max_ns
        double sum_ns
        double square_sum
    ctypedef struct fomoe_load_counts:
        uint64_t reads
        uint64_t bytes
        int stop
        uint64_t issued
        uint64_t started_ns
        uint64_t ended_ns
        uint64_t submit_ns
        uint64_t submit_calls
        uint64_t latency_min_ns
        uint64_t latency_max_ns
        double latency_sum_ns
        double latency_square_sum
        fomoe_span_sum submission
        fomoe_span_sum total
        uint64_t *latency
        uint64_t *in_flight
    int fomoe_load_run(const fomoe_reader *, const fomoe_load *, fomoe_load_counts *)

LATENCY_STEP_BITS = FOMOE_LATENCY_STEP_BITS
LATENCY_BINS = FOMOE_LATENCY_BINS
PLAN = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("file", "<u4")])


cdef class MmapReader:
    cdef fomoe_reader table
    cdef fomoe_mmap_reader *mapped
    cdef readonly object files

    name = "mmap"
    mode = "copies"
    buffers_registered = False
    registration_error = "mmap has no registered buffers"
    last_error = ""

    def __cinit__(self, files, *, int depth=64, bint random_access=True):
        cdef uint64_t[::1] sizes = np.array(files.sizes, np.uint64)
        cdef int[::1] descriptors = np.array(files.descriptors, np.intc)
        cdef int error = fomoe_mmap_reader_new(
            &descriptors[0], &sizes[0], <int>len(sizes), depth, random_access, &self.mapped
        )
        self.files = files
        if error:
            raise OSError(-error, f"mmap failed: {os.strerror(-error)}")
        fomoe_mmap_reader_table(self.mapped, &self.table)

    def __dealloc__(self):
        fomoe_mmap_reader_free(self.mapped)

    def close(self):
        fomoe_mmap_reader_free(self.mapped)
        self.mapped = NULL

    @property
    def address(self):
        if self.mapped == NULL:
            raise ValueError("the reader is closed")
        return <uintptr_t>&self.table

    @property
    def counters(self):
        return {}

    def register_buffers(self, uintptr_t address, size_t size):
        return False


cdef class PacedReader:
    cdef fomoe_reader table
    cdef fomoe_paced_reader *paced
    cdef readonly object inner
    cdef PacedReader beside

    def __cinit__(self, inner, double bandwidth, double latency_seconds, int depth, PacedReader beside=None):
        if bandwidth <= 0 or latency_seconds < 0 or depth < 1:
            raise ValueError("a pace needs a bandwidth and a depth above 0, and a latency of 0 or more")
        self.inner, self.beside = inner, beside
        self.paced = fomoe_paced_reader_new(
            <fomoe_reader *><uintptr_t>inner.address, bandwidth, <uint64_t>(1e9 * latency_seconds), depth,
            NULL if beside is None else beside.paced,
        )
        if self.paced == NULL:
            raise MemoryError
        fomoe_paced_reader_table(self.paced, &self.table)

    def __dealloc__(self):
        fomoe_paced_reader_free(self.paced)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def mode(self):
        return f"{self.inner.mode}, paced"

    @property
    def address(self):
        self.inner.address  # refuses when that is closed
        return <uintptr_t>&self.table

    @property
    def counters(self):
        cdef const fomoe_paced_counters *c = fomoe_paced_reader_count(self.paced)
        return self.inner.counters | {"paced_late": c.late, "paced_late_seconds": c.late_ns * 1e-9}


cdef tuple _spans(fomoe_span_sum s, uint64_t reads):
    """(min, max, sum, sum of squares) in ns."""
    return (s.min_ns if reads else 0, s.max_ns, s.sum_ns, s.square_sum)


cdef class Load:
    cdef fomoe_load_counts *counts
    cdef fomoe_load load
    cdef readonly object plan, memory
    cdef readonly int error

    def __cinit__(self, plan, *, int depth, uintptr_t buffers, uint64_t buffer_bytes, memory=None,
                  uint64_t most_reads=0, double duration_seconds=0, double ramp_seconds=0):
        if not 1 <= depth <= FOMOE_MOST_LOAD_DEPTH:
            raise ValueError(f"depth {depth}")
        self.plan = np.ascontiguousarray(plan, PLAN)
        if not len(self.plan) or int(self.plan["bytes"].max()) > buffer_bytes:
            raise ValueError("an empty plan, or reads larger than their buffers")
        self.memory = memory  # keeps the buffers alive
        self.counts = <fomoe_load_counts *>calloc(1, sizeof(fomoe_load_counts))
        if self.counts == NULL:
            raise MemoryError
        self.load.plan = <const fomoe_planned_read *><uintptr_t>self.plan.ctypes.data
        self.load.plan_count = len(self.plan)
        self.load.most_reads = most_reads
        self.load.duration_ns = <uint64_t>(1e9 * duration_seconds)
        self.load.ramp_ns = <uint64_t>(1e9 * ramp_seconds)
        self.load.buffers = <uint8_t *>buffers
        self.load.buffer_bytes = buffer_bytes
        self.load.depth = depth

    def __dealloc__(self):
        free(self.counts)

    def run(self, uintptr_t reader):
        with nogil:
            self.error = fomoe_load_run(<const fomoe_reader *>reader, &self.load, self.counts)
        return self.error

    def stop(self):
        self.counts.stop = 1

    def progress(self):
        return self.counts.reads, self.counts.bytes

    def result(self):
        cdef fomoe_load_counts *c = self.counts
        cdef int i
        return {
            "reads": c.reads,
            "bytes": c.bytes,
            "issued": c.issued,
            "started_ns": c.started_ns,
            "ended_ns": c.ended_ns,
            "submit_ns": c.submit_ns,
            "submit_calls": c.submit_calls,
            "latency_min_ns": c.latency_min_ns if c.reads else 0,
            "latency_max_ns": c.latency_max_ns,
            "latency_sum_ns": c.latency_sum_ns,
            "latency_square_sum": c.latency_square_sum,
            "submission": _spans(c.submission, c.reads),
            "total": _spans(c.total, c.reads),
            "latency": np.array([c.latency[i] for i in range(FOMOE_LATENCY_BINS)], np.int64),
            "in_flight": np.array([c.in_flight[i] for i in range(self.load.depth + 1)], np.int64),
        }
