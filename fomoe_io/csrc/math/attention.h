/* Attention of one query head over its cached keys and values. */
#ifndef FOMOE_ATTENTION_H
#define FOMOE_ATTENTION_H

#include <stdint.h>

/* What keys and values are kept as; the numbers are ggml's. */
typedef enum { FOMOE_KV_F32 = 0, FOMOE_KV_F16 = 1 } fomoe_kv_type;

/* out[0..v_dim) = sum_t softmax_t(scale * q . k_t) v_t over t < length, computed in floats.  sink: one more logit of
 * the softmax, without a value; NULL: none.
 * keys: k_t at keys + t*key_stride elements; values alike.  scores: scratch of length floats.
 * q: k_dim floats. */
void fomoe_attention_head(fomoe_kv_type type, int k_dim, int v_dim, int64_t length, float scale, const float *q,
                          const void *keys, int64_t key_stride, const void *values, int64_t value_stride, float *scores,
                          const float *sink, float *out);
/* n floats as keys or values are kept: halves are rounded to nearest even. */
void fomoe_to_kv(fomoe_kv_type type, int n, const float *x, void *y);

#endif
