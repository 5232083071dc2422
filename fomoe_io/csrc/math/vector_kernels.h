/* The arithmetic of vector_ops.h in lanes. */

/* e^x: x = n ln2 + r with ln2 in two parts (Cody and Waite), |r| <= ln2/2, and e^r = 1 + r + r^2 p(r), p a Chebyshev
 * fit whose own error is 1.1e-8.  Clamped to where a float has a normal result: 1e-38 and less become 1.6e-38.
 * Relative error below 1.2e-7 (tests/test_vector_ops.py). */
INLINE float_vector exp_vector(float_vector x) {
    int_vector less = x < -87.0f, more = x > 88.0f;
    x = (float_vector)((less & (int_vector)((float_vector){0} - 87.0f)) | (~less & (int_vector)x));
    x = (float_vector)((more & (int_vector)((float_vector){0} + 88.0f)) | (~more & (int_vector)x));
    float_vector shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    float_vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float_vector p = r * 0.00139336521f + 0.00836318173f;
    p = p * r + 0.0416664667f;
    p = p * r + 0.166665763f;
    p = p * r + 0.5f;
    p = (p * r * r + r) + 1.0f;
    return p * (float_vector)(((int_vector)shifted - 0x4b400000 + 127) << 23);
}

INLINE floats exponential(floats x) {
#define EXPONENTIAL(i) x.part[i] = exp_vector(x.part[i]);
    FOR_PARTS(EXPONENTIAL)
#undef EXPONENTIAL
    return x;
}

/* x / (1 + exp(-gate)) */
INLINE floats gated(floats x, floats gate) {
    return divided(x, plus(fill(1.0f), exponential(times(gate, fill(-1.0f)))));
}

static double sum_of_squares(int n, const float *x) {
    doubles lanes;
    double rest = 0;
    int i = 0;
    memset(&lanes, 0, sizeof lanes);
    for (; i + LANES <= n; i += LANES) lanes = plus_squares(lanes, x + i);
    for (; i < n; i++) rest += (double)x[i] * x[i];
    return sum_doubles(lanes) + rest;
}

static void rms_norm(int n, const float *x, const float *w, float eps, float *y) {
    float scale = 1.0f / sqrtf((float)(sum_of_squares(n, x) / n) + eps);
    floats factor = fill(scale);
    int i = 0;
    if (w) {
        for (; i + LANES <= n; i += LANES) store(y + i, times(times(load(x + i), factor), load(w + i)));
        for (; i < n; i++) y[i] = x[i] * scale * w[i];
    } else {
        for (; i + LANES <= n; i += LANES) store(y + i, times(load(x + i), factor));
        for (; i < n; i++) y[i] = x[i] * scale;
    }
}

static void l2_norm(int n, const float *x, float eps, float scale, float *y) {
    float factor = scale / sqrtf((float)sum_of_squares(n, x) + eps);
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, times(load(x + i), fill(factor)));
    for (; i < n; i++) y[i] = x[i] * factor;
}

static void silu_mul(int n, const float *gate, const float *up, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats g = load(gate + i);
        store(y + i, times(gated(g, g), load(up + i)));
    }
    if (i < n) {
        floats g = load_tail(gate + i, n - i);
        store_tail(y + i, times(gated(g, g), load_tail(up + i, n - i)), n - i);
    }
}

INLINE floats clamped_swiglu_lanes(floats gate, floats up) {
    floats g = smaller(gate, fill(7.0f)), u = larger(smaller(up, fill(7.0f)), fill(-7.0f));
    floats swish = divided(g, plus(fill(1.0f), exponential(times(g, fill(-1.702f)))));
    return times(swish, plus(u, fill(1.0f)));
}

static void clamped_swiglu(int n, const float *gate, const float *up, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, clamped_swiglu_lanes(load(gate + i), load(up + i)));
    if (i < n) store_tail(y + i, clamped_swiglu_lanes(load_tail(gate + i, n - i), load_tail(up + i, n - i)), n - i);
}

static void sigmoid_mul(int n, const float *gate, const float *x, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, gated(load(x + i), load(gate + i)));
    if (i < n) store_tail(y + i, gated(load_tail(x + i, n - i), load_tail(gate + i, n - i)), n - i);
}

static void add(int n, const float *x, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, plus(load(y + i), load(x + i)));
    for (; i < n; i++) y[i] += x[i];
}

static void axpy(int n, float a, const float *x, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, plus_product(load(y + i), fill(a), load(x + i)));
    for (; i < n; i++) y[i] += a * x[i];
}

/* Beside one more logit, where there is one. */
static void softmax_beside(int n, const float *sink, float *x) {
    floats most = fill(x[0]);
    int whole = n / LANES * LANES, rest = n - whole, i;
    for (i = 0; i < whole; i += LANES) most = larger(most, load(x + i));
    float maximum = largest(most);
    for (; i < n; i++) maximum = x[i] > maximum ? x[i] : maximum;
    if (sink && *sink > maximum) maximum = *sink;

    doubles lanes;
    memset(&lanes, 0, sizeof lanes);
    for (i = 0; i < whole; i += LANES) {
        store(x + i, exponential(plus(load(x + i), fill(-maximum))));
        lanes = plus_stored(lanes, x + i);
    }
    double total = sum_doubles(lanes);
    if (rest) store_tail(x + i, exponential(plus(load_tail(x + i, rest), fill(-maximum))), rest);
    for (; i < n; i++) total += x[i];
    if (sink) total += expf(*sink - maximum);

    float scale = (float)(1.0 / total);
    for (i = 0; i < whole; i += LANES) store(x + i, times(load(x + i), fill(scale)));
    for (; i < n; i++) x[i] *= scale;
}

static void softmax(int n, float *x) { softmax_beside(n, NULL, x); }

/* The table holds pairs; the compiler separates them. */
static void rope_neox(int n_rot, const float *cos_sin, float *x) {
    int half = n_rot / 2;
    float *y = x + half;
    for (int j = 0; j < half; j++) {
        float c = cos_sin[2 * j], s = cos_sin[2 * j + 1], a = x[j], b = y[j];
        x[j] = a * c - b * s;
        y[j] = a * s + b * c;
    }
}

static void conv_step(int channels, int taps, const float *w, const float *x, float *state, int64_t state_stride,
                      float *y) {
    for (int c = 0; c < channels; c++) {
        float sum = 0;
        for (int j = 0; j < taps - 1; j++) sum += w[c * taps + j] * state[j * state_stride + c];
        y[c] = sum + w[c * taps + taps - 1] * x[c];
    }
    for (int j = 0; j + 1 < taps - 1; j++)
        memcpy(state + j * state_stride, state + (j + 1) * state_stride, channels * sizeof *state);
    if (taps > 1) memcpy(state + (taps - 2) * state_stride, x, channels * sizeof *state);
    int c = 0;
    for (; c + LANES <= channels; c += LANES) store(y + c, gated(load(y + c), load(y + c)));
    if (c < channels) {
        floats rest = load_tail(y + c, channels - c);
        store_tail(y + c, gated(rest, rest), channels - c);
    }
}

/* Each row of the state is read and written once: its dot with k, its update and its dot with q happen while it is
 * in the first-level cache. */
static void delta_step(int k_dim, int v_dim, const float *q, const float *k, const float *v, float beta, float decay,
                       float *state, float *out) {
    for (int r = 0; r < v_dim; r++) {
        float *row = state + (int64_t)r * k_dim;
        floats lanes = fill(0);
        float rest = 0;
        int i = 0;
        for (; i + LANES <= k_dim; i += LANES) lanes = plus_product(lanes, load(row + i), load(k + i));
        for (; i < k_dim; i++) rest += row[i] * k[i];
        float delta = beta * (v[r] - decay * (sum(lanes) + rest));

        lanes = fill(0);
        rest = 0;
        for (i = 0; i + LANES <= k_dim; i += LANES) {
            floats m = plus_product(times(load(row + i), fill(decay)), fill(delta), load(k + i));
            store(row + i, m);
            lanes = plus_product(lanes, m, load(q + i));
        }
        for (; i < k_dim; i++) {
            row[i] = row[i] * decay + delta * k[i];
            rest += row[i] * q[i];
        }
        out[r] = sum(lanes) + rest;
    }
}
