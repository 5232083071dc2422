# Matrix products by hipBLASLt or cuBLASLt, found when the program runs; no vendor header is needed to build.
#
# Both take matrices by columns, and a row-major matrix is its transpose by columns.  So y = x W^T, all row-major, is
# asked for as  D[rows, tokens] = op(A) B  with A = W (as [columns, rows], transposed back) and B = x^T.
#
# Numbers and sizes are those of cublasLt.h and cublas_api.h (CUDA 13, package nvidia-cublas) and of hipblaslt.h and
# hipblas-common.h (ROCm 6 and newer: ROCm 5 numbered its types otherwise); a test compares them with hip-python's.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from fomoe_io._hip cimport Library, Stream, api, check, pending_exception

from fomoe_io.errors import DeviceError

cdef struct blas_api:
    int (*create)(void **) noexcept nogil
    int (*destroy)(void *) noexcept nogil
    int (*layout_create)(void **, int, uint64_t, uint64_t, int64_t) noexcept nogil
    int (*layout_destroy)(void *) noexcept nogil
    int (*desc_create)(void **, int, int) noexcept nogil
    int (*desc_destroy)(void *) noexcept nogil
    int (*desc_set)(void *, int, const void *, size_t) noexcept nogil
    int (*preference_create)(void **) noexcept nogil
    int (*preference_destroy)(void *) noexcept nogil
    int (*preference_set)(void *, int, const void *, size_t) noexcept nogil
    int (*heuristic)(void *, void *, void *, void *, void *, void *, void *, int, void *, int *) noexcept nogil
    int (*matmul)(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *,
                  void *, void *, void *, const void *, void *, size_t, void *) noexcept nogil

cdef enum:
    FLOAT32 = 0         # HIP_R_32F, CUDA_R_32F
    FLOAT16 = 2         # HIP_R_16F, CUDA_R_16F
    MOST_WORKSPACE = 1  # HIPBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
    REDUCTIONS = 3      # CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK; hipBLASLt has no such preference
    SEPARATE_STEP = 6   # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE
    # a ...MatmulHeuristicResult_t, which begins with its algorithm: cuBLASLt's has 96 bytes (64 of them the algorithm),
    # hipBLASLt's 56 (24)
    RESULT_WORDS = 16

cdef blas_api blas
cdef int transpose_a, transpose, compute_float32
cdef bint has_reductions
cdef str prefix = "hipblasLt"
cdef Library bound = None

NAMES = (
    "Create", "Destroy", "MatrixLayoutCreate", "MatrixLayoutDestroy", "MatmulDescCreate", "MatmulDescDestroy",
    "MatmulDescSetAttribute", "MatmulPreferenceCreate", "MatmulPreferenceDestroy", "MatmulPreferenceSetAttribute",
    "MatmulAlgoGetHeuristic", "Matmul",
)

# hipblasStatus_t and cublasStatus_t
STATUS = {
    "hipblasLt": {1: "NOT_INITIALIZED", 2: "ALLOC_FAILED", 3: "INVALID_VALUE", 4: "MAPPING_ERROR",
                  5: "EXECUTION_FAILED", 6: "INTERNAL_ERROR", 7: "NOT_SUPPORTED", 8: "ARCH_MISMATCH",
                  9: "HANDLE_IS_NULLPTR", 10: "INVALID_ENUM", 11: "UNKNOWN"},
    "cublasLt": {1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
                 13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR"},
}

# How a library says that it has no kernel for a shape, a type or a device: NOT_SUPPORTED, ARCH_MISMATCH, INVALID_VALUE
# (hipBLASLt where it has none of the device's at all).
KNOWS_NONE = {"hipblasLt": (3, 7, 8), "cublasLt": (7, 8, 15)}


class NoProductError(DeviceError):
    """The library has no algorithm for a shape."""


def use_blas_library(str provider, Library library):
    """Fill the table of calls; a library that is in use already stays as it is."""
    global transpose_a, transpose, compute_float32, has_reductions, prefix, bound
    cdef void **places = <void **>&blas
    cdef void *preference = NULL
    cdef bint cuda = provider == "cuda"
    if library.is_same(bound):
        return
    bound = None
    prefix = "cublasLt" if cuda else "hipblasLt"
    memset(&blas, 0, sizeof(blas))
    for i, call in enumerate(NAMES):
        places[i] = library.find(prefix + call)
        if places[i] == NULL:
            raise DeviceError(f"{library.path} has no {prefix}{call}: the library is too old")
    # CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T, CUBLAS_COMPUTE_32F; HIPBLASLT_MATMUL_DESC_TRANSA, ...
    transpose_a, transpose, compute_float32 = (3, 1, 68) if cuda else (0, 112, 2)
    has_reductions = cuda
    # hip-python's entry points are there without the library behind them; the first call tells.
    check_blas(blas.preference_create(&preference), "MatmulPreferenceCreate")
    blas.preference_destroy(preference)
    bound = library


def numbers():
    """What is passed as a number, for the test that compares it with the vendor's."""
    return {"R_32F": FLOAT32, "R_16F": FLOAT16,
            "MATMUL_DESC_TRANSA": transpose_a, "OP_T": transpose, "COMPUTE_32F": compute_float32,
            "MATMUL_PREF_MAX_WORKSPACE_BYTES": MOST_WORKSPACE, "result_bytes": 8 * RESULT_WORDS}


cdef int check_blas(int code, str call) except -1:
    missing = pending_exception()
    if code == 0 and missing is None:
        return 0
    knows_none = missing is None and call == "MatmulAlgoGetHeuristic" and code in KNOWS_NONE[prefix]
    kind = NoProductError if knows_none else DeviceError
    raise kind(f"{prefix}{call} failed: {missing or STATUS[prefix].get(code, 'error')} ({code})")


# A library's handle on one device, and the workspace that its products share: they must follow one another.
cdef class Blas:
    cdef readonly int device
    cdef readonly uintptr_t workspace
    cdef readonly size_t workspace_bytes
    cdef void *handle

    def __cinit__(self, int device, uintptr_t workspace, size_t workspace_bytes):
        cdef int code
        if blas.create == NULL:
            raise DeviceError("no library for matrix products is in use")
        self.device, self.workspace, self.workspace_bytes = device, workspace, workspace_bytes
        with nogil:
            code = api.hipSetDevice(device)
        check(code, "hipSetDevice")
        # Never under a capture: hipBLASLt allocates here, so that no product has to.
        with nogil:
            code = blas.create(&self.handle)
        check_blas(code, "Create")

    def __dealloc__(self):
        if self.handle != NULL:
            with nogil:
                api.hipSetDevice(self.device)
                blas.destroy(self.handle)


# One shape: y[tokens, rows] (float32, y_stride elements from token to token) = x[tokens, columns] W[rows, columns]^T
# (both float16, or both float32, of which nothing is rounded away), sums in float32.  The algorithm is asked for once,
# here.
cdef class MatMul:
    cdef readonly Blas blas
    cdef readonly int tokens, rows, columns, y_stride
    cdef readonly bint is_float32
    cdef void *desc
    cdef void *a
    cdef void *b
    cdef void *d
    cdef uint64_t algorithm[RESULT_WORDS]

    def __cinit__(self, Blas owner, int tokens, int rows, int columns, int y_stride, bint is_float32=False):
        cdef int32_t value = transpose
        cdef int type = FLOAT32 if is_float32 else FLOAT16
        if min(tokens, rows, columns) < 1 or y_stride < rows:
            raise ValueError(f"no product has the shape {tokens} x {columns} by {rows} rows, {y_stride} apart")
        self.blas, self.tokens, self.rows, self.columns, self.y_stride = owner, tokens, rows, columns, y_stride
        self.is_float32 = is_float32
        memset(self.algorithm, 0, sizeof(self.algorithm))
        check_blas(blas.desc_create(&self.desc, compute_float32, FLOAT32), "MatmulDescCreate")
        check_blas(blas.desc_set(self.desc, transpose_a, &value, sizeof(value)), "MatmulDescSetAttribute")
        check_blas(blas.layout_create(&self.a, type, columns, rows, columns), "MatrixLayoutCreate")
        check_blas(blas.layout_create(&self.b, type, columns, tokens, columns), "MatrixLayoutCreate")
        check_blas(blas.layout_create(&self.d, FLOAT32, rows, tokens, y_stride), "MatrixLayoutCreate")
        self.choose()

    cdef int choose(self) except -1:
        cdef void *preference = NULL
        cdef uint64_t room = self.blas.workspace_bytes
        cdef uint32_t reductions = SEPARATE_STEP
        cdef int code, found = 0
        check_blas(blas.preference_create(&preference), "MatmulPreferenceCreate")
        try:
            code = blas.preference_set(preference, MOST_WORKSPACE, &room, sizeof(room))
            if code == 0 and has_reductions:
                # Parts of a sum that are added in place are added in the order in which they are done.
                code = blas.preference_set(preference, REDUCTIONS, &reductions, sizeof(reductions))
            check_blas(code, "MatmulPreferenceSetAttribute")
            with nogil:
                api.hipSetDevice(self.blas.device)
                code = blas.heuristic(self.blas.handle, self.desc, self.a, self.b, self.d, self.d, preference, 1,
                                      self.algorithm, &found)
            check_blas(code, "MatmulAlgoGetHeuristic")
        finally:
            blas.preference_destroy(preference)
        if found < 1:
            kind = "float32" if self.is_float32 else "float16"
            raise NoProductError(f"{prefix}MatmulAlgoGetHeuristic knows no {kind} product of {self.tokens} x "
                                 f"{self.columns} by {self.rows} rows")
        return 0

    def __dealloc__(self):
        if self.desc != NULL:
            blas.desc_destroy(self.desc)
        for layout in (<uintptr_t>self.a, <uintptr_t>self.b, <uintptr_t>self.d):
            if layout:
                blas.layout_destroy(<void *><uintptr_t>layout)


# A product with its addresses bound; run() may be captured.
cdef class Product:
    cdef readonly MatMul shape
    cdef uintptr_t x, weights, y

    def __cinit__(self, MatMul shape, uintptr_t x, uintptr_t weights, uintptr_t y):
        self.shape, self.x, self.weights, self.y = shape, x, weights, y

    def run(self, Stream stream):
        cdef MatMul m = self.shape
        cdef float one = 1.0, zero = 0.0
        cdef int code
        if stream.device != m.blas.device:
            raise ValueError("the stream is another device's")
        with nogil:
            code = api.hipSetDevice(stream.device)
            if code == 0:
                code = blas.matmul(m.blas.handle, m.desc, &one, <void *>self.weights, m.a, <void *>self.x, m.b, &zero,
                                   <void *>self.y, m.d, <void *>self.y, m.d, m.algorithm,
                                   <void *>m.blas.workspace, m.blas.workspace_bytes, stream.handle)
        check_blas(code, "Matmul")
