/* A model as a flat list of steps: recorded once from Python, replayed here for every batch of tokens.
 *
 * All threads of the team walk the list together, with a barrier after each step.  Rows of a product,
 * heads, channels and tokens are independent, so results do not depend on the number of threads, nor on
 * how a prompt is cut into batches. */
#ifndef FOMOE_PROGRAM_H
#define FOMOE_PROGRAM_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "math/attention.h"
#include "math/dot.h"
#include "read/watch.h"
#include "experts.h"
#include "threads.h"
#include "experts/routing.h"
#include "experts/trace.h"

/* A weight matrix in memory: rows of columns elements each. */
typedef struct {
    const uint8_t *data;
    const fomoe_type *type;
    int64_t row_bytes;
    int32_t rows, columns;
    int32_t float_activations; /* 1: expand the row to floats and use float activations */
} fomoe_matrix;

/* One row a token: floats, or blocks of an activation type.  stride in bytes. */
typedef struct {
    uint8_t *data;
    int64_t stride;
    int32_t columns;
    int32_t type; /* ggml type number */
} fomoe_rows;

/* What a caller may ask to see; NULL = not wanted.  Layer-major: [layers][tokens][...]. */
typedef struct {
    int32_t *experts;
    float *weights;
    float *router_logits;
    float *layer_output;
    float *final_norm; /* [outputs][columns] */
} fomoe_record;

typedef struct fomoe_step fomoe_step;

typedef struct {
    int32_t tokens;       /* in this batch */
    int32_t outputs;      /* how many of them get logits */
    const int32_t *ids;   /* tokens; those of a session follow one another */
    const int64_t *positions;   /* of each token in its session */
    uint8_t *const *states;     /* of each token, its session's memory: KV, convolution and delta-rule state */
    const int32_t *output_rows; /* [outputs], ascending: the tokens that get logits */
    float *logits;        /* [outputs][vocabulary] */
    int32_t substitute;   /* 1: experts may stand in for others, when this is a single token */
    fomoe_record record;
    fomoe_trace *trace;   /* NULL: none is written */
    fomoe_watch *watch;   /* NULL: the run goes on to its end */
    /* filled by fomoe_program_run */
    fomoe_team *team;
    const fomoe_kernels *kernels;
    int32_t threads;
    float **scratch; /* one area a thread */
    _Atomic int64_t *failure; /* 0, or where and why the run fails: see fomoe_fail */
    _Atomic int64_t *next;    /* one work counter a step */
    int32_t step;             /* where this thread is */
} fomoe_run;

enum { FOMOE_MAT_MUL_PARTS = 6, FOMOE_NORM_OUTPUTS = 3 };

typedef struct {
    fomoe_matrix matrix;
    fomoe_rows input, output;
    int32_t add; /* 1: output += product */
} fomoe_product;

typedef void (*fomoe_execute)(const fomoe_step *, fomoe_run *, int thread);

struct fomoe_step {
    fomoe_execute execute;
    union {
        struct {
            int file; /* descriptor of the file that holds the matrix, or -1 when it is in memory */
            int64_t offset;
            fomoe_matrix matrix;
            fomoe_rows output;
        } embed;
        struct {
            fomoe_rows input;
            const float *weight;
            float epsilon;
            int32_t count;
            fomoe_rows outputs[FOMOE_NORM_OUTPUTS]; /* floats and/or activation types */
            int32_t of_outputs;                     /* 1: only the rows that get logits, packed */
        } norm;
        struct {
            fomoe_rows input, output;
        } quantize;
        struct {
            int32_t count;
            fomoe_product parts[FOMOE_MAT_MUL_PARTS];
            int32_t of_outputs;
            int32_t to_logits;
        } mat_mul;
        struct {
            fomoe_rows gate, up, output;
        } silu_mul;
        struct {
            fomoe_rows input, output;
            const float *weight;
            int64_t state_offset;
            int32_t taps;
        } conv;
        struct {
            fomoe_rows qkv, beta, alpha, gate, output;
            const float *decay_rate, *decay_bias, *norm_weight;
            int64_t state_offset;
            int32_t key_heads, value_heads, head_columns;
            int32_t grouped; /* 1: value head h uses key head h / ratio; 0: h % key_heads */
            float epsilon;
        } delta;
        struct {
            fomoe_rows output; /* cos, sin pairs of each token's position */
            const double *frequency; /* of each pair */
            double magnitude;
            int32_t pairs;
        } rope_table;
        struct {
            fomoe_rows query, key, value, table; /* query is normalised and rotated in place */
            const float *query_norm, *key_norm;  /* NULL: none */
            const float *query_bias, *key_bias, *value_bias; /* added before the norms, a row of each; NULL: none */
            int64_t key_offset, value_offset, context; /* context: positions of a head's stream */
            int64_t ring; /* positions come again after so many, and stand twice in the stream; 0: never */
            fomoe_kv_type type;
            int32_t heads, kv_heads, head_columns, query_stride, rotated;
            float epsilon;
        } kv;
        struct {
            fomoe_rows query, output;
            const float *sinks; /* one more logit of each head; NULL: none */
            int64_t key_offset, value_offset, context, ring; /* as kv's */
            fomoe_kv_type type;
            int64_t window; /* positions that a token sees, itself included; 0: all */
            int32_t heads, kv_heads, head_columns, query_stride;
            int32_t value_columns; /* of the value's row, which is as long as the key's */
            float scale;
            int32_t gated; /* 1: sigmoid(gate) follows each head's query in the same row */
        } attention;
        struct {
            fomoe_rows query; /* each head's own columns, then those that turn */
            fomoe_rows latent, key, table;
            fomoe_rows absorbed; /* each head's turned columns, then as many as the latent has */
            int64_t key_offset;  /* [position][turned key, latent] */
            fomoe_kv_type type;
            int32_t heads, rotated;
        } latent;
        struct {
            fomoe_matrix matrix; /* [heads][rows / heads] */
            fomoe_rows input, output; /* of each head a part */
            int32_t heads, at; /* where in its part of the output a head's products go */
        } head_mul;
        struct {
            fomoe_rows logits, weights, ids; /* ids: int32 */
            fomoe_router router;
            const float *logit_bias; /* added to the logits; NULL: none */
            int32_t layer;
        } route;
        struct {
            fomoe_rows input, output;
            int32_t groups, first, length, at; /* see fomoe_step_ungroup */
        } ungroup;
        struct {
            fomoe_rows rows;
            const float *bias;
        } add_bias;
        struct {
            fomoe_rows logits, weights, ids; /* of the router; changed where an expert stands in for another */
            fomoe_rows input[2]; /* of gate and of up, in their activation types */
            fomoe_experts *experts;
            const float *bias[FOMOE_PARTS]; /* [experts][rows] of gate, up, down; NULL: none */
            fomoe_router router;
            int32_t layer;
            int32_t is_clamped; /* 1: fomoe_clamped_swiglu between them, not fomoe_silu_mul */
        } experts;
        struct {
            fomoe_rows weights, output;     /* output += the experts' weighted sum (+ shared) */
            fomoe_rows shared, shared_gate; /* data NULL: none; gate NULL: ungated */
            fomoe_experts *experts;
            int32_t used;
        } combine;
        struct {
            fomoe_rows input; /* the residual stream as a layer leaves it */
            const float *weight;
            float epsilon;
            fomoe_matrix router; /* of the next layer, which is `layer` */
            fomoe_router how;
            const float *logit_bias;
            fomoe_rows logits;
            fomoe_experts *experts;
            int32_t layer;
        } lookahead;
        struct {
            fomoe_rows input;
            int32_t layer;
        } layer_end;
    } as;
};

typedef struct fomoe_program fomoe_program;

/* The kernels must be those of the matrices and experts of its steps. */
fomoe_program *fomoe_program_new(fomoe_team *team, const fomoe_kernels *kernels, int64_t scratch_floats);
void fomoe_program_free(fomoe_program *);
/* The step is copied.  0, or -1 when memory runs out. */
int fomoe_program_add(fomoe_program *, const fomoe_step *);
int fomoe_program_steps(const fomoe_program *);
/* 0, or a negative errno: a read failed, or -ECANCELED when the watch ended the run.  No read of a failed run is in
 * flight any more, and its experts' slots are free or whole. */
int fomoe_program_run(fomoe_program *, fomoe_run *);

/* The ops, for fomoe_step.execute */
void fomoe_step_embed(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_norm(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_quantize(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_mat_mul(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_silu_mul(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_conv(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_delta(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_rope_table(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_kv(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_attention(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_latent(const fomoe_step *, fomoe_run *, int thread);
/* Each head's rows times the first columns of its part of the input. */
void fomoe_step_head_mul(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_route(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_experts_begin(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_experts(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_combine(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_lookahead(const fomoe_step *, fomoe_run *, int thread);
/* Parts of rows that come group by group, brought together: output[at + g * length + i] = input[g * stride + first + i]
 * for i < length, stride = columns of the input / groups. */
void fomoe_step_ungroup(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_add_bias(const fomoe_step *, fomoe_run *, int thread);
void fomoe_step_layer_end(const fomoe_step *, fomoe_run *, int thread);

/* Shared by the ops */

static inline uint8_t *fomoe_row(const fomoe_rows *rows, int64_t i) { return rows->data + i * rows->stride; }
static inline float *fomoe_float_row(const fomoe_rows *rows, int64_t i) { return (float *)fomoe_row(rows, i); }

/* The run ends after this step.  The step's number travels with the error (a negative errno), because a fast
 * thread may fail in the next step before a slow one has looked: all must leave after the same barrier. */
static inline void fomoe_fail(fomoe_run *run, int error) {
    int64_t none = 0;
    atomic_compare_exchange_strong(run->failure, &none, ((int64_t)(run->step + 1) << 32) | (uint32_t)-error);
}

static inline int fomoe_failed(const fomoe_run *run) {
    return atomic_load_explicit(run->failure, memory_order_relaxed) != 0;
}

/* Thread 0, which began the run, asks whether it shall end. */
static inline void fomoe_ask(fomoe_run *run) {
    if (fomoe_watch_ended(run->watch)) fomoe_fail(run, -ECANCELED);
}

/* Take the next chunk of 0..total of a step's work: sets *begin and *end, 0 when none is left. */
static inline int fomoe_take(_Atomic int64_t *next, int64_t total, int64_t chunk, int64_t *begin, int64_t *end) {
    int64_t b = atomic_fetch_add_explicit(next, chunk, memory_order_relaxed);
    if (b >= total) return 0;
    *begin = b;
    *end = b + chunk < total ? b + chunk : total;
    return 1;
}

/* As fomoe_take, and nothing is left of a run that fails: steps take long when a batch is large. */
static inline int fomoe_take_of(fomoe_run *run, int thread, _Atomic int64_t *next, int64_t total, int64_t chunk,
                                int64_t *begin, int64_t *end) {
    if (!thread) fomoe_ask(run);
    return !fomoe_failed(run) && fomoe_take(next, total, chunk, begin, end);
}

/* y = row . x for one weight row and one activation row */
static inline float fomoe_row_dot(const fomoe_run *run, const fomoe_matrix *m, const uint8_t *row, const uint8_t *x,
                                  const float *expanded) {
    float y;
    if (m->float_activations)
        fomoe_type_of(run->kernels, 0)->dot(m->columns, &y, 0, expanded, 0, x, 0, 1);
    else
        m->type->dot(m->columns, &y, 0, row, 0, x, 0, 1);
    return y;
}

#endif
