#include "attention.h"

#include "instructions.h"

void fomoe_attention_head(int k_dim, int v_dim, int64_t length, float scale, const float *q, const float *keys,
                          int64_t key_stride, const float *values, int64_t value_stride, float *scores,
                          const float *sink, float *out) {
    fomoe_chosen_instructions()->attention_head(k_dim, v_dim, length, scale, q, keys, key_stride, values, value_stride,
                                                scores, sink, out);
}
