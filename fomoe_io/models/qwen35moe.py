"""Qwen3.5-MoE: three gated delta-rule layers to one gated attention layer, each followed by experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_io._cpu import Rows
from fomoe_io.cpu.recorder import Recorder
from fomoe_io.cpu.weights import Weights
from fomoe_io.errors import FormatError
from fomoe_io.models.blocks import (
    Metadata,
    Shape,
    record_attention,
    record_embedding,
    record_experts,
    record_logits,
)


def _full_attention(m: Metadata, layers: int) -> tuple[bool, ...]:
    """Which layers are full attention: the list of newer converters wins over the interval."""
    recurrent = m.get("attention.recurrent_layers")
    if recurrent is not None:
        if len(recurrent) < layers:
            raise FormatError(f"attention.recurrent_layers has {len(recurrent)} entries for {layers} layers")
        return tuple(not r for r in list(recurrent)[:layers])
    interval = m.integer("full_attention_interval", 4, most=4096)
    return tuple((i + 1) % interval == 0 for i in range(layers))


def shape_of(metadata: Mapping[str, Any]) -> Shape:
    """The model's sizes, without its draft (MTP) blocks; FormatError when a key is missing or absurd."""
    m = Metadata(metadata)
    blocks = m.integer("block_count", most=4096)
    layers = blocks - m.integer("nextn_predict_layers", 0, least=0, most=blocks - 1)
    heads = m.integer("attention.head_count", most=4096)
    head_columns = m.integer("attention.key_length", most=4096)
    if m.integer("attention.value_length", head_columns, most=4096) != head_columns:
        raise FormatError("attention.value_length differs from key_length, which no qwen35moe model has")
    key_heads, value_heads = m.integer("ssm.group_count", most=4096), m.integer("ssm.time_step_rank", most=4096)
    state_columns = m.integer("ssm.state_size", most=4096)
    if value_heads % key_heads or m.integer("ssm.inner_size") != value_heads * state_columns:
        raise FormatError(
            f"ssm sizes do not fit: group_count {key_heads}, time_step_rank {value_heads}, "
            f"state_size {state_columns}, inner_size {m.get('ssm.inner_size')}"
        )
    kv_heads = m.integer("attention.head_count_kv", heads, most=heads)
    if heads % kv_heads:
        raise FormatError(f"attention.head_count {heads} is no multiple of head_count_kv {kv_heads}")
    return Shape(
        layers=layers,
        columns=m.integer("embedding_length"),
        vocabulary=m.vocabulary(),
        context_tokens=m.integer("context_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_columns=head_columns,
        rotated=m.integer("rope.dimension_count", head_columns, most=head_columns),
        rope_base=m.number("rope.freq_base", 1e7),
        epsilon=m.number("attention.layer_norm_rms_epsilon"),
        experts=m.integer("expert_count", most=65535),
        used=m.integer("expert_used_count", most=256),
        hidden=m.integer("expert_feed_forward_length"),
        shared_hidden=m.integer("expert_shared_feed_forward_length", 0, least=0),
        expert_scale=m.number("expert_weights_scale", 1.0) if m.get("expert_weights_scale") else 1.0,
        full_attention=_full_attention(m, layers),
        key_heads=key_heads,
        value_heads=value_heads,
        state_columns=state_columns,
        conv_taps=m.integer("ssm.conv_kernel", most=64),
    )


def _record_delta(p: Recorder, w: Weights, s: Shape, prefix: str, x: Rows) -> None:
    """x += W_out norm(o) * silu(z): the gated delta rule over a causal convolution of q, k and v."""
    keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
    channels = 2 * keys + values
    w_qkv = w.matrix(f"{prefix}.attn_qkv.weight", s.columns, channels)
    w_gate = w.matrix(f"{prefix}.attn_gate.weight", s.columns, values)
    w_beta = w.matrix(f"{prefix}.ssm_beta.weight", s.columns, s.value_heads)
    w_alpha = w.matrix(f"{prefix}.ssm_alpha.weight", s.columns, s.value_heads)
    w_out = w.matrix(f"{prefix}.ssm_out.weight", values, s.columns)
    qkv, convolved, gate = p.rows("qkv", channels), p.rows("convolved", channels), p.rows("gate", values)
    beta, alpha, mixed = p.rows("beta", s.value_heads), p.rows("alpha", s.value_heads), p.rows("mixed", values)

    h = p.norm(
        x, w.vector(f"{prefix}.attn_norm.weight", s.columns), s.epsilon, name="normed",
        feeds=[w_qkv, w_gate, w_beta, w_alpha],
    )  # fmt: skip
    p.mat_mul([(w_qkv, h, qkv), (w_gate, h, gate), (w_beta, h, beta), (w_alpha, h, alpha)])
    conv_state = p.state.take((s.conv_taps - 1) * channels, zeroed=True)
    conv_weight = w.vector(f"{prefix}.ssm_conv1d.weight", s.conv_taps * channels)
    p.program.conv(qkv, convolved, conv_weight, conv_state, s.conv_taps)
    delta_state = p.state.take(s.value_heads * s.state_columns**2, zeroed=True)
    p.program.delta(
        convolved, beta, alpha, gate, mixed,
        w.vector(f"{prefix}.ssm_a", s.value_heads), w.vector(f"{prefix}.ssm_dt.bias", s.value_heads),
        w.vector(f"{prefix}.ssm_norm.weight", s.state_columns), delta_state,
        s.key_heads, s.value_heads, s.state_columns, False, s.epsilon,
    )  # fmt: skip
    p.mat_mul_add(w_out, p.convert(mixed, name="mixed", feeds=[w_out]), x)


def build(p: Recorder, w: Weights, s: Shape, expert_inputs: Mapping[int, tuple[int, int]], files: list[int]) -> None:
    """Record the model; see `qwen3moe.build` for the parameters."""
    x = record_embedding(p, w, s, files)
    table = p.rows("rope", s.rotated)
    p.program.rope_table(table, s.rope_base, s.rotated)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.full_attention[layer]:
            record_attention(p, w, s, prefix, x, table, norm="attn_norm", gated=True)
        else:
            _record_delta(p, w, s, prefix, x)
        record_experts(p, w, s, layer, x, norm="post_attention_norm", expert_inputs=expert_inputs[layer])
    record_logits(p, w, s, x)
