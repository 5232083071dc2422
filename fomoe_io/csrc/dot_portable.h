/* The kernels of this package's own: no library, no intrinsics, vectorized by the compiler. */
#ifndef FOMOE_DOT_PORTABLE_H
#define FOMOE_DOT_PORTABLE_H

#include "dot.h"

extern const fomoe_type fomoe_portable_types[];
extern const int fomoe_portable_count;

#endif
