#include <string.h>

#include "experts_state.h"
#include "math/vector_ops.h"

static int64_t chunk_of(int64_t total, int threads) {
    int64_t chunk = total / (threads * 8);
    return chunk < 8 ? 8 : chunk > 64 ? 64 : chunk;
}

/* rows [begin, end) of one part of an expert, for all its tokens: out[member][row] = row . input */
static void expert_rows(const fomoe_experts *e, const fomoe_expert_layer *l, int part, int i, int64_t begin,
                        int64_t end, const uint8_t *input, int64_t input_stride, int input_by_token, float *out,
                        int64_t out_stride, const float *bias, const fomoe_run *run, int thread) {
    float *expanded = run->scratch[thread];
    fomoe_matrix m = {.type = l->type[part],
                      .row_bytes = l->row_bytes[part],
                      .columns = part == FOMOE_DOWN ? e->shape.hidden : e->shape.columns,
                      .float_activations = e->shape.float_activations};
    if (bias) bias += (int64_t)e->plan.ids[i] * (part == FOMOE_DOWN ? e->shape.columns : e->shape.hidden);
    const uint8_t *data = e->slot[i] + l->part_offset[e->plan.ids[i] * FOMOE_PARTS + part];
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *row = data + r * m.row_bytes;
        if (m.float_activations) m.type->to_float(row, expanded, m.columns);
        for (int j = e->first[i]; j < e->first[i + 1]; j++) {
            int64_t member = e->members[j], source = input_by_token ? member / e->shape.used : member;
            float y = fomoe_row_dot(run, &m, row, input + source * input_stride, expanded);
            out[member * out_stride + r] = bias ? y + bias[r] : y;
        }
    }
}

static void gate_and_up(fomoe_experts *e, const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_expert_layer *l = &e->layer[step->as.experts.layer];
    const fomoe_rows *input = step->as.experts.input;
    int64_t hidden = e->shape.hidden, total = e->group_count * hidden, begin, end;
    while (fomoe_take_of(run, thread, &e->next_up, total, chunk_of(total, run->threads), &begin, &end))
        while (begin < end) {
            int g = begin / hidden;
            int64_t r = begin % hidden, stop = r + (end - begin) < hidden ? r + (end - begin) : hidden;
            expert_rows(e, l, FOMOE_GATE, e->group[g], r, stop, input[0].data, input[0].stride, 1, e->gate, hidden,
                        step->as.experts.bias[FOMOE_GATE], run, thread);
            expert_rows(e, l, FOMOE_UP, e->group[g], r, stop, input[1].data, input[1].stride, 1, e->up, hidden,
                        step->as.experts.bias[FOMOE_UP], run, thread);
            begin += stop - r;
        }
}

static void activations(fomoe_experts *e, const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_expert_layer *l = &e->layer[step->as.experts.layer];
    int type = e->shape.float_activations ? 0 : l->type[FOMOE_DOWN]->activation_type;
    int64_t hidden = e->shape.hidden, begin, end;
    while (fomoe_take_of(run, thread, &e->next_activation, e->group_count, 1, &begin, &end)) {
        int i = e->group[begin];
        for (int j = e->first[i]; j < e->first[i + 1]; j++) {
            int64_t member = e->members[j];
            float *y = type ? run->scratch[thread] : (float *)(e->activation + member * e->activation_bytes);
            if (step->as.experts.is_clamped)
                fomoe_clamped_swiglu(hidden, e->gate + member * hidden, e->up + member * hidden, y);
            else
                fomoe_silu_mul(hidden, e->gate + member * hidden, e->up + member * hidden, y);
            if (type)
                fomoe_type_of(run->kernels, type)->from_float(y, e->activation + member * e->activation_bytes, hidden);
        }
    }
}

static void down(fomoe_experts *e, const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_expert_layer *l = &e->layer[step->as.experts.layer];
    int64_t columns = e->shape.columns, total = e->group_count * columns, begin, end;
    while (fomoe_take_of(run, thread, &e->next_down, total, chunk_of(total, run->threads), &begin, &end))
        while (begin < end) {
            int g = begin / columns;
            int64_t r = begin % columns, stop = r + (end - begin) < columns ? r + (end - begin) : columns;
            expert_rows(e, l, FOMOE_DOWN, e->group[g], r, stop, e->activation, e->activation_bytes, 0, e->down, columns,
                        step->as.experts.bias[FOMOE_DOWN], run, thread);
            begin += stop - r;
        }
}

void fomoe_experts_compute_group(fomoe_experts *e, const fomoe_step *step, fomoe_run *run, int thread) {
    gate_and_up(e, step, run, thread);
    fomoe_team_barrier(run->team);
    activations(e, step, run, thread);
    fomoe_team_barrier(run->team);
    down(e, step, run, thread);
    fomoe_team_barrier(run->team);
}

/* Sums run in router order whatever the order of computation: the result must not depend on what was resident. */
void fomoe_step_combine(const fomoe_step *step, fomoe_run *run, int thread) {
    enum { BLOCK = 512 };
    const fomoe_experts *e = step->as.combine.experts;
    int columns = e->shape.columns, used = step->as.combine.used, blocks = (columns + BLOCK - 1) / BLOCK;
    const fomoe_rows *shared = &step->as.combine.shared, *gate = &step->as.combine.shared_gate;
    float sum[BLOCK];
    int64_t begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], (int64_t)run->tokens * blocks, 1, &begin, &end)) {
        int t = begin / blocks, first = begin % blocks * BLOCK, n = columns - first < BLOCK ? columns - first : BLOCK;
        const float *weights = fomoe_float_row(&step->as.combine.weights, t);
        memset(sum, 0, sizeof sum);
        for (int k = 0; k < used; k++)
            fomoe_axpy(n, weights[k], e->down + ((int64_t)t * used + k) * columns + first, sum);
        if (shared->data)
            fomoe_axpy(n, gate->data ? fomoe_sigmoid(fomoe_float_row(gate, t)[0]) : 1.0f,
                       fomoe_float_row(shared, t) + first, sum);
        fomoe_add(n, sum, fomoe_float_row(&step->as.combine.output, t) + first);
    }
}
