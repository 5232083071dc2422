// y = W x.  A warp computes ROWS rows at once (they share the activations, and their loads fly together).
#pragma once
#include "activations.h"
#include "tuning.h"
#include "units.h"

template <class T> DEVICE u64 activation_row_bytes(int columns) {
    return T::is_quantized ? q8_row_bytes(columns) : 4 * (u64)columns;
}

// sums[r] += the lane's unit of row r . its activations.
template <class T, int ROWS>
DEVICE void add_units(const typename T::raw (&raw)[ROWS], int unit, const u8 *x, int columns, float (&sums)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        typename T::prepared u;
        T::unpack(raw[r], unit, u);
        sums[r] = add_unit<T>(u, unit, x, columns, sums[r]);
    }
}

// sums[r] += this lane's share of row r . x, units first, first + step, ...  rows[r]: where each row begins.
template <class T, int ROWS, class L = settled>
DEVICE void dot_rows(const u8 *const (&rows)[ROWS], const u8 *x, int columns, int first, int step,
                     float (&sums)[ROWS]) {
    const int units = columns / T::unit_elements;
#pragma unroll ROWS> 2 ? 1 : ROWS> 1 ? L::unrolled_pairs : 4
    for (int unit = first; unit < units; unit += step) {
        typename T::raw raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) raw[r] = T::template load<L>(rows[r], unit);
        add_units<T, ROWS>(raw, unit, x, columns, sums);
    }
}

// x: [tokens] Q8 rows (quantized weights) or float rows; y: [tokens][rows].  `split` warps (a divisor of MAT_VEC_WARPS)
// share the columns of a row, so that few or long rows still fill the device.  It starts the kernel: the weights are
// constants of the model, so a warp asks for its rows while the kernel ahead makes x.
template <class T, int ROWS>
DEVICE void mat_vec(const u8 *weights, const u8 *x, float *y, int rows, int columns, int split, int block) {
    __shared__ float parts[MAT_VEC_WARPS][ROWS];
    const int part = warp_index() % split, token = block_y();
    const int row = (block * (MAT_VEC_WARPS / split) + warp_index() / split) * ROWS;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    if (PREFETCH_BYTES && part == 0 && lane_index() < ROWS && row + lane_index() < rows)
        prefetch(weights + (u64)(row + lane_index()) * row_bytes,
                 row_bytes < PREFETCH_BYTES ? row_bytes : PREFETCH_BYTES);
    start_kernel();
    const u8 *row_data[ROWS];
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        row_data[r] = weights + (u64)(row + r < rows ? row + r : rows - 1) * row_bytes;
        sums[r] = 0.f;
    }
    x += token * activation_row_bytes<T>(columns);
    dot_rows<T, ROWS>(row_data, x, columns, 32 * part + lane_index(), 32 * split, sums);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = warp_sum(sums[r]);
        if (lane_index() == 0) parts[warp_index()][r] = sums[r];
    }
    if (split > 1) sync_block();
    if (part > 0 || lane_index() > 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = sums[r];
        for (int p = 1; p < split; ++p) sum += parts[warp_index() + p][r];
        if (row + r < rows) y[(u64)token * rows + row + r] = sum;
    }
}

// Up to four matrices of one format that read the same x, in one launch: the blocks of the first come first.
// Unused ones have no rows.  Grid (blocks of all, tokens).
#define MAT_VEC_MANY 4
template <class T, int ROWS>
DEVICE void mat_vec_many(const u8 *const (&weights)[MAT_VEC_MANY], float *const (&y)[MAT_VEC_MANY],
                         const int (&rows)[MAT_VEC_MANY], const u8 *x, int columns, int split) {
    const int rows_of_block = MAT_VEC_WARPS / split * ROWS;
    const u8 *w = weights[0];
    float *out = y[0];
    int count = rows[0], block = block_x(), start = 0;
#pragma unroll
    for (int i = 0; i < MAT_VEC_MANY; ++i) {
        if (block_x() >= start) w = weights[i], out = y[i], count = rows[i], block = block_x() - start;
        start += (rows[i] + rows_of_block - 1) / rows_of_block;
        if (block_x() < start) break;
    }
    mat_vec<T, ROWS>(w, x, out, count, columns, split, block);
}

// ids: the rows to expand, one a token (null: row 0, 1, ...).  y: [tokens][columns].  Grid (columns / 1024 up, tokens).
template <class T> DEVICE void expand(const u8 *weights, const int *ids, float *y, int columns) {
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

#define PRODUCT_KERNELS(type)                                                                                       \
    KERNEL(32 * MAT_VEC_WARPS, mat_vec_##type)                                                                      \
    (const u8 *weights, const u8 *x, float *y, int rows, int columns, int split) {                                  \
        mat_vec<type, type::is_quantized ? MAT_VEC_ROWS : 1>(weights, x, y, rows, columns, split, block_x());       \
    }                                                                                                               \
    EXPORT_KERNEL(mat_vec_##type)                                                                                   \
    KERNEL(32 * MAT_VEC_WARPS, mat_vec_many_##type)                                                                 \
    (const u8 *w0, const u8 *w1, const u8 *w2, const u8 *w3, float *y0, float *y1, float *y2, float *y3, int rows0, \
     int rows1, int rows2, int rows3, const u8 *x, int columns, int split) {                                        \
        mat_vec_many<type, type::is_quantized ? MAT_VEC_ROWS : 1>({w0, w1, w2, w3}, {y0, y1, y2, y3},               \
                                                                  {rows0, rows1, rows2, rows3}, x, columns, split); \
    }                                                                                                               \
    EXPORT_KERNEL(mat_vec_many_##type)

#define MAT_VEC_KERNELS(type)                                                             \
    PRODUCT_KERNELS(type)                                                                 \
    KERNEL(32, expand_##type)(const u8 *weights, const int *ids, float *y, int columns) { \
        start_kernel();                                                                   \
        expand<type>(weights, ids, y, columns);                                           \
    }                                                                                     \
    EXPORT_KERNEL(expand_##type)

MAT_VEC_KERNELS(q4_k)
PRODUCT_KERNELS(q4_k_planes)
MAT_VEC_KERNELS(q5_k)
MAT_VEC_KERNELS(q6_k)
PRODUCT_KERNELS(q6_k_planes)
MAT_VEC_KERNELS(q8_0)
PRODUCT_KERNELS(q8_0_planes)
MAT_VEC_KERNELS(mxfp4)
MAT_VEC_KERNELS(f16)
MAT_VEC_KERNELS(bf16)
MAT_VEC_KERNELS(f32)
