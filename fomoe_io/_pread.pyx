# The Python face of the pread pool (csrc/read/pread_pool.c).
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t

import os

import numpy as np

from fomoe_io._reader cimport fomoe_read_counters, fomoe_read_options, fomoe_reader

cdef extern from "csrc/read/pread_pool.h" nogil:
    ctypedef struct fomoe_pread_pool:
        pass
    int fomoe_pread_pool_new(const fomoe_read_options *, const int *descriptors, int threads, int write,
                             fomoe_pread_pool **pool)
    void fomoe_pread_pool_free(fomoe_pread_pool *)
    void fomoe_pread_pool_table(fomoe_pread_pool *, fomoe_reader *table)
    fomoe_read_counters fomoe_pread_pool_count(fomoe_pread_pool *)

# More threads than this add little with reads of an expert's size (docs/io.md).
MOST_THREADS = 16


cdef class PreadReader:
    cdef fomoe_reader table
    cdef fomoe_pread_pool *pool
    cdef fomoe_read_counters last_counters
    cdef readonly object files

    name = "pread"
    mode = "threads"
    buffers_registered = False
    registration_error = "pread has no registered buffers"

    def __cinit__(self, files, *, int depth=64, int sub_read_bytes=0, bint write=False):
        cdef fomoe_read_options options
        cdef uint64_t[::1] sizes = np.array(files.sizes, np.uint64)
        cdef int32_t[::1] drives = np.array(files.drives, np.int32)
        cdef int32_t[::1] mirrors = np.array(files.mirrors, np.int32)
        cdef uint32_t[::1] restarts = np.array(files.restarts, np.uint32)
        cdef int[::1] descriptors = np.array(files.descriptors, np.intc)
        cdef int threads = min(depth, MOST_THREADS), error
        self.files = files
        options.files, options.drives, options.depth = len(sizes), files.drive_count, depth
        options.piece_bytes = sub_read_bytes
        options.file_bytes, options.drive, options.mirror = &sizes[0], &drives[0], &mirrors[0]
        options.restart = &restarts[0]
        with nogil:
            error = fomoe_pread_pool_new(&options, &descriptors[0], threads, write, &self.pool)
        if error:
            raise OSError(-error, f"{threads} reader threads could not be started: {os.strerror(-error)}")
        fomoe_pread_pool_table(self.pool, &self.table)

    def __dealloc__(self):
        fomoe_pread_pool_free(self.pool)

    def close(self):
        """Wait for what is in flight and stop the threads."""
        cdef fomoe_pread_pool *pool = self.pool
        if pool == NULL:
            return
        self.pool = NULL
        with nogil:
            fomoe_pread_pool_free(pool)

    cdef fomoe_pread_pool *alive(self) except NULL:
        if self.pool == NULL:
            raise ValueError("the reader is closed")
        return self.pool

    @property
    def address(self):
        self.alive()
        return <uintptr_t>&self.table

    def register_buffers(self, uintptr_t address, size_t size):
        return False

    @property
    def last_error(self):
        if self.pool != NULL:
            self.last_counters = fomoe_pread_pool_count(self.pool)
        c = self.last_counters
        return self.files.describe_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    @property
    def last_fix(self):
        if self.pool != NULL:
            self.last_counters = fomoe_pread_pool_count(self.pool)
        c = self.last_counters
        return self.files.mend_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    @property
    def counters(self):
        cdef fomoe_read_counters c = fomoe_pread_pool_count(self.alive())
        return {
            "reads": c.reads,
            "sub_reads": c.pieces,
            "bytes": c.bytes,
            "short_reads": c.short_reads,
            "retries": c.retries,
            "cancelled": c.cancelled,
            "errors": c.errors,
            "failovers": c.failovers,
        }
