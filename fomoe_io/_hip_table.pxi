# Part of _hip.pyx: the libraries, the table that they fill, and what a call's error becomes.

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
ctypedef int (*cu_enable_peer_t)(void *, unsigned int) noexcept nogil

cdef enum:
    MOST_DEVICES = 64
    INVALID_DEVICE = 101  # hipErrorInvalidDevice and CUDA_ERROR_INVALID_DEVICE alike, and so are the next two
    OUT_OF_MEMORY = 2
    NON_BLOCKING = 1      # hipStreamNonBlocking, CU_STREAM_NON_BLOCKING
    NO_TIMING = 2         # hipEventDisableTiming, CU_EVENT_DISABLE_TIMING
    PORTABLE_MAPPED = 3   # hipHostRegisterPortable | Mapped, CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP
    CHAINED = 6           # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    PEER_ALREADY = 704    # hipErrorPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
    CAPTURE_THREAD = 1    # hipStreamCaptureModeThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

cdef device_api api
cdef compiler_api compiler
cdef device_counters counters
cdef cu_retain_t cu_retain
cdef cu_current_t cu_current
cdef cu_launch_t cu_launch
cdef cu_enable_peer_t cu_enable_peer
cdef void *contexts[MOST_DEVICES]
cdef Library bound = None           # what `api` was filled from
cdef Library compiler_bound = None
cdef int live = 0                   # objects that will call through `api` once more, to be destroyed

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


cdef int cuda_enable_peer(int peer, unsigned int flags) noexcept nogil:
    cdef int code
    if peer < 0 or peer >= MOST_DEVICES:
        return INVALID_DEVICE
    if contexts[peer] == NULL:
        code = cu_retain(&contexts[peer], peer)
        if code:
            return code
    return cu_enable_peer(contexts[peer], flags)


# ---- libraries ----------------------------------------------------------------------------------------------------

cdef class Library:
    cdef bint is_same(self, Library other):
        return other is not None and self.handle == other.handle and self.capsules is other.capsules

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


cdef int bind(
    Library library, bint is_cuda, void **place, str hip_name, str cuda_name, bint is_optional=False
) except -1:
    name = cuda_name if is_cuda else hip_name
    place[0] = library.find(name)
    _cuda_names[hip_name] = cuda_name
    if place[0] == NULL and not is_optional:
        raise DeviceError(f"{library.path} has no {name}: the driver is too old")
    return 0


cdef struct cuda_calls:
    cu_retain_t retain
    cu_current_t current
    cu_launch_t launch
    cu_enable_peer_t enable_peer


def use_device_library(str name, Library library not None):
    """Make a library the process's device API: once, then this does nothing.

    Another one takes its place only while nothing of the first is alive; a table half filled is never seen.
    """
    global provider, bound, api, cu_retain, cu_current, cu_launch, cu_enable_peer
    cdef device_api table
    cdef cuda_calls calls
    cdef int code
    if library.is_same(bound) and name == provider:
        return
    if live:
        gc.collect()
    if live:
        raise DeviceError(f"this process computes with {provider}: {name} can't be used beside it",
                          hint="close what is open, or use another process")
    memset(&table, 0, sizeof(table))
    memset(&calls, 0, sizeof(calls))
    fill_table(name == "cuda", library, &table, &calls)
    memset(contexts, 0, sizeof(contexts))
    api, cu_retain, cu_current, cu_launch = table, calls.retain, calls.current, calls.launch
    cu_enable_peer = calls.enable_peer
    provider, bound = name, None
    with nogil:
        code = api.hipInit(0)
    check(code, "hipInit")
    bound = library


cdef int fill_table(bint cuda, Library library, device_api *table, cuda_calls *calls) except -1:
    bind(library, cuda, <void **>&table.hipInit, "hipInit", "cuInit")
    bind(library, cuda, <void **>&table.hipGetDeviceCount, "hipGetDeviceCount", "cuDeviceGetCount")
    bind(library, cuda, <void **>&table.hipDeviceGetName, "hipDeviceGetName", "cuDeviceGetName")
    bind(library, cuda, <void **>&table.hipDeviceTotalMem, "hipDeviceTotalMem", "cuDeviceTotalMem_v2")
    bind(library, cuda, <void **>&table.hipDeviceGetAttribute, "hipDeviceGetAttribute", "cuDeviceGetAttribute")
    bind(library, cuda, <void **>&table.hipDeviceSynchronize, "hipDeviceSynchronize", "cuCtxSynchronize")
    bind(library, cuda, <void **>&table.hipDriverGetVersion, "hipDriverGetVersion", "cuDriverGetVersion")
    bind(library, cuda, <void **>&table.hipDrvGetErrorName, "hipDrvGetErrorName", "cuGetErrorName", True)
    bind(library, cuda, <void **>&table.hipDrvGetErrorString, "hipDrvGetErrorString", "cuGetErrorString", True)
    bind(library, cuda, <void **>&table.hipMemGetInfo, "hipMemGetInfo", "cuMemGetInfo_v2")
    bind(library, cuda, <void **>&table.hipMalloc, "hipMalloc", "cuMemAlloc_v2")
    bind(library, cuda, <void **>&table.hipFree, "hipFree", "cuMemFree_v2")
    bind(library, cuda, <void **>&table.hipHostRegister, "hipHostRegister", "cuMemHostRegister_v2")
    bind(library, cuda, <void **>&table.hipHostUnregister, "hipHostUnregister", "cuMemHostUnregister")
    bind(library, cuda, <void **>&table.hipHostGetDevicePointer, "hipHostGetDevicePointer",
         "cuMemHostGetDevicePointer_v2")
    bind(library, cuda, <void **>&table.hipMemcpyHtoDAsync, "hipMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2")
    bind(library, cuda, <void **>&table.hipMemcpyDtoHAsync, "hipMemcpyDtoHAsync", "cuMemcpyDtoHAsync_v2")
    bind(library, cuda, <void **>&table.hipMemcpyDtoDAsync, "hipMemcpyDtoDAsync", "cuMemcpyDtoDAsync_v2")
    bind(library, cuda, <void **>&table.hipMemsetD8Async, "hipMemsetD8Async", "cuMemsetD8Async")
    bind(library, cuda, <void **>&table.hipStreamCreateWithFlags, "hipStreamCreateWithFlags", "cuStreamCreate")
    bind(library, cuda, <void **>&table.hipStreamCreateWithPriority, "hipStreamCreateWithPriority",
         "cuStreamCreateWithPriority")
    bind(library, cuda, <void **>&table.hipDeviceGetStreamPriorityRange, "hipDeviceGetStreamPriorityRange",
         "cuCtxGetStreamPriorityRange")
    bind(library, cuda, <void **>&table.hipDeviceCanAccessPeer, "hipDeviceCanAccessPeer", "cuDeviceCanAccessPeer", True)
    bind(library, cuda, <void **>&table.hipStreamDestroy, "hipStreamDestroy", "cuStreamDestroy_v2")
    bind(library, cuda, <void **>&table.hipStreamSynchronize, "hipStreamSynchronize", "cuStreamSynchronize")
    bind(library, cuda, <void **>&table.hipStreamQuery, "hipStreamQuery", "cuStreamQuery")
    bind(library, cuda, <void **>&table.hipStreamWaitEvent, "hipStreamWaitEvent", "cuStreamWaitEvent")
    bind(library, cuda, <void **>&table.hipStreamWriteValue32, "hipStreamWriteValue32", "cuStreamWriteValue32_v2", True)
    bind(library, cuda, <void **>&table.hipStreamBeginCapture, "hipStreamBeginCapture", "cuStreamBeginCapture_v2")
    bind(library, cuda, <void **>&table.hipStreamEndCapture, "hipStreamEndCapture", "cuStreamEndCapture")
    bind(library, cuda, <void **>&table.hipEventCreateWithFlags, "hipEventCreateWithFlags", "cuEventCreate")
    bind(library, cuda, <void **>&table.hipEventDestroy, "hipEventDestroy", "cuEventDestroy_v2")
    bind(library, cuda, <void **>&table.hipEventRecord, "hipEventRecord", "cuEventRecord")
    bind(library, cuda, <void **>&table.hipEventQuery, "hipEventQuery", "cuEventQuery")
    bind(library, cuda, <void **>&table.hipEventSynchronize, "hipEventSynchronize", "cuEventSynchronize")
    bind(library, cuda, <void **>&table.hipEventElapsedTime, "hipEventElapsedTime", "cuEventElapsedTime")
    bind(library, cuda, <void **>&table.hipModuleLoadData, "hipModuleLoadData", "cuModuleLoadData")
    bind(library, cuda, <void **>&table.hipModuleUnload, "hipModuleUnload", "cuModuleUnload")
    bind(library, cuda, <void **>&table.hipModuleGetFunction, "hipModuleGetFunction", "cuModuleGetFunction")
    bind(library, cuda, <void **>&table.hipFuncGetAttribute, "hipFuncGetAttribute", "cuFuncGetAttribute")
    bind(library, cuda, <void **>&table.hipModuleLaunchKernel, "hipModuleLaunchKernel", "cuLaunchKernel")
    bind(library, cuda, <void **>&table.hipGraphInstantiateWithFlags, "hipGraphInstantiateWithFlags",
         "cuGraphInstantiateWithFlags")
    bind(library, cuda, <void **>&table.hipGraphLaunch, "hipGraphLaunch", "cuGraphLaunch")
    bind(library, cuda, <void **>&table.hipGraphExecDestroy, "hipGraphExecDestroy", "cuGraphExecDestroy")
    bind(library, cuda, <void **>&table.hipGraphDestroy, "hipGraphDestroy", "cuGraphDestroy")
    if cuda:
        # A CUDA device is made current through its primary context.
        bind(library, cuda, <void **>&calls.retain, "hipDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain")
        bind(library, cuda, <void **>&calls.current, "hipCtxSetCurrent", "cuCtxSetCurrent")
        bind(library, cuda, <void **>&calls.launch, "hipDrvLaunchKernelEx", "cuLaunchKernelEx", True)
        bind(library, cuda, <void **>&calls.enable_peer, "hipCtxEnablePeerAccess", "cuCtxEnablePeerAccess", True)
        table.hipSetDevice = cuda_set_device
        if calls.enable_peer != NULL:
            table.hipDeviceEnablePeerAccess = cuda_enable_peer
    else:
        bind(library, cuda, <void **>&table.hipDeviceEnablePeerAccess, "hipDeviceEnablePeerAccess", "", True)
        bind(library, cuda, <void **>&table.hipSetDevice, "hipSetDevice", "")
        # HIP 6 gave the struct a new layout and the call a new name; only the text "gfx..." in it is read.
        bind(library, cuda, <void **>&table.hipGetDeviceProperties, "hipGetDevicePropertiesR0600", "", True)
        if table.hipGetDeviceProperties == NULL:
            bind(library, cuda, <void **>&table.hipGetDeviceProperties, "hipGetDeviceProperties", "")
    return 0


def use_compiler_library(str name, Library library):
    """Likewise the compiler; nothing of it stays alive between two compilations."""
    global compiler_provider, compiler_bound, compiler
    cdef Library l = library
    cdef bint cuda = name == "cuda"
    cdef compiler_api table
    if l.is_same(compiler_bound) and name == compiler_provider:
        return
    memset(&table, 0, sizeof(table))
    bind(l, cuda, <void **>&table.hiprtcVersion, "hiprtcVersion", "nvrtcVersion")
    bind(l, cuda, <void **>&table.hiprtcCreateProgram, "hiprtcCreateProgram", "nvrtcCreateProgram")
    bind(l, cuda, <void **>&table.hiprtcCompileProgram, "hiprtcCompileProgram", "nvrtcCompileProgram")
    bind(l, cuda, <void **>&table.hiprtcGetProgramLogSize, "hiprtcGetProgramLogSize", "nvrtcGetProgramLogSize")
    bind(l, cuda, <void **>&table.hiprtcGetProgramLog, "hiprtcGetProgramLog", "nvrtcGetProgramLog")
    bind(l, cuda, <void **>&table.hiprtcGetCodeSize, "hiprtcGetCodeSize", "nvrtcGetCUBINSize")
    bind(l, cuda, <void **>&table.hiprtcGetCode, "hiprtcGetCode", "nvrtcGetCUBIN")
    bind(l, cuda, <void **>&table.hiprtcDestroyProgram, "hiprtcDestroyProgram", "nvrtcDestroyProgram")
    bind(l, cuda, <void **>&table.hiprtcGetErrorString, "hiprtcGetErrorString", "nvrtcGetErrorString")
    compiler, compiler_provider, compiler_bound = table, name, l


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


# ---- waits with an end --------------------------------------------------------------------------------------------

_interruption = None


cdef fomoe_watch signals  # of waits outside an engine


cdef int ask_python(void *_) noexcept nogil:
    with gil:
        return was_interrupted()


cdef int was_interrupted() noexcept:
    """Whether a signal's handler has raised: on the main thread, which alone runs them.  raise_end() raises it."""
    global _interruption
    try:
        PyErr_CheckSignals()
    except BaseException as raised:
        _interruption = raised
        return 1
    return 0


cdef fomoe_patience patience_of(Gate gate):
    """For one wait: it ends when the gate's run does, or without one when a signal's handler raises."""
    cdef fomoe_patience mine = patience
    mine.watch = &signals if gate is None else &gate.watch
    return mine


cdef int raise_end(fomoe_patience *ended, Gate gate) except -1:
    """What ended a wait, if something has."""
    global _interruption
    if not ended.is_interrupted:
        return 0
    if gate is not None:
        gate.raise_end()
    raised, _interruption = _interruption, None
    raise raised


def set_patience(double seconds=10.0):
    """The longest that anybody waits for a device that makes no progress; an interrupted one waits for 0.5 s at
    most."""
    patience.limit_ns = <uint64_t>(1e9 * seconds)
    patience.interrupted_limit_ns = <uint64_t>(1e9 * min(seconds, 0.5))


cdef object stuck(str what):
    return DeviceError(
        f"the device has not answered for {patience.limit_ns / 1e9:g} s: {what}",
        hint="fomoe-doctor --gpu says what does not work; a device that hangs needs its driver reloaded, or a restart",
    )


set_patience()
signals.poll = ask_python


def counts():
    return {
        "launches": counters.launches,
        "graph_launches": counters.graph_launches,
        "host_syncs": counters.host_syncs,
        "bytes_in": counters.bytes_in,
        "bytes_out": counters.bytes_out,
    }
