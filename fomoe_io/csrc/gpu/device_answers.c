#include <string.h>

#include "device_experts_state.h"

enum { HAS_INPUTS, IS_WHOLE }; /* kernels/experts.h, struct answer: words of all pairs, one kind after the other */

/* A device's word of pair k comes true: now, or when this ticket of the copies up is done.  The device is current. */
static void signal(fomoe_device_experts *e, int device, const fomoe_device_words *words, int k, int kind, int is_done,
                   uint64_t ticket) {
    size_t offset = e->used * sizeof(uint64_t) + ((size_t)kind * e->used + k) * sizeof(uint32_t);
    fomoe_lane *up = &e->copies.lane[FOMOE_LANE_UP];
    if (is_done) {
        __atomic_store_n((uint32_t *)(words->answer + offset), e->run, __ATOMIC_RELEASE);
        return;
    }
    if (e->answers_by_stream) {
        void *word = words->answer_on_device + offset;
        fomoe_device_check(&e->copies, e->copies.calls.write_value(up->stream[device], word, e->run, 0),
                           "hipStreamWriteValue32");
        return;
    }
    assert(e->signal_count < 2 * e->used * e->copies.devices);
    e->signals[e->signal_count++] = (fomoe_signal){(uint32_t *)(words->answer + offset), ticket};
}

static void say(fomoe_device_experts *e, int layer, int i, int kind) {
    const fomoe_buffer *buffer = e->wanted[i].record;
    uint64_t where = (uint64_t)(uintptr_t)buffer->address, ticket = buffer->touched[FOMOE_LANE_UP];
    int is_done =
        fomoe_lane_has_done(&e->copies, FOMOE_LANE_UP, ticket); /* which asks all devices, one after another */
    for (int r = 0; r < e->copies.devices; r++) {
        const fomoe_device_words *words = &e->layer[layer].words[r];
        uint64_t *record = (uint64_t *)words->answer;
        fomoe_use_device(&e->copies, r);
        for (int k = 0; k < e->used; k++) {
            if (e->place[k] != i) continue;
            if (kind == HAS_INPUTS) __atomic_store_n(&record[k], where + e->copies.distance[r], __ATOMIC_RELEASE);
            signal(e, r, words, k, kind, is_done, ticket);
        }
    }
    e->wanted[i].said++;
}

void fomoe_device_answer(fomoe_device_experts *e, int layer) {
    assert(layer == e->open_layer);
    for (int i = 0; i < e->placed && e->is_answering && !e->error && !e->copies.error; i++) {
        const fomoe_wanted *w = &e->wanted[i];
        int is_sent = w->progress == FOMOE_SENT;
        int has_inputs = w->progress == FOMOE_READING && w->record && !w->inputs_left && !w->is_spoilt;
        if (w->at.source == FOMOE_TIER_VRAM || w->is_in_place || (w->record && w->record->claims)) continue;
        if (w->said == HAS_INPUTS && (is_sent || has_inputs)) say(e, layer, i, HAS_INPUTS);
        if (w->said == IS_WHOLE && is_sent) say(e, layer, i, IS_WHOLE);
    }
    fomoe_device_pass_on(e);
}

void fomoe_device_pass_on(fomoe_device_experts *e) {
    int done = 0;
    while (done < e->signal_count && fomoe_lane_has_done(&e->copies, FOMOE_LANE_UP, e->signals[done].ticket))
        __atomic_store_n(e->signals[done++].word, e->run, __ATOMIC_RELEASE);
    e->signal_count -= done;
    memmove(e->signals, e->signals + done, e->signal_count * sizeof *e->signals);
}
