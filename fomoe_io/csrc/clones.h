/* Functions compiled several times, for the widest vectors that the processor has.
 * arch= names, not features: gcc 12 refuses avx512bw there, and vendor names fall back to default on AMD. */
#ifndef FOMOE_CLONES_H
#define FOMOE_CLONES_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* Sixteen floats at a time, added lane by lane and the lanes in order at the end: one sum, whatever the vector width
 * of the clone.  A vector type, because gcc 12 unrolls loops over a local array before it would vectorize them. */
#include <string.h>
enum { LANES = 16 };
typedef float fomoe_lanes __attribute__((vector_size(LANES * sizeof(float))));

static inline __attribute__((always_inline)) void load_lanes(fomoe_lanes *v, const float *x) { memcpy(v, x, sizeof *v); }

static inline __attribute__((always_inline)) float sum_lanes(const fomoe_lanes *v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += (*v)[i];
    return sum;
}

#endif
