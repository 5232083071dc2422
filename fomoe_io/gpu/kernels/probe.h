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

// The checks of fomoe_io/gpu/self_test.py.

// Says that it is here, and holds its stream until the host has written `word`.  Both in host memory.  Grid (1).
KERNEL(32, probe_wait)(const void *word, void *here) {
    start_kernel();
    if (thread_index() > 0) return;
    system_store4(here, 1);
    while (!system_load4(word)) pause_thread();
    fence_system();
}
EXPORT_KERNEL(probe_wait)

// Counts where what a replayed graph's kernel reads is not what the host has written for this replay: wrong[0], [1] of
// the word that begin_run fetched, by now() and by a plain load; wrong[2], [3] of the one that a copy brought.  Grid
// (1).
KERNEL(32, probe_header)(const replayed *fetched, const replayed *copied, const void *host_word, u32 *wrong) {
    start_kernel();
    if (thread_index() > 0) return;
    const u32 expected = system_load4(host_word);
    wrong[0] += now(fetched) != expected;
    wrong[1] += fetched->word != expected;
    wrong[2] += now(copied) != expected;
    wrong[3] += copied->word != expected;
}
EXPORT_KERNEL(probe_header)

// Answers each number that the host asks for, 1, 2, ... rounds; any larger number ends it.  Both in host memory.  Grid
// (1).
KERNEL(32, probe_echo)(const void *question, void *reply, int rounds) {
    start_kernel();
    if (thread_index() > 0) return;
    for (u32 round = 1; round <= (u32)rounds; ++round) {
        u32 asked = 0;
        while ((asked = system_load4(question)) < round) pause_thread();
        if (asked > (u32)rounds) return;
        system_store4(reply, round);
    }
}
EXPORT_KERNEL(probe_echo)
