/* Quantized dot products: ggml's own kernels, or the portable C ones.  Numbers of types are ggml's. */
#ifndef FOMOE_DOT_H
#define FOMOE_DOT_H

#include <stddef.h>
#include <stdint.h>

/* ggml's signature (ggml-cpu.h, ggml_vec_dot_t): *s = dot(x, y), n elements; bs, bx, by: strides used
 * when nrc > 1 rows are done at once (we always pass nrc = 1). */
typedef void (*fomoe_vec_dot)(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);
typedef void (*fomoe_from_float)(const float *x, void *y, int64_t n);
typedef void (*fomoe_to_float)(const void *x, float *y, int64_t n);

typedef struct {
    int32_t type;            /* ggml type of the weights */
    int32_t activation_type; /* ggml type the activations are converted to first */
    int32_t block_elements;  /* a row is a multiple of this */
    int32_t block_bytes;
    fomoe_vec_dot dot;
    fomoe_from_float from_float; /* float row -> this type, for types that are activation types; else NULL */
    fomoe_to_float to_float; /* one row of this type -> floats (token embeddings); NULL for activation-only types */
} fomoe_type;

/* What one library can multiply with.  It never changes, and whoever computes was given his: two engines of a process
 * may have different ones. */
typedef struct fomoe_kernels fomoe_kernels;

/* From libggml-base and libggml-cpu (paths); NULL with a message. */
fomoe_kernels *fomoe_kernels_of_ggml(const char *base_path, const char *cpu_path, char *message, size_t message_bytes);
/* Those of this package, for the instruction set that is chosen now; NULL when memory runs out. */
fomoe_kernels *fomoe_kernels_portable(void);
void fomoe_kernels_free(fomoe_kernels *);
/* NULL when the type has no kernel */
const fomoe_type *fomoe_type_of(const fomoe_kernels *, int32_t type);
size_t fomoe_row_bytes(const fomoe_kernels *, int32_t type, int64_t elements);

#endif
