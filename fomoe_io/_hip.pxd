# The device's table of function pointers and the objects a native loop needs.  Every pointer is null until
# use_provider() has found a library; then the names mean what HIP says, whichever library is behind them.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from fomoe_io._gate cimport Gate, fomoe_watch

cdef extern from "csrc/gpu/patience.h" nogil:
    int FOMOE_STUCK
    ctypedef struct fomoe_patience:
        uint64_t limit_ns
        uint64_t interrupted_limit_ns
        fomoe_watch *watch
        int is_interrupted
    ctypedef struct fomoe_wait:
        uint64_t since_ns
    int fomoe_look_again(fomoe_patience *, fomoe_wait *)

cdef struct device_api:
    int (*hipInit)(unsigned int) noexcept nogil
    int (*hipGetDeviceCount)(int *) noexcept nogil
    int (*hipSetDevice)(int) noexcept nogil
    int (*hipDeviceGetName)(char *, int, int) noexcept nogil
    int (*hipDeviceTotalMem)(size_t *, int) noexcept nogil
    int (*hipDeviceGetAttribute)(int *, int, int) noexcept nogil
    int (*hipGetDeviceProperties)(void *, int) noexcept nogil
    int (*hipDeviceSynchronize)() noexcept nogil
    int (*hipDriverGetVersion)(int *) noexcept nogil
    int (*hipDrvGetErrorName)(int, const char **) noexcept nogil
    int (*hipDrvGetErrorString)(int, const char **) noexcept nogil
    int (*hipMemGetInfo)(size_t *, size_t *) noexcept nogil
    int (*hipMalloc)(void **, size_t) noexcept nogil
    int (*hipFree)(void *) noexcept nogil
    int (*hipHostRegister)(void *, size_t, unsigned int) noexcept nogil
    int (*hipHostUnregister)(void *) noexcept nogil
    int (*hipHostGetDevicePointer)(void **, void *, unsigned int) noexcept nogil
    int (*hipMemcpyHtoDAsync)(void *, const void *, size_t, void *) noexcept nogil
    int (*hipMemcpyDtoHAsync)(void *, const void *, size_t, void *) noexcept nogil
    int (*hipMemcpyDtoDAsync)(void *, const void *, size_t, void *) noexcept nogil
    int (*hipMemsetD8Async)(void *, unsigned char, size_t, void *) noexcept nogil
    int (*hipStreamCreateWithFlags)(void **, unsigned int) noexcept nogil
    int (*hipStreamCreateWithPriority)(void **, unsigned int, int) noexcept nogil
    int (*hipDeviceGetStreamPriorityRange)(int *, int *) noexcept nogil
    int (*hipDeviceCanAccessPeer)(int *, int, int) noexcept nogil
    int (*hipDeviceEnablePeerAccess)(int, unsigned int) noexcept nogil
    int (*hipStreamDestroy)(void *) noexcept nogil
    int (*hipStreamSynchronize)(void *) noexcept nogil
    int (*hipStreamQuery)(void *) noexcept nogil
    int (*hipStreamWaitEvent)(void *, void *, unsigned int) noexcept nogil
    int (*hipStreamWriteValue32)(void *, void *, uint32_t, unsigned int) noexcept nogil
    int (*hipStreamBeginCapture)(void *, int) noexcept nogil
    int (*hipStreamEndCapture)(void *, void **) noexcept nogil
    int (*hipEventCreateWithFlags)(void **, unsigned int) noexcept nogil
    int (*hipEventDestroy)(void *) noexcept nogil
    int (*hipEventRecord)(void *, void *) noexcept nogil
    int (*hipEventQuery)(void *) noexcept nogil
    int (*hipEventSynchronize)(void *) noexcept nogil
    int (*hipEventElapsedTime)(float *, void *, void *) noexcept nogil
    int (*hipModuleLoadData)(void **, const void *) noexcept nogil
    int (*hipModuleUnload)(void *) noexcept nogil
    int (*hipModuleGetFunction)(void **, void *, const char *) noexcept nogil
    int (*hipFuncGetAttribute)(int *, int, void *) noexcept nogil
    int (*hipModuleLaunchKernel)(void *, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,
                                 unsigned int, unsigned int, void *, void **, void **) noexcept nogil
    int (*hipGraphInstantiateWithFlags)(void **, void *, unsigned long long) noexcept nogil
    int (*hipGraphLaunch)(void *, void *) noexcept nogil
    int (*hipGraphExecDestroy)(void *) noexcept nogil
    int (*hipGraphDestroy)(void *) noexcept nogil

cdef struct compiler_api:
    int (*hiprtcVersion)(int *, int *) noexcept nogil
    int (*hiprtcCreateProgram)(void **, const char *, const char *, int, const char **, const char **) noexcept nogil
    int (*hiprtcCompileProgram)(void *, int, const char **) noexcept nogil
    int (*hiprtcGetProgramLogSize)(void *, size_t *) noexcept nogil
    int (*hiprtcGetProgramLog)(void *, char *) noexcept nogil
    int (*hiprtcGetCodeSize)(void *, size_t *) noexcept nogil
    int (*hiprtcGetCode)(void *, char *) noexcept nogil
    int (*hiprtcDestroyProgram)(void **) noexcept nogil
    const char *(*hiprtcGetErrorString)(int) noexcept nogil

cdef struct device_counters:
    uint64_t launches
    uint64_t graph_launches
    uint64_t host_syncs
    uint64_t bytes_in
    uint64_t bytes_out

cdef enum:
    NOT_READY = 600  # hipErrorNotReady, CUDA_ERROR_NOT_READY

cdef device_api api
cdef fomoe_patience patience
cdef device_counters counters
cdef int check(int code, str call) except -1
cdef void count_host_sync() noexcept nogil
cdef fomoe_patience patience_of(Gate gate)
cdef int raise_end(fomoe_patience *ended, Gate gate) except -1
cdef object stuck(str what)

cdef str pending_exception()

cdef class Library:
    cdef void *handle
    cdef dict capsules
    cdef readonly str path
    cdef bint is_same(self, Library other)
    cdef void *find(self, str name)

cdef class Buffer:
    cdef readonly int device
    cdef readonly uintptr_t pointer
    cdef readonly size_t nbytes

cdef class Registration:
    cdef readonly int device
    cdef readonly uintptr_t address, pointer
    cdef readonly size_t nbytes
    cdef object owner

cdef class Event:
    cdef readonly int device
    cdef void *handle

cdef class Stream:
    cdef readonly int device
    cdef void *handle

cdef class Module:
    cdef readonly int device
    cdef void *handle

cdef class Function:
    cdef readonly Module module
    cdef readonly str name
    cdef void *handle

# CUlaunchConfig with one CUlaunchAttribute (cuda.h, CUDA 12 and 13).
cdef struct launch_attribute:
    int id
    int unused
    int value[16]  # a union of 64 bytes

cdef struct launch_config:
    unsigned int grid[3]
    unsigned int block[3]
    unsigned int shared_bytes
    void *stream
    launch_attribute *attributes
    unsigned int attribute_count

ctypedef int (*cu_launch_t)(const launch_config *, void *, void **, void **) noexcept nogil

cdef class Launch:
    cdef readonly Function function
    cdef readonly tuple grid
    cdef readonly int threads
    cdef readonly str signature
    cdef list keep
    cdef uint64_t values[24]
    cdef void *addresses[24]
    cdef unsigned int gx, gy, gz
    cdef int enqueue(self, void *stream) noexcept nogil
    cdef int enqueue_chained(self, void *stream) noexcept nogil

cdef class Graph:
    cdef readonly int device
    cdef void *graph
    cdef void *executable
    cdef readonly list keep
    cdef int enqueue(self, void *stream) noexcept nogil
