#include "car.h"

/* For the tests: count decisions in a row, on row r % rows of the inputs. */
int64_t fomoe_car_choose_many(const fomoe_car *car, int64_t count, int rows, int n, int k, int normalise,
                              const float *values, const float *p, const int8_t *tiers, const int32_t *ids,
                              const float *weights, int32_t *chosen, float *chosen_weights, int32_t *replaced) {
    int64_t swaps = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = i % rows;
        for (int j = 0; j < k; j++) {
            chosen[row * k + j] = ids[row * k + j];
            chosen_weights[row * k + j] = weights[row * k + j];
        }
        swaps += fomoe_car_choose(car, n, k, normalise, values + row * n, p ? p + row * n : p, tiers + row * n,
                                  chosen + row * k, chosen_weights + row * k, replaced + row * k);
    }
    return swaps;
}
