/* 64 bytes of small integers at a time, and their products summed in lanes: lane i takes bytes 4 i .. 4 i + 3.
 * The weights are 0..127, the activations -127..127, so two products fit 16 bits and nothing saturates. */

/* Sixteen integers of -128..127 to bytes. */
INLINE void store_bytes(int8_t *y, ints x) {
#if VECTOR_BYTES == 64
    _mm_storeu_si128((__m128i_u *)y, _mm512_cvtepi32_epi8((__m512i)x.part[0]));
#else
    for (int i = 0; i < LANES; i++) y[i] = x.part[i / PART][i % PART];
#endif
}

#if VECTOR_BYTES == 64

typedef __m512i bytes;
typedef __m512i scale_vector; /* one for every two bytes */

INLINE bytes load_bytes(const void *x) { return _mm512_loadu_si512(x); }

/* 32 bytes from each address */
INLINE bytes load_two(const void *low, const void *high) {
    __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i_u *)low));
    return _mm512_inserti64x4(x, _mm256_loadu_si256((const __m256i_u *)high), 1);
}

/* The low halves of 32 bytes, then the high halves. */
INLINE bytes nibbles(const uint8_t *x) {
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i_u *)x));
    return _mm512_and_si512(_mm512_srlv_epi16(both, shift), _mm512_set1_epi8(15));
}

/* Plus 16 where bit `bit` (first 32 bytes) or bit + 1 (last) of 32 bytes is set. */
INLINE bytes add_fifth_bit(bytes x, const uint8_t *high, int bit) {
    __m512i which = _mm512_inserti64x4(_mm512_set1_epi8(1 << bit), _mm256_set1_epi8((char)(2 << bit)), 1);
    __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i_u *)high));
    return _mm512_mask_add_epi8(x, _mm512_test_epi8_mask(both, which), x, _mm512_set1_epi8(16));
}

/* 64 values of six bits: the halves `shift` (0 or 4) of 64 bytes below bits shift, shift + 1 (first 32) or
 * shift + 2, shift + 3 (last 32) of 32 bytes. */
INLINE bytes six_bits(const uint8_t *low, const uint8_t *high, int shift) {
    const __m512i two = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i_u *)high));
    __m512i top = _mm512_srlv_epi16(both, _mm512_add_epi16(two, _mm512_set1_epi16(shift)));
    __m512i nibble = _mm512_srl_epi16(_mm512_loadu_si512(low), _mm_cvtsi32_si128(shift));
    /* nibble & 15 | top << 4 & 48 */
    return _mm512_or_si512(_mm512_and_si512(nibble, _mm512_set1_epi8(15)),
                           _mm512_and_si512(_mm512_slli_epi16(top, 4), _mm512_set1_epi8(48)));
}

/* scale[4 chunk + i] for bytes 16 i .. 16 i + 15 */
INLINE scale_vector expand_scales(const int16_t *scale, int chunk) {
    const __m512i pick = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302, 0x0302030203020302)),
        _mm256_setr_epi64x(0x0504050405040504, 0x0504050405040504, 0x0706070607060706, 0x0706070607060706), 1);
    long long four;
    memcpy(&four, scale + 4 * chunk, sizeof four);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(four), pick);
}

/* sum + scale * weight * activation */
INLINE ints plus_dot(ints sum, bytes weight, bytes activation, scale_vector scale) {
    __m512i pairs = _mm512_maddubs_epi16(weight, activation);
    return (ints){{(int_vector)_mm512_add_epi32((__m512i)sum.part[0], _mm512_madd_epi16(pairs, scale))}};
}

/* Both signed; -128 only among the weights. */
INLINE ints signed_dot(bytes weight, bytes activation) {
    __m512i turned = _mm512_mask_sub_epi8(activation, _mm512_movepi8_mask(weight), _mm512_setzero_si512(), activation);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weight), turned);
    return (ints){{(int_vector)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))}};
}

#elif VECTOR_BYTES == 32

typedef struct { __m256i low, high; } bytes, scale_vector;

INLINE bytes load_two(const void *low, const void *high) {
    return (bytes){_mm256_loadu_si256((const __m256i_u *)low), _mm256_loadu_si256((const __m256i_u *)high)};
}

INLINE bytes load_bytes(const void *x) { return load_two(x, (const char *)x + 32); }

INLINE bytes nibbles(const uint8_t *x) {
    __m256i both = _mm256_loadu_si256((const __m256i_u *)x), mask = _mm256_set1_epi8(15);
    return (bytes){_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)};
}

INLINE bytes add_fifth_bit(bytes x, const uint8_t *high, int bit) {
    __m256i both = _mm256_loadu_si256((const __m256i_u *)high), one = _mm256_set1_epi8(1);
    __m256i a = _mm256_and_si256(_mm256_srl_epi16(both, _mm_cvtsi32_si128(bit)), one);
    __m256i b = _mm256_and_si256(_mm256_srl_epi16(both, _mm_cvtsi32_si128(bit + 1)), one);
    return (bytes){_mm256_or_si256(x.low, _mm256_slli_epi16(a, 4)), _mm256_or_si256(x.high, _mm256_slli_epi16(b, 4))};
}

INLINE bytes six_bits(const uint8_t *low, const uint8_t *high, int shift) {
    __m256i both = _mm256_loadu_si256((const __m256i_u *)high), mask = _mm256_set1_epi8(15), top = _mm256_set1_epi8(48);
    __m128i count = _mm_cvtsi32_si128(shift);
    bytes x = load_bytes(low);
    both = _mm256_srl_epi16(both, count);
    return (bytes){_mm256_or_si256(_mm256_and_si256(_mm256_srl_epi16(x.low, count), mask),
                                   _mm256_and_si256(_mm256_slli_epi16(both, 4), top)),
                   _mm256_or_si256(_mm256_and_si256(_mm256_srl_epi16(x.high, count), mask),
                                   _mm256_and_si256(_mm256_slli_epi16(both, 2), top))};
}

INLINE scale_vector expand_scales(const int16_t *scale, int chunk) {
    long long four;
    memcpy(&four, scale + 4 * chunk, sizeof four);
    __m256i all = _mm256_set1_epi64x(four);
    return (scale_vector){
        _mm256_shuffle_epi8(all, _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
                                                    0x0302030203020302)),
        _mm256_shuffle_epi8(all, _mm256_setr_epi64x(0x0504050405040504, 0x0504050405040504, 0x0706070607060706,
                                                    0x0706070607060706))};
}

INLINE ints plus_dot(ints sum, bytes weight, bytes activation, scale_vector scale) {
    __m256i low = _mm256_maddubs_epi16(weight.low, activation.low);
    __m256i high = _mm256_maddubs_epi16(weight.high, activation.high);
    sum.part[0] += (int_vector)_mm256_madd_epi16(low, scale.low);
    sum.part[1] += (int_vector)_mm256_madd_epi16(high, scale.high);
    return sum;
}

INLINE ints signed_dot(bytes weight, bytes activation) {
    __m256i low = _mm256_maddubs_epi16(_mm256_abs_epi8(weight.low), _mm256_sign_epi8(activation.low, weight.low));
    __m256i high = _mm256_maddubs_epi16(_mm256_abs_epi8(weight.high), _mm256_sign_epi8(activation.high, weight.high));
    return (ints){{(int_vector)_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                   (int_vector)_mm256_madd_epi16(high, _mm256_set1_epi16(1))}};
}

#else

typedef struct { int8_t at[64]; } bytes;
typedef struct { int16_t at[4]; } scale_vector;

INLINE bytes load_two(const void *low, const void *high) {
    bytes y;
    memcpy(y.at, low, 32);
    memcpy(y.at + 32, high, 32);
    return y;
}

INLINE bytes load_bytes(const void *x) { return load_two(x, (const char *)x + 32); }

INLINE bytes nibbles(const uint8_t *x) {
    bytes y;
    for (int i = 0; i < 32; i++) {
        y.at[i] = x[i] & 15;
        y.at[32 + i] = x[i] >> 4;
    }
    return y;
}

INLINE bytes add_fifth_bit(bytes x, const uint8_t *high, int bit) {
    for (int i = 0; i < 32; i++) {
        x.at[i] |= (high[i] >> bit & 1) << 4;
        x.at[32 + i] |= (high[i] >> (bit + 1) & 1) << 4;
    }
    return x;
}

INLINE bytes six_bits(const uint8_t *low, const uint8_t *high, int shift) {
    bytes y;
    for (int i = 0; i < 32; i++) {
        y.at[i] = (low[i] >> shift & 15) | (high[i] >> shift & 3) << 4;
        y.at[32 + i] = (low[32 + i] >> shift & 15) | (high[i] >> (shift + 2) & 3) << 4;
    }
    return y;
}

INLINE scale_vector expand_scales(const int16_t *scale, int chunk) {
    scale_vector y;
    memcpy(y.at, scale + 4 * chunk, sizeof y.at);
    return y;
}

#ifdef __aarch64__
/* Sixteen products summed by fours: the lanes 4 i .. 4 i + 3. */
INLINE int32x4_t quarter_dot(const int8_t *x, const int8_t *y) {
    int8x16_t a = vld1q_s8(x), b = vld1q_s8(y);
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(vdupq_n_s32(0), a, b);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    return vpaddq_s32(low, high);
#endif
}
#else
INLINE int_vector quarter_dot(const int8_t *x, const int8_t *y) {
    int_vector sum;
    for (int i = 0; i < 4; i++)
        sum[i] = x[4 * i] * y[4 * i] + x[4 * i + 1] * y[4 * i + 1] + x[4 * i + 2] * y[4 * i + 2] +
                 x[4 * i + 3] * y[4 * i + 3];
    return sum;
}
#endif

INLINE ints plus_dot(ints sum, bytes weight, bytes activation, scale_vector scale) {
#define QUARTER(i) sum.part[i] += (int_vector)quarter_dot(weight.at + 16 * i, activation.at + 16 * i) * scale.at[i];
    FOR_PARTS(QUARTER)
#undef QUARTER
    return sum;
}

INLINE ints signed_dot(bytes weight, bytes activation) {
    ints y;
#define QUARTER(i) y.part[i] = (int_vector)quarter_dot(weight.at + 16 * i, activation.at + 16 * i);
    FOR_PARTS(QUARTER)
#undef QUARTER
    return y;
}

#endif
