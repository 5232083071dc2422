# The pread reader: the interface of csrc/reader.h over a pool of threads (csrc/pread_pool.c).
from libc.errno cimport EINVAL, ENODATA
from libc.stdint cimport int32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

import os

cdef extern from "csrc/reader.h" nogil:
    ctypedef struct fomoe_reader:
        pass

cdef extern from "csrc/pread_pool.h" nogil:
    ctypedef struct fomoe_pread_pool:
        pass
    ctypedef struct fomoe_pread_counters:
        uint64_t reads
        uint64_t bytes
        uint64_t short_reads
        uint64_t retries
        uint64_t errors
        int32_t error_file
        int32_t error_code
        uint64_t error_offset
    fomoe_pread_pool *fomoe_pread_pool_new(const int *, const uint64_t *, int files, int threads, int direct)
    void fomoe_pread_pool_free(fomoe_pread_pool *)
    void fomoe_pread_pool_table(fomoe_pread_pool *, fomoe_reader *)
    fomoe_pread_counters fomoe_pread_pool_count(fomoe_pread_pool *)


cdef class PreadReader:
    cdef fomoe_reader table
    cdef fomoe_pread_pool *pool
    cdef list descriptors
    cdef readonly list paths, file_sizes
    cdef readonly bint direct

    name = "pread"

    def __cinit__(self, paths, *, int depth=64, bint direct=True):
        # As many threads as reads in flight are worth: 16 saturate one drive with expert-sized reads (docs/io.md).
        cdef int threads = min(depth, 16), i
        cdef int *fds
        cdef uint64_t *sizes
        self.paths = [os.fspath(path) for path in paths]
        self.descriptors = []
        self.direct = direct
        fds = <int *>calloc(len(self.paths) + 1, sizeof(int))
        sizes = <uint64_t *>calloc(len(self.paths) + 1, sizeof(uint64_t))
        try:
            if fds == NULL or sizes == NULL:
                raise MemoryError
            for i, path in enumerate(self.paths):
                fds[i] = self._open(path)
                self.descriptors.append(fds[i])
                sizes[i] = os.fstat(fds[i]).st_size
            self.file_sizes = [sizes[i] for i in range(len(self.paths))]
            self.pool = fomoe_pread_pool_new(fds, sizes, <int>len(self.paths), threads, self.direct)
            if self.pool == NULL:
                raise OSError(f"{threads} reader threads could not be started")
        finally:
            free(fds)
            free(sizes)
        fomoe_pread_pool_table(self.pool, &self.table)

    def _open(self, path):
        if self.direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                self.direct = False  # the file system has no direct I/O
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Wait for what is in flight, stop the threads, close the files."""
        cdef fomoe_pread_pool *pool = self.pool
        self.pool = NULL
        with nogil:
            fomoe_pread_pool_free(pool)
        descriptors, self.descriptors = self.descriptors, []
        for descriptor in descriptors or ():
            os.close(descriptor)

    @property
    def address(self):
        """Address of the fomoe_reader table."""
        return <uintptr_t>&self.table

    @property
    def buffers_registered(self):
        return False

    def register_buffers(self, uintptr_t address, size_t size):
        """Nothing to register for pread."""
        return False

    @property
    def last_error(self):
        """File, offset and cause of the last failed read; empty when none has failed."""
        if self.pool == NULL:
            return ""
        cdef fomoe_pread_counters c = fomoe_pread_pool_count(self.pool)
        if not c.errors:
            return ""
        reason = "the file ends before (cut since it was opened?)" if c.error_code == ENODATA else os.strerror(c.error_code)
        return f"{self.paths[c.error_file]} at offset {c.error_offset}: {reason}"

    @property
    def counters(self):
        cdef fomoe_pread_counters c = fomoe_pread_pool_count(self.pool)
        return {"reads": c.reads, "bytes": c.bytes, "short_reads": c.short_reads, "retries": c.retries, "errors": c.errors}
