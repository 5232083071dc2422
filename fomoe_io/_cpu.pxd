# The C side of the CPU backend: what csrc/*.h declares.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fomoe_io._gate cimport fomoe_watch

cdef extern from "csrc/math/dot.h" nogil:
    ctypedef struct fomoe_type:
        int32_t type
        int32_t activation_type
        int32_t block_elements
        int32_t block_bytes
        void *dot
        void *from_float
        void *to_float
    ctypedef struct fomoe_kernels:
        pass
    fomoe_kernels *fomoe_kernels_of_ggml(const char *base_path, const char *cpu_path, char *message,
                                         size_t message_bytes)
    fomoe_kernels *fomoe_kernels_portable()
    void fomoe_kernels_free(fomoe_kernels *)
    const fomoe_type *fomoe_type_of(const fomoe_kernels *, int32_t type)
    size_t fomoe_row_bytes(const fomoe_kernels *, int32_t type, int64_t elements)

cdef extern from "csrc/math/attention.h" nogil:
    ctypedef enum fomoe_kv_type:
        FOMOE_KV_F32
        FOMOE_KV_F16

cdef extern from "csrc/cpu/threads.h" nogil:
    ctypedef struct fomoe_team:
        pass
    fomoe_team *fomoe_team_new(int threads)
    void fomoe_team_free(fomoe_team *)
    int fomoe_team_size(const fomoe_team *)

cdef extern from "csrc/read/reader.h" nogil:
    ctypedef struct fomoe_reader:
        pass

cdef extern from "csrc/experts/residency.h" nogil:
    int FOMOE_TIERS
    ctypedef struct fomoe_residency:
        pass
    ctypedef struct fomoe_residency_counters:
        uint64_t requests
        uint64_t hits[3]
        uint64_t evictions
        uint64_t promotions
        uint64_t demotions
        uint64_t substitutions
        uint64_t offers
    ctypedef struct fomoe_decay:
        double slow
        double fast
        double fast_share
    fomoe_residency *fomoe_residency_new(int layers, const int32_t *experts, const int32_t *slots, int policy,
                                         const fomoe_decay *decay)
    void fomoe_residency_free(fomoe_residency *)
    void fomoe_residency_scores(const fomoe_residency *, int layer, double *scores)
    const fomoe_residency_counters *fomoe_residency_count(const fomoe_residency *)
    int fomoe_residency_find(const fomoe_residency *, int layer, int32_t expert, int32_t *slot)
    const int8_t *fomoe_residency_tiers(const fomoe_residency *, int layer)
    int FOMOE_TIER_NVME

cdef extern from "csrc/experts/trace.h" nogil:
    ctypedef struct fomoe_trace:
        pass
    fomoe_trace *fomoe_trace_new(int file, int batch, int used, int most)
    fomoe_trace *fomoe_trace_held(int records, int batch, int used)
    void fomoe_trace_take(fomoe_trace *, fomoe_trace *const *held, int count)
    void fomoe_trace_free(fomoe_trace *)
    void fomoe_trace_seeds(fomoe_trace *, int layer, int count, const int32_t *experts, const double *scores)
    int fomoe_trace_flush(fomoe_trace *)

cdef class Trace:
    cdef fomoe_trace *c

cdef extern from "csrc/experts/car.h" nogil:
    ctypedef struct fomoe_car:
        pass

cdef extern from "csrc/cpu/experts.h" nogil:
    int FOMOE_PARTS
    ctypedef struct fomoe_extent:
        uint64_t offset
        uint32_t bytes
        uint32_t slot_offset
        int32_t file
        int32_t unused
    ctypedef struct fomoe_expert_layer:
        int32_t experts
        const fomoe_type *type[3]
        int64_t row_bytes[3]
        const fomoe_extent *extents
        const int32_t *extent_count
        const uint32_t *part_offset
        uint8_t *pool
        int64_t slot_bytes
        int32_t slots
    ctypedef struct fomoe_expert_counters:
        uint64_t nvme_reads
        uint64_t nvme_bytes
        uint64_t stall_ns
        uint64_t groups
        uint64_t prefetches
        uint64_t prefetch_bytes
        uint64_t useful
        uint64_t wasted_bytes
        uint64_t late
    ctypedef struct fomoe_experts_shape:
        int32_t layers
        int32_t columns
        int32_t hidden
        int32_t used
        int32_t batch
        int32_t float_activations
    ctypedef struct fomoe_experts:
        pass
    fomoe_experts *fomoe_experts_new(const fomoe_experts_shape *, const fomoe_expert_layer *, fomoe_residency *,
                                     fomoe_reader *)
    void fomoe_experts_free(fomoe_experts *)
    int64_t fomoe_experts_workspace_bytes(const fomoe_experts_shape *)
    int fomoe_experts_stage(fomoe_experts *, uint8_t *pool, int each)
    void fomoe_experts_set_lookahead(fomoe_experts *, int ranks)
    ctypedef struct fomoe_recall:
        uint64_t picks
        uint64_t guessed
    const fomoe_recall *fomoe_experts_recall(const fomoe_experts *)
    void fomoe_experts_set_car(fomoe_experts *, const fomoe_car *)
    const fomoe_expert_counters *fomoe_experts_count(const fomoe_experts *)
    const int64_t *fomoe_experts_picks(const fomoe_experts *)
    int fomoe_experts_warm(fomoe_experts *, int layer, const int32_t *experts, const double *scores, int count,
                           fomoe_watch *)
    void fomoe_experts_failure(const fomoe_experts *, int *layer, int *expert)

cdef extern from "csrc/experts/routing.h" nogil:
    ctypedef struct fomoe_router:
        int32_t experts
        int32_t used
        int32_t score
        const float *bias
        int32_t groups
        int32_t groups_used
        int32_t normalise
        float scale

cdef extern from "csrc/cpu/program.h" nogil:
    int FOMOE_MAT_MUL_PARTS
    int FOMOE_NORM_OUTPUTS
    ctypedef struct fomoe_matrix:
        const uint8_t *data
        const fomoe_type *type
        int64_t row_bytes
        int32_t rows
        int32_t columns
        int32_t float_activations
    ctypedef struct fomoe_rows:
        uint8_t *data
        int64_t stride
        int32_t columns
        int32_t type
    ctypedef struct fomoe_record:
        int32_t *experts
        float *weights
        float *router_logits
        float *layer_output
        float *final_norm
    ctypedef struct fomoe_run:
        int32_t tokens
        int32_t outputs
        const int32_t *ids
        const int64_t *positions
        uint8_t **states
        const int32_t *output_rows
        float *logits
        int32_t substitute
        fomoe_record record
        fomoe_trace *trace
        fomoe_watch *watch
    ctypedef struct fomoe_product:
        fomoe_matrix matrix
        fomoe_rows input
        fomoe_rows output
        int32_t add
    ctypedef struct embed_step:
        int file
        int64_t offset
        fomoe_matrix matrix
        fomoe_rows output
    ctypedef struct norm_step:
        fomoe_rows input
        const float *weight
        float epsilon
        int32_t count
        fomoe_rows outputs[3]
        int32_t of_outputs
    ctypedef struct quantize_step:
        fomoe_rows input
        fomoe_rows output
    ctypedef struct mat_mul_step:
        int32_t count
        fomoe_product parts[6]
        int32_t of_outputs
        int32_t to_logits
    ctypedef struct silu_mul_step:
        fomoe_rows gate
        fomoe_rows up
        fomoe_rows output
    ctypedef struct conv_step:
        fomoe_rows input
        fomoe_rows output
        const float *weight
        int64_t state_offset
        int32_t taps
    ctypedef struct delta_step:
        fomoe_rows qkv
        fomoe_rows beta
        fomoe_rows alpha
        fomoe_rows gate
        fomoe_rows output
        const float *decay_rate
        const float *decay_bias
        const float *norm_weight
        int64_t state_offset
        int32_t key_heads
        int32_t value_heads
        int32_t head_columns
        int32_t grouped
        float epsilon
    ctypedef struct rope_table_step:
        fomoe_rows output
        const double *frequency
        double magnitude
        int32_t pairs
    ctypedef struct kv_step:
        fomoe_rows query
        fomoe_rows key
        fomoe_rows value
        fomoe_rows table
        const float *query_norm
        const float *key_norm
        const float *query_bias
        const float *key_bias
        const float *value_bias
        int64_t key_offset
        int64_t value_offset
        int64_t context
        int64_t ring
        fomoe_kv_type type
        int32_t heads
        int32_t kv_heads
        int32_t head_columns
        int32_t query_stride
        int32_t rotated
        float epsilon
    ctypedef struct attention_step:
        fomoe_rows query
        fomoe_rows output
        const float *sinks
        int64_t key_offset
        int64_t value_offset
        int64_t context
        int64_t ring
        fomoe_kv_type type
        int64_t window
        int32_t heads
        int32_t kv_heads
        int32_t head_columns
        int32_t query_stride
        int32_t value_columns
        float scale
        int32_t gated
    ctypedef struct latent_step:
        fomoe_rows query
        fomoe_rows latent
        fomoe_rows key
        fomoe_rows table
        fomoe_rows absorbed
        int64_t key_offset
        fomoe_kv_type type
        int32_t heads
        int32_t rotated
    ctypedef struct head_mul_step:
        fomoe_matrix matrix
        fomoe_rows input
        fomoe_rows output
        int32_t heads
        int32_t at
    ctypedef struct route_step:
        fomoe_rows logits
        fomoe_rows weights
        fomoe_rows ids
        fomoe_router router
        const float *logit_bias
        int32_t layer
    ctypedef struct ungroup_step:
        fomoe_rows input
        fomoe_rows output
        int32_t groups
        int32_t first
        int32_t length
        int32_t at
    ctypedef struct add_bias_step:
        fomoe_rows rows
        const float *bias
    ctypedef struct experts_step:
        fomoe_rows logits
        fomoe_rows weights
        fomoe_rows ids
        fomoe_rows input[2]
        fomoe_experts *experts
        const float *bias[3]
        int32_t layer
        fomoe_router router
        int32_t is_clamped
    ctypedef struct combine_step:
        fomoe_rows weights
        fomoe_rows output
        fomoe_rows shared
        fomoe_rows shared_gate
        fomoe_experts *experts
        int32_t used
    ctypedef struct lookahead_step:
        fomoe_rows input
        const float *weight
        float epsilon
        fomoe_matrix router
        fomoe_router how
        const float *logit_bias
        fomoe_rows logits
        fomoe_experts *experts
        int32_t layer
    ctypedef struct layer_end_step:
        fomoe_rows input
        int32_t layer
    ctypedef union step_arguments "fomoe_step_arguments":
        embed_step embed
        norm_step norm
        quantize_step quantize
        mat_mul_step mat_mul
        silu_mul_step silu_mul
        conv_step conv
        delta_step delta
        rope_table_step rope_table
        kv_step kv
        attention_step attention
        latent_step latent
        head_mul_step head_mul
        route_step route
        experts_step experts
        combine_step combine
        lookahead_step lookahead
        layer_end_step layer_end
        ungroup_step ungroup
        add_bias_step add_bias
    ctypedef void (*fomoe_execute)(const fomoe_step *, fomoe_run *, int) noexcept nogil
    ctypedef struct fomoe_step:
        fomoe_execute execute
        step_arguments arguments "as"
    ctypedef struct fomoe_program:
        pass
    fomoe_program *fomoe_program_new(fomoe_team *, const fomoe_kernels *, int64_t scratch_floats)
    void fomoe_program_free(fomoe_program *)
    int fomoe_program_add(fomoe_program *, const fomoe_step *)
    int fomoe_program_steps(const fomoe_program *)
    int fomoe_program_run(fomoe_program *, fomoe_run *)
    fomoe_execute fomoe_step_embed, fomoe_step_norm, fomoe_step_quantize, fomoe_step_mat_mul, fomoe_step_silu_mul
    fomoe_execute fomoe_step_conv, fomoe_step_delta, fomoe_step_rope_table, fomoe_step_kv, fomoe_step_attention
    fomoe_execute fomoe_step_latent, fomoe_step_head_mul
    fomoe_execute fomoe_step_route, fomoe_step_experts_begin, fomoe_step_experts, fomoe_step_combine
    fomoe_execute fomoe_step_lookahead, fomoe_step_layer_end, fomoe_step_ungroup, fomoe_step_add_bias
