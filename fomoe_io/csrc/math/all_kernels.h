/* Everything that is compiled for each instruction set, and the table of it.  Expects INSTRUCTIONS,
 * INSTRUCTIONS_NAME and VECTOR_BYTES. */
#include "instructions.h"

#include "lanes.h"

#include "dot_kernels.h"

#include "attention_kernels.h"
#include "vector_kernels.h"

const fomoe_instructions INSTRUCTIONS = {
    .name = INSTRUCTIONS_NAME,
    .rms_norm = rms_norm,
    .l2_norm = l2_norm,
    .silu_mul = silu_mul,
    .clamped_swiglu = clamped_swiglu,
    .sigmoid_mul = sigmoid_mul,
    .add = add,
    .axpy = axpy,
    .softmax = softmax,
    .rope_neox = rope_neox,
    .conv_step = conv_step,
    .delta_step = delta_step,
    .attention_head = attention_head,
    .to_kv = to_kv,
    .types = types,
};
