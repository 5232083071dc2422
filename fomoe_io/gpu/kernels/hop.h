// A layer's end on one device and the next one's begin on another: what is between them goes through the host's memory,
// which every device reaches on every machine.
#pragma once
#include "prelude.h"

#define HOP_THREADS 512

// The residual stream and what the next norm will add to it, each columns floats; then the run's number, which says
// that they are there.  host, flag: in memory that both devices see.  added: may be null.  Grid (1).
KERNEL(HOP_THREADS, hand_over)
(const float *x, const float *added, void *host, void *flag, const replayed *run, int columns) {
    start_kernel();
    u8 *to = (u8 *)host;
    for (int i = thread_index(); i < columns; i += HOP_THREADS) {
        system_store4(to + 4 * (u64)i, as_bits(x[i]));
        if (added) system_store4(to + 4 * ((u64)columns + i), as_bits(added[i]));
    }
    fence_system();
    sync_block();
    if (thread_index() == 0) system_store4(flag, now(run));
}
EXPORT_KERNEL(hand_over)

// The other side.  Holds the stream until the rows are there, or the host says stop: then what was there before is
// computed with, and the run is an error.  columns: a multiple of 4.  Grid (1).
KERNEL(HOP_THREADS, take_over)
(float *x, float *added, const void *host, const void *flag, const replayed *run, const void *stop, int columns) {
    start_kernel();
    if (thread_index() == 0)
        while (system_load4(flag) != now(run) && !system_load4(stop)) pause_thread();
    sync_block();
    fence_system();
    const u8 *from = (const u8 *)host;
    for (int i = 4 * thread_index(); i < columns; i += 4 * HOP_THREADS) {
        *(u32x4 *)(x + i) = system_load16(from + 4 * (u64)i);
        if (added) *(u32x4 *)(added + i) = system_load16(from + 4 * ((u64)columns + i));
    }
}
EXPORT_KERNEL(take_over)

// For a guess: the residual stream alone, once it is there, or the rows of which it is a part.  Grid (1).
KERNEL(HOP_THREADS, take_early)
(float *x, const void *host, const void *early, const void *flag, const replayed *run, const void *stop, int columns) {
    start_kernel();
    if (thread_index() == 0) {
        const u32 number = now(run);
        while (system_load4(early) != number && system_load4(flag) != number && !system_load4(stop)) pause_thread();
    }
    sync_block();
    fence_system();
    for (int i = 4 * thread_index(); i < columns; i += 4 * HOP_THREADS)
        *(u32x4 *)(x + i) = system_load16((const u8 *)host + 4 * (u64)i);
}
EXPORT_KERNEL(take_early)
