// From router logits to records: softmax, the top picks, where their experts lie, and word to the host of those that
// lie nowhere on the device.
#pragma once
#include "car_rule.h"
#include "experts.h"
#include "norms.h"

#define ROUTER_THREADS 512
#define ROUTER_EXPERTS 1024  // the most experts a layer may have
#define ROUTER_GROUPS (ROUTER_THREADS / 8)  // at least MOST_PICKS

// What a layer's router tells the host, in memory that both see: a 64-bit word with the number of misses, then one for
// each pair with the router's pick and the expert that will be computed, then one for each with the pick's
// weight.  Every word carries the run's number in its upper half, so their order does not matter and nobody waits for
// a fence.  The host counts the picks of every layer (its policy lives on them) and fetches what is missing.
DEVICE void post_word(void *place, u32 run, u32 value) { system_store8(place, (u64)run << 32 | value); }

// The values of a layer's table: 0 for an expert that must be read; an address on the device; with the lowest bit for
// an expert in DRAM, alone or, where kernels may read that in place, with the address of its record there.
#define IN_NVME 0
#define IN_DRAM 1

// ids -> records[pair] (0: not on the device), late[pair] (0: not known yet, odd: in DRAM), the post, and *misses for
// the wait.  The first warp does it, so that nobody waits for the others.
// ids: what will be computed; picks: what the router wanted, and with which weight.  All may lie in shared memory.
// number: of this replay of the program, which tells one post from the last; read when a kernel starts, for it takes a
// while.
DEVICE void resolve(const int *ids, const int *picks, const float *weights, const u64 *record_of, u64 *records,
                    u64 *late, u64 *post, u32 number, replayed *misses, int pairs) {
    float absent = 0.f;
    if (warp_index() > 0) return;
    for (int pair = lane_index(); pair < pairs; pair += 32) {
        const u64 record = record_of[ids[pair]];
        records[pair] = record & IN_DRAM ? 0 : record;
        late[pair] = record > IN_DRAM && record & IN_DRAM ? record : 0;
        post_word(post + 1 + pair, number, (u32)picks[pair] | (u32)ids[pair] << 16);
        post_word(post + 1 + pairs + pair, number, as_bits(weights[pair]));
        absent += record > IN_DRAM ? 0.f : 1.f;
    }
    absent = warp_sum(absent);
    if (lane_index() > 0) return;
    misses->word = (u32)absent;
    post_word(post, number, (u32)absent);
}

// chosen[0 ..]: where the `wanted` (1 to ROUTER_GROUPS) largest values are, descending, the lower place first where two
// are equal; minus infinity and NaN are never chosen.  Returns how many there are.  A whole block calls it.
//
// The largest of each of ROUTER_GROUPS parts are compared first: their wanted-th is passed by at least as many values
// as are wanted, and by few others.  A value's rank is the number of those that go before it, so no order of arrival
// counts.
DEVICE int largest(const float *values, int count, int wanted, int *chosen) {
    __shared__ float best_of[ROUTER_GROUPS], least;
    __shared__ int candidates[ROUTER_EXPERTS], passed;
    float best = -infinity();
    for (int i = thread_index(); i < count; i += ROUTER_THREADS) best = larger(best, values[i]);
    best = larger(best, exchange_float<1>(best));
    best = larger(best, exchange_float<2>(best));
    best = larger(best, exchange_float<4>(best));
    if (thread_index() % 8 == 0) best_of[thread_index() / 8] = best;
    if (thread_index() == 0) passed = 0;
    sync_block();
    if (thread_index() < ROUTER_GROUPS) {
        const float mine = best_of[thread_index()];
        int before = 0;
#pragma unroll 8  // 16 take more scalar registers than an AMD wave has
        for (int other = 0; other < ROUTER_GROUPS; ++other)
            before += best_of[other] > mine || (best_of[other] == mine && other < thread_index());
        if (before == wanted - 1) least = mine;
    }
    sync_block();
    for (int i = thread_index(); i < count; i += ROUTER_THREADS)
        if (values[i] >= least && values[i] > -infinity()) candidates[take_place(&passed)] = i;
    sync_block();
    const int found = passed;
    for (int i = thread_index(); i < found; i += ROUTER_THREADS) {
        const int place = candidates[i];
        const float mine = values[place];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < found; ++j) {
            const int other = candidates[j];
            before += values[other] > mine || (values[other] == mine && other < place);
        }
        if (before < wanted) chosen[before] = place;
    }
    sync_block();
    return found < wanted ? found : wanted;
}

// Softmax over all logits, the picks in descending order.  weight = p, divided by max(sum over the picks, 2^-14) when
// `normalise`, times scale.  values, ids, weights: in shared memory; values: out, the logits.
DEVICE void pick(const float *logits, float *values, int *ids, float *weights, int experts, int picks, int normalise,
                 float scale) {
    __shared__ float most_of[ROUTER_THREADS / 32], sum_of[ROUTER_THREADS / 32], chosen[MOST_PICKS];
    float most = -infinity(), sum = 0.f;
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) {
        values[e] = logits[e];
        most = larger(most, values[e]);
    }
    // A NaN among the logits leaves places untaken: valid ids and a weight that shows.
    if (thread_index() < picks) ids[thread_index()] = thread_index();
    most = warp_max(most);
    if (lane_index() == 0) most_of[warp_index()] = most;
    sync_block();
#pragma unroll
    for (int i = 0; i < ROUTER_THREADS / 32; ++i) most = larger(most, most_of[i]);
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) sum += exponential(values[e] - most);
    sum = warp_sum(sum);
    if (lane_index() == 0) sum_of[warp_index()] = sum;
    const int found = largest(values, experts, picks, ids);
    if (thread_index() < picks) {
        sum = 0.f;
#pragma unroll
        for (int i = 0; i < ROUTER_THREADS / 32; ++i) sum += sum_of[i];
        chosen[thread_index()] =
            thread_index() < found ? exponential(values[ids[thread_index()]] - most) / sum : not_a_number();
    }
    sync_block();
    if (thread_index() < picks) {
        float total = 0.f;
#pragma unroll 8
        for (int i = 0; i < picks; ++i) total += chosen[i];
        const float divisor = normalise ? larger(total, 6.103515625e-05f) : 1.f;
        weights[thread_index()] = chosen[thread_index()] / divisor * scale;
    }
    sync_block();
}

// The swaps, by one thread: missing picks, weakest first, against candidates, best first.  p: as in csrc/experts/car.h.
DEVICE void swap_picks(const fomoe_car &c, const float *values, const float *p, const int *missing,
                       const int *candidates, int found, float lowest, int *ids, float *weights, int picks,
                       int normalise) {
    float sum = 0.f, mass = 0.f, rest = 0.f, spent = 0.f;
    const float highest = values[ids[0]];
    int swaps = 0;
    for (int i = picks - 1; i >= 0; --i) {
        sum += weights[i];
        if (p) mass += p[ids[i]];
    }
    if (p && !(mass > 0.f)) return;
    for (; swaps < found; ++swaps) {
        const int rank = missing[swaps], candidate = candidates[swaps];
        const float ahead = values[ids[rank]] - values[candidate];
        const float ratio = p ? 1.f - ahead / p[ids[rank]] : exponential(-ahead);
        const float lost = p ? ahead / mass : weights[rank] * (1.f - ratio) / sum;
        spent += lost;
        const bool is_allowed = c.rule == FOMOE_CAR_RATIO    ? ratio >= c.parameter
                                : c.rule == FOMOE_CAR_PRIOR  ? ahead < c.parameter * (highest - lowest)
                                : c.rule == FOMOE_CAR_REGRET ? lost <= c.parameter
                                                             : spent <= c.parameter;
        if (!is_allowed) break;
        ids[rank] = candidate;
        weights[rank] = p ? p[candidate] * (sum / mass) : weights[rank] * ratio;
    }
    if (!swaps || !normalise) return;
    for (int i = picks - 1; i >= 0; --i) rest += weights[i];
    for (int i = 0; i < picks; ++i) weights[i] *= sum / rest;
}

// Cache-aware routing: experts of the device or of DRAM stand in for picks that would have to be read.  ids, weights:
// changed.  All but c, p and record_of in shared memory.
DEVICE void substitute(const fomoe_car &c, const float *values, const float *p, const u64 *record_of, int *ids,
                       float *weights, int experts, int picks, int normalise) {
    __shared__ float masked[ROUTER_EXPERTS], lowest_of[ROUTER_THREADS / 32];
    __shared__ int missing[FOMOE_CAR_MOST_SWAPS], candidates[FOMOE_CAR_MOST_SWAPS], misses;
    if (thread_index() == 0) {
        int count = 0;
        for (int i = picks - 1; i >= c.keep; --i)
            if (count < c.swaps && count < FOMOE_CAR_MOST_SWAPS && record_of[ids[i]] == IN_NVME) missing[count++] = i;
        misses = count;
    }
    sync_block();
    if (!misses) return;
    const int last = ids[picks - 1];
    float lowest = infinity();
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) {
        const bool was_picked = !(values[e] < values[last] || (values[e] == values[last] && e > last));
        if (values[e] > -infinity()) lowest = -larger(-lowest, -values[e]);
        const float handicap = record_of[e] & IN_DRAM ? c.slow_handicap * (p ? p[e] : 1.f) : 0.f;
        masked[e] = was_picked || record_of[e] == IN_NVME ? -infinity() : values[e] - handicap;
    }
    lowest = -warp_max(-lowest);
    if (lane_index() == 0) lowest_of[warp_index()] = lowest;
    sync_block();
    const int found = largest(masked, experts, misses, candidates);
    if (thread_index() == 0) {
        for (int i = 0; i < ROUTER_THREADS / 32; ++i) lowest = -larger(-lowest, -lowest_of[i]);
        swap_picks(c, values, p, missing, candidates, found, lowest, ids, weights, picks, normalise);
    }
    sync_block();
}

// One token's picks and their layer's table, brought into shared memory; the picks as they will be computed, by `rule`
// where run[1] allows stand-ins.  chosen_by: the logits, or what else the router chooses by; then p is not null.
// block_ids, block_weights, table: out, in shared memory.
DEVICE void stand_in(const float *chosen_by, const float *p, const int *ids, const float *weights, const u64 *record_of,
                     const replayed *run, const void *rule, int experts, int picks, int normalise, int *block_ids,
                     float *block_weights, u64 *table) {
    __shared__ float values[ROUTER_EXPERTS];
    const int i = thread_index();
    const u32 may_substitute = now(run + 1);
    for (int e = i; e < experts; e += ROUTER_THREADS) table[e] = record_of[e], values[e] = chosen_by[e];
    if (i < picks) block_ids[i] = ids[i], block_weights[i] = weights[i];
    sync_block();
    if (may_substitute)
        substitute(*(const fomoe_car *)rule, values, p, table, block_ids, block_weights, experts, picks, normalise);
}

// logits: [tokens][experts]; ids, weights: [tokens][picks].  Grid (tokens).
KERNEL(ROUTER_THREADS, route)
(const float *logits, int *ids, float *weights, int experts, int picks, int normalise, float scale) {
    start_kernel();
    __shared__ float values[ROUTER_EXPERTS], block_weights[MOST_PICKS];
    __shared__ int block_ids[MOST_PICKS];
    const int token = block_x(), i = thread_index();
    pick(logits + (u64)token * experts, values, block_ids, block_weights, experts, picks, normalise, scale);
    if (i < picks) ids[token * picks + i] = block_ids[i], weights[token * picks + i] = block_weights[i];
}
EXPORT_KERNEL(route)

#define SCORE_SOFTMAX 0
#define SCORE_SIGMOID 1
#define SCORE_LOGITS 2

// Routers of other kinds: p = softmax or sigmoid of logits + logit_bias, or those themselves.  The picks are the
// largest p + bias; weight = p without the bias, or the softmax of the picks' logits.  Both biases may be null; logits:
// changed where there is a logit_bias.  values: [tokens][experts] p + bias, and the logits become p; null where nobody
// asks.  groups: which experts can't be chosen (groups.h).  Grid (tokens).
template <class GROUPS>
DEVICE void route_by_score(const GROUPS &groups, float *logits, const float *logit_bias, const float *bias, int *ids,
                           float *weights, int experts, int picks, int score, int normalise, float scale,
                           float *values) {
    __shared__ float p[ROUTER_EXPERTS], choice[ROUTER_EXPERTS], chosen[MOST_PICKS], most_of[ROUTER_THREADS / 32];
    __shared__ int block_ids[MOST_PICKS];
    const int token = block_x(), t = thread_index();
    float most = -infinity(), sum = 0.f;
    for (int e = t; e < experts; e += ROUTER_THREADS) {
        float *logit = logits + (u64)token * experts + e;
        if (logit_bias) *logit += logit_bias[e];
        p[e] = *logit;
        most = larger(most, p[e]);
    }
    if (t < picks) block_ids[t] = t;  // a NaN leaves places untaken
    most = warp_max(most);
    if (lane_index() == 0) most_of[warp_index()] = most;
    sync_block();
    for (int i = 0; i < ROUTER_THREADS / 32; ++i) most = larger(most, most_of[i]);
    for (int e = t; e < experts; e += ROUTER_THREADS) {
        if (score == SCORE_SOFTMAX) p[e] = exponential(p[e] - most), sum += p[e];
        if (score == SCORE_SIGMOID) p[e] = sigmoid(p[e]);
    }
    sum = block_sum<ROUTER_THREADS / 32>(sum);
    for (int e = t; e < experts; e += ROUTER_THREADS) {
        if (score == SCORE_SOFTMAX) p[e] = p[e] / sum;
        choice[e] = bias ? p[e] + bias[e] : p[e];
        if (values) values[(u64)token * experts + e] = choice[e], logits[(u64)token * experts + e] = p[e];
    }
    sync_block();
    groups.leave(choice, values ? values + (u64)token * experts : values, experts);
    const int found = largest(choice, experts, picks, block_ids);
    if (t < picks) {
        const float value = p[block_ids[t]];
        chosen[t] = t >= found ? not_a_number() : score == SCORE_LOGITS ? exponential(value - p[block_ids[0]]) : value;
    }
    sync_block();
    if (t >= picks) return;
    float total = 0.f;
    for (int i = 0; i < picks; ++i) total += chosen[i];
    const float divisor = score == SCORE_LOGITS ? total : normalise ? larger(total, 6.103515625e-05f) : 1.f;
    ids[token * picks + t] = block_ids[t];
    weights[token * picks + t] = chosen[t] / divisor * scale;
}

struct all_groups {
    DEVICE_MEMBER void leave(float *, float *, int) const {}
};
KERNEL(ROUTER_THREADS, route_by)
(float *logits, const float *logit_bias, const float *bias, int *ids, float *weights, int experts, int picks, int score,
 int normalise, float scale, float *values) {
    start_kernel();
    route_by_score(all_groups(), logits, logit_bias, bias, ids, weights, experts, picks, score, normalise, scale,
                   values);
}
EXPORT_KERNEL(route_by)

// The picks of a router of another kind, after route_by.  Grid (1).
KERNEL(ROUTER_THREADS, resolve_picks)
(const int *ids, const float *weights, const u64 *record_of, u64 *records, u64 *late, void *post, const replayed *run,
 replayed *misses, int pairs) {
    start_kernel();
    resolve(ids, ids, weights, record_of, records, late, (u64 *)post, now(run), misses, pairs);
}
EXPORT_KERNEL(resolve_picks)

// What the next layer's router would pick of what this layer's experts are about to add to: word to the host, which may
// read ahead what is nowhere.  post: a 64-bit word for each guess, with the run's number in its upper half.  Grid (1).
KERNEL(32, post_guesses)(const int *ids, void *post, const replayed *run, int guesses) {
    start_kernel();
    for (int i = thread_index(); i < guesses; i += 32) post_word((u64 *)post + i, now(run), (u32)ids[i]);
}
EXPORT_KERNEL(post_guesses)

// The same where the engine was asked for cache-aware routing: what another expert would stand in for has its highest
// bit set, so that nobody reads it.  Grid (1).
RESIDENT_KERNEL(ROUTER_THREADS, 2, substitute_and_post)
(const float *chosen_by, const float *p, const int *ids, const float *weights, const u64 *record_of, void *post,
 const replayed *run, const void *rule, int experts, int guesses, int normalise) {
    start_kernel();
    __shared__ float block_weights[MOST_PICKS];
    __shared__ int block_ids[MOST_PICKS];
    __shared__ u64 table[ROUTER_EXPERTS];
    const int i = thread_index(), guess = i < guesses ? ids[i] : 0;
    const u32 number = now(run);
    stand_in(chosen_by, p, ids, weights, record_of, run, rule, experts, guesses, normalise, block_ids, block_weights,
             table);
    if (i < guesses) post_word((u64 *)post + i, number, (u32)guess | (block_ids[i] == guess ? 0 : FOMOE_STANDS_IN));
}
EXPORT_KERNEL(substitute_and_post)

// The first node of a token's graph: the run's header, and the tables that have changed, from the host's memory into
// the device's.  A kernel brings them and not a copy, because what a copy has written may be stale for a replayed
// graph. host_header, changed, host_tables: in host memory; header: header_quads times 16 bytes; changed: a word a
// layer; tables: [layers][experts].  Grid (header_quads / ROUTER_THREADS up, then layers).
KERNEL(ROUTER_THREADS, begin_run)
(const u8 *host_header, u8 *header, const u32 *changed, const u64 *host_tables, u64 *tables, int header_quads,
 int experts) {
    start_kernel();
    const int header_blocks = (header_quads + ROUTER_THREADS - 1) / ROUTER_THREADS, layer = block_x() - header_blocks;
    if (layer < 0) {
        const int i = block_x() * ROUTER_THREADS + thread_index();
        if (i < header_quads) *(u32x4 *)(header + 16 * (u64)i) = system_load16(host_header + 16 * (u64)i);
        return;
    }
    // one thread asks: a volatile load is a transfer over the link of its own, 512 of the same word took 16 us a layer
    __shared__ u32 is_changed;
    if (thread_index() == 0) is_changed = system_load4(changed + layer);
    sync_block();
    if (!is_changed) return;
    u64 values[ROUTER_EXPERTS / ROUTER_THREADS];
#pragma unroll
    for (int r = 0; r < ROUTER_EXPERTS / ROUTER_THREADS; ++r) {
        const int e = thread_index() + ROUTER_THREADS * r;
        values[r] = e < experts ? system_load8(host_tables + (u64)layer * experts + e) : 0;
    }
#pragma unroll
    for (int r = 0; r < ROUTER_EXPERTS / ROUTER_THREADS; ++r) {
        const int e = thread_index() + ROUTER_THREADS * r;
        if (e < experts) tables[(u64)layer * experts + e] = values[r];
    }
}
EXPORT_KERNEL(begin_run)

// Both for one token, in one launch.  Grid (1).
KERNEL(ROUTER_THREADS, route_and_resolve)
(const float *logits, int *ids, float *weights, const u64 *record_of, u64 *records, u64 *late, void *post,
 const replayed *run, replayed *misses, int experts, int picks, int normalise, float scale) {
    start_kernel();
    __shared__ float values[ROUTER_EXPERTS], block_weights[MOST_PICKS];
    __shared__ int block_ids[MOST_PICKS];
    __shared__ u64 table[ROUTER_EXPERTS];
    const int i = thread_index();
    const u32 number = now(run);  // it and the table are on their way while the picks are made
    u64 entries[ROUTER_EXPERTS / ROUTER_THREADS];
#pragma unroll
    for (int r = 0; r < ROUTER_EXPERTS / ROUTER_THREADS; ++r) {
        const int e = i + r * ROUTER_THREADS;
        entries[r] = e < experts ? record_of[e] : 0;
    }
    pick(logits, values, block_ids, block_weights, experts, picks, normalise, scale);
#pragma unroll
    for (int r = 0; r < ROUTER_EXPERTS / ROUTER_THREADS; ++r) table[i + r * ROUTER_THREADS] = entries[r];
    if (i < picks) ids[i] = block_ids[i], weights[i] = block_weights[i];
    sync_block();
    resolve(block_ids, block_ids, block_weights, table, records, late, (u64 *)post, number, misses, picks);
}
EXPORT_KERNEL(route_and_resolve)

// For one token after route, where the engine was asked for cache-aware routing: stand-ins, then records and post.
// ids, weights: changed.  Grid (1).
RESIDENT_KERNEL(ROUTER_THREADS, 2, substitute_and_resolve)
(const float *chosen_by, const float *p, int *ids, float *weights, const u64 *record_of, u64 *records, u64 *late,
 void *post, const replayed *run, replayed *misses, const void *rule, int experts, int picks, int normalise) {
    start_kernel();
    __shared__ float block_weights[MOST_PICKS], wanted_weights[MOST_PICKS];
    __shared__ int block_ids[MOST_PICKS], wanted[MOST_PICKS];
    __shared__ u64 table[ROUTER_EXPERTS];
    const int i = thread_index();
    const u32 number = now(run);
    if (i < picks) wanted[i] = ids[i], wanted_weights[i] = weights[i];
    stand_in(chosen_by, p, ids, weights, record_of, run, rule, experts, picks, normalise, block_ids, block_weights,
             table);
    if (i < picks) ids[i] = block_ids[i], weights[i] = block_weights[i];
    resolve(block_ids, wanted, wanted_weights, table, records, late, (u64 *)post, number, misses, picks);
}
EXPORT_KERNEL(substitute_and_resolve)

// late[pair]: the records that the host has put in place, 0 for those that were there before.  Holds the stream until
// all of them are whole (not at all when nothing was missing), or the host says stop; where something is to be done
// between gate and up and that.  reply, stop: in host memory.  Grid (1).
KERNEL(256, wait_for_misses)
(const replayed *misses, const u64 *records, const void *reply, const replayed *run, const void *stop, u64 *late,
 int pairs) {
    start_kernel();
    if (!now(misses)) return;
    for (int pair = thread_index(); pair < pairs; pair += 256)
        if (!records[pair] && !(late[pair] & 1)) await_whole(late, reply, run, stop, pairs, pair);
}
EXPORT_KERNEL(wait_for_misses)
