# The Python face of the io_uring reader (csrc/read/ring.c).
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t

import errno
import os

import numpy as np

from fomoe_io._reader cimport fomoe_read_counters, fomoe_read_options, fomoe_reader
from fomoe_io._uring cimport *

cdef extern from *:
    const char *FOMOE_LIBURING_VERSION  # set by setup.py: liburing 2.3 does not name its version

LIBURING_VERSION = FOMOE_LIBURING_VERSION.decode()

MODES = {
    "plain": 0,
    "coop": IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
    "defer": IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
    "sqpoll": IORING_SETUP_SQPOLL,
    "iopoll": IORING_SETUP_IOPOLL,
}


cdef class UringReader:
    cdef fomoe_reader table
    cdef fomoe_ring *ring
    cdef fomoe_read_counters last_counters
    cdef readonly object files
    cdef readonly str mode
    cdef readonly str registration_error
    cdef readonly bint buffers_registered

    name = "uring"

    def __cinit__(self, files, *, int depth=64, int sub_read_bytes=0, str mode="coop", bint write=False):
        cdef fomoe_read_options options
        cdef uint64_t[::1] sizes = np.array(files.sizes, np.uint64)
        cdef int32_t[::1] drives = np.array(files.drives, np.int32)
        cdef int32_t[::1] mirrors = np.array(files.mirrors, np.int32)
        cdef uint32_t[::1] restarts = np.array(files.restarts, np.uint32)
        cdef int[::1] descriptors = np.array(files.descriptors, np.intc)
        cdef unsigned flags = MODES[mode]
        cdef int error
        self.files = files
        self.mode = mode
        self.registration_error = ""
        options.files, options.drives, options.depth = len(sizes), files.drive_count, depth
        options.piece_bytes = sub_read_bytes
        options.file_bytes, options.drive, options.mirror = &sizes[0], &drives[0], &mirrors[0]
        options.restart = &restarts[0]
        with nogil:
            error = fomoe_ring_new(&options, &descriptors[0], flags, write, &self.ring)
        if error:
            raise OSError(-error, f"io_uring ({mode}) is not available: {os.strerror(-error)}")
        fomoe_ring_table(self.ring, &self.table)

    def __dealloc__(self):
        fomoe_ring_free(self.ring)

    def close(self):
        """Wait for what is in flight and close the ring; the counters stay."""
        cdef fomoe_ring *ring = self.ring
        if ring == NULL:
            return
        self.ring = NULL
        with nogil:
            fomoe_ring_free(ring)

    cdef fomoe_ring *alive(self) except NULL:
        if self.ring == NULL:
            raise ValueError("the reader is closed")
        return self.ring

    @property
    def address(self):
        self.alive()
        return <uintptr_t>&self.table

    def register_buffers(self, uintptr_t address, size_t size):
        cdef fomoe_ring *ring = self.alive()
        cdef int error
        with nogil:
            error = fomoe_ring_register_buffers(ring, <void *>address, size)
        self.buffers_registered = error == 0
        self.registration_error = ""
        if error == -errno.ENOMEM:
            self.registration_error = f"the limit of locked memory (ulimit -l) is below {size:,} bytes"
        elif error:
            self.registration_error = os.strerror(-error)
        return self.buffers_registered

    @property
    def last_error(self):
        if self.ring != NULL:
            self.last_counters = fomoe_ring_reads(self.ring)[0]
        c = self.last_counters
        return self.files.describe_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    @property
    def last_fix(self):
        if self.ring != NULL:
            self.last_counters = fomoe_ring_reads(self.ring)[0]
        c = self.last_counters
        return self.files.mend_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    @property
    def counters(self):
        cdef const fomoe_read_counters *c = fomoe_ring_reads(self.alive())
        cdef const fomoe_ring_counters *calls = fomoe_ring_calls(self.ring)
        cdef int count, i
        cdef const uint64_t *depths = fomoe_ring_depths(self.ring, &count)
        return {
            "reads": c.reads,
            "sub_reads": c.pieces,
            "bytes": c.bytes,
            "short_reads": c.short_reads,
            "retries": c.retries,
            "cancelled": c.cancelled,
            "errors": c.errors,
            "failovers": c.failovers,
            "submits": calls.submits,
            "waits": calls.waits,
            "depths": [depths[i] for i in range(count)],
        }
