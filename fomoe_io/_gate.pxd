# Who may be inside an engine, and what ends a run before its time; cimported by what runs native code.
from libc.stdint cimport int32_t, int64_t

cdef extern from "csrc/read/watch.h" nogil:
    ctypedef struct fomoe_watch:
        int32_t stop
        int (*poll)(void *) noexcept nogil
        void *argument
        int64_t polled_ms
        int32_t done, steps
    int fomoe_watch_ended(fomoe_watch *)

cdef class Gate:
    cdef fomoe_watch watch
    cdef object raised
    cdef public object on_progress, on_look
    cdef int busy
    cdef long owner
    cdef int process
    cdef readonly bint is_shut

    cdef bint is_foreign_now(self)
    cdef int enter(self) except -1
    cdef int ask(self) noexcept
