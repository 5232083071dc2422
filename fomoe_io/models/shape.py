"""The sizes of a model, and what every architecture's must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_io.errors import FormatError
from fomoe_io.models.rope import Rope


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Mixture-of-Experts transformer, from its GGUF metadata.

    `columns` is the width of the residual stream, `hidden` the width of one routed expert, `used` the experts
    a token; `shared_hidden` is 0 without a shared expert.  `blocks` counts draft blocks too, which follow the layers.
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
        if all(self.full_attention):
            return
        sizes = (self.key_heads, self.value_heads, self.state_columns, self.conv_taps)
        if min(sizes) < 1 or self.value_heads % self.key_heads:
            raise FormatError(
                f"ssm sizes do not fit: group_count {self.key_heads}, time_step_rank {self.value_heads}, "
                f"state_size {self.state_columns}, conv_kernel {self.conv_taps}"
            )
