/* Layouts of ggml's blocks (ggml-common.h describes them).  Numbers of types are ggml's. */
#ifndef FOMOE_QUANT_BLOCKS_H
#define FOMOE_QUANT_BLOCKS_H

#include <stdint.h>

enum { F32 = 0, F16 = 1, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, Q8_K = 15, BF16 = 30, MXFP4 = 39 };
enum { SUPER = 256 }; /* elements in a block of the K types */

typedef uint16_t half;
typedef struct { half d; int8_t q[32]; } block_q8_0;
typedef struct { float d; int8_t q[SUPER]; int16_t sums[SUPER / 16]; } block_q8_K;
typedef struct { half d, dmin; uint8_t scales[12]; uint8_t q[SUPER / 2]; } block_q4_K;
typedef struct { half d, dmin; uint8_t scales[12]; uint8_t high[SUPER / 8]; uint8_t q[SUPER / 2]; } block_q5_K;
typedef struct { uint8_t low[SUPER / 2]; uint8_t high[SUPER / 4]; int8_t scales[SUPER / 16]; half d; } block_q6_K;

/* number j < 16: the low half of byte j; j + 16: the high one */
typedef struct { uint8_t e; uint8_t q[16]; } block_mxfp4;

_Static_assert(sizeof(block_mxfp4) == 17, "blocks lie in files without padding");
_Static_assert(sizeof(block_q8_0) == 34 && sizeof(block_q8_K) == 292 && sizeof(block_q4_K) == 144 &&
               sizeof(block_q5_K) == 176 && sizeof(block_q6_K) == 210, "blocks lie in files without padding");

#endif
