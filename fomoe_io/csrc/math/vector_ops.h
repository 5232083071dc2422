/* The float32 arithmetic of the models, one row (or head) at a time, no threads inside.
 * Every function gives the same bits for the same input, wherever its data lies. */
#ifndef FOMOE_VECTOR_OPS_H
#define FOMOE_VECTOR_OPS_H

#include <stdint.h>

/* y = x / sqrt(mean(x^2) + eps) * w; y may be x; w NULL means 1 */
void fomoe_rms_norm(int n, const float *x, const float *w, float eps, float *y);
/* y = x / sqrt(sum(x^2) + eps) * scale; y may be x */
void fomoe_l2_norm(int n, const float *x, float eps, float scale, float *y);
/* y = silu(gate) * up; y may be gate or up.  silu(v) = v / (1 + exp(-v)) */
void fomoe_silu_mul(int n, const float *gate, const float *up, float *y);
/* y = g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = up clipped to -7..7 (gpt-oss); y may be gate or up */
void fomoe_clamped_swiglu(int n, const float *gate, const float *up, float *y);
/* y = sigmoid(gate) * x; y may be x */
void fomoe_sigmoid_mul(int n, const float *gate, const float *x, float *y);
float fomoe_sigmoid(float x);
float fomoe_softplus(float x); /* log1p(exp(x)), x itself above 20 as ggml has it */
/* y += x */
void fomoe_add(int n, const float *x, float *y);
/* y += a * x */
void fomoe_axpy(int n, float a, const float *x, float *y);
/* x[0..n) -> softmax(x) in place, maximum subtracted first */
void fomoe_softmax(int n, float *x);

/* cos_sin[2*j], [2*j+1] = magnitude * cos, sin of position * frequency[j], j < pairs; in double, then rounded */
void fomoe_rope_table(int pairs, const double *frequency, double magnitude, int64_t position, float *cos_sin);
/* NEOX pairing (j, j + n_rot/2) of the first n_rot elements, in place */
void fomoe_rope_neox(int n_rot, const float *cos_sin, float *x);

/* One channel-range of the causal depthwise convolution, one token: for channel c in [0, channels):
 * y[c] = silu(sum_j w[c*taps + j] * v_j), v_0..v_{taps-2} = state[j*state_stride + c] (oldest first),
 * v_{taps-1} = x[c]; then the state is shifted by one and takes x. */
void fomoe_conv_step(int channels, int taps, const float *w, const float *x, float *state, int64_t state_stride,
                     float *y);

/* Gated delta rule, one value head, one token.  state[v][k] (v_dim x k_dim, k fastest):
 * state *= decay; delta = beta * (v - state k); state += delta k^T; out = state q.  q and k are already normalised. */
void fomoe_delta_step(int k_dim, int v_dim, const float *q, const float *k, const float *v, float beta, float decay,
                      float *state, float *out);

#endif
