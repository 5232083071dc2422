#include "offers.h"

#include <assert.h>

void fomoe_offers_start(fomoe_offers *o, fomoe_residency *residency, fomoe_reader *reader) {
    o->residency = residency;
    o->reader = reader;
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++) o->offer[i] = (fomoe_offer){.layer = -1};
}

static int unused(const fomoe_offers *o) {
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++)
        if (o->offer[i].layer < 0) return i;
    return -1;
}

int fomoe_offers_under_way(const fomoe_offers *o) {
    int count = 0;
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++) count += o->offer[i].layer >= 0 && o->offer[i].left > 0;
    return count;
}

int fomoe_offers_has(const fomoe_offers *o, int layer) {
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++)
        if (o->offer[i].layer == layer) return 1;
    return 0;
}

int fomoe_offers_room(const fomoe_offers *o) { return unused(o) >= 0; }

static uint64_t tag_of(int offer, int read) { return FOMOE_OFFER_TAG | ((uint64_t)offer * FOMOE_OFFER_READS + read); }

void fomoe_offers_begin(fomoe_offers *o, int layer, int32_t expert, fomoe_read *reads, int count) {
    int i = unused(o);
    assert(i >= 0 && count > 0 && count <= FOMOE_OFFER_READS);
    o->offer[i] = (fomoe_offer){.layer = layer, .expert = expert, .reads = count, .left = count};
    for (int r = 0; r < count; r++) {
        reads[r].tag = tag_of(i, r);
        reads[r].priority = 1;
    }
    int error = o->reader->submit(o->reader->self, reads, count);
    if (error) { /* none was accepted: whoever wants the expert reads it himself, and reports what is wrong */
        o->offer[i].left = 0;
        o->offer[i].error = error;
    }
}

static void settle(fomoe_offers *o, fomoe_offer *offer) {
    assert(offer->layer >= 0 && !offer->left);
    if (offer->error)
        fomoe_residency_drop(o->residency, offer->layer, offer->expert);
    else
        fomoe_residency_arrived(o->residency, offer->layer, offer->expert);
    offer->layer = -1;
}

void fomoe_offers_completed(fomoe_offers *o, const fomoe_completion *done) {
    fomoe_offer *offer = &o->offer[(done->tag & ~FOMOE_OFFER_TAG) / FOMOE_OFFER_READS];
    assert(done->tag & FOMOE_OFFER_TAG && offer->layer >= 0 && offer->left > 0);
    offer->left--;
    if (done->error) offer->error = done->error;
}

static void promote(fomoe_offers *o, int i) {
    for (int r = 0; r < o->offer[i].reads; r++) o->reader->promote(o->reader->self, tag_of(i, r));
}

int fomoe_offers_hurry(fomoe_offers *o, int layer) {
    int left = 0;
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++) {
        if (o->offer[i].layer != layer || !o->offer[i].left) continue;
        left += o->offer[i].left;
        promote(o, i);
    }
    return left;
}

void fomoe_offers_settle(fomoe_offers *o, int layer) {
    for (int i = 0; i < FOMOE_MOST_OFFERS; i++)
        if (o->offer[i].layer == layer && !o->offer[i].left) settle(o, &o->offer[i]);
}
