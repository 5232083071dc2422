#include "program.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "math/attention.h"
#include "experts/routing.h"
#include "math/vector_ops.h"

struct fomoe_program {
    fomoe_team *team;
    const fomoe_kernels *kernels;
    fomoe_step *steps;
    int count, capacity;
    float **scratch;
    _Atomic int64_t *next;
    fomoe_experts *experts; /* of its steps, or NULL */
};

fomoe_program *fomoe_program_new(fomoe_team *team, const fomoe_kernels *kernels, int64_t scratch_floats) {
    fomoe_program *program = calloc(1, sizeof *program);
    if (!program) return NULL;
    int threads = fomoe_team_size(team);
    program->team = team;
    program->kernels = kernels;
    program->scratch = calloc(threads, sizeof *program->scratch);
    if (!program->scratch) goto fail;
    for (int i = 0; i < threads; i++) {
        /* a cache line more than asked for, so that two threads' areas never share one */
        size_t bytes = ((size_t)scratch_floats * sizeof(float) + 127) / 64 * 64;
        program->scratch[i] = aligned_alloc(64, bytes);
        if (!program->scratch[i]) goto fail;
    }
    return program;
fail:
    fomoe_program_free(program);
    return NULL;
}

void fomoe_program_free(fomoe_program *program) {
    if (!program) return;
    if (program->scratch)
        for (int i = 0; i < fomoe_team_size(program->team); i++) free(program->scratch[i]);
    free(program->scratch);
    free(program->steps);
    free((void *)program->next);
    free(program);
}

int fomoe_program_add(fomoe_program *program, const fomoe_step *step) {
    if (program->count == program->capacity) {
        int capacity = program->capacity ? 2 * program->capacity : 64;
        fomoe_step *steps = realloc(program->steps, capacity * sizeof *steps);
        if (!steps) return -1;
        program->steps = steps;
        _Atomic int64_t *next = realloc((void *)program->next, capacity * sizeof *next);
        if (!next) return -1;
        program->next = next;
        program->capacity = capacity;
    }
    program->steps[program->count++] = *step;
    if (step->execute == fomoe_step_experts_begin) program->experts = step->as.experts.experts;
    return 0;
}

int fomoe_program_steps(const fomoe_program *program) { return program->count; }

typedef struct {
    fomoe_program *program;
    fomoe_run *run;
} replay_argument;

static void replay(void *argument, int thread) {
    fomoe_program *program = ((replay_argument *)argument)->program;
    fomoe_run run = *((replay_argument *)argument)->run; /* a copy: run.step is this thread's own */
    for (int i = 0; i < program->count; i++) {
        run.step = i;
        program->steps[i].execute(&program->steps[i], &run, thread);
        if (!thread) {
            if (run.watch) run.watch->done = i + 1, run.watch->steps = program->count;
            fomoe_ask(&run);
        }
        fomoe_team_barrier(program->team);
        int64_t failure = atomic_load_explicit(run.failure, memory_order_relaxed);
        if (failure && (failure >> 32) - 1 <= i) break;
    }
}

int fomoe_program_run(fomoe_program *program, fomoe_run *run) {
    run->team = program->team;
    run->kernels = program->kernels;
    run->threads = fomoe_team_size(program->team);
    run->scratch = program->scratch;
    run->next = program->next;
    _Atomic int64_t failure = 0;
    run->failure = &failure;
    for (int i = 0; i < program->count; i++) atomic_store_explicit(&program->next[i], 0, memory_order_relaxed);
    replay_argument argument = {program, run};
    fomoe_team_run(program->team, replay, &argument);
    if (atomic_load(&failure) && program->experts) fomoe_experts_abandon(program->experts);
    return -(int)(uint32_t)atomic_load(&failure);
}

/* ---- embedding, norms, conversion ---- */

void fomoe_step_embed(const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_matrix *m = &step->as.embed.matrix;
    uint8_t *row = (uint8_t *)run->scratch[thread];
    for (int t = thread; t < run->tokens; t += run->threads) {
        const uint8_t *source = m->data + run->ids[t] * m->row_bytes;
        if (step->as.embed.file >= 0) {
            int64_t offset = step->as.embed.offset + run->ids[t] * m->row_bytes, got = 0;
            while (got < m->row_bytes) {
                ssize_t n = pread(step->as.embed.file, row + got, m->row_bytes - got, offset + got);
                if (n < 0 && errno == EINTR) continue;
                if (n <= 0) { /* the end of the file here means that it was cut since it was opened */
                    fomoe_fail(run, n < 0 ? -errno : -ENODATA);
                    return;
                }
                got += n;
            }
            source = row;
        }
        m->type->to_float(source, fomoe_float_row(&step->as.embed.output, t), m->columns);
    }
}

static void convert_row(const fomoe_run *run, const float *x, const fomoe_rows *output, int64_t i) {
    if (output->type == 0)
        memcpy(fomoe_row(output, i), x, output->columns * sizeof(float));
    else
        fomoe_type_of(run->kernels, output->type)->from_float(x, fomoe_row(output, i), output->columns);
}

void fomoe_step_norm(const fomoe_step *step, fomoe_run *run, int thread) {
    int rows = step->as.norm.of_outputs ? run->outputs : run->tokens;
    const fomoe_rows *input = &step->as.norm.input;
    float *y = run->scratch[thread];
    for (int i = thread; i < rows; i += run->threads) {
        int row = step->as.norm.of_outputs ? run->output_rows[i] : i;
        fomoe_rms_norm(input->columns, fomoe_float_row(input, row), step->as.norm.weight, step->as.norm.epsilon, y);
        for (int o = 0; o < step->as.norm.count; o++) convert_row(run, y, &step->as.norm.outputs[o], i);
        if (step->as.norm.of_outputs && run->record.final_norm)
            memcpy(run->record.final_norm + (int64_t)i * input->columns, y, input->columns * sizeof(float));
    }
}

void fomoe_step_quantize(const fomoe_step *step, fomoe_run *run, int thread) {
    for (int t = thread; t < run->tokens; t += run->threads)
        convert_row(run, fomoe_float_row(&step->as.quantize.input, t), &step->as.quantize.output, t);
}

void fomoe_step_ungroup(const fomoe_step *step, fomoe_run *run, int thread) {
    int groups = step->as.ungroup.groups, length = step->as.ungroup.length;
    int stride = step->as.ungroup.input.columns / groups;
    for (int t = thread; t < run->tokens; t += run->threads) {
        const float *x = fomoe_float_row(&step->as.ungroup.input, t) + step->as.ungroup.first;
        float *y = fomoe_float_row(&step->as.ungroup.output, t) + step->as.ungroup.at;
        for (int g = 0; g < groups; g++) memcpy(y + g * length, x + g * stride, length * sizeof *y);
    }
}

void fomoe_step_add_bias(const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_rows *rows = &step->as.add_bias.rows;
    for (int t = thread; t < run->tokens; t += run->threads)
        fomoe_add(rows->columns, step->as.add_bias.bias, fomoe_float_row(rows, t));
}

void fomoe_step_silu_mul(const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_rows *gate = &step->as.silu_mul.gate, *up = &step->as.silu_mul.up;
    float *y = run->scratch[thread];
    for (int t = thread; t < run->tokens; t += run->threads) {
        fomoe_silu_mul(gate->columns, fomoe_float_row(gate, t), fomoe_float_row(up, t), y);
        convert_row(run, y, &step->as.silu_mul.output, t);
    }
}

/* ---- products ---- */

static void multiply_rows(const fomoe_product *part, fomoe_run *run, int thread, int64_t begin, int64_t end, int count,
                          float *logits) {
    const fomoe_matrix *m = &part->matrix;
    float *expanded = run->scratch[thread];
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *row = m->data + r * m->row_bytes;
        if (m->float_activations) m->type->to_float(row, expanded, m->columns);
        for (int t = 0; t < count; t++) {
            float y = fomoe_row_dot(run, m, row, fomoe_row(&part->input, t), expanded);
            float *out = logits ? logits + (int64_t)t * m->rows + r : fomoe_float_row(&part->output, t) + r;
            *out = part->add ? *out + y : y;
        }
    }
}

void fomoe_step_mat_mul(const fomoe_step *step, fomoe_run *run, int thread) {
    int parts = step->as.mat_mul.count;
    int count = step->as.mat_mul.of_outputs ? run->outputs : run->tokens;
    float *logits = step->as.mat_mul.to_logits ? run->logits : NULL;
    int64_t total = 0, begin, end;
    for (int p = 0; p < parts; p++) total += step->as.mat_mul.parts[p].matrix.rows;
    /* About eight turns a thread even out a busy neighbour; 8 rows fill an output cache line's half. */
    int64_t chunk = total / (run->threads * 8);
    chunk = chunk < 8 ? 8 : chunk > 64 ? 64 : chunk;
    while (fomoe_take_of(run, thread, &run->next[run->step], total, chunk, &begin, &end)) {
        int64_t first = 0;
        for (int p = 0; p < parts && begin < end; p++) {
            const fomoe_product *part = &step->as.mat_mul.parts[p];
            int64_t stop = first + part->matrix.rows < end ? first + part->matrix.rows : end;
            if (begin < stop) {
                multiply_rows(part, run, thread, begin - first, stop - first, count, logits);
                begin = stop;
            }
            first += part->matrix.rows;
        }
    }
}

/* ---- gated delta rule ---- */

void fomoe_step_conv(const fomoe_step *step, fomoe_run *run, int thread) {
    int channels = step->as.conv.input.columns, taps = step->as.conv.taps;
    int64_t begin, end;
    /* 512 channels: work for about a microsecond */
    while (fomoe_take_of(run, thread, &run->next[run->step], channels, 512, &begin, &end))
        for (int t = 0; t < run->tokens; t++)
            fomoe_conv_step(end - begin, taps, step->as.conv.weight + begin * taps,
                            fomoe_float_row(&step->as.conv.input, t) + begin,
                            (float *)(run->states[t] + step->as.conv.state_offset) + begin, channels,
                            fomoe_float_row(&step->as.conv.output, t) + begin);
}

static void delta_head(const fomoe_step *step, fomoe_run *run, int thread, int head) {
    int n = step->as.delta.head_columns, key_heads = step->as.delta.key_heads, value_heads = step->as.delta.value_heads;
    int key_head = step->as.delta.grouped ? head / (value_heads / key_heads) : head % key_heads;
    float epsilon = step->as.delta.epsilon;
    float *q = run->scratch[thread], *k = q + n;
    for (int t = 0; t < run->tokens; t++) {
        const float *qkv = fomoe_float_row(&step->as.delta.qkv, t);
        float *out = fomoe_float_row(&step->as.delta.output, t) + head * n;
        fomoe_l2_norm(n, qkv + key_head * n, epsilon, 1.0f / sqrtf((float)n), q);
        fomoe_l2_norm(n, qkv + (key_heads + key_head) * n, epsilon, 1.0f, k);
        float beta = fomoe_sigmoid(fomoe_float_row(&step->as.delta.beta, t)[head]);
        float rate = fomoe_softplus(fomoe_float_row(&step->as.delta.alpha, t)[head] + step->as.delta.decay_bias[head]);
        float decay = expf(rate * step->as.delta.decay_rate[head]);
        float *state = (float *)(run->states[t] + step->as.delta.state_offset) + (int64_t)head * n * n;
        fomoe_delta_step(n, n, q, k, qkv + (2 * key_heads + head) * n, beta, decay, state, out);
        fomoe_rms_norm(n, out, step->as.delta.norm_weight, epsilon, out);
        fomoe_silu_mul(n, fomoe_float_row(&step->as.delta.gate, t) + head * n, out, out);
    }
}

void fomoe_step_delta(const fomoe_step *step, fomoe_run *run, int thread) {
    int64_t begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], step->as.delta.value_heads, 1, &begin, &end))
        delta_head(step, run, thread, begin);
}

/* ---- attention ---- */

void fomoe_step_rope_table(const fomoe_step *step, fomoe_run *run, int thread) {
    for (int t = thread; t < run->tokens; t += run->threads)
        fomoe_rope_table(step->as.rope_table.pairs, step->as.rope_table.frequency, step->as.rope_table.magnitude,
                         run->positions[t], fomoe_float_row(&step->as.rope_table.output, t));
}

/* Keys and values lie [kv head][position][column], so that a head's history is one stream. */
static uint8_t *cache_row(uint8_t *state, fomoe_kv_type type, int64_t offset, int64_t context, int columns, int head,
                          int64_t position) {
    return state + offset + (head * context + position) * columns * (type == FOMOE_KV_F16 ? 2 : 4);
}

void fomoe_step_kv(const fomoe_step *step, fomoe_run *run, int thread) {
    int heads = step->as.kv.heads, kv_heads = step->as.kv.kv_heads, n = step->as.kv.head_columns;
    int rotated = step->as.kv.rotated, per_token = heads + kv_heads;
    int64_t begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], (int64_t)run->tokens * per_token, 4, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            int t = i / per_token, head = i % per_token;
            const float *table = fomoe_float_row(&step->as.kv.table, t);
            if (head < heads) {
                int stride = step->as.kv.query_stride; /* a gate may follow the query; the bias is of both */
                float *q = fomoe_float_row(&step->as.kv.query, t) + (int64_t)head * stride;
                if (step->as.kv.query_bias) fomoe_add(stride, step->as.kv.query_bias + (int64_t)head * stride, q);
                if (step->as.kv.query_norm) fomoe_rms_norm(n, q, step->as.kv.query_norm, step->as.kv.epsilon, q);
                fomoe_rope_neox(rotated, table, q);
                continue;
            }
            head -= heads;
            float *k = fomoe_float_row(&step->as.kv.key, t) + head * n;
            float *v = fomoe_float_row(&step->as.kv.value, t) + head * n;
            int64_t position = run->positions[t], context = step->as.kv.context;
            fomoe_kv_type type = step->as.kv.type;
            if (step->as.kv.key_bias) fomoe_add(n, step->as.kv.key_bias + head * n, k);
            if (step->as.kv.value_bias) fomoe_add(n, step->as.kv.value_bias + head * n, v);
            if (step->as.kv.key_norm) fomoe_rms_norm(n, k, step->as.kv.key_norm, step->as.kv.epsilon, k);
            fomoe_rope_neox(rotated, table, k);
            uint8_t *state = run->states[t];
            int64_t ring = step->as.kv.ring, place = ring ? position % ring : position;
            for (; place < context; place += ring) {
                fomoe_to_kv(type, n, k, cache_row(state, type, step->as.kv.key_offset, context, n, head, place));
                fomoe_to_kv(type, n, v, cache_row(state, type, step->as.kv.value_offset, context, n, head, place));
                if (!ring) break;
            }
        }
    }
}

void fomoe_step_attention(const fomoe_step *step, fomoe_run *run, int thread) {
    int heads = step->as.attention.heads, n = step->as.attention.head_columns;
    int group = heads / step->as.attention.kv_heads, v = step->as.attention.value_columns;
    int64_t context = step->as.attention.context, begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], (int64_t)run->tokens * heads, 1, &begin, &end)) {
        int t = begin / heads, head = begin % heads;
        const float *q =
            fomoe_float_row(&step->as.attention.query, t) + (int64_t)head * step->as.attention.query_stride;
        float *out = fomoe_float_row(&step->as.attention.output, t) + (int64_t)head * v;
        int64_t length = run->positions[t] + 1, window = step->as.attention.window;
        int64_t first = window && length > window ? length - window : 0;
        int64_t place = step->as.attention.ring ? first % step->as.attention.ring : first;
        fomoe_kv_type type = step->as.attention.type;
        uint8_t *state = run->states[t];
        fomoe_attention_head(type, n, v, length - first, step->as.attention.scale, q,
                             cache_row(state, type, step->as.attention.key_offset, context, n, head / group, place), n,
                             cache_row(state, type, step->as.attention.value_offset, context, n, head / group, place),
                             n, run->scratch[thread], step->as.attention.sinks ? step->as.attention.sinks + head : NULL,
                             out);
        if (step->as.attention.gated) fomoe_sigmoid_mul(n, q + n, out, out);
    }
}

/* ---- routing (the experts themselves are in experts.c) ---- */

void fomoe_step_route(const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_router *router = &step->as.route.router;
    int n = router->experts, k = router->used, layer = step->as.route.layer;
    for (int t = thread; t < run->tokens; t += run->threads) {
        float *logits = fomoe_float_row(&step->as.route.logits, t);
        int32_t *ids = (int32_t *)fomoe_row(&step->as.route.ids, t);
        float *weights = fomoe_float_row(&step->as.route.weights, t);
        if (step->as.route.logit_bias) fomoe_add(n, step->as.route.logit_bias, logits);
        fomoe_route_by(router, logits, run->scratch[thread], ids, weights);
        int64_t row = (int64_t)layer * run->tokens + t;
        if (run->record.experts) memcpy(run->record.experts + row * k, ids, k * sizeof *ids);
        if (run->record.weights) memcpy(run->record.weights + row * k, weights, k * sizeof *weights);
        if (run->record.router_logits) memcpy(run->record.router_logits + row * n, logits, n * sizeof *logits);
        if (run->trace) fomoe_trace_picks(run->trace, t, ids, weights);
    }
}

void fomoe_step_layer_end(const fomoe_step *step, fomoe_run *run, int thread) {
    if (!run->record.layer_output) return;
    const fomoe_rows *input = &step->as.layer_end.input;
    for (int t = thread; t < run->tokens; t += run->threads)
        memcpy(run->record.layer_output + ((int64_t)step->as.layer_end.layer * run->tokens + t) * input->columns,
               fomoe_row(input, t), input->columns * sizeof(float));
}
