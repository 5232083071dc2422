// The gated delta rule and the short convolution before it.
#pragma once
#include "norms.h"

// y[c] = silu(sum_j weight[c][j] * v_j), v_0.. = the channel's last taps - 1 inputs (oldest first), then this token's.
// x, y: [tokens][channels]; state: [taps - 1][channels] of each token's session, moved on by every token.
// Grid (channels / 128 up).
KERNEL(128, conv_step)
(const float *weight, const float *x, const replayed *states, float *place, float *y, int channels, int taps,
 int tokens) {
    start_kernel();
    const int c = block_x() * 128 + thread_index();
    if (c >= channels) return;
    for (int t = 0; t < tokens; ++t) {
        float *state = in_state(state_base(states, t), place);
        const float now = x[(u64)t * channels + c];
        float sum = 0.f;
        for (int j = 0; j < taps - 1; ++j) {
            const float before = state[(u64)j * channels + c];
            sum = fused(weight[c * taps + j], before, sum);
            if (j > 0) state[(u64)(j - 1) * channels + c] = before;
        }
        if (taps > 1) state[(u64)(taps - 2) * channels + c] = now;
        y[(u64)t * channels + c] = silu(fused(weight[c * taps + taps - 1], now, sum));
    }
}
EXPORT_KERNEL(conv_step)

#define DELTA_WARPS 4
#define DELTA_ROWS 4

template <int PER_LANE> DEVICE void load_rows(const float *state, float (&memory)[DELTA_ROWS][PER_LANE]) {
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) memory[r][i] = state[32 * (r * PER_LANE + i)];
}
template <int PER_LANE> DEVICE void store_rows(const float (&memory)[DELTA_ROWS][PER_LANE], float *state) {
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) state[32 * (r * PER_LANE + i)] = memory[r][i];
}

// Per value head h, with q and k of unit length and q / sqrt(k_dim):
//   state *= exp(softplus(alpha + dt) * a);  delta = sigmoid(beta) * (v - state k);  state += delta k^T;  y = state q.
// Rows of the state (one a value element) do not meet, so a warp keeps DELTA_ROWS of them in registers for all tokens.
// mixed: [tokens][2 * key_heads * k_dim + value_heads * v_dim] (q, k, v); alpha, beta: [tokens][value_heads];
// state: [value_heads][v_dim][k_dim] of each token's session, whose tokens follow one another;
// y: [tokens][value_heads][v_dim].  is_grouped: value head h reads key head
// h / (value_heads / key_heads), else h % key_heads.  Grid (v_dim / 16, value_heads).
template <int PER_LANE>
DEVICE void delta(const float *mixed, const float *alpha, const float *beta, const float *dt, const float *a,
                  const replayed *states, float *place, float *y, int key_heads, int value_heads, int v_dim,
                  int is_grouped, int tokens, float eps) {
    const int k_dim = 32 * PER_LANE, head = block_y(), lane = lane_index();
    const int first = (block_x() * DELTA_WARPS + warp_index()) * DELTA_ROWS;
    const int key_head = is_grouped ? head / (value_heads / key_heads) : head % key_heads;
    const u64 mixed_columns = 2 * (u64)key_heads * k_dim + (u64)value_heads * v_dim;
    place += ((u64)head * v_dim + first) * k_dim + lane;
    u64 base = state_base(states, 0);
    float memory[DELTA_ROWS][PER_LANE];
    load_rows<PER_LANE>(in_state(base, place), memory);
    for (int t = 0; t < tokens; ++t) {
        const u64 base_now = state_base(states, t);
        if (base_now != base) {
            store_rows<PER_LANE>(memory, in_state(base, place));
            load_rows<PER_LANE>(in_state(base_now, place), memory);
            base = base_now;
        }
        const float *now = mixed + t * mixed_columns, *v = now + 2 * key_heads * k_dim + head * v_dim + first;
        float q[PER_LANE], k[PER_LANE], q_squares = 0.f, k_squares = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            q[i] = now[key_head * k_dim + 32 * i + lane];
            k[i] = now[(key_heads + key_head) * k_dim + 32 * i + lane];
            q_squares = fused(q[i], q[i], q_squares);
            k_squares = fused(k[i], k[i], k_squares);
        }
        const float q_scale = 1.f / (square_root(warp_sum(q_squares) + eps) * square_root((float)k_dim));
        const float k_scale = 1.f / square_root(warp_sum(k_squares) + eps);
        const float decay = exponential(softplus(alpha[t * value_heads + head] + dt[head]) * a[head]);
        const float rate = sigmoid(beta[t * value_heads + head]);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) q[i] *= q_scale, k[i] *= k_scale;
#pragma unroll
        for (int r = 0; r < DELTA_ROWS; ++r) {
            float recalled = 0.f, out = 0.f;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                memory[r][i] *= decay;
                recalled = fused(memory[r][i], k[i], recalled);
            }
            const float change = rate * (v[r] - warp_sum(recalled));
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                memory[r][i] = fused(change, k[i], memory[r][i]);
                out = fused(memory[r][i], q[i], out);
            }
            out = warp_sum(out);
            if (lane == 0) y[((u64)t * value_heads + head) * v_dim + first + r] = out;
        }
    }
    store_rows<PER_LANE>(memory, in_state(base, place));
}

#define DELTA_KERNEL(dim)                                                                                       \
    KERNEL(32 * DELTA_WARPS, delta_step_##dim)                                                                  \
    (const float *mixed, const float *alpha, const float *beta, const float *dt, const float *a,                \
     const replayed *states, float *place, float *y, int key_heads, int value_heads, int v_dim, int is_grouped, \
     int tokens, float eps) {                                                                                   \
        start_kernel();                                                                                         \
        delta<dim / 32>(mixed, alpha, beta, dt, a, states, place, y, key_heads, value_heads, v_dim, is_grouped, \
                        tokens, eps);                                                                           \
    }                                                                                                           \
    EXPORT_KERNEL(delta_step_##dim)

DELTA_KERNEL(64)
DELTA_KERNEL(128)

// y = x / sqrt(mean(x^2) + eps) * weight * silu(gate), over each head; as floats and as Q8 rows (each may be null).
// x, gate, y: [tokens][heads][dim]; dim 32, 64, 96 or 128: a warp a head.  It starts the kernel, as norm_row does.
DEVICE void norm_heads(const float *x, const float *gate, const float *weight, float *y, u8 *q8, int heads, int dim,
                       float eps) {
    const int head = block_x() * 4 + warp_index(), token = block_y(), i = 4 * lane_index();
    const bool is_here = head < heads && i < dim;
    const u64 place = ((u64)token * heads + head) * dim + i;
    quad v = {}, g = {}, w = {}, value = {};
    if (is_here) w = constant_quad(weight + i);
    start_kernel();
    if (head >= heads) return;
    if (is_here) v = *(const quad *)(x + place), g = *(const quad *)(gate + place);
    float squares = 0.f;
    for (int j = 0; j < 4; ++j) squares = fused(v.v[j], v.v[j], squares);
    const float scale = 1.f / square_root(warp_sum(squares) / (float)dim + eps);
    for (int j = 0; j < 4; ++j) value.v[j] = v.v[j] * scale * w.v[j] * silu(g.v[j]);
    if (y && is_here) *(quad *)(y + place) = value;
    // lanes past the head's end store nothing: their place is past the row's end, too
    if (q8)
        store_q8_quad(value, q8 + token * q8_row_bytes(heads * dim), heads * dim,
                      is_here ? head * dim + i : heads * dim);
}
KERNEL(128, gated_norm)
(const float *x, const float *gate, const float *weight, float *y, u8 *q8, int heads, int dim, float eps) {
    norm_heads(x, gate, weight, y, q8, heads, dim, eps);  // Grid (heads / 4 up, tokens)
}
EXPORT_KERNEL(gated_norm)
