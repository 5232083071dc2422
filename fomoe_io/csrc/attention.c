#include "attention.h"

#include <string.h>

#include "clones.h"
#include "vector_ops.h"

CLONES static void scores_of(int n, int64_t length, float scale, const float *q, const float *keys, int64_t stride,
                             float *scores) {
    for (int64_t t = 0; t < length; t++) {
        const float *k = keys + t * stride;
        fomoe_lanes lane = {0}, a, b;
        float dot = 0;
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            load_lanes(&a, q + i);
            load_lanes(&b, k + i);
            lane += a * b;
        }
        for (; i < n; i++) dot += q[i] * k[i];
        scores[t] = scale * (dot + sum_lanes(&lane));
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
