"""The gated delta rule, and the sizes of models that mix it with attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.models.blocks import record_attention, record_layers
from fomoe_io.models.keys import Keys
from fomoe_io.models.reading import common_sizes, layers_of, shared_hidden
from fomoe_io.models.recorder import Delta, Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, vector

if TYPE_CHECKING:
    from fomoe_io.storage.gguf import TensorInfo

KEYS = frozenset(
    {
        "attention.recurrent_layers", "expert_shared_feed_forward_length", "full_attention_interval",
        "nextn_predict_layers", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size",
        "ssm.time_step_rank",
    }
)  # fmt: skip
"""Of an architecture's namespace: what `mixed_shape` reads beside the keys of all."""


def _full_attention(m: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers are full attention: the list of newer converters wins over the interval."""
    recurrent = m.layer_flags("attention.recurrent_layers", layers)
    if recurrent is not None:
        return tuple(not r for r in recurrent)
    interval = m.integer("full_attention_interval", 4, least=1, most=4096)
    return tuple((i + 1) % interval == 0 for i in range(layers))


def mixed_shape(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes, without its draft (MTP) blocks; FormatError when a key is missing or absurd."""
    layers, blocks = layers_of(m)
    full_attention = _full_attention(m, layers)
    value_heads, state_columns = (m.integer(f"ssm.{key}", most=4096) for key in ("time_step_rank", "state_size"))
    if m.integer("ssm.inner_size") != value_heads * state_columns:
        raise FormatError(
            f"ssm sizes do not fit: time_step_rank {value_heads}, state_size {state_columns}, "
            f"inner_size {m.integer('ssm.inner_size')}"
        )
    return Shape(
        layers=layers,
        blocks=blocks,
        full_attention=full_attention,
        shared_hidden=shared_hidden(m, resident),
        key_heads=m.integer("ssm.group_count", most=4096),
        value_heads=value_heads,
        state_columns=state_columns,
        conv_taps=m.integer("ssm.conv_kernel", most=64),
        **common_sizes(m, full_attention),
    )


def delta_tensors(s: Shape, prefix: str, names: Iterable[str]) -> Iterator[Tensor]:
    """Of one layer; fused where the model has that."""
    keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
    yield vector(f"{prefix}.attn_norm.weight", s.columns)
    if f"{prefix}.ssm_in.weight" in names:
        yield Tensor(f"{prefix}.ssm_in.weight", (s.columns, 2 * keys + 2 * values))
    else:
        yield Tensor(f"{prefix}.attn_qkv.weight", (s.columns, 2 * keys + values))
        yield Tensor(f"{prefix}.attn_gate.weight", (s.columns, values))
    if f"{prefix}.ssm_ba.weight" in names:
        yield Tensor(f"{prefix}.ssm_ba.weight", (s.columns, 2 * s.value_heads))
    else:
        yield Tensor(f"{prefix}.ssm_beta.weight", (s.columns, s.value_heads))
        yield Tensor(f"{prefix}.ssm_alpha.weight", (s.columns, s.value_heads))
    yield vector(f"{prefix}.ssm_conv1d.weight", s.conv_taps, 2 * keys + values)
    yield vector(f"{prefix}.ssm_a", s.value_heads)
    yield vector(f"{prefix}.ssm_dt.bias", s.value_heads)
    yield vector(f"{prefix}.ssm_norm.weight", s.state_columns)
    yield Tensor(f"{prefix}.ssm_out.weight", (values, s.columns))


def record_delta(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, prefix: str, x: Rows, *, grouped: bool
) -> None:
    """x += W_out norm(o) * silu(z): the gated delta rule over a causal convolution of q, k and v."""
    keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
    w_out = w.matrix(f"{prefix}.ssm_out.weight", values, s.columns)
    op = Delta(
        key_heads=s.key_heads,
        value_heads=s.value_heads,
        head_columns=s.state_columns,
        grouped=grouped,
        epsilon=s.epsilon,
        decay_rate=w.vector(f"{prefix}.ssm_a", (s.value_heads,)),
        decay_bias=w.vector(f"{prefix}.ssm_dt.bias", (s.value_heads,)),
        norm=w.vector(f"{prefix}.ssm_norm.weight", (s.state_columns,)),
    )
    qkv, gate, beta, alpha = _record_inputs(p, w, s, prefix, x)
    filters = w.vector(f"{prefix}.ssm_conv1d.weight", (s.conv_taps, 2 * keys + values))
    convolved = p.conv(qkv, filters, s.conv_taps, name="convolved")
    mixed = p.delta(convolved, beta, alpha, gate, op, name="mixed")
    p.mat_mul_add(w_out, p.convert(mixed, name="mixed", feeds=[w_out]), x)


def record_mixed(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, *, grouped: bool
) -> None:
    """A whole model whose layers are gated attention or the gated delta rule."""
    table = p.rope_table(s.rope)

    def attend(layer: int, x: Rows) -> None:
        if s.full_attention[layer]:
            record_attention(p, w, s, f"blk.{layer}", x, table, gated=True)
        else:
            record_delta(p, w, s, f"blk.{layer}", x, grouped=grouped)

    record_layers(p, w, s, attend, norm="post_attention_norm")


def _record_inputs(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, prefix: str, x: Rows
) -> tuple[Rows, Rows, Rows, Rows]:
    """(q k v, z, beta, alpha) of norm(x).

    `ssm_ba` has the betas of a key head's value heads, then their alphas, and so for each key head; `ssm_in` likewise
    its q, its k, and v and z of its value heads.
    """
    keys, values, heads = s.key_heads * s.state_columns, s.value_heads * s.state_columns, s.value_heads
    qkv, gate = p.rows("qkv", 2 * keys + values), p.rows("gate", values)
    beta, alpha = p.rows("beta", heads), p.rows("alpha", heads)
    outputs = {
        "ssm_in": (p.rows("ssm_in", 2 * keys + 2 * values) if f"{prefix}.ssm_in.weight" in w else None),
        "ssm_ba": (p.rows("ssm_ba", 2 * heads) if f"{prefix}.ssm_ba.weight" in w else None),
    }
    plain = {"attn_qkv": qkv, "attn_gate": gate} if outputs["ssm_in"] is None else {}
    plain |= {"ssm_beta": beta, "ssm_alpha": alpha} if outputs["ssm_ba"] is None else {}
    widths = {
        "attn_qkv": 2 * keys + values, "attn_gate": values, "ssm_beta": heads, "ssm_alpha": heads,
        "ssm_in": 2 * keys + 2 * values, "ssm_ba": 2 * heads,
    }  # fmt: skip
    rows = plain | {name: row for name, row in outputs.items() if row is not None}
    matrices = {name: w.matrix(f"{prefix}.{name}.weight", s.columns, widths[name]) for name in rows}
    norm = w.vector(f"{prefix}.attn_norm.weight", (s.columns,))
    h = p.norm(x, norm, s.epsilon, name="normed", feeds=list(matrices.values()))
    p.mat_mul([(matrices[name], h, row) for name, row in rows.items()])
    d, n, of_key = s.state_columns, s.key_heads, s.value_heads // s.key_heads
    if "ssm_in" in rows:
        fused = rows["ssm_in"]
        p.ungroup(fused, n, 0, d, qkv, 0)
        p.ungroup(fused, n, d, d, qkv, keys)
        p.ungroup(fused, n, 2 * d, of_key * d, qkv, 2 * keys)
        p.ungroup(fused, n, (2 + of_key) * d, of_key * d, gate, 0)
    if "ssm_ba" in rows:
        p.ungroup(rows["ssm_ba"], n, 0, of_key, beta, 0)
        p.ungroup(rows["ssm_ba"], n, of_key, of_key, alpha, 0)
    return qkv, gate, beta, alpha
