// Weights and activations as halves, for products by matrix units (fomoe_io/gpu/products.py).
//
// Halves, not bfloat16: a weight of 4 to 8 bits is exact to 11 bits of mantissa but not to 8.
#pragma once
#include "activations.h"
#include "units.h"

struct alignas(16) eight_halves {
    u32 pair[4];
};
struct alignas(8) four_halves {
    u32 pair[2];
};
DEVICE u32 half_pair(float first, float second) { return to_half(first) | (u32)to_half(second) << 16; }

// Where eight halves wait in shared memory: neighbouring units, 64 or 128 bytes apart, would meet in the same banks.
DEVICE int staged_place(int i) { return i ^ ((i >> 3) & 7); }

template <class T> DEVICE void stage_unit(const u8 *weights, int unit, eight_halves *staged) {
    typename T::prepared u;
    T::unpack(T::load(weights, unit), unit, u);
#pragma unroll
    for (int g = 0; g < T::groups; ++g)
#pragma unroll
        for (int j = 0; j < T::group_elements; j += 8) {
            float value[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float q = (float)(i8)(u.quants[g][(j + k) >> 2] >> (8 * (k & 3))) - (float)T::centre;
                value[k] = fused(u.scale[g], q, -u.minimum[g]);
            }
            eight_halves h;
#pragma unroll
            for (int k = 0; k < 4; ++k) h.pair[k] = half_pair(value[2 * k], value[2 * k + 1]);
            staged[staged_place((T::element(unit, g) + j) / 8)] = h;
        }
}

// Whole rows, one after another, as halves: `elements` of them.  A thread unpacks a unit; neighbouring lanes write
// neighbouring 16 bytes.  Grid (elements / unit_elements / 256 rounded up).
template <class T> DEVICE void expand_half(const u8 *weights, eight_halves *y, u64 elements) {
    const int share = T::unit_elements / 8;
    __shared__ eight_halves staged[256 * share];
    const u64 first = (u64)block_x() * 256 * T::unit_elements;
    const u64 left = (elements - first) / T::unit_elements;
    const int units = left < 256 ? (int)left : 256;
    weights += first / T::block_elements * T::block_bytes;
    if (thread_index() < units) stage_unit<T>(weights, thread_index(), staged);
    sync_block();
    y += first / 8;
    for (int i = thread_index(); i < units * share; i += 256) y[i] = staged[staged_place(i)];
}

#define EXPAND_HALF_KERNEL(type)                                                \
    KERNEL(256, expand_half_##type)(const u8 *weights, void *y, u64 elements) { \
        start_kernel();                                                         \
        expand_half<type>(weights, (eight_halves *)y, elements);                \
    }                                                                           \
    EXPORT_KERNEL(expand_half_##type)
EXPAND_HALF_KERNEL(q4_k)
EXPAND_HALF_KERNEL(q4_k_planes)
EXPAND_HALF_KERNEL(q5_k)
EXPAND_HALF_KERNEL(q6_k)
EXPAND_HALF_KERNEL(q6_k_planes)
EXPAND_HALF_KERNEL(q8_0)
EXPAND_HALF_KERNEL(q8_0_planes)

// What is finite stays so; infinities and NaN stay what they are, to be seen in the result.
DEVICE float clamp_to_half(float v) {
    const float most = 65504.f;
    if (!(magnitude(v) < infinity())) return v;
    return v > most ? most : v < -most ? -most : v;
}

// y = x as halves.  elements: a multiple of 4.  Grid (elements / 1024 rounded up).
KERNEL(256, to_halves)(const float *x, void *y, u64 elements) {
    start_kernel();
    const u64 i = (u64)block_x() * 256 + thread_index();
    if (4 * i >= elements) return;
    const quad v = ((const quad *)x)[i];
    four_halves h;
#pragma unroll
    for (int k = 0; k < 2; ++k) h.pair[k] = half_pair(clamp_to_half(v.v[2 * k]), clamp_to_half(v.v[2 * k + 1]));
    ((four_halves *)y)[i] = h;
}
EXPORT_KERNEL(to_halves)
