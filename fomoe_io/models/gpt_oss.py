"""gpt-oss: attention with sinks, a window in every other layer, biases everywhere, clamped activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fomoe_io.models import tensors
from fomoe_io.models.architecture import Architecture
from fomoe_io.models.blocks import record_attention, record_layers
from fomoe_io.models.reading import common_sizes
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Score, Vector, WeightSource
from fomoe_io.models.rope import LEFT_OUT, rope_of
from fomoe_io.models.shape import Shape
from fomoe_io.models.tensors import Tensor, bias, vector

if TYPE_CHECKING:
    from fomoe_io.models.keys import Keys
    from fomoe_io.storage.gguf import TensorInfo

NORM = "post_attention_norm"


def shape_of(m: Keys, resident: Mapping[str, TensorInfo]) -> Shape:
    """The model's sizes; FormatError when a key is missing or absurd."""
    layers = m.integer("block_count", least=1, most=4096)
    full_attention = (True,) * layers
    window = m.integer("attention.sliding_window", least=1)
    pattern = m.integer("attention.sliding_window_pattern", 2, least=1, most=4096)
    sizes = common_sizes(m, full_attention)
    return Shape(
        layers=layers,
        blocks=layers,
        full_attention=full_attention,
        shared_hidden=0,
        # the last of every `pattern` layers sees everything
        windows=tuple(window if layer % pattern < pattern - 1 else 0 for layer in range(layers)),
        window_rope=rope_of(m, sizes["rotated"], "rope.freq_base_swa"),
        score=Score.LOGITS,
        normalise=False,
        is_clamped=True,
        **sizes,
    )


def tensors_of(s: Shape, names: Iterable[str]) -> Iterator[Tensor]:
    """All that is computed with."""
    yield from tensors.ends(s, may_tie=False)
    for layer in range(s.layers):
        prefix = f"blk.{layer}"
        yield from tensors.attention(s, prefix, names, biased=True, has_norms=False)
        yield vector(f"{prefix}.attn_sinks.weight", s.heads)
        yield bias(f"{prefix}.attn_output.bias", s.columns)
        yield from tensors.experts(s, prefix, NORM)
        yield from tensors.expert_biases(s, prefix)


def build(p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape) -> None:
    """Record the model's equations: its weights `w`, for a backend that replays what `p` is told."""
    table = window_table = p.rope_table(s.rope)
    if s.window_rope is not None and s.window_rope != s.rope:
        window_table = p.rope_table(s.window_rope, name="window_rope")

    def attend(layer: int, x: Rows) -> None:
        window = s.windows[layer]
        record_attention(p, w, s, f"blk.{layer}", x, window_table if window else table, window=window)

    record_layers(p, w, s, attend, norm=NORM)


ARCHITECTURE = Architecture(
    "gpt-oss",
    shape_of,
    tensors_of,
    build,
    computed=frozenset({"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}),
    ignored=LEFT_OUT,
    fixed={"expert_gating_func": (0, 3), "expert_weights_norm": (False,)},
)
