#pragma once
#include "experts.h"
struct tile { u64 record; u32 first, count; };
#define TILE_TOKENS 16
template <class T>
DEVICE float dot_one(const u8 *row, const u8 *x, int columns) {
    const u8 *rows[1] = {row};
    const u32 token[1] = {0};
    float sums[1][1] = {{0.f}};
    dot_rows<T, 1, 1>(rows, x, token, columns, lane_index(), 32, sums);
    return warp_sum(sums[0][0]);
}
#define TILE_KERNELS(T)                                                                                               \
    KERNEL(128, mat_mul_##T)(const u8 *weights, const u8 *x, float *y, int rows, int columns, int tokens) {           \
        const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;                                    \
        for (int r = warp_index(); r < 64; r += 4)                                                                    \
            for (int t = 0; t < 16; ++t) {                                                                            \
                const int row = block_x() * 64 + r, token = block_y() * 16 + t;                                       \
                if (row >= rows || token >= tokens) continue;                                                         \
                const float v = dot_one<T>(weights + row * row_bytes, x + token * activation_row_bytes<T>(columns), columns); \
                if (lane_index() == 0) y[(u64)token * rows + row] = v;                                                \
            }                                                                                                         \
    }                                                                                                                 \
    EXPORT_KERNEL(mat_mul_##T)                                                                                        \
    KERNEL(128, group_gate_up_##T)(const tile *tiles, const int *order, u64 gate_offset, u64 up_offset, const u8 *x,  \
                                   u8 *hidden, float *floats, int rows, int columns, int picks) {                     \
        const tile t = tiles[block_y()];                                                                              \
        const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;                                    \
        __shared__ float values[32];                                                                                  \
        for (u32 p = 0; p < t.count; ++p) {                                                                           \
            const int pair = order[t.first + p];                                                                      \
            const u8 *row = x + (u64)(pair / picks) * activation_row_bytes<T>(columns);                               \
            for (int r = warp_index(); r < 32; r += 4) {                                                              \
                const u64 at = (u64)(block_x() * 32 + r) * row_bytes;                                                 \
                const float g = dot_one<T>((const u8 *)t.record + gate_offset + at, row, columns);                    \
                const float u = dot_one<T>((const u8 *)t.record + up_offset + at, row, columns);                      \
                if (lane_index() == 0) values[r] = silu(g) * u;                                                       \
            }                                                                                                         \
            sync_block();                                                                                             \
            if (warp_index() == 0) {                                                                                  \
                if (floats) floats[(u64)pair * rows + block_x() * 32 + lane_index()] = values[lane_index()];          \
                store_q8_group(values[lane_index()], hidden + pair * q8_row_bytes(rows), rows, block_x());            \
            }                                                                                                         \
            sync_block();                                                                                             \
        }                                                                                                             \
    }                                                                                                                 \
    EXPORT_KERNEL(group_gate_up_##T)                                                                                  \
    KERNEL(128, group_down_##T)(const tile *tiles, const int *order, u64 down_offset, const u8 *hidden, float *out,   \
                                int rows, int columns) {                                                              \
        const tile t = tiles[block_y()];                                                                              \
        const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;                                    \
        for (u32 p = 0; p < t.count; ++p) {                                                                           \
            const int pair = order[t.first + p];                                                                      \
            for (int r = warp_index(); r < 64; r += 4) {                                                              \
                const int row = block_x() * 64 + r;                                                                   \
                if (row >= rows) continue;                                                                            \
                const float v = dot_one<T>((const u8 *)t.record + down_offset + row * row_bytes,                      \
                                           hidden + (u64)pair * activation_row_bytes<T>(columns), columns);           \
                if (lane_index() == 0) out[(u64)pair * rows + row] = v;                                               \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    EXPORT_KERNEL(group_down_##T)
TILE_KERNELS(q4_k)
TILE_KERNELS(q5_k)
TILE_KERNELS(q6_k)
TILE_KERNELS(q8_0)
TILE_KERNELS(f16)
TILE_KERNELS(bf16)
TILE_KERNELS(f32)
KERNEL(256, combine_picks)(const float *out, const float *weights, const float *shared_output, const float *shared_gate, float *y, int columns, int picks) {
    const int c = block_x() * 256 + thread_index(), token = block_y();
    if (c >= columns) return;
    float sum = 0.f;
    for (int k = 0; k < picks; ++k) sum = fused(weights[token * picks + k], out[((u64)token * picks + k) * columns + c], sum);
    const u64 i = (u64)token * columns + c;
    y[i] = shared_output ? fused(shared_gate ? sigmoid(shared_gate[token]) : 1.f, shared_output[i], sum) : sum;
}
EXPORT_KERNEL(combine_picks)
