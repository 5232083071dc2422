"""Qwen3.5-MoE: three gated delta-rule layers to one gated attention layer, each followed by experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.models import delta, tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.keys import Keys
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor

if TYPE_CHECKING:
    from fomoe_io.storage.gguf import TensorInfo


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
    """The model's sizes; FormatError when a key is missing or absurd."""
    s = delta.mixed_shape(m, resident)
    _check_sections(m, s.rotated)
    return s


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with.  Biases of query, key and value are refused: llama.cpp would leave them out."""
    yield from tensors.ends(s)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        if s.full_attention[layer]:
            yield from tensors.attention(s, prefix, names, gated=True)
        else:
            yield from delta.delta_tensors(s, prefix, ())
        yield from tensors.experts(s, prefix, "post_attention_norm")


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    delta.record_mixed(p, w, s, grouped=False)


ARCHITECTURE = Architecture("qwen35moe", shape_of, tensors_of, build, computed=delta.KEYS | {"rope.dimension_sections"})
