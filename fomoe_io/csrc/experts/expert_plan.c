#include "expert_plan.h"

#include <stdlib.h>
#include <string.h>

int fomoe_plan_new(fomoe_expert_plan *p, int experts) {
    size_t most = experts > 0 ? experts : 1;
    *p = (fomoe_expert_plan){
        .ids = malloc(most * sizeof *p->ids),
        .pairs = malloc(most * sizeof *p->pairs),
        .requests = malloc(most * sizeof *p->requests),
        .index = malloc(most * sizeof *p->index),
        .missing = malloc(3 * most * sizeof *p->missing),
    };
    if (!p->ids || !p->pairs || !p->requests || !p->index || !p->missing) {
        fomoe_plan_free(p);
        return -1;
    }
    for (size_t i = 0; i < most; i++) p->index[i] = -1;
    return 0;
}

void fomoe_plan_free(fomoe_expert_plan *p) {
    free(p->ids);
    free(p->pairs);
    free(p->requests);
    free(p->index);
    free(p->missing);
    *p = (fomoe_expert_plan){0};
}

static void put(fomoe_expert_plan *p, int i, int32_t id, int32_t pairs, int32_t requests) {
    p->ids[i] = id;
    p->pairs[i] = pairs;
    p->requests[i] = requests;
    p->index[id] = i;
}

void fomoe_plan_partition(fomoe_expert_plan *p, const fomoe_residency *r, int layer) {
    int misses = 0, slot;
    p->hits = 0;
    for (int i = 0; i < p->count; i++) {
        if (fomoe_residency_find(r, layer, p->ids[i], &slot) == FOMOE_TIER_NVME) {
            memcpy(p->missing + 3 * misses++, (int32_t[]){p->ids[i], p->pairs[i], p->requests[i]}, 3 * sizeof(int32_t));
        } else {
            put(p, p->hits, p->ids[i], p->pairs[i], p->requests[i]);
            p->hits++;
        }
    }
    for (int i = 0; i < misses; i++) {
        const int32_t *m = p->missing + 3 * i;
        put(p, p->hits + i, m[0], m[1], m[2]);
    }
}

void fomoe_plan_end(fomoe_expert_plan *p) {
    for (int i = 0; i < p->count; i++) p->index[p->ids[i]] = -1;
}
