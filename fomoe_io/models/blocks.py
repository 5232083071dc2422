"""What several architectures share: the attention and the expert blocks, the embedding and the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from fomoe_io.models.recorder import (
    LAYERS_AHEAD,
    Activation,
    Attention,
    Experts,
    Matrix,
    Recorder,
    Router,
    Rows,
    Vector,
    WeightSource,
)
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import EMBEDDING, OUTPUT, OUTPUT_NORM


def record_attention(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, prefix: str, x: Rows, table: Rows, *,
    gated: bool = False, window: int = 0,
) -> None:  # fmt: skip
    """x += W_o (softmax(q k^T / sqrt(d)) v [* sigmoid(gate)]) [+ b_o] with [normalised,] rotated q and k (GQA).

    Norms, biases and sinks are used where the model has them.
    """
    d, queries, keys = s.head_columns, s.heads * s.head_columns * (2 if gated else 1), s.kv_heads * s.head_columns
    w_query, w_key, w_value = _query_key_value(w, s, prefix, queries, keys)
    query_bias, key_bias, value_bias = _biases(w, prefix, queries, keys)
    w_output = w.matrix(f"{prefix}.attn_output.weight", s.heads * d, s.columns)
    norm_weight = w.vector(f"{prefix}.attn_norm.weight", (s.columns,))
    op = Attention(
        heads=s.heads,
        gated=gated,
        rotated=s.rotated,
        epsilon=s.epsilon,
        query_norm=_optional(w, f"{prefix}.attn_q_norm.weight", s.heads * d if s.norms_whole_rows else d),
        key_norm=_optional(w, f"{prefix}.attn_k_norm.weight", keys if s.norms_whole_rows else d),
        norms_whole_rows=s.norms_whole_rows,
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=value_bias,
        sinks=_optional(w, f"{prefix}.attn_sinks.weight", s.heads),
        window=window,
    )
    query, key, value = p.rows("query", queries), p.rows("key", keys), p.rows("value", keys)
    h = p.norm(x, norm_weight, s.epsilon, name="normed", feeds=[w_query, w_key, w_value])
    p.mat_mul([(w_query, h, query), (w_key, h, key), (w_value, h, value)])
    attended = p.attention(query, key, value, table, p.kv_cache(s.kv_heads, d, window), op)
    bias = _optional(w, f"{prefix}.attn_output.bias", s.columns)
    p.mat_mul_add(w_output, p.convert(attended, name="attended", feeds=[w_output]), x, bias)


def _optional(w: WeightSource[Matrix, Vector], name: str, *shape: int) -> Vector | None:
    """A small tensor that not every model has."""
    return w.vector(name, shape) if name in w else None


def _parts(queries: int, keys: int) -> dict[str, slice]:
    """Rows of query, key and value in a matrix that holds all three."""
    return {
        "q": slice(0, queries),
        "k": slice(queries, queries + keys),
        "v": slice(queries + keys, queries + 2 * keys),
    }


def _query_key_value(w: WeightSource[Matrix, Vector], s: Shape, prefix: str, queries: int, keys: int) -> list[Matrix]:
    parts, fused = _parts(queries, keys), f"{prefix}.attn_qkv.weight"
    if fused in w:
        return [w.matrix(fused, s.columns, queries + 2 * keys, part) for part in parts.values()]
    return [w.matrix(f"{prefix}.attn_{n}.weight", s.columns, part.stop - part.start) for n, part in parts.items()]


def _biases(w: WeightSource[Matrix, Vector], prefix: str, queries: int, keys: int) -> list[Vector | None]:
    """Of query, key and value; None for those without."""
    parts, fused = _parts(queries, keys), f"{prefix}.attn_qkv.bias"
    if fused in w:
        return [w.vector(fused, (queries + 2 * keys,), part) for part in parts.values()]
    names = {f"{prefix}.attn_{n}.bias": part.stop - part.start for n, part in parts.items()}
    return [_optional(w, name, length) for name, length in names.items()]


@dataclass(frozen=True, slots=True)
class _SharedExpert(Generic[Matrix]):
    gate: Matrix
    up: Matrix
    down: Matrix
    scalar: Matrix | None


def _shared_expert(w: WeightSource[Matrix, Vector], s: Shape, prefix: str) -> _SharedExpert[Matrix] | None:
    if not s.shared_hidden:
        return None
    scalar = f"{prefix}.ffn_gate_inp_shexp.weight"
    return _SharedExpert(
        w.matrix(f"{prefix}.ffn_gate_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_up_shexp.weight", s.columns, s.shared_hidden),
        w.matrix(f"{prefix}.ffn_down_shexp.weight", s.shared_hidden, s.columns),
        w.matrix(scalar, s.columns, 1) if scalar in w else None,
    )


def _router(w: WeightSource[Matrix, Vector], s: Shape, layer: int) -> Router[Vector]:
    return Router(
        s.experts,
        s.used,
        s.score,
        normalise=s.normalise,
        scale=s.scale,
        groups=s.groups,
        groups_used=s.groups_used,
        logit_bias=_optional(w, f"blk.{layer}.ffn_gate_inp.bias", s.experts),
        bias=_optional(w, f"blk.{layer}.exp_probs_b.bias", s.experts),
    )


def _expert_op(w: WeightSource[Matrix, Vector], s: Shape, prefix: str) -> Experts[Vector]:
    return Experts(
        is_clamped=s.is_clamped,
        gate_bias=_optional(w, f"{prefix}.ffn_gate_exps.bias", s.hidden, s.experts),
        up_bias=_optional(w, f"{prefix}.ffn_up_exps.bias", s.hidden, s.experts),
        down_bias=_optional(w, f"{prefix}.ffn_down_exps.bias", s.columns, s.experts),
    )


def record_experts(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, layer: int, x: Rows, *, norm: str
) -> None:
    """x += sum_k w_k expert_k(h) [+ [sigmoid(g . h)] shared(h)], h = norm(x), k and w_k the router's.

    Reads of missing experts start right after routing and run while the shared expert is computed.  What the next
    layers will want is guessed beside this one's own products, so that a drive has it to read when it has read this
    one's.
    """
    prefix = f"blk.{layer}"
    w_router = w.matrix(f"{prefix}.ffn_gate_inp.weight", s.columns, s.experts)
    shared = _shared_expert(w, s, prefix)
    feeds = [w_router]
    if shared:
        feeds += [shared.gate, shared.up]
    norm_weight = w.vector(f"{prefix}.{norm}.weight", (s.columns,))
    logits = p.rows("router_logits", s.experts)
    scalar = p.rows("shared_scalar", 1) if shared and shared.scalar is not None else None
    if shared and shared.scalar is not None:
        feeds.append(shared.scalar)
    h = p.norm(x, norm_weight, s.epsilon, name="normed", feeds=feeds, experts_of=layer)
    products = [(w_router, h, logits)]
    if shared and shared.scalar is not None and scalar is not None:
        products.append((shared.scalar, h, scalar))
    p.mat_mul(products)
    op = _expert_op(w, s, prefix)
    picks = p.route(layer, logits, _router(w, s, layer))
    p.experts_begin(picks, h, op)
    with p.beside():
        for ahead in range(1, min(LAYERS_AHEAD, s.layers - 1 - layer) + 1):
            following = f"blk.{layer + ahead}"
            next_norm = w.vector(f"{following}.{norm}.weight", (s.columns,))
            next_router = w.matrix(f"{following}.ffn_gate_inp.weight", s.columns, s.experts)
            p.lookahead(layer + ahead, ahead, x, next_norm, s.epsilon, next_router, _router(w, s, layer + ahead))
        y = _record_shared(p, s, shared, h) if shared else None
    p.experts_end(picks, h, op, x, y, scalar)
    p.layer_end(layer, x)


def record_dense(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, layer: int, x: Rows, *, norm: str
) -> None:
    """x += W_down(silu(W_gate h) * W_up h), h = norm(x): a layer without experts."""
    prefix = f"blk.{layer}"
    w_gate = w.matrix(f"{prefix}.ffn_gate.weight", s.columns, s.dense_hidden)
    w_up = w.matrix(f"{prefix}.ffn_up.weight", s.columns, s.dense_hidden)
    w_down = w.matrix(f"{prefix}.ffn_down.weight", s.dense_hidden, s.columns)
    norm_weight = w.vector(f"{prefix}.{norm}.weight", (s.columns,))
    gate, up = p.rows("dense_gate", s.dense_hidden), p.rows("dense_up", s.dense_hidden)
    h = p.norm(x, norm_weight, s.epsilon, name="normed", feeds=[w_gate, w_up])
    p.mat_mul([(w_gate, h, gate), (w_up, h, up)])
    p.mat_mul_add(w_down, p.silu_mul(gate, up, name="dense_activation", feeds=[w_down]), x)
    p.layer_end(layer, x)


def _record_shared(
    p: Recorder[Matrix, Vector, Rows], s: Shape, shared: _SharedExpert[Matrix], h: Activation[Rows]
) -> Rows:
    gate, up = p.rows("shared_gate", s.shared_hidden), p.rows("shared_up", s.shared_hidden)
    y = p.rows("shared", s.columns)
    p.mat_mul([(shared.gate, h, gate), (shared.up, h, up)])
    p.mat_mul([(shared.down, p.silu_mul(gate, up, name="shared_activation", feeds=[shared.down]), y)])
    return y


def record_embedding(p: Recorder[Matrix, Vector, Rows], s: Shape) -> Rows:
    """The residual stream, starting as the tokens' embeddings."""
    x = p.rows("residual", s.columns)
    p.embed(x)
    return x


def record_logits(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, x: Rows) -> None:
    """logits = W_output norm(x), for the positions that want them."""
    output = w.matrix(EMBEDDING if w.tied else OUTPUT, s.columns, s.vocabulary)
    norm = w.vector(OUTPUT_NORM, (s.columns,))
    p.logits(output, p.norm(x, norm, s.epsilon, name="final", feeds=[output], of_outputs=True))


def record_layers(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, attend: Callable[[int, Rows], None],
    *, norm: str,
) -> None:  # fmt: skip
    """A whole model: `attend` records a layer's attention, or what stands in its place, over the stream."""
    x = record_embedding(p, s)
    for layer in range(s.layers):
        attend(layer, x)
        record = record_experts if layer in s.expert_layers else record_dense
        record(p, w, s, layer, x, norm=norm)
    record_logits(p, w, s, x)
