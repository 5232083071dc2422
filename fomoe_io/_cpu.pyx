# The CPU backend's Python face: records the steps of a program, owns its memory, replays it without the GIL.
# Thin on purpose: what the steps do is in csrc/, what a model is made of in models/, the documented face in program.py.
from libc.math cimport sqrtf
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

import numpy as np

from fomoe_io._gate cimport Gate

F32 = 0  # ggml's number


cdef class Kernels:
    """What one library can multiply with; ggml's from the paths of its two libraries, the portable ones without."""
    cdef fomoe_kernels *c
    cdef readonly str name

    def __cinit__(self, bytes base_path=None, bytes cpu_path=None):
        cdef char message[512]
        if base_path is None:
            self.name = "portable"
            self.c = fomoe_kernels_portable()
            if self.c == NULL:
                raise MemoryError
        else:
            self.name = "ggml"
            self.c = fomoe_kernels_of_ggml(base_path, cpu_path, message, sizeof(message))
            if self.c == NULL:
                raise OSError((<bytes>message).decode(errors="replace"))

    def __dealloc__(self):
        fomoe_kernels_free(self.c)

    @property
    def address(self):
        return <uintptr_t>self.c

    def type_info(self, int type):
        """(activation type, block elements, block bytes), or None when there is no product with the type."""
        cdef const fomoe_type *t = fomoe_type_of(self.c, type)
        if t == NULL or t.dot == NULL or t.to_float == NULL:
            return None
        return t.activation_type, t.block_elements, t.block_bytes

    def row_bytes(self, int type, int64_t elements):
        return fomoe_row_bytes(self.c, type, elements)


cdef class Team:
    cdef fomoe_team *c
    cdef readonly int threads

    def __cinit__(self, int threads):
        self.c = fomoe_team_new(threads)
        if self.c == NULL:
            raise OSError(f"{threads} threads could not be started")
        self.threads = threads

    def __dealloc__(self):
        if self.c != NULL:
            with nogil:
                fomoe_team_free(self.c)


include "_cpu_operands.pxi"


cdef const float *vector(array):
    """The address of a float32 vector (kept alive by the program), NULL for None."""
    cdef const float[::1] view
    if array is None:
        return NULL
    view = array
    return &view[0]


cdef fomoe_router native_router(r):
    """Of a models.recorder.Router, which the program keeps alive."""
    cdef fomoe_router native
    native.experts, native.used, native.score = r.experts, r.used, int(r.score)
    native.bias = vector(r.bias)
    native.groups, native.groups_used = r.groups, r.groups_used
    native.normalise, native.scale = r.normalise, r.scale
    return native


include "_cpu_experts.pxi"


cdef class Program:
    cdef fomoe_program *c
    cdef Team team
    cdef readonly Kernels kernels
    cdef list keep
    cdef Trace tracer

    def __cinit__(self, Team team not None, Kernels kernels not None, int64_t scratch_floats):
        self.team = team
        self.kernels = kernels
        self.keep = []
        self.tracer = None
        self.c = fomoe_program_new(team.c, kernels.c, scratch_floats)
        if self.c == NULL:
            raise MemoryError

    def __dealloc__(self):
        fomoe_program_free(self.c)

    @property
    def steps(self):
        return fomoe_program_steps(self.c)

    def trace(self, Trace trace):
        """Write what runs from now on do; None: nothing."""
        self.tracer = trace

    cdef _add(self, fomoe_step *step, tuple keep):
        for part in keep:
            if isinstance(part, (Matrix, Experts)) and part.kernels is not self.kernels:
                raise ValueError("a step's weights were made for other kernels than the program's")
        self.keep.append(keep)
        if fomoe_program_add(self.c, step):
            raise MemoryError

    def embed(self, Matrix matrix, Rows output, int file, int64_t offset):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_embed
        s.arguments.embed.file = file
        s.arguments.embed.offset = offset
        s.arguments.embed.matrix = matrix.c
        s.arguments.embed.output = output.c
        self._add(&s, (matrix, output))

    def norm(self, Rows input, weight, float epsilon, list outputs, bint of_outputs):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        if len(outputs) > FOMOE_NORM_OUTPUTS:
            raise ValueError("too many outputs of a norm")
        s.execute = fomoe_step_norm
        s.arguments.norm.input = input.c
        s.arguments.norm.weight = vector(weight)
        s.arguments.norm.epsilon = epsilon
        s.arguments.norm.count = len(outputs)
        for i, output in enumerate(outputs):
            s.arguments.norm.outputs[i] = (<Rows?>output).c
        s.arguments.norm.of_outputs = of_outputs
        self._add(&s, (input, weight, outputs))

    def quantize(self, Rows input, Rows output):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_quantize
        s.arguments.quantize.input = input.c
        s.arguments.quantize.output = output.c
        self._add(&s, (input, output))

    def mat_mul(self, list products, bint of_outputs=False, bint to_logits=False):
        cdef fomoe_step s
        cdef Matrix matrix
        cdef Rows input, output
        memset(&s, 0, sizeof(s))
        if len(products) > FOMOE_MAT_MUL_PARTS:
            raise ValueError("too many products in a step")
        s.execute = fomoe_step_mat_mul
        s.arguments.mat_mul.count = len(products)
        for i, (matrix, input, output, add) in enumerate(products):
            if matrix.kernels is not self.kernels:
                raise ValueError("a product's weights were made for other kernels than the program's")
            if matrix.c.columns != input.c.columns or input.c.type != matrix.activation_type:
                raise ValueError("a product's input does not fit its matrix")
            if output is not None and output.c.columns < matrix.c.rows:
                raise ValueError("a product's output is too narrow")
            s.arguments.mat_mul.parts[i].matrix = matrix.c
            s.arguments.mat_mul.parts[i].input = input.c
            if output is not None:
                s.arguments.mat_mul.parts[i].output = output.c
            s.arguments.mat_mul.parts[i].add = add
        s.arguments.mat_mul.of_outputs = of_outputs
        s.arguments.mat_mul.to_logits = to_logits
        self._add(&s, (products,))

    def silu_mul(self, Rows gate, Rows up, Rows output):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_silu_mul
        s.arguments.silu_mul.gate = gate.c
        s.arguments.silu_mul.up = up.c
        s.arguments.silu_mul.output = output.c
        self._add(&s, (gate, up, output))

    def conv(self, Rows input, Rows output, weight, int64_t state_offset, int taps):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_conv
        s.arguments.conv.input = input.c
        s.arguments.conv.output = output.c
        s.arguments.conv.weight = vector(weight)
        s.arguments.conv.state_offset = state_offset
        s.arguments.conv.taps = taps
        self._add(&s, (input, output, weight))

    def delta(self, Rows qkv, Rows beta, Rows alpha, Rows gate, Rows output, decay_rate, decay_bias, norm_weight,
              int64_t state_offset, int key_heads, int value_heads, int head_columns, bint grouped, float epsilon):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_delta
        s.arguments.delta.qkv = qkv.c
        s.arguments.delta.beta = beta.c
        s.arguments.delta.alpha = alpha.c
        s.arguments.delta.gate = gate.c
        s.arguments.delta.output = output.c
        s.arguments.delta.decay_rate = vector(decay_rate)
        s.arguments.delta.decay_bias = vector(decay_bias)
        s.arguments.delta.norm_weight = vector(norm_weight)
        s.arguments.delta.state_offset = state_offset
        s.arguments.delta.key_heads = key_heads
        s.arguments.delta.value_heads = value_heads
        s.arguments.delta.head_columns = head_columns
        s.arguments.delta.grouped = grouped
        s.arguments.delta.epsilon = epsilon
        self._add(&s, (qkv, beta, alpha, gate, output, decay_rate, decay_bias, norm_weight))

    def rope_table(self, Rows output, rope):
        """The positions' table of a models.rope.Rope."""
        cdef fomoe_step s
        cdef double[::1] frequency = np.array(rope.frequencies, np.float64)
        memset(&s, 0, sizeof(s))
        if output.c.columns != 2 * frequency.shape[0] or frequency.shape[0] == 0:
            raise ValueError("a table row takes two floats a pair")
        s.execute = fomoe_step_rope_table
        s.arguments.rope_table.output = output.c
        s.arguments.rope_table.frequency = &frequency[0]
        s.arguments.rope_table.magnitude = rope.magnitude
        s.arguments.rope_table.pairs = frequency.shape[0]
        self._add(&s, (output, frequency))

    def kv(self, Rows query, Rows key, Rows value, Rows table, query_norm, key_norm, int64_t key_offset,
           int64_t value_offset, int64_t context, int64_t ring, int type, int heads, int kv_heads, int head_columns,
           int query_stride, int rotated, float epsilon, biases):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_kv
        s.arguments.kv.query = query.c
        s.arguments.kv.key = key.c
        s.arguments.kv.value = value.c
        s.arguments.kv.table = table.c
        s.arguments.kv.query_norm = vector(query_norm)
        s.arguments.kv.key_norm = vector(key_norm)
        query_bias, key_bias, value_bias = biases
        s.arguments.kv.query_bias = vector(query_bias)
        s.arguments.kv.key_bias = vector(key_bias)
        s.arguments.kv.value_bias = vector(value_bias)
        s.arguments.kv.key_offset = key_offset
        s.arguments.kv.value_offset = value_offset
        s.arguments.kv.context = context
        s.arguments.kv.ring = ring
        s.arguments.kv.type = <fomoe_kv_type>type
        s.arguments.kv.heads = heads
        s.arguments.kv.kv_heads = kv_heads
        s.arguments.kv.head_columns = head_columns
        s.arguments.kv.query_stride = query_stride
        s.arguments.kv.rotated = rotated
        s.arguments.kv.epsilon = epsilon
        self._add(&s, (query, key, value, table, query_norm, key_norm, biases))

    def attention(self, Rows query, Rows output, int64_t key_offset, int64_t value_offset, int64_t context, int type,
                  int heads, int kv_heads, int head_columns, int query_stride, bint gated, sinks=None,
                  int64_t window=0, int value_columns=0, double scale=0, int64_t ring=0):
        """`value_columns`, `scale` 0: those of the key, and 1 / sqrt of them."""
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_attention
        s.arguments.attention.query = query.c
        s.arguments.attention.output = output.c
        s.arguments.attention.key_offset = key_offset
        s.arguments.attention.value_offset = value_offset
        s.arguments.attention.context = context
        s.arguments.attention.ring = ring
        s.arguments.attention.type = <fomoe_kv_type>type
        s.arguments.attention.heads = heads
        s.arguments.attention.kv_heads = kv_heads
        s.arguments.attention.head_columns = head_columns
        s.arguments.attention.query_stride = query_stride
        s.arguments.attention.gated = gated
        s.arguments.attention.sinks = vector(sinks)
        s.arguments.attention.window = window
        s.arguments.attention.value_columns = value_columns or head_columns
        s.arguments.attention.scale = scale or <float>1 / sqrtf(<float>head_columns)
        self._add(&s, (query, output, sinks))

    def latent(self, Rows query, Rows latent, Rows key, Rows table, Rows absorbed, int64_t key_offset, int type,
               int heads, int rotated):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_latent
        s.arguments.latent.query = query.c
        s.arguments.latent.latent = latent.c
        s.arguments.latent.key = key.c
        s.arguments.latent.table = table.c
        s.arguments.latent.absorbed = absorbed.c
        s.arguments.latent.key_offset = key_offset
        s.arguments.latent.type = <fomoe_kv_type>type
        s.arguments.latent.heads = heads
        s.arguments.latent.rotated = rotated
        self._add(&s, (query, latent, key, table, absorbed))

    def head_mul(self, Matrix matrix, Rows input, Rows output, int heads, int at):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        if matrix.kernels is not self.kernels:
            raise ValueError("a product's weights were made for other kernels than the program's")
        if matrix.c.columns > input.c.columns // heads or at + matrix.c.rows // heads > output.c.columns // heads:
            raise ValueError("parts beyond the rows")
        s.execute = fomoe_step_head_mul
        s.arguments.head_mul.matrix = matrix.c
        s.arguments.head_mul.input = input.c
        s.arguments.head_mul.output = output.c
        s.arguments.head_mul.heads = heads
        s.arguments.head_mul.at = at
        self._add(&s, (matrix, input, output))

    def route(self, Rows logits, Rows ids, Rows weights, int layer, router):
        """By a models.recorder.Router."""
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_route
        s.arguments.route.logits = logits.c
        s.arguments.route.ids = ids.c
        s.arguments.route.weights = weights.c
        s.arguments.route.layer = layer
        s.arguments.route.router = native_router(router)
        s.arguments.route.logit_bias = vector(router.logit_bias)
        self._add(&s, (logits, ids, weights, router))

    def experts_begin(self, Experts experts, Rows logits, Rows ids, Rows weights, int layer, router):
        """What the layer's route left, which it may change."""
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_experts_begin
        s.arguments.experts.experts = experts.c
        s.arguments.experts.logits = logits.c
        s.arguments.experts.ids = ids.c
        s.arguments.experts.weights = weights.c
        s.arguments.experts.layer = layer
        s.arguments.experts.router = native_router(router)
        self._add(&s, (experts, logits, ids, weights, router))

    def experts(self, Experts experts, Rows ids, Rows gate_input, Rows up_input, int layer, biases=(None, None, None),
                bint is_clamped=False):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_experts
        s.arguments.experts.experts = experts.c
        s.arguments.experts.ids = ids.c
        s.arguments.experts.input[0] = gate_input.c
        s.arguments.experts.input[1] = up_input.c
        s.arguments.experts.layer = layer
        s.arguments.experts.is_clamped = is_clamped
        for i, bias in enumerate(biases):
            s.arguments.experts.bias[i] = vector(bias)
        self._add(&s, (experts, ids, gate_input, up_input, biases))

    def combine(self, Experts experts, Rows weights, Rows output, int used, Rows shared, Rows shared_gate):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_combine
        s.arguments.combine.experts = experts.c
        s.arguments.combine.weights = weights.c
        s.arguments.combine.output = output.c
        s.arguments.combine.used = used
        if shared is not None:
            s.arguments.combine.shared = shared.c
        if shared_gate is not None:
            s.arguments.combine.shared_gate = shared_gate.c
        self._add(&s, (experts, weights, output, shared, shared_gate))

    def lookahead(self, Experts experts, Rows input, weight, float epsilon, Matrix router, Rows logits, int layer, how):
        """At the end of the layer before `layer`, with that one's norm and router."""
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_lookahead
        s.arguments.lookahead.input = input.c
        s.arguments.lookahead.weight = vector(weight)
        s.arguments.lookahead.epsilon = epsilon
        s.arguments.lookahead.router = router.c
        s.arguments.lookahead.logits = logits.c
        s.arguments.lookahead.experts = experts.c
        s.arguments.lookahead.layer = layer
        s.arguments.lookahead.how = native_router(how)
        s.arguments.lookahead.logit_bias = vector(how.logit_bias)
        self._add(&s, (experts, input, weight, router, logits, how))

    def ungroup(self, Rows input, Rows output, int groups, int first, int length, int at):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        if groups * length + at > output.c.columns or first + length > input.c.columns // groups:
            raise ValueError("parts beyond the rows")
        s.execute = fomoe_step_ungroup
        s.arguments.ungroup.input = input.c
        s.arguments.ungroup.output = output.c
        s.arguments.ungroup.groups = groups
        s.arguments.ungroup.first = first
        s.arguments.ungroup.length = length
        s.arguments.ungroup.at = at
        self._add(&s, (input, output))

    def add_bias(self, Rows rows, bias):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_add_bias
        s.arguments.add_bias.rows = rows.c
        s.arguments.add_bias.bias = vector(bias)
        self._add(&s, (rows, bias))

    def layer_end(self, Rows input, int layer):
        cdef fomoe_step s
        memset(&s, 0, sizeof(s))
        s.execute = fomoe_step_layer_end
        s.arguments.layer_end.input = input.c
        s.arguments.layer_end.layer = layer
        self._add(&s, (input,))

    def run(self, const int32_t[::1] ids, const int64_t[::1] positions, const uintptr_t[::1] states,
            const int32_t[::1] output_rows, float[:, ::1] logits,
            int32_t[:, :, ::1] experts=None, float[:, :, ::1] weights=None, float[:, :, ::1] router_logits=None,
            float[:, :, ::1] layer_output=None, float[:, ::1] final_norm=None, bint substitute=False,
            Gate gate=None):
        """0, or a negative errno; the gate may end it.  positions, states: of each token; output_rows: the tokens
        that get logits, [outputs, vocabulary]; the rest are records, [layers, tokens, ...]."""
        cdef fomoe_run r
        cdef int error
        assert ids.shape[0] == positions.shape[0] == states.shape[0] and output_rows.shape[0] == logits.shape[0]
        memset(&r, 0, sizeof(r))
        r.tokens = ids.shape[0]
        r.outputs = output_rows.shape[0]
        r.ids = &ids[0]
        r.positions = &positions[0]
        r.states = <uint8_t **>&states[0]
        if r.outputs:
            r.output_rows, r.logits = &output_rows[0], &logits[0, 0]
        r.substitute = substitute
        r.watch = NULL if gate is None else &gate.watch
        r.trace = NULL if self.tracer is None else self.tracer.c
        if experts is not None:
            r.record.experts = &experts[0, 0, 0]
        if weights is not None:
            r.record.weights = &weights[0, 0, 0]
        if router_logits is not None:
            r.record.router_logits = &router_logits[0, 0, 0]
        if layer_output is not None:
            r.record.layer_output = &layer_output[0, 0, 0]
        if final_norm is not None and r.outputs:
            r.record.final_norm = &final_norm[0, 0]
        with nogil:
            error = fomoe_program_run(self.c, &r)
        return error
