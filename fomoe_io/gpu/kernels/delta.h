// The gated delta rule and the short convolution before it.
#pragma once
#include "norms.h"

#define CONV_MOST_TAPS 8
#define CONV_STEP 8 // tokens whose inputs are asked for at once

// A channel's last inputs, oldest first; those further back than `taps` are 0, and so are their weights.
DEVICE void load_window(const float *state, int channels, int taps, float (&window)[CONV_MOST_TAPS - 1]) {
#pragma unroll
    for (int j = 0; j < CONV_MOST_TAPS - 1; ++j) {
        const int place = j - (CONV_MOST_TAPS - taps);
        window[j] = place < 0 ? 0.f : state[(u64)place * channels];
    }
}
DEVICE void store_window(const float (&window)[CONV_MOST_TAPS - 1], int channels, int taps, float *state) {
#pragma unroll
    for (int j = 0; j < CONV_MOST_TAPS - 1; ++j) {
        const int place = j - (CONV_MOST_TAPS - taps);
        if (place >= 0) state[(u64)place * channels] = window[j];
    }
}

// The next COUNT tokens of a channel, whose inputs are asked for at once.
template <int COUNT>
DEVICE void convolve(const float *x, float *y, int channels, const float (&weights)[CONV_MOST_TAPS],
                     float (&window)[CONV_MOST_TAPS - 1]) {
    float values[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = x[(u64)i * channels];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < CONV_MOST_TAPS - 1; ++j) sum = fused(weights[j], window[j], sum);
        y[(u64)i * channels] = silu(fused(weights[CONV_MOST_TAPS - 1], values[i], sum));
#pragma unroll
        for (int j = 0; j < CONV_MOST_TAPS - 2; ++j) window[j] = window[j + 1];
        window[CONV_MOST_TAPS - 2] = values[i];
    }
}

// y[c] = silu(sum_j weight[c][j] * v_j), v_0.. = the channel's last taps - 1 inputs (oldest first), then this token's.
// x, y: [tokens][channels]; state: [taps - 1][channels] of each token's session, moved on by every token, whose tokens
// follow one another.  taps <= CONV_MOST_TAPS.  Grid (channels / 64 up).
KERNEL(64, conv_step)
(const float *weight, const float *x, const replayed *states, float *place, float *y, int channels, int taps,
 int tokens) {
    start_kernel();
    const int c = block_x() * 64 + thread_index();
    if (c >= channels) return;
    float weights[CONV_MOST_TAPS], window[CONV_MOST_TAPS - 1];
#pragma unroll
    for (int j = 0; j < CONV_MOST_TAPS; ++j) {
        const int tap = j - (CONV_MOST_TAPS - taps);
        weights[j] = tap < 0 ? 0.f : weight[c * taps + tap];
    }
    place += c, x += c, y += c;
    u64 base = state_base(states, 0);
    load_window(in_state(base, place), channels, taps, window);
    for (int t = 0; t < tokens;) {
        const u64 now = state_base(states, t);
        if (now != base) {
            store_window(window, channels, taps, in_state(base, place));
            base = now;
            load_window(in_state(base, place), channels, taps, window);
        }
        const u64 at = (u64)t * channels;
        // a session's tokens follow one another: what the last one has, all have
        if (t + CONV_STEP <= tokens && state_base(states, t + CONV_STEP - 1) == base) {
            convolve<CONV_STEP>(x + at, y + at, channels, weights, window);
            t += CONV_STEP;
        } else {
            convolve<1>(x + at, y + at, channels, weights, window);
            t += 1;
        }
    }
    store_window(window, channels, taps, in_state(base, place));
}
EXPORT_KERNEL(conv_step)

#define DELTA_WARPS 4
#define DELTA_ROWS 4
#define DELTA_STEP 16 // tokens whose queries, keys and values lie in shared memory at once

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

// What a block wants of DELTA_STEP tokens: queries and keys of its head as they meet the state, its rows' values.
template <int K_DIM> struct delta_inputs {
    float q[DELTA_STEP][K_DIM], k[DELTA_STEP][K_DIM], v[DELTA_STEP][DELTA_WARPS * DELTA_ROWS];
    float decay[DELTA_STEP], rate[DELTA_STEP];
    u64 base[DELTA_STEP];
};

// Vectors of a head, made as long as they should be: |q| = 1 / sqrt(k_dim), |k| = 1.  A warp calls it.
template <int PER_LANE>
DEVICE void load_vectors(const float *q_from, const float *k_from, float eps, float *q_to, float *k_to) {
    float q[PER_LANE], k[PER_LANE], q_squares = 0.f, k_squares = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        q[i] = q_from[32 * i + lane_index()], k[i] = k_from[32 * i + lane_index()];
        q_squares = fused(q[i], q[i], q_squares);
        k_squares = fused(k[i], k[i], k_squares);
    }
    const float q_scale = 1.f / (square_root(warp_sum(q_squares) + eps) * square_root(32.f * PER_LANE));
    const float k_scale = 1.f / square_root(warp_sum(k_squares) + eps);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        q_to[32 * i + lane_index()] = q[i] * q_scale;
        k_to[32 * i + lane_index()] = k[i] * k_scale;
    }
}

// A token moves a warp's rows on; y: of these rows.
template <int PER_LANE>
DEVICE void delta_token(float (&memory)[DELTA_ROWS][PER_LANE], const float *q, const float *k, const float *v,
                        float decay, float rate, float *y) {
    const int lane = lane_index();
    float keys[PER_LANE], recalled[DELTA_ROWS], change[DELTA_ROWS], out[DELTA_ROWS];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) keys[i] = k[32 * i + lane];
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; ++r) {
        recalled[r] = 0.f, out[r] = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            memory[r][i] *= decay;
            recalled[r] = fused(memory[r][i], keys[i], recalled[r]);
        }
    }
    spread_4(rate * (v[lane >> 3] - warp_sum_of_4(recalled)), change);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const float query = q[32 * i + lane];
#pragma unroll
        for (int r = 0; r < DELTA_ROWS; ++r) {
            memory[r][i] = fused(change[r], keys[i], memory[r][i]);
            out[r] = fused(memory[r][i], query, out[r]);
        }
    }
    const float sum = warp_sum_of_4(out);
    if (!(lane & 7)) y[lane >> 3] = sum;
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
    const int k_dim = 32 * PER_LANE, rows = DELTA_WARPS * DELTA_ROWS, head = block_y(), lane = lane_index();
    const int first = block_x() * rows + warp_index() * DELTA_ROWS;
    const int key_head = is_grouped ? head / (value_heads / key_heads) : head % key_heads;
    const u64 mixed_columns = 2 * (u64)key_heads * k_dim + (u64)value_heads * v_dim;
    __shared__ delta_inputs<32 * PER_LANE> s;
    place += ((u64)head * v_dim + first) * k_dim + lane;
    u64 base = state_base(states, 0);
    float memory[DELTA_ROWS][PER_LANE];
    load_rows<PER_LANE>(in_state(base, place), memory);
    for (int begin = 0; begin < tokens; begin += DELTA_STEP) {
        const int count = tokens - begin < DELTA_STEP ? tokens - begin : DELTA_STEP;
        if (begin) sync_block(); // the last step has been used
#pragma unroll
        for (int i = 0; i < DELTA_STEP; i += DELTA_WARPS) {
            const int t = i + warp_index();
            const float *q = mixed + (u64)(begin + t) * mixed_columns + key_head * k_dim;
            if (t < count) load_vectors<PER_LANE>(q, q + key_heads * k_dim, eps, s.q[t], s.k[t]);
        }
        for (int i = thread_index(); i < count * rows; i += 32 * DELTA_WARPS) {
            const float *v = mixed + (u64)(begin + i / rows) * mixed_columns + 2 * key_heads * k_dim + head * v_dim;
            s.v[i / rows][i % rows] = v[block_x() * rows + i % rows];
        }
        if (thread_index() < count) {
            const u64 t = begin + thread_index(), at = t * value_heads + head;
            s.decay[thread_index()] = exponential(softplus(alpha[at] + dt[head]) * a[head]);
            s.rate[thread_index()] = sigmoid(beta[at]);
            s.base[thread_index()] = state_base(states, t);
        }
        sync_block();
        for (int t = 0; t < count; ++t) {
            if (s.base[t] != base) {
                store_rows<PER_LANE>(memory, in_state(base, place));
                base = s.base[t];
                load_rows<PER_LANE>(in_state(base, place), memory);
            }
            float *out = y + ((u64)(begin + t) * value_heads + head) * v_dim + first;
            delta_token<PER_LANE>(memory, s.q[t], s.k[t], s.v[t] + warp_index() * DELTA_ROWS, s.decay[t], s.rate[t],
                                  out);
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
