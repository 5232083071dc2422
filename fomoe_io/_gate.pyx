# One caller at a time, of one process, until the end.  In Cython, because no signal handler can run between taking the
# turn and the body of a `with`: in Python a Ctrl-C there would leave the engine busy for ever.
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from posix.unistd cimport getpid, usleep

import threading

from fomoe_io.errors import UsageError

cdef extern from *:
    """
    #define fomoe_exchange(word, value) __atomic_exchange_n(&(word), (value), __ATOMIC_ACQ_REL)
    #define fomoe_store(word, value) __atomic_store_n(&(word), (value), __ATOMIC_RELEASE)
    """
    int fomoe_exchange(int, int) nogil
    void fomoe_store(int, int) nogil

cdef enum:
    SHUT_POLL_US = 200


cdef int ask_python(void *gate) noexcept nogil:
    with gil:
        return (<Gate>gate).ask()


cdef class Gate:
    """Who may be inside an engine: one call at a time, of the process that opened it, until it is shut.

    ``with gate:`` takes the turn or raises UsageError at once.  A run inside is watched: shut() from another thread
    ends it, and so does a signal handler that raises (Ctrl-C), when the main thread runs it; raise_end() says which.
    `on_progress` is called meanwhile, every 50 ms at most, with how much of the run is done (0..1); so is `on_look`,
    without anything, in whichever thread the run is.  What one of them raises ends the run, which raises it.
    """

    def __cinit__(self):
        self.process = getpid()
        self.watch.argument = <void *>self

    cdef bint is_foreign_now(self):
        return self.process != getpid()

    @property
    def is_foreign(self):
        """Whether this process is a fork of the one that opened the engine: nothing native may be touched."""
        return self.is_foreign_now()

    @property
    def is_mine(self):
        """Whether the caller is inside: in a callback of its own run."""
        return self.busy and self.owner == PyThread_get_thread_ident()

    def check(self):
        """UsageError when nobody can enter any more, or this process can't."""
        if self.is_foreign_now():
            raise UsageError("the engine was opened in another process; open one after the fork")
        if self.watch.stop:
            raise UsageError("the engine is closed")

    cdef int enter(self) except -1:
        cdef long me = PyThread_get_thread_ident()
        cdef bint is_main = me == threading.main_thread().ident  # runs Python code: not after the turn is taken
        self.check()
        if fomoe_exchange(self.busy, 1):
            if self.owner == me:
                raise UsageError("the engine is busy: this was called from inside a run of its own")
            raise UsageError("the engine is busy in another thread; one at a time, or an engine for each")
        self.owner = me
        self.raised = None
        self.watch.done = self.watch.steps = 0
        self.watch.poll = NULL
        if is_main or self.on_look is not None:
            self.watch.poll = ask_python
        return 0

    def __enter__(self):
        self.enter()

    def __exit__(self, *_):
        self.owner = 0
        fomoe_store(self.busy, 0)

    cdef int ask(self) noexcept:
        try:
            PyErr_CheckSignals()
            if self.on_look is not None:
                self.on_look()
            if self.on_progress is not None and self.watch.steps:
                self.on_progress(self.watch.done / <double>self.watch.steps)
        except BaseException as error:
            self.raised = error
            return 1
        return 0

    @property
    def was_interrupted(self):
        """Whether a signal handler, or who looks at the run, has raised during it."""
        return self.raised is not None

    def look(self):
        """While the run waits in Python: raises what has ended it, if something has."""
        if fomoe_watch_ended(&self.watch):
            self.raise_end()

    def raise_end(self):
        """Of a run that returned -ECANCELED: what was raised to end it, or that the engine was closed meanwhile."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised
        raise UsageError("the engine was closed while it ran")

    def end(self):
        """From another thread: the run at work ends, and so would the next, until go_on()."""
        fomoe_store(self.watch.stop, 1)

    def go_on(self):
        """After end()."""
        fomoe_store(self.watch.stop, 0)

    def tell(self, int done, int steps):
        """How far a run is that Python drives."""
        self.watch.done, self.watch.steps = done, steps

    def check_run(self):
        """Between two native runs of one call: UsageError when the engine was closed meanwhile."""
        if self.watch.stop:
            self.raise_end()

    def shut(self):
        """End the run at work, if any, and let nobody in again; False when that was done before.

        Whoever gets True releases what is behind the gate.  Waits for the run to leave, which it does at its next step.
        """
        if self.is_foreign_now():
            was_shut, self.is_shut = self.is_shut, True
            return not was_shut
        if self.is_mine:
            raise UsageError("the engine can't be closed from inside a run of its own; raise an exception there")
        fomoe_store(self.watch.stop, 1)
        while not self.is_shut and fomoe_exchange(self.busy, 1):
            with nogil:
                usleep(SHUT_POLL_US)
            PyErr_CheckSignals()
        was_shut, self.is_shut = self.is_shut, True
        return not was_shut
