"""Qwen3-MoE: attention with normalised, fully rotated heads; softmax top-k experts, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_io.cpu.recorder import Recorder
from fomoe_io.cpu.weights import Weights
from fomoe_io.models.blocks import (
    Metadata,
    Shape,
    record_attention,
    record_embedding,
    record_experts,
    record_logits,
)


def shape_of(metadata: Mapping[str, Any]) -> Shape:
    """The model's sizes; FormatError when a key is missing or absurd."""
    m = Metadata(metadata)
    columns, heads = m.integer("embedding_length"), m.integer("attention.head_count", most=4096)
    layers = m.integer("block_count", most=4096)
    head_columns = m.integer("attention.key_length", columns // heads, most=4096)
    return Shape(
        layers=layers,
        columns=columns,
        vocabulary=m.vocabulary(),
        context_tokens=m.integer("context_length"),
        heads=heads,
        kv_heads=m.integer("attention.head_count_kv", heads, most=heads),
        head_columns=head_columns,
        rotated=m.integer("rope.dimension_count", head_columns, most=head_columns),
        rope_base=m.number("rope.freq_base", 1e6),
        epsilon=m.number("attention.layer_norm_rms_epsilon"),
        experts=m.integer("expert_count", most=65535),
        used=m.integer("expert_used_count", most=256),
        hidden=m.integer("expert_feed_forward_length"),
        shared_hidden=0,
        expert_scale=m.number("expert_weights_scale", 1.0) if m.get("expert_weights_scale") else 1.0,
        full_attention=(True,) * layers,
    )


def build(p: Recorder, w: Weights, s: Shape, expert_inputs: Mapping[int, tuple[int, int]], files: list[int]) -> None:
    """Record the model.

    Parameters
    ----------
    p : Recorder
    w : Weights
    s : Shape
    expert_inputs : mapping of int to (int, int)
        Per layer the activation types that the routed experts' gate and up matrices read.
    files : list of int
        Descriptors of the store's files (token embeddings are read a row at a time).
    """
    x = record_embedding(p, w, s, files)
    table = p.rows("rope", s.rotated)
    p.program.rope_table(table, s.rope_base, s.rotated)
    for layer in range(s.layers):
        record_attention(p, w, s, f"blk.{layer}", x, table, norm="attn_norm", gated=False)
        record_experts(p, w, s, layer, x, norm="ffn_norm", expert_inputs=expert_inputs[layer])
    record_logits(p, w, s, x)
