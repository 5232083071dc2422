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

cdef enum:
    MOST_DEVICES = 64
    INVALID_DEVICE = 101  # hipErrorInvalidDevice and CUDA_ERROR_INVALID_DEVICE alike, and so are the next two
    OUT_OF_MEMORY = 2
    NON_BLOCKING = 1      # hipStreamNonBlocking, CU_STREAM_NON_BLOCKING
    NO_TIMING = 2         # hipEventDisableTiming, CU_EVENT_DISABLE_TIMING
    PORTABLE_MAPPED = 3   # hipHostRegisterPortable | Mapped, CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP
    CHAINED = 6           # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    CAPTURE_THREAD = 1    # hipStreamCaptureModeThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

cdef device_api api
cdef compiler_api compiler
cdef device_counters counters
cdef cu_retain_t cu_retain
cdef cu_current_t cu_current
cdef cu_launch_t cu_launch
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


def use_device_library(str name, Library library):
    """Fill the table of the device's calls and initialise the driver."""
    global provider
    cdef Library l = library
    cdef bint cuda = name == "cuda"
    global cu_launch
    memset(&api, 0, sizeof(api))
    cu_launch = NULL
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
    bind(l, cuda, <void **>&api.hipGraphInstantiateWithFlags, "hipGraphInstantiateWithFlags",
         "cuGraphInstantiateWithFlags")
    bind(l, cuda, <void **>&api.hipGraphLaunch, "hipGraphLaunch", "cuGraphLaunch")
    bind(l, cuda, <void **>&api.hipGraphExecDestroy, "hipGraphExecDestroy", "cuGraphExecDestroy")
    bind(l, cuda, <void **>&api.hipGraphDestroy, "hipGraphDestroy", "cuGraphDestroy")
    if cuda:
        # A CUDA device is made current through its primary context.
        bind(l, cuda, <void **>&cu_retain, "hipDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain")
        bind(l, cuda, <void **>&cu_current, "hipCtxSetCurrent", "cuCtxSetCurrent")
        bind(l, cuda, <void **>&cu_launch, "hipDrvLaunchKernelEx", "cuLaunchKernelEx", True)
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
