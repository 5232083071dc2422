#include "attention.h"

#include "instructions.h"

void fomoe_attention_head(fomoe_kv_type type, int k_dim, int v_dim, int64_t length, float scale, const float *q,
                          const void *keys, int64_t key_stride, const void *values, int64_t value_stride, float *scores,
                          const float *sink, float *out) {
    fomoe_chosen_instructions()->attention_head(type, k_dim, v_dim, length, scale, q, keys, key_stride, values,
                                                value_stride, scores, sink, out);
}

void fomoe_to_kv(fomoe_kv_type type, int n, const float *x, void *y) {
    fomoe_chosen_instructions()->to_kv(type, n, x, y);
}
