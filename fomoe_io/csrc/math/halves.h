/* float16 and bfloat16, one at a time and in lanes. */

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float bf16_float(uint16_t b) { return bits_float((uint32_t)b << 16); }

/* round to nearest even; a NaN stays one */
INLINE uint16_t float_bf16(float f) {
    uint32_t bits = float_bits(f);
    return isnan(f) ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* The exponent is moved by 112; subnormals are counted in units of 2^-24. */
INLINE float half_float(half h) {
#if VECTOR_BYTES > 16
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return bits_float(sign | (magnitude + 0x70000000)); /* infinite or not a number */
    if (magnitude >= 0x00800000) return bits_float(sign | (magnitude + 0x38000000));
    float tiny = (float)(h & 0x3ff) * 0x1p-24f;
    return sign ? -tiny : tiny;
#endif
}

/* Round to nearest even.  For subnormals, adding 0.5 makes 2^-24 the unit in the last place. */
INLINE half float_half(float f) {
    uint32_t bits = float_bits(f), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff);
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) return sign | (half)(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
    magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
    return sign | magnitude >> 13;
}

INLINE floats load_halves(const half *x) {
#if VECTOR_BYTES == 64
    return (floats){{(float_vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)x))}};
#elif VECTOR_BYTES == 32
    return (floats){{(float_vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)x)),
                     (float_vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)(x + 8)))}};
#elif defined(__aarch64__)
    float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(x)), high = vreinterpretq_f16_u16(vld1q_u16(x + 8));
    return (floats){{(float_vector)vcvt_f32_f16(vget_low_f16(low)), (float_vector)vcvt_high_f32_f16(low),
                     (float_vector)vcvt_f32_f16(vget_low_f16(high)), (float_vector)vcvt_high_f32_f16(high)}};
#else
    float y[LANES];
    for (int i = 0; i < LANES; i++) y[i] = half_float(x[i]);
    return load(y);
#endif
}

INLINE void store_halves(half *y, floats x) {
#if VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i_u *)y, _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif VECTOR_BYTES == 32
    _mm_storeu_si128((__m128i_u *)y, _mm256_cvtps_ph((__m256)x.part[0], _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i_u *)(y + 8), _mm256_cvtps_ph((__m256)x.part[1], _MM_FROUND_TO_NEAREST_INT));
#else
    float z[LANES];
    store(z, x);
    for (int i = 0; i < LANES; i++) y[i] = float_half(z[i]);
#endif
}

INLINE floats load_bf16(const uint16_t *x) {
    typedef uint16_t short_vector __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef short_vector loose_shorts __attribute__((aligned(2), may_alias));
    typedef uint32_t word_vector __attribute__((vector_size(VECTOR_BYTES)));
    floats y;
#define LOAD(i)                                                                                                    \
    y.part[i] = (float_vector)(__builtin_convertvector(*(const loose_shorts *)(x + i * PART), word_vector) << 16);
    FOR_PARTS(LOAD)
#undef LOAD
    return y;
}
