# A GPU through one table of function pointers, named as HIP names them.  Needs no vendor header to build and no vendor
# library to import: use_provider() looks for one.  Thin on purpose; the documented face is device.py.
from cpython.exc cimport PyErr_CheckSignals, PyErr_Fetch, PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF, PyObject, Py_XDECREF
from libc.string cimport memcpy, memset

import gc
import importlib
import re

from fomoe_io.errors import DeviceError

include "_hip_table.pxi"


cdef void count_alive(int n) noexcept:
    global live
    live += n


include "_hip_compile.pxi"


# ---- devices ------------------------------------------------------------------------------------------------------

def device_count():
    cdef int n = 0, code
    with nogil:
        code = api.hipGetDeviceCount(&n)
    check(code, "hipGetDeviceCount")
    return n


def device_name(int device):
    cdef char name[256]
    memset(name, 0, sizeof(name))
    check(api.hipDeviceGetName(name, 255, device), "hipDeviceGetName")
    return (<bytes>name).decode(errors="replace")


def device_attribute(int device, int attribute):
    cdef int value = 0
    check(api.hipDeviceGetAttribute(&value, attribute, device), "hipDeviceGetAttribute")
    return value


def device_architecture(int device):
    # 8 KiB: several times the largest layout of the struct so far (1472 bytes).
    cdef char properties[8192]
    if provider == "cuda":
        return f"sm_{device_attribute(device, 75)}{device_attribute(device, 76)}"  # COMPUTE_CAPABILITY_MAJOR, MINOR
    memset(properties, 0, sizeof(properties))
    check(api.hipGetDeviceProperties(properties, device), "hipGetDeviceProperties")
    # Behind the name (256 bytes) come numbers, and among them gcnArchName, e.g. "gfx90a:sramecc+:xnack-".
    found = re.search(rb"gfx[0-9a-f]+[0-9a-z:+-]*", (<bytes>properties[:8192])[256:])
    if found is None:
        raise DeviceError(f"hipGetDeviceProperties names no architecture for device {device}")
    return found[0].decode()


def device_bytes(int device):
    cdef size_t n = 0
    check(api.hipDeviceTotalMem(&n, device), "hipDeviceTotalMem")
    return n


def driver_version():
    cdef int version = 0
    check(api.hipDriverGetVersion(&version), "hipDriverGetVersion")
    return version


def memory_info(int device):
    cdef size_t free_bytes = 0, total_bytes = 0
    cdef int code
    with nogil:
        code = api.hipSetDevice(device)
        if code == 0:
            code = api.hipMemGetInfo(&free_bytes, &total_bytes)
    check(code, "hipMemGetInfo")
    return free_bytes, total_bytes


def synchronize(int device):
    cdef int code
    with nogil:
        code = api.hipSetDevice(device)
        if code == 0:
            code = api.hipDeviceSynchronize()
    fomoe_count(counters.host_syncs, 1)
    check(code, "hipDeviceSynchronize")


def can_reach(int device, int peer):
    """Whether kernels on a device may use another one's memory; then they may from now on."""
    cdef int can = 0, code
    if api.hipDeviceCanAccessPeer == NULL or api.hipDeviceEnablePeerAccess == NULL:
        return False
    check(api.hipDeviceCanAccessPeer(&can, device, peer), "hipDeviceCanAccessPeer")
    if not can:
        return False
    with nogil:
        code = api.hipSetDevice(device)
        if code == 0:
            code = api.hipDeviceEnablePeerAccess(peer, 0)
    if code != PEER_ALREADY:
        check(code, "hipDeviceEnablePeerAccess")
    return True


def abandon(*things):
    """Never give these back: the driver would wait for a device that hangs."""
    for thing in things:
        Py_INCREF(thing)


# ---- memory -------------------------------------------------------------------------------------------------------
# Freed without the GIL: the driver may wait for a thread that wants it.

cdef class Buffer:
    def __cinit__(self, int device, size_t nbytes):
        cdef void *p = NULL
        cdef int code
        self.device = device
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipMalloc(&p, nbytes)
        check(code, "hipMalloc")
        count_alive(1)
        self.pointer = <uintptr_t>p
        self.nbytes = nbytes

    def free(self):
        cdef void *p = <void *>self.pointer
        cdef int code
        if p == NULL:
            return
        self.pointer = 0
        count_alive(-1)
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipFree(p)
        check(code, "hipFree")

    def __dealloc__(self):
        cdef void *p = <void *>self.pointer
        if p != NULL:
            count_alive(-1)
            with nogil:
                api.hipSetDevice(self.device)
                api.hipFree(p)


cdef class Registration:
    def __cinit__(self, int device, uintptr_t address, size_t nbytes, owner):
        cdef void *p = NULL
        cdef int code
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipHostRegister(<void *>address, nbytes, PORTABLE_MAPPED)
        check(code, "hipHostRegister")
        self.device, self.address, self.nbytes, self.owner = device, address, nbytes, owner
        count_alive(1)
        check(api.hipHostGetDevicePointer(&p, <void *>address, 0), "hipHostGetDevicePointer")
        self.pointer = <uintptr_t>p

    def pointer_on(self, int device):
        """Where another device sees it."""
        cdef void *p = NULL
        cdef int code
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipHostGetDevicePointer(&p, <void *>self.address, 0)
        check(code, "hipHostGetDevicePointer")
        return <uintptr_t>p

    def close(self):
        cdef void *p = <void *>self.address
        cdef int code
        if p == NULL:
            return
        self.address = 0
        count_alive(-1)
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipHostUnregister(p)
        self.owner = None
        check(code, "hipHostUnregister")

    def __dealloc__(self):
        cdef void *p = <void *>self.address
        if p != NULL:
            count_alive(-1)
            with nogil:
                api.hipSetDevice(self.device)
                api.hipHostUnregister(p)


# ---- streams and events -------------------------------------------------------------------------------------------

cdef class Event:
    def __cinit__(self, int device, bint is_timed=False):
        cdef int code
        self.device = device
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipEventCreateWithFlags(&self.handle, 0 if is_timed else NO_TIMING)
        check(code, "hipEventCreateWithFlags")
        count_alive(1)

    def synchronize(self, Gate gate=None):
        """The gate's end is this wait's, too."""
        cdef int code
        cdef fomoe_wait wait
        cdef fomoe_patience mine = patience_of(gate)
        memset(&wait, 0, sizeof(wait))
        with nogil:
            code = api.hipSetDevice(self.device)
            while code == 0:
                code = api.hipEventQuery(self.handle)
                if code != NOT_READY:
                    break
                code = 0 if fomoe_look_again(&mine, &wait) and not mine.is_interrupted else FOMOE_STUCK
        fomoe_count(counters.host_syncs, 1)
        raise_end(&mine, gate)
        if code == FOMOE_STUCK:
            raise stuck("an event")
        check(code, "hipEventQuery")

    def is_done(self):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipEventQuery(self.handle)
        if code == NOT_READY:
            return False
        check(code, "hipEventQuery")
        return True

    def milliseconds_since(self, Event earlier):
        cdef float ms = 0
        cdef int code
        with nogil:
            api.hipSetDevice(self.device)
            code = api.hipEventElapsedTime(&ms, earlier.handle, self.handle)
        check(code, "hipEventElapsedTime")
        return ms

    def __dealloc__(self):
        if self.handle != NULL:
            count_alive(-1)
            with nogil:
                api.hipSetDevice(self.device)
                api.hipEventDestroy(self.handle)


# An urgent stream shares no hardware queue with those that are not: HIP has a few queues for each priority, and what
# one stream waits for in a queue holds up the others there.
cdef class Stream:
    def __cinit__(self, int device, bint is_urgent=False):
        cdef int code, least = 0, greatest = 0
        self.device = device
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0 and is_urgent:
                code = api.hipDeviceGetStreamPriorityRange(&least, &greatest)
            if code == 0:
                if is_urgent:
                    code = api.hipStreamCreateWithPriority(&self.handle, NON_BLOCKING, greatest)
                else:
                    code = api.hipStreamCreateWithFlags(&self.handle, NON_BLOCKING)
        check(code, "hipStreamCreateWithPriority" if is_urgent else "hipStreamCreateWithFlags")
        count_alive(1)

    # The host's side of a copy must stay until the stream has passed it; copies overlap with the host only when
    # it is registered memory.
    def copy_in(self, uintptr_t device_pointer, uintptr_t address, size_t nbytes):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipMemcpyHtoDAsync(<void *>device_pointer, <void *>address, nbytes, self.handle)
        fomoe_count(counters.bytes_in, nbytes)
        check(code, "hipMemcpyHtoDAsync")

    def copy_out(self, uintptr_t address, uintptr_t device_pointer, size_t nbytes):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipMemcpyDtoHAsync(<void *>address, <void *>device_pointer, nbytes, self.handle)
        fomoe_count(counters.bytes_out, nbytes)
        check(code, "hipMemcpyDtoHAsync")

    def copy(self, uintptr_t to, uintptr_t source, size_t nbytes):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipMemcpyDtoDAsync(<void *>to, <void *>source, nbytes, self.handle)
        check(code, "hipMemcpyDtoDAsync")

    def fill(self, uintptr_t device_pointer, unsigned char value, size_t nbytes):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipMemsetD8Async(<void *>device_pointer, value, nbytes, self.handle)
        check(code, "hipMemsetD8Async")

    def record(self, Event event):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipEventRecord(event.handle, self.handle)
        check(code, "hipEventRecord")

    def wait(self, Event event):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipStreamWaitEvent(self.handle, event.handle, 0)
        check(code, "hipStreamWaitEvent")

    def synchronize(self, Gate gate=None):
        """The gate's end is this wait's, too."""
        cdef int code
        cdef bint is_stuck = False
        cdef fomoe_patience mine = patience_of(gate)
        cdef fomoe_wait wait
        memset(&wait, 0, sizeof(wait))
        with nogil:
            code = api.hipSetDevice(self.device)
            while code == 0 and not is_stuck:
                code = api.hipStreamQuery(self.handle)
                if code != NOT_READY:
                    break
                code = 0
                is_stuck = not fomoe_look_again(&mine, &wait) or mine.is_interrupted
            if code == 0 and not is_stuck:
                code = api.hipStreamSynchronize(self.handle)
        fomoe_count(counters.host_syncs, 1)
        raise_end(&mine, gate)
        if is_stuck:
            raise stuck("a stream")
        check(code, "hipStreamSynchronize")

    def is_done(self):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipStreamQuery(self.handle)
        if code == NOT_READY:
            return False
        check(code, "hipStreamQuery")
        return True

    def begin_capture(self):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipStreamBeginCapture(self.handle, CAPTURE_THREAD)
        check(code, "hipStreamBeginCapture")

    def end_capture(self, list keep):
        cdef void *graph = NULL
        cdef int code
        with nogil:
            code = api.hipStreamEndCapture(self.handle, &graph)
        check(code, "hipStreamEndCapture")
        return Graph(self.device, <uintptr_t>graph, keep)

    def __dealloc__(self):
        if self.handle != NULL:
            count_alive(-1)
            with nogil:
                api.hipSetDevice(self.device)
                api.hipStreamDestroy(self.handle)


cdef class Graph:
    def __cinit__(self, int device, uintptr_t graph, list keep):
        cdef int code
        self.device, self.graph, self.keep = device, <void *>graph, keep
        count_alive(1)
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipGraphInstantiateWithFlags(&self.executable, self.graph, 0)
        check(code, "hipGraphInstantiateWithFlags")

    cdef int enqueue(self, void *stream) noexcept nogil:
        fomoe_count(counters.graph_launches, 1)
        return api.hipGraphLaunch(self.executable, stream)

    def launch(self, Stream stream):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = self.enqueue(stream.handle)
        check(code, "hipGraphLaunch")

    def __dealloc__(self):
        if self.graph != NULL:
            count_alive(-1)
        with nogil:
            if self.executable != NULL:
                api.hipSetDevice(self.device)
                api.hipGraphExecDestroy(self.executable)
            if self.graph != NULL:
                api.hipGraphDestroy(self.graph)


# ---- code ---------------------------------------------------------------------------------------------------------

cdef class Module:
    def __cinit__(self, int device, const uint8_t[::1] image):
        cdef int code
        cdef const void *data = &image[0]
        self.device = device
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipModuleLoadData(&self.handle, data)
        check(code, "hipModuleLoadData")
        count_alive(1)

    def __dealloc__(self):
        if self.handle != NULL:
            count_alive(-1)
            with nogil:
                api.hipSetDevice(self.device)
                api.hipModuleUnload(self.handle)


cdef class Function:
    def __cinit__(self, Module module, str name):
        cdef bytes encoded = name.encode()
        cdef const char *text = encoded
        cdef int code
        self.module, self.name = module, name
        with nogil:
            code = api.hipSetDevice(module.device)
            if code == 0:
                code = api.hipModuleGetFunction(&self.handle, module.handle, text)
        check(code, "hipModuleGetFunction")

    def attribute(self, int number):
        cdef int value = 0
        check(api.hipFuncGetAttribute(&value, number, self.handle), "hipFuncGetAttribute")
        return value


# A launch with its arguments bound, so that a replay touches no Python object.
cdef class Launch:
    def __cinit__(self, Function function, tuple grid, int threads, str signature, *arguments):
        if len(arguments) != len(signature) or len(signature) > 24:
            raise TypeError(f"{function.name} takes {len(signature)} arguments, got {len(arguments)}")
        self.function, self.grid, self.threads, self.signature = function, grid, threads, signature
        self.gx, self.gy, self.gz = grid
        self.keep = [None] * len(arguments)
        for i, value in enumerate(arguments):
            self.addresses[i] = &self.values[i]
            self.set(i, value)

    def set(self, int i, value):
        if not 0 <= i < len(self.keep):
            raise IndexError(f"{self.function.name} has no argument {i}")
        cdef int whole
        cdef float real
        cdef uint64_t wide
        code = self.signature[i]
        if code == "i":
            whole = value
            memcpy(&self.values[i], &whole, sizeof(whole))
        elif code == "f":
            real = value
            memcpy(&self.values[i], &real, sizeof(real))
        else:
            wide = 0 if value is None else getattr(value, "pointer", value)
            self.values[i] = wide
            self.keep[i] = value

    cdef int enqueue(self, void *stream) noexcept nogil:
        fomoe_count(counters.launches, 1)
        return api.hipModuleLaunchKernel(self.function.handle, self.gx, self.gy, self.gz, self.threads, 1, 1, 0, stream,
                                         self.addresses, NULL)

    # May start while the launch before it on the stream still runs; its kernel waits (gpu/kernels/prelude.h,
    # start_kernel).
    # An ordinary launch where the driver has no such call.
    cdef int enqueue_chained(self, void *stream) noexcept nogil:
        cdef launch_config config
        cdef launch_attribute attribute
        if cu_launch == NULL:
            return self.enqueue(stream)
        fomoe_count(counters.launches, 1)
        memset(&attribute, 0, sizeof(attribute))
        attribute.id = CHAINED
        attribute.value[0] = 1
        config.grid[0], config.grid[1], config.grid[2] = self.gx, self.gy, self.gz
        config.block[0], config.block[1], config.block[2] = self.threads, 1, 1
        config.shared_bytes, config.stream = 0, stream
        config.attributes, config.attribute_count = &attribute, 1
        return cu_launch(&config, self.function.handle, self.addresses, NULL)

    def run(self, Stream stream, bint is_chained=False):
        cdef int code
        with nogil:
            code = api.hipSetDevice(stream.device)
            if code == 0:
                code = self.enqueue_chained(stream.handle) if is_chained else self.enqueue(stream.handle)
        check(code, "hipModuleLaunchKernel")
