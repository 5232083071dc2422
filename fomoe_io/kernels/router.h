// From router logits to records: softmax, the top picks, where their experts lie, and word to the host of those that
// lie nowhere on the device.
#pragma once
#include "experts.h"
#include "norms.h"

#define ROUTER_THREADS 512
#define ROUTER_EXPERTS 1024  // the most experts a layer may have

// Word to the host, in memory that both see.  The host waits for `sequence` to reach the number it expects; the other
// fields are written before it.
struct miss {
    u32 sequence, layer, expert, pair;
};

// What the resolver needs besides the picks.
struct resolver {
    const u64 *record_of;     // [experts of the layer]: the record's address, 0 when it is not on the device
    u64 *records;             // [pairs]: out
    volatile miss *ring;      // [ring_size] in host memory
    u32 *posted;              // how many misses have ever been posted (device memory)
    u32 layer, ring_size;     // a power of two, at least the misses that can be outstanding
};

// One thread, pairs in order, so that the host sees misses in the router's order.
DEVICE void resolve(const resolver &r, const int *ids, int pairs) {
    u32 count = *r.posted;
    for (int pair = 0; pair < pairs; ++pair) {
        const u64 record = r.record_of[ids[pair]];
        r.records[pair] = record;
        if (record) continue;
        volatile miss *m = r.ring + (count & (r.ring_size - 1));
        m->layer = r.layer, m->expert = (u32)ids[pair], m->pair = (u32)pair;
        fence_system();
        m->sequence = ++count;
    }
    fence_system();
    *r.posted = count;
}

// Softmax over all logits, the picks in descending order (ties: the lower id first).  weight = p, divided by
// max(sum over the picks, 2^-14) when `normalise`, times scale.  An expert's place among the picks is the number of
// experts that go before it, so there is no loop over picks and no tie is left to chance.
DEVICE void pick(const float *logits, int *ids, float *weights, int experts, int picks, int normalise, float scale) {
    __shared__ float p[ROUTER_EXPERTS], most_of[ROUTER_THREADS / 32], chosen[MOST_PICKS];
    float most = -infinity(), sum = 0.f;
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) most = larger(most, logits[e]);
    if (thread_index() < picks) {
        // A NaN among the logits leaves places untaken: valid ids and a weight that shows.
        ids[thread_index()] = thread_index();
        chosen[thread_index()] = not_a_number();
    }
    most = warp_max(most);
    if (lane_index() == 0) most_of[warp_index()] = most;
    sync_block();
#pragma unroll
    for (int i = 0; i < ROUTER_THREADS / 32; ++i) most = larger(most, most_of[i]);
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) sum += p[e] = exponential(logits[e] - most);
    sum = block_sum<ROUTER_THREADS / 32>(sum);
    for (int e = thread_index(); e < experts; e += ROUTER_THREADS) {
        const float mine = p[e];
        int before = 0;
#pragma unroll 4
        for (int other = 0; other < experts; ++other) before += p[other] > mine || (p[other] == mine && other < e);
        if (before < picks) ids[before] = e, chosen[before] = mine / sum;
    }
    sync_block();
    if (thread_index() >= picks) return;
    float total = 0.f;
    for (int i = 0; i < picks; ++i) total += chosen[i];
    const float divisor = normalise ? larger(total, 6.103515625e-05f) : 1.f;
    weights[thread_index()] = chosen[thread_index()] / divisor * scale;
}

// logits: [tokens][experts]; ids, weights: [tokens][picks].  Grid (tokens).
KERNEL(ROUTER_THREADS, route)
(const float *logits, int *ids, float *weights, int experts, int picks, int normalise, float scale) {
    const int token = block_x();
    pick(logits + (u64)token * experts, ids + token * picks, weights + token * picks, experts, picks, normalise, scale);
}
EXPORT_KERNEL(route)

// For many tokens: the picks of all, after route.  Grid (1).
KERNEL(32, resolve_picks)
(const int *ids, const u64 *record_of, u64 *records, void *ring, u32 *posted, int layer, int ring_size,
 int pairs) {
    if (thread_index() > 0) return;
    resolve({record_of, records, (volatile miss *)ring, posted, (u32)layer, (u32)ring_size}, ids, pairs);
}
EXPORT_KERNEL(resolve_picks)

// Both for one token, in one launch.  Grid (1).
KERNEL(ROUTER_THREADS, route_and_resolve)
(const float *logits, int *ids, float *weights, const u64 *record_of, u64 *records, void *ring,
 u32 *posted, int layer, int ring_size, int experts, int picks, int normalise, float scale) {
    pick(logits, ids, weights, experts, picks, normalise, scale);
    sync_block();
    if (thread_index() > 0) return;
    resolve({record_of, records, (volatile miss *)ring, posted, (u32)layer, (u32)ring_size}, ids, picks);
}
EXPORT_KERNEL(route_and_resolve)

// Holds the stream until the host has served every miss posted so far (at once when there is none), or tells it to
// stop.  served, stop: words in host memory.  Grid (1).
KERNEL(32, wait_for_misses)(const u32 *posted, const u32 *served, const u32 *stop) {
    if (thread_index() > 0) return;
    const u32 goal = *posted;
    while ((int)(goal - *(const volatile u32 *)served) > 0 && !*(const volatile u32 *)stop) pause_thread();
    fence_system();
}
EXPORT_KERNEL(wait_for_misses)
