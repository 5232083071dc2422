// How fast memory can be read at all: what the other kernels are measured against.
#pragma once
#include "prelude.h"

// Folds `bytes` (a multiple of 16) into one word a block, so that no load can be left out.  Grid (blocks).
KERNEL(256, read_memory)(const u8 *memory, u64 bytes, u32 *folded, int blocks) {
    start_kernel();
    const u64 step = (u64)blocks * 256 * 16;
    u32 fold = 0;
#pragma unroll 8
    for (u64 at = ((u64)block_x() * 256 + thread_index()) * 16; at < bytes; at += step) {
        const u32x4 v = load16(memory + at);
        fold ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    fold ^= exchange<16>(fold);
    fold ^= exchange<8>(fold);
    fold ^= exchange<4>(fold);
    fold ^= exchange<2>(fold);
    fold ^= exchange<1>(fold);
    if (lane_index() == 0) folded[block_x() * 8 + warp_index()] = fold;
}
EXPORT_KERNEL(read_memory)
