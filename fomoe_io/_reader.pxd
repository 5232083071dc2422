# The reader interface and what is behind both readers, as C declares them.
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "csrc/read/reader.h" nogil:
    ctypedef struct fomoe_reader:
        pass

cdef extern from "csrc/read/read_table.h" nogil:
    ctypedef struct fomoe_read_options:
        int files
        int drives
        int depth
        uint32_t piece_bytes
        const uint64_t *file_bytes
        const int32_t *drive
        const int32_t *mirror
        const uint32_t *restart
    ctypedef struct fomoe_read_counters:
        uint64_t reads
        uint64_t pieces
        uint64_t bytes
        uint64_t short_reads
        uint64_t retries
        uint64_t cancelled
        uint64_t errors
        uint64_t failovers
        uint64_t error_offset
        int32_t error_file
        int32_t error_code
