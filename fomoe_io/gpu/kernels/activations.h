// Activations for integer dot products: a Q8 row is `columns` signed bytes followed by a (d, d * sum of the bytes)
// float pair for every 32 of them, padded to 16 bytes.  Quantized once, read by every matrix that takes the vector.
#pragma once
#include "prelude.h"

DEVICE u64 q8_row_bytes(int columns) { return ((u64)columns + columns / 4 + 15) & ~15ull; }

// One warp, one group of 32: lane i holds element i.
DEVICE void store_q8_group(float value, u8 *row, int columns, int group) {
    const float most = warp_max(magnitude(value));
    const float d = most / 127.f;
    const int q = most > 0.f ? (int)nearest(value / d) : 0;
    const int total = warp_sum_int(q);
    row[32 * group + lane_index()] = (u8)(i8)q;
    if (lane_index() == 0) {
        float *pair = (float *)(row + columns) + 2 * group;
        pair[0] = d;
        pair[1] = d * (float)total;
    }
}

// Four floats at a 16-byte boundary.
struct alignas(16) quad {
    float v[4];
};

// Four weights, which no kernel writes: they may be asked for before start_kernel().
DEVICE quad constant_quad(const float *p) {
    const u32x4 v = load16(p);
    return {{as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)}};
}

// As store_q8_group, for eight neighbouring lanes that hold four elements each, the first at `first`.
DEVICE void store_q8_quad(const quad &value, u8 *row, int columns, int first) {
    float most = 0.f;
    for (int i = 0; i < 4; ++i) most = larger(most, magnitude(value.v[i]));
    most = larger(most, exchange_float<4>(most));
    most = larger(most, exchange_float<2>(most));
    most = larger(most, exchange_float<1>(most));
    const float d = most / 127.f;
    int total = 0;
    u32 bytes = 0;
    for (int i = 0; i < 4; ++i) {
        const int q = most > 0.f ? (int)nearest(value.v[i] / d) : 0;
        total += q;
        bytes |= (u32)(u8)(i8)q << (8 * i);
    }
    total += (int)exchange<4>((u32)total);
    total += (int)exchange<2>((u32)total);
    total += (int)exchange<1>((u32)total);
    if (first >= columns) return;
    *(u32 *)(row + first) = bytes;
    if (lane_index() % 8 == 0) {
        float *pair = (float *)(row + columns) + first / 16;
        pair[0] = d;
        pair[1] = d * (float)total;
    }
}

// x: [tokens][columns] floats -> q8: [tokens] Q8 rows.  Grid (columns / 256 rounded up, tokens).
KERNEL(256, quantize_q8)(const float *x, u8 *q8, int columns) {
    start_kernel();
    const int group = block_x() * 8 + warp_index(), token = block_y();
    if (group >= columns / 32) return;
    store_q8_group(x[(u64)token * columns + 32 * group + lane_index()], q8 + token * q8_row_bytes(columns), columns,
                   group);
}
EXPORT_KERNEL(quantize_q8)

// y = silu(gate) * up as floats (y may be null) and as Q8 rows.  Grid as above.
KERNEL(256, silu_mul)(const float *gate, const float *up, float *y, u8 *q8, int columns) {
    start_kernel();
    const int group = block_x() * 8 + warp_index(), token = block_y();
    if (group >= columns / 32) return;
    const u64 i = (u64)token * columns + 32 * group + lane_index();
    const float value = silu(gate[i]) * up[i];
    if (y) y[i] = value;
    store_q8_group(value, q8 + token * q8_row_bytes(columns), columns, group);
}
EXPORT_KERNEL(silu_mul)
