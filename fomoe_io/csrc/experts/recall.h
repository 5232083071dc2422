/* How often the next layer's router picks what was guessed of it. */
#ifndef FOMOE_RECALL_H
#define FOMOE_RECALL_H

#include <stdint.h>

/* Picks of a layer whose guesses were there before, and those among them that had been guessed. */
typedef struct {
    uint64_t picks, guessed;
} fomoe_recall;

static inline void fomoe_recall_count(fomoe_recall *r, const int32_t *picks, int used, const int32_t *guesses,
                                      int ranks) {
    r->picks += used;
    for (int k = 0; k < used; k++)
        for (int j = 0; j < ranks; j++) r->guessed += picks[k] == guesses[j];
}

#endif
