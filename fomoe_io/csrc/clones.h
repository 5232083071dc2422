/* Functions compiled several times, for the widest vectors that the processor has.
 * arch= names, not features: gcc 12 refuses avx512bw there, and vendor names fall back to default on AMD. */
#ifndef FOMOE_CLONES_H
#define FOMOE_CLONES_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#endif
