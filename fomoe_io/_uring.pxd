# liburing and the reader interface, as C declares them.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "liburing.h" nogil:
    struct io_uring:
        unsigned features
    struct io_uring_params:
        unsigned flags
    struct io_uring_sqe:
        uint8_t flags
        uint64_t user_data
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
    unsigned IORING_SETUP_COOP_TASKRUN
    uint8_t IOSQE_FIXED_FILE
    int io_uring_queue_init_params(unsigned entries, io_uring *, io_uring_params *)
    void io_uring_queue_exit(io_uring *)
    io_uring_sqe *io_uring_get_sqe(io_uring *)
    void io_uring_prep_read(io_uring_sqe *, int fd, void *buf, unsigned nbytes, uint64_t offset)
    void io_uring_prep_read_fixed(io_uring_sqe *, int fd, void *buf, unsigned nbytes, uint64_t offset, int index)
    void io_uring_prep_cancel64(io_uring_sqe *, uint64_t user_data, int flags)
    int io_uring_submit(io_uring *)
    int io_uring_submit_and_wait(io_uring *, unsigned)
    unsigned io_uring_peek_batch_cqe(io_uring *, io_uring_cqe **, unsigned)
    void io_uring_cq_advance(io_uring *, unsigned)
    int io_uring_register_buffers(io_uring *, const iovec *, unsigned)
    int io_uring_unregister_buffers(io_uring *)
    int io_uring_register_files(io_uring *, const int *, unsigned)

cdef extern from "csrc/reader.h" nogil:
    ctypedef struct fomoe_read:
        uint64_t tag
        uint64_t offset
        uint8_t *target
        uint32_t bytes
        uint16_t file
        uint16_t priority
    ctypedef struct fomoe_completion:
        uint64_t tag
        int32_t error
    ctypedef struct fomoe_reader:
        void *self
        int (*submit)(void *, const fomoe_read *, int) noexcept nogil
        int (*reap)(void *, fomoe_completion *, int, int) noexcept nogil
        void (*promote)(void *, uint64_t) noexcept nogil
        void (*cancel)(void *, uint64_t) noexcept nogil
