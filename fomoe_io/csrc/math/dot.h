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
    fomoe_to_float to_float;     /* one row of this type -> floats (token embeddings); NULL for activation-only types */
} fomoe_type;

/* Resolve ggml's symbols from libggml-base and libggml-cpu (paths); 0, or -1 with a message. */
int fomoe_use_ggml(const char *base_path, const char *cpu_path, char *message, size_t message_bytes);
void fomoe_use_portable(void);
/* "ggml" or "portable" */
const char *fomoe_kernels_name(void);
/* NULL when the type has no kernel */
const fomoe_type *fomoe_type_of(int32_t type);
size_t fomoe_row_bytes(int32_t type, int64_t elements);

#endif
