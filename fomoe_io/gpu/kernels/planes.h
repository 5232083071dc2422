// Matrices of products as the device keeps them: chunks of eight blocks put in order (units.h has the layouts).  A lane
// of the file's own layout loads words that lie 16 bytes and more from its neighbours', and many of them where blocks
// begin off a word: one load is many transfers of the first cache then, and those are what a product waits for.
#pragma once
#include "units.h"

#define PLANES_THREADS 128

// Where byte `to` of a chunk comes from.
DEVICE u32 source_in(q4_k_planes, u32 to) {
    typedef q4_k_planes P;
    const u32 unit = to % P::second_plane / 16, block = to < P::head_plane ? unit / 4 : (to - P::head_plane) / 16;
    const u32 nibbles = 16 + 32 * (unit & 3) + to / P::second_plane * 16;
    return block * P::block_bytes + (to < P::head_plane ? nibbles : 0) + to % 16;
}
DEVICE u32 source_in(q6_k_planes, u32 to) {
    typedef q6_k_planes P;
    if (to < P::high_plane) return to / 128 * P::block_bytes + to % 128;
    if (to < P::scale_plane) return (to - P::high_plane) / 64 * P::block_bytes + 128 + to % 64;
    const u32 place = (to - P::scale_plane) / 2, i = place & 7;
    if (to < P::d_plane) return (place >> 3) * P::block_bytes + 192 + 8 * (i >> 2) + (i & 2) + (i & 1) + 4 * (to & 1);
    return (to - P::d_plane) / 2 * P::block_bytes + 208 + (to & 1);
}
DEVICE u32 source_in(q8_0_planes, u32 to) {
    typedef q8_0_planes P;
    return to < P::d_plane ? to / 32 * P::block_bytes + 2 + to % 32 : (to - P::d_plane) / 2 * P::block_bytes + (to & 1);
}

// A chunk, from the file's layout to this one, where it lies.  Grid (chunks).
template <class P> DEVICE void to_planes(u8 *weights) {
    __shared__ u32x4 words[P::chunk_bytes / 16];
    const u8 *chunk = (const u8 *)words;
    u8 *bytes = weights + (u64)block_x() * P::chunk_bytes;
    for (int i = thread_index(); i < P::chunk_bytes / 16; i += PLANES_THREADS) words[i] = ((const u32x4 *)bytes)[i];
    sync_block();
    for (u32 i = thread_index(); i < P::chunk_bytes / 2; i += PLANES_THREADS)
        ((u16 *)bytes)[i] = (u16)(chunk[source_in(P(), 2 * i)] | chunk[source_in(P(), 2 * i + 1)] << 8);
}

#define PLANES_KERNEL(type)                                  \
    KERNEL(PLANES_THREADS, to_planes_##type)(u8 * weights) { \
        start_kernel();                                      \
        to_planes<type##_planes>(weights);                   \
    }                                                        \
    EXPORT_KERNEL(to_planes_##type)
PLANES_KERNEL(q4_k)
PLANES_KERNEL(q6_k)
PLANES_KERNEL(q8_0)
