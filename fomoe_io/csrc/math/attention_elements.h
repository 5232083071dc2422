/* The scores of positions, and their values' weighted sum, for keys and values of one type: included once for each,
 * with ELEMENT, its name in ELEMENTS(), LOAD_ELEMENTS and ELEMENT_FLOAT.  Four positions at a time: q is loaded once
 * for them, and out once. */

static void ELEMENTS(scores_of)(int n, int64_t length, float scale, const float *q, const ELEMENT *keys, int64_t stride,
                                float *scores) {
    int64_t t = 0;
    for (; t + 4 <= length; t += 4) {
        const ELEMENT *k = keys + t * stride;
        floats lanes[4] = {fill(0), fill(0), fill(0), fill(0)};
        float rest[4] = {0};
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            floats x = load(q + i);
            lanes[0] = plus_product(lanes[0], x, LOAD_ELEMENTS(k + i));
            lanes[1] = plus_product(lanes[1], x, LOAD_ELEMENTS(k + stride + i));
            lanes[2] = plus_product(lanes[2], x, LOAD_ELEMENTS(k + 2 * stride + i));
            lanes[3] = plus_product(lanes[3], x, LOAD_ELEMENTS(k + 3 * stride + i));
        }
        for (; i < n; i++)
            for (int j = 0; j < 4; j++) rest[j] += q[i] * ELEMENT_FLOAT(k[j * stride + i]);
        scores[t] = scale * (sum(lanes[0]) + rest[0]);
        scores[t + 1] = scale * (sum(lanes[1]) + rest[1]);
        scores[t + 2] = scale * (sum(lanes[2]) + rest[2]);
        scores[t + 3] = scale * (sum(lanes[3]) + rest[3]);
    }
    for (; t < length; t++) {
        const ELEMENT *k = keys + t * stride;
        floats lanes = fill(0);
        float rest = 0;
        int i = 0;
        for (; i + LANES <= n; i += LANES) lanes = plus_product(lanes, load(q + i), LOAD_ELEMENTS(k + i));
        for (; i < n; i++) rest += q[i] * ELEMENT_FLOAT(k[i]);
        scores[t] = scale * (sum(lanes) + rest);
    }
}

static void ELEMENTS(weighted_values)(int n, int64_t length, const float *scores, const ELEMENT *values, int64_t stride,
                                      float *out) {
    int64_t t = 0;
    memset(out, 0, n * sizeof *out);
    for (; t + 4 <= length; t += 4) {
        const ELEMENT *v = values + t * stride;
        const float *s = scores + t;
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            floats y = plus_product(load(out + i), fill(s[0]), LOAD_ELEMENTS(v + i));
            y = plus_product(y, fill(s[1]), LOAD_ELEMENTS(v + stride + i));
            y = plus_product(y, fill(s[2]), LOAD_ELEMENTS(v + 2 * stride + i));
            store(out + i, plus_product(y, fill(s[3]), LOAD_ELEMENTS(v + 3 * stride + i)));
        }
        for (; i < n; i++)
            for (int j = 0; j < 4; j++) out[i] += s[j] * ELEMENT_FLOAT(v[j * stride + i]);
    }
    for (; t < length; t++) {
        const ELEMENT *v = values + t * stride;
        int i = 0;
        for (; i + LANES <= n; i += LANES)
            store(out + i, plus_product(load(out + i), fill(scores[t]), LOAD_ELEMENTS(v + i)));
        for (; i < n; i++) out[i] += scores[t] * ELEMENT_FLOAT(v[i]);
    }
}

static void ELEMENTS(attention_head)(int k_dim, int v_dim, int64_t length, float scale, const float *q,
                                     const void *keys, int64_t key_stride, const void *values, int64_t value_stride,
                                     float *scores, const float *sink, float *out) {
    ELEMENTS(scores_of)(k_dim, length, scale, q, keys, key_stride, scores);
    softmax_beside(length, sink, scores);
    ELEMENTS(weighted_values)(v_dim, length, scores, values, value_stride, out);
}
