# The io_uring reader: a fixed table of operations, two queues (demand, prefetch), one persistent ring.
# The contract is csrc/reader.h; the documented face is reader.py.
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENODATA, ENOMEM
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

import os

cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef enum:
    DEMAND = 0
    PREFETCH = 1
    ALIGNMENT = 4096
    MOST_RETRIES = 100             # EAGAIN, EINTR, ENOMEM in a row on one read: then it is an error
    CQE_BATCH = 64
    BUFFER_BYTES = 1 << 30         # the kernel's limit of one registered buffer
    CANCEL_TAG = 0xffffffff        # user_data of cancel requests, which complete to nobody

cdef struct operation:
    uint64_t tag
    uint64_t offset
    uint8_t *target
    uint32_t bytes                 # wanted; less than asked where the file ends
    uint32_t done
    uint16_t file
    uint16_t priority
    int32_t next                   # in its queue, or in the free list
    int32_t retries
    uint8_t in_flight
    uint8_t cancelled

cdef struct queue:
    int32_t first
    int32_t last


cdef struct ring_state:
    io_uring ring
    bint direct
    int depth
    int in_flight
    int capacity
    operation *operations
    int32_t free_list
    queue queues[2]
    uint64_t *file_bytes
    int files
    uintptr_t fixed_start
    uintptr_t fixed_end
    bint fixed
    int error_file
    int error_code
    uint64_t error_offset
    uint64_t c_reads
    uint64_t c_bytes
    uint64_t c_short
    uint64_t c_retries
    uint64_t c_submits
    uint64_t c_waits
    uint64_t c_cancelled
    uint64_t c_errors
    uint64_t *depths               # how often the ring was left with so many reads in flight


cdef class UringReader:
    cdef fomoe_reader table
    cdef ring_state s
    cdef bint ring_open
    cdef list descriptors
    cdef readonly list paths

    name = "uring"

    def __cinit__(self, paths, *, int depth=64, bint direct=True):
        cdef io_uring_params parameters
        cdef int result, i
        cdef int *fds
        self.s.free_list = -1
        for i in range(2):
            self.s.queues[i].first = self.s.queues[i].last = -1
        self.paths = [os.fspath(path) for path in paths]
        self.descriptors = []
        self.s.depth = depth
        self.s.direct = direct
        self.s.depths = <uint64_t *>calloc(depth + 1, sizeof(uint64_t))
        self.s.file_bytes = <uint64_t *>calloc(len(self.paths) + 1, sizeof(uint64_t))
        fds = <int *>calloc(len(self.paths) + 1, sizeof(int))
        if self.s.depths == NULL or self.s.file_bytes == NULL or fds == NULL:
            free(fds)
            raise MemoryError
        try:
            for i, path in enumerate(self.paths):
                fds[i] = self._open(path)
                self.descriptors.append(fds[i])
                self.s.file_bytes[i] = os.fstat(fds[i]).st_size
            self.s.files = len(self.paths)
            memset(&parameters, 0, sizeof(parameters))
            parameters.flags = IORING_SETUP_COOP_TASKRUN
            result = io_uring_queue_init_params(depth, &self.s.ring, &parameters)
            if result == -EINVAL:  # before Linux 5.19
                memset(&parameters, 0, sizeof(parameters))
                result = io_uring_queue_init_params(depth, &self.s.ring, &parameters)
            if result < 0:
                raise OSError(-result, f"io_uring is not available: {os.strerror(-result)}")
            self.ring_open = True
            result = io_uring_register_files(&self.s.ring, fds, self.s.files)
            if result < 0:
                raise OSError(-result, f"io_uring files could not be registered: {os.strerror(-result)}")
        finally:
            free(fds)
        self.table.self = &self.s
        self.table.submit = ring_submit
        self.table.reap = ring_reap
        self.table.promote = ring_promote
        self.table.cancel = ring_cancel

    def _open(self, path):
        if self.s.direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                self.s.direct = False  # the file system has no direct I/O
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __dealloc__(self):
        self.close()
        free(self.s.operations)
        free(self.s.file_bytes)
        free(self.s.depths)

    def close(self):
        """Wait for what is in flight, then close the ring and the files."""
        cdef fomoe_completion done[CQE_BATCH]
        if self.ring_open:
            self.ring_open = False
            with nogil:
                while reap_some(&self.s, done, CQE_BATCH, 1) > 0:
                    pass
                io_uring_queue_exit(&self.s.ring)
        descriptors, self.descriptors = self.descriptors, []
        for descriptor in descriptors or ():
            os.close(descriptor)

    @property
    def direct(self):
        return bool(self.s.direct)

    @property
    def address(self):
        """Address of the fomoe_reader table."""
        return <uintptr_t>&self.table

    @property
    def file_sizes(self):
        return [self.s.file_bytes[i] for i in range(self.s.files)]

    @property
    def buffers_registered(self):
        return self.s.fixed

    def register_buffers(self, uintptr_t address, size_t size):
        """Let the kernel pin this memory once; False (and plain reads) when the memory limit forbids it."""
        cdef int count = <int>((size + BUFFER_BYTES - 1) // BUFFER_BYTES), i, result
        cdef iovec *vectors = <iovec *>calloc(count, sizeof(iovec))
        if vectors == NULL:
            raise MemoryError
        for i in range(count):
            vectors[i].iov_base = <void *>(address + <size_t>i * BUFFER_BYTES)
            vectors[i].iov_len = min(<size_t>BUFFER_BYTES, size - <size_t>i * BUFFER_BYTES)
        with nogil:
            if self.s.fixed:
                io_uring_unregister_buffers(&self.s.ring)
            result = io_uring_register_buffers(&self.s.ring, vectors, count)
        free(vectors)
        self.s.fixed = result == 0
        self.s.fixed_start, self.s.fixed_end = address, address + size
        return bool(self.s.fixed)

    @property
    def last_error(self):
        """File, offset and cause of the last failed read; empty when none has failed."""
        if not self.s.c_errors:
            return ""
        reason = "the file ends before (cut since it was opened?)" if self.s.error_code == ENODATA else os.strerror(self.s.error_code)
        return f"{self.paths[self.s.error_file]} at offset {self.s.error_offset}: {reason}"

    @property
    def counters(self):
        return {
            "reads": self.s.c_reads, "bytes": self.s.c_bytes, "short_reads": self.s.c_short, "retries": self.s.c_retries,
            "submits": self.s.c_submits, "waits": self.s.c_waits, "cancelled": self.s.c_cancelled, "errors": self.s.c_errors,
            "depths": [self.s.depths[i] for i in range(self.s.depth + 1)],
        }


cdef int grow(ring_state *self) noexcept nogil:
    cdef int capacity = 2 * self.capacity if self.capacity else 256, i
    cdef operation *operations = <operation *>realloc(self.operations, capacity * sizeof(operation))
    if operations == NULL:
        return -ENOMEM
    self.operations = operations
    for i in range(capacity - 1, self.capacity - 1, -1):
        operations[i].next = self.free_list
        self.free_list = i
    self.capacity = capacity
    return 0


cdef void push(ring_state *self, int32_t index, bint front) noexcept nogil:
    cdef queue *q = &self.queues[self.operations[index].priority]
    if front:
        self.operations[index].next = q.first
        q.first = index
        if q.last < 0:
            q.last = index
        return
    self.operations[index].next = -1
    if q.last >= 0:
        self.operations[q.last].next = index
    else:
        q.first = index
    q.last = index


cdef int32_t pop(ring_state *self) noexcept nogil:
    cdef queue *q = &self.queues[DEMAND]
    cdef int32_t index
    if q.first < 0:
        q = &self.queues[PREFETCH]
    index = q.first
    if index >= 0:
        q.first = self.operations[index].next
        if q.first < 0:
            q.last = -1
    return index


cdef void prepare(ring_state *self, io_uring_sqe *sqe, int32_t index) noexcept nogil:
    cdef operation *op = &self.operations[index]
    cdef uintptr_t target = <uintptr_t>op.target + op.done
    cdef uint32_t size = op.bytes - op.done
    cdef uint64_t piece = (target - self.fixed_start) // BUFFER_BYTES
    if self.direct:  # the kernel stops at the end of the file by itself
        size = (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    if (self.fixed and target >= self.fixed_start and target + size <= self.fixed_end
            and (target + size - 1 - self.fixed_start) // BUFFER_BYTES == piece):
        io_uring_prep_read_fixed(sqe, op.file, <void *>target, size, op.offset + op.done, <int>piece)
    else:
        io_uring_prep_read(sqe, op.file, <void *>target, size, op.offset + op.done)
    sqe.flags = sqe.flags | IOSQE_FIXED_FILE
    sqe.user_data = index
    op.in_flight = 1


# Hand the ring as many queued reads as its depth allows; True when there is something new to submit.
cdef bint pump(ring_state *self) noexcept nogil:
    cdef io_uring_sqe *sqe
    cdef int32_t index
    cdef bint added = False
    while self.in_flight < self.depth:
        if self.queues[DEMAND].first < 0 and self.queues[PREFETCH].first < 0:
            break
        sqe = io_uring_get_sqe(&self.ring)
        if sqe == NULL:
            break
        index = pop(self)
        prepare(self, sqe, index)
        self.in_flight += 1
        added = True
    if added:
        self.depths[self.in_flight] += 1
    return added


cdef int ring_submit(void *reader, const fomoe_read *reads, int count) noexcept nogil:
    cdef ring_state *self = <ring_state *>reader
    cdef operation *op
    cdef int i, result, need = 0
    cdef int32_t index
    cdef uint64_t end
    for i in range(count):
        if reads[i].file >= self.files or reads[i].offset >= self.file_bytes[reads[i].file] or reads[i].bytes == 0:
            self.error_file = min(<int>reads[i].file, self.files - 1)
            self.error_offset = reads[i].offset
            self.error_code = EINVAL
            self.c_errors += 1
            return -EINVAL
    index = self.free_list
    while index >= 0 and need < count:
        index = self.operations[index].next
        need += 1
    while need < count:
        result = grow(self)
        if result:
            return result
        need = 0
        index = self.free_list
        while index >= 0 and need < count:
            index = self.operations[index].next
            need += 1
    for i in range(count):
        index = self.free_list
        op = &self.operations[index]
        self.free_list = op.next
        end = min(reads[i].offset + reads[i].bytes, self.file_bytes[reads[i].file])
        op.tag = reads[i].tag
        op.offset = reads[i].offset
        op.target = reads[i].target
        op.bytes = <uint32_t>(end - reads[i].offset)
        op.done = 0
        op.file = reads[i].file
        op.priority = PREFETCH if reads[i].priority else DEMAND
        op.retries = 0
        op.in_flight = op.cancelled = 0
        push(self, index, False)
    self.c_reads += count
    if pump(self):
        self.c_submits += 1
        io_uring_submit(&self.ring)  # an error leaves the entries queued: the next submit or wait retries
    return 0


# A completion of the ring: True when the read is finished (then *error is set), False when it goes on.
cdef bint settle(ring_state *self, int32_t index, int32_t result, int32_t *error) noexcept nogil:
    cdef operation *op = &self.operations[index]
    op.in_flight = 0
    self.in_flight -= 1
    if result == -EAGAIN or result == -EINTR or result == -ENOMEM:
        op.retries += 1
        self.c_retries += 1
        if op.retries <= MOST_RETRIES and not op.cancelled:
            push(self, index, True)
            return False
    if result > 0:
        self.c_bytes += result
        op.done += result
        if op.done >= op.bytes:
            error[0] = 0
            return True
        # A short read: go on where it stopped, for direct reads from the last whole page.
        self.c_short += 1
        op.retries += 1
        if self.direct:
            op.done = op.done // ALIGNMENT * ALIGNMENT
        if op.retries <= MOST_RETRIES:
            push(self, index, True)
            return False
        result = -EIO
    elif result == 0:
        result = -ENODATA
    if op.cancelled and result == -ECANCELED:
        self.c_cancelled += 1
    else:
        self.c_errors += 1
        self.error_file = op.file
        self.error_offset = op.offset + op.done
        self.error_code = -result
    error[0] = result
    return True


cdef int reap_some(ring_state *self, fomoe_completion *completions, int most, int wait) noexcept nogil:
    cdef io_uring_cqe *cqes[CQE_BATCH]
    cdef unsigned got, i
    cdef int count = 0, result
    cdef int32_t index, error = 0
    cdef queue *q
    while True:
        got = io_uring_peek_batch_cqe(&self.ring, cqes, <unsigned>min(most - count, CQE_BATCH))
        for i in range(got):
            if cqes[i].user_data == CANCEL_TAG:
                continue
            index = <int32_t>cqes[i].user_data
            if settle(self, index, cqes[i].res, &error):
                completions[count].tag = self.operations[index].tag
                completions[count].error = error
                count += 1
                self.operations[index].next = self.free_list
                self.free_list = index
        if got:
            io_uring_cq_advance(&self.ring, got)
        if got and count < most:
            if pump(self):
                self.c_submits += 1
                io_uring_submit(&self.ring)
            continue
        if count or not wait:
            return count
        if self.in_flight == 0 and not pump(self):
            return 0
        self.c_waits += 1
        result = io_uring_submit_and_wait(&self.ring, 1)
        if result < 0 and result != -EINTR and result != -EAGAIN:
            return result


cdef int ring_reap(void *reader, fomoe_completion *completions, int most, int wait) noexcept nogil:
    return reap_some(<ring_state *>reader, completions, most, wait)


# Take a queued read out of the prefetch queue; its index, or -1.
cdef int32_t unqueue(ring_state *self, uint64_t tag) noexcept nogil:
    cdef queue *q = &self.queues[PREFETCH]
    cdef int32_t index = q.first, previous = -1
    while index >= 0:
        if self.operations[index].tag == tag:
            if previous < 0:
                q.first = self.operations[index].next
            else:
                self.operations[previous].next = self.operations[index].next
            if q.last == index:
                q.last = previous
            return index
        previous = index
        index = self.operations[index].next
    return -1


cdef void ring_promote(void *reader, uint64_t tag) noexcept nogil:
    cdef ring_state *self = <ring_state *>reader
    cdef int32_t index = unqueue(self, tag)
    if index >= 0:
        self.operations[index].priority = DEMAND
        push(self, index, False)
        if pump(self):
            self.c_submits += 1
            io_uring_submit(&self.ring)


cdef void ring_cancel(void *reader, uint64_t tag) noexcept nogil:
    cdef ring_state *self = <ring_state *>reader
    cdef io_uring_sqe *sqe
    cdef int i
    for i in range(self.capacity):
        if self.operations[i].in_flight and self.operations[i].tag == tag and not self.operations[i].cancelled:
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                return
            self.operations[i].cancelled = 1
            io_uring_prep_cancel64(sqe, i, 0)
            sqe.user_data = CANCEL_TAG
            io_uring_submit(&self.ring)
            return
