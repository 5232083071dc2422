// Products of many tokens: a block makes 64 rows for up to 32 tokens, so that every weight is read once for all of
// them. Weights are unpacked into shared memory a step of columns at a time.  Each sum is one thread's and runs over
// the columns in their order, so what a token gets does not depend on who else is in the tile.  The sums of 32 (or 16)
// products of bytes are whole numbers: whether matrix units make them or dot4 does, the bits are the same.
#pragma once
#include "experts.h"

#define TILE_THREADS 128
#define TILE_ROWS 64
#define TILE_TOKENS 32
#define TILE_QUANTS 256 // columns of a step of quantized weights: a block of the K types
#define TILE_FLOATS 64 // columns of a step of float weights

#if BYTE_MATRICES && defined(CAN_MULTIPLY_BYTES)
#define HAS_BYTE_MATRICES 1
#else
#define HAS_BYTE_MATRICES 0
#endif

// Up to TILE_TOKENS pairs of one expert: order[first .. first + count).  csrc/gpu/device_experts.h has the same.
struct tile {
    u64 record;
    u32 first, count;
};

// The tile's rows in two runs of 32: where each begins, and how many rows there are; those past the end are the first.
struct tile_rows {
    const u8 *low, *high;
    int count;
    u64 row_bytes;
    DEVICE_MEMBER const u8 *at(int row) const {
        if (row >= count) return low;
        return (row < 32 ? low : high) + (u64)(row & 31) * row_bytes;
    }
};

// Which rows and tokens of the tile a thread sums up, sums[rows][tokens]: the same of every eight tokens, so that eight
// that are not there are left out by all threads.
struct by_threads {
    static const int rows = 4, tokens = 4;
    static DEVICE_MEMBER int row(int r) { return (thread_index() & 15) + 16 * r; }
    static DEVICE_MEMBER int token(int t) { return (thread_index() >> 4) + 8 * t; }
};
// A warp makes 16 rows; as the results of mma.m16n8k32 lie in its lanes (PTX ISA, "Matrix Fragments for mma.m16n8k32").
struct by_matrices {
    static const int rows = 2, tokens = 8;
    static DEVICE_MEMBER int row(int r) { return 16 * warp_index() + (lane_index() >> 2) + 8 * r; }
    static DEVICE_MEMBER int token(int t) { return 2 * (lane_index() & 3) + (t & 1) + 8 * (t >> 1); }
};

// A step of quantized weights and activations.  Where a row's chunk of 16 bytes lies depends on the row, so that what
// eight lanes read or write at once touches every bank once: chunks of the same columns of eight rows; of two rows'
// units of 64 weights, or of one row's of 32.  Rows of scales are 8 bytes longer for the same reason.
struct quantized_step {
#if HAS_BYTE_MATRICES
    typedef by_matrices layout;
#else
    typedef by_threads layout;
#endif
    static const int columns = TILE_QUANTS;
    alignas(16) u32x4 weights[TILE_ROWS][TILE_QUANTS / 16], values[TILE_TOKENS][TILE_QUANTS / 16];
    alignas(8) float scale[TILE_ROWS][2 * TILE_QUANTS / 32 + 2]; // of 32 weights: (scale, minimum), or two scales of 16
    alignas(8) float pair[TILE_TOKENS][2 * TILE_QUANTS / 32 + 2]; // of 32 activations: (d, d * sum)
};
DEVICE int place_of(int row, int chunk) { return chunk ^ (row & 7) ^ (chunk >> 3) * 6; }
struct alignas(8) float_pair {
    float first, second;
};
DEVICE float_pair pair_of(const float *row, int group) { return *(const float_pair *)(row + 2 * group); }
DEVICE u32 word_of(const u32x4 &chunk, int i) { return ((const u32 *)&chunk)[i]; }

// Four numbers of 6 bits as four signed bytes, 32 less each: the sign of the difference is bit 5, flipped.
DEVICE u32 less_32(u32 word) {
    const u32 flipped = word ^ 0x20202020u;
    return flipped | (flipped & 0x20202020u) * 6;
}

// A unit of a row; zeros where the row has ended.
template <class T>
DEVICE void store_unit(quantized_step &s, int row, int unit, int column, const typename T::raw &raw, bool is_there) {
    typename T::prepared u = {};
    if (is_there) T::unpack(raw, unit, u);
#pragma unroll
    for (int g = 0; g < T::groups; ++g) {
        const int element = T::element(unit, g) - column;
#pragma unroll
        for (int j = 0; j < T::group_elements / 16; ++j) {
            u32x4 words = {(u32)u.quants[g][4 * j], (u32)u.quants[g][4 * j + 1], (u32)u.quants[g][4 * j + 2],
                           (u32)u.quants[g][4 * j + 3]};
            if constexpr (T::centre == 32)
                words = {less_32(words.x), less_32(words.y), less_32(words.z), less_32(words.w)};
            s.weights[row][place_of(row, element / 16 + j)] = words;
        }
        if constexpr (T::group_elements == 32)
            *(float_pair *)(s.scale[row] + element / 16) = {u.scale[g], u.minimum[g]};
        else
            s.scale[row][element / 16] = u.scale[g];
    }
}

// Lanes beside each other read units beside each other.
template <class T> DEVICE void load_weights(quantized_step &s, const tile_rows &rows, int column, int columns) {
    const int units = TILE_QUANTS / T::unit_elements, step = TILE_THREADS / units,
              at_once = sizeof(typename T::raw) > 64 ? 1 : 2;
    const int row = thread_index() / units, unit = column / T::unit_elements + thread_index() % units;
    const bool is_there = unit * T::unit_elements < columns;
#pragma unroll 1
    for (int first = row; first < TILE_ROWS; first += step * at_once) {
        typename T::raw raw[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i)
            if (is_there) raw[i] = T::load(rows.at(first + step * i), unit);
#pragma unroll
        for (int i = 0; i < at_once; ++i) store_unit<T>(s, first + step * i, unit, column, raw[i], is_there);
    }
}

// Tokens are loaded and multiplied by eights.
DEVICE int up_to_eight(int count) { return (count + 7) & ~7; }

// token_rows[t]: the activation row of the tile's token t, -1 for none.
DEVICE void load_activations(quantized_step &s, const u8 *x, const int *token_rows, int count, int column,
                             int columns) {
    const int chunks = TILE_QUANTS / 16, quads = chunks / 4, tokens = up_to_eight(count);
#pragma unroll 2
    for (int i = thread_index(); i < tokens * chunks; i += TILE_THREADS) {
        const int t = i / chunks, chunk = i % chunks, row = token_rows[t];
        const u8 *from = x + (u64)row * q8_row_bytes(columns) + column + 16 * chunk;
        s.values[t][place_of(t, chunk)] = row >= 0 && column + 16 * chunk < columns ? fresh16(from) : u32x4{0, 0, 0, 0};
    }
    for (int i = thread_index(); i < tokens * quads; i += TILE_THREADS) {
        const int t = i / quads, j = i % quads, row = token_rows[t];
        const u8 *from = x + (u64)row * q8_row_bytes(columns) + columns + column / 4 + 16 * j;
        u32x4 two = {0, 0, 0, 0}; // pairs; behind a row's last one there may be padding
        if (row >= 0 && column + 64 * j < columns) two = fresh16(from);
        if (column + 64 * j + 32 >= columns) two.z = two.w = 0;
        float_pair *to = (float_pair *)(s.pair[t] + 4 * j);
        to[0] = {as_float(two.x), as_float(two.y)}, to[1] = {as_float(two.z), as_float(two.w)};
    }
}

// What 32 products add to a sum; for types with two scales, twice 16 do.
template <class T>
DEVICE float add_group(const float_pair &row, const float_pair &token, int dot, int high, float sum) {
    sum = fused(row.first * token.first, (float)dot, sum);
    if constexpr (T::group_elements == 16) return fused(row.second * token.first, (float)high, sum);
    if constexpr (T::has_minimum) return fused(-row.second, token.second, sum);
    return sum;
}

#if HAS_BYTE_MATRICES
template <class T> DEVICE void add_step(const quantized_step &s, int count, float (&sums)[2][8]) {
    const int part = lane_index() & 3;
#pragma unroll 2
    for (int g = 0; g < TILE_QUANTS / 32; ++g) {
        u32 low[2], high[2]; // of a row: columns 4 part and 16 + 4 part
        float_pair row[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = by_matrices::row(r);
            low[r] = word_of(s.weights[i][place_of(i, 2 * g)], part);
            high[r] = word_of(s.weights[i][place_of(i, 2 * g + 1)], part);
            row[r] = pair_of(s.scale[i], g);
        }
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; ++n) {
            if (8 * n >= count) break;
            const int i = 8 * n + (lane_index() >> 2);
            const u32 first = word_of(s.values[i][place_of(i, 2 * g)], part);
            const u32 second = word_of(s.values[i][place_of(i, 2 * g + 1)], part);
            int dots[4] = {0, 0, 0, 0}, highs[4] = {0, 0, 0, 0};
            if constexpr (T::group_elements == 16) {
                multiply_bytes_16(low[0], low[1], first, dots);
                multiply_bytes_16(high[0], high[1], second, highs);
            } else {
                multiply_bytes_32(low[0], low[1], high[0], high[1], first, second, dots);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float_pair token = pair_of(s.pair[by_matrices::token(2 * n + j)], g);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float &sum = sums[r][2 * n + j];
                    sum = add_group<T>(row[r], token, dots[2 * r + j], highs[2 * r + j], sum);
                }
            }
        }
    }
}
#else
template <class T> DEVICE void add_step(const quantized_step &s, int count, float (&sums)[4][4]) {
#pragma unroll 1
    for (int g = 0; g < TILE_QUANTS / 32; ++g) {
        u32x4 low[4], high[4];
        float_pair row[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int i = by_threads::row(r);
            low[r] = s.weights[i][place_of(i, 2 * g)], high[r] = s.weights[i][place_of(i, 2 * g + 1)];
            row[r] = pair_of(s.scale[i], g);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (8 * t >= count) break;
            const int i = by_threads::token(t);
            const u32x4 first = s.values[i][place_of(i, 2 * g)], second = s.values[i][place_of(i, 2 * g + 1)];
            const float_pair token = pair_of(s.pair[i], g);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                int dot = dot16(low[r], first, 0), more = 0;
                if constexpr (T::group_elements == 16)
                    more = dot16(high[r], second, 0);
                else
                    dot = dot16(high[r], second, dot);
                sums[r][t] = add_group<T>(row[r], token, dot, more, sums[r][t]);
            }
        }
    }
}
#endif

// A step of float weights and activations, with rows that begin in different banks.
struct float_step {
    typedef by_threads layout;
    static const int columns = TILE_FLOATS;
    quad weights[TILE_ROWS][TILE_FLOATS / 4 + 1], values[TILE_TOKENS][TILE_FLOATS / 4 + 1];
};

template <class T> DEVICE void load_weights(float_step &s, const tile_rows &rows, int column, int columns) {
    const int units = TILE_FLOATS / T::unit_elements;
    for (int i = thread_index(); i < TILE_ROWS * units; i += TILE_THREADS) {
        const int row = i / units, unit = i % units;
        typename T::prepared u = {};
        if (column + unit * T::unit_elements < columns)
            T::unpack(T::load(rows.at(row), column / T::unit_elements + unit), unit, u);
#pragma unroll
        for (int j = 0; j < T::unit_elements / 4; ++j)
            s.weights[row][unit * T::unit_elements / 4 + j] = {u.value[4 * j], u.value[4 * j + 1], u.value[4 * j + 2],
                                                               u.value[4 * j + 3]};
    }
}

DEVICE void load_activations(float_step &s, const u8 *x, const int *token_rows, int count, int column, int columns) {
    const int quads = TILE_FLOATS / 4;
    for (int i = thread_index(); i < up_to_eight(count) * quads; i += TILE_THREADS) {
        const int t = i / quads, j = i % quads, row = token_rows[t];
        const u8 *from = x + 4 * ((u64)row * columns + column + 4 * j);
        const u32x4 v = row >= 0 && column + 4 * j < columns ? fresh16(from) : u32x4{0, 0, 0, 0};
        s.values[t][j] = {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)};
    }
}

template <class T> DEVICE void add_step(const float_step &s, int count, float (&sums)[4][4]) {
    float part[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int t = 0; t < 4; ++t) part[r][t] = 0.f;
#pragma unroll 2
    for (int c = 0; c < TILE_FLOATS / 4; ++c) {
        quad w[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) w[r] = s.weights[by_threads::row(r)][c];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (8 * t >= count) break;
            const quad v = s.values[by_threads::token(t)][c];
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int j = 0; j < 4; ++j) part[r][t] = fused(w[r].v[j], v.v[j], part[r][t]);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int t = 0; t < 4; ++t) sums[r][t] += part[r][t];
}

template <bool IS_QUANTIZED> struct step_of {
    typedef quantized_step type;
};
template <> struct step_of<false> {
    typedef float_step type;
};

// A tile's sums of weights of a type.
template <class T> struct tile_sums {
    typedef typename step_of<T::is_quantized>::type step;
    typedef typename step::layout layout;
    float of[layout::rows][layout::tokens];
};

// All sums of the tile's first `count` tokens.  s, token_rows: in shared memory.  A whole block calls it.
template <class T>
DEVICE void multiply_tile(typename tile_sums<T>::step &s, const tile_rows &rows, const u8 *x, const int *token_rows,
                          int count, int columns, tile_sums<T> &sums) {
    typedef typename tile_sums<T>::layout layout;
#pragma unroll
    for (int r = 0; r < layout::rows; ++r)
#pragma unroll
        for (int t = 0; t < layout::tokens; ++t) sums.of[r][t] = 0.f;
    for (int column = 0; column < columns; column += tile_sums<T>::step::columns) {
        sync_block(); // the last step has been used, and token_rows are there
        load_weights<T>(s, rows, column, columns);
        load_activations(s, x, token_rows, count, column, columns);
        sync_block();
        add_step<T>(s, count, sums.of);
    }
}

template <class T> DEVICE tile_rows rows_from(const u8 *weights, int first, int rows, int columns) {
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u8 *low = weights + first * row_bytes;
    return {low, low + 32 * row_bytes, rows - first, row_bytes};
}

// y[token_rows[t]][first + row] for what is there of `count` rows; y's own are `rows` long.
template <class T>
DEVICE void store_sums(const tile_sums<T> &sums, float *y, const int *token_rows, int first, int count, int rows) {
    typedef typename tile_sums<T>::layout layout;
#pragma unroll
    for (int r = 0; r < layout::rows; ++r) {
        const int row = first + layout::row(r);
        if (row >= count) break;
#pragma unroll
        for (int t = 0; t < layout::tokens; ++t) {
            const int out = token_rows[layout::token(t)];
            if (out >= 0) y[(u64)out * rows + row] = sums.of[r][t];
        }
    }
}

// The pairs of a tile, -1 past its end.
DEVICE void load_pairs(const tile &t, const int *order, int *pairs) {
    if (thread_index() < TILE_TOKENS)
        pairs[thread_index()] = (u32)thread_index() < t.count ? order[t.first + thread_index()] : -1;
}

// y[token][row] = weights[row] . x[token].  Grid (rows / 64 up, tokens / 32 up).
template <class T> DEVICE void multiply(const u8 *weights, const u8 *x, float *y, int rows, int columns, int tokens) {
    __shared__ int token_rows[TILE_TOKENS];
    const int first = TILE_ROWS * block_x(), token = TILE_TOKENS * block_y() + thread_index();
    const int left = tokens - TILE_TOKENS * block_y(), count = left < TILE_TOKENS ? left : TILE_TOKENS;
    if (thread_index() < TILE_TOKENS) token_rows[thread_index()] = token < tokens ? token : -1;
    __shared__ typename tile_sums<T>::step s;
    tile_sums<T> sums;
    multiply_tile<T>(s, rows_from<T>(weights, first, rows, columns), x, token_rows, count, columns, sums);
    store_sums(sums, y, token_rows, first, rows, rows);
}

// hidden[pair] = Q8(silu(gate x) * (up x)), or what else the form says, x the pair's token; as floats too where
// hidden_floats is given.  first: as in experts.h.
// Grid (own rows / 32, tiles).
template <class T>
DEVICE void group_gate_up(const tile *tiles, const int *order, u64 gate_offset, u64 up_offset, const u8 *x, u8 *hidden,
                          float *hidden_floats, int rows, int columns, int picks, const expert_form *form, int first) {
    __shared__ int pairs[TILE_TOKENS], token_rows[TILE_TOKENS];
    __shared__ union {
        typename tile_sums<T>::step step;
        float products[TILE_TOKENS][TILE_ROWS]; // gate's, then up's
    } s;
    const tile t = tiles[block_y()];
    load_pairs(t, order, pairs);
    if (thread_index() < TILE_TOKENS)
        token_rows[thread_index()] = pairs[thread_index()] >= 0 ? pairs[thread_index()] / picks : -1;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
    const u8 *rows_here = (const u8 *)t.record + 32 * block_x() * row_bytes;
    const tile_rows r = {rows_here + gate_offset, rows_here + up_offset, TILE_ROWS, row_bytes};
    typedef typename tile_sums<T>::layout layout;
    tile_sums<T> sums;
    multiply_tile<T>(s.step, r, x, token_rows, t.count, columns, sums);
    sync_block(); // the last step has been used
#pragma unroll
    for (int i = 0; i < layout::rows; ++i)
#pragma unroll
        for (int j = 0; j < layout::tokens; ++j) s.products[layout::token(j)][layout::row(i)] = sums.of[i][j];
    sync_block();
    for (int i = warp_index(); i < TILE_TOKENS; i += TILE_THREADS / 32) {
        if (pairs[i] < 0) break;
        const int lane = lane_index(), row = first + 32 * block_x() + lane;
        const float value = hidden_of(form, s.products[i][lane], s.products[i][32 + lane], pairs[i], row, rows);
        if (hidden_floats) hidden_floats[(u64)pairs[i] * rows + row] = value;
        store_q8_group(value, hidden + pairs[i] * q8_row_bytes(rows), rows, first / 32 + block_x());
    }
}

// out[pair][first + row] = down[row] . hidden[pair] for `count` rows: a device's share of `rows`.
// Grid (count / 64 up, tiles).
template <class T>
DEVICE void group_down(const tile *tiles, const int *order, u64 down_offset, const u8 *hidden, float *out, int rows,
                       int columns, int first, int count) {
    __shared__ int pairs[TILE_TOKENS];
    const int begin = TILE_ROWS * block_x();
    const tile t = tiles[block_y()];
    load_pairs(t, order, pairs);
    const tile_rows r = rows_from<T>((const u8 *)t.record + down_offset, begin, count, columns);
    __shared__ typename tile_sums<T>::step s;
    tile_sums<T> sums;
    multiply_tile<T>(s, r, hidden, pairs, t.count, columns, sums);
    store_sums(sums, out + first, pairs, begin, count, rows);
}

// y[token] = sum over ranks, in order, of weight * (out[pair] [+ bias]), + sigmoid(shared_gate) * shared where a shared
// expert is given: columns first .. first + count.  Grid (count / 256 up, tokens).
KERNEL(256, combine_picks)
(const float *out, const float *weights, const float *shared_output, const float *shared_gate, float *y, int columns,
 int picks, const expert_form *form, int first, int count) {
    start_kernel();
    const int column = first + block_x() * 256 + thread_index(), token = block_y();
    if (column >= first + count) return;
    const float *bias = form ? form->down_bias : (const float *)0;
    float sum = 0.f;
    for (int rank = 0; rank < picks; ++rank) {
        const int pair = token * picks + rank;
        const float more = bias ? bias[(u64)form->ids[pair] * columns + column] : 0.f;
        sum = fused(weights[pair], out[(u64)pair * columns + column] + more, sum);
    }
    const u64 i = (u64)token * columns + column;
    y[i] = shared_output ? fused(shared_gate ? sigmoid(shared_gate[token]) : 1.f, shared_output[i], sum) : sum;
}
EXPORT_KERNEL(combine_picks)

#define MAT_MUL_KERNEL(type)                                                                                         \
    RESIDENT_KERNEL(TILE_THREADS, TILE_RESIDENT, mat_mul_##type)(const u8 *weights, const u8 *x, float *y, int rows, \
                                                                 int columns, int tokens) {                          \
        start_kernel();                                                                                              \
        multiply<type>(weights, x, y, rows, columns, tokens);                                                        \
    }                                                                                                                \
    EXPORT_KERNEL(mat_mul_##type)

#define TILE_KERNELS(type)                                                                                        \
    MAT_MUL_KERNEL(type)                                                                                          \
    RESIDENT_KERNEL(TILE_THREADS, TILE_RESIDENT, group_gate_up_##type)                                            \
    (const tile *tiles, const int *order, u64 gate_offset, u64 up_offset, const u8 *x, u8 *hidden,                \
     float *hidden_floats, int rows, int columns, int picks, const expert_form *form, int first) {                \
        start_kernel();                                                                                           \
        group_gate_up<type>(tiles, order, gate_offset, up_offset, x, hidden, hidden_floats, rows, columns, picks, \
                            form, first);                                                                         \
    }                                                                                                             \
    EXPORT_KERNEL(group_gate_up_##type)                                                                           \
    RESIDENT_KERNEL(TILE_THREADS, TILE_RESIDENT, group_down_##type)                                               \
    (const tile *tiles, const int *order, u64 down_offset, const u8 *hidden, float *out, int rows, int columns,   \
     int first, int count) {                                                                                      \
        start_kernel();                                                                                           \
        group_down<type>(tiles, order, down_offset, hidden, out, rows, columns, first, count);                    \
    }                                                                                                             \
    EXPORT_KERNEL(group_down_##type)

TILE_KERNELS(q4_k)
MAT_MUL_KERNEL(q4_k_planes)
TILE_KERNELS(q5_k)
TILE_KERNELS(q6_k)
MAT_MUL_KERNEL(q6_k_planes)
TILE_KERNELS(q8_0)
MAT_MUL_KERNEL(q8_0_planes)
TILE_KERNELS(mxfp4)
TILE_KERNELS(f16)
TILE_KERNELS(bf16)
TILE_KERNELS(f32)
