// y = W x.  A warp computes ROWS rows at once (they share the activations, and their loads fly together).
#pragma once
#include "activations.h"
#include "tuning.h"
#include "units.h"

template <class T>
DEVICE u64 activation_row_bytes(int columns) {
    return T::is_quantized ? q8_row_bytes(columns) : 4 * (u64)columns;
}

// sums[r][t] += this lane's share of row r . token t, units first, first + step, ...
// rows[r]: where each row begins; x + token[t]: each token.  (Offsets, not pointers: eight pointers are more than the
// scalar registers of an AMD wave hold.)
template <class T, int ROWS, int TOKENS>
DEVICE void dot_rows(const u8 *const (&rows)[ROWS], const u8 *x, const u32 (&token)[TOKENS], int columns, int first,
                     int step, float (&sums)[ROWS][TOKENS]) {
    const int units = columns / T::unit_elements;
#pragma unroll ROWS * TOKENS > 2 ? 1 : 2
    for (int unit = first; unit < units; unit += step) {
        typename T::raw raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) raw[r] = T::load(rows[r], unit);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            typename T::prepared u;
            T::unpack(raw[r], unit, u);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) sums[r][t] = add_unit<T>(u, unit, x + token[t], columns, sums[r][t]);
        }
    }
}

// x: [tokens] Q8 rows (quantized weights) or float rows; y: [tokens][rows].  `split` warps (a divisor of MAT_VEC_WARPS)
// share the columns of a row, so that few or long rows still fill the device.
template <class T, int ROWS, int TOKENS>
DEVICE void mat_vec(const u8 *weights, const u8 *x, float *y, int rows, int columns, int tokens, int split) {
    __shared__ float parts[MAT_VEC_WARPS][ROWS][TOKENS];
    const int part = warp_index() % split, first = block_y() * TOKENS;
    const int row = (block_x() * (MAT_VEC_WARPS / split) + warp_index() / split) * ROWS;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u64 x_bytes = activation_row_bytes<T>(columns);
    const u8 *row_data[ROWS];
    u32 token[TOKENS];
    float sums[ROWS][TOKENS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) row_data[r] = weights + (u64)(row + r < rows ? row + r : rows - 1) * row_bytes;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) token[t] = first + t < tokens ? t * (u32)x_bytes : 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = 0.f;
    x += first * x_bytes;
    dot_rows<T, ROWS, TOKENS>(row_data, x, token, columns, 32 * part + lane_index(), 32 * split, sums);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            sums[r][t] = warp_sum(sums[r][t]);
            if (lane_index() == 0) parts[warp_index()][r][t] = sums[r][t];
        }
    if (split > 1) sync_block();
    if (part > 0 || lane_index() > 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float sum = sums[r][t];
            for (int p = 1; p < split; ++p) sum += parts[warp_index() + p][r][t];
            if (row + r < rows && first + t < tokens) y[(u64)(first + t) * rows + row + r] = sum;
        }
}

// ids: the rows to expand, one a token (null: row 0, 1, ...).  y: [tokens][columns].  Grid (columns / 1024 up, tokens).
template <class T>
DEVICE void expand(const u8 *weights, const int *ids, float *y, int columns) {
    const int token = block_y(), share = 1024 / T::unit_elements;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u8 *row = weights + (u64)(ids ? ids[token] : token) * row_bytes;
    for (int i = thread_index(); i < share; i += 32) {
        const int unit = block_x() * share + i;
        if (unit >= columns / T::unit_elements) return;
        typename T::prepared u;
        T::unpack(T::load(row, unit), unit, u);
        expand_unit<T>(u, unit, y + (u64)token * columns);
    }
}

#define MAT_VEC_KERNELS(type)                                                                                         \
    KERNEL(32 * MAT_VEC_WARPS, mat_vec_##type)                                                                        \
    (const u8 *weights, const u8 *x, float *y, int rows, int columns, int tokens, int split) {                        \
        mat_vec<type, type::is_quantized ? MAT_VEC_ROWS : 1, 1>(weights, x, y, rows, columns, tokens, split);         \
    }                                                                                                                 \
    EXPORT_KERNEL(mat_vec_##type)                                                                                     \
    RESIDENT_KERNEL(32 * MAT_VEC_WARPS, 1, mat_mul_##type)                                                            \
    (const u8 *weights, const u8 *x, float *y, int rows, int columns, int tokens, int split) {                        \
        mat_vec<type, 1, MAT_MUL_TOKENS>(weights, x, y, rows, columns, tokens, split);                                \
    }                                                                                                                 \
    EXPORT_KERNEL(mat_mul_##type)                                                                                     \
    KERNEL(32, expand_##type)(const u8 *weights, const int *ids, float *y, int columns) {                             \
        expand<type>(weights, ids, y, columns);                                                                       \
    }                                                                                                                 \
    EXPORT_KERNEL(expand_##type)

MAT_VEC_KERNELS(q4_k)
MAT_VEC_KERNELS(q5_k)
MAT_VEC_KERNELS(q6_k)
MAT_VEC_KERNELS(q8_0)
MAT_VEC_KERNELS(f16)
MAT_VEC_KERNELS(bf16)
MAT_VEC_KERNELS(f32)
