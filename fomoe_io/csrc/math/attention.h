/* Attention of one query head over its cached keys and values. */
#ifndef FOMOE_ATTENTION_H
#define FOMOE_ATTENTION_H

#include <stdint.h>

/* out[0..v_dim) = sum_t softmax_t(scale * q . k_t) v_t over t < length.  sink: one more logit of the softmax, without a
 * value; NULL: none.
 * keys: k_t at keys + t*key_stride floats; values alike.  scores: scratch of length floats.
 * q: k_dim floats. */
void fomoe_attention_head(int k_dim, int v_dim, int64_t length, float scale, const float *q, const float *keys,
                          int64_t key_stride, const float *values, int64_t value_stride, float *scores,
                          const float *sink, float *out);

#endif
