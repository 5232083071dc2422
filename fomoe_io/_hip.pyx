# A GPU through one table of function pointers, named as HIP names them.  Needs no vendor header to build and no vendor
# library to import: use_provider() looks for one.  Thin on purpose; the documented face is device.py.
from cpython.exc cimport PyErr_Fetch, PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from cpython.ref cimport PyObject, Py_XDECREF
from libc.string cimport memcpy, memset

import importlib
import re

from fomoe_io.errors import DeviceError

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    char *dlerror()
    int RTLD_NOW, RTLD_LOCAL, RTLD_GLOBAL

cdef extern from *:
    """
    #define fomoe_count(counter, n) __atomic_fetch_add(&(counter), (n), __ATOMIC_RELAXED)
    """
    void fomoe_count(uint64_t, uint64_t) nogil

ctypedef int (*cu_retain_t)(void **, int) noexcept nogil
ctypedef int (*cu_current_t)(void *) noexcept nogil

cdef enum:
    MOST_DEVICES = 64
    INVALID_DEVICE = 101  # hipErrorInvalidDevice and CUDA_ERROR_INVALID_DEVICE alike, and so are the next two
    OUT_OF_MEMORY = 2
    NON_BLOCKING = 1      # hipStreamNonBlocking, CU_STREAM_NON_BLOCKING
    NO_TIMING = 2         # hipEventDisableTiming, CU_EVENT_DISABLE_TIMING
    PORTABLE_MAPPED = 3   # hipHostRegisterPortable | Mapped, CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP
    CAPTURE_THREAD = 1    # hipStreamCaptureModeThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

cdef device_api api
cdef compiler_api compiler
cdef device_counters counters
cdef cu_retain_t cu_retain
cdef cu_current_t cu_current
cdef void *contexts[MOST_DEVICES]

provider = None           # "hip-python", "hip" or "cuda"
compiler_provider = None
_cuda_names = {}


cdef int cuda_set_device(int ordinal) noexcept nogil:
    cdef int code
    if ordinal < 0 or ordinal >= MOST_DEVICES:
        return INVALID_DEVICE
    if contexts[ordinal] == NULL:
        code = cu_retain(&contexts[ordinal], ordinal)
        if code:
            return code
    return cu_current(contexts[ordinal])


# ---- libraries ----------------------------------------------------------------------------------------------------

cdef class Library:
    cdef void *handle
    cdef dict capsules
    cdef readonly str path

    cdef void *find(self, str name):
        if self.capsules is not None:
            capsule = self.capsules.get(name)
            # The capsule's name is its C signature, which differs between versions: ask, never spell it.
            return NULL if capsule is None else PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule))
        return dlsym(self.handle, name.encode())


def open_library(list paths, bint is_global=False):
    cdef Library library = Library()
    problems = []
    for path in paths:
        encoded = path.encode()
        library.handle = dlopen(encoded, RTLD_NOW | (RTLD_GLOBAL if is_global else RTLD_LOCAL))
        if library.handle != NULL:
            library.path = path
            return library
        problems.append((<bytes>dlerror()).decode(errors="replace"))
    raise DeviceError(problems[0] if problems else "no library to open")


def open_capsules(list modules):
    cdef Library library = Library()
    for name in modules:
        try:
            library.capsules = importlib.import_module(name).__pyx_capi__
        except ImportError:
            continue
        library.path = name
        return library
    raise DeviceError("hip-python is not installed", hint="pip install 'fomoe_io[hip]'")


cdef int bind(Library library, bint is_cuda, void **place, str hip_name, str cuda_name, bint is_optional=False) except -1:
    name = cuda_name if is_cuda else hip_name
    place[0] = library.find(name)
    _cuda_names[hip_name] = cuda_name
    if place[0] == NULL and not is_optional:
        raise DeviceError(f"{library.path} has no {name}: the driver is too old")
    return 0


def use_device_library(str name, Library library):
    """Fill the table of the device's calls and initialise the driver."""
    global provider
    cdef Library l = library
    cdef bint cuda = name == "cuda"
    memset(&api, 0, sizeof(api))
    bind(l, cuda, <void **>&api.hipInit, "hipInit", "cuInit")
    bind(l, cuda, <void **>&api.hipGetDeviceCount, "hipGetDeviceCount", "cuDeviceGetCount")
    bind(l, cuda, <void **>&api.hipDeviceGetName, "hipDeviceGetName", "cuDeviceGetName")
    bind(l, cuda, <void **>&api.hipDeviceTotalMem, "hipDeviceTotalMem", "cuDeviceTotalMem_v2")
    bind(l, cuda, <void **>&api.hipDeviceGetAttribute, "hipDeviceGetAttribute", "cuDeviceGetAttribute")
    bind(l, cuda, <void **>&api.hipDeviceSynchronize, "hipDeviceSynchronize", "cuCtxSynchronize")
    bind(l, cuda, <void **>&api.hipDriverGetVersion, "hipDriverGetVersion", "cuDriverGetVersion")
    bind(l, cuda, <void **>&api.hipDrvGetErrorName, "hipDrvGetErrorName", "cuGetErrorName", True)
    bind(l, cuda, <void **>&api.hipDrvGetErrorString, "hipDrvGetErrorString", "cuGetErrorString", True)
    bind(l, cuda, <void **>&api.hipMemGetInfo, "hipMemGetInfo", "cuMemGetInfo_v2")
    bind(l, cuda, <void **>&api.hipMalloc, "hipMalloc", "cuMemAlloc_v2")
    bind(l, cuda, <void **>&api.hipFree, "hipFree", "cuMemFree_v2")
    bind(l, cuda, <void **>&api.hipHostRegister, "hipHostRegister", "cuMemHostRegister_v2")
    bind(l, cuda, <void **>&api.hipHostUnregister, "hipHostUnregister", "cuMemHostUnregister")
    bind(l, cuda, <void **>&api.hipHostGetDevicePointer, "hipHostGetDevicePointer", "cuMemHostGetDevicePointer_v2")
    bind(l, cuda, <void **>&api.hipMemcpyHtoDAsync, "hipMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2")
    bind(l, cuda, <void **>&api.hipMemcpyDtoHAsync, "hipMemcpyDtoHAsync", "cuMemcpyDtoHAsync_v2")
    bind(l, cuda, <void **>&api.hipMemcpyDtoDAsync, "hipMemcpyDtoDAsync", "cuMemcpyDtoDAsync_v2")
    bind(l, cuda, <void **>&api.hipMemsetD8Async, "hipMemsetD8Async", "cuMemsetD8Async")
    bind(l, cuda, <void **>&api.hipStreamCreateWithFlags, "hipStreamCreateWithFlags", "cuStreamCreate")
    bind(l, cuda, <void **>&api.hipStreamDestroy, "hipStreamDestroy", "cuStreamDestroy_v2")
    bind(l, cuda, <void **>&api.hipStreamSynchronize, "hipStreamSynchronize", "cuStreamSynchronize")
    bind(l, cuda, <void **>&api.hipStreamQuery, "hipStreamQuery", "cuStreamQuery")
    bind(l, cuda, <void **>&api.hipStreamWaitEvent, "hipStreamWaitEvent", "cuStreamWaitEvent")
    bind(l, cuda, <void **>&api.hipStreamBeginCapture, "hipStreamBeginCapture", "cuStreamBeginCapture_v2")
    bind(l, cuda, <void **>&api.hipStreamEndCapture, "hipStreamEndCapture", "cuStreamEndCapture")
    bind(l, cuda, <void **>&api.hipEventCreateWithFlags, "hipEventCreateWithFlags", "cuEventCreate")
    bind(l, cuda, <void **>&api.hipEventDestroy, "hipEventDestroy", "cuEventDestroy_v2")
    bind(l, cuda, <void **>&api.hipEventRecord, "hipEventRecord", "cuEventRecord")
    bind(l, cuda, <void **>&api.hipEventQuery, "hipEventQuery", "cuEventQuery")
    bind(l, cuda, <void **>&api.hipEventSynchronize, "hipEventSynchronize", "cuEventSynchronize")
    bind(l, cuda, <void **>&api.hipEventElapsedTime, "hipEventElapsedTime", "cuEventElapsedTime")
    bind(l, cuda, <void **>&api.hipModuleLoadData, "hipModuleLoadData", "cuModuleLoadData")
    bind(l, cuda, <void **>&api.hipModuleUnload, "hipModuleUnload", "cuModuleUnload")
    bind(l, cuda, <void **>&api.hipModuleGetFunction, "hipModuleGetFunction", "cuModuleGetFunction")
    bind(l, cuda, <void **>&api.hipFuncGetAttribute, "hipFuncGetAttribute", "cuFuncGetAttribute")
    bind(l, cuda, <void **>&api.hipModuleLaunchKernel, "hipModuleLaunchKernel", "cuLaunchKernel")
    bind(l, cuda, <void **>&api.hipGraphInstantiateWithFlags, "hipGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags")
    bind(l, cuda, <void **>&api.hipGraphLaunch, "hipGraphLaunch", "cuGraphLaunch")
    bind(l, cuda, <void **>&api.hipGraphExecDestroy, "hipGraphExecDestroy", "cuGraphExecDestroy")
    bind(l, cuda, <void **>&api.hipGraphDestroy, "hipGraphDestroy", "cuGraphDestroy")
    if cuda:
        # A CUDA device is made current through its primary context.
        bind(l, cuda, <void **>&cu_retain, "hipDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain")
        bind(l, cuda, <void **>&cu_current, "hipCtxSetCurrent", "cuCtxSetCurrent")
        memset(contexts, 0, sizeof(contexts))
        api.hipSetDevice = cuda_set_device
    else:
        bind(l, cuda, <void **>&api.hipSetDevice, "hipSetDevice", "")
        # HIP 6 gave the struct a new layout and the call a new name; only the text "gfx..." in it is read.
        bind(l, cuda, <void **>&api.hipGetDeviceProperties, "hipGetDevicePropertiesR0600", "", True)
        if api.hipGetDeviceProperties == NULL:
            bind(l, cuda, <void **>&api.hipGetDeviceProperties, "hipGetDeviceProperties", "")
    provider = name
    cdef int code
    with nogil:
        code = api.hipInit(0)
    check(code, "hipInit")


def use_compiler_library(str name, Library library):
    global compiler_provider
    cdef Library l = library
    cdef bint cuda = name == "cuda"
    memset(&compiler, 0, sizeof(compiler))
    bind(l, cuda, <void **>&compiler.hiprtcVersion, "hiprtcVersion", "nvrtcVersion")
    bind(l, cuda, <void **>&compiler.hiprtcCreateProgram, "hiprtcCreateProgram", "nvrtcCreateProgram")
    bind(l, cuda, <void **>&compiler.hiprtcCompileProgram, "hiprtcCompileProgram", "nvrtcCompileProgram")
    bind(l, cuda, <void **>&compiler.hiprtcGetProgramLogSize, "hiprtcGetProgramLogSize", "nvrtcGetProgramLogSize")
    bind(l, cuda, <void **>&compiler.hiprtcGetProgramLog, "hiprtcGetProgramLog", "nvrtcGetProgramLog")
    bind(l, cuda, <void **>&compiler.hiprtcGetCodeSize, "hiprtcGetCodeSize", "nvrtcGetCUBINSize")
    bind(l, cuda, <void **>&compiler.hiprtcGetCode, "hiprtcGetCode", "nvrtcGetCUBIN")
    bind(l, cuda, <void **>&compiler.hiprtcDestroyProgram, "hiprtcDestroyProgram", "nvrtcDestroyProgram")
    bind(l, cuda, <void **>&compiler.hiprtcGetErrorString, "hiprtcGetErrorString", "nvrtcGetErrorString")
    compiler_provider = name


# ---- errors -------------------------------------------------------------------------------------------------------

cdef str pending_exception():
    """hip-python's entry points raise when the library or the symbol behind them is missing; take that as text."""
    cdef PyObject *kind = NULL
    cdef PyObject *value = NULL
    cdef PyObject *traceback = NULL
    if PyErr_Occurred() == NULL:
        return None
    PyErr_Fetch(&kind, &value, &traceback)
    text = str(<object>value) if value != NULL else "unknown error"
    Py_XDECREF(kind)
    Py_XDECREF(value)
    Py_XDECREF(traceback)
    return text


cdef str describe(int code):
    cdef const char *text = NULL
    name, words = f"error {code}", ""
    if api.hipDrvGetErrorName != NULL and api.hipDrvGetErrorName(code, &text) == 0 and text != NULL:
        name = (<bytes>text).decode(errors="replace")
    text = NULL
    if api.hipDrvGetErrorString != NULL and api.hipDrvGetErrorString(code, &text) == 0 and text != NULL:
        words = (<bytes>text).decode(errors="replace")
    pending_exception()
    return f"{name} ({code})" + (f": {words}" if words and words != name else "")


cdef int check(int code, str call) except -1:
    missing = pending_exception()
    if code == 0 and missing is None:
        return 0
    shown = _cuda_names.get(call, call) if provider == "cuda" else call
    hint = None
    if code == OUT_OF_MEMORY:
        hint = "a smaller --vram, or end what else uses the device"
    raise DeviceError(f"{shown} failed: {missing or describe(code)}", hint=hint)


cdef void count_host_sync() noexcept nogil:
    fomoe_count(counters.host_syncs, 1)


def counts():
    return {
        "launches": counters.launches,
        "graph_launches": counters.graph_launches,
        "host_syncs": counters.host_syncs,
        "bytes_in": counters.bytes_in,
        "bytes_out": counters.bytes_out,
    }


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
        self.pointer = <uintptr_t>p
        self.nbytes = nbytes

    def free(self):
        cdef void *p = <void *>self.pointer
        cdef int code
        if p == NULL:
            return
        self.pointer = 0
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipFree(p)
        check(code, "hipFree")

    def __dealloc__(self):
        cdef void *p = <void *>self.pointer
        if p != NULL:
            with nogil:
                api.hipSetDevice(self.device)
                api.hipFree(p)


cdef class Registration:
    def __cinit__(self, int device, uintptr_t address, size_t nbytes, owner):
        cdef void *p = NULL
        cdef int code
        cdef str call = "hipHostRegister"
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipHostRegister(<void *>address, nbytes, PORTABLE_MAPPED)
        check(code, "hipHostRegister")
        self.device, self.address, self.nbytes, self.owner = device, address, nbytes, owner
        check(api.hipHostGetDevicePointer(&p, <void *>address, 0), "hipHostGetDevicePointer")
        self.pointer = <uintptr_t>p

    def close(self):
        cdef void *p = <void *>self.address
        cdef int code
        if p == NULL:
            return
        self.address = 0
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipHostUnregister(p)
        self.owner = None
        check(code, "hipHostUnregister")

    def __dealloc__(self):
        cdef void *p = <void *>self.address
        if p != NULL:
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

    def synchronize(self):
        cdef int code
        with nogil:
            code = api.hipEventSynchronize(self.handle)
        fomoe_count(counters.host_syncs, 1)
        check(code, "hipEventSynchronize")

    def is_done(self):
        cdef int code
        with nogil:
            code = api.hipEventQuery(self.handle)
        if code == NOT_READY:
            return False
        check(code, "hipEventQuery")
        return True

    def milliseconds_since(self, Event earlier):
        cdef float ms = 0
        cdef int code
        with nogil:
            code = api.hipEventElapsedTime(&ms, earlier.handle, self.handle)
        check(code, "hipEventElapsedTime")
        return ms

    def __dealloc__(self):
        if self.handle != NULL:
            with nogil:
                api.hipSetDevice(self.device)
                api.hipEventDestroy(self.handle)


cdef class Stream:
    def __cinit__(self, int device):
        cdef int code
        self.device = device
        with nogil:
            code = api.hipSetDevice(device)
            if code == 0:
                code = api.hipStreamCreateWithFlags(&self.handle, NON_BLOCKING)
        check(code, "hipStreamCreateWithFlags")

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
            code = api.hipEventRecord(event.handle, self.handle)
        check(code, "hipEventRecord")

    def wait(self, Event event):
        cdef int code
        with nogil:
            code = api.hipStreamWaitEvent(self.handle, event.handle, 0)
        check(code, "hipStreamWaitEvent")

    def synchronize(self):
        cdef int code
        with nogil:
            code = api.hipSetDevice(self.device)
            if code == 0:
                code = api.hipStreamSynchronize(self.handle)
        fomoe_count(counters.host_syncs, 1)
        check(code, "hipStreamSynchronize")

    def is_done(self):
        cdef int code
        with nogil:
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
            with nogil:
                api.hipSetDevice(self.device)
                api.hipStreamDestroy(self.handle)


cdef class Graph:
    def __cinit__(self, int device, uintptr_t graph, list keep):
        cdef int code
        self.device, self.graph, self.keep = device, <void *>graph, keep
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

    def __dealloc__(self):
        if self.handle != NULL:
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

    def run(self, Stream stream):
        cdef int code
        with nogil:
            code = api.hipSetDevice(stream.device)
            if code == 0:
                code = self.enqueue(stream.handle)
        check(code, "hipModuleLaunchKernel")


# ---- run-time compilation -----------------------------------------------------------------------------------------

def compiler_version():
    cdef int major = 0, minor = 0
    check_compiler(compiler.hiprtcVersion(&major, &minor), "hiprtcVersion")
    return major, minor


cdef bytes c_array(list texts, const char **places):
    for i, text in enumerate(texts):
        places[i] = <bytes>text


def compile_source(bytes source, bytes name, list header_texts, list header_names, list options):
    """(code, log); code is None when the compiler refused the source."""
    cdef const char *texts[32]
    cdef const char *names[32]
    cdef const char *flags[32]
    cdef const char *source_text = source
    cdef const char *source_name = name
    cdef void *program = NULL
    cdef int code, headers = len(header_texts), count = len(options)
    cdef size_t nbytes = 0
    if headers > 32 or count > 32:
        raise ValueError("at most 32 headers and 32 options")
    c_array(header_texts, texts)
    c_array(header_names, names)
    c_array(options, flags)
    with nogil:
        code = compiler.hiprtcCreateProgram(&program, source_text, source_name, headers, texts, names)
    check_compiler(code, "hiprtcCreateProgram")
    try:
        with nogil:
            code = compiler.hiprtcCompileProgram(program, count, flags)
        check_compiler(compiler.hiprtcGetProgramLogSize(program, &nbytes), "hiprtcGetProgramLogSize")
        log = bytearray(nbytes + 1)
        check_compiler(compiler.hiprtcGetProgramLog(program, log), "hiprtcGetProgramLog")
        log_text = bytes(log).rstrip(b"\0").decode(errors="replace")
        if code:
            return None, log_text or (<bytes>compiler.hiprtcGetErrorString(code)).decode()
        check_compiler(compiler.hiprtcGetCodeSize(program, &nbytes), "hiprtcGetCodeSize")
        image = bytearray(nbytes)
        check_compiler(compiler.hiprtcGetCode(program, image), "hiprtcGetCode")
        return bytes(image), log_text
    finally:
        compiler.hiprtcDestroyProgram(&program)


cdef int check_compiler(int code, str call) except -1:
    missing = pending_exception()
    if code == 0 and missing is None:
        return 0
    shown = _cuda_names.get(call, call) if compiler_provider == "cuda" else call
    text = missing or (<bytes>compiler.hiprtcGetErrorString(code)).decode(errors="replace")
    raise DeviceError(f"{shown} failed: {text} ({code})")
