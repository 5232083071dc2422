/* The arithmetic is compiled once for every instruction set below and chosen when the library is loaded.
 *
 * Not by target_clones: gcc lowers vector types before it makes the clones, so all of them would get the vectors of
 * the oldest processor.  Each instructions_*.c sets its target and includes the same *_kernels.h files. */
#ifndef FOMOE_INSTRUCTIONS_H
#define FOMOE_INSTRUCTIONS_H

#include "attention.h"
#include "dot.h"

typedef struct {
    const char *name;
    void (*rms_norm)(int n, const float *x, const float *w, float eps, float *y);
    void (*l2_norm)(int n, const float *x, float eps, float scale, float *y);
    void (*silu_mul)(int n, const float *gate, const float *up, float *y);
    void (*clamped_swiglu)(int n, const float *gate, const float *up, float *y);
    void (*sigmoid_mul)(int n, const float *gate, const float *x, float *y);
    void (*add)(int n, const float *x, float *y);
    void (*axpy)(int n, float a, const float *x, float *y);
    void (*softmax)(int n, float *x);
    void (*rope_neox)(int n_rot, const float *cos_sin, float *x);
    void (*conv_step)(int channels, int taps, const float *w, const float *x, float *state, int64_t state_stride,
                      float *y);
    void (*delta_step)(int k_dim, int v_dim, const float *q, const float *k, const float *v, float beta, float decay,
                       float *state, float *out);
    void (*attention_head)(fomoe_kv_type type, int k_dim, int v_dim, int64_t length, float scale, const float *q,
                           const void *keys, int64_t key_stride, const void *values, int64_t value_stride,
                           float *scores, const float *sink, float *out);
    void (*to_kv)(fomoe_kv_type type, int n, const float *x, void *y);
    const fomoe_type *types; /* the portable dot products; the last has no elements in a block */
} fomoe_instructions;

extern const fomoe_instructions fomoe_baseline, fomoe_avx2, fomoe_avx512;

/* The best set this processor has, or what fomoe_use_instructions chose. */
const fomoe_instructions *fomoe_chosen_instructions(void);
/* By name, for tests and measurements; 0, or -1 when this processor lacks it.  Not while a program runs. */
int fomoe_use_instructions(const char *name);

#endif
