"""Qwen3-Next: as Qwen3.5-MoE, but value heads next to each other share a key head, and some projections are fused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.models import delta, tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.rope import LEFT_OUT
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor

if TYPE_CHECKING:
    from fomoe_io.models.keys import Keys
    from fomoe_io.storage.gguf import TensorInfo


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes; FormatError when a key is missing or absurd."""
    return delta.mixed_shape(m, resident)


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with, in the layout of old or of current converters."""
    yield from tensors.ends(s)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.full_attention[layer]:
            yield from tensors.attention(s, prefix, names, gated=True)
        else:
            # betas and alphas are always in one matrix
            yield from delta.delta_tensors(s, prefix, {f"{prefix}.ssm_ba.weight", *names})
        yield from tensors.experts(s, prefix, "post_attention_norm")


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    delta.record_mixed(p, w, s, grouped=True)


ARCHITECTURE = Architecture(
    "qwen3next",
    shape_of,
    tensors_of,
    build,
    computed=delta.KEYS,
    ignored=frozenset({"expert_weights_norm"}) | LEFT_OUT,
)
