// Attention of one token over its cache, in two steps: every block takes ATTENTION_SPLIT positions of one key head for
// up to ATTENTION_WARPS of its query heads, then the parts are merged.  The cut depends on the position alone, so the bits do too.
#pragma once
#include "norms.h"
#include "tuning.h"

#define ATTENTION_WARPS 8
#define ATTENTION_BATCH 8  // positions whose scores a warp has in flight

// parts: [tokens][heads][splits][dim + 2]: weighted values, their largest score, the sum of weights.  Splits past the
// token's position are left unwritten.  q: [tokens][heads][dim]; caches: [positions][kv_heads][dim].
// Grid (kv_heads * blocks of a key head, splits, tokens); splits covers the longest context, so that a captured graph fits every position.
template <class CACHE, int PER_LANE>
DEVICE void attend(const float *q, const typename CACHE::element *k_cache, const typename CACHE::element *v_cache,
                   const int *positions, float *parts, int heads, int kv_heads, int splits, float scale) {
    const int dim = 32 * PER_LANE, group = heads / kv_heads, token = block_z(), split = block_y(), lane = lane_index();
    const int blocks = (group + ATTENTION_WARPS - 1) / ATTENTION_WARPS, kv_head = block_x() / blocks;
    const int g = block_x() % blocks * ATTENTION_WARPS + warp_index();
    const int length = positions[token] + 1, begin = split * ATTENTION_SPLIT;
    if (begin >= length || g >= group) return;
    const int end = begin + ATTENTION_SPLIT < length ? begin + ATTENTION_SPLIT : length;
    const u64 stride = (u64)kv_heads * dim;
    const typename CACHE::element *keys = k_cache + (u64)kv_head * dim, *values = v_cache + (u64)kv_head * dim;
    const u64 head = (u64)token * heads + kv_head * group + g;
    float query[PER_LANE], sum[PER_LANE], most = -infinity(), weight_sum = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) query[i] = q[head * dim + 32 * i + lane] * scale, sum[i] = 0.f;
    for (int p = begin; p < end; p += ATTENTION_BATCH) {
        float score[ATTENTION_BATCH], batch_most = most;
#pragma unroll
        for (int b = 0; b < ATTENTION_BATCH; ++b) {
            const u64 at = (u64)(p + b < end ? p + b : end - 1) * stride;
            float dot = 0.f;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) dot = fused(query[i], CACHE::get(keys[at + 32 * i + lane]), dot);
            score[b] = dot;
        }
#pragma unroll
        for (int b = 0; b < ATTENTION_BATCH; ++b) {
            score[b] = p + b < end ? warp_sum(score[b]) : -infinity();
            batch_most = larger(batch_most, score[b]);
        }
        const float shrink = exponential(most - batch_most);
        most = batch_most;
        weight_sum *= shrink;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) sum[i] *= shrink;
#pragma unroll
        for (int b = 0; b < ATTENTION_BATCH; ++b) {
            const float weight = exponential(score[b] - most);  // past the end: 0
            weight_sum += weight;
            const u64 at = (u64)(p + b < end ? p + b : end - 1) * stride;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
                sum[i] = fused(weight, CACHE::get(values[at + 32 * i + lane]), sum[i]);
        }
    }
    float *part = parts + (head * splits + split) * (dim + 2);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) part[32 * i + lane] = sum[i];
    if (lane == 0) part[dim] = most, part[dim + 1] = weight_sum;
}

// Merges the splits, multiplies with sigmoid(gate) where one is given, writes floats and Q8 rows (each may be null).
// gate: [tokens][heads] rows gate_stride apart; y: [tokens][heads * dim].  dim <= 256, a multiple of 32.
// Grid (heads, tokens).
KERNEL(256, attention_merge)
(const float *parts, const int *positions, const float *gate, float *y, u8 *q8, int heads, int dim,
 int splits, int gate_stride) {
    const int token = block_y(), i = thread_index(), used = positions[token] / ATTENTION_SPLIT + 1;
    const u64 head = (u64)token * heads + block_x();
    if (i >= dim) return;
    const float *part = parts + head * splits * (dim + 2);
    float most = -infinity(), sum = 0.f, weight_sum = 0.f;
    for (int s = 0; s < used; ++s) most = larger(most, part[(u64)s * (dim + 2) + dim]);
    for (int s = 0; s < used; ++s) {
        const float *p = part + (u64)s * (dim + 2);
        const float weight = exponential(p[dim] - most);
        sum = fused(weight, p[i], sum);
        weight_sum = fused(weight, p[dim + 1], weight_sum);
    }
    float value = sum / weight_sum;
    if (gate) value *= sigmoid(gate[head * gate_stride + i]);
    if (y) y[head * dim + i] = value;
    if (q8) store_q8_group(value, q8 + token * q8_row_bytes(heads * dim), heads * dim, (block_x() * dim + i) >> 5);
}
EXPORT_KERNEL(attention_merge)

#define ATTENTION_KERNEL(type, dim)                                                                                   \
    KERNEL(32 * ATTENTION_WARPS, attention_##type##_##dim)                                                            \
    (const float *q, const cache_##type::element *k_cache, const cache_##type::element *v_cache,                      \
     const int *positions, float *parts, int heads, int kv_heads, int splits, float scale) {                          \
        attend<cache_##type, dim / 32>(q, k_cache, v_cache, positions, parts, heads, kv_heads, splits, scale);        \
    }                                                                                                                 \
    EXPORT_KERNEL(attention_##type##_##dim)

ATTENTION_KERNEL(f32, 64)
ATTENTION_KERNEL(f32, 128)
ATTENTION_KERNEL(f32, 256)
ATTENTION_KERNEL(f16, 64)
ATTENTION_KERNEL(f16, 128)
ATTENTION_KERNEL(f16, 256)
