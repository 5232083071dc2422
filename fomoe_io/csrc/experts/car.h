/* Cache-aware routing: where the router barely cares, compute a resident expert instead of one that would have to be
 * read.  Only the rule: a pure function of the router's logits and of where the experts are, without dependencies, so
 * that the engine, the tests and a GPU kernel can use the same text.
 *
 * Which experts are swapped depends on three sets only: the true picks that are missing, the resident ones that were
 * not picked, and how far the two overlap in what the router says.  All rules therefore pair the weakest missing pick
 * with the best candidate, the next weakest with the next best, and stop at the first pair that the rule refuses: no
 * other pairing gives up less probability for the same number of reads saved. */
#ifndef FOMOE_CAR_H
#define FOMOE_CAR_H

#include "../gpu/kernels/car_rule.h"

#include <math.h>
#include <stdint.h>

/* The best `most` resident experts that were not picked, best first; returns how many there are.  What the router can't
 * choose, of a group that it leaves, is minus infinity. */
static inline int fomoe_car_candidates(int n, int last_pick, const float *values, const float *p, const int8_t *tiers,
                                       float handicap, int most, int32_t *experts) {
    float value[FOMOE_CAR_MOST_SWAPS], least = values[last_pick];
    int count = 0;
    for (int e = 0; e < n; e++) {
        /* what fails most often, and most predictably, goes first */
        if (count == most && !(values[e] > value[most - 1])) continue;
        if (tiers[e] >= FOMOE_CAR_RESIDENT || !(values[e] > -INFINITY)) continue;
        if (!(values[e] < least || (values[e] == least && e > last_pick)))
            continue; /* picked: ties go to the lower id */
        float v = values[e] - (tiers[e] ? handicap * (p ? p[e] : 1) : 0);
        if (count == most && !(v > value[most - 1])) continue;
        int j = count < most ? count++ : most - 1;
        for (; j > 0 && v > value[j - 1]; j--) {
            value[j] = value[j - 1];
            experts[j] = experts[j - 1];
        }
        value[j] = v;
        experts[j] = e;
    }
    return count;
}

/* Swap missing true picks for resident experts.
 *
 * n, k: experts, and picks of a token.  values: what the router chooses by, its logits where p is NULL.  p: the weights
 * of all experts, not yet normalised, of a router that chooses by more than logits (a sigmoid, a bias, groups): what it
 * gives up is then the difference of values, as a share of p.  tiers: where each expert is.  ids, weights: the k true
 * picks, best first, and their weights; changed where a swap happens.  A stand-in gets its own probability on the same
 * scale, and the weights are then scaled to their old sum when normalise != 0, as if the router had picked the new set
 * itself.
 * replaced: k entries, the true pick in whose place ids[i] stands, -1 where nothing changed.
 * Returns the number of swaps; with none, ids and weights are untouched. */
static inline int fomoe_car_choose(const fomoe_car *car, int n, int k, int normalise, const float *values,
                                   const float *p, const int8_t *tiers, int32_t *ids, float *weights,
                                   int32_t *replaced) {
    int32_t missing[FOMOE_CAR_MOST_SWAPS], candidates[FOMOE_CAR_MOST_SWAPS];
    int misses = 0, swaps = 0;
    float sum = 0, mass = 0, highest = values[ids[0]], lowest = highest, spent = 0;
    for (int i = k - 1; i >= 0; i--) {
        replaced[i] = -1;
        sum += weights[i];
        if (p) mass += p[ids[i]];
        if (i >= car->keep && misses < car->swaps && tiers[ids[i]] >= FOMOE_CAR_RESIDENT) missing[misses++] = i;
    }
    if (!misses || (p && !(mass > 0))) return 0;
    int found = fomoe_car_candidates(n, ids[k - 1], values, p, tiers, car->slow_handicap, misses, candidates);
    if (car->rule == FOMOE_CAR_PRIOR)
        for (int e = 0; e < n; e++) lowest = values[e] < lowest && values[e] > -INFINITY ? values[e] : lowest;
    for (; swaps < found; swaps++) {
        int rank = missing[swaps], candidate = candidates[swaps], allowed;
        float ahead = values[ids[rank]] - values[candidate], ratio = p ? 1 - ahead / p[ids[rank]] : expf(-ahead),
              lost = p ? ahead / mass : weights[rank] * (1 - ratio) / sum;
        spent += lost;
        switch (car->rule) {
        case FOMOE_CAR_RATIO: allowed = ratio >= car->parameter; break;
        case FOMOE_CAR_PRIOR: allowed = ahead < car->parameter * (highest - lowest); break;
        case FOMOE_CAR_REGRET: allowed = lost <= car->parameter; break;
        case FOMOE_CAR_BUDGET: allowed = spent <= car->parameter; break;
        default: allowed = 0;
        }
        if (!allowed) break;
        replaced[rank] = ids[rank];
        ids[rank] = candidate;
        weights[rank] = p ? p[candidate] * (sum / mass) : weights[rank] * ratio;
    }
    if (!swaps || !normalise) return swaps;
    float rest = 0;
    for (int i = k - 1; i >= 0; i--) rest += weights[i];
    for (int i = 0; i < k; i++) weights[i] *= sum / rest;
    return swaps;
}

#endif
