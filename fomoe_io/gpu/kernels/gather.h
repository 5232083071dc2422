// One model on several devices at once: of every product each device makes a run of rows, and all devices get all of
// them.  Nothing is added up here, so every bit is one device's.  What a device has made goes through memory that all
// of them reach; rank: of this device among `ranks`.
#pragma once
#include "tile.h"

#define GATHER_THREADS 512
#define GATHER_LOOKS 16 // more than an exchange takes where nobody is late

// Whether a word is this run's by the last of so many looks.
DEVICE bool has_come(const u64 *word, u32 number, int looks, u32 &value) {
    for (; looks > 0; --looks) {
        const u64 found = system_load8(word);
        value = (u32)found;
        if ((u32)(found >> 32) == number) return true;
        pause_thread();
    }
    return false;
}

// Where words travel: 64 bits each, the run's number in the upper half as in a post (router.h), so that nobody waits
// for a fence and nothing is ever reset.  A device's words follow one another, `count` of them, device after device.
// Every block is there at once (GATHER_BLOCKS are few enough for any device) and leaves its words before it waits for
// others', so devices can't hold each other up.
//
// A look is a transfer over the link, which the copies of experts need.  So when words are late, of each block one
// thread looks for one of them, and the others when it has come; `stop` is looked at more rarely still.
//
// words.load(i): this device's own; words.store(device, i, value).  A whole block calls it.
template <class WORDS>
DEVICE void gather(const WORDS &words, int count, void *out, const void *in, const replayed *run, const void *stop,
                   int rank, int ranks, int blocks) {
    __shared__ volatile int is_over;
    const u32 number = now(run);
    const int begin = block_x() * GATHER_THREADS, step = blocks * GATHER_THREADS;
    if (thread_index() == 0) is_over = 0;
    for (int i = begin + thread_index(); i < count; i += step)
        system_store8((u64 *)out + (u64)rank * count + i, (u64)number << 32 | words.load(i));
    sync_block();
    for (int other = 1; other < ranks; ++other) {
        const int device = (rank + other) % ranks;
        for (int first = begin; first < count; first += step) {
            const u64 *from = (const u64 *)in + (u64)device * count + first;
            const int i = first + thread_index();
            u32 value, ignored;
            bool is_there = i >= count || has_come(from + thread_index(), number, GATHER_LOOKS, value);
            if (thread_index() == 0)
                while (!is_over && !has_come(from, number, 2 * GATHER_LOOKS, ignored))
                    is_over = system_load4(stop) != 0;
            sync_block();
            while (!is_there && !is_over) {
                is_there = has_come(from + thread_index(), number, 64 * GATHER_LOOKS, value);
                if (!is_there && system_load4(stop)) is_over = 1;
            }
            if (is_there && i < count) words.store(device, i, value);
        }
    }
}

// Up to four vectors, of which each device has made its own run of so many words.
struct float_words {
    float *y0, *y1, *y2, *y3;
    int words0, words1, words2, words3;
    DEVICE_MEMBER float *at(int device, int i) const {
        if (i < words0) return y0 + (u64)device * words0 + i;
        i -= words0;
        if (i < words1) return y1 + (u64)device * words1 + i;
        i -= words1;
        if (i < words2) return y2 + (u64)device * words2 + i;
        return y3 + (u64)device * words3 + (i - words2);
    }
};
struct own_floats {
    float_words vectors;
    int rank;
    DEVICE_MEMBER u32 load(int i) const { return as_bits(*vectors.at(rank, i)); }
    DEVICE_MEMBER void store(int device, int i, u32 value) const { *vectors.at(device, i) = as_float(value); }
};

// y: null and no words where there are fewer.  out, in: ranks * (words of all) times 8 bytes, the same memory or
// another device's and this one's.  What has not come when the host says stop stays as it was, and the run is an error.
// Grid (blocks).
KERNEL(GATHER_THREADS, gather_floats)
(float *y0, float *y1, float *y2, float *y3, int words0, int words1, int words2, int words3, void *out, const void *in,
 const replayed *run, const void *stop, int rank, int ranks, int blocks) {
    start_kernel();
    const own_floats words = {{y0, y1, y2, y3, words0, words1, words2, words3}, rank};
    gather(words, words0 + words1 + words2 + words3, out, in, run, stop, rank, ranks, blocks);
}
EXPORT_KERNEL(gather_floats)

// What gate and up have made of each pair, of which a device has a run of `own` columns: floats where down reads those,
// else a Q8 row's bytes and then the float pairs of their groups.
struct hidden_rows {
    u8 *q8;
    float *floats;
    int columns, own;
    DEVICE_MEMBER int words() const { return floats ? own : own / 4 + own / 16; }  // of a pair
    DEVICE_MEMBER u32 *at(int device, u64 pair, int word) const {
        if (floats) return (u32 *)(floats + pair * columns + (u64)device * own + word);
        u8 *row = q8 + pair * q8_row_bytes(columns);
        if (word < own / 4) return (u32 *)(row + device * own) + word;
        return (u32 *)(row + columns) + device * (own / 16) + (word - own / 4);
    }
};
struct own_hidden {
    hidden_rows rows;
    int rank;
    DEVICE_MEMBER u32 load(int i) const { return *rows.at(rank, i / rows.words(), i % rows.words()); }
    DEVICE_MEMBER void store(int device, int i, u32 value) const {
        *rows.at(device, i / rows.words(), i % rows.words()) = value;
    }
};

// hidden: [pairs] Q8 rows; hidden_floats: [pairs][columns], or null.  columns: a multiple of 32 ranks.  Grid (blocks).
KERNEL(GATHER_THREADS, gather_hidden)
(u8 *hidden, float *hidden_floats, int columns, int pairs, void *out, const void *in, const replayed *run,
 const void *stop, int rank, int ranks, int blocks) {
    start_kernel();
    const own_hidden words = {{hidden, hidden_floats, columns, columns / ranks}, rank};
    gather(words, pairs * words.rows.words(), out, in, run, stop, rank, ranks, blocks);
}
EXPORT_KERNEL(gather_hidden)

// The same of a batch, in two launches with an event between them: `leave` copies this device's columns, first to first
// + count of rows of `columns`, to the same places of rows in memory that all devices see, `fetch` brings the others'.
// Words then need no number, and nobody waits.
struct own_columns {
    int first, count;
    DEVICE_MEMBER bool has(int column) const { return column >= first && column < first + count; }
};
template <bool IS_LEAVING> DEVICE void exchange_word(u32 *mine, u8 *common, bool is_own) {
    if (IS_LEAVING && is_own) system_store4(common, *mine);
    if (!IS_LEAVING && !is_own) *mine = system_load4(common);
}

// What gate and up have made of the tiles' pairs: hidden_floats where they are given, else the Q8 rows.
template <bool IS_LEAVING>
DEVICE void exchange_hidden(const tile *tiles, const int *order, u8 *hidden, float *hidden_floats, u8 *common,
                            int columns, const own_columns &own) {
    const tile t = tiles[block_x()];
    const int words = hidden_floats ? columns : columns / 4 + columns / 16;
    const u64 row_bytes = hidden_floats ? 4 * (u64)columns : q8_row_bytes(columns);
    u8 *rows = hidden_floats ? (u8 *)hidden_floats : hidden;
    for (int i = thread_index(); i < (int)t.count * words; i += 256) {
        const int word = i % words, behind = word - columns / 4;  // of a group of 32: eight words, then a float pair
        const u64 at = order[t.first + i / words] * row_bytes + 4 * (u64)word;
        const int column = hidden_floats ? word : behind < 0 ? 4 * word : 16 * behind;
        exchange_word<IS_LEAVING>((u32 *)(rows + at), common + at, own.has(column));
    }
}

// common: rows as those of hidden or hidden_floats, all pairs'.  first, count: multiples of 32.  Grid (tiles).
KERNEL(256, leave_hidden)
(const tile *tiles, const int *order, u8 *hidden, float *hidden_floats, void *common, int columns, int first,
 int count) {
    start_kernel();
    exchange_hidden<true>(tiles, order, hidden, hidden_floats, (u8 *)common, columns, {first, count});
    fence_system();
}
EXPORT_KERNEL(leave_hidden)
KERNEL(256, fetch_hidden)
(const tile *tiles, const int *order, u8 *hidden, float *hidden_floats, void *common, int columns, int first,
 int count) {
    start_kernel();
    exchange_hidden<false>(tiles, order, hidden, hidden_floats, (u8 *)common, columns, {first, count});
}
EXPORT_KERNEL(fetch_hidden)

// x, common: [tokens][columns].  Grid (columns / 256 up, tokens).
template <bool IS_LEAVING> DEVICE void exchange_floats(float *x, u8 *common, int columns, const own_columns &own) {
    const int column = 256 * block_x() + thread_index();
    if (column >= columns) return;
    const u64 i = (u64)block_y() * columns + column;
    exchange_word<IS_LEAVING>((u32 *)(x + i), common + 4 * i, own.has(column));
}
KERNEL(256, leave_floats)(float *x, void *common, int columns, int first, int count) {
    start_kernel();
    exchange_floats<true>(x, (u8 *)common, columns, {first, count});
    fence_system();
}
EXPORT_KERNEL(leave_floats)
KERNEL(256, fetch_floats)(float *x, void *common, int columns, int first, int count) {
    start_kernel();
    exchange_floats<false>(x, (u8 *)common, columns, {first, count});
}
EXPORT_KERNEL(fetch_floats)
