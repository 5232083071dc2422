/* attention.h in lanes.  Four positions at a time: q is loaded once for them, and out once. */

static void scores_of(int n, int64_t length, float scale, const float *q, const float *keys, int64_t stride,
                      float *scores) {
    int64_t t = 0;
    for (; t + 4 <= length; t += 4) {
        const float *k = keys + t * stride;
        floats lanes[4] = {fill(0), fill(0), fill(0), fill(0)};
        float rest[4] = {0};
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            floats x = load(q + i);
            lanes[0] = plus_product(lanes[0], x, load(k + i));
            lanes[1] = plus_product(lanes[1], x, load(k + stride + i));
            lanes[2] = plus_product(lanes[2], x, load(k + 2 * stride + i));
            lanes[3] = plus_product(lanes[3], x, load(k + 3 * stride + i));
        }
        for (; i < n; i++)
            for (int j = 0; j < 4; j++) rest[j] += q[i] * k[j * stride + i];
        scores[t] = scale * (sum(lanes[0]) + rest[0]);
        scores[t + 1] = scale * (sum(lanes[1]) + rest[1]);
        scores[t + 2] = scale * (sum(lanes[2]) + rest[2]);
        scores[t + 3] = scale * (sum(lanes[3]) + rest[3]);
    }
    for (; t < length; t++) {
        const float *k = keys + t * stride;
        floats lanes = fill(0);
        float rest = 0;
        int i = 0;
        for (; i + LANES <= n; i += LANES) lanes = plus_product(lanes, load(q + i), load(k + i));
        for (; i < n; i++) rest += q[i] * k[i];
        scores[t] = scale * (sum(lanes) + rest);
    }
}

static void weighted_values(int n, int64_t length, const float *scores, const float *values, int64_t stride,
                            float *out) {
    int64_t t = 0;
    memset(out, 0, n * sizeof *out);
    for (; t + 4 <= length; t += 4) {
        const float *v = values + t * stride, *s = scores + t;
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            floats y = plus_product(load(out + i), fill(s[0]), load(v + i));
            y = plus_product(y, fill(s[1]), load(v + stride + i));
            y = plus_product(y, fill(s[2]), load(v + 2 * stride + i));
            store(out + i, plus_product(y, fill(s[3]), load(v + 3 * stride + i)));
        }
        for (; i < n; i++)
            for (int j = 0; j < 4; j++) out[i] += s[j] * v[j * stride + i];
    }
    for (; t < length; t++) {
        const float *v = values + t * stride;
        int i = 0;
        for (; i + LANES <= n; i += LANES) store(out + i, plus_product(load(out + i), fill(scores[t]), load(v + i)));
        for (; i < n; i++) out[i] += scores[t] * v[i];
    }
}

static void softmax_beside(int n, const float *sink, float *x);

static void attention_head(int k_dim, int v_dim, int64_t length, float scale, const float *q, const float *keys,
                           int64_t key_stride, const float *values, int64_t value_stride, float *scores,
                           const float *sink, float *out) {
    scores_of(k_dim, length, scale, q, keys, key_stride, scores);
    softmax_beside(length, sink, scores);
    weighted_values(v_dim, length, scores, values, value_stride, out);
}
