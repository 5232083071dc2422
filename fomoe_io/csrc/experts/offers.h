/* Reads of experts that nobody waits for yet: back-fill of picks that others stood in for.  Keeps track
 * of what is under way; slots come from the residency (offer, arrived, drop), bytes through the engine's reader, whose
 * completions the engine passes on.  One thread calls it; nothing is allocated after creation. */
#ifndef FOMOE_OFFERS_H
#define FOMOE_OFFERS_H

#include <stdint.h>

#include "read/reader.h"
#include "residency.h"

enum { FOMOE_MOST_OFFERS = 64, FOMOE_OFFER_READS = 4 };

/* Tags of these reads; the others are the caller's own. */
#define FOMOE_OFFER_TAG ((uint64_t)1 << 40)

typedef struct {
    int32_t layer, expert; /* layer -1: unused */
    int32_t reads, left;   /* in all, and not completed */
    int32_t error;
} fomoe_offer;

typedef struct {
    fomoe_residency *residency;
    fomoe_reader *reader;
    fomoe_offer offer[FOMOE_MOST_OFFERS];
} fomoe_offers;

void fomoe_offers_start(fomoe_offers *, fomoe_residency *, fomoe_reader *);
/* Whether another one can be begun. */
int fomoe_offers_room(const fomoe_offers *);
int fomoe_offers_under_way(const fomoe_offers *);
/* Begin the reads of an expert that the residency has given a slot; tags and priority are filled in. */
void fomoe_offers_begin(fomoe_offers *, int layer, int32_t expert, fomoe_read *reads, int count);
/* A completion whose tag has FOMOE_OFFER_TAG. */
void fomoe_offers_completed(fomoe_offers *, const fomoe_completion *);
/* Whether any of the layer has begun and is not settled. */
int fomoe_offers_has(const fomoe_offers *, int layer);
/* How many reads of a layer are under way; they go before others that nobody waits for from now on. */
int fomoe_offers_hurry(fomoe_offers *, int layer);
/* Experts of the layer whose reads have completed are resident from now on, or forgotten if their read failed. */
void fomoe_offers_settle(fomoe_offers *, int layer);

#endif
