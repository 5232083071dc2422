#include "attention.h"

#include <string.h>

#include "clones.h"
#include "vector_ops.h"

enum { LANES = 16 };

CLONES static void scores_of(int n, int64_t length, float scale, const float *q, const float *keys, int64_t stride,
                             float *scores) {
    for (int64_t t = 0; t < length; t++) {
        const float *k = keys + t * stride;
        float lane[LANES] = {0}, dot = 0;
        int i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) lane[j] += q[i + j] * k[i + j];
        for (; i < n; i++) dot += q[i] * k[i];
        for (int j = 0; j < LANES; j++) dot += lane[j];
        scores[t] = scale * dot;
    }
}

CLONES static void weighted_values(int n, int64_t length, const float *scores, const float *values, int64_t stride,
                                   float *out) {
    memset(out, 0, n * sizeof *out);
    for (int64_t t = 0; t < length; t++) {
        const float *v = values + t * stride;
        for (int i = 0; i < n; i++) out[i] += scores[t] * v[i];
    }
}

void fomoe_attention_head(int k_dim, int v_dim, int64_t length, float scale, const float *q, const float *keys,
                          int64_t key_stride, const float *values, int64_t value_stride, float *scores, float *out) {
    scores_of(k_dim, length, scale, q, keys, key_stride, scores);
    fomoe_softmax(length, scores);
    weighted_values(v_dim, length, scores, values, value_stride, out);
}
