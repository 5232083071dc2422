# The io_uring reader, as csrc/read/ring.h declares it, and the flags that liburing names.
from libc.stdint cimport uint64_t

from fomoe_io._reader cimport fomoe_read_counters, fomoe_read_options, fomoe_reader

cdef extern from "liburing.h" nogil:
    unsigned IORING_SETUP_IOPOLL
    unsigned IORING_SETUP_SQPOLL
    unsigned IORING_SETUP_COOP_TASKRUN
    unsigned IORING_SETUP_TASKRUN_FLAG
    unsigned IORING_SETUP_SINGLE_ISSUER
    unsigned IORING_SETUP_DEFER_TASKRUN

cdef extern from "csrc/read/ring.h" nogil:
    ctypedef struct fomoe_ring:
        pass
    ctypedef struct fomoe_ring_counters:
        uint64_t submits
        uint64_t waits
    int fomoe_ring_new(const fomoe_read_options *, const int *descriptors, unsigned setup_flags, int write,
                       fomoe_ring **ring)
    void fomoe_ring_free(fomoe_ring *)
    void fomoe_ring_table(fomoe_ring *, fomoe_reader *table)
    int fomoe_ring_register_buffers(fomoe_ring *, void *start, size_t bytes)
    const fomoe_read_counters *fomoe_ring_reads(const fomoe_ring *)
    const fomoe_ring_counters *fomoe_ring_calls(const fomoe_ring *)
    const uint64_t *fomoe_ring_depths(const fomoe_ring *, int *count)
