// Normalisation, rotary positions and what goes into the key/value cache.
#pragma once
#include "activations.h"

template <int WARPS> DEVICE float block_sum(float v) {
    __shared__ float parts[WARPS];
    v = warp_sum(v);
    if (lane_index() == 0) parts[warp_index()] = v;
    sync_block();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += parts[i];
    sync_block();
    return sum;
}

#define NORM_THREADS 512
#define NORM_ROUNDS 8  // quads of a thread: NORM_MOST_COLUMNS / (4 * NORM_THREADS)
#define NORM_EARLY 2   // those whose weights are asked for early: more would cost a second block its registers

// x += residual (when given), then y = x / sqrt(mean(x^2) + eps) * weight, as floats and as Q8 rows (each may be null).
// x, residual, y: [tokens][columns]; columns a multiple of 32, at most 16384: a row stays in registers.  It starts the
// kernel: the weights are on their way while the one ahead ends.
DEVICE void norm_row(float *x, const float *residual, const float *weight, float *y, u8 *q8, int columns, float eps) {
    const u64 row = (u64)block_x() * columns;
    quad values[NORM_ROUNDS], weights[NORM_EARLY];
    float squares = 0.f;
#pragma unroll
    for (int r = 0; r < NORM_EARLY; ++r) {
        const int i = 4 * (thread_index() + r * NORM_THREADS);
        if (i < columns) weights[r] = constant_quad(weight + i);
    }
    start_kernel();
#pragma unroll
    for (int r = 0; r < NORM_ROUNDS; ++r) {
        const int i = 4 * (thread_index() + r * NORM_THREADS);
        if (i >= columns) break;
        values[r] = *(const quad *)(x + row + i);
        if (residual) {
            const quad more = *(const quad *)(residual + row + i);
            for (int j = 0; j < 4; ++j) values[r].v[j] += more.v[j];
            *(quad *)(x + row + i) = values[r];
        }
        for (int j = 0; j < 4; ++j) squares = fused(values[r].v[j], values[r].v[j], squares);
    }
    const float scale = 1.f / square_root(block_sum<NORM_THREADS / 32>(squares) / (float)columns + eps);
#pragma unroll
    for (int r = 0; r < NORM_ROUNDS; ++r) {
        const int i = 4 * (thread_index() + r * NORM_THREADS);
        if (i - 4 * lane_index() >= columns) break; // whole warps leave: the others exchange
        quad value = {};
        if (i < columns) {
            const quad w = r < NORM_EARLY ? weights[r < NORM_EARLY ? r : 0] : constant_quad(weight + i);
            for (int j = 0; j < 4; ++j) value.v[j] = values[r].v[j] * scale * w.v[j];
            if (y) *(quad *)(y + row + i) = value;
        }
        if (q8) store_q8_quad(value, q8 + block_x() * q8_row_bytes(columns), columns, i);
    }
}
KERNEL(NORM_THREADS, rms_norm)
(float *x, const float *residual, const float *weight, float *y, u8 *q8, int columns, float eps) {
    norm_row(x, residual, weight, y, q8, columns, eps); // Grid (tokens)
}
EXPORT_KERNEL(rms_norm)

// x += bias, in every row.  x: [tokens][columns].  Grid (columns / 256 rounded up, tokens).
KERNEL(256, add_bias)(float *x, const float *bias, int columns) {
    start_kernel();
    const int i = block_x() * 256 + thread_index();
    if (i < columns) x[(u64)block_y() * columns + i] += bias[i];
}
EXPORT_KERNEL(add_bias)

// Parts of rows that come group by group, brought together: y[at + g * length + i] = x[g * stride + first + i].
// x: [tokens][groups * stride]; y: [tokens][y_columns].  Grid (groups * length / 256 rounded up, tokens).
KERNEL(256, ungroup)(const float *x, float *y, int groups, int stride, int first, int length, int y_columns, int at) {
    start_kernel();
    const int i = block_x() * 256 + thread_index();
    if (i >= groups * length) return;
    y[(u64)block_y() * y_columns + at + i] = x[((u64)block_y() * groups + i / length) * stride + first + i % length];
}
EXPORT_KERNEL(ungroup)

// packed: four elements as they lie in memory.
struct cache_f32 {
    typedef float element;
    typedef quad packed;
    static DEVICE_MEMBER quad get_packed(const float *p) { return *(const quad *)p; }
    static DEVICE_MEMBER quad unpack(const quad &q) { return q; }
    static DEVICE_MEMBER quad get_quad(const float *p) { return *(const quad *)p; }
    static DEVICE_MEMBER float put(float v) { return v; }
};
struct alignas(8) half_quad {
    u16 v[4];
};
struct cache_f16 {
    typedef u16 element;
    typedef half_quad packed;
    static DEVICE_MEMBER half_quad get_packed(const u16 *p) { return *(const half_quad *)p; }
    static DEVICE_MEMBER quad unpack(const half_quad &h) {
        return {{from_half(h.v[0]), from_half(h.v[1]), from_half(h.v[2]), from_half(h.v[3])}};
    }
    static DEVICE_MEMBER quad get_quad(const u16 *p) { return unpack(get_packed(p)); }
    static DEVICE_MEMBER u16 put(float v) { return to_half(v); }
};

// One block a head: query heads first, then key heads, then value heads.  Queries and keys are normalised over the head
// (a null weight: not), then their first `rotary` elements are rotated in pairs (j, j + rotary / 2); keys and values go
// to the cache at the token's position.
// q: [tokens][heads] rows q_stride apart; k, v: [tokens][kv_heads][dim]; cos_sin: [positions][rotary / 2][2];
// q_out: [tokens][heads][dim]; caches: [positions][kv_heads][dim] in the memory of each token's session.  dim <= 256.
// ring: the caches' rows are used again after so many; 0: never.  It starts the kernel: where a token stands, and its
// turn, are known before.  Grid (heads + 2 * kv_heads, tokens).
template <class CACHE>
DEVICE void prepare_head(const float *q, const float *k, const float *v, const float *q_norm, const float *k_norm,
                         const float *cos_sin, const replayed *positions, const replayed *states, float *q_out,
                         typename CACHE::element *k_cache, typename CACHE::element *v_cache, int heads, int kv_heads,
                         int dim, int q_stride, int rotary, float eps, int ring) {
    __shared__ float values[256];
    const int token = block_y(), i = thread_index();
    const bool is_query = block_x() < heads, is_key = !is_query && block_x() < heads + kv_heads;
    const int head = is_query ? block_x() : (block_x() - heads) % kv_heads;
    const u64 kv_row = ((u64)token * kv_heads + head) * dim;
    const float *row = is_query ? q + ((u64)token * heads + head) * q_stride : (is_key ? k : v) + kv_row;
    const u32 position = now(positions + token);
    const float *norm = is_query ? q_norm : is_key ? k_norm : (const float *)0;
    const float weight = norm && i < dim ? norm[i] : 1.f;
    const int half = rotary / 2, j = i < half ? i : i - half;
    const bool is_turned = (is_query || is_key) && i < rotary;
    const float *turn = cos_sin + ((u64)position * half + j) * 2;
    const float cosine = is_turned ? turn[0] : 1.f, sine = is_turned ? turn[1] : 0.f;
    const u64 base = state_base(states, token);
    start_kernel();
    float x = i < dim ? row[i] : 0.f;
    if (norm) {
        const float squares = block_sum<8>(x * x);
        if (i < dim) x = x / square_root(squares / (float)dim + eps) * weight;
    }
    if (is_query || is_key) {
        values[i] = x;
        sync_block();
        if (is_turned)
            x = i < half ? fused(x, cosine, -(values[i + half] * sine)) : fused(x, cosine, values[i - half] * sine);
    }
    if (i >= dim) return;
    const u64 place = ((u64)(ring ? position % (u32)ring : position) * kv_heads + head) * dim + i;
    if (is_query)
        q_out[((u64)token * heads + head) * dim + i] = x;
    else
        in_state(base, is_key ? k_cache : v_cache)[place] = CACHE::put(x);
}

#define PREPARE_KERNEL(type)                                                                                         \
    KERNEL(256, attention_prepare_##type)                                                                            \
    (const float *q, const float *k, const float *v, const float *q_norm, const float *k_norm, const float *cos_sin, \
     const replayed *positions, const replayed *states, float *q_out, cache_##type::element *k_cache,                \
     cache_##type::element *v_cache, int heads, int kv_heads, int dim, int q_stride, int rotary, float eps,          \
     int ring) {                                                                                                     \
        prepare_head<cache_##type>(q, k, v, q_norm, k_norm, cos_sin, positions, states, q_out, k_cache, v_cache,     \
                                   heads, kv_heads, dim, q_stride, rotary, eps, ring);                               \
    }                                                                                                                \
    EXPORT_KERNEL(attention_prepare_##type)

PREPARE_KERNEL(f32)
PREPARE_KERNEL(f16)
