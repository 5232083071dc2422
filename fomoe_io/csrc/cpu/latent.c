/* Attention over latents (deepseek2's MLA): the keys and values of all heads are one short row a position, and each
 * head's matrices are multiplied with its query and with its sum instead. */
#include <string.h>

#include "math/attention.h"
#include "program.h"

/* Neighbouring columns are a pair; what they become stands half a row apart. */
static void rope_adjacent(int rotated, const float *cos_sin, const float *x, float *y) {
    int half = rotated / 2;
    for (int j = 0; j < half; j++) {
        float c = cos_sin[2 * j], s = cos_sin[2 * j + 1], a = x[2 * j], b = x[2 * j + 1];
        y[j] = a * c - b * s;
        y[j + half] = a * s + b * c;
    }
}

void fomoe_step_latent(const fomoe_step *step, fomoe_run *run, int thread) {
    int heads = step->as.latent.heads, rotated = step->as.latent.rotated, latent = step->as.latent.latent.columns;
    int n = rotated + latent, query_stride = step->as.latent.query.columns / heads, per_token = heads + 1;
    int64_t begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], (int64_t)run->tokens * per_token, 4, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            int t = i / per_token, head = i % per_token;
            const float *table = fomoe_float_row(&step->as.latent.table, t);
            if (head < heads) {
                const float *q =
                    fomoe_float_row(&step->as.latent.query, t) + (int64_t)(head + 1) * query_stride - rotated;
                rope_adjacent(rotated, table, q, fomoe_float_row(&step->as.latent.absorbed, t) + (int64_t)head * n);
                continue;
            }
            float *key = run->scratch[thread];
            rope_adjacent(rotated, table, fomoe_float_row(&step->as.latent.key, t), key);
            memcpy(key + rotated, fomoe_float_row(&step->as.latent.latent, t), latent * sizeof *key);
            int64_t row_bytes = (int64_t)n * (step->as.latent.type == FOMOE_KV_F16 ? 2 : 4);
            uint8_t *place = run->states[t] + step->as.latent.key_offset + run->positions[t] * row_bytes;
            fomoe_to_kv(step->as.latent.type, n, key, place);
        }
    }
}

/* Rows that read floats: each is expanded once for all tokens. */
static void multiply_floats(const fomoe_step *step, fomoe_run *run, int head, float *expanded) {
    const fomoe_matrix *m = &step->as.head_mul.matrix;
    const fomoe_rows *input = &step->as.head_mul.input, *output = &step->as.head_mul.output;
    int heads = step->as.head_mul.heads, rows = m->rows / heads;
    int64_t from = (int64_t)head * (input->columns / heads);
    int64_t to = (int64_t)head * (output->columns / heads) + step->as.head_mul.at;
    for (int r = 0; r < rows; r++) {
        const uint8_t *row = m->data + ((int64_t)head * rows + r) * m->row_bytes;
        if (m->float_activations) m->type->to_float(row, expanded, m->columns);
        for (int t = 0; t < run->tokens; t++)
            fomoe_float_row(output, t)[to + r] =
                fomoe_row_dot(run, m, row, (const uint8_t *)(fomoe_float_row(input, t) + from), expanded);
    }
}

/* Rows that read another type: each token's input is converted once for all rows. */
static void multiply_converted(const fomoe_step *step, fomoe_run *run, int head, float *converted) {
    const fomoe_matrix *m = &step->as.head_mul.matrix;
    const fomoe_rows *input = &step->as.head_mul.input, *output = &step->as.head_mul.output;
    int heads = step->as.head_mul.heads, rows = m->rows / heads;
    const fomoe_type *type = fomoe_type_of(run->kernels, m->type->activation_type);
    int64_t from = (int64_t)head * (input->columns / heads);
    int64_t to = (int64_t)head * (output->columns / heads) + step->as.head_mul.at;
    for (int t = 0; t < run->tokens; t++) {
        type->from_float(fomoe_float_row(input, t) + from, converted, m->columns);
        for (int r = 0; r < rows; r++)
            fomoe_float_row(output, t)[to + r] = fomoe_row_dot(
                run, m, m->data + ((int64_t)head * rows + r) * m->row_bytes, (const uint8_t *)converted, NULL);
    }
}

void fomoe_step_head_mul(const fomoe_step *step, fomoe_run *run, int thread) {
    const fomoe_matrix *m = &step->as.head_mul.matrix;
    int is_float = m->float_activations || m->type->activation_type == 0;
    int64_t begin, end;
    while (fomoe_take_of(run, thread, &run->next[run->step], step->as.head_mul.heads, 1, &begin, &end))
        (is_float ? multiply_floats : multiply_converted)(step, run, begin, run->scratch[thread]);
}
