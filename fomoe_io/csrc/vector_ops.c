#include "vector_ops.h"

#include <math.h>
#include <string.h>

#include "clones.h"

/* exp(x) for vectors: x = n ln2 + r with ln2 in two parts (Cody and Waite), e^r by its Taylor series to the sixth
 * degree, |r| <= ln2/2: relative error below 2e-7.  Inputs are clamped to where a float has a normal result. */
static inline __attribute__((always_inline)) float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static inline __attribute__((always_inline)) double sum_of_squares(int n, const float *x) {
    double lane[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += (double)x[i + j] * x[i + j];
    for (; i < n; i++) sum += (double)x[i] * x[i];
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

CLONES void fomoe_rms_norm(int n, const float *x, const float *w, float eps, float *y) {
    float scale = 1.0f / sqrtf((float)(sum_of_squares(n, x) / n) + eps);
    if (w)
        for (int i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
    else
        for (int i = 0; i < n; i++) y[i] = x[i] * scale;
}

CLONES void fomoe_l2_norm(int n, const float *x, float eps, float scale, float *y) {
    float factor = scale / sqrtf((float)sum_of_squares(n, x) + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor;
}

CLONES void fomoe_silu_mul(int n, const float *gate, const float *up, float *y) {
    for (int i = 0; i < n; i++) y[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

CLONES void fomoe_sigmoid_mul(int n, const float *gate, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = x[i] / (1.0f + fast_exp(-gate[i]));
}

float fomoe_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

float fomoe_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

CLONES void fomoe_add(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] += x[i];
}

CLONES void fomoe_axpy(int n, float a, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

CLONES void fomoe_softmax(int n, float *x) {
    float most = x[0];
    for (int i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    double lane[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            x[i + j] = fast_exp(x[i + j] - most);
            lane[j] += x[i + j];
        }
    for (; i < n; i++) sum += x[i] = fast_exp(x[i] - most);
    for (int j = 0; j < LANES; j++) sum += lane[j];
    float scale = (float)(1.0 / sum);
    for (i = 0; i < n; i++) x[i] *= scale;
}

void fomoe_rope_table(int n_rot, double base, int64_t position, float *cos_sin) {
    for (int j = 0; j < n_rot / 2; j++) {
        double angle = (double)position * pow(base, -2.0 * j / n_rot);
        cos_sin[2 * j] = (float)cos(angle);
        cos_sin[2 * j + 1] = (float)sin(angle);
    }
}

void fomoe_rope_neox(int n_rot, const float *cos_sin, float *x) {
    int half = n_rot / 2;
    for (int j = 0; j < half; j++) {
        float c = cos_sin[2 * j], s = cos_sin[2 * j + 1], a = x[j], b = x[j + half];
        x[j] = a * c - b * s;
        x[j + half] = a * s + b * c;
    }
}

CLONES void fomoe_conv_step(int channels, int taps, const float *w, const float *x, float *state, int64_t state_stride,
                            float *y) {
    for (int c = 0; c < channels; c++) {
        float sum = 0;
        for (int j = 0; j < taps - 1; j++) sum += w[c * taps + j] * state[j * state_stride + c];
        sum += w[c * taps + taps - 1] * x[c];
        y[c] = sum / (1.0f + fast_exp(-sum));
    }
    for (int j = 0; j + 1 < taps - 1; j++)
        memcpy(state + j * state_stride, state + (j + 1) * state_stride, channels * sizeof *state);
    if (taps > 1) memcpy(state + (taps - 2) * state_stride, x, channels * sizeof *state);
}

/* Each row of the state is read and written once: its dot with k, its update and its dot with q happen while it is
 * in the first-level cache. */
CLONES void fomoe_delta_step(int k_dim, int v_dim, const float *q, const float *k, const float *v, float beta,
                             float decay, float *state, float *out) {
    for (int r = 0; r < v_dim; r++) {
        float *row = state + (int64_t)r * k_dim;
        fomoe_lanes lane = {0}, m, x;
        float dot = 0, result = 0;
        int i = 0;
        for (; i + LANES <= k_dim; i += LANES) {
            load_lanes(&m, row + i);
            load_lanes(&x, k + i);
            lane += m * x;
        }
        for (; i < k_dim; i++) dot += row[i] * k[i];
        dot += sum_lanes(&lane);
        float delta = beta * (v[r] - decay * dot);
        lane = (fomoe_lanes){0};
        for (i = 0; i + LANES <= k_dim; i += LANES) {
            load_lanes(&m, row + i);
            load_lanes(&x, k + i);
            m = m * decay + delta * x;
            memcpy(row + i, &m, sizeof m);
            load_lanes(&x, q + i);
            lane += m * x;
        }
        for (; i < k_dim; i++) {
            row[i] = row[i] * decay + delta * k[i];
            result += row[i] * q[i];
        }
        result += sum_lanes(&lane);
        out[r] = result;
    }
}
