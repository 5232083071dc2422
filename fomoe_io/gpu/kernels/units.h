// The weight formats.  A unit is what one lane reads at once: 64 weights of Q4_K or Q5_K (so that scales are decoded
// once for all that they scale), 32 of Q6_K, Q8_0 or MXFP4, or 16 bytes of a float row.
#pragma once
#include "prelude.h"

// groups of consecutive elements with one scale: weight = scale * (quant - the type's centre) - minimum
template <int GROUPS, int GROUP_ELEMENTS> struct unpacked {
    int quants[GROUPS][GROUP_ELEMENTS / 4];  // 4 signed bytes each
    float scale[GROUPS], minimum[GROUPS];
};

// 16 bytes that begin at an even address, as five aligned words (the last half used).  (Three aligned 8-byte loads
// cover them too, and were measured slower.)
struct shifted16 {
    u32 word[5];
};
template <class L> DEVICE shifted16 load_shifted16(const u8 *aligned) {
    shifted16 s;
#pragma unroll
    for (int i = 0; i < 5; ++i) s.word[i] = L::word4(aligned + 4 * i);
    return s;
}
DEVICE u32 shifted_word(const shifted16 &s, int i, int bits) { return funnel_right(s.word[i], s.word[i + 1], bits); }

// The twelve bytes of 6-bit scales and minima that Q4_K and Q5_K share, for sub-blocks 2*pair and 2*pair + 1.
DEVICE void unpack_k_scales(const u32x4 &head, int pair, unpacked<2, 32> &u) {
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

// A format as a device keeps it (planes.h): eight blocks of a row are a chunk, in which all quants come first.
template <class T> struct in_chunks : T {
    static const int chunk_bytes = 8 * T::block_bytes, chunk_units = 8 * T::block_elements / T::unit_elements;
    static DEVICE_MEMBER const u8 *chunk_of(const u8 *row, int unit) {
        return row + ((u32)unit / chunk_units) * chunk_bytes;
    }
    static DEVICE_MEMBER u32 place_in_chunk(int unit) { return (u32)unit % chunk_units; }
};

// Q4_K: 144 bytes for 256 weights: f16 d, f16 dmin, 12 bytes of scales, 128 bytes of nibbles.  A unit is a pair of
// sub-blocks: the low nibbles of 32 bytes, then the high ones.
struct q4_k {
    static const bool is_quantized = true, has_minimum = true;
    static const int block_elements = 256, block_bytes = 144, unit_elements = 64;
    static const int groups = 2, group_elements = 32, group_stride = 32;
    static const int centre = 0;
    typedef unpacked<2, 32> prepared;
    struct raw {
        u32x4 head, nibbles[2];
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + (unit >> 2) * block_bytes, *nibbles = block + 16 + 32 * (unit & 3);
        return {L::word16(block), {L::word16(nibbles), L::word16(nibbles + 16)}};
    }
    static DEVICE_MEMBER int element(int unit, int group) { return unit * 64 + 32 * group; }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, prepared &u) {
        unpack_k_scales(r.head, unit & 3, u);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 words[4] = {r.nibbles[half].x, r.nibbles[half].y, r.nibbles[half].z, r.nibbles[half].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u.quants[0][4 * half + i] = (int)(words[i] & 0x0f0f0f0fu);
                u.quants[1][4 * half + i] = (int)((words[i] >> 4) & 0x0f0f0f0fu);
            }
        }
    }
};

// Of a chunk's units the first 16 bytes of nibbles, the second, then the blocks' heads.
struct q4_k_planes : in_chunks<q4_k> {
    static const int second_plane = 512, head_plane = 1024;
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u32 place = place_in_chunk(unit);
        const u8 *chunk = chunk_of(row, unit), *nibbles = chunk + 16 * place;
        return {L::word16(chunk + head_plane + 16 * (place >> 2)),
                {L::word16(nibbles), L::word16(nibbles + second_plane)}};
    }
};

// Q5_K: 176 bytes: as Q4_K with 32 bytes of fifth bits (bit j for sub-block j) before the nibbles.
struct q5_k {
    static const bool is_quantized = true, has_minimum = true;
    static const int block_elements = 256, block_bytes = 176, unit_elements = 64;
    static const int groups = 2, group_elements = 32, group_stride = 32;
    static const int centre = 0;
    typedef unpacked<2, 32> prepared;
    struct raw {
        u32x4 head, high[2], nibbles[2];
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + (unit >> 2) * block_bytes, *nibbles = block + 48 + 32 * (unit & 3);
        return {L::word16(block),
                {L::word16(block + 16), L::word16(block + 32)},
                {L::word16(nibbles), L::word16(nibbles + 16)}};
    }
    static DEVICE_MEMBER int element(int unit, int group) { return unit * 64 + 32 * group; }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, prepared &u) {
        const int pair = unit & 3;
        unpack_k_scales(r.head, pair, u);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 words[4] = {r.nibbles[half].x, r.nibbles[half].y, r.nibbles[half].z, r.nibbles[half].w};
            const u32 high[4] = {r.high[half].x, r.high[half].y, r.high[half].z, r.high[half].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 bits = high[i] >> (2 * pair);
                u.quants[0][4 * half + i] = (int)((words[i] & 0x0f0f0f0fu) | ((bits << 4) & 0x10101010u));
                u.quants[1][4 * half + i] = (int)(((words[i] >> 4) & 0x0f0f0f0fu) | ((bits << 3) & 0x10101010u));
            }
        }
    }
};

// Q6_K: 210 bytes, so every other block begins off a word: 128 bytes of low nibbles, 64 of high pairs, 16 signed
// scales, f16 d.  A unit is 16 bytes of nibbles: 32 weights.  (64, which would share the high bytes, were measured
// slower.)
struct q6_k {
    static const bool is_quantized = true, has_minimum = false;
    static const int block_elements = 256, block_bytes = 210, unit_elements = 32;
    static const int groups = 2, group_elements = 16, group_stride = 64;
    static const int centre = 32;
    typedef unpacked<2, 16> prepared;
    struct raw {
        shifted16 low, high;
        i8 scale[2];
        u16 d;
        int bits;  // how far the block begins off a word: 0 or 16
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u32 i = (u32)unit & 7, half = i & 1, wide = i >> 2;
        const u8 *block = row + ((u32)unit >> 3) * block_bytes, *aligned = (const u8 *)((u64)block & ~2ull);
        const u8 *scales = block + (192 + 8 * wide + (i & 2) + half);
        raw r;
        r.low = load_shifted16<L>(aligned + 16 * i);
        r.high = load_shifted16<L>(aligned + (128 + 32 * wide + 16 * half));
        r.scale[0] = (i8)L::word1(scales), r.scale[1] = (i8)L::word1(scales + 4);
        r.d = L::word2(block + 208);
        r.bits = (int)((u64)block & 2) * 8;
        return r;
    }
    static DEVICE_MEMBER int element(int unit, int group) {
        const int i = unit & 7;
        return (unit >> 3) * 256 + 128 * (i >> 2) + 32 * ((i >> 1) & 1) + 64 * group + 16 * (i & 1);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, prepared &u) {
        // The bit pair of the first or the second quarter.  What the shift brings in from the next word is masked away.
        const int high_bits = r.bits + (unit & 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) join(shifted_word(r.low, i, r.bits), shifted_word(r.high, i, high_bits), i, u);
        set_scales(r.d, r.scale[0], r.scale[1], u);
    }
    // Four weights of each group: their low nibbles, and their pair of high bits at its place.
    static DEVICE_MEMBER void join(u32 low, u32 high, int i, prepared &u) {
        u.quants[0][i] = (int)((low & 0x0f0f0f0fu) | ((high << 4) & 0x30303030u));
        u.quants[1][i] = (int)(((low >> 4) & 0x0f0f0f0fu) | (high & 0x30303030u));
    }
    static DEVICE_MEMBER void set_scales(u16 half, i8 first, i8 second, prepared &u) {
        const float d = from_half(half);
        u.scale[0] = d * (float)first;
        u.scale[1] = d * (float)second;
        u.minimum[0] = u.minimum[1] = 0.f;
    }
};

// Of a chunk the low nibbles, the high pairs, the scales (the two of a unit stand side by side), then d.
struct q6_k_planes : in_chunks<q6_k> {
    static const int high_plane = 1024, scale_plane = 1536, d_plane = 1664;
    struct raw {
        u32x4 low, high;
        u16 scales, d;
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *chunk = chunk_of(row, unit);
        const u32 place = place_in_chunk(unit), block = place >> 3, half = place & 1, wide = place >> 2 & 1;
        return {L::word16(chunk + 16 * place), L::word16(chunk + high_plane + 64 * block + 32 * wide + 16 * half),
                L::word2(chunk + scale_plane + 2 * place), L::word2(chunk + d_plane + 2 * block)};
    }
    static DEVICE_MEMBER void unpack(const raw &r, int unit, prepared &u) {
        const u32 lows[4] = {r.low.x, r.low.y, r.low.z, r.low.w}, highs[4] = {r.high.x, r.high.y, r.high.z, r.high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) join(lows[i], highs[i] >> (unit & 2), i, u); // the first or the second quarter's
        set_scales(r.d, (i8)(r.scales & 0xff), (i8)(r.scales >> 8), u);
    }
};

// Q8_0: 34 bytes for 32 weights: f16 d, 32 signed bytes.
struct q8_0 {
    static const bool is_quantized = true, has_minimum = false;
    static const int block_elements = 32, block_bytes = 34, unit_elements = 32;
    static const int groups = 1, group_elements = 32, group_stride = 32;
    static const int centre = 0;
    typedef unpacked<1, 32> prepared;
    struct raw {
        u32 word[8];
        u16 last, d;
        int bits;
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + unit * block_bytes, *quants = block + 2;
        const u8 *aligned = quants - ((u64)quants & 2);
        raw r;
#pragma unroll
        for (int i = 0; i < 8; ++i) r.word[i] = L::word4(aligned + 4 * i);
        r.last = L::word2(quants + 30);  // not a ninth word, which could lie past the tensor's end
        r.d = L::word2(block);
        r.bits = (int)((u64)quants & 2) * 8;
        return r;
    }
    static DEVICE_MEMBER int element(int unit, int) { return unit * 32; }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            u.quants[0][i] = (int)funnel_right(r.word[i], i < 7 ? r.word[i < 7 ? i + 1 : 7] : r.last, r.bits);
        u.scale[0] = from_half(r.d);
        u.minimum[0] = 0.f;
    }
};

// Of a chunk the quants, then d.
struct q8_0_planes : in_chunks<q8_0> {
    static const int d_plane = 256;
    struct raw {
        u32x4 quants[2];
        u16 d;
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u32 place = place_in_chunk(unit);
        const u8 *chunk = chunk_of(row, unit), *quants = chunk + 32 * place;
        return {{L::word16(quants), L::word16(quants + 16)}, L::word2(chunk + d_plane + 2 * place)};
    }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32x4 &q = r.quants[half];
            u.quants[0][4 * half] = (int)q.x, u.quants[0][4 * half + 1] = (int)q.y;
            u.quants[0][4 * half + 2] = (int)q.z, u.quants[0][4 * half + 3] = (int)q.w;
        }
        u.scale[0] = from_half(r.d);
        u.minimum[0] = 0.f;
    }
};

// MXFP4: 17 bytes for 32 weights: an exponent, then 16 bytes whose low nibbles are the first half.  A nibble is a sign
// and a place in 0 1 2 3 4 6 8 12, times 2^(exponent - 128).  Blocks begin at any byte.
struct mxfp4 {
    static const bool is_quantized = true, has_minimum = false;
    static const int block_elements = 32, block_bytes = 17, unit_elements = 32;
    static const int groups = 1, group_elements = 32, group_stride = 32;
    static const int centre = 0;
    typedef unpacked<1, 32> prepared;
    struct raw {
        u32 word[5];
        u8 exponent;
        int bits;
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        const u8 *block = row + unit * block_bytes, *nibbles = block + 1;
        const u8 *aligned = nibbles - ((u64)nibbles & 3), *last = nibbles + 15;
        raw r;
#pragma unroll
        for (int i = 0; i < 4; ++i) r.word[i] = L::word4(aligned + 4 * i);
        // the fourth again where the nibbles end with it: a fifth could lie past the tensor's end
        r.word[4] = L::word4(last - ((u64)last & 3));
        r.exponent = L::word1(block);
        r.bits = (int)((u64)nibbles & 3) * 8;
        return r;
    }
    static DEVICE_MEMBER int element(int unit, int) { return unit * 32; }
    // 128 + value and 128 - value stay within their bytes; with the upper bit flipped they are signed.
    static DEVICE_MEMBER int with_signs(u32 values, u32 signs) {
        const u32 negative = (signs << 8) - signs;
        return (int)((0x80808080u + values - ((values & negative) << 1)) ^ 0x80808080u);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 word = funnel_right(r.word[i], r.word[i + 1], r.bits);
            u32 low, high;
            look_up(word & 0x77777777u, 0x03020100u, 0x0c080604u, low, high);
            u.quants[0][i] = with_signs(low, (word >> 3) & 0x01010101u);
            u.quants[0][4 + i] = with_signs(high, (word >> 7) & 0x01010101u);
        }
        // 2^(exponent - 128): the two least are denormal
        u.scale[0] = as_float(r.exponent < 2 ? 0x00200000u << r.exponent : (u32)(r.exponent - 1) << 23);
        u.minimum[0] = 0.f;
    }
};

// Float rows: multiplied with the float activations, nothing is rounded but the sum.
struct f32 {
    static const bool is_quantized = false;
    static const int block_elements = 4, block_bytes = 16, unit_elements = 4;
    typedef u32x4 raw;
    struct prepared {
        float value[unit_elements];
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        return L::word16_once(row + 16 * unit);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
        u.value[0] = as_float(r.x), u.value[1] = as_float(r.y);
        u.value[2] = as_float(r.z), u.value[3] = as_float(r.w);
    }
};
struct f16 {
    static const bool is_quantized = false;
    static const int block_elements = 8, block_bytes = 16, unit_elements = 8;
    typedef u32x4 raw;
    struct prepared {
        float value[unit_elements];
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        return L::word16_once(row + 16 * unit);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
        const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u.value[2 * i] = from_half((u16)words[i]);
            u.value[2 * i + 1] = from_half((u16)(words[i] >> 16));
        }
    }
};
struct bf16 {
    static const bool is_quantized = false;
    static const int block_elements = 8, block_bytes = 16, unit_elements = 8;
    typedef u32x4 raw;
    struct prepared {
        float value[unit_elements];
    };
    template <class L = settled> static DEVICE_MEMBER raw load(const u8 *row, int unit) {
        return L::word16_once(row + 16 * unit);
    }
    static DEVICE_MEMBER void unpack(const raw &r, int, prepared &u) {
        const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u.value[2 * i] = as_float(words[i] << 16);
            u.value[2 * i + 1] = as_float(words[i] & 0xffff0000u);
        }
    }
};

DEVICE int sum_bytes(const u32x4 &x) {
    const int ones = 0x01010101;
    return dot4(ones, (int)x.w, dot4(ones, (int)x.z, dot4(ones, (int)x.y, dot4(ones, (int)x.x, 0))));
}

// sum + (the unit's weights . the activations).  Activations of quantized weights are a Q8 row (activations.h):
// `columns` signed bytes, then a (d, d * sum) pair for every 32 of them; of float weights, `columns` floats.
// Every multiply-add is spelled out, so that each kernel that meets the same row gives the same bits.
template <class T>
DEVICE float add_unit(const typename T::prepared &u, int unit, const u8 *activations, int columns, float sum) {
    if constexpr (T::is_quantized) {
        // one address a unit: the groups' differ by constants
        const u32 first = (u32)T::element(unit, 0);
        const u8 *bytes = activations + first, *pairs = activations + (u32)columns + 8 * (first >> 5);
        float d[T::groups], total[T::groups];
        if constexpr (T::has_minimum) {
            static_assert(T::groups == 2 && T::group_stride == 32, "the pairs of both groups stand side by side");
            const u32x4 both = fresh16(pairs);
            d[0] = as_float(both.x), total[0] = as_float(both.y);
            d[1] = as_float(both.z), total[1] = as_float(both.w);
        } else {
#pragma unroll
            for (int g = 0; g < T::groups; ++g) d[g] = as_float(fresh4(pairs + T::group_stride / 4 * g));
        }
#pragma unroll
        for (int g = 0; g < T::groups; ++g) {
            int s = 0;
#pragma unroll
            for (int i = 0; i < T::group_elements / 4; i += 4) {
                const u32x4 x = fresh16(bytes + T::group_stride * g + 4 * i);
                // The centre times the sum of the activations is the same for all rows: cheaper than centring each.
                if (T::centre) s -= T::centre * sum_bytes(x);
                s = dot4(u.quants[g][i], (int)x.x, s);
                s = dot4(u.quants[g][i + 1], (int)x.y, s);
                s = dot4(u.quants[g][i + 2], (int)x.z, s);
                s = dot4(u.quants[g][i + 3], (int)x.w, s);
            }
            sum = fused(u.scale[g] * d[g], (float)s, sum);
            if constexpr (T::has_minimum) sum = fused(-u.minimum[g], total[g], sum);
        }
    } else {
        const float *x = (const float *)activations + T::unit_elements * unit;
#pragma unroll
        for (int i = 0; i < T::unit_elements; i += 4) {
            const u32x4 w = fresh16(x + i);
            sum = fused(u.value[i], as_float(w.x), sum);
            sum = fused(u.value[i + 1], as_float(w.y), sum);
            sum = fused(u.value[i + 2], as_float(w.z), sum);
            sum = fused(u.value[i + 3], as_float(w.w), sum);
        }
    }
    return sum;
}

template <class T> DEVICE void expand_unit(const typename T::prepared &u, int unit, float *y) {
    if constexpr (T::is_quantized) {
        for (int g = 0; g < T::groups; ++g)
            for (int i = 0; i < T::group_elements; ++i) {
                const float q = (float)(i8)(u.quants[g][i >> 2] >> (8 * (i & 3)));
                y[T::element(unit, g) + i] = fused(u.scale[g], q - (float)T::centre, -u.minimum[g]);
            }
    } else {
        for (int i = 0; i < T::unit_elements; ++i) y[T::unit_elements * unit + i] = u.value[i];
    }
}
