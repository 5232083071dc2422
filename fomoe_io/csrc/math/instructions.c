#include "instructions.h"

#include <string.h>

static const fomoe_instructions *chosen = &fomoe_baseline;

static int has(const fomoe_instructions *set) {
#ifdef __x86_64__
    if (set == &fomoe_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd") && has(&fomoe_avx2);
    /* Every processor with AVX2 and FMA has the rest of x86-64-v3: F16C, BMI, LZCNT, MOVBE. */
    if (set == &fomoe_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set == &fomoe_baseline;
}

static const fomoe_instructions *const sets[] = {
    &fomoe_baseline,
#ifdef __x86_64__
    &fomoe_avx2,
    &fomoe_avx512,
#endif
};
enum { SETS = sizeof sets / sizeof *sets };

__attribute__((constructor)) static void choose(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
    for (int i = 0; i < SETS; i++)
        if (has(sets[i])) chosen = sets[i];
}

const fomoe_instructions *fomoe_chosen_instructions(void) { return chosen; }

int fomoe_use_instructions(const char *name) {
    for (int i = 0; i < SETS; i++)
        if (!strcmp(sets[i]->name, name) && has(sets[i])) {
            chosen = sets[i];
            return 0;
        }
    return -1;
}
