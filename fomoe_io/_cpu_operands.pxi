# What a CPU program's steps are given: weight matrices and rows of activations; part of _cpu.pyx.

cdef class Matrix:
    """A weight matrix at an address that its owner keeps alive."""
    cdef fomoe_matrix c
    cdef readonly Kernels kernels
    cdef readonly object owner

    def __cinit__(self, Kernels kernels not None, uintptr_t address, int type, int rows, int columns,
                  bint float_activations, owner):
        if kernels.type_info(type) is None:
            raise ValueError(f"no kernel for type {type}")
        self.kernels = kernels
        self.c.data = <const uint8_t *>address
        self.c.type = fomoe_type_of(kernels.c, type)
        self.c.row_bytes = fomoe_row_bytes(kernels.c, type, columns)
        self.c.rows = rows
        self.c.columns = columns
        self.c.float_activations = float_activations
        self.owner = owner

    @property
    def rows(self):
        return self.c.rows

    @property
    def columns(self):
        return self.c.columns

    @property
    def activation_type(self):
        return F32 if self.c.float_activations else self.c.type.activation_type


cdef class Rows:
    """One activation row a token, in memory of its own."""
    cdef fomoe_rows c
    cdef void *memory

    def __cinit__(self, Kernels kernels not None, int columns, int tokens, int type=0):
        # rows start on cache lines
        self.c.stride = (<int64_t>fomoe_row_bytes(kernels.c, type, columns) + 63) // 64 * 64
        if posix_memalign(&self.memory, 64, self.c.stride * tokens):
            raise MemoryError
        memset(self.memory, 0, self.c.stride * tokens)
        self.c.data = <uint8_t *>self.memory
        self.c.type = type
        self.c.columns = columns

    def __dealloc__(self):
        free(self.memory)

    @property
    def columns(self):
        return self.c.columns

    @property
    def type(self):
        return self.c.type

    @property
    def stride_bytes(self):
        return self.c.stride
