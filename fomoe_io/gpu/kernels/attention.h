// Attention of one token over its cache, in two steps: every block takes 32 positions of one key head for up to
// ATTENTION_WARPS of its query heads, then the parts are merged.  The cut depends on the position alone, so the bits do
// too.  A block keeps its keys, then its values, in shared memory: a warp is a head, and while scores are computed a
// lane is a position.  A prompt's tokens have prompt_attention.h.
#pragma once
#include "norms.h"
#include "tuning.h"

#define ATTENTION_WARPS 8
#define ATTENTION_SPLIT 32

// parts: [tokens][heads][splits][dim + 2]: weighted values, their largest score, the sum of weights.  Splits past the
// token's position, and before its window, are left unwritten.  q: [tokens][heads][dim];
// caches: [positions][kv_heads][dim] in the memory of each token's session.
// Grid (kv_heads * blocks of a key head, splits, tokens); splits covers the longest context, so that a captured graph
// fits every position.  ring: the caches' rows are used again after so many; 0: never.  It starts the kernel: where a
// token stands is known before.
template <class CACHE, int PER_LANE>
DEVICE void attend(const float *q, const typename CACHE::element *k_cache, const typename CACHE::element *v_cache,
                   const replayed *positions, const replayed *states, float *parts, int heads, int kv_heads, int splits,
                   float scale, int window, int ring) {
    const int dim = 32 * PER_LANE, row = dim + 4; // four floats apart, rows start in different banks
    __shared__ quad tile_quads[ATTENTION_SPLIT * row / 4], query_quads[ATTENTION_WARPS][dim / 4];
    __shared__ float weight_of[ATTENTION_WARPS][ATTENTION_SPLIT];
    float *tile = tile_quads[0].v, *query_row = query_quads[warp_index()][0].v;
    const int group = heads / kv_heads, token = block_z(), split = block_y(), lane = lane_index();
    const int blocks = (group + ATTENTION_WARPS - 1) / ATTENTION_WARPS, kv_head = block_x() / blocks;
    const int g = block_x() % blocks * ATTENTION_WARPS + warp_index();
    const int length = (int)now(positions + token) + 1, begin = split * ATTENTION_SPLIT;
    const int first = window && window < length ? length - window : 0; // position that the token sees
    if (begin >= length || begin + ATTENTION_SPLIT <= first) return;
    const u64 base = state_base(states, token);
    start_kernel();
    k_cache = in_state(base, k_cache), v_cache = in_state(base, v_cache);
    const u64 head = (u64)token * heads + kv_head * group + (g < group ? g : 0);
    quad keys[PER_LANE], values[PER_LANE];
#pragma unroll
    for (int r = 0; r < PER_LANE; ++r) {
        const int i = 4 * (thread_index() + 32 * ATTENTION_WARPS * r), p = begin + i / dim;
        const int seen = p < length ? p : length - 1, place = ring ? seen % ring : seen;
        const u64 at = ((u64)place * kv_heads + kv_head) * dim + i % dim;
        keys[r] = CACHE::get_quad(k_cache + at);
        values[r] = CACHE::get_quad(v_cache + at);
    }
#pragma unroll
    for (int r = 0; r < PER_LANE; ++r) {
        const int i = 4 * (thread_index() + 32 * ATTENTION_WARPS * r);
        tile_quads[(i / dim * row + i % dim) / 4] = keys[r];
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) query_row[32 * i + lane] = q[head * dim + 32 * i + lane] * scale;
    sync_block();
    float score = 0.f;
#pragma unroll 8
    for (int c = 0; c < dim; c += 4) {
        const quad key = tile_quads[(lane * row + c) / 4], query = query_quads[warp_index()][c / 4];
        for (int j = 0; j < 4; ++j) score = fused(query.v[j], key.v[j], score);
    }
    if (begin + lane >= length || begin + lane < first) score = -infinity();
    const float most = warp_max(score), weight = exponential(score - most), weight_sum = warp_sum(weight);
    weight_of[warp_index()][lane] = weight;
    sync_block();
#pragma unroll
    for (int r = 0; r < PER_LANE; ++r) {
        const int i = 4 * (thread_index() + 32 * ATTENTION_WARPS * r);
        tile_quads[(i / dim * row + i % dim) / 4] = values[r];
    }
    sync_block();
    if (g >= group) return;
    float sum[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sum[i] = 0.f;
#pragma unroll 4
    for (int p = 0; p < ATTENTION_SPLIT; ++p) {
        const float w = weight_of[warp_index()][p];
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) sum[i] = fused(w, tile[p * row + 32 * i + lane], sum[i]);
    }
    float *part = parts + (head * splits + split) * (dim + 2);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) part[32 * i + lane] = sum[i];
    if (lane == 0) part[dim] = most, part[dim + 1] = weight_sum;
}

// Merges the splits, multiplies with sigmoid(gate) where one is given, writes floats and Q8 rows (each may be null).
// sinks: of each head, a logit without a value; null for none.
// gate: [tokens][heads] rows gate_stride apart; y: [tokens][heads * dim].  dim <= 256, a multiple of 32.
// Grid (heads, tokens).
KERNEL(256, attention_merge)
(const float *parts, const replayed *positions, const float *gate, float *y, u8 *q8, int heads, int dim, int splits,
 int gate_stride, const float *sinks, int window) {
    start_kernel();
    const int token = block_y(), i = thread_index(), length = (int)now(positions + token) + 1;
    const int used = (length - 1) / ATTENTION_SPLIT + 1;
    const int first = window && window < length ? (length - window) / ATTENTION_SPLIT : 0;
    const u64 head = (u64)token * heads + block_x();
    if (i >= dim) return;
    const float *part = parts + head * splits * (dim + 2);
    const float sink = sinks ? sinks[block_x()] : -infinity();
    float most = sink, sum = 0.f, weight_sum = 0.f;
    for (int s = first; s < used; ++s) most = larger(most, part[(u64)s * (dim + 2) + dim]);
    for (int s = first; s < used; ++s) {
        const float *p = part + (u64)s * (dim + 2);
        const float weight = exponential(p[dim] - most);
        sum = fused(weight, p[i], sum);
        weight_sum = fused(weight, p[dim + 1], weight_sum);
    }
    if (sinks) weight_sum += exponential(sink - most);
    float value = sum / weight_sum;
    if (gate) value *= sigmoid(gate[head * gate_stride + i]);
    if (y) y[head * dim + i] = value;
    if (q8) store_q8_group(value, q8 + token * q8_row_bytes(heads * dim), heads * dim, (block_x() * dim + i) >> 5);
}
EXPORT_KERNEL(attention_merge)

#define ATTENTION_KERNEL(type, dim)                                                                                   \
    KERNEL(32 * ATTENTION_WARPS, attention_##type##_##dim)                                                            \
    (const float *q, const cache_##type::element *k_cache, const cache_##type::element *v_cache,                      \
     const replayed *positions, const replayed *states, float *parts, int heads, int kv_heads, int splits,            \
     float scale, int window, int ring) {                                                                             \
        attend<cache_##type, dim / 32>(q, k_cache, v_cache, positions, states, parts, heads, kv_heads, splits, scale, \
                                       window, ring);                                                                 \
    }                                                                                                                 \
    EXPORT_KERNEL(attention_##type##_##dim)

ATTENTION_KERNEL(f32, 32)
ATTENTION_KERNEL(f32, 64)
ATTENTION_KERNEL(f32, 128)
ATTENTION_KERNEL(f32, 256)
ATTENTION_KERNEL(f16, 32)
ATTENTION_KERNEL(f16, 64)
ATTENTION_KERNEL(f16, 128)
ATTENTION_KERNEL(f16, 256)
