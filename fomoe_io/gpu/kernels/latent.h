// Attention over latents (deepseek2's MLA), as csrc/cpu/latent.c has it: the keys and values of all heads are one row a
// position, a key that turns and then the latent, and each head's matrices are multiplied with its query and its sum.
#pragma once
#include "attention.h"
#include "tile.h"

#define LATENT_HEADS 16 // of a block: two a warp
#define LATENT_SPLIT 128 // positions of a block
#define LATENT_TILE 32 // positions in shared memory at once
#define LATENT_CHUNK 128 // columns in shared memory at once

// Neighbouring columns are a pair; what they become stands half a row apart.
template <class CACHE>
DEVICE void turn_neighbours(const float *x, const float *cos_sin, typename CACHE::element *y, int rotated) {
    const int half = rotated / 2;
    for (int j = thread_index(); j < half; j += 256) {
        const float c = cos_sin[2 * j], s = cos_sin[2 * j + 1], a = x[2 * j], b = x[2 * j + 1];
        y[j] = CACHE::put(fused(a, c, -(b * s)));
        y[j + half] = CACHE::put(fused(a, s, b * c));
    }
}

// One block a head: its query, cut into what turns and what is multiplied with the key matrix, as floats or as Q8 rows
// (one of them null).  One block more: the turned key and the normalised latent go to the cache.
// q: [tokens][heads][own + rotated]; latent: [tokens][columns]; key: [tokens][rotated]; cos_sin: [positions][rotated];
// turned: [tokens][heads][rotated]; own_out: [tokens][heads] rows; cache: [positions][rotated + columns] in the memory
// of each token's session.  own: a multiple of 32.  Grid (heads + 1, tokens).
template <class CACHE>
DEVICE void prepare_latent(const float *q, const float *latent, const float *key, const float *norm,
                           const float *cos_sin, const replayed *positions, const replayed *states, float *turned,
                           float *own_out, u8 *own_q8, typename CACHE::element *cache, int heads, int own, int rotated,
                           int columns, float eps) {
    const int token = block_y(), head = block_x();
    const u32 position = now(positions + token);
    const float *turn = cos_sin + (u64)position * rotated;
    if (head < heads) {
        const u64 row = (u64)token * heads + head;
        const float *x = q + row * (own + rotated);
        turn_neighbours<cache_f32>(x + own, turn, turned + row * rotated, rotated);
        for (int i = thread_index(); i < own; i += 256) {
            if (own_out) own_out[row * own + i] = x[i];
            if (own_q8) store_q8_group(x[i], own_q8 + row * q8_row_bytes(own), own, i >> 5);
        }
        return;
    }
    typename CACHE::element *place = in_state(state_base(states, token), cache) + (u64)position * (rotated + columns);
    turn_neighbours<CACHE>(key + (u64)token * rotated, turn, place, rotated);
    const float *x = latent + (u64)token * columns;
    float squares = 0.f;
    for (int i = thread_index(); i < columns; i += 256) squares = fused(x[i], x[i], squares);
    const float scale = 1.f / square_root(block_sum<8>(squares) / (float)columns + eps);
    for (int i = thread_index(); i < columns; i += 256) place[rotated + i] = CACHE::put(x[i] * scale * norm[i]);
}

// tile[position][column] = `count` columns of the cache from `first` on, zeros behind them; of positions that are not
// there the last one's.  stride: of the cache's rows.  A whole block calls it.
template <class CACHE>
DEVICE void load_latents(quad *tile, const typename CACHE::element *cache, int stride, int begin, int length, int first,
                         int count) {
    const int quads = LATENT_CHUNK / 4, row = quads + 1;
    sync_block(); // the last tile has been used
#pragma unroll
    for (int r = 0; r < LATENT_TILE * quads / 256; ++r) {
        const int i = thread_index() + 256 * r, p = begin + i / quads, column = 4 * (i % quads);
        const u64 at = (u64)(p < length ? p : length - 1) * stride + first + column;
        tile[i / quads * row + i % quads] = column < count ? CACHE::get_quad(cache + at) : quad{};
    }
    sync_block();
}

// parts: [tokens][heads][splits][columns + 2]: weighted latents, their largest score, the sum of weights.  Splits past
// the token's position are left unwritten.  turned: [tokens][heads][rotated]; absorbed: [tokens][heads][columns].
// While scores are computed a lane is a position, then it is four columns.  rotated: a multiple of 4.
// Grid (blocks of heads, splits, tokens).
template <class CACHE>
DEVICE void attend_latents(const float *turned, const float *absorbed, const typename CACHE::element *cache,
                           const replayed *positions, const replayed *states, float *parts, int heads, int splits,
                           int rotated, int columns, float scale) {
    const int quads = LATENT_CHUNK / 4, row = LATENT_CHUNK + 4, tiles = LATENT_SPLIT / LATENT_TILE;
    __shared__ quad tile_quads[LATENT_TILE * row / 4], query_quads[LATENT_HEADS][quads];
    __shared__ float weight_of[LATENT_HEADS][LATENT_SPLIT];
    const float *tile = tile_quads[0].v;
    float *queries = query_quads[0][0].v;
    const int token = block_z(), lane = lane_index(), mine = 2 * warp_index();
    const int length = (int)now(positions + token) + 1, begin = block_y() * LATENT_SPLIT, stride = rotated + columns;
    if (begin >= length) return;
    cache = in_state(state_base(states, token), cache);
    float score[tiles][2];
#pragma unroll
    for (int s = 0; s < tiles; ++s) score[s][0] = score[s][1] = 0.f;
    for (int first = 0; first < stride; first += LATENT_CHUNK) {
        sync_block(); // the last queries have been used
#pragma unroll 2 // all of it is a register too many on sm_80 (NVRTC 13.5)
        for (int i = thread_index(); i < LATENT_HEADS * LATENT_CHUNK; i += 256) {
            const int head = block_x() * LATENT_HEADS + i / LATENT_CHUNK, c = first + i % LATENT_CHUNK;
            const u64 at = (u64)token * heads + (head < heads ? head : heads - 1);
            const float value = c >= stride   ? 0.f
                                : c < rotated ? turned[at * rotated + c]
                                              : absorbed[at * columns + c - rotated];
            queries[i] = value * scale;
        }
#pragma unroll
        for (int s = 0; s < tiles; ++s) {
            if (begin + LATENT_TILE * s >= length) break;
            load_latents<CACHE>(tile_quads, cache, stride, begin + LATENT_TILE * s, length, first, stride - first);
#pragma unroll 4
            for (int c = 0; c < quads; ++c) {
                const quad k = tile_quads[lane * (quads + 1) + c];
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    for (int j = 0; j < 4; ++j) score[s][h] = fused(query_quads[mine + h][c].v[j], k.v[j], score[s][h]);
            }
        }
    }
    float most[2], weight_sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        most[h] = -infinity(), weight_sum[h] = 0.f;
#pragma unroll
        for (int s = 0; s < tiles; ++s) {
            if (begin + LATENT_TILE * s + lane >= length) score[s][h] = -infinity();
            most[h] = larger(most[h], score[s][h]);
        }
        most[h] = warp_max(most[h]);
#pragma unroll
        for (int s = 0; s < tiles; ++s) {
            const float weight = exponential(score[s][h] - most[h]);
            weight_sum[h] += weight;
            weight_of[mine + h][LATENT_TILE * s + lane] = weight;
        }
        weight_sum[h] = warp_sum(weight_sum[h]);
    }
    const int head = block_x() * LATENT_HEADS + mine;
    float *part = parts + (((u64)token * heads + head) * splits + block_y()) * (columns + 2);
    const u64 next = (u64)splits * (columns + 2); // from a head's to the next one's
    for (int first = 0; first < columns; first += LATENT_CHUNK) {
        float sum[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = 0.f;
        for (int s = 0; s < tiles && begin + LATENT_TILE * s < length; ++s) {
            load_latents<CACHE>(tile_quads, cache, stride, begin + LATENT_TILE * s, length, rotated + first,
                                columns - first);
#pragma unroll 4
            for (int p = 0; p < LATENT_TILE; ++p)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float w = weight_of[mine + h][LATENT_TILE * s + p];
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[h][i] = fused(w, tile[p * row + 32 * i + lane], sum[h][i]);
                }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (head + h < heads && first + 32 * i < columns) part[h * next + first + 32 * i + lane] = sum[h][i];
    }
    if (lane > 0) return;
    for (int h = 0; h < 2 && head + h < heads; ++h)
        part[h * next + columns] = most[h], part[h * next + columns + 1] = weight_sum[h];
}

// Merges the splits, as float rows and as Q8 rows of `columns`, one a head (each may be null).  columns: a multiple of
// 32.  Grid (columns / 256 rounded up, heads, tokens).
KERNEL(256, latent_merge)
(const float *parts, const replayed *positions, float *y, u8 *q8, int heads, int columns, int splits) {
    start_kernel();
    const int token = block_z(), i = 256 * block_x() + thread_index();
    const int used = (int)now(positions + token) / LATENT_SPLIT + 1;
    const u64 row = (u64)token * heads + block_y();
    if (i >= columns) return;
    const float *part = parts + row * splits * (columns + 2);
    float most = -infinity(), sum = 0.f, weight_sum = 0.f;
    for (int s = 0; s < used; ++s) most = larger(most, part[(u64)s * (columns + 2) + columns]);
    for (int s = 0; s < used; ++s) {
        const float *p = part + (u64)s * (columns + 2);
        const float weight = exponential(p[columns] - most);
        sum = fused(weight, p[i], sum);
        weight_sum = fused(weight, p[columns + 1], weight_sum);
    }
    const float value = sum / weight_sum;
    if (y) y[row * columns + i] = value;
    if (q8) store_q8_group(value, q8 + row * q8_row_bytes(columns), columns, i >> 5);
}
EXPORT_KERNEL(latent_merge)

#define LATENT_KERNELS(type)                                                                                           \
    KERNEL(256, latent_prepare_##type)                                                                                 \
    (const float *q, const float *latent, const float *key, const float *norm, const float *cos_sin,                   \
     const replayed *positions, const replayed *states, float *turned, float *own_out, u8 *own_q8,                     \
     cache_##type::element *cache, int heads, int own, int rotated, int columns, float eps) {                          \
        start_kernel();                                                                                                \
        prepare_latent<cache_##type>(q, latent, key, norm, cos_sin, positions, states, turned, own_out, own_q8, cache, \
                                     heads, own, rotated, columns, eps);                                               \
    }                                                                                                                  \
    EXPORT_KERNEL(latent_prepare_##type)                                                                               \
    KERNEL(256, latent_attention_##type)                                                                               \
    (const float *turned, const float *absorbed, const cache_##type::element *cache, const replayed *positions,        \
     const replayed *states, float *parts, int heads, int splits, int rotated, int columns, float scale) {             \
        start_kernel();                                                                                                \
        attend_latents<cache_##type>(turned, absorbed, cache, positions, states, parts, heads, splits, rotated,        \
                                     columns, scale);                                                                  \
    }                                                                                                                  \
    EXPORT_KERNEL(latent_attention_##type)

LATENT_KERNELS(f32)
LATENT_KERNELS(f16)

// y[row] = W_head x[row], row = token * heads + head: each head has its own `rows` rows of the matrix, its own input
// and its own output.  One token: grid (blocks of rows, heads).  Many: grid (rows / 64 up, tokens / 32 up, heads).
template <class T> DEVICE const u8 *head_matrix(const u8 *weights, int head, int rows, int columns) {
    return weights + (u64)head * rows * ((u64)(columns / T::block_elements) * T::block_bytes);
}

template <class T>
DEVICE void multiply_heads(const u8 *weights, const u8 *x, float *y, int heads, int rows, int columns, int tokens) {
    __shared__ int token_rows[TILE_TOKENS];
    __shared__ typename tile_sums<T>::step s;
    const int first = TILE_ROWS * block_x(), token = TILE_TOKENS * block_y() + thread_index(), head = block_z();
    const int left = tokens - TILE_TOKENS * block_y(), count = left < TILE_TOKENS ? left : TILE_TOKENS;
    if (thread_index() < TILE_TOKENS) token_rows[thread_index()] = token < tokens ? token * heads + head : -1;
    const tile_rows matrix = rows_from<T>(head_matrix<T>(weights, head, rows, columns), first, rows, columns);
    tile_sums<T> sums;
    multiply_tile<T>(s, matrix, x, token_rows, count, columns, sums);
    store_sums(sums, y, token_rows, first, rows, rows);
}

#define HEADS_KERNELS(type)                                                                                           \
    RESIDENT_KERNEL(32 * MAT_VEC_WARPS, 6, heads_mat_vec_##type)                                                      \
    (const u8 *weights, const u8 *x, float *y, int rows, int columns, int split) {                                    \
        mat_vec<type, type::is_quantized ? MAT_VEC_ROWS : 1>(head_matrix<type>(weights, block_y(), rows, columns), x, \
                                                             y, rows, columns, split, block_x());                     \
    }                                                                                                                 \
    EXPORT_KERNEL(heads_mat_vec_##type)                                                                               \
    RESIDENT_KERNEL(TILE_THREADS, TILE_RESIDENT, heads_mat_mul_##type)                                                \
    (const u8 *weights, const u8 *x, float *y, int heads, int rows, int columns, int tokens) {                        \
        start_kernel();                                                                                               \
        multiply_heads<type>(weights, x, y, heads, rows, columns, tokens);                                            \
    }                                                                                                                 \
    EXPORT_KERNEL(heads_mat_mul_##type)

HEADS_KERNELS(q4_k)
HEADS_KERNELS(q4_k_planes)
HEADS_KERNELS(q5_k)
HEADS_KERNELS(q6_k)
HEADS_KERNELS(q6_k_planes)
HEADS_KERNELS(q8_0)
HEADS_KERNELS(q8_0_planes)
HEADS_KERNELS(mxfp4)
HEADS_KERNELS(f16)
HEADS_KERNELS(bf16)
HEADS_KERNELS(f32)
