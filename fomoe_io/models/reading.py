"""The sizes that every architecture reads alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fomoe_io.errors import FormatError
from fomoe_io.models.keys import LLAMA_CPP, Keys
from fomoe_io.models.recorder import Score
from fomoe_io.models.rope import rope_of

if TYPE_CHECKING:
    from fomoe_io.storage.gguf import TensorInfo

SMALLEST_EPSILON = 1e-38
"""Of a norm: without one, a row of zeros would be divided by zero."""


def common_sizes(m: Keys, full_attention: tuple[bool, ...], *, latent: int = 0) -> dict[str, Any]:
    """Fields of a Shape; `full_attention` says which layers have heads at all; of a `latent` values are its columns."""
    columns = m.integer("embedding_length", least=1)
    heads = m.each_layer("attention.head_count", full_attention, most=4096)
    head_columns = m.integer("attention.key_length", columns // heads, least=1, most=4096)
    value_columns = m.integer("attention.value_length", columns // heads, least=1, most=4096)
    if value_columns != (latent or head_columns):
        raise FormatError(
            f"heads have {head_columns} columns in keys (attention.key_length) and {value_columns} in values "
            f"(attention.value_length), which no {m.architecture} model has"
        )
    rotated = m.integer("rope.dimension_count", head_columns, least=2, most=head_columns)
    used = m.integer("expert_used_count", least=1, most=256)
    return {
        "columns": columns,
        "vocabulary": m.vocabulary(),
        "context_tokens": m.integer("context_length", least=1),
        "heads": heads,
        "kv_heads": m.each_layer("attention.head_count_kv", full_attention, heads, most=heads),
        "head_columns": head_columns,
        "rotated": rotated,
        "rope": rope_of(m, rotated),
        "epsilon": m.number("attention.layer_norm_rms_epsilon", least=SMALLEST_EPSILON, most=1e12),
        "experts": m.integer("expert_count", least=1, most=65535),
        "used": used,
        "hidden": _hidden(m, used),
    }


def _hidden(m: Keys, used: int) -> int:
    """Width of an expert: its key, or a part of what all of a token's have together, as llama.cpp has it."""
    hidden = m.integer("expert_feed_forward_length", 0)
    return hidden or m.integer("feed_forward_length") // used


def shared_hidden(m: Keys, resident: Mapping[str, TensorInfo]) -> int:
    """Width of the shared expert: its key, or where that is missing its tensor's; 0 without either."""
    first = resident.get("blk.0.ffn_gate_shexp.weight")
    told = m.integer("expert_shared_feed_forward_length", 0)
    return told or (int(first.shape[1]) if first is not None and len(first.shape) > 1 else 0)


def score_of(m: Keys, *default: int) -> Score:
    """What expert_gating_func says; without a `default` the key is needed."""
    kind = m.integer("expert_gating_func", *default)
    kind = kind or next(iter(default), 0)  # 0: as absent
    if kind not in (1, 2):
        raise FormatError(
            f"metadata key {m.name('expert_gating_func')} is {kind}; only 1 (softmax) and 2 (sigmoid) are computed",
            hint=LLAMA_CPP,
        )
    return Score.SOFTMAX if kind == 1 else Score.SIGMOID


def layers_of(m: Keys) -> tuple[int, int]:
    """(layers, blocks): blocks that only draft follow the layers."""
    blocks = m.integer("block_count", least=1, most=4096)
    return blocks - m.integer("nextn_predict_layers", 0, most=blocks - 1), blocks
