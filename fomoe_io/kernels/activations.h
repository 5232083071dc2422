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

// x: [tokens][columns] floats -> q8: [tokens] Q8 rows.  Grid (columns / 256 rounded up, tokens).
KERNEL(256, quantize_q8)(const float *x, u8 *q8, int columns) {
    const int group = block_x() * 8 + warp_index(), token = block_y();
    if (group >= columns / 32) return;
    store_q8_group(x[(u64)token * columns + 32 * group + lane_index()], q8 + token * q8_row_bytes(columns), columns,
                   group);
}
EXPORT_KERNEL(quantize_q8)

// y = silu(gate) * up as floats (y may be null) and as Q8 rows.  Grid as above.
KERNEL(256, silu_mul)(const float *gate, const float *up, float *y, u8 *q8, int columns) {
    const int group = block_x() * 8 + warp_index(), token = block_y();
    if (group >= columns / 32) return;
    const u64 i = (u64)token * columns + 32 * group + lane_index();
    const float value = silu(gate[i]) * up[i];
    if (y) y[i] = value;
    store_q8_group(value, q8 + token * q8_row_bytes(columns), columns, group);
}
EXPORT_KERNEL(silu_mul)
