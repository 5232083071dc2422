// All chosen experts of a layer in two launches, those that are not on the device as they come.  A pair is (token, rank
// of the pick): pair = token * picks + rank.
// records[pair]: where the expert's record lies on the device, 0 when it is not there (yet).
#pragma once
#include "mat_vec.h"

#define MOST_PICKS 64 // the most experts a token may have

template <class T> constexpr int gate_up_pairs = GATE_UP_PAIRS;
template <> constexpr int gate_up_pairs<q6_k> = GATE_UP_PAIRS_Q6_K;
template <class T> constexpr int gate_up_resident = GATE_UP_RESIDENT;
template <> constexpr int gate_up_resident<q6_k> = GATE_UP_RESIDENT_Q6_K;
template <class T> constexpr int down_resident = DOWN_RESIDENT;
template <> constexpr int down_resident<q5_k> = DOWN_RESIDENT_Q5_K;
template <class T> constexpr int down_batch = DOWN_BATCH;
template <> constexpr int down_batch<q6_k> = DOWN_BATCH_Q6_K;

// What an expert computes beside its products, where that is more than silu(gate) * up; in device memory, for few
// scalar registers.  Biases: a row an expert, null for none; ids: which expert a pair's is.  Clamped: g sigmoid(1.702
// g) (u + 1), g = min(gate, 7), u = up between -7 and 7.
struct expert_form {
    const int *ids;
    const float *gate_bias, *up_bias, *down_bias;
    int is_clamped;
};
DEVICE float hidden_of(const expert_form *form, float gate, float up, int pair, int row, int rows) {
    if (!form) return silu(gate) * up;
    const u64 at = (u64)form->ids[pair] * rows + row;
    if (form->gate_bias) gate += form->gate_bias[at];
    if (form->up_bias) up += form->up_bias[at];
    if (!form->is_clamped) return silu(gate) * up;
    // what is not a number stays so: no comparison with it is true
    gate = gate > 7.f ? 7.f : gate;
    up = up > 7.f ? 7.f : up < -7.f ? -7.f : up;
    return gate / (1.f + exponential(-1.702f * gate)) * (up + 1.f);
}

#define GATE_UP_ROWS (32 / GATE_UP_WARPS) // of a warp

// gates[0 ..], ups[0 ..]: rows first, first + 1, ... of both matrices times x, of one warp.
template <class T, class L>
DEVICE void gate_up_rows(const u8 *gate, const u8 *up, const u8 *x, int columns, int first, float *gates, float *ups) {
    const int PAIRS = gate_up_pairs<T>;
    const u64 row_bytes = (u64)(columns / T::block_elements) * T::block_bytes;
#pragma unroll 1
    for (int row = 0; row < GATE_UP_ROWS; row += PAIRS) {
        const u8 *row_data[2 * PAIRS];
        float sums[2 * PAIRS];
#pragma unroll
        for (int r = 0; r < PAIRS; ++r) {
            row_data[2 * r] = gate + (u64)(first + row + r) * row_bytes;
            row_data[2 * r + 1] = up + (u64)(first + row + r) * row_bytes;
            sums[2 * r] = sums[2 * r + 1] = 0.f;
        }
        dot_rows<T, 2 * PAIRS, L>(row_data, x, columns, lane_index(), 32, sums);
#pragma unroll
        for (int r = 0; r < PAIRS; ++r) {
            const float of_gate = warp_sum(sums[2 * r]), of_up = warp_sum(sums[2 * r + 1]);
            if (lane_index() == 0) gates[row + r] = of_gate, ups[row + r] = of_up;
        }
    }
}

// hidden[pair] = Q8(silu(gate x) * (up x)), or what else the form says.  A block makes 32 of the pair's `rows` values:
// one Q8 group, so nothing but the quantized result leaves it.
// A device that has a share of every expert (gather.h) makes fewer: row i of its records is row first + i of `rows`.
// x: [tokens] Q8 or float rows; hidden: [pairs] Q8 rows.  Grid (own rows / 32, pairs).
template <class T, class L>
DEVICE void gate_up(const u8 *record, int pair, u64 gate_offset, u64 up_offset, const u8 *x, u8 *hidden,
                    float *hidden_floats, int rows, int columns, int picks, const expert_form *form, int first) {
    __shared__ float gates[32], ups[32];
    const int of_warp = warp_index() * GATE_UP_ROWS, own = 32 * block_x() + of_warp;
    const u8 *gate = record + gate_offset, *up = record + up_offset;
    x += (u64)(pair / picks) * activation_row_bytes<T>(columns);
    gate_up_rows<T, L>(gate, up, x, columns, own, gates + of_warp, ups + of_warp);
    sync_block();
    if (warp_index() > 0) return;
    const int lane = lane_index(), row = first + 32 * block_x() + lane;
    const float value = hidden_of(form, gates[lane], ups[lane], pair, row, rows);
    if (hidden_floats) hidden_floats[(u64)pair * rows + row] = value;
    store_q8_group(value, hidden + pair * q8_row_bytes(rows), rows, first / 32 + block_x());
}

// The host's answer about the pairs whose records are not on the device, in memory that both see: where each will be,
// and the run's number when gate and up have come there, and when all of it has.
struct answer {
    const u64 *record;
    const u32 *has_inputs, *is_whole;
};
DEVICE answer answer_at(const void *reply, int pairs) {
    const u64 *record = (const u64 *)reply;
    const u32 *words = (const u32 *)(record + pairs);
    return {record, words, words + pairs};
}

// Which of a token's pairs the blocks of its n-th row compute: first those that are on the device, in the router's
// order, so that no block waits in the place of one that has work; then the others.
DEVICE int pair_in_turn(const u64 *records, int picks) {
    const int turn = block_y() % picks, base = block_y() - turn;
    int seen = 0, found = base;
    for (int others = 0; others < 2; ++others)
#pragma unroll 8
        for (int i = 0; i < picks; ++i)
            if ((records[base + i] == 0) == others && seen++ == turn) found = base + i;
    return found;
}

// Of late[pair], a layer's records that are not on the device when it is routed: 0 until somebody knows, odd where the
// record is read in place, in the host's memory; or this, when the host has told the device to stop.
#define NOWHERE 2
DEVICE u64 late_record(u64 word) { return word == NOWHERE ? 0 : word; }

// Where the pair's record is, once gate and up are there; 0 when the host has told the device to stop.  late: null
// where nobody will know.  The first block of a pair asks the host, over the link; the others hear it from that one,
// and ask now and then themselves, because nobody promises that it runs beside them.  A whole block calls it.
DEVICE u64 await_record(u64 *late, const void *reply, const replayed *run, const void *stop, int pairs, int pair) {
    __shared__ u64 found;
    if (!late) return 0;
    if (thread_index() == 0) {
        const bool is_first = block_x() == 0;
        const answer a = answer_at(reply, pairs);
        const u32 number = now(run);
        u64 record = system_load8(late + pair);
        for (u32 looks = 0; !record; ++looks) {
            // every look is a transfer over the link, which the copies need: the others ask about once in a millisecond
            if (is_first || looks % 4096 == 4095) {
                const bool is_over = system_load4(stop) != 0;
                if (system_load4(a.has_inputs + pair) == number) {
                    fence_system();
                    record = system_load8(a.record + pair);
                    break;
                }
                if (is_over) {
                    record = NOWHERE; // for all blocks: thousands of looks each before the next one begins take seconds
                    break;
                }
            }
            pause_thread();
            record = system_load8(late + pair);
        }
        if (is_first || record == NOWHERE) system_store8(late + pair, record);
        fence_system();
        found = late_record(record);
    }
    sync_block();
    return found;
}

// Until the host says that all of the pair's record is there: what follows in the stream may read it.  When it says
// stop before that, the record is none, and what is computed from it is NaN.
DEVICE void await_whole(u64 *late, const void *reply, const replayed *run, const void *stop, int pairs, int pair) {
    const answer a = answer_at(reply, pairs);
    const u32 number = now(run);
    bool is_whole = false;
    for (u32 is_over = 0; !is_whole && !is_over;) {
        is_over = system_load4(stop);
        is_whole = system_load4(a.is_whole + pair) == number;
        if (!is_whole && !is_over) pause_thread();
    }
    fence_system();
    system_store8(late + pair, is_whole ? system_load8(a.record + pair) : NOWHERE);
}

// What a block of `down` knows of its token's picks.
struct down_picks {
    u64 record[MOST_PICKS];
    float weight[MOST_PICKS]; // NaN: there is no record
};

// total[r] += weight * this lane's unit of row r.
template <class T>
DEVICE void add_weighted(const typename T::raw (&raw)[DOWN_ROWS], int unit, const u8 *x, int columns, float weight,
                         float (&total)[DOWN_ROWS]) {
    float sums[DOWN_ROWS];
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) sums[r] = 0.f;
    add_units<T, DOWN_ROWS>(raw, unit, x, columns, sums);
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) total[r] = fused(weight, sums[r], total[r]);
}

// Where row r of a pick's matrix begins; of a record that is not there, something that can be read.
DEVICE const u8 *row_of(const down_picks &p, int rank, u64 offset) {
    const bool is_present = p.weight[rank] == p.weight[rank];
    return (const u8 *)p.record[rank] + (is_present ? offset : 0);
}

// total[r] += this lane's share of row r of all picks' products.
template <class T, class L>
DEVICE void add_down_rows(const down_picks &p, const u64 (&offset)[DOWN_ROWS], const u8 *hidden, int columns, int picks,
                          float (&total)[DOWN_ROWS]) {
    constexpr int BATCH = down_batch<T>;
    const u32 x_bytes = (u32)activation_row_bytes<T>(columns);
    const int units = columns / T::unit_elements;
    int next_rank = lane_index() / units, next_unit = lane_index() % units;
    while (next_rank < picks) {
        typename T::raw raw[BATCH][DOWN_ROWS];
        int rank[BATCH], unit[BATCH];
        bool is_real[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            is_real[b] = next_rank < picks;
            rank[b] = is_real[b] ? next_rank : picks - 1, unit[b] = next_unit;
            for (next_unit += 32; next_unit >= units; next_unit -= units) ++next_rank;
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; ++r) raw[b][r] = T::template load<L>(row_of(p, rank[b], offset[r]), unit[b]);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (!is_real[b]) break;
            add_weighted<T>(raw[b], unit[b], hidden + rank[b] * x_bytes, columns, p.weight[rank[b]], total);
        }
    }
}

// y[token] = sum over ranks of weight * (down hidden [+ bias]), + sigmoid(shared_gate) * shared where a shared expert
// is given.
// The record of a pair is records[pair], or late[pair] where that is 0: what is summed, and in which order, does not
// depend on which came late.  A record found in neither gives NaN, never silence.
// A warp takes the picks' rows one after another in the router's order as if they were one long row, so that short rows
// leave no lane idle, and reduces once at the end.
// hidden: [pairs] Q8 rows (float rows for float weights); y, shared: [tokens][rows].  Of a device's share row i of the
// records is row first + i < first + count of y; all of them: 0, rows.
// Grid (count / (DOWN_WARPS * DOWN_ROWS) up, tokens).
template <class T>
DEVICE void down(const u64 *records, const u64 *late, u64 down_offset, const u8 *hidden, const float *weights,
                 const float *shared_output, const float *shared_gate, float *y, int rows, int columns, int picks,
                 const expert_form *form, int first, int count) {
    __shared__ down_picks p;
    __shared__ int in_place;
    const int row = (block_x() * DOWN_WARPS + warp_index()) * DOWN_ROWS, token = block_y();
    const u32 row_bytes = (u32)(columns / T::block_elements) * T::block_bytes;
    if (thread_index() == 0) in_place = 0;
    sync_block();
    for (int i = thread_index(); i < picks; i += 32 * DOWN_WARPS) {
        const int pair = token * picks + i;
        const u64 here = records[pair], record = here ? here : late ? late_record(late[pair]) : 0;
        // An absent record: some address that can be read, and a weight that shows.
        p.record[i] = record ? (record & ~1ull) + down_offset : (u64)hidden;
        p.weight[i] = record ? weights[pair] : not_a_number();
        if (record & 1) in_place = 1;
    }
    sync_block();
    if (row >= count) return;
    hidden += (u64)token * picks * (u32)activation_row_bytes<T>(columns);
    float total[DOWN_ROWS];
    u64 offset[DOWN_ROWS];
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) {
        total[r] = 0.f;
        offset[r] = (u64)(row + r < count ? row + r : count - 1) * row_bytes;
    }
    if (in_place)
        add_down_rows<T, arriving>(p, offset, hidden, columns, picks, total);
    else
        add_down_rows<T, settled>(p, offset, hidden, columns, picks, total);
    if (form && form->down_bias)
        for (int rank = lane_index(); rank < picks; rank += 32)
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; ++r) {
                const int own = row + r < count ? row + r : count - 1, expert = form->ids[token * picks + rank];
                total[r] = fused(p.weight[rank], form->down_bias[(u64)expert * rows + first + own], total[r]);
            }
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; ++r) {
        const float sum = warp_sum(total[r]);
        if (lane_index() > 0 || row + r >= count) continue;
        const u64 i = (u64)token * rows + first + row + r;
        y[i] = shared_output ? fused(shared_gate ? sigmoid(shared_gate[token]) : 1.f, shared_output[i], sum) : sum;
    }
}

#define EXPERT_KERNELS(type)                                                                                          \
    RESIDENT_KERNEL(32 * GATE_UP_WARPS, gate_up_resident<type>, experts_gate_up_##type)                               \
    (const u64 *records, u64 *late, const void *reply, const replayed *run, const void *stop, u64 gate_offset,        \
     u64 up_offset, const u8 *x, u8 *hidden, float *hidden_floats, int rows, int columns, int picks,                  \
     const expert_form *form, int first, int holds) {                                                                 \
        start_kernel();                                                                                               \
        const int pair = pair_in_turn(records, picks);                                                                \
        u64 record = records[pair];                                                                                   \
        if (record) {                                                                                                 \
            gate_up<type, settled>((const u8 *)record, pair, gate_offset, up_offset, x, hidden, hidden_floats, rows,  \
                                   columns, picks, form, first);                                                      \
            return;                                                                                                   \
        }                                                                                                             \
        record = await_record(late, reply, run, stop, picks, pair);                                                   \
        if (!record) return;                                                                                          \
        gate_up<type, arriving>((const u8 *)(record & ~1ull), pair, gate_offset, up_offset, x, hidden, hidden_floats, \
                                rows, columns, picks, form, first);                                                   \
        /* asked once more, because a register is dear meanwhile */                                                   \
        if (holds && block_x() == 0 && thread_index() == 0 && !(system_load8(late + pair) & 1))                       \
            await_whole(late, reply, run, stop, picks, pair);                                                         \
    }                                                                                                                 \
    EXPORT_KERNEL(experts_gate_up_##type)                                                                             \
    RESIDENT_KERNEL(32 * DOWN_WARPS, down_resident<type>, experts_down_##type)                                        \
    (const u64 *records, const u64 *late, u64 down_offset, const u8 *hidden, const float *weights,                    \
     const float *shared_output, const float *shared_gate, float *y, int rows, int columns, int picks,                \
     const expert_form *form, int first, int count) {                                                                 \
        start_kernel();                                                                                               \
        down<type>(records, late, down_offset, hidden, weights, shared_output, shared_gate, y, rows, columns, picks,  \
                   form, first, count);                                                                               \
    }                                                                                                                 \
    EXPORT_KERNEL(experts_down_##type)

EXPERT_KERNELS(q4_k)
EXPERT_KERNELS(q5_k)
EXPERT_KERNELS(q6_k)
EXPERT_KERNELS(q8_0)
EXPERT_KERNELS(mxfp4)
EXPERT_KERNELS(f16)
EXPERT_KERNELS(bf16)
EXPERT_KERNELS(f32)
