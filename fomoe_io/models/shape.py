"""The sizes of a model, and what every architecture's must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_io.errors import FormatError
from fomoe_io.models.recorder import Score
from fomoe_io.models.rope import Rope

MOST_GROUPS = 64
"""csrc/experts/routing.h"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Mixture-of-Experts transformer, from its GGUF metadata.

    `columns` is the width of the residual stream, `hidden` the width of one routed expert, `used` the experts
    a token; `shared_hidden` is 0 without a shared expert.  `blocks` counts draft blocks too, which follow the layers.
    The first `dense_layers` have no experts but one network of `dense_hidden`; `windows` says of each layer how many
    positions its attention sees, 0 for all, and is empty without a window.  Where a `latent` of so many columns stands
    for all keys and values, `head_columns` are its and the turned key's, `query_columns` a head's query's, which comes
    from `query_rank` columns if that is not 0, and `value_columns` a head's value's.  For the others see
    :mod:`fomoe_io.models.recorder`.
    """

    layers: int
    blocks: int
    columns: int
    vocabulary: int
    context_tokens: int
    heads: int
    kv_heads: int
    head_columns: int
    rotated: int
    rope: Rope
    epsilon: float
    experts: int
    used: int
    hidden: int
    shared_hidden: int
    full_attention: tuple[bool, ...]
    key_heads: int = 0
    value_heads: int = 0
    state_columns: int = 0
    conv_taps: int = 0
    dense_layers: int = 0
    dense_hidden: int = 0
    windows: tuple[int, ...] = ()
    window_rope: Rope | None = None
    norms_whole_rows: bool = False
    score: Score = Score.SOFTMAX
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    is_clamped: bool = False
    query_rank: int = 0
    latent: int = 0
    query_columns: int = 0
    value_columns: int = 0
    attention_scale: float = 0.0

    @property
    def expert_layers(self) -> range:
        """Layers that have experts."""
        return range(self.dense_layers, self.layers)

    @property
    def widest_row(self) -> int:
        """Of all rows that the ops make of a token."""
        channels = (2 * self.key_heads + self.value_heads) * self.state_columns
        heads = self.heads * max(self.head_columns, self.query_columns, self.value_columns)
        networks = max(self.hidden, self.shared_hidden, self.dense_hidden)
        return max(self.columns, networks, self.experts, channels, heads, self.query_rank)

    def check(self) -> None:
        """What the kernels take for granted, whatever the architecture.

        Raises
        ------
        FormatError
        """
        needed = ("layers", "columns", "vocabulary", "context_tokens", "heads", "kv_heads", "head_columns", "rotated")
        for name in (*needed, "experts", "used", "hidden"):
            if getattr(self, name) < 1:
                raise FormatError(f"the model has no {name.replace('_', ' ')}: its metadata says 0")
        if self.heads % self.kv_heads:
            raise FormatError(f"attention.head_count {self.heads} is no multiple of head_count_kv {self.kv_heads}")
        if self.rotated % 2 or self.rotated > self.head_columns:
            raise FormatError(
                f"rope.dimension_count is {self.rotated}, expected an even number up to the head size, "
                f"{self.head_columns}"
            )
        if self.used > self.experts:
            raise FormatError(f"expert_used_count {self.used} is more than expert_count {self.experts}")
        self._check_groups()
        if self.dense_layers >= self.layers or (self.dense_layers and not self.dense_hidden):
            raise FormatError(
                f"leading_dense_block_count is {self.dense_layers} of {self.layers} layers, "
                f"of {self.dense_hidden} columns"
            )
        if all(self.full_attention):
            return
        sizes = (self.key_heads, self.value_heads, self.state_columns, self.conv_taps)
        if min(sizes) < 1 or self.value_heads % self.key_heads:
            raise FormatError(
                f"ssm sizes do not fit: group_count {self.key_heads}, time_step_rank {self.value_heads}, "
                f"state_size {self.state_columns}, conv_kernel {self.conv_taps}"
            )

    def _check_groups(self) -> None:
        """Experts come in equal groups, and those that are left have enough for a token."""
        groups, left = self.groups, self.groups_used
        if not 1 <= left <= groups <= MOST_GROUPS or self.experts % groups:
            raise FormatError(f"expert groups do not fit: {left} used of {groups}, {self.experts} experts")
        if self.used > self.experts // groups * left:
            raise FormatError(f"{left} groups of {self.experts // groups} experts have no {self.used} to choose")
