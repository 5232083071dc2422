/* Block layouts and rounding are ggml's (ggml-common.h, ggml-quants.c describe them); sums run over integers in
 * each block, so the only difference to ggml is the order of the float sum over blocks. */
#include "dot_portable.h"

#include <math.h>
#include <string.h>

#include "clones.h"

enum { F32 = 0, F16 = 1, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, Q8_K = 15, BF16 = 30, SUPER = 256 };

/* Helpers must be inlined into each clone, or they stay scalar. */
#define INLINE inline __attribute__((always_inline))

typedef uint16_t half;
typedef struct { half d; int8_t q[32]; } block_q8_0;
typedef struct { float d; int8_t q[SUPER]; int16_t sums[SUPER / 16]; } block_q8_K;
typedef struct { half d, dmin; uint8_t scales[12]; uint8_t q[SUPER / 2]; } block_q4_K;
typedef struct { half d, dmin; uint8_t scales[12]; uint8_t high[SUPER / 8]; uint8_t q[SUPER / 2]; } block_q5_K;
typedef struct { uint8_t low[SUPER / 2]; uint8_t high[SUPER / 4]; int8_t scales[SUPER / 16]; half d; } block_q6_K;

static INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static INLINE float half_float(half h) {
#ifdef __FLT16_MAX__
    _Float16 value;
    memcpy(&value, &h, sizeof value);
    return (float)value;
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * 0x1p-24f;
    return sign ? -tiny : tiny;
#endif
}

static inline half float_half(float f) {
#ifdef __FLT16_MAX__
    _Float16 value = (_Float16)f;
    half h;
    memcpy(&h, &value, sizeof h);
    return h;
#else
    /* round to nearest even by adding the magic number whose unit in the last place is that of the result */
    uint32_t bits = float_bits(f), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) return sign | (half)(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
    magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
    return sign | magnitude >> 13;
#endif
}

static INLINE float bf16_float(uint16_t b) { return bits_float((uint32_t)b << 16); }

/* ---- activations ---- */

CLONES static void to_q8_0(const float *x, void *y, int64_t n) {
    block_q8_0 *block = y;
    for (int64_t b = 0; b < n / 32; b++, x += 32) {
        float most = 0;
        for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(x[i]));
        float d = most / 127, inverse = d ? 1 / d : 0;
        block[b].d = float_half(d);
        for (int i = 0; i < 32; i++) block[b].q[i] = (int8_t)rintf(x[i] * inverse);
    }
}

CLONES static void to_q8_K(const float *x, void *y, int64_t n) {
    block_q8_K *block = y;
    for (int64_t b = 0; b < n / SUPER; b++, x += SUPER) {
        float most = 0, signed_most = 0;
        for (int i = 0; i < SUPER; i++)
            if (fabsf(x[i]) > most) {
                most = fabsf(x[i]);
                signed_most = x[i];
            }
        if (!most) {
            memset(&block[b], 0, sizeof block[b]);
            continue;
        }
        float inverse = -127.f / signed_most;
        for (int i = 0; i < SUPER; i++) {
            int q = (int)rintf(inverse * x[i]);
            block[b].q[i] = q > 127 ? 127 : q;
        }
        for (int i = 0; i < SUPER / 16; i++) {
            int sum = 0;
            for (int j = 0; j < 16; j++) sum += block[b].q[16 * i + j];
            block[b].sums[i] = sum;
        }
        block[b].d = 1 / inverse;
    }
}

static void to_f16(const float *x, void *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) ((half *)y)[i] = float_half(x[i]);
}

static void to_bf16(const float *x, void *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(x[i]);
        /* round to nearest even; a NaN stays one */
        ((uint16_t *)y)[i] = isnan(x[i]) ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
}

/* ---- weights to floats ---- */

static void scale_min(int j, const uint8_t *s, int *scale, int *minimum) {
    if (j < 4) {
        *scale = s[j] & 63;
        *minimum = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        *minimum = s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
}

/* Unpack a block to unsigned integers of up to 8 bits, in element order. */
static INLINE void unpack_q4_K(const block_q4_K *b, uint8_t *q) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) {
            q[64 * j + i] = b->q[32 * j + i] & 15;
            q[64 * j + 32 + i] = b->q[32 * j + i] >> 4;
        }
}

static INLINE void unpack_q5_K(const block_q5_K *b, uint8_t *q) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) {
            q[64 * j + i] = (b->q[32 * j + i] & 15) | (b->high[i] >> (2 * j) & 1) << 4;
            q[64 * j + 32 + i] = b->q[32 * j + i] >> 4 | (b->high[i] >> (2 * j + 1) & 1) << 4;
        }
}

static INLINE void unpack_q6_K(const block_q6_K *b, int8_t *q) {
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 32; i++) {
            const uint8_t *low = b->low + 64 * n, *high = b->high + 32 * n;
            q[128 * n + i] = ((low[i] & 15) | (high[i] & 3) << 4) - 32;
            q[128 * n + 32 + i] = ((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32;
            q[128 * n + 64 + i] = (low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32;
            q[128 * n + 96 + i] = (low[i + 32] >> 4 | (high[i] >> 6) << 4) - 32;
        }
}

static void expand_scaled(const uint8_t *q, half d, half dmin, const uint8_t *scales, float *y) {
    for (int j = 0; j < 8; j++) {
        int scale, minimum;
        scale_min(j, scales, &scale, &minimum);
        float a = half_float(d) * scale, m = half_float(dmin) * minimum;
        for (int i = 0; i < 32; i++) y[32 * j + i] = a * q[32 * j + i] - m;
    }
}

static void from_q4_K(const void *x, float *y, int64_t n) {
    const block_q4_K *b = x;
    uint8_t q[SUPER];
    for (int64_t k = 0; k < n / SUPER; k++, y += SUPER) {
        unpack_q4_K(&b[k], q);
        expand_scaled(q, b[k].d, b[k].dmin, b[k].scales, y);
    }
}

static void from_q5_K(const void *x, float *y, int64_t n) {
    const block_q5_K *b = x;
    uint8_t q[SUPER];
    for (int64_t k = 0; k < n / SUPER; k++, y += SUPER) {
        unpack_q5_K(&b[k], q);
        expand_scaled(q, b[k].d, b[k].dmin, b[k].scales, y);
    }
}

static void from_q6_K(const void *x, float *y, int64_t n) {
    const block_q6_K *b = x;
    int8_t q[SUPER];
    for (int64_t k = 0; k < n / SUPER; k++, y += SUPER) {
        unpack_q6_K(&b[k], q);
        for (int i = 0; i < SUPER; i++) y[i] = half_float(b[k].d) * b[k].scales[i / 16] * q[i];
    }
}

static void from_q8_0(const void *x, float *y, int64_t n) {
    const block_q8_0 *b = x;
    for (int64_t i = 0; i < n; i++) y[i] = half_float(b[i / 32].d) * b[i / 32].q[i % 32];
}

static void from_f16(const void *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = half_float(((const half *)x)[i]);
}

static void from_bf16(const void *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = bf16_float(((const uint16_t *)x)[i]);
}

/* ---- dot products ---- */

#define UNUSED_STRIDES (void)bs, (void)bx, (void)by, (void)nrc

CLONES static void dot_f32(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const float *a = x, *b = y;
    fomoe_lanes lane = {0}, u, v;
    float rest = 0;
    int i = 0;
    UNUSED_STRIDES;
    for (; i + LANES <= n; i += LANES) {
        load_lanes(&u, a + i);
        load_lanes(&v, b + i);
        lane += u * v;
    }
    for (; i < n; i++) rest += a[i] * b[i];
    *s = sum_lanes(&lane) + rest;
}

CLONES static void dot_f16(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const half *a = x, *b = y;
    float u[LANES], v[LANES], rest = 0;
    fomoe_lanes lane = {0}, p, q;
    int i = 0;
    UNUSED_STRIDES;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) u[j] = half_float(a[i + j]);
        for (int j = 0; j < LANES; j++) v[j] = half_float(b[i + j]);
        load_lanes(&p, u);
        load_lanes(&q, v);
        lane += p * q;
    }
    for (; i < n; i++) rest += half_float(a[i]) * half_float(b[i]);
    *s = sum_lanes(&lane) + rest;
}

static INLINE void load_bf16(fomoe_lanes *v, const uint16_t *x) {
    typedef uint16_t shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    shorts raw;
    memcpy(&raw, x, sizeof raw);
    words bits = __builtin_convertvector(raw, words) << 16;
    memcpy(v, &bits, sizeof *v);
}

CLONES static void dot_bf16(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const uint16_t *a = x, *b = y;
    fomoe_lanes lane = {0}, u, v;
    float rest = 0;
    int i = 0;
    UNUSED_STRIDES;
    for (; i + LANES <= n; i += LANES) {
        load_bf16(&u, a + i);
        load_bf16(&v, b + i);
        lane += u * v;
    }
    for (; i < n; i++) rest += bf16_float(a[i]) * bf16_float(b[i]);
    *s = sum_lanes(&lane) + rest;
}

CLONES static void dot_q8_0(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const block_q8_0 *a = x, *b = y;
    float sum = 0;
    UNUSED_STRIDES;
    for (int k = 0; k < n / 32; k++) {
        int dot = 0;
        for (int i = 0; i < 32; i++) dot += a[k].q[i] * b[k].q[i];
        sum += dot * (half_float(a[k].d) * half_float(b[k].d));
    }
    *s = sum;
}

/* sum over the 8 sub-blocks of scale * (q . y), less minimum * sum(y) */
static INLINE float scaled_block(const uint8_t *q, const uint8_t *scales, half d,
                                                                half dmin, const block_q8_K *y) {
    int total = 0, minimums = 0;
    for (int j = 0; j < 8; j++) {
        int scale, minimum, dot = 0;
        scale_min(j, scales, &scale, &minimum);
        for (int i = 0; i < 32; i++) dot += (int16_t)q[32 * j + i] * (int16_t)y->q[32 * j + i];
        total += scale * dot;
        minimums += minimum * (y->sums[2 * j] + y->sums[2 * j + 1]);
    }
    return y->d * (half_float(d) * total - half_float(dmin) * minimums);
}

CLONES static void dot_q4_K(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const block_q4_K *a = x;
    const block_q8_K *b = y;
    uint8_t q[SUPER];
    float sum = 0;
    UNUSED_STRIDES;
    for (int k = 0; k < n / SUPER; k++) {
        unpack_q4_K(&a[k], q);
        sum += scaled_block(q, a[k].scales, a[k].d, a[k].dmin, &b[k]);
    }
    *s = sum;
}

CLONES static void dot_q5_K(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const block_q5_K *a = x;
    const block_q8_K *b = y;
    uint8_t q[SUPER];
    float sum = 0;
    UNUSED_STRIDES;
    for (int k = 0; k < n / SUPER; k++) {
        unpack_q5_K(&a[k], q);
        sum += scaled_block(q, a[k].scales, a[k].d, a[k].dmin, &b[k]);
    }
    *s = sum;
}

CLONES static void dot_q6_K(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    const block_q6_K *a = x;
    const block_q8_K *b = y;
    int8_t q[SUPER];
    float sum = 0;
    UNUSED_STRIDES;
    for (int k = 0; k < n / SUPER; k++) {
        int total = 0;
        unpack_q6_K(&a[k], q);
        for (int j = 0; j < SUPER / 16; j++) {
            int dot = 0;
            for (int i = 0; i < 16; i++) dot += (int16_t)q[16 * j + i] * (int16_t)b[k].q[16 * j + i];
            total += a[k].scales[j] * dot;
        }
        sum += half_float(a[k].d) * b[k].d * total;
    }
    *s = sum;
}

const fomoe_type fomoe_portable_types[] = {
    {F32, F32, 1, 4, dot_f32, NULL, NULL},
    {F16, F16, 1, 2, dot_f16, to_f16, from_f16},
    {BF16, BF16, 1, 2, dot_bf16, to_bf16, from_bf16},
    {Q8_0, Q8_0, 32, sizeof(block_q8_0), dot_q8_0, to_q8_0, from_q8_0},
    {Q4_K, Q8_K, SUPER, sizeof(block_q4_K), dot_q4_K, NULL, from_q4_K},
    {Q5_K, Q8_K, SUPER, sizeof(block_q5_K), dot_q5_K, NULL, from_q5_K},
    {Q6_K, Q8_K, SUPER, sizeof(block_q6_K), dot_q6_K, NULL, from_q6_K},
    {Q8_K, Q8_K, SUPER, sizeof(block_q8_K), NULL, to_q8_K, NULL},
};
const int fomoe_portable_count = sizeof fomoe_portable_types / sizeof *fomoe_portable_types;
