/* The functions of vector_ops.h: those that gain from vectors in the chosen instruction set, the others here. */
#include "vector_ops.h"

#include <math.h>

#include "instructions.h"

void fomoe_rms_norm(int n, const float *x, const float *w, float eps, float *y) {
    fomoe_chosen_instructions()->rms_norm(n, x, w, eps, y);
}

void fomoe_l2_norm(int n, const float *x, float eps, float scale, float *y) {
    fomoe_chosen_instructions()->l2_norm(n, x, eps, scale, y);
}

void fomoe_silu_mul(int n, const float *gate, const float *up, float *y) {
    fomoe_chosen_instructions()->silu_mul(n, gate, up, y);
}

void fomoe_clamped_swiglu(int n, const float *gate, const float *up, float *y) {
    fomoe_chosen_instructions()->clamped_swiglu(n, gate, up, y);
}

void fomoe_sigmoid_mul(int n, const float *gate, const float *x, float *y) {
    fomoe_chosen_instructions()->sigmoid_mul(n, gate, x, y);
}

float fomoe_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

float fomoe_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

void fomoe_add(int n, const float *x, float *y) { fomoe_chosen_instructions()->add(n, x, y); }

void fomoe_axpy(int n, float a, const float *x, float *y) { fomoe_chosen_instructions()->axpy(n, a, x, y); }

void fomoe_softmax(int n, float *x) { fomoe_chosen_instructions()->softmax(n, x); }

void fomoe_rope_table(int pairs, const double *frequency, double magnitude, int64_t position, float *cos_sin) {
    for (int j = 0; j < pairs; j++) {
        double angle = (double)position * frequency[j];
        cos_sin[2 * j] = (float)(cos(angle) * magnitude);
        cos_sin[2 * j + 1] = (float)(sin(angle) * magnitude);
    }
}

void fomoe_rope_neox(int n_rot, const float *cos_sin, float *x) {
    fomoe_chosen_instructions()->rope_neox(n_rot, cos_sin, x);
}

void fomoe_conv_step(int channels, int taps, const float *w, const float *x, float *state, int64_t state_stride,
                     float *y) {
    fomoe_chosen_instructions()->conv_step(channels, taps, w, x, state, state_stride, y);
}

void fomoe_delta_step(int k_dim, int v_dim, const float *q, const float *k, const float *v, float beta, float decay,
                      float *state, float *out) {
    fomoe_chosen_instructions()->delta_step(k_dim, v_dim, q, k, v, beta, decay, state, out);
}
