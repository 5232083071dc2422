// Experts that come in equal groups (deepseek2): a token's are of the groups whose two best sum up to most.
#pragma once
#include "router.h"

#define MOST_GROUPS 64  // csrc/experts/routing.h

// choice, values (may be null) of the groups that are left become minus infinity.  A whole block calls it.
DEVICE void leave_groups(float *choice, float *values, int experts, int groups, int used) {
    __shared__ float best_of[MOST_GROUPS];
    __shared__ int is_kept[MOST_GROUPS];
    const int t = thread_index(), size = experts / groups;
    if (t < groups) {
        float first = choice[t * size], second = -infinity();
        for (int i = 1; i < size; ++i) {
            const float value = choice[t * size + i];
            if (value > first) {
                second = first;
                first = value;
            } else if (value > second)
                second = value;
        }
        best_of[t] = size > 1 ? first + second : first;
    }
    sync_block();
    if (t < groups) {
        int before = 0;
        for (int other = 0; other < groups; ++other)
            before += best_of[other] > best_of[t] || (best_of[other] == best_of[t] && other < t);
        is_kept[t] = before < used;
    }
    sync_block();
    for (int e = t; e < experts; e += ROUTER_THREADS) {
        if (is_kept[e / size]) continue;
        choice[e] = -infinity();
        if (values) values[e] = -infinity();
    }
    sync_block();
}

struct best_groups {
    int count, used;
    DEVICE_MEMBER void leave(float *choice, float *values, int experts) const {
        leave_groups(choice, values, experts, count, used);
    }
};

// As route_by; a group has one expert or more.  Grid (tokens).
KERNEL(ROUTER_THREADS, route_in_groups)
(float *logits, const float *logit_bias, const float *bias, int *ids, float *weights, int experts, int picks, int score,
 int normalise, float scale, float *values, int groups, int groups_used) {
    start_kernel();
    const best_groups best = {groups, groups_used};
    route_by_score(best, logits, logit_bias, bias, ids, weights, experts, picks, score, normalise, scale, values);
}
EXPORT_KERNEL(route_in_groups)
