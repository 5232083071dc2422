/* What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64, plain C elsewhere. */
#define INSTRUCTIONS fomoe_baseline
#define INSTRUCTIONS_NAME "baseline"
#define VECTOR_BYTES 16
#include "all_kernels.h"
