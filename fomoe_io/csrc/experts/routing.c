#include "routing.h"

#include <math.h>
#include <string.h>

#include "math/vector_ops.h"

/* Smallest sum of chosen probabilities to divide by: llama.cpp's clamp, the smallest normal half float. */
static const float LEAST_SUM = 6.103515625e-5f;

/* Insertion into a sorted list of k: most fail the first comparison.  An equal later one does not pass, so ties go to
 * the lower id. */
static void choose(int n, int k, const float *scores, int32_t *ids) {
    int count = 0;
    for (int i = 0; i < n; i++) {
        if (count == k && !(scores[i] > scores[ids[k - 1]])) continue;
        int j = count < k ? count++ : k - 1;
        for (; j > 0 && scores[i] > scores[ids[j - 1]]; j--) ids[j] = ids[j - 1];
        ids[j] = i;
    }
}

static void weigh(int k, int normalise, float scale, const float *p, const int32_t *ids, float *weights) {
    float sum = 0;
    for (int j = 0; j < k; j++) sum += weights[j] = p[ids[j]];
    if (normalise) scale /= sum > LEAST_SUM ? sum : LEAST_SUM;
    for (int j = 0; j < k; j++) weights[j] *= scale;
}

void fomoe_route(int n, int k, const float *logits, int normalise, float scale, float *probabilities, int32_t *ids,
                 float *weights) {
    memcpy(probabilities, logits, n * sizeof *probabilities);
    fomoe_softmax(n, probabilities);
    /* logits decide: softmax may round two different ones to one probability */
    choose(n, k, logits, ids);
    weigh(k, normalise, scale, probabilities, ids, weights);
}

/* Experts of the groups that are not among the best can't be chosen. */
static void leave_groups(const fomoe_router *r, float *scores) {
    float best[FOMOE_MOST_GROUPS] = {0};
    int32_t kept[FOMOE_MOST_GROUPS], size = r->experts / r->groups;
    for (int g = 0; g < r->groups; g++) {
        const float *s = scores + g * size;
        float first = s[0], second = -INFINITY;
        for (int i = 1; i < size; i++)
            if (s[i] > first) {
                second = first;
                first = s[i];
            } else if (s[i] > second)
                second = s[i];
        best[g] = size > 1 ? first + second : first;
    }
    choose(r->groups, r->groups_used, best, kept);
    for (int g = 0; g < r->groups; g++) {
        int is_kept = 0;
        for (int j = 0; j < r->groups_used; j++) is_kept |= kept[j] == g;
        for (int i = 0; i < size && !is_kept; i++) scores[g * size + i] = -INFINITY;
    }
}

int fomoe_follows_logits(const fomoe_router *r) {
    return r->score != FOMOE_SCORE_SIGMOID && !r->bias && r->groups <= 1;
}

void fomoe_scores(const fomoe_router *r, const float *logits, float *p, float *values) {
    int n = r->experts;
    memcpy(p, logits, n * sizeof *p);
    if (r->score == FOMOE_SCORE_SOFTMAX) fomoe_softmax(n, p);
    for (int i = 0; i < n && r->score == FOMOE_SCORE_SIGMOID; i++) p[i] = fomoe_sigmoid(p[i]);
    for (int i = 0; i < n; i++) values[i] = r->bias ? p[i] + r->bias[i] : p[i];
    if (r->groups > 1) leave_groups(r, values);
}

void fomoe_route_by(const fomoe_router *r, const float *logits, float *scratch, int32_t *ids, float *weights) {
    int n = r->experts, k = r->used;
    float *p = scratch, *scores = scratch + n;
    if (r->score == FOMOE_SCORE_SOFTMAX && fomoe_follows_logits(r)) {
        fomoe_route(n, k, logits, r->normalise, r->scale, p, ids, weights);
        return;
    }
    fomoe_scores(r, logits, p, scores);
    choose(n, k, scores, ids);
    if (r->score != FOMOE_SCORE_LOGITS) {
        weigh(k, r->normalise, r->scale, p, ids, weights);
        return;
    }
    for (int j = 0; j < k; j++) weights[j] = p[ids[j]];
    fomoe_softmax(k, weights);
    for (int j = 0; j < k; j++) weights[j] *= r->scale;
}
