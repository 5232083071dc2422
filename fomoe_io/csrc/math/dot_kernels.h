/* The portable dot products.  Sums run over integers in each block as ggml's do, so the only difference to ggml is
 * the order of the float sum over blocks. */
#include "quant_blocks.h"

#include "bytes.h"
#include "halves.h"

/* ---- activations ---- */

static void to_q8_0(const float *x, void *y, int64_t n) {
    block_q8_0 *block = y;
    for (int64_t b = 0; b < n / 32; b++, x += 32) {
        floats low = load(x), high = load(x + LANES);
        float most = largest(larger(absolute(low), absolute(high)));
        /* ggml's x86 kernels divide 127 by the maximum; its plain C inverts the rounded scale */
        float inverse = most ? 127.f / most : 0;
        block[b].d = float_half(most / 127.f);
        store_bytes(block[b].q, nearest(times(low, fill(inverse))));
        store_bytes(block[b].q + LANES, nearest(times(high, fill(inverse))));
    }
}

static float first_of_magnitude(const float *x, float most) {
    int i = 0;
    while (i < SUPER - 1 && fabsf(x[i]) != most) i++;
    return x[i];
}

static void to_q8_K(const float *x, void *y, int64_t n) {
    block_q8_K *block = y;
    for (int64_t b = 0; b < n / SUPER; b++, x += SUPER) {
        floats most = fill(0);
        for (int i = 0; i < SUPER; i += LANES) most = larger(most, absolute(load(x + i)));
        float magnitude = largest(most);
        if (!magnitude) {
            memset(&block[b], 0, sizeof block[b]);
            continue;
        }
        float inverse = -127.f / first_of_magnitude(x, magnitude);
        for (int i = 0; i < SUPER; i += LANES) {
            store_bytes(block[b].q + i, nearest(smaller(times(load(x + i), fill(inverse)), fill(127))));
            int sum = 0;
            for (int j = 0; j < LANES; j++) sum += block[b].q[i + j];
            block[b].sums[i / LANES] = sum;
        }
        block[b].d = 1 / inverse;
    }
}

static void to_f16(const float *x, void *y, int64_t n) {
    half *out = y;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_halves(out + i, load(x + i));
    for (; i < n; i++) out[i] = float_half(x[i]);
}

static void to_bf16(const float *x, void *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) ((uint16_t *)y)[i] = float_bf16(x[i]);
}

/* ---- scales of the K types ---- */

typedef struct {
    /* of each 16 elements; the minimum counts once for every activation */
    int16_t scale[16], minimum[16];
} super_scales;

/* Eight scales and eight minimums of six bits: bytes 0-3 and 4-7 hold the first four of each in their low six bits;
 * bytes 8-11 hold the low halves of the others, whose upper two bits are on top of bytes 0-7. */
INLINE void unpack_scales(const uint8_t *packed, super_scales *s) {
    uint32_t first, second, third;
    memcpy(&first, packed, 4);
    memcpy(&second, packed + 4, 4);
    memcpy(&third, packed + 8, 4);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    uint32_t word[4] = {first & six, (third & four) | (first >> 2 & two), second & six,
                        (third >> 4 & four) | (second >> 2 & two)};
#if VECTOR_BYTES >= 32
    __m128i all = _mm_setr_epi32(word[0], word[1], word[2], word[3]);
    _mm256_storeu_si256((__m256i_u *)s->scale, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(all, all)));
    _mm256_storeu_si256((__m256i_u *)s->minimum, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(all, all)));
#else
    for (int i = 0; i < 8; i++) {
        s->scale[2 * i] = s->scale[2 * i + 1] = word[i / 4] >> (8 * (i % 4)) & 255;
        s->minimum[2 * i] = s->minimum[2 * i + 1] = word[2 + i / 4] >> (8 * (i % 4)) & 255;
    }
#endif
}

/* Eight floats: products of 16 pairs of short integers, added two by two. */
#if VECTOR_BYTES >= 32
typedef __m256 eight_floats;
INLINE eight_floats pair_products(const int16_t *x, const int16_t *y) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_loadu_si256((const __m256i_u *)x),
                                                _mm256_loadu_si256((const __m256i_u *)y)));
}
INLINE eight_floats eight_plus_product(eight_floats sum, float a, eight_floats x) {
    return _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(a), x));
}
INLINE float sum_eight(eight_floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    return (four[0] + four[2]) + (four[1] + four[3]);
}
#else
typedef struct { float_vector low, high; } eight_floats;
INLINE eight_floats pair_products(const int16_t *x, const int16_t *y) {
    float sum[8];
    for (int i = 0; i < 8; i++) sum[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return (eight_floats){*(const loose_vector *)sum, *(const loose_vector *)(sum + 4)};
}
INLINE eight_floats eight_plus_product(eight_floats sum, float a, eight_floats x) {
    return (eight_floats){sum.low + a * x.low, sum.high + a * x.high};
}
INLINE float sum_eight(eight_floats x) {
    float_vector four = x.low + x.high;
    return (four[0] + four[2]) + (four[1] + four[3]);
}
#endif

/* ---- blocks of the K types: unsigned integers in element order, 64 at a time, and what they are multiplied with ---- */

enum { CHUNKS = SUPER / 64 };

INLINE bytes chunk_q4_K(const block_q4_K *b, int chunk) { return nibbles(b->q + 32 * chunk); }

INLINE bytes chunk_q5_K(const block_q5_K *b, int chunk) {
    return add_fifth_bit(nibbles(b->q + 32 * chunk), b->high, 2 * chunk);
}

/* plus 32 */
INLINE bytes chunk_q6_K(const block_q6_K *b, int chunk) {
    return six_bits(b->low + 64 * (chunk / 2), b->high + 32 * (chunk / 2), 4 * (chunk % 2));
}

INLINE void scales_q6_K(const block_q6_K *b, super_scales *s) {
    for (int i = 0; i < 16; i++) s->scale[i] = b->scales[i];
    memcpy(s->minimum, s->scale, sizeof s->scale); /* the 32 too many */
}

/* ---- dot products ---- */

#define DOT(name) \
    static void name(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc)
#define UNUSED_STRIDES (void)bs, (void)bx, (void)by, (void)nrc

/* A row of a K type: sum over blocks of d * (scales * weights * activations) - minimum * (minimums * activations). */
#define DOT_SUPER(type, unpack, d_of, minimum_of)                                                        \
    DOT(dot_##type) {                                                                                    \
        const block_##type *a = x;                                                                       \
        const block_q8_K *b = y;                                                                         \
        floats total = fill(0);                                                                          \
        eight_floats less = pair_products((int16_t[16]){0}, (int16_t[16]){0});                           \
        UNUSED_STRIDES;                                                                                  \
        for (int k = 0; k < n / SUPER; k++, a++, b++) {                                                  \
            super_scales scales;                                                                         \
            ints dot = nearest(fill(0));                                                                 \
            unpack;                                                                                      \
            for (int c = 0; c < CHUNKS; c++)                                                             \
                dot = plus_dot(dot, chunk_##type(a, c), load_bytes(b->q + 64 * c), expand_scales(scales.scale, c)); \
            total = plus_product(total, fill(b->d * (d_of)), to_floats(dot));                            \
            less = eight_plus_product(less, b->d * (minimum_of), pair_products(b->sums, scales.minimum)); \
        }                                                                                                \
        *s = sum(total) - sum_eight(less);                                                               \
    }

DOT_SUPER(q4_K, unpack_scales(a->scales, &scales), half_float(a->d), half_float(a->dmin))
DOT_SUPER(q5_K, unpack_scales(a->scales, &scales), half_float(a->d), half_float(a->dmin))
DOT_SUPER(q6_K, scales_q6_K(a, &scales), half_float(a->d), 32 * half_float(a->d))

/* Two blocks at a time: the first in lanes 0-7, the second in lanes 8-15. */
DOT(dot_q8_0) {
    const block_q8_0 *a = x, *b = y;
    const int8_t nothing[32] = {0};
    int blocks = n / 32, k = 0;
    floats total = fill(0);
    UNUSED_STRIDES;
    for (; k + 2 <= blocks; k += 2) {
        floats d = fill_two(half_float(a[k].d) * half_float(b[k].d), half_float(a[k + 1].d) * half_float(b[k + 1].d));
        ints dot = signed_dot(load_two(a[k].q, a[k + 1].q), load_two(b[k].q, b[k + 1].q));
        total = plus_product(total, d, to_floats(dot));
    }
    if (k < blocks) {
        floats d = fill_two(half_float(a[k].d) * half_float(b[k].d), 0);
        ints dot = signed_dot(load_two(a[k].q, nothing), load_two(b[k].q, nothing));
        total = plus_product(total, d, to_floats(dot));
    }
    *s = sum(total);
}

/* Twice what four bits stand for: a sign, two bits of exponent, one of mantissa. */
static const int8_t MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

INLINE void mxfp4_values(const uint8_t *q, int8_t *y) {
#if VECTOR_BYTES >= 32
    __m128i table = _mm_loadu_si128((const __m128i_u *)MXFP4_VALUES), mask = _mm_set1_epi8(15);
    __m128i both = _mm_loadu_si128((const __m128i_u *)q);
    _mm_storeu_si128((__m128i_u *)y, _mm_shuffle_epi8(table, _mm_and_si128(both, mask)));
    _mm_storeu_si128((__m128i_u *)(y + 16), _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), mask)));
#else
    for (int i = 0; i < 16; i++) {
        y[i] = MXFP4_VALUES[q[i] & 15];
        y[i + 16] = MXFP4_VALUES[q[i] >> 4];
    }
#endif
}

/* 2^(e - 128): half the block's scale, because the values are doubled */
INLINE float mxfp4_scale(uint8_t e) {
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

DOT(dot_mxfp4) {
    const block_mxfp4 *a = x;
    const block_q8_0 *b = y;
    int8_t weight[64] = {0}, activation[64] = {0};
    int blocks = n / 32;
    floats total = fill(0);
    UNUSED_STRIDES;
    for (int k = 0; k < blocks; k += 2) {
        int two = k + 2 <= blocks; /* an odd last block stands beside zeros */
        mxfp4_values(a[k].q, weight);
        memcpy(activation, b[k].q, 32);
        if (two) mxfp4_values(a[k + 1].q, weight + 32);
        if (two) memcpy(activation + 32, b[k + 1].q, 32);
        floats d = fill_two(mxfp4_scale(a[k].e) * half_float(b[k].d),
                            two ? mxfp4_scale(a[k + 1].e) * half_float(b[k + 1].d) : 0);
        ints dot = signed_dot(load_two(weight, weight + 32), load_two(activation, activation + 32));
        total = plus_product(total, d, to_floats(dot));
    }
    *s = sum(total);
}

#define DOT_FLOAT(name, type, load_lanes, one)                                                    \
    DOT(name) {                                                                                   \
        const type *a = x, *b = y;                                                                \
        floats even = fill(0), odd = fill(0);                                                     \
        float rest = 0;                                                                           \
        int i = 0;                                                                                \
        UNUSED_STRIDES;                                                                           \
        for (; i + 2 * LANES <= n; i += 2 * LANES) {                                              \
            even = plus_product(even, load_lanes(a + i), load_lanes(b + i));                      \
            odd = plus_product(odd, load_lanes(a + i + LANES), load_lanes(b + i + LANES));        \
        }                                                                                         \
        for (; i < n; i++) rest += one(a[i]) * one(b[i]);                                         \
        *s = sum(plus(even, odd)) + rest;                                                         \
    }

DOT_FLOAT(dot_f32, float, load, )
DOT_FLOAT(dot_f16, half, load_halves, half_float)
DOT_FLOAT(dot_bf16, uint16_t, load_bf16, bf16_float)

/* ---- weights to floats ---- */

static void scaled_minus(const super_scales *s, const int8_t *q, float d, float dmin, float *y) {
    for (int i = 0; i < SUPER; i++) y[i] = d * s->scale[i / 16] * q[i] - dmin * s->minimum[i / 16];
}

#define FROM_SUPER(type, unpack, expand)                                                \
    static void from_##type(const void *x, float *y, int64_t n) {                       \
        const block_##type *a = x;                                                      \
        for (int64_t k = 0; k < n / SUPER; k++, a++, y += SUPER) {                      \
            super_scales scales;                                                        \
            int8_t q[SUPER];                                                            \
            unpack;                                                                     \
            for (int c = 0; c < CHUNKS; c++) {                                          \
                bytes chunk = chunk_##type(a, c);                                       \
                memcpy(q + 64 * c, &chunk, sizeof chunk);                               \
            }                                                                           \
            expand;                                                                     \
        }                                                                               \
    }

FROM_SUPER(q4_K, unpack_scales(a->scales, &scales), scaled_minus(&scales, q, half_float(a->d), half_float(a->dmin), y))
FROM_SUPER(q5_K, unpack_scales(a->scales, &scales), scaled_minus(&scales, q, half_float(a->d), half_float(a->dmin), y))
FROM_SUPER(q6_K, scales_q6_K(a, &scales), for (int i = 0; i < SUPER; i++) y[i] = half_float(a->d) * scales.scale[i / 16] * (q[i] - 32))

static void from_q8_0(const void *x, float *y, int64_t n) {
    const block_q8_0 *b = x;
    for (int64_t k = 0; k < n / 32; k++, b++)
        for (int i = 0; i < 32; i++) *y++ = half_float(b->d) * b->q[i];
}

static void from_mxfp4(const void *x, float *y, int64_t n) {
    const block_mxfp4 *b = x;
    int8_t values[32];
    for (int64_t k = 0; k < n / 32; k++, b++) {
        mxfp4_values(b->q, values);
        for (int i = 0; i < 32; i++) *y++ = mxfp4_scale(b->e) * values[i];
    }
}

static void from_f16(const void *x, float *y, int64_t n) {
    const half *a = x;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load_halves(a + i));
    for (; i < n; i++) y[i] = half_float(a[i]);
}

static void from_bf16(const void *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = bf16_float(((const uint16_t *)x)[i]);
}

static void from_f32(const void *x, float *y, int64_t n) { memcpy(y, x, n * sizeof *y); }

static const fomoe_type types[] = {
    {F32, F32, 1, 4, dot_f32, NULL, from_f32},
    {F16, F16, 1, 2, dot_f16, to_f16, from_f16},
    {BF16, BF16, 1, 2, dot_bf16, to_bf16, from_bf16},
    {Q8_0, Q8_0, 32, sizeof(block_q8_0), dot_q8_0, to_q8_0, from_q8_0},
    {Q4_K, Q8_K, SUPER, sizeof(block_q4_K), dot_q4_K, NULL, from_q4_K},
    {Q5_K, Q8_K, SUPER, sizeof(block_q5_K), dot_q5_K, NULL, from_q5_K},
    {Q6_K, Q8_K, SUPER, sizeof(block_q6_K), dot_q6_K, NULL, from_q6_K},
    {MXFP4, Q8_0, 32, sizeof(block_mxfp4), dot_mxfp4, NULL, from_mxfp4},
    {Q8_K, Q8_K, SUPER, sizeof(block_q8_K), NULL, to_q8_K, NULL},
    {.block_elements = 0},
};
