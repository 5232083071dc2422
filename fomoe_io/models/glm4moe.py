"""GLM-4.5 to 4.7: dense layers, then experts chosen by sigmoid and a bias, beside a shared expert without a gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.models import tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.blocks import record_attention, record_layers
from fomoe_io.models.reading import common_sizes, layers_of, score_of
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, vector

if TYPE_CHECKING:
    from fomoe_io.models.keys import Keys
    from fomoe_io.storage.gguf import TensorInfo

NORM = "post_attention_norm"


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes, without its draft (MTP) block; FormatError when a key is missing or absurd."""
    layers, blocks = layers_of(m)
    full_attention = (True,) * layers
    sizes = common_sizes(m, full_attention)
    return Shape(
        layers=layers,
        blocks=blocks,
        full_attention=full_attention,
        shared_hidden=sizes["hidden"] * m.integer("expert_shared_count", most=64),
        dense_layers=m.integer("leading_dense_block_count", 0, most=layers - 1),
        dense_hidden=m.integer("feed_forward_length"),
        score=score_of(m, 2),
        normalise=m.flag("expert_weights_norm", False),
        scale=m.number("expert_weights_scale", 0.0, least=0, most=1e6) or 1.0,  # 0: as absent
        **sizes,
    )


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with; GLM-4.5-Air has no norms of queries and keys."""
    yield from tensors.ends(s)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        has_norms = f"{prefix}.attn_q_norm.weight" in names
        yield from tensors.attention(s, prefix, names, biased=True, has_norms=has_norms)
        if layer not in s.expert_layers:
            yield from tensors.dense(s, prefix, NORM)
            continue
        yield from tensors.experts(s, prefix, NORM, shared_gated=False)
        yield vector(f"{prefix}.exp_probs_b.bias", s.experts)


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    table = p.rope_table(s.rope)
    record_layers(p, w, s, lambda layer, x: record_attention(p, w, s, f"blk.{layer}", x, table), norm=NORM)


ARCHITECTURE = Architecture(
    "glm4moe",
    shape_of,
    tensors_of,
    build,
    computed=frozenset(
        {
            "expert_gating_func", "expert_shared_count", "expert_weights_norm", "expert_weights_scale",
            "leading_dense_block_count", "nextn_predict_layers",
        }
    ),
)  # fmt: skip
