/* From router logits to chosen experts. */
#ifndef FOMOE_ROUTING_H
#define FOMOE_ROUTING_H

#include <stdint.h>

/* Softmax over n logits, the top k by probability (ties: lower id first), in descending order.
 * probabilities: scratch and result, n floats (softmax of all).  ids, weights: k each;
 * weights = p[ids], divided by max(sum, 2^-14) when normalise != 0 (as llama.cpp), times scale. */
void fomoe_route(int n, int k, const float *logits, int normalise, float scale, float *probabilities, int32_t *ids,
                 float *weights);

#endif
