"""MiniMax-M2: queries and keys normalised over all their heads together; experts chosen by sigmoid and a bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.models import tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.blocks import record_attention, record_layers
from fomoe_io.models.reading import common_sizes, score_of
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, vector

if TYPE_CHECKING:
    from fomoe_io.models.keys import Keys
    from fomoe_io.storage.gguf import TensorInfo


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes; FormatError when a key is missing or absurd."""
    layers = m.integer("block_count", least=1, most=4096)
    full_attention = (True,) * layers
    sizes = common_sizes(m, full_attention)
    sizes["hidden"] = m.integer("feed_forward_length", least=1)  # and not expert_feed_forward_length: as llama.cpp
    return Shape(
        layers=layers,
        blocks=layers,
        full_attention=full_attention,
        shared_hidden=0,
        norms_whole_rows=True,
        score=score_of(m),
        **sizes,
    )


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with."""
    yield from tensors.ends(s, may_tie=False)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        yield from tensors.attention(s, prefix, names)
        yield from tensors.experts(s, prefix, "ffn_norm")
        yield vector(f"{prefix}.exp_probs_b.bias", s.experts)


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    table = p.rope_table(s.rope)
    record_layers(p, w, s, lambda layer, x: record_attention(p, w, s, f"blk.{layer}", x, table), norm="ffn_norm")


ARCHITECTURE = Architecture(
    "minimax-m2",
    shape_of,
    tensors_of,
    build,
    computed=frozenset({"expert_gating_func"}),
    ignored=frozenset({"expert_weights_norm"}),
)
