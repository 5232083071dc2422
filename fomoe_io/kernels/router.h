// From router logits to records: softmax, the top picks, where their experts lie, and word to the host of those that
// lie nowhere on the device.
#pragma once
#include "experts.h"
#include "norms.h"

#define ROUTER_THREADS 512
#define ROUTER_EXPERTS 1024  // the most experts a layer may have
#define ROUTER_GROUPS (ROUTER_THREADS / 8)  // at least MOST_PICKS

// What a layer's router tells the host, in memory that both see: a 64-bit word with the number of misses, then one for
// each pair with its expert.  Every word carries the run's number in its upper half, so their order does not matter and
// nobody waits for a fence.  The host counts the picks of every layer (its policy lives on them) and fetches those that
// are missing.
DEVICE u64 posted(const u32 *run, u32 value) { return (u64)*run << 32 | value; }

// The host's answer: where the missing records have been put, 0 for the others.  `sequence` is written last.
struct answer {
    u32 sequence, unused;  // then u64 records[pairs]
};

// The values of a layer's table for an expert without a record on the device; addresses are larger.
#define IN_NVME 0
#define IN_DRAM 1

// ids -> records[pair] (0: not on the device), the post, and *misses for the wait.  A whole block calls it.
// run: the number of this replay of the program, which tells one post from the last.  ids and record_of may lie in
// shared memory.
DEVICE void resolve(const int *ids, const u64 *record_of, u64 *records, volatile u64 *post, const u32 *run, u32 *misses,
                    int pairs) {
    float absent = 0.f;
    for (int pair = thread_index(); pair < pairs; pair += ROUTER_THREADS) {
        const u64 record = record_of[ids[pair]];
        records[pair] = record > IN_DRAM ? record : 0;
        post[1 + pair] = posted(run, (u32)ids[pair]);
        absent += record > IN_DRAM ? 0.f : 1.f;
    }
    absent = block_sum<ROUTER_THREADS / 32>(absent);
    if (thread_index() > 0) return;
    *misses = (u32)absent;
    post[0] = posted(run, (u32)absent);
}

// Softmax over all logits, the picks in descending order (ties: the lower id first).  weight = p, divided by
// max(sum over the picks, 2^-14) when `normalise`, times scale.
//
// The largest of each of ROUTER_GROUPS parts are compared first: their picks-th is passed by at least as many experts
// as are wanted, and by few others.  An expert's place is the number of those that go before it, so there is no loop
// over picks, and no tie or order of arrival is left to chance.
// block_ids: the picks once more, in shared memory.
DEVICE void pick(const float *logits, int *ids, float *weights, int *block_ids, int experts, int picks, int normalise,
                 float scale) {
    __shared__ float p[ROUTER_EXPERTS], most_of[ROUTER_THREADS / 32], chosen[MOST_PICKS], best_of[ROUTER_GROUPS], least;
    __shared__ int candidates[ROUTER_EXPERTS], count;
    float most = -infinity(), sum = 0.f, best = -1.f;
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) most = larger(most, logits[e]);
    if (thread_index() == 0) count = 0;
    if (thread_index() < picks) {
        // A NaN among the logits leaves places untaken: valid ids and a weight that shows.
        block_ids[thread_index()] = thread_index();
        chosen[thread_index()] = not_a_number();
    }
    most = warp_max(most);
    if (lane_index() == 0) most_of[warp_index()] = most;
    sync_block();
#pragma unroll
    for (int i = 0; i < ROUTER_THREADS / 32; ++i) most = larger(most, most_of[i]);
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) {
        const float mine = exponential(logits[e] - most);
        p[e] = mine, sum += mine, best = larger(best, mine);
    }
    best = larger(best, exchange_float<1>(best));
    best = larger(best, exchange_float<2>(best));
    best = larger(best, exchange_float<4>(best));
    if (thread_index() % 8 == 0) best_of[thread_index() / 8] = best;
    sum = block_sum<ROUTER_THREADS / 32>(sum);
    if (thread_index() < ROUTER_GROUPS) {
        int before = 0;
#pragma unroll 16
        for (int other = 0; other < ROUTER_GROUPS; ++other)
            before += best_of[other] > best_of[thread_index()] ||
                      (best_of[other] == best_of[thread_index()] && other < thread_index());
        if (before == picks - 1) least = best_of[thread_index()];
    }
    sync_block();
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS)
        if (p[e] >= least) candidates[take_place(&count)] = e;
    sync_block();
    for (int i = thread_index(); i < count; i += ROUTER_THREADS) {
        const int e = candidates[i];
        const float mine = p[e];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            const int other = candidates[j];
            before += p[other] > mine || (p[other] == mine && other < e);
        }
        if (before < picks) block_ids[before] = e, chosen[before] = mine / sum;
    }
    sync_block();
    if (thread_index() >= picks) return;
    float total = 0.f;
#pragma unroll 8
    for (int i = 0; i < picks; ++i) total += chosen[i];
    const float divisor = normalise ? larger(total, 6.103515625e-05f) : 1.f;
    weights[thread_index()] = chosen[thread_index()] / divisor * scale;
    ids[thread_index()] = block_ids[thread_index()];
}

// logits: [tokens][experts]; ids, weights: [tokens][picks].  Grid (tokens).
KERNEL(ROUTER_THREADS, route)
(const float *logits, int *ids, float *weights, int experts, int picks, int normalise, float scale) {
    __shared__ int block_ids[MOST_PICKS];
    const int token = block_x();
    pick(logits + (u64)token * experts, ids + token * picks, weights + token * picks, block_ids, experts, picks,
         normalise, scale);
}
EXPORT_KERNEL(route)

// For many tokens: the picks of all, after route.  Grid (1).
KERNEL(ROUTER_THREADS, resolve_picks)
(const int *ids, const u64 *record_of, u64 *records, void *post, const u32 *run, u32 *misses, int pairs) {
    resolve(ids, record_of, records, (volatile u64 *)post, run, misses, pairs);
}
EXPORT_KERNEL(resolve_picks)

// Both for one token, in one launch.  Grid (1).
KERNEL(ROUTER_THREADS, route_and_resolve)
(const float *logits, int *ids, float *weights, const u64 *record_of, u64 *records, void *post, const u32 *run,
 u32 *misses, int experts, int picks, int normalise, float scale) {
    __shared__ int block_ids[MOST_PICKS];
    __shared__ u64 table[ROUTER_EXPERTS];  // on its way while the picks are made
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) table[e] = record_of[e];
    pick(logits, ids, weights, block_ids, experts, picks, normalise, scale);
    sync_block();
    resolve(block_ids, table, records, (volatile u64 *)post, run, misses, picks);
}
EXPORT_KERNEL(route_and_resolve)

// late[pair]: the records that the host has put in place, 0 for those that were there before.  Holds the stream until
// the host has answered this run (not at all when nothing was missing), or tells it to stop (then late stays 0, and
// what is computed from it is NaN).  reply, stop: in host memory.  Grid (1).
KERNEL(256, wait_for_misses)
(const u32 *misses, const void *reply, const u32 *run, const u32 *stop, u64 *late, int pairs) {
    const volatile answer *words = (const volatile answer *)reply;
    const volatile u64 *records = (const volatile u64 *)(words + 1);
    const bool is_waiting = *misses > 0;
    if (is_waiting && thread_index() == 0) {
        while (words->sequence != *run && !*(const volatile u32 *)stop) pause_thread();
        fence_system();
    }
    sync_block();
    const bool is_answered = is_waiting && words->sequence == *run;
    for (int pair = thread_index(); pair < pairs; pair += 256) late[pair] = is_answered ? records[pair] : 0;
}
EXPORT_KERNEL(wait_for_misses)
