# Matrix products by hipBLASLt or cuBLASLt, found when the program runs; no vendor header is needed to build.
#
# Both take matrices by columns, and a row-major matrix is its transpose by columns.  So y = x W^T, all row-major, is
# asked for as  D[rows, tokens] = op(A) B  with A = W (as [columns, rows], transposed back) and B = x^T.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memset

from fomoe_io._hip cimport Buffer, Library, Stream, api, check, pending_exception

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
    FLOAT32 = 0            # hipDataType and cudaDataType_t alike
    FLOAT16 = 2
    MOST_WORKSPACE = 1     # ..._MATMUL_PREF_MAX_WORKSPACE_BYTES, both
    ALGORITHM_BYTES = 512  # a heuristic result (96 bytes in cuBLASLt 13, 56 in hipBLASLt 1) begins with its algorithm

cdef blas_api blas
cdef int transpose_a, transpose, compute_float32
cdef str prefix = "hipblasLt"

NAMES = (
    "Create", "Destroy", "MatrixLayoutCreate", "MatrixLayoutDestroy", "MatmulDescCreate", "MatmulDescDestroy",
    "MatmulDescSetAttribute", "MatmulPreferenceCreate", "MatmulPreferenceDestroy", "MatmulPreferenceSetAttribute",
    "MatmulAlgoGetHeuristic", "Matmul",
)

STATUS = {
    "hipblasLt": {1: "NOT_INITIALIZED", 2: "ALLOC_FAILED", 3: "INVALID_VALUE", 4: "MAPPING_ERROR",
                  5: "EXECUTION_FAILED", 6: "INTERNAL_ERROR", 7: "NOT_SUPPORTED", 8: "ARCH_MISMATCH"},
    "cublasLt": {1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
                 13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED"},
}


def use_blas_library(str name, Library library):
    """Fill the table of calls."""
    global transpose_a, transpose, compute_float32, prefix
    cdef void **places = <void **>&blas
    cuda = name == "cuda"
    prefix = "cublasLt" if cuda else "hipblasLt"
    memset(&blas, 0, sizeof(blas))
    for i, call in enumerate(NAMES):
        places[i] = library.find(prefix + call)
        if places[i] == NULL:
            raise DeviceError(f"{library.path} has no {prefix}{call}: the library is too old")
    # CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T, CUBLAS_COMPUTE_32F; HIPBLASLT_MATMUL_DESC_TRANSA, ...
    transpose_a, transpose, compute_float32 = (3, 1, 68) if cuda else (0, 112, 2)


cdef int check_blas(int code, str call) except -1:
    missing = pending_exception()
    if code == 0 and missing is None:
        return 0
    raise DeviceError(f"{prefix}{call} failed: {missing or STATUS[prefix].get(code, 'error')} ({code})")


# A library's handle on one device, and the workspace that its products share: they must follow one another.
cdef class Blas:
    cdef readonly int device
    cdef readonly Buffer workspace
    cdef void *handle

    def __cinit__(self, int device, size_t workspace_bytes):
        cdef int code
        if blas.create == NULL:
            raise DeviceError("no library for matrix products is in use")
        self.device = device
        self.workspace = Buffer(device, workspace_bytes)
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
# (both float16), sums in float32.  The algorithm is asked for once, here.
cdef class MatMul:
    cdef readonly Blas blas
    cdef readonly int tokens, rows, columns, y_stride
    cdef void *desc
    cdef void *a
    cdef void *b
    cdef void *d
    cdef uint8_t algorithm[ALGORITHM_BYTES]

    def __cinit__(self, Blas blas_handle, int tokens, int rows, int columns, int y_stride):
        cdef void *preference = NULL
        cdef int32_t value = transpose
        cdef uint64_t room = blas_handle.workspace.nbytes
        cdef int code, found = 0
        if min(tokens, rows, columns) < 1 or y_stride < rows:
            raise ValueError(f"no product has the shape {tokens} x {columns} by {rows} rows, {y_stride} apart")
        self.blas, self.tokens, self.rows, self.columns, self.y_stride = blas_handle, tokens, rows, columns, y_stride
        memset(self.algorithm, 0, ALGORITHM_BYTES)
        check_blas(blas.desc_create(&self.desc, compute_float32, FLOAT32), "MatmulDescCreate")
        check_blas(blas.desc_set(self.desc, transpose_a, &value, sizeof(value)), "MatmulDescSetAttribute")
        check_blas(blas.layout_create(&self.a, FLOAT16, columns, rows, columns), "MatrixLayoutCreate")
        check_blas(blas.layout_create(&self.b, FLOAT16, columns, tokens, columns), "MatrixLayoutCreate")
        check_blas(blas.layout_create(&self.d, FLOAT32, rows, tokens, y_stride), "MatrixLayoutCreate")
        check_blas(blas.preference_create(&preference), "MatmulPreferenceCreate")
        try:
            check_blas(blas.preference_set(preference, MOST_WORKSPACE, &room, sizeof(room)), "MatmulPreferenceSetAttribute")
            with nogil:
                api.hipSetDevice(blas_handle.device)
                code = blas.heuristic(blas_handle.handle, self.desc, self.a, self.b, self.d, self.d, preference, 1,
                                      self.algorithm, &found)
            check_blas(code, "MatmulAlgoGetHeuristic")
            if found < 1:
                raise DeviceError(f"{prefix}MatmulAlgoGetHeuristic knows no product of {tokens} x {columns} by {rows} rows")
        finally:
            blas.preference_destroy(preference)

    def __dealloc__(self):
        if self.desc != NULL:
            blas.desc_destroy(self.desc)
        for layout in (<uintptr_t>self.a, <uintptr_t>self.b, <uintptr_t>self.d):
            if layout:
                blas.layout_destroy(<void *><uintptr_t>layout)

    def bind(self, x, weights, y):
        return Product(self, x, weights, y)


# A product with its arguments bound; run() may be captured.
cdef class Product:
    cdef readonly MatMul shape
    cdef uintptr_t x, weights, y
    cdef tuple keep

    def __cinit__(self, MatMul shape, x, weights, y):
        self.shape, self.keep = shape, (x, weights, y)
        self.x, self.weights, self.y = (getattr(v, "pointer", v) for v in self.keep)

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
                                   <void *>m.blas.workspace.pointer, m.blas.workspace.nbytes, stream.handle)
        check_blas(code, "Matmul")
