#include <stddef.h>
#include <stdint.h>

#include "car.h"
#include "residency.h"
#include "routing.h"

enum { MOST_EXPERTS = 1024, MOST_USED = 32 };

/* For bench/decision.py: what a token costs in one layer before its reads can start, without reading or computing:
 * the router's choice alone (residency == NULL), with the residency's bookkeeping, and with cache-aware routing
 * (car != NULL) in between, in the engine's order.  logits: [rows][n], n <= 1024, k <= 32; decision i has those of row
 * i % rows.  Returns the number of swaps, -1 when there is no room for k experts. */
int64_t fomoe_decide_many(fomoe_residency *residency, const fomoe_car *car, int64_t count, int rows, int n, int k,
                          const float *logits) {
    float probabilities[MOST_EXPERTS], weights[MOST_USED];
    int32_t ids[MOST_USED], replaced[MOST_USED];
    fomoe_placement placements[MOST_USED];
    fomoe_move moves[2 * MOST_USED];
    int64_t swaps = 0;
    for (int64_t i = 0; i < count; i++) {
        const float *row = logits + i % rows * n;
        int swapped = 0, move_count;
        fomoe_route(n, k, row, 1, 1, probabilities, ids, weights);
        if (!residency) continue;
        fomoe_residency_tick(residency, 1);
        fomoe_residency_touch(residency, 0, 0, ids, k);
        if (car)
            swapped =
                fomoe_car_choose(car, n, k, 1, row, NULL, fomoe_residency_tiers(residency, 0), ids, weights, replaced);
        fomoe_residency_substituted(residency, swapped);
        if (fomoe_residency_resolve(residency, 0, ids, 0, k, placements, moves, &move_count)) return -1;
        fomoe_residency_release(residency, 0, ids, k);
        swaps += swapped;
    }
    return swaps;
}
