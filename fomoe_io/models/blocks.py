"""What several architectures share: the attention and the expert blocks, the embedding and the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import EMBEDDING, OUTPUT, OUTPUT_NORM

if TYPE_CHECKING:  # the tools check models without the compiled engine
    from fomoe_io._cpu import Matrix, Rows
    from fomoe_io.cpu.recorder import Activation, Recorder
    from fomoe_io.cpu.weights import Weights

NORMALISE, SCALE = True, 1.0
"""Both architectures make the weights of a token's experts sum 1 (norm_topk_prob), and scale them no further."""


def record_attention(
    p: Recorder, w: Weights, s: Shape, prefix: str, x: Rows, table: Rows, *, norm: str, gated: bool
) -> None:
    """x += W_o (softmax(q k^T / sqrt(d)) v [* sigmoid(gate)]) with normalised, rotated q and k (GQA)."""
    d, heads, kv_heads = s.head_columns, s.heads, s.kv_heads
    stride = 2 * d if gated else d
    w_query, w_key, w_value = _query_key_value(w, s, prefix, heads * stride, kv_heads * d)
    biases = _biases(w, prefix, heads * stride, kv_heads * d)
    w_output = w.matrix(f"{prefix}.attn_output.weight", heads * d, s.columns)
    norm_weight = w.vector(f"{prefix}.{norm}.weight", (s.columns,))
    query_norm = w.vector(f"{prefix}.attn_q_norm.weight", (d,))
    key_norm = w.vector(f"{prefix}.attn_k_norm.weight", (d,))

    query, key, value = p.rows("query", heads * stride), p.rows("key", kv_heads * d), p.rows("value", kv_heads * d)
    attended = p.rows("attended", heads * d)
    key_cache = p.state.take(kv_heads * p.context_tokens * d, zeroed=False)
    value_cache = p.state.take(kv_heads * p.context_tokens * d, zeroed=False)

    h = p.norm(x, norm_weight, s.epsilon, name="normed", feeds=[w_query, w_key, w_value])
    p.mat_mul([(w_query, h, query), (w_key, h, key), (w_value, h, value)])
    p.program.kv(
        query, key, value, table, query_norm, key_norm, key_cache, value_cache, p.context_tokens,
        heads, kv_heads, d, stride, s.rotated, s.epsilon, biases,
    )  # fmt: skip
    p.program.attention(query, attended, key_cache, value_cache, p.context_tokens, heads, kv_heads, d, stride, gated)
    p.mat_mul_add(w_output, p.convert(attended, name="attended", feeds=[w_output]), x)


def _parts(queries: int, keys: int) -> dict[str, slice]:
    """Rows of query, key and value in a matrix that holds all three."""
    return {
        "q": slice(0, queries),
        "k": slice(queries, queries + keys),
        "v": slice(queries + keys, queries + 2 * keys),
    }


def _query_key_value(w: Weights, s: Shape, prefix: str, queries: int, keys: int) -> list[Matrix]:
    parts, fused = _parts(queries, keys), f"{prefix}.attn_qkv.weight"
    if fused in w:
        return [w.matrix(fused, s.columns, queries + 2 * keys, part) for part in parts.values()]
    return [w.matrix(f"{prefix}.attn_{n}.weight", s.columns, part.stop - part.start) for n, part in parts.items()]


def _biases(w: Weights, prefix: str, queries: int, keys: int) -> list[Any]:
    """Of query, key and value; None for those without."""
    parts, fused = _parts(queries, keys), f"{prefix}.attn_qkv.bias"
    if fused in w:
        return [w.vector(fused, (queries + 2 * keys,), part) for part in parts.values()]
    names = {f"{prefix}.attn_{n}.bias": part.stop - part.start for n, part in parts.items()}
    return [w.vector(name, (length,)) if name in w else None for name, length in names.items()]


@dataclass(frozen=True, slots=True)
class _SharedExpert:
    gate: Matrix
    up: Matrix
    down: Matrix
    scalar: Matrix


def _shared_expert(w: Weights, s: Shape, prefix: str) -> _SharedExpert | None:
    if not s.shared_hidden:
        return None
    return _SharedExpert(
        w.matrix(f"{prefix}.ffn_gate_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_up_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_down_shexp.weight", s.shared_hidden, s.columns),
        w.matrix(f"{prefix}.ffn_gate_inp_shexp.weight", s.columns, 1),
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
        feeds += [shared.gate, shared.up, shared.scalar]
    h = p.norm(
        x, w.vector(f"{prefix}.{norm}.weight", (s.columns,)), s.epsilon, name="normed", feeds=feeds, types=expert_inputs
    )
    logits, ids, weights = p.rows("router_logits", s.experts), p.rows("experts", s.used), p.rows("weights", s.used)
    products = [(router, h, logits)]
    if shared:
        products.append((shared.scalar, h, p.rows("shared_scalar", 1)))
    p.mat_mul(products)
    p.program.route(logits, ids, weights, layer, s.experts, s.used, NORMALISE, SCALE)
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
            w.vector(f"{following}.{norm}.weight", (s.columns,)),
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
    return y, scalar


def record_embedding(p: Recorder, w: Weights, s: Shape, files: list[int]) -> Rows:
    """The residual stream, starting as the tokens' embeddings."""
    x = p.rows("residual", s.columns)
    matrix, file, offset = w.embedding(s.columns, s.vocabulary)
    p.embed(matrix, x, file=-1 if file < 0 else files[file], offset=offset)
    return x


def record_logits(p: Recorder, w: Weights, s: Shape, x: Rows) -> None:
    """logits = W_output norm(x), for the positions that want them."""
    output = w.matrix(EMBEDDING if w.tied else OUTPUT, s.columns, s.vocabulary)
    norm = w.vector(OUTPUT_NORM, (s.columns,))
    p.logits(output, p.norm(x, norm, s.epsilon, name="final", feeds=[output], of_outputs=True))
