/* Memory that is taken piece by piece when something is made, and given back at once: who takes asks at the end whether
 * all was there. */
#ifndef FOMOE_OWNED_H
#define FOMOE_OWNED_H

#include <assert.h>
#include <stdlib.h>

enum { FOMOE_MOST_OWNED = 48 };

typedef struct {
    void *block[FOMOE_MOST_OWNED];
    int count;
    int is_incomplete; /* memory has run out */
} fomoe_owned;

/* Zeroed memory for count things of this size (none: still an address), NULL when it has run out. */
static inline void *fomoe_own(fomoe_owned *o, size_t count, size_t bytes) {
    assert(o->count < FOMOE_MOST_OWNED);
    void *block = calloc(count ? count : 1, bytes);
    if (block)
        o->block[o->count++] = block;
    else
        o->is_incomplete = 1;
    return block;
}

static inline void fomoe_give_back(fomoe_owned *o) {
    while (o->count) free(o->block[--o->count]);
}

#endif
