// A rule of cache-aware routing and how far it goes: one text for the host (csrc/experts/car.h, which says how they are
// used) and for the device (router.h), so that a field more can't shift one side's fields against the other's.
#ifndef FOMOE_CAR_RULE_H
#define FOMOE_CAR_RULE_H

enum fomoe_car_rule {
    FOMOE_CAR_OFF = 0,
    FOMOE_CAR_RATIO = 1, // swap when p_candidate / p_pick >= parameter
    FOMOE_CAR_PRIOR = 2, // swap when z_pick - z_candidate < parameter * (range of the token's logits)
    FOMOE_CAR_REGRET = 3, // swap when (p_pick - p_candidate) / (mass of the top k) <= parameter
    FOMOE_CAR_BUDGET = 4, // the same, summed over the layer's swaps
};

enum { FOMOE_CAR_MOST_SWAPS = 16, FOMOE_CAR_RESIDENT = 2 }; // tiers below FOMOE_CAR_RESIDENT are memory

typedef struct {
    int rule;
    float parameter;
    int keep; // so many of the best picks are never swapped
    int swaps; // most swaps of a token in a layer, up to FOMOE_CAR_MOST_SWAPS
    int warmup; // so many tokens at a session's start stay exact
    int backfill; // most picks of a layer that are read after another expert stood in for them
    float slow_handicap; // nats that a candidate of the slower tier must be ahead of one of the faster tier
} fomoe_car;

// Of a guess that a device posts: another expert would stand in for this one.
#define FOMOE_STANDS_IN 0x80000000u

#endif
