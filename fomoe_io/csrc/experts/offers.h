/* Reads of experts that nobody waits for yet: back-fill of picks that others stood in for, and lookahead.  Keeps track
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
    uint64_t bytes; /* of its reads */
    int32_t waiter; /* the number under which the step at work waits for it, or -1 */
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
/* A completion whose tag has FOMOE_OFFER_TAG.  With the last one of an expert that somebody waits for, *waiter is set,
 * the expert is settled and its error returned; else *waiter is -1. */
int fomoe_offers_completed(fomoe_offers *, const fomoe_completion *, int *waiter);
/* Wait for an expert whose read is under way, ahead of what nobody waits for. */
void fomoe_offers_join(fomoe_offers *, int layer, int32_t expert, int waiter);
/* What became of reads ahead of a layer, by its router's picks: experts it wanted, those of them whose reads had not
 * ended, and bytes of the reads that it did not want. */
typedef struct {
    uint64_t useful, late, wasted_bytes;
} fomoe_offers_verdict;

/* The router has picked; reads of those it did not want are dropped where they have not begun. */
fomoe_offers_verdict fomoe_offers_judge(fomoe_offers *, int layer, const int32_t *picks, int count);
/* Whether any of the layer has begun and is not settled. */
int fomoe_offers_has(const fomoe_offers *, int layer);
/* How many reads of a layer are under way; they go before others that nobody waits for from now on. */
int fomoe_offers_hurry(fomoe_offers *, int layer);
/* Experts of the layer whose reads have completed are resident from now on, or forgotten if their read failed. */
void fomoe_offers_settle(fomoe_offers *, int layer);

#endif
