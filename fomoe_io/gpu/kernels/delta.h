// The gated delta rule and the short convolution before it.
#pragma once
#include "norms.h"

#define CONV_MOST_TAPS 8
#define CONV_WARPS 4
#define CONV_TOKENS 4 // that follow one another in a thread

// A channel of a convolution: its inputs of this batch, and what each session has kept of it.
struct conv_channel {
    const float *x;
    const replayed *states;
    float *place;
    int channels, taps;
};

// The last inputs before token t of the session that begins at `base`, oldest first: those of this batch, and before
// them the session's, whose newest is the last.  What is further back than `taps` is 0, and so are its weights.
template <int TAPS> DEVICE void load_window(const conv_channel &c, int t, u64 base, float (&window)[TAPS - 1]) {
    int here = c.states ? 0 : t; // inputs of this batch
    while (c.states && here < c.taps - 1 && here < t && state_base(c.states, t - here - 1) == base) ++here;
    const float *state = in_state(base, c.place);
#pragma unroll
    for (int j = 0; j < TAPS - 1; ++j) {
        const int back = TAPS - 1 - j;
        window[j] = back >= c.taps ? 0.f
                    : back <= here ? c.x[(u64)(t - back) * c.channels]
                                   : state[(u64)(c.taps - 1 - (back - here)) * c.channels];
    }
}

// The warp's tokens of the channel; y is null where the channel is another lane's.
template <int TAPS> DEVICE void convolve(const conv_channel &c, const float *weight, float *y, int tokens) {
    float weights[TAPS], window[TAPS - 1];
#pragma unroll
    for (int j = 0; j < TAPS; ++j) weights[j] = j < TAPS - c.taps ? 0.f : weight[j - (TAPS - c.taps)];
    for (int begin = CONV_TOKENS * warp_index(); begin < tokens; begin += CONV_TOKENS * CONV_WARPS) {
        u64 base = state_base(c.states, begin);
        float values[CONV_TOKENS];
#pragma unroll
        for (int k = 0; k < CONV_TOKENS; ++k) // all at once, past the end the last one again
            values[k] = c.x[(u64)(begin + k < tokens ? begin + k : tokens - 1) * c.channels];
        load_window<TAPS>(c, begin, base, window);
#pragma unroll
        for (int k = 0; k < CONV_TOKENS; ++k) {
            const int t = begin + k;
            if (t >= tokens) break;
            if (c.states && state_base(c.states, t) != base)
                load_window<TAPS>(c, t, base = state_base(c.states, t), window);
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < TAPS - 1; ++j) sum = fused(weights[j], window[j], sum);
            if (y) y[(u64)t * c.channels] = silu(fused(weights[TAPS - 1], values[k], sum));
#pragma unroll
            for (int j = 0; j < TAPS - 2; ++j) window[j] = window[j + 1];
            window[TAPS - 2] = values[k];
        }
    }
}

// y[c] = silu(sum_j weight[c][j] * v_j), v_0.. = the channel's last taps - 1 inputs (oldest first), then this token's.
// x, y: [tokens][channels]; state: [taps - 1][channels] of each token's session, moved on by every token, whose tokens
// follow one another.  taps <= CONV_MOST_TAPS.  A lane is a channel; tokens are shared among the warps.
// Grid (channels / 32 up).
KERNEL(32 * CONV_WARPS, conv_step)
(const float *weight, const float *x, const replayed *states, float *place, float *y, int channels, int taps,
 int tokens) {
    start_kernel();
    const int lane = 32 * block_x() + lane_index();
    const bool is_here = lane < channels;
    const int i = is_here ? lane : 0;
    const conv_channel c = {x + i, states, place + i, channels, taps};
    if (taps <= 4)
        convolve<4>(c, weight + i * taps, is_here ? y + i : 0, tokens);
    else
        convolve<CONV_MOST_TAPS>(c, weight + i * taps, is_here ? y + i : 0, tokens);
    sync_block(); // all have read what sessions have kept
    for (int t = states ? warp_index() : tokens - 1 + warp_index(); t < tokens; t += CONV_WARPS) {
        const u64 base = state_base(states, t);
        if (t + 1 < tokens && state_base(states, t + 1) == base) continue; // not its session's last
        float window[CONV_MOST_TAPS - 1], *state = in_state(base, c.place);
        load_window<CONV_MOST_TAPS>(c, t + 1, base, window);
#pragma unroll
        for (int j = 0; j < CONV_MOST_TAPS - 1; ++j) {
            const int kept = j - (CONV_MOST_TAPS - taps);
            if (is_here && kept >= 0) state[(u64)kept * channels] = window[j];
        }
    }
}
EXPORT_KERNEL(conv_step)

// The same for one token, whose channel's window stays in a thread's registers; it starts the kernel, since only tokens
// before wrote the state.
template <int TAPS>
DEVICE void convolve_one(const float *weight, const float *x, float *state, float *y, int channels, int taps) {
    float weights[TAPS], window[TAPS], sum = 0.f;
#pragma unroll
    for (int j = 0; j < TAPS; ++j) {
        const int kept = j - (TAPS - taps);
        weights[j] = kept < 0 ? 0.f : weight[kept];
        if (j < TAPS - 1) window[j] = kept < 0 ? 0.f : state[(u64)kept * channels];
    }
    start_kernel();
    window[TAPS - 1] = *x;
#pragma unroll
    for (int j = 0; j < TAPS; ++j) sum = fused(weights[j], window[j], sum);
    *y = silu(sum);
#pragma unroll
    for (int j = 0; j < TAPS - 1; ++j) {
        const int kept = j - (TAPS - taps);
        if (kept >= 0) state[(u64)kept * channels] = window[j + 1];
    }
}
DEVICE void conv_one(const float *weight, const float *x, const replayed *states, float *place, float *y, int channels,
                     int taps) {
    const int i = 32 * CONV_WARPS * block_x() + thread_index();
    if (i >= channels) return;
    float *state = in_state(state_base(states, 0), place) + i;
    if (taps <= 4)
        convolve_one<4>(weight + i * taps, x + i, state, y + i, channels, taps);
    else
        convolve_one<CONV_MOST_TAPS>(weight + i * taps, x + i, state, y + i, channels, taps);
}
KERNEL(32 * CONV_WARPS, conv_token)
(const float *weight, const float *x, const replayed *states, float *place, float *y, int channels, int taps) {
    conv_one(weight, x, states, place, y, channels, taps); // Grid (channels / 128 up)
}
EXPORT_KERNEL(conv_token)

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

// What a block wants of DELTA_STEP tokens of a session: queries and keys of its head as they meet the state, its rows'
// values.
template <int K_DIM> struct delta_inputs {
    float q[DELTA_STEP][K_DIM], k[DELTA_STEP][K_DIM], v[DELTA_STEP][DELTA_WARPS * DELTA_ROWS];
    float decay[DELTA_STEP], rate[DELTA_STEP];
};

// Where they come from: of the block's head, of the first token.
struct delta_source {
    const float *q, *k, *v, *alpha, *beta;
    u64 mixed_columns; // from one token to the next
    int value_heads;
    float dt, a, eps;
};

// A thread's share of a step, asked for while the step before is computed with: vectors of the warp's tokens
// (warp + 4 i), alpha and beta of one of them (a lane in four each), two values.
template <int PER_LANE> struct delta_share {
    float q[4][PER_LANE], k[4][PER_LANE], alpha, beta, v[2];
};
// The token that a place of the step stands for: past the end the last one again.
DEVICE int delta_place(int begin, int place, int count) { return begin + (place < count ? place : count - 1); }

template <int PER_LANE>
DEVICE void ask_for(const delta_source &from, int begin, int count, delta_share<PER_LANE> &share) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u64 at = delta_place(begin, warp_index() + 4 * i, count) * from.mixed_columns + lane_index();
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) share.q[i][j] = from.q[at + 32 * j], share.k[i][j] = from.k[at + 32 * j];
    }
    const u64 mine = (u64)delta_place(begin, warp_index() + 4 * (lane_index() & 3), count) * from.value_heads;
    share.alpha = from.alpha[mine], share.beta = from.beta[mine];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        share.v[i] =
            from.v[delta_place(begin, thread_index() / 16 + 8 * i, count) * from.mixed_columns + thread_index() % 16];
}

// Vectors as long as they should be, |q| = 1 / sqrt(k_dim) and |k| = 1, and how fast the state decays and learns.
template <int PER_LANE>
DEVICE void put_down(const delta_source &from, const delta_share<PER_LANE> &share, delta_inputs<32 * PER_LANE> &s) {
    const int lane = lane_index(), warp = warp_index();
    float squares[8]; // of four queries, of their keys
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        squares[i] = squares[4 + i] = 0.f;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            squares[i] = fused(share.q[i][j], share.q[i][j], squares[i]);
            squares[4 + i] = fused(share.k[i][j], share.k[i][j], squares[4 + i]);
        }
    }
    const float length = square_root(warp_sum_of_8(squares) + from.eps);
    const float mine = 1.f / (lane < 16 ? length * square_root(32.f * PER_LANE) : length);
    const float scale[8] = {from_lane<0>(mine),  from_lane<4>(mine),  from_lane<8>(mine),  from_lane<12>(mine),
                            from_lane<16>(mine), from_lane<20>(mine), from_lane<24>(mine), from_lane<28>(mine)};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            s.q[warp + 4 * i][32 * j + lane] = share.q[i][j] * scale[i];
            s.k[warp + 4 * i][32 * j + lane] = share.k[i][j] * scale[4 + i];
        }
    const float decay = exponential(softplus(share.alpha + from.dt) * from.a), rate = sigmoid(share.beta);
    if (lane < 4) s.decay[warp + 4 * lane] = decay, s.rate[warp + 4 * lane] = rate;
#pragma unroll
    for (int i = 0; i < 2; ++i) s.v[thread_index() / 16 + 8 * i][thread_index() % 16] = share.v[i];
}

// Tokens of a step: of one session, whose tokens follow one another, so that what the last one has all have.
DEVICE int delta_count(const replayed *states, int begin, int tokens) {
    const int count = tokens - begin < DELTA_STEP ? tokens - begin : DELTA_STEP;
    return !states || state_base(states, begin + count - 1) == state_base(states, begin) ? count : 1;
}

// A token moves a warp's rows on.  out: what its query finds, of which each lane has a part; what the lanes' parts of
// the token before add up to goes to y_before, with the same exchanges: lane i ends with the sum of parts[i / 4].
template <int PER_LANE>
DEVICE void delta_token(float (&memory)[DELTA_ROWS][PER_LANE], const float *q, const float *k, const float *v,
                        float decay, float rate, float (&out)[DELTA_ROWS], float *y_before) {
    const int lane = lane_index();
    float keys[PER_LANE], parts[2 * DELTA_ROWS];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) keys[i] = k[32 * i + lane];
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; ++r) {
        parts[r] = 0.f, parts[DELTA_ROWS + r] = out[r], out[r] = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            memory[r][i] *= decay;
            parts[r] = fused(memory[r][i], keys[i], parts[r]);
        }
    }
    const float sum = warp_sum_of_8(parts), mine = rate * (v[lane >> 2 & 3] - sum);
    if (y_before && (lane & 19) == 16) y_before[lane >> 2 & 3] = sum;
    const float change[DELTA_ROWS] = {from_lane<0>(mine), from_lane<4>(mine), from_lane<8>(mine), from_lane<12>(mine)};
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const float query = q[32 * i + lane];
#pragma unroll
        for (int r = 0; r < DELTA_ROWS; ++r) {
            memory[r][i] = fused(change[r], keys[i], memory[r][i]);
            out[r] = fused(memory[r][i], query, out[r]);
        }
    }
}

// Per value head h, with q and k of unit length and q / sqrt(k_dim):
//   state *= exp(softplus(alpha + dt) * a);  delta = sigmoid(beta) * (v - state k);  state += delta k^T;  y = state q.
// Rows of the state (one a value element) do not meet, so a warp keeps DELTA_ROWS of them in registers for all tokens.
// mixed: [tokens][2 * key_heads * k_dim + value_heads * v_dim] (q, k, v); alpha, beta: [tokens][value_heads];
// state: [value_heads][v_dim][k_dim] of each token's session, whose tokens follow one another;
// y: [tokens][value_heads][v_dim].  is_grouped: value head h reads key head
// h / (value_heads / key_heads), else h % key_heads.  It starts the kernel, since only tokens before wrote the state.
// Grid (v_dim / 16, value_heads).
template <int PER_LANE>
DEVICE void delta(const float *mixed, const float *alpha, const float *beta, const float *dt, const float *a,
                  const replayed *states, float *place, float *y, int key_heads, int value_heads, int v_dim,
                  int is_grouped, int tokens, float eps) {
    const int k_dim = 32 * PER_LANE, rows = DELTA_WARPS * DELTA_ROWS, head = block_y(), lane = lane_index();
    const int first = block_x() * rows + warp_index() * DELTA_ROWS;
    const int key_head = is_grouped ? head / (value_heads / key_heads) : head % key_heads;
    const u64 mixed_columns = 2 * (u64)key_heads * k_dim + (u64)value_heads * v_dim;
    const float *q = mixed + key_head * k_dim,
                *values = mixed + 2 * key_heads * k_dim + head * v_dim + block_x() * rows;
    const delta_source from = {
        q,  q + key_heads * k_dim, values, alpha + head, beta + head, mixed_columns, value_heads, dt[head], a[head],
        eps};
    __shared__ delta_inputs<32 * PER_LANE> s;
    place += ((u64)head * v_dim + first) * k_dim + lane;
    u64 base = state_base(states, 0);
    float memory[DELTA_ROWS][PER_LANE], out[DELTA_ROWS] = {0.f, 0.f, 0.f, 0.f}, *y_before = 0;
    load_rows<PER_LANE>(in_state(base, place), memory);
    start_kernel();
    int count = delta_count(states, 0, tokens);
    delta_share<PER_LANE> share;
    ask_for<PER_LANE>(from, 0, count, share);
    for (int begin = 0; begin < tokens;) {
        if (begin) sync_block(); // the last step has been used
        put_down<PER_LANE>(from, share, s);
        sync_block();
        const int next = begin + count, next_count = next < tokens ? delta_count(states, next, tokens) : 0;
        if (next_count) ask_for<PER_LANE>(from, next, next_count, share);
        const u64 now = state_base(states, begin);
        if (now != base) {
            store_rows<PER_LANE>(memory, in_state(base, place));
            load_rows<PER_LANE>(in_state(base = now, place), memory);
        }
        for (int t = 0; t < count; ++t) {
            const float *v = s.v[t] + warp_index() * DELTA_ROWS;
            delta_token<PER_LANE>(memory, s.q[t], s.k[t], v, s.decay[t], s.rate[t], out, y_before);
            y_before = y + ((u64)(begin + t) * value_heads + head) * v_dim + first;
        }
        begin = next, count = next_count;
    }
    store_rows<PER_LANE>(memory, in_state(base, place));
    const float sum = warp_sum_of_4(out);
    if (!(lane & 7)) y_before[lane >> 3] = sum;
}

#define DELTA_KERNEL(dim)                                                                                       \
    RESIDENT_KERNEL(32 * DELTA_WARPS, 4, delta_step_##dim)                                                      \
    (const float *mixed, const float *alpha, const float *beta, const float *dt, const float *a,                \
     const replayed *states, float *place, float *y, int key_heads, int value_heads, int v_dim, int is_grouped, \
     int tokens, float eps) {                                                                                   \
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
