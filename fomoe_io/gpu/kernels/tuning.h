// Sizes that trade registers, bytes in flight and balance against each other.  Tuned on an H200 (docs/gpu.md).
// The host reads this file too (fomoe_io.kernels): one `#define NAME value` a line.  -DNAME=value overrides.
#pragma once

// mat_vec: rows that a warp computes at once, warps of a block.
#ifndef MAT_VEC_ROWS
#define MAT_VEC_ROWS 2
#endif
#ifndef MAT_VEC_WARPS
#define MAT_VEC_WARPS 4
#endif

// mat_vec: bytes of each row that a chained launch asks into the last cache before the kernel ahead has finished
// (NVIDIA from sm_90 on); 0: none.  On an H100 a layer of the 35B's shape takes 4 % less with it, one of the 397B's the
// same.
#ifndef PREFETCH_BYTES
#define PREFETCH_BYTES 16384
#endif

// experts_gate_up: warps of a block, which makes 32 values; (gate, up) row pairs that a warp reads at once; blocks that
// a multiprocessor must hold (NVIDIA).  A fourth of Q6_K, whose pairs are one at a time, brings 64 experts from 152 to
// 141 us on an H200.
#ifndef GATE_UP_WARPS
#define GATE_UP_WARPS 8
#endif
#ifndef GATE_UP_PAIRS
#define GATE_UP_PAIRS 2
#endif
#ifndef GATE_UP_PAIRS_Q6_K
#define GATE_UP_PAIRS_Q6_K 1
#endif
#ifndef GATE_UP_RESIDENT
#define GATE_UP_RESIDENT 3
#endif
#ifndef GATE_UP_RESIDENT_Q6_K
#define GATE_UP_RESIDENT_Q6_K 4
#endif

// experts_down: warps of a block, rows of a warp, experts whose loads fly together, blocks that a multiprocessor must
// hold (NVIDIA).  Four experts of Q6_K take 168 registers, which leave it three blocks: 20 us for 34 MB on an H200, two
// 14; one and nine blocks 15.
#ifndef DOWN_WARPS
#define DOWN_WARPS 4
#endif
#ifndef DOWN_ROWS
#define DOWN_ROWS 2
#endif
#ifndef DOWN_BATCH
#define DOWN_BATCH 2
#endif
#ifndef DOWN_BATCH_Q6_K
#define DOWN_BATCH_Q6_K 2
#endif
#ifndef DOWN_RESIDENT
#define DOWN_RESIDENT 5
#endif
#ifndef DOWN_RESIDENT_Q5_K
#define DOWN_RESIDENT_Q5_K 4
#endif

// tile.h: quantized products of many tokens by matrix units, where the kernels know them (NVIDIA from sm_80 on); 0: by
// dot4, to the same bits.
#ifndef BYTE_MATRICES
#define BYTE_MATRICES 1
#endif

// tile.h: blocks that a multiprocessor must hold (NVIDIA); with 6 two kernels spill a word.
#ifndef TILE_RESIDENT
#define TILE_RESIDENT 5
#endif

// attention_prompt: of heads of 256 columns, blocks that a multiprocessor must hold (NVIDIA); of 64 and more, quads of
// columns whose products with queries fly together.  With 2 blocks there are registers for 4 quads.
#ifndef PROMPT_RESIDENT
#define PROMPT_RESIDENT 3
#endif
#ifndef PROMPT_UNROLLED
#define PROMPT_UNROLLED 1
#endif
