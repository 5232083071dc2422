// Attention of many tokens over their caches in one launch: a block takes 32 query rows, each a token and one of the
// query heads of a key head, and goes through the positions that any of them sees, 32 at a time.  Those tiles begin at
// multiples of 32 and a row's sums are made by one warp, in the order of the positions that the row itself sees: its
// bits depend neither on how a prompt is cut nor on the rows beside it.
#pragma once
#include "norms.h"
#include "tuning.h"

#define PROMPT_ROWS 32 // of a block
#define PROMPT_WARPS 4
#define PROMPT_WARP_ROWS 8
#define PROMPT_HALF_ROWS 4 // whose scores a lane makes: even lanes those of the first half, odd ones of the other
#define PROMPT_TILE 32     // positions

struct prompt_row {
    u64 base;          // where the memory of the token's session begins
    int row;           // token * heads + head
    int first, length; // it sees positions first .. length - 1
    int run;           // the first of the rows up to this one that are of the same session: these go together
};

// The positions that any of some rows see, and those that all do; what is not of the run sees nothing.
struct prompt_span {
    int any_first, any_length, all_first, all_length;

    DEVICE_MEMBER bool sees_any(int begin) const { return begin < any_length && begin + PROMPT_TILE > any_first; }
    DEVICE_MEMBER bool sees_all(int begin) const { return begin >= all_first && begin + PROMPT_TILE <= all_length; }
};
DEVICE prompt_span span_of(const prompt_row *rows, int count, int run) {
    prompt_span s = {0x7fffffff, 0, 0, 0x7fffffff};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const bool is_in = rows[i].run == run;
        const int first = is_in ? rows[i].first : 0x7fffffff, length = is_in ? rows[i].length : 0;
        s.any_first = first < s.any_first ? first : s.any_first;
        s.all_first = first > s.all_first ? first : s.all_first;
        s.any_length = length > s.any_length ? length : s.any_length;
        s.all_length = length < s.all_length ? length : s.all_length;
    }
    return s;
}

// Keys and values come in chunks: 64 columns of a tile's keys, or all columns of as many values.  While one is
// computed with, the next is on its way into registers.
template <class CACHE, int PER_LANE> struct prompt_chunks {
    static const int dim = 32 * PER_LANE, columns = dim < 64 ? dim : 64, count = dim / columns; // of a tile
    static const int key_quads = columns / 4, key_row = key_quads + 1; // so that rows begin in different banks
    static const int value_quads = dim / 4, query_row = value_quads + 1, value_positions = PROMPT_TILE / count;
    static const int rounds = PROMPT_TILE * key_quads / (32 * PROMPT_WARPS);
    const typename CACHE::element *keys, *values; // of the block's key head in the session's memory
    int stride, ring, last;                       // elements between positions; rows of the caches; a position
    typename CACHE::packed asked[rounds];

    // Where position begin + offset is; behind the last there is the last.
    DEVICE_MEMBER u64 place_of(int begin, int offset) const {
        const int position = begin + offset < last ? begin + offset : last;
        return (u64)(ring ? position % ring : position) * stride;
    }
    DEVICE_MEMBER void ask_keys(int begin, int chunk) {
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int i = thread_index() + 32 * PROMPT_WARPS * r;
            asked[r] = CACHE::get_packed(keys + place_of(begin, i / key_quads) + columns * chunk + 4 * (i % key_quads));
        }
    }
    DEVICE_MEMBER void ask_values(int begin, int chunk) {
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int i = thread_index() + 32 * PROMPT_WARPS * r;
            const u64 place = place_of(begin, value_positions * chunk + i / value_quads);
            asked[r] = CACHE::get_packed(values + place + 4 * (i % value_quads));
        }
    }
    // What was asked for comes to where the whole block sees it; `row` quads from a position to the next.
    DEVICE_MEMBER void put(quad *place, int quads, int row) const {
        sync_block(); // the last chunk has been used
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int i = thread_index() + 32 * PROMPT_WARPS * r;
            place[i / quads * row + i % quads] = CACHE::unpack(asked[r]);
        }
        sync_block();
    }
};

// Over the lanes that hold the same rows' scores.
DEVICE float rows_max(float v) {
    v = larger(v, exchange_float<16>(v));
    v = larger(v, exchange_float<8>(v));
    v = larger(v, exchange_float<4>(v));
    return larger(v, exchange_float<2>(v));
}
DEVICE float rows_sum(float v) {
    v += exchange_float<16>(v);
    v += exchange_float<8>(v);
    v += exchange_float<4>(v);
    return v + exchange_float<2>(v);
}

// score[k][r] += what a chunk's columns add to the score of the lane's row r at its position lane / 2 + 16 k.
template <int QUADS, int QUERY_ROW, int UNROLLED>
DEVICE void add_scores(const quad *queries, const quad *keys, float (&score)[2][PROMPT_HALF_ROWS]) {
    const int position = lane_index() >> 1;
#pragma unroll UNROLLED
    for (int c = 0; c < QUADS; ++c) {
        const quad near = keys[position * (QUADS + 1) + c], far = keys[(position + 16) * (QUADS + 1) + c];
#pragma unroll
        for (int r = 0; r < PROMPT_HALF_ROWS; ++r) {
            const quad query = queries[r * QUERY_ROW + c];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                score[0][r] = fused(query.v[j], near.v[j], score[0][r]);
                score[1][r] = fused(query.v[j], far.v[j], score[1][r]);
            }
        }
    }
}

// Softmax goes on with a tile: scores become weights relative to the largest score so far, -1 where a row does not see;
// `factor` is what older weights shrink by.  A row that sees nothing of the tile keeps all it has.
DEVICE void weigh(const prompt_row *rows, int run, int begin, const float (&score)[2][PROMPT_HALF_ROWS],
                  float (&most)[PROMPT_HALF_ROWS], float (&weight_sum)[PROMPT_HALF_ROWS], quad *weights,
                  float *factors) {
    const int lane = lane_index(), near = begin + (lane >> 1), far = near + 16;
    quad of_near, of_far;
#pragma unroll
    for (int r = 0; r < PROMPT_HALF_ROWS; ++r) {
        const int first = rows[r].first, length = rows[r].run == run ? rows[r].length : 0;
        const bool sees_near = near >= first && near < length, sees_far = far >= first && far < length;
        const float a = sees_near ? score[0][r] : -infinity(), b = sees_far ? score[1][r] : -infinity();
        const float tile_most = rows_max(larger(a, b));
        const bool sees_any = begin < length && begin + PROMPT_TILE > first;
        const float now_most = sees_any ? larger(most[r], tile_most) : most[r];
        const float factor = sees_any ? exponential(most[r] - now_most) : 1.f;
        of_near.v[r] = sees_near ? exponential(a - now_most) : -1.f;
        of_far.v[r] = sees_far ? exponential(b - now_most) : -1.f;
        const float more = (sees_near ? of_near.v[r] : 0.f) + (sees_far ? of_far.v[r] : 0.f);
        weight_sum[r] = fused(weight_sum[r], factor, more), most[r] = now_most;
        if (lane < 2) factors[r] = factor;
    }
    weights[lane] = of_near, weights[lane + 32] = of_far; // two quads a position: the warp's eight rows
}

// The columns whose sums a lane holds: quads where the head has as many.
template <int PER_LANE> DEVICE int column_of(int i) {
    return PER_LANE < 4 ? 32 * i + lane_index() : 128 * (i / 4) + 4 * lane_index() + i % 4;
}
template <int PER_LANE> DEVICE void lane_values(const quad *row, float (&value)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        value[i] = PER_LANE < 4 ? row[0].v[column_of<PER_LANE>(i)] : row[32 * (i / 4) + lane_index()].v[i % 4];
}

// sum[r] += weights times values, position by position.  is_whole: all rows see all positions.
template <int PER_LANE, bool IS_WHOLE>
DEVICE void add_values(const quad *weights, const quad *values, int positions,
                       float (&sum)[PROMPT_WARP_ROWS][PER_LANE]) {
#pragma unroll 1
    for (int p = 0; p < positions; ++p) {
        float value[PER_LANE];
        lane_values<PER_LANE>(values + p * 8 * PER_LANE, value);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const quad weight = weights[2 * p + half];
#pragma unroll
            for (int r = 0; r < PROMPT_HALF_ROWS; ++r) {
                if (!IS_WHOLE && weight.v[r] < 0.f) continue; // not even a NaN comes from there
                float (&row)[PER_LANE] = sum[PROMPT_HALF_ROWS * half + r];
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i) row[i] = fused(weight.v[r], value[i], row[i]);
            }
        }
    }
}

template <int PER_LANE> DEVICE void shrink(const float *factors, float (&sum)[PROMPT_WARP_ROWS][PER_LANE]) {
#pragma unroll
    for (int r = 0; r < PROMPT_WARP_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) sum[r][i] *= factors[r];
}

// What a block has in shared memory.
template <class CACHE, int PER_LANE> struct prompt_block {
    typedef prompt_chunks<CACHE, PER_LANE> chunks;
    quad queries[PROMPT_ROWS * chunks::query_row], chunk[PROMPT_TILE * chunks::key_row];
    quad weights[PROMPT_WARPS][2 * PROMPT_TILE];
    float factors[PROMPT_ROWS]; // in the end the sums of weights
    prompt_row rows[PROMPT_ROWS];
    prompt_span spans[PROMPT_WARPS]; // of the run
};

// A lane's part of its warp's rows.
template <int PER_LANE> struct prompt_sums {
    float sum[PROMPT_WARP_ROWS][PER_LANE];
    float most[PROMPT_HALF_ROWS], weight[PROMPT_HALF_ROWS]; // the largest score; weights of the lane's positions
};

// Which rows the block has; behind the last one there is the last.  The whole block calls it.
DEVICE void load_rows(prompt_row *rows, const replayed *positions, const replayed *states, int first_row, int total,
                      int heads, int group, int window) {
    const int lane = lane_index();
    prompt_row mine;
    if (thread_index() < PROMPT_ROWS) {
        const int i = first_row + lane < total ? first_row + lane : total - 1, token = i / group;
        mine.length = (int)now(positions + token) + 1, mine.base = state_base(states, token);
        mine.first = window && window < mine.length ? mine.length - window : 0;
        mine.row = token * heads + block_x() * group + i % group, mine.run = lane;
        rows[lane] = mine;
    }
    sync_block();
    if (thread_index() < PROMPT_ROWS) {
        while (mine.run > 0 && rows[mine.run - 1].base == mine.base) --mine.run;
        rows[lane].run = mine.run;
    }
}

// Tiles of the positions that a run's rows see, one after the other.  The whole block calls it.
template <class CACHE, int PER_LANE>
DEVICE void attend_run(prompt_block<CACHE, PER_LANE> &s, prompt_chunks<CACHE, PER_LANE> &chunks, int run, int begin,
                       int end, prompt_sums<PER_LANE> &sums) {
    typedef prompt_chunks<CACHE, PER_LANE> of;
    const int of_warp = PROMPT_WARP_ROWS * warp_index(), of_lane = of_warp + PROMPT_HALF_ROWS * (lane_index() & 1);
    const int unrolled = PER_LANE < 2 ? 2 : PROMPT_UNROLLED;
    const prompt_span &here = s.spans[warp_index()];
    quad *weights = s.weights[warp_index()];
    chunks.ask_keys(begin, 0);
#pragma unroll 1
    for (; begin < end; begin += PROMPT_TILE) {
        float score[2][PROMPT_HALF_ROWS];
#pragma unroll
        for (int r = 0; r < PROMPT_HALF_ROWS; ++r) score[0][r] = score[1][r] = 0.f;
#pragma unroll 1
        for (int c = 0; c < of::count; ++c) {
            chunks.put(s.chunk, of::key_quads, of::key_row);
            if (c + 1 < of::count)
                chunks.ask_keys(begin, c + 1);
            else
                chunks.ask_values(begin, 0);
            const quad *queries = s.queries + of_lane * of::query_row + of::key_quads * c;
            if (here.sees_any(begin)) add_scores<of::key_quads, of::query_row, unrolled>(queries, s.chunk, score);
        }
        if (here.sees_any(begin))
            weigh(s.rows + of_lane, run, begin, score, sums.most, sums.weight, weights, s.factors + of_lane);
#pragma unroll 1
        for (int c = 0; c < of::count; ++c) {
            chunks.put(s.chunk, of::value_quads, of::value_quads);
            if (c + 1 < of::count)
                chunks.ask_values(begin, c + 1);
            else if (begin + PROMPT_TILE < end)
                chunks.ask_keys(begin + PROMPT_TILE, 0);
            if (!here.sees_any(begin)) continue;
            if (c == 0) shrink(s.factors + of_warp, sums.sum);
            const quad *weight = weights + 2 * of::value_positions * c;
            if (here.sees_all(begin))
                add_values<PER_LANE, true>(weight, s.chunk, of::value_positions, sums.sum);
            else
                add_values<PER_LANE, false>(weight, s.chunk, of::value_positions, sums.sum);
        }
    }
}

// q: [tokens][heads][dim]; caches: [positions][kv_heads][dim] in the memory of each token's session, with the keys and
// values of these very tokens, too; gate: [tokens][heads] rows gate_stride apart, whose sigmoid multiplies what comes
// out, or null; sinks: of each head, a logit without a value, or null; y: [tokens][heads * dim].
// ring: as in attention.h.  Grid (kv_heads, tokens * heads / kv_heads / 32 rounded up).
template <class CACHE, int PER_LANE>
DEVICE void attend_prompt(const float *q, const typename CACHE::element *k_cache,
                          const typename CACHE::element *v_cache, const replayed *positions, const replayed *states,
                          const float *gate, const float *sinks, float *y, int tokens, int heads, int kv_heads,
                          int gate_stride, float scale, int window, int ring) {
    typedef prompt_chunks<CACHE, PER_LANE> of;
    __shared__ prompt_block<CACHE, PER_LANE> s;
    const int group = heads / kv_heads, total = tokens * group, kv_head = block_x(), lane = lane_index();
    const int first_row = PROMPT_ROWS * ((total - 1) / PROMPT_ROWS - block_y()); // the longest begin first
    const int of_warp = PROMPT_WARP_ROWS * warp_index(), of_lane = of_warp + PROMPT_HALF_ROWS * (lane & 1);
    load_rows(s.rows, positions, states, first_row, total, heads, group, window);
    for (int i = thread_index(); i < PROMPT_ROWS * of::value_quads; i += 32 * PROMPT_WARPS) {
        const int row = i / of::value_quads, column = i % of::value_quads;
        quad query = *(const quad *)(q + (u64)s.rows[row].row * of::dim + 4 * column);
        for (int j = 0; j < 4; ++j) query.v[j] *= scale;
        s.queries[row * of::query_row + column] = query;
    }
    prompt_sums<PER_LANE> sums;
#pragma unroll
    for (int r = 0; r < PROMPT_WARP_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) sums.sum[r][i] = 0.f;
#pragma unroll
    for (int r = 0; r < PROMPT_HALF_ROWS; ++r) { // the sink is what is seen before all positions
        sums.most[r] = sinks ? sinks[s.rows[of_lane + r].row % heads] : -infinity();
        sums.weight[r] = sinks && lane < 2 ? 1.f : 0.f;
    }
    sync_block();
#pragma unroll 1
    for (int run = 0; run < PROMPT_ROWS; ++run) {
        if (s.rows[run].run != run) continue;
        const prompt_span all = span_of(s.rows, PROMPT_ROWS, run);
        sync_block(); // the last run's spans have been used
        if (lane == 0) s.spans[warp_index()] = span_of(s.rows + of_warp, PROMPT_WARP_ROWS, run);
        of chunks;
        chunks.keys = in_state(s.rows[run].base, k_cache) + kv_head * of::dim;
        chunks.values = in_state(s.rows[run].base, v_cache) + kv_head * of::dim;
        chunks.stride = kv_heads * of::dim, chunks.ring = ring, chunks.last = all.any_length - 1;
        attend_run(s, chunks, run, all.any_first / PROMPT_TILE * PROMPT_TILE, all.any_length, sums);
    }
    sync_block(); // the last factors have been used
#pragma unroll
    for (int r = 0; r < PROMPT_HALF_ROWS; ++r) {
        const float weight_sum = rows_sum(sums.weight[r]);
        if (lane < 2) s.factors[of_lane + r] = weight_sum;
    }
    sync_block();
#pragma unroll
    for (int r = 0; r < PROMPT_WARP_ROWS; ++r) {
        if (first_row + of_warp + r >= total) break;
        const u64 row = s.rows[of_warp + r].row;
        const float share = 1.f / s.factors[of_warp + r];
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int column = column_of<PER_LANE>(i);
            float value = sums.sum[r][i] * share;
            if (gate) value *= sigmoid(gate[row * gate_stride + column]);
            y[row * of::dim + column] = value;
        }
    }
}

// resident: blocks of a multiprocessor, as many as the sums leave registers to.
#define PROMPT_ATTENTION_KERNEL(type, dim, resident)                                                                 \
    RESIDENT_KERNEL(32 * PROMPT_WARPS, resident, attention_prompt_##type##_##dim)                                    \
    (const float *q, const cache_##type::element *k_cache, const cache_##type::element *v_cache,                     \
     const replayed *positions, const replayed *states, const float *gate, const float *sinks, float *y, int tokens, \
     int heads, int kv_heads, int gate_stride, float scale, int window, int ring) {                                  \
        start_kernel();                                                                                              \
        attend_prompt<cache_##type, dim / 32>(q, k_cache, v_cache, positions, states, gate, sinks, y, tokens, heads, \
                                              kv_heads, gate_stride, scale, window, ring);                           \
    }                                                                                                                \
    EXPORT_KERNEL(attention_prompt_##type##_##dim)

PROMPT_ATTENTION_KERNEL(f32, 32, 4)
PROMPT_ATTENTION_KERNEL(f32, 64, 4)
PROMPT_ATTENTION_KERNEL(f32, 128, 3)
PROMPT_ATTENTION_KERNEL(f32, 256, PROMPT_RESIDENT)
PROMPT_ATTENTION_KERNEL(f16, 32, 4)
PROMPT_ATTENTION_KERNEL(f16, 64, 4)
PROMPT_ATTENTION_KERNEL(f16, 128, 4)
PROMPT_ATTENTION_KERNEL(f16, 256, PROMPT_RESIDENT)
