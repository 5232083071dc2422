/* Sixteen floats or integers at a time, in as many vectors as the instruction set needs for them.  Results are the
 * same bits for every set: lane i always takes elements i, i + 16, ..., and lanes are summed as one tree.
 *
 * Vectors of the set's own width and constant indices only: gcc 12 keeps wider vector types, arrays walked by a loop
 * and memcpy'd structures on the stack. */
#ifndef FOMOE_LANES_H
#define FOMOE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, PART = VECTOR_BYTES / 4 };
#if VECTOR_BYTES == 64
#define PARTS 1
#define FOR_PARTS(statement) statement(0)
#elif VECTOR_BYTES == 32
#define PARTS 2
#define FOR_PARTS(statement) statement(0) statement(1)
#else
#define PARTS 4
#define FOR_PARTS(statement) statement(0) statement(1) statement(2) statement(3)
#endif

typedef float float_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t int_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef double double_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float half_vector __attribute__((vector_size(VECTOR_BYTES / 2)));
/* anywhere in memory */
typedef float_vector loose_vector __attribute__((aligned(4), may_alias));
typedef half_vector loose_half __attribute__((aligned(4), may_alias));

typedef struct { float_vector part[PARTS]; } floats;
typedef struct { int_vector part[PARTS]; } ints;
typedef struct { double_vector low[PARTS], high[PARTS]; } doubles;

INLINE floats load(const float *x) {
    floats y;
#define LOAD(i) y.part[i] = *(const loose_vector *)(x + i * PART);
    FOR_PARTS(LOAD)
#undef LOAD
    return y;
}

INLINE void store(float *y, floats x) {
#define STORE(i) *(loose_vector *)(y + i * PART) = x.part[i];
    FOR_PARTS(STORE)
#undef STORE
}

/* The last n < 16 floats of an array, 0 in the other lanes. */
INLINE floats load_tail(const float *x, int n) {
    float y[LANES] = {0};
    memcpy(y, x, n * sizeof *y);
    return load(y);
}

INLINE void store_tail(float *y, floats x, int n) {
    float z[LANES];
    store(z, x);
    memcpy(y, z, n * sizeof *y);
}

INLINE floats fill(float x) {
    floats y;
#define FILL(i) y.part[i] = (float_vector){0} + x;
    FOR_PARTS(FILL)
#undef FILL
    return y;
}

/* x in lanes 0-7, y in lanes 8-15 */
INLINE floats fill_two(float x, float y) {
    float both[LANES];
    for (int i = 0; i < LANES; i++) both[i] = i < LANES / 2 ? x : y;
    return load(both);
}

/* x + a * b, rounded twice whatever the processor could do */
INLINE floats plus_product(floats x, floats a, floats b) {
#define PLUS(i) x.part[i] += a.part[i] * b.part[i];
    FOR_PARTS(PLUS)
#undef PLUS
    return x;
}

INLINE floats plus(floats x, floats y) {
#define PLUS(i) x.part[i] += y.part[i];
    FOR_PARTS(PLUS)
#undef PLUS
    return x;
}

INLINE floats times(floats x, floats y) {
#define TIMES(i) x.part[i] *= y.part[i];
    FOR_PARTS(TIMES)
#undef TIMES
    return x;
}

INLINE floats divided(floats x, floats y) {
#define DIVIDED(i) x.part[i] /= y.part[i];
    FOR_PARTS(DIVIDED)
#undef DIVIDED
    return x;
}

INLINE floats absolute(floats x) {
#define ABSOLUTE(i) x.part[i] = (float_vector)((int_vector)x.part[i] & 0x7fffffff);
    FOR_PARTS(ABSOLUTE)
#undef ABSOLUTE
    return x;
}

/* x where it is larger or not a number, else y */
INLINE floats larger(floats x, floats y) {
#define LARGER(i) {                                                                                     \
        int_vector less = x.part[i] < y.part[i];                                                        \
        x.part[i] = (float_vector)((less & (int_vector)y.part[i]) | (~less & (int_vector)x.part[i]));   \
    }
    FOR_PARTS(LARGER)
#undef LARGER
    return x;
}

INLINE floats smaller(floats x, floats y) {
#define SMALLER(i) {                                                                                    \
        int_vector more = x.part[i] > y.part[i];                                                        \
        x.part[i] = (float_vector)((more & (int_vector)y.part[i]) | (~more & (int_vector)x.part[i]));   \
    }
    FOR_PARTS(SMALLER)
#undef SMALLER
    return x;
}

INLINE floats to_floats(ints x) {
    floats y;
#define CONVERT(i) y.part[i] = __builtin_convertvector(x.part[i], float_vector);
    FOR_PARTS(CONVERT)
#undef CONVERT
    return y;
}

/* Nearest integers (ties to even) of |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits. */
INLINE ints nearest(floats x) {
    ints y;
#define NEAREST(i) y.part[i] = (int_vector)(x.part[i] + 0x1.8p23f) - 0x4b400000;
    FOR_PARTS(NEAREST)
#undef NEAREST
    return y;
}

INLINE ints minus(ints x, ints y) {
#define MINUS(i) x.part[i] -= y.part[i];
    FOR_PARTS(MINUS)
#undef MINUS
    return x;
}

INLINE doubles plus_squares(doubles sum, const float *x) {
#define SQUARES(i) {                                                                                                \
        double_vector a = __builtin_convertvector(*(const loose_half *)(x + i * PART), double_vector);              \
        double_vector b = __builtin_convertvector(*(const loose_half *)(x + i * PART + PART / 2), double_vector);   \
        sum.low[i] += a * a;                                                                                        \
        sum.high[i] += b * b;                                                                                       \
    }
    FOR_PARTS(SQUARES)
#undef SQUARES
    return sum;
}

INLINE doubles plus_stored(doubles sum, const float *x) {
#define STORED(i)                                                                                             \
    sum.low[i] += __builtin_convertvector(*(const loose_half *)(x + i * PART), double_vector);                \
    sum.high[i] += __builtin_convertvector(*(const loose_half *)(x + i * PART + PART / 2), double_vector);
    FOR_PARTS(STORED)
#undef STORED
    return sum;
}

INLINE double sum_doubles(doubles x) {
    double y[LANES];
#define STORE(i)                                                                   \
    memcpy(y + i * PART, &x.low[i], VECTOR_BYTES);                                 \
    memcpy(y + i * PART + PART / 2, &x.high[i], VECTOR_BYTES);
    FOR_PARTS(STORE)
#undef STORE
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
    return y[0];
}

/* Lane i with i + 8, then + 4, + 2, + 1. */
INLINE float sum(floats x) {
#if VECTOR_BYTES == 64
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x.part[0]), _mm512_extractf32x8_ps((__m512)x.part[0], 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif VECTOR_BYTES == 32
    __m256 eight = (__m256)(x.part[0] + x.part[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    float_vector four = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float largest(floats x) {
    float y[LANES];
    store(y, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] = y[i] < y[i + half] ? y[i + half] : y[i];
    return y[0];
}

#endif
