// All chosen experts of a layer in two launches.  A pair is (token, rank of the pick): pair = token * picks + rank.
// records[pair]: where the expert's record lies on the device, 0 when it is not there (yet).
#pragma once
#include "mat_vec.h"

// hidden[pair] = Q8(silu(gate x) * (up x)).  A block makes 32 of the pair's `rows` values: one Q8 group, so nothing
// but the quantized result leaves it.  A pair whose record is 0 is left alone: another launch will do it.
// x: [tokens] Q8 or float rows; hidden: [pairs] Q8 rows.  Grid (rows / 32, pairs).
template <class T>
DEVICE void gate_up(const u64 *records, u64 gate_offset, u64 up_offset, const u8 *x, u8 *hidden, float *hidden_floats,
                    int rows, int columns, int picks) {
    const int ROWS = 32 / GATE_UP_WARPS;
    __shared__ float values[32];
    const int pair = block_y(), first = 32 * block_x() + warp_index() * ROWS;
    const u8 *record = (const u8 *)records[pair];
    if (!record) return;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u8 *row_data[2 * ROWS];
    const u32 token[1] = {0};
    float sums[2 * ROWS][1];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        row_data[2 * r] = record + gate_offset + (u64)(first + r) * row_bytes;
        row_data[2 * r + 1] = record + up_offset + (u64)(first + r) * row_bytes;
        sums[2 * r][0] = sums[2 * r + 1][0] = 0.f;
    }
    x += (u64)(pair / picks) * activation_row_bytes<T>(columns);
    dot_rows<T, 2 * ROWS, 1>(row_data, x, token, columns, sums);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float gate = warp_sum(sums[2 * r][0]), up = warp_sum(sums[2 * r + 1][0]);
        if (lane_index() == 0) values[warp_index() * ROWS + r] = silu(gate) * up;
    }
    sync_block();
    if (warp_index() > 0) return;
    const float value = values[lane_index()];
    if (hidden_floats) hidden_floats[(u64)pair * rows + 32 * block_x() + lane_index()] = value;
    store_q8_group(value, hidden + pair * q8_row_bytes(rows), rows, block_x());
}

// y[token] = sum over ranks, in the router's order, of weight * (down hidden), + sigmoid(shared_gate) * shared where
// a shared expert is given.  The record of a pair is records[pair], or late[pair] where that is 0: what is summed,
// and in which order, does not depend on which came late.  A record found in neither gives NaN, never silence.
// hidden: [pairs] Q8 rows (float rows for float weights); y, shared: [tokens][rows].
// Grid (rows / (DOWN_WARPS * DOWN_ROWS) up, tokens).
template <class T>
DEVICE void down(const u64 *records, const u64 *late, u64 down_offset, const u8 *hidden, const float *weights,
                 const float *shared_output, const float *shared_gate, float *y, int rows, int columns, int picks) {
    const int row = (block_x() * DOWN_WARPS + warp_index()) * DOWN_ROWS, token = block_y();
    if (row >= rows) return;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u64 x_bytes = activation_row_bytes<T>(columns);
    const int units = columns / T::unit_elements;
    float total[DOWN_ROWS];
    u64 offset[DOWN_ROWS];
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) {
        total[r] = 0.f;
        offset[r] = down_offset + (u64)(row + r < rows ? row + r : rows - 1) * row_bytes;
    }
    for (int rank = 0; rank < picks; rank += DOWN_BATCH) {
        const u8 *record[DOWN_BATCH], *x[DOWN_BATCH];
        float sums[DOWN_BATCH][DOWN_ROWS];
#pragma unroll
        for (int b = 0; b < DOWN_BATCH; ++b) {
            const int pair = token * picks + (rank + b < picks ? rank + b : picks - 1);
            const u64 here = records[pair];
            record[b] = (const u8 *)(here ? here : late ? late[pair] : 0);
            x[b] = hidden + pair * x_bytes;
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; ++r) sums[b][r] = 0.f;
        }
        for (int unit = lane_index(); unit < units; unit += 32) {
            typename T::raw raw[DOWN_BATCH][DOWN_ROWS];
#pragma unroll
            for (int b = 0; b < DOWN_BATCH; ++b)
                if (record[b])
#pragma unroll
                    for (int r = 0; r < DOWN_ROWS; ++r) raw[b][r] = T::load(record[b] + offset[r], unit);
#pragma unroll
            for (int b = 0; b < DOWN_BATCH; ++b)
                if (record[b])
#pragma unroll
                    for (int r = 0; r < DOWN_ROWS; ++r) {
                        typename T::prepared u;
                        T::unpack(raw[b][r], unit, u);
                        sums[b][r] = add_unit<T>(u, unit, x[b], columns, sums[b][r]);
                    }
        }
#pragma unroll
        for (int b = 0; b < DOWN_BATCH; ++b) {
            if (rank + b >= picks) break;
            const float weight = record[b] ? weights[token * picks + rank + b] : not_a_number();
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; ++r) total[r] = fused(weight, warp_sum(sums[b][r]), total[r]);
        }
    }
    if (lane_index() > 0) return;
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) {
        if (row + r >= rows) break;
        const u64 i = (u64)token * rows + row + r;
        y[i] = shared_output ? fused(shared_gate ? sigmoid(shared_gate[token]) : 1.f, shared_output[i], total[r])
                             : total[r];
    }
}

#define EXPERT_KERNELS(type)                                                                                          \
    KERNEL(32 * GATE_UP_WARPS, experts_gate_up_##type)                                                                 \
    (const u64 *records, u64 gate_offset, u64 up_offset, const u8 *x, u8 *hidden, float *hidden_floats, int rows,     \
     int columns, int picks) {                                                                                        \
        gate_up<type>(records, gate_offset, up_offset, x, hidden, hidden_floats, rows, columns, picks);               \
    }                                                                                                                 \
    EXPORT_KERNEL(experts_gate_up_##type)                                                                             \
    KERNEL(32 * DOWN_WARPS, experts_down_##type)                                                                      \
    (const u64 *records, const u64 *late, u64 down_offset, const u8 *hidden, const float *weights,                    \
     const float *shared_output, const float *shared_gate, float *y, int rows, int columns, int picks) {              \
        down<type>(records, late, down_offset, hidden, weights, shared_output, shared_gate, y, rows, columns, picks); \
    }                                                                                                                 \
    EXPORT_KERNEL(experts_down_##type)

EXPERT_KERNELS(q4_k)
EXPERT_KERNELS(q5_k)
EXPERT_KERNELS(q6_k)
EXPERT_KERNELS(q8_0)
EXPERT_KERNELS(f16)
EXPERT_KERNELS(bf16)
EXPERT_KERNELS(f32)
