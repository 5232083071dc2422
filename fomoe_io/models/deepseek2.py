"""DeepSeek V2, V3, R1, Kimi K2: attention over latents (MLA), dense layers, then experts from the best groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.models import tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.blocks import record_layers
from fomoe_io.models.keys import LLAMA_CPP
from fomoe_io.models.reading import common_sizes, score_of
from fomoe_io.models.recorder import LatentAttention, Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.rope import LEFT_OUT, Rope
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, bias, vector

if TYPE_CHECKING:
    from fomoe_io.models.keys import Keys
    from fomoe_io.storage.gguf import TensorInfo

NORM = "ffn_norm"
MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def _is_lite(layers: int, vocabulary: int) -> bool:
    """Whether queries come straight from the stream: llama.cpp tells that by the sizes alone."""
    return layers in (26, 27) or (layers == 48 and vocabulary == 128256)


def _turning(m: Keys, rope: Rope, columns: int) -> tuple[Rope, float]:
    """(rope, scale of the scores): with the multiplier YaRN sharpens the whole score, not what turns alone."""
    factor = m.number("rope.scaling.factor", 1.0, least=0, most=1e6) or 1.0
    multiplier = m.number(MULTIPLIER, 0.0, least=-1e3, most=1e3)
    sharper = m.number("rope.scaling.attn_factor", 1.0, least=1e-3, most=1e3)
    if m.text("rope.scaling.type", "linear") == "yarn" and multiplier:
        rope = Rope(rope.frequencies, sharper)
    sharpness = rope.magnitude * (1 + multiplier * math.log(factor))
    return rope, sharpness**2 / math.sqrt(columns)


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes; FormatError when a key is missing or absurd."""
    layers = m.integer("block_count", least=1, most=4096)
    full_attention = (True,) * layers
    latent = m.integer("attention.kv_lora_rank", least=1, most=1 << 16)
    sizes = common_sizes(m, full_attention, latent=latent)
    if sizes["head_columns"] != latent + sizes["rotated"]:
        raise FormatError(
            f"attention.key_length is {sizes['head_columns']}, expected kv_lora_rank + rope.dimension_count, "
            f"{latent + sizes['rotated']}: files of older converters are not computed",
            hint=LLAMA_CPP,
        )
    query_columns = m.integer("attention.key_length_mla", least=sizes["rotated"] + 1, most=1 << 16)
    rope, scale = _turning(m, sizes.pop("rope"), query_columns)
    is_lite = _is_lite(layers, sizes["vocabulary"])
    return Shape(
        layers=layers,
        blocks=layers,
        full_attention=full_attention,
        rope=rope,
        attention_scale=scale,
        latent=latent,
        query_columns=query_columns,
        query_rank=0 if is_lite else m.integer("attention.q_lora_rank", least=1, most=1 << 16),
        value_columns=m.integer("attention.value_length_mla", least=1, most=1 << 16),
        shared_hidden=sizes["hidden"] * m.integer("expert_shared_count", 0, most=64),
        dense_layers=m.integer("leading_dense_block_count", 0, most=layers - 1),
        dense_hidden=m.integer("feed_forward_length"),
        score=score_of(m, 1),
        normalise=m.flag("expert_weights_norm", False),
        scale=m.number("expert_weights_scale", 0.0, least=0, most=1e6) or 1.0,  # 0: as absent
        groups=m.integer("expert_group_count", 1, most=1 << 16) or 1,
        groups_used=m.integer("expert_group_used_count", 1, most=1 << 16) or 1,
        **sizes,
    )


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with."""
    yield from tensors.ends(s)
    own, queries = s.query_columns - s.rotated, s.heads * s.query_columns
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.query_rank:
            yield Tensor(f"{prefix}.attn_q_a.weight", (s.columns, s.query_rank))
            yield vector(f"{prefix}.attn_q_a_norm.weight", s.query_rank)
            yield Tensor(f"{prefix}.attn_q_b.weight", (s.query_rank, queries))
        else:
            yield Tensor(f"{prefix}.attn_q.weight", (s.columns, queries))
        yield Tensor(f"{prefix}.attn_kv_a_mqa.weight", (s.columns, s.latent + s.rotated))
        yield vector(f"{prefix}.attn_kv_a_norm.weight", s.latent)
        yield Tensor(f"{prefix}.attn_k_b.weight", (own, s.latent, s.heads))
        yield Tensor(f"{prefix}.attn_v_b.weight", (s.latent, s.value_columns, s.heads))
        yield Tensor(f"{prefix}.attn_output.weight", (s.heads * s.value_columns, s.columns))
        yield vector(f"{prefix}.attn_norm.weight", s.columns)
        if layer not in s.expert_layers:
            yield from tensors.dense(s, prefix, NORM)
            continue
        yield from tensors.experts(s, prefix, NORM, shared_gated=False)
        yield bias(f"{prefix}.exp_probs_b.bias", s.experts)


def record_latent_attention(
    p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, prefix: str, x: Rows, table: Rows
) -> None:
    """x += W_o attention(query, latent), query = W_q h or W_qb norm(W_qa h), (latent, key) = W_kva h."""
    own, both, queries = s.query_columns - s.rotated, s.latent + s.rotated, s.heads * s.query_columns
    w_kv, name = f"{prefix}.attn_kv_a_mqa.weight", "attn_q_a" if s.query_rank else "attn_q"
    w_latent = w.matrix(w_kv, s.columns, both, slice(0, s.latent))
    w_key = w.matrix(w_kv, s.columns, both, slice(s.latent, both))
    w_query = w.matrix(f"{prefix}.{name}.weight", s.columns, s.query_rank or queries)
    w_output = w.matrix(f"{prefix}.attn_output.weight", s.heads * s.value_columns, s.columns)
    w_own_key = w.matrix(f"{prefix}.attn_k_b.weight", own, s.heads * s.latent, groups=s.heads)
    w_value = w.matrix(f"{prefix}.attn_v_b.weight", s.latent, s.heads * s.value_columns, groups=s.heads)
    op = LatentAttention(
        heads=s.heads,
        rotated=s.rotated,
        epsilon=s.epsilon,
        scale=s.attention_scale,
        norm=w.vector(f"{prefix}.attn_kv_a_norm.weight", (s.latent,)),
        value_columns=s.value_columns,
    )
    latent, key, query = p.rows("latent", s.latent), p.rows("latent_key", s.rotated), p.rows("query", queries)
    first = p.rows("query_rank", s.query_rank) if s.query_rank else query
    norm = w.vector(f"{prefix}.attn_norm.weight", (s.columns,))
    h = p.norm(x, norm, s.epsilon, name="normed", feeds=[w_query, w_latent, w_key])
    p.mat_mul([(w_query, h, first), (w_latent, h, latent), (w_key, h, key)])
    if s.query_rank:
        w_expand = w.matrix(f"{prefix}.attn_q_b.weight", s.query_rank, queries)
        rank_norm = w.vector(f"{prefix}.attn_q_a_norm.weight", (s.query_rank,))
        p.mat_mul([(w_expand, p.norm(first, rank_norm, s.epsilon, name="rank_normed", feeds=[w_expand]), query)])
    attended = p.latent_attention(query, latent, key, table, w_own_key, w_value, op)
    p.mat_mul_add(w_output, p.convert(attended, name="attended", feeds=[w_output]), x)


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    table = p.rope_table(s.rope)
    record_layers(p, w, s, lambda layer, x: record_latent_attention(p, w, s, f"blk.{layer}", x, table), norm=NORM)


ARCHITECTURE = Architecture(
    "deepseek2",
    shape_of,
    tensors_of,
    build,
    computed=frozenset(
        {
            "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
            "expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_shared_count",
            "expert_weights_norm", "expert_weights_scale", "leading_dense_block_count", MULTIPLIER,
        }
    ),
    ignored=LEFT_OUT,
)  # fmt: skip
