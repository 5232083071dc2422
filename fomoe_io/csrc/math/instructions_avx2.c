#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define INSTRUCTIONS fomoe_avx2
#define INSTRUCTIONS_NAME "avx2"
#define HAS_AVX2
#define VECTOR_BYTES 32
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int empty_on_this_architecture;
#endif
