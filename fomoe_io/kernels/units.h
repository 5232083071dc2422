// The weight formats.  A unit is what one lane reads at once: 32 weights of a quantized row (two groups of 16
// consecutive elements, each with one scale), or 16 bytes of a float row.
#pragma once
#include "prelude.h"

struct unpacked {
    int quants[8];       // 4 signed bytes each: group 0, then group 1
    float scale[2];      // weight = scale * quant - minimum
    float minimum[2];
};

// 16 bytes that begin at an even address, as five aligned words (the last half used).
struct shifted16 {
    u32 word[5];
};
DEVICE shifted16 load_shifted16(const u8 *p) {
    const u8 *aligned = p - ((u64)p & 2);
    shifted16 s;
#pragma unroll
    for (int i = 0; i < 5; ++i) s.word[i] = load4(aligned + 4 * i);
    return s;
}
DEVICE u32 shifted_word(const shifted16 &s, int i, int bits) { return funnel_right(s.word[i], s.word[i + 1], bits); }

// The twelve bytes of 6-bit scales and minima that Q4_K and Q5_K share, for sub-blocks 2*pair and 2*pair + 1.
DEVICE void unpack_k_scales(const u32x4 &head, int pair, unpacked &u) {
    const bool upper = pair >= 2;
    const u32 scales = upper ? (head.w & 0x0f0f0f0fu) | ((head.y >> 2) & 0x30303030u) : head.y & 0x3f3f3f3fu;
    const u32 minima = upper ? ((head.w >> 4) & 0x0f0f0f0fu) | ((head.z >> 2) & 0x30303030u) : head.z & 0x3f3f3f3fu;
    const int shift = 16 * (pair & 1);
    const float d = from_half((u16)head.x), least = from_half((u16)(head.x >> 16));
    u.scale[0] = d * (float)((scales >> shift) & 0xff);
    u.scale[1] = d * (float)((scales >> (shift + 8)) & 0xff);
    u.minimum[0] = least * (float)((minima >> shift) & 0xff);
    u.minimum[1] = least * (float)((minima >> (shift + 8)) & 0xff);
}

// Q4_K: 144 bytes for 256 weights: f16 d, f16 dmin, 12 bytes of scales, 128 bytes of nibbles.
struct q4_k {
    static const bool is_quantized = true, has_minimum = true;
    static const int block_elements = 256, block_bytes = 144, unit_elements = 32;
    struct raw {
        u32x4 head, nibbles;
    };
    static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + (unit >> 3) * block_bytes;
        return {load16(block), load16(block + 16 + 16 * (unit & 7))};
    }
    static DEVICE_MEMBER int element(int unit, int group) {
        return (unit >> 3) * 256 + 64 * ((unit & 7) >> 1) + 32 * group + 16 * (unit & 1);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, unpacked &u) {
        unpack_k_scales(r.head, (unit & 7) >> 1, u);
        const u32 words[4] = {r.nibbles.x, r.nibbles.y, r.nibbles.z, r.nibbles.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u.quants[i] = (int)(words[i] & 0x0f0f0f0fu);
            u.quants[4 + i] = (int)((words[i] >> 4) & 0x0f0f0f0fu);
        }
    }
};

// Q5_K: 176 bytes: as Q4_K with 32 bytes of fifth bits (bit j for sub-block j) before the nibbles.
struct q5_k {
    static const bool is_quantized = true, has_minimum = true;
    static const int block_elements = 256, block_bytes = 176, unit_elements = 32;
    struct raw {
        u32x4 head, high, nibbles;
    };
    static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + (unit >> 3) * block_bytes;
        return {load16(block), load16(block + 16 + 16 * (unit & 1)), load16(block + 48 + 16 * (unit & 7))};
    }
    static DEVICE_MEMBER int element(int unit, int group) { return q4_k::element(unit, group); }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, unpacked &u) {
        const int pair = (unit & 7) >> 1;
        unpack_k_scales(r.head, pair, u);
        const u32 words[4] = {r.nibbles.x, r.nibbles.y, r.nibbles.z, r.nibbles.w};
        const u32 high[4] = {r.high.x, r.high.y, r.high.z, r.high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 bits = high[i] >> (2 * pair);
            u.quants[i] = (int)((words[i] & 0x0f0f0f0fu) | ((bits << 4) & 0x10101010u));
            u.quants[4 + i] = (int)(((words[i] >> 4) & 0x0f0f0f0fu) | ((bits << 3) & 0x10101010u));
        }
    }
};

// Q6_K: 210 bytes, so every other block begins off a word: 128 bytes of low nibbles, 64 of high pairs, 16 signed
// scales, f16 d.
struct q6_k {
    static const bool is_quantized = true, has_minimum = false;
    static const int block_elements = 256, block_bytes = 210, unit_elements = 32;
    struct raw {
        shifted16 low, high;
        u32 scales;  // the two signed bytes of groups 0 and 1
        u16 d;
    };
    static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const int i = unit & 7, half = i & 1, wide = i >> 2;
        const u8 *block = row + (unit >> 3) * block_bytes;
        raw r;
        r.low = load_shifted16(block + 16 * i);
        r.high = load_shifted16(block + 128 + 32 * wide + 16 * half);
        const u8 *scales = block + 192 + 8 * wide + (i & 2) + half;
        r.scales = load1(scales) | (u32)load1(scales + 4) << 8;
        r.d = load2(block + 208);
        return r;
    }
    static DEVICE_MEMBER int element(int unit, int group) {
        const int i = unit & 7;
        return (unit >> 3) * 256 + 128 * (i >> 2) + 32 * ((i >> 1) & 1) + 64 * group + 16 * (i & 1);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, unpacked &u) {
        // 210 = 2 mod 4: blocks alternate between word boundaries and the middle of a word.  Whole rows may begin
        // off a word too (an odd number of blocks), which load_shifted16 has seen; here only the low bit matters.
        const int shift = 2 * ((unit & 7) >> 1 & 1);  // bit pair of quarter 0 or 1
        const int bits = r.bits;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 low = shifted_word(r.low, i, bits), high = shifted_word(r.high, i, bits) >> shift;
            u.quants[i] = centred((low & 0x0f0f0f0fu) | ((high << 4) & 0x30303030u));
            u.quants[4 + i] = centred(((low >> 4) & 0x0f0f0f0fu) | (high & 0x30303030u));
        }
        const float d = from_half(r.d);
        u.scale[0] = d * (float)(i8)(r.scales & 0xff);
        u.scale[1] = d * (float)(i8)(r.scales >> 8);
        u.minimum[0] = u.minimum[1] = 0.f;
    }
};
