#include "routing.h"

#include <math.h>
#include <string.h>

#include "math/vector_ops.h"

/* Smallest sum of chosen probabilities to divide by: llama.cpp's clamp, the smallest normal half float. */
static const float LEAST_SUM = 6.103515625e-5f;

void fomoe_route(int n, int k, const float *logits, int normalise, float scale, float *probabilities, int32_t *ids,
                 float *weights) {
    int count = 0;
    memcpy(probabilities, logits, n * sizeof *probabilities);
    fomoe_softmax(n, probabilities);
    /* Insertion into a sorted list of k: most experts fail the first comparison.  Logits decide (softmax may round two
     * different ones to one probability); an equal later one does not pass, so ties go to the lower id. */
    for (int i = 0; i < n; i++) {
        if (count == k && !(logits[i] > logits[ids[k - 1]])) continue;
        int j = count < k ? count++ : k - 1;
        for (; j > 0 && logits[i] > logits[ids[j - 1]]; j--) ids[j] = ids[j - 1];
        ids[j] = i;
    }
    float sum = 0;
    for (int j = 0; j < k; j++) sum += weights[j] = probabilities[ids[j]];
    float factor = scale;
    if (normalise) factor = scale / (sum > LEAST_SUM ? sum : LEAST_SUM);
    for (int j = 0; j < k; j++) weights[j] *= factor;
}
