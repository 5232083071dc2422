#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define INSTRUCTIONS fomoe_avx512
#define INSTRUCTIONS_NAME "avx512"
#define HAS_AVX512
#define VECTOR_BYTES 64
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int empty_on_this_architecture;
#endif
