/* Waiting for a device, with an end: a queue that is shared, a copy whose completion is lost or a hang would hold the
 * process for ever, and an interrupt would not be seen. */
#ifndef FOMOE_PATIENCE_H
#define FOMOE_PATIENCE_H

#include "read/watch.h"

enum { FOMOE_STUCK = -2 }; /* stands where a device call's code would */

typedef struct {
    uint64_t limit_ns;          /* the longest wait without progress */
    uint64_t interrupted_limit_ns; /* the same once the user has interrupted */
    fomoe_watch *watch;            /* of the work that waits; NULL: nobody ends it */
    int is_interrupted;            /* it was ended; who begins the next work takes that back */
} fomoe_patience;

/* One wait; begins as zeros, and again with every progress. */
typedef struct {
    uint64_t since_ns;
    uint32_t rounds;
} fomoe_wait;

/* After every look that found nothing: 1 = look again, 0 = the limit has passed. */
int fomoe_look_again(fomoe_patience *, fomoe_wait *);

#endif
