/* From router logits to chosen experts. */
#ifndef FOMOE_ROUTING_H
#define FOMOE_ROUTING_H

#include <stdint.h>

enum { FOMOE_SCORE_SOFTMAX = 0, FOMOE_SCORE_SIGMOID = 1, FOMOE_SCORE_LOGITS = 2, FOMOE_MOST_GROUPS = 64 };

/* How experts are chosen.  A logit's score is p: softmax of all, its sigmoid, or the logit itself. */
typedef struct {
    int32_t experts, used;
    int32_t score;
    const float *bias;           /* of the choice only: experts are chosen by p + bias; NULL: none */
    int32_t groups, groups_used; /* equal runs of experts, of which those with the best sums of two are left */
    int32_t normalise;           /* the weights are made to sum 1 */
    float scale;                 /* of the weights, at last */
} fomoe_router;

/* The best experts (ties: lower id first), in descending order.  scratch: 2 * experts floats.  ids, weights: `used`
 * each; weights = p[ids], without the bias; of FOMOE_SCORE_LOGITS their softmax; divided by max(sum, 2^-14) when
 * normalise != 0 (as llama.cpp), times scale. */
void fomoe_route_by(const fomoe_router *, const float *logits, float *scratch, int32_t *ids, float *weights);

/* Whether the experts are those of the greatest logits. */
int fomoe_follows_logits(const fomoe_router *);

/* p: the score of each; values: what experts are chosen by, minus infinity in groups that are left. */
void fomoe_scores(const fomoe_router *, const float *logits, float *p, float *values);

/* The same by softmax alone.  probabilities: scratch and result, n floats (softmax of all). */
void fomoe_route(int n, int k, const float *logits, int normalise, float scale, float *probabilities, int32_t *ids,
                 float *weights);

#endif
