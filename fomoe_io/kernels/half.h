// Weights and activations as halves, for products by matrix units (device_prefill.py).
//
// Halves, not bfloat16: a weight of 4 to 8 bits is exact to 11 bits of mantissa but not to 8.  Their narrow range is met
// by scaling: a token's activations that reach 2^15 are divided by a power of two, which loses no bit, and its results
// are multiplied by it.
#pragma once
#include "units.h"

struct alignas(16) eight_halves {
    u32 pair[4];
};
DEVICE u32 half_pair(float first, float second) { return to_half(first) | (u32)to_half(second) << 16; }

// y: [rows][columns] halves of a matrix of a quantized type, f16 or bf16.  A thread expands a unit.
// Grid (rows * columns / unit_elements / 256 rounded up).
template <class T>
DEVICE void expand_half(const u8 *weights, u16 *y, int rows, int columns) {
    const int units = columns / T::unit_elements;
    const u64 i = (u64)block_x() * 256 + thread_index();
    if (i >= (u64)rows * units) return;
    const int row = (int)(i / units), unit = (int)(i % units);
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    u16 *out = y + (u64)row * columns;
    typename T::prepared u;
    T::unpack(T::load(weights + row * row_bytes, unit), unit, u);
    if constexpr (T::is_quantized) {
#pragma unroll
        for (int g = 0; g < T::groups; ++g)
#pragma unroll
            for (int j = 0; j < T::group_elements; j += 8) {
                eight_halves h;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    float v[2];
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        const int e = j + 2 * k + b;
                        const float q = (float)(i8)(u.quants[g][e >> 2] >> (8 * (e & 3))) - (float)T::centre;
                        v[b] = T::has_minimum ? fused(u.scale[g], q, -u.minimum[g]) : u.scale[g] * q;
                    }
                    h.pair[k] = half_pair(v[0], v[1]);
                }
                *(eight_halves *)(out + T::element(unit, g) + j) = h;
            }
    } else {
        eight_halves h;
#pragma unroll
        for (int k = 0; k < 4; ++k) h.pair[k] = half_pair(u.value[2 * k], u.value[2 * k + 1]);
        *(eight_halves *)(out + 8 * unit) = h;
    }
}

#define EXPAND_HALF_KERNEL(type)                                                                                      \
    KERNEL(256, expand_half_##type)(const u8 *weights, u16 *y, int rows, int columns) {                               \
        expand_half<type>(weights, y, rows, columns);                                                                 \
    }                                                                                                                 \
    EXPORT_KERNEL(expand_half_##type)
EXPAND_HALF_KERNEL(q4_k)
EXPAND_HALF_KERNEL(q5_k)
EXPAND_HALF_KERNEL(q6_k)
EXPAND_HALF_KERNEL(q8_0)
EXPAND_HALF_KERNEL(f16)
EXPAND_HALF_KERNEL(bf16)

// x: [tokens][columns] floats -> y: as many halves, x / scale[token]; scale is a power of two, 1 for most tokens.
// columns: a multiple of 2.  Grid (tokens).
KERNEL(256, half_rows)(const float *x, u16 *y, float *scale, int columns) {
    __shared__ float parts[8];
    const float *row = x + (u64)block_x() * columns;
    u32 *out = (u32 *)(y + (u64)block_x() * columns);
    float most = 0.f;
    for (int i = thread_index(); i < columns; i += 256) most = larger(most, magnitude(row[i]));
    most = warp_max(most);
    if (lane_index() == 0) parts[warp_index()] = most;
    sync_block();
    for (int i = 0; i < 8; ++i) most = larger(most, parts[i]);
    const int exponent = (int)(as_bits(most) >> 23) - 127, excess = exponent > 14 ? exponent - 14 : 0;
    const float inverse = as_float((u32)(127 - excess) << 23);
    for (int i = thread_index(); i < columns / 2; i += 256)
        out[i] = half_pair(row[2 * i] * inverse, row[2 * i + 1] * inverse);
    if (thread_index() == 0) scale[block_x()] = as_float((u32)(127 + excess) << 23);
}
EXPORT_KERNEL(half_rows)

// y[token] *= scale[token].  Grid (rows / 1024 rounded up, tokens).
KERNEL(256, scale_rows)(float *y, const float *scale, int rows) {
    const float factor = scale[block_y()];
    if (factor == 1.f) return;
    float *row = y + (u64)block_y() * rows;
    for (int i = block_x() * 1024 + thread_index(); i < rows && i < (block_x() + 1) * 1024; i += 256) row[i] *= factor;
}
EXPORT_KERNEL(scale_rows)
