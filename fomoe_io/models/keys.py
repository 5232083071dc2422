"""The metadata of an architecture: which of its keys are computed with, and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.storage.metadata import REQUIRED, Metadata, excerpt

LLAMA_CPP = "run this model with llama.cpp, or update fomoe_io"

COMPUTED = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "expert_count", "expert_used_count",
        "expert_feed_forward_length",
    }
)  # fmt: skip
"""Keys of every architecture that its shape follows from."""

HARMLESS = frozenset(
    {
        "vocab_size", "pooling_type", "tensor_data_layout", "attention.layer_norm_epsilon", "expert_shared_count",
        "rope.scaling.finetuned", "expert_weights_scale",
    }
)  # fmt: skip
"""Keys without a part in the equations of any architecture here.  llama.cpp reads over expert_weights_scale too: the
weights of a token's experts are made to sum 1."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),  # 1 / sqrt(head size)
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_norm": (True,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
"""Keys that change the equations, and the values with which they do not: what is computed."""


class Keys:
    """The keys `<architecture>.*` of a model's metadata."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.architecture = metadata.text("general.architecture")

    def name(self, key: str) -> str:
        """A key's whole name."""
        return f"{self.architecture}.{key}"

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self._metadata

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 0, most: int = 1 << 24) -> int:
        """An integer, checked against its sensible range before anything is sized by it."""
        return int(self._metadata.integer(self.name(key), default, least=least, most=most))

    def number(self, key: str, default: Any = REQUIRED, *, least: float, most: float) -> float:
        """A number in [least, most]."""
        return float(self._metadata.number(self.name(key), default, least=least, most=most))

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        return self._metadata.flag(self.name(key)) if key in self else default

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A string."""
        return str(self._metadata.text(self.name(key), default))

    def each_layer(self, key: str, layers: tuple[bool, ...], default: Any = REQUIRED, *, most: int) -> int:
        """An integer, or a list of one for every layer that says the same for all that are true in `layers`.

        Others, which have no use for it, are zeros in some files.
        """
        name = self.name(key)
        if not self._metadata.is_array(name):
            return self.integer(key, default, least=1, most=most)
        values = self._metadata.integers(name)
        if len(values) < len(layers):
            raise FormatError(f"metadata key {name} has {len(values)} entries for {len(layers)} layers")
        used = np.unique(values[: len(layers)][np.array(layers)] if any(layers) else values)
        if len(used) != 1 or not 1 <= used[0] <= most:
            raise FormatError(
                f"metadata key {name} is {excerpt(values.tolist())}: layers that differ are not computed",
                hint=LLAMA_CPP,
            )
        return int(used[0])

    def layer_flags(self, key: str, layers: int) -> tuple[bool, ...] | None:
        """One truth value for all layers or one for each; None when the key is absent."""
        name = self.name(key)
        if name not in self._metadata:
            return None
        if not self._metadata.is_array(name):
            return (self._metadata.flag(name),) * layers
        flags = self._metadata.flags(name)
        if len(flags) < layers:
            raise FormatError(f"metadata key {name} has {len(flags)} entries for {layers} layers")
        return tuple(bool(flag) for flag in flags[:layers])

    def integers(self, key: str, length: int) -> list[int] | None:
        """A list of so many integers; None when the key is absent."""
        found = self._metadata.integers(self.name(key), None, length=length)
        return None if found is None else [int(value) for value in found]

    def vocabulary(self) -> int:
        """Number of tokens."""
        key = "tokenizer.ggml.tokens"
        if key not in self._metadata:
            raise FormatError(f"the model has no vocabulary (metadata key {key})")
        return self._metadata.length(key)

    def check_known(self, computed: frozenset[str], fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Every key of the namespace is computed with, or known to change nothing.

        Raises
        ------
        FormatError
            Names the first that is not: what the model computes would not be what its file means.
        """
        prefix = self.name("")
        for name in self._metadata:
            key = name.removeprefix(prefix)
            if key == name or key in computed or key in HARMLESS:
                continue
            if key not in fixed:
                raise FormatError(
                    f"metadata key {name} is not known here, and may change what {self.architecture} computes",
                    hint=LLAMA_CPP,
                )
            value = None if self._metadata.is_array(name) else self._metadata[name]
            if value not in fixed[key]:
                only = " or ".join(repr(allowed) for allowed in fixed[key])
                shown = excerpt(self._metadata[name])
                raise FormatError(f"metadata key {name} is {shown}; only {only} is computed here", hint=LLAMA_CPP)
