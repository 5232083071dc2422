"""What several architectures share: reading the shape, the attention and the expert blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fomoe_io._cpu import Matrix, Rows
from fomoe_io.cpu.recorder import Activation, Recorder
from fomoe_io.cpu.weights import Weights
from fomoe_io.errors import FormatError

NORMALISE = True
"""Both architectures scale the weights of a token's experts to sum 1 (norm_topk_prob)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Mixture-of-Experts transformer, from its GGUF metadata.

    `columns` is the width of the residual stream, `hidden` the width of one routed expert, `used` the experts
    a token; `shared_hidden` is 0 without a shared expert.
    """

    layers: int
    columns: int
    vocabulary: int
    context_tokens: int
    heads: int
    kv_heads: int
    head_columns: int
    rotated: int
    rope_base: float
    epsilon: float
    experts: int
    used: int
    hidden: int
    shared_hidden: int
    expert_scale: float
    full_attention: tuple[bool, ...]
    key_heads: int = 0
    value_heads: int = 0
    state_columns: int = 0
    conv_taps: int = 0


class Metadata:
    """Bounded reading of `<architecture>.*` keys."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.architecture = str(values["general.architecture"])

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 24) -> int:
        """An integer key, checked against its sensible range before anything is sized by it."""
        name = f"{self.architecture}.{key}"
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise FormatError(f"metadata key {name} is {value!r}, expected an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive floating-point key."""
        name = f"{self.architecture}.{key}"
        value = self._values.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise FormatError(f"metadata key {name} is {value!r}, expected a positive number")
        return float(value)

    def get(self, key: str) -> Any:
        """Any key, None when absent."""
        return self._values.get(f"{self.architecture}.{key}")

    def vocabulary(self) -> int:
        """Number of tokens."""
        key = "tokenizer.ggml.tokens"
        if key not in self._values:
            raise FormatError(f"the model has no vocabulary (metadata key {key})")
        # a store's metadata counts without decoding hundreds of thousands of strings
        length = getattr(self._values, "length", None)
        return int(length(key) if length else len(self._values[key]))


def record_attention(
    p: Recorder, w: Weights, s: Shape, prefix: str, x: Rows, table: Rows, *, norm: str, gated: bool
) -> None:
    """x += W_o (softmax(q k^T / sqrt(d)) v [* sigmoid(gate)]) with normalised, rotated q and k (GQA)."""
    d, heads, kv_heads = s.head_columns, s.heads, s.kv_heads
    stride = 2 * d if gated else d
    w_query = w.matrix(f"{prefix}.attn_q.weight", s.columns, heads * stride)
    w_key = w.matrix(f"{prefix}.attn_k.weight", s.columns, kv_heads * d)
    w_value = w.matrix(f"{prefix}.attn_v.weight", s.columns, kv_heads * d)
    w_output = w.matrix(f"{prefix}.attn_output.weight", heads * d, s.columns)
    norm_weight = w.vector(f"{prefix}.{norm}.weight", s.columns)
    query_norm = w.vector(f"{prefix}.attn_q_norm.weight", d)
    key_norm = w.vector(f"{prefix}.attn_k_norm.weight", d)

    query, key, value = p.rows("query", heads * stride), p.rows("key", kv_heads * d), p.rows("value", kv_heads * d)
    attended = p.rows("attended", heads * d)
    key_cache = p.state.take(kv_heads * p.context_tokens * d, zeroed=False)
    value_cache = p.state.take(kv_heads * p.context_tokens * d, zeroed=False)

    h = p.norm(x, norm_weight, s.epsilon, name="normed", feeds=[w_query, w_key, w_value])
    p.mat_mul([(w_query, h, query), (w_key, h, key), (w_value, h, value)])
    p.program.kv(
        query, key, value, table, query_norm, key_norm, key_cache, value_cache, p.context_tokens,
        heads, kv_heads, d, stride, s.rotated, s.epsilon,
    )  # fmt: skip
    p.program.attention(query, attended, key_cache, value_cache, p.context_tokens, heads, kv_heads, d, stride, gated)
    p.mat_mul_add(w_output, p.convert(attended, name="attended", feeds=[w_output]), x)


@dataclass(frozen=True, slots=True)
class _SharedExpert:
    gate: Matrix
    up: Matrix
    down: Matrix
    scalar: Matrix | None


def _shared_expert(w: Weights, s: Shape, prefix: str) -> _SharedExpert | None:
    if not s.shared_hidden:
        return None
    scalar = f"{prefix}.ffn_gate_inp_shexp.weight"
    return _SharedExpert(
        w.matrix(f"{prefix}.ffn_gate_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_up_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_down_shexp.weight", s.shared_hidden, s.columns),
        w.matrix(scalar, s.columns, 1) if scalar in w else None,
    )


def record_experts(
    p: Recorder, w: Weights, s: Shape, layer: int, x: Rows, *, norm: str, expert_inputs: tuple[int, int]
) -> None:
    """x += sum_k w_k down_k(silu(gate_k h) * up_k h) [+ sigmoid(g . h) * shared(h)], h = norm(x), k = top of softmax.

    Reads of missing experts start right after routing and run while the shared expert is computed.
    """
    prefix = f"blk.{layer}"
    router = w.matrix(f"{prefix}.ffn_gate_inp.weight", s.columns, s.experts)
    shared = _shared_expert(w, s, prefix)
    feeds = [router]
    if shared:
        feeds += [m for m in (shared.gate, shared.up, shared.scalar) if m is not None]
    h = p.norm(
        x, w.vector(f"{prefix}.{norm}.weight", s.columns), s.epsilon, name="normed", feeds=feeds, types=expert_inputs
    )
    logits, ids, weights = p.rows("router_logits", s.experts), p.rows("experts", s.used), p.rows("weights", s.used)
    products = [(router, h, logits)]
    if shared and shared.scalar is not None:
        products.append((shared.scalar, h, p.rows("shared_scalar", 1)))
    p.mat_mul(products)
    p.program.route(logits, ids, weights, layer, s.experts, s.used, NORMALISE, s.expert_scale)
    inputs = h.forms[expert_inputs[0]], h.forms[expert_inputs[1]]
    if p.experts_pool is not None:
        p.program.experts_begin(p.experts_pool, ids, *inputs, layer)
    with p.beside():
        y, y_gate = _record_shared(p, s, shared, h)
    if p.experts_pool is not None:
        p.program.experts(p.experts_pool, ids, *inputs, layer)
        p.program.combine(p.experts_pool, weights, x, s.used, y, y_gate)
    if p.lookahead and p.experts_pool is not None and layer + 1 < s.layers:
        following = f"blk.{layer + 1}"
        p.program.lookahead(
            p.experts_pool,
            x,
            w.vector(f"{following}.{norm}.weight", s.columns),
            s.epsilon,
            w.matrix(f"{following}.ffn_gate_inp.weight", s.columns, s.experts),
            p.rows("lookahead", s.experts),
            layer + 1,
        )
    p.program.layer_end(x, layer)


def _record_shared(
    p: Recorder, s: Shape, shared: _SharedExpert | None, h: Activation
) -> tuple[Rows | None, Rows | None]:
    if shared is None:
        return None, None
    gate, up = p.rows("shared_gate", s.shared_hidden), p.rows("shared_up", s.shared_hidden)
    scalar, y = p.rows("shared_scalar", 1), p.rows("shared", s.columns)
    p.mat_mul([(shared.gate, h, gate), (shared.up, h, up)])
    p.mat_mul([(shared.down, p.silu_mul(gate, up, name="shared_activation", feeds=[shared.down]), y)])
    return y, scalar if shared.scalar is not None else None


def record_embedding(p: Recorder, w: Weights, s: Shape, files: list[int]) -> Rows:
    """The residual stream, starting as the tokens' embeddings."""
    x = p.rows("residual", s.columns)
    matrix, file, offset = w.embedding(s.columns, s.vocabulary)
    p.embed(matrix, x, file=-1 if file < 0 else files[file], offset=offset)
    return x


def record_logits(p: Recorder, w: Weights, s: Shape, x: Rows) -> None:
    """logits = W_output norm(x), for the positions that want them."""
    output = w.matrix(Weights.EMBEDDING if w.tied else Weights.OUTPUT, s.columns, s.vocabulary)
    norm = w.vector("output_norm.weight", s.columns)
    p.logits(output, p.norm(x, norm, s.epsilon, name="final", feeds=[output], of_outputs=True))
