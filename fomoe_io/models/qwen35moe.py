"""Qwen3.5-MoE: three gated delta-rule layers to one gated attention layer, each followed by experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.models import tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.blocks import record_attention, record_embedding, record_experts, record_logits
from fomoe_io.models.keys import Keys
from fomoe_io.models.reading import common_sizes, shared_hidden
from fomoe_io.models.recorder import Delta, Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, vector

if TYPE_CHECKING:
    from fomoe_io.storage.gguf import TensorInfo


def _full_attention(m: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers are full attention: the list of newer converters wins over the interval."""
    recurrent = m.layer_flags("attention.recurrent_layers", layers)
    if recurrent is not None:
        return tuple(not r for r in recurrent)
    interval = m.integer("full_attention_interval", 4, least=1, most=4096)
    return tuple((i + 1) % interval == 0 for i in range(layers))


def _check_sections(m: Keys, rotated: int) -> None:
    """Every pair of a head turns with the text's position, whichever of time, height and width it is given to.

    The sections are counted in turns (time, height, width); a pair beyond all of them would not turn at all.
    """
    sections = m.integers("rope.dimension_sections", 4)
    if sections is None:
        return
    total = sum(sections)
    turning = total > 0 and min(sections) >= 0
    if not turning or any(j % total >= 3 * sections[j % total % 3] for j in range(rotated // 2)):
        raise FormatError(
            f"metadata key {m.name('rope.dimension_sections')} is {sections}, which leaves some of the "
            f"{rotated // 2} pairs of a head without a position"
        )


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes, without its draft (MTP) blocks; FormatError when a key is missing or absurd."""
    blocks = m.integer("block_count", least=1, most=4096)
    layers = blocks - m.integer("nextn_predict_layers", 0, most=blocks - 1)
    full_attention = _full_attention(m, layers)
    value_heads, state_columns = (m.integer(f"ssm.{key}", most=4096) for key in ("time_step_rank", "state_size"))
    if m.integer("ssm.inner_size") != value_heads * state_columns:
        raise FormatError(
            f"ssm sizes do not fit: time_step_rank {value_heads}, state_size {state_columns}, "
            f"inner_size {m.integer('ssm.inner_size')}"
        )
    sizes = common_sizes(m, full_attention)
    _check_sections(m, sizes["rotated"])
    return Shape(
        layers=layers,
        blocks=blocks,
        full_attention=full_attention,
        shared_hidden=shared_hidden(m, resident),
        key_heads=m.integer("ssm.group_count", most=4096),
        value_heads=value_heads,
        state_columns=state_columns,
        conv_taps=m.integer("ssm.conv_kernel", most=64),
        **sizes,
    )


def _delta_tensors(s: Shape, prefix: str) -> Iterator[Tensor]:
    keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
    yield vector(f"{prefix}.attn_norm.weight", s.columns)
    yield Tensor(f"{prefix}.attn_qkv.weight", (s.columns, 2 * keys + values))
    yield Tensor(f"{prefix}.attn_gate.weight", (s.columns, values))
    yield Tensor(f"{prefix}.ssm_beta.weight", (s.columns, s.value_heads))
    yield Tensor(f"{prefix}.ssm_alpha.weight", (s.columns, s.value_heads))
    yield vector(f"{prefix}.ssm_conv1d.weight", s.conv_taps, 2 * keys + values)
    yield vector(f"{prefix}.ssm_a", s.value_heads)
    yield vector(f"{prefix}.ssm_dt.bias", s.value_heads)
    yield vector(f"{prefix}.ssm_norm.weight", s.state_columns)
    yield Tensor(f"{prefix}.ssm_out.weight", (values, s.columns))


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with.  Biases of query, key and value are refused: llama.cpp would leave them out."""
    yield from tensors.ends(s)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.full_attention[layer]:
            yield from tensors.attention(s, prefix, names, gated=True, biased=False)
        else:
            yield from _delta_tensors(s, prefix)
        yield from tensors.experts(s, prefix, "post_attention_norm")


def _record_delta(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, prefix: str, x: Rows
) -> None:
    """x += W_out norm(o) * silu(z): the gated delta rule over a causal convolution of q, k and v."""
    keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
    channels = 2 * keys + values
    w_qkv = w.matrix(f"{prefix}.attn_qkv.weight", s.columns, channels)
    w_gate = w.matrix(f"{prefix}.attn_gate.weight", s.columns, values)
    w_beta = w.matrix(f"{prefix}.ssm_beta.weight", s.columns, s.value_heads)
    w_alpha = w.matrix(f"{prefix}.ssm_alpha.weight", s.columns, s.value_heads)
    w_out = w.matrix(f"{prefix}.ssm_out.weight", values, s.columns)
    op = Delta(
        key_heads=s.key_heads,
        value_heads=s.value_heads,
        head_columns=s.state_columns,
        grouped=False,
        epsilon=s.epsilon,
        decay_rate=w.vector(f"{prefix}.ssm_a", (s.value_heads,)),
        decay_bias=w.vector(f"{prefix}.ssm_dt.bias", (s.value_heads,)),
        norm=w.vector(f"{prefix}.ssm_norm.weight", (s.state_columns,)),
    )
    qkv, gate = p.rows("qkv", channels), p.rows("gate", values)
    beta, alpha = p.rows("beta", s.value_heads), p.rows("alpha", s.value_heads)
    norm = w.vector(f"{prefix}.attn_norm.weight", (s.columns,))
    h = p.norm(x, norm, s.epsilon, name="normed", feeds=[w_qkv, w_gate, w_beta, w_alpha])
    p.mat_mul([(w_qkv, h, qkv), (w_gate, h, gate), (w_beta, h, beta), (w_alpha, h, alpha)])
    filters = w.vector(f"{prefix}.ssm_conv1d.weight", (s.conv_taps, channels))
    convolved = p.conv(qkv, filters, s.conv_taps, name="convolved")
    mixed = p.delta(convolved, beta, alpha, gate, op, name="mixed")
    p.mat_mul_add(w_out, p.convert(mixed, name="mixed", feeds=[w_out]), x)


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    x = record_embedding(p, s)
    table = p.rope_table(s.rope)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.full_attention[layer]:
            record_attention(p, w, s, prefix, x, table, norm="attn_norm", gated=True)
        else:
            _record_delta(p, w, s, prefix, x)
        record_experts(p, w, s, layer, x, norm="post_attention_norm")
    record_logits(p, w, s, x)


ARCHITECTURE = Architecture(
    "qwen35moe",
    shape_of,
    tensors_of,
    build,
    computed=frozenset(
        {
            "attention.recurrent_layers", "expert_shared_feed_forward_length", "full_attention_interval",
            "nextn_predict_layers", "rope.dimension_sections", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size",
            "ssm.state_size", "ssm.time_step_rank",
        }
    ),
)  # fmt: skip
