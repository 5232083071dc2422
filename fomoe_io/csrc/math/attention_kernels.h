/* attention.h in lanes. */

static void softmax_beside(int n, const float *sink, float *x);

#define ELEMENT float
#define ELEMENTS(name) name##_of_floats
#define LOAD_ELEMENTS(x) load(x)
#define ELEMENT_FLOAT(x) (x)
#include "attention_elements.h"
#undef ELEMENT
#undef ELEMENTS
#undef LOAD_ELEMENTS
#undef ELEMENT_FLOAT

#define ELEMENT half
#define ELEMENTS(name) name##_of_halves
#define LOAD_ELEMENTS(x) load_halves(x)
#define ELEMENT_FLOAT(x) half_float(x)
#include "attention_elements.h"
#undef ELEMENT
#undef ELEMENTS
#undef LOAD_ELEMENTS
#undef ELEMENT_FLOAT

static void attention_head(fomoe_kv_type type, int k_dim, int v_dim, int64_t length, float scale, const float *q,
                           const void *keys, int64_t key_stride, const void *values, int64_t value_stride,
                           float *scores, const float *sink, float *out) {
    (type == FOMOE_KV_F16 ? attention_head_of_halves : attention_head_of_floats)(
        k_dim, v_dim, length, scale, q, keys, key_stride, values, value_stride, scores, sink, out);
}

static void to_kv(fomoe_kv_type type, int n, const float *x, void *y) {
    if (type == FOMOE_KV_F32) {
        memcpy(y, x, n * sizeof *x);
        return;
    }
    half *halves = y;
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_halves(halves + i, load(x + i));
    for (; i < n; i++) halves[i] = float_half(x[i]);
}
