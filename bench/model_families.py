"""Sizes and layers of the models that `make_model.py` writes, by family: which tensors a layer has, and which metadata.

Sizes are those of the families' published configurations.  Quantization is llama-quantize's Q4_K_M with its fallbacks
where a row is no multiple of 256; gpt-oss has MXFP4 experts and Q8_0 beside them, as its files have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
F32, Q4_K, Q5_0, Q6_K, Q8_0, MXFP4 = Kind.F32, Kind.Q4_K, Kind.Q5_0, Kind.Q6_K, Kind.Q8_0, Kind.MXFP4


@dataclass(frozen=True)
class Preset:
    """Sizes of a model; `dense_layers` of `dense_hidden` come first, `rotated` columns of a head turn."""

    columns: int
    heads: int
    experts: int
    used: int
    hidden: int
    layers: int
    architecture: str = "qwen35moe"
    vocabulary: int = 248320
    kv_heads: int = 2
    head_columns: int = 256
    rotated: int = 64
    key_heads: int = 16
    value_heads: int = 32
    state_columns: int = 128
    taps: int = 4
    dense_layers: int = 0
    dense_hidden: int = 0

    @property
    def is_mixed(self) -> bool:
        """Three layers of the delta rule for each of attention."""
        return self.architecture in ("qwen35moe", "qwen3next")

    @property
    def has_shared(self) -> bool:
        """A shared expert beside the routed ones."""
        return self.is_mixed or self.architecture == "glm4moe"


PRESETS = {
    "35b-a3b": Preset(columns=2048, heads=16, experts=256, used=8, hidden=512, value_heads=32, layers=40),
    "122b-a10b": Preset(columns=3072, heads=32, experts=256, used=8, hidden=1024, value_heads=64, layers=48),
    "397b-a17b": Preset(columns=4096, heads=32, experts=512, used=10, hidden=1024, value_heads=64, layers=60),
    "next-80b-a3b": Preset(
        architecture="qwen3next", columns=2048, heads=16, experts=512, used=10, hidden=512, layers=48,
        vocabulary=151936,
    ),
    "m2-230b-a10b": Preset(
        architecture="minimax-m2", columns=3072, heads=48, kv_heads=8, head_columns=128, experts=256, used=8,
        hidden=1536, layers=62, vocabulary=200064,
    ),
    "glm-air-106b-a12b": Preset(
        architecture="glm4moe", columns=4096, heads=96, kv_heads=8, head_columns=128, experts=128, used=8, hidden=1408,
        layers=46, vocabulary=151552, dense_layers=1, dense_hidden=10944,
    ),
    "gpt-oss-120b-a5b": Preset(
        architecture="gpt-oss", columns=2880, heads=64, kv_heads=8, head_columns=64, experts=128, used=4, hidden=2880,
        layers=36, vocabulary=201088,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; `deviation` for random blocks, `values` for float32 data."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    deviation: float = 0.0
    values: np.ndarray | None = None


def more_bits(layer: int, layers: int) -> bool:
    """llama-quantize's rule for the layers of Q4_K_M that get Q6_K."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def stored_as(p: Preset, kind: Kind, columns: int) -> Kind:
    """What a matrix of rows of that length has, where it would have `kind`."""
    if p.architecture == "gpt-oss":
        return Q8_0
    fallbacks = {Q4_K: Q5_0, Q6_K: Q8_0}
    return kind if columns % 256 == 0 else fallbacks[kind]


def _matrix(p: Preset, name: str, shape: tuple[int, ...], kind: Kind, deviation: float) -> Tensor:
    return Tensor(name, shape, stored_as(p, kind, shape[0]), deviation)


def _ones(name: str, length: int) -> Tensor:
    return Tensor(name, (length,), F32, values=np.ones(length, np.float32))


def _zeros(name: str, *shape: int) -> Tensor:
    return Tensor(name, shape, F32, values=np.zeros(shape[::-1], np.float32))


def attention(p: Preset, b: str, high: Kind, out: float) -> Iterator[Tensor]:
    """Of a layer of softmax attention."""
    d, width, keys, unit = p.columns, p.heads * p.head_columns, p.kv_heads * p.head_columns, p.columns**-0.5
    yield _matrix(p, b + "attn_q.weight", (d, 2 * width if p.is_mixed else width), Q4_K, unit)
    yield _matrix(p, b + "attn_k.weight", (d, keys), Q4_K, unit)
    yield _matrix(p, b + "attn_v.weight", (d, keys), high, unit)
    yield _matrix(p, b + "attn_output.weight", (width, d), Q4_K, out * width**-0.5)
    if p.is_mixed:
        yield _ones(b + "attn_q_norm.weight", p.head_columns)
        yield _ones(b + "attn_k_norm.weight", p.head_columns)
    if p.architecture == "minimax-m2":
        yield _ones(b + "attn_q_norm.weight", width)
        yield _ones(b + "attn_k_norm.weight", keys)
    if p.architecture in ("glm4moe", "gpt-oss"):
        for part, rows in (("q", width), ("k", keys), ("v", keys)):
            yield _zeros(b + f"attn_{part}.bias", rows)
    if p.architecture == "gpt-oss":
        yield _zeros(b + "attn_sinks.weight", p.heads)
        yield _zeros(b + "attn_output.bias", d)


def delta(p: Preset, b: str, high: Kind, out: float, random: np.random.Generator) -> Iterator[Tensor]:
    """Of a layer of the gated delta rule."""
    d, keys, values, unit = p.columns, p.key_heads * p.state_columns, p.value_heads * p.state_columns, p.columns**-0.5
    channels = 2 * keys + values
    yield Tensor(b + "attn_qkv.weight", (d, channels), high, unit)
    yield Tensor(b + "attn_gate.weight", (d, values), Q4_K, unit)
    if p.architecture == "qwen3next":
        yield Tensor(b + "ssm_ba.weight", (d, 2 * p.value_heads), Q4_K, unit)
    else:
        yield Tensor(b + "ssm_beta.weight", (d, p.value_heads), Q4_K, unit)
        yield Tensor(b + "ssm_alpha.weight", (d, p.value_heads), Q4_K, unit)
    taps = random.standard_normal((channels, p.taps)).astype(np.float32)
    yield Tensor(b + "ssm_conv1d.weight", (p.taps, channels), F32, values=taps)
    yield _zeros(b + "ssm_dt.bias", p.value_heads)
    decay = -random.uniform(0.05, 1, p.value_heads).astype(np.float32)
    yield Tensor(b + "ssm_a", (p.value_heads,), F32, values=decay)
    yield _ones(b + "ssm_norm.weight", p.state_columns)
    yield Tensor(b + "ssm_out.weight", (values, d), Q4_K, out * values**-0.5)


def dense(p: Preset, b: str, high: Kind, out: float) -> Iterator[Tensor]:
    """The network of a layer without experts."""
    yield from _network(p, b, "", p.dense_hidden, (), high, out)


def experts(
    p: Preset, b: str, high: Kind, out: float, router: np.ndarray, popularity: np.ndarray, random: np.random.Generator
) -> Iterator[Tensor]:
    """The router, the routed experts, and what stands beside them; a bias carries the popularity where there is one."""
    d = p.columns
    yield Tensor(b + "ffn_gate_inp.weight", (d, p.experts), F32, values=router)
    yield from _network(p, b, "_exps", p.hidden, (p.experts,), high, out)
    if p.has_shared:
        yield from _network(p, b, "_shexp", p.hidden, (), high, out)
    if p.is_mixed:
        gate = random.standard_normal(d).astype(np.float32) * d**-0.5
        yield Tensor(b + "ffn_gate_inp_shexp.weight", (d, 1), F32, values=gate)
    if p.architecture in ("glm4moe", "minimax-m2"):
        yield _zeros(b + "exp_probs_b.bias", p.experts)
    if p.architecture == "gpt-oss":
        yield Tensor(b + "ffn_gate_inp.bias", (p.experts,), F32, values=popularity.astype(np.float32))
        for part, rows in (("gate", p.hidden), ("up", p.hidden), ("down", d)):
            yield _zeros(b + f"ffn_{part}_exps.bias", rows, p.experts)


def _network(
    p: Preset, b: str, name: str, hidden: int, count: tuple[int, ...], high: Kind, out: float
) -> Iterator[Tensor]:
    d, unit = p.columns, p.columns**-0.5
    if count and p.architecture == "gpt-oss":
        yield Tensor(b + f"ffn_down{name}.weight", (hidden, d, *count), MXFP4, out * hidden**-0.5)
        yield Tensor(b + f"ffn_gate{name}.weight", (d, hidden, *count), MXFP4, unit)
        yield Tensor(b + f"ffn_up{name}.weight", (d, hidden, *count), MXFP4, unit)
        return
    yield _matrix(p, b + f"ffn_down{name}.weight", (hidden, d, *count), high, out * hidden**-0.5)
    yield _matrix(p, b + f"ffn_gate{name}.weight", (d, hidden, *count), Q4_K, unit)
    yield _matrix(p, b + f"ffn_up{name}.weight", (d, hidden, *count), Q4_K, unit)


def keys_of(p: Preset, layers: int) -> dict[str, Any]:
    """Every key that the architecture has, without its namespace."""
    keys: dict[str, Any] = {
        "block_count": layers, "context_length": 131072, "embedding_length": p.columns,
        "attention.head_count": p.heads, "attention.head_count_kv": p.kv_heads,
        "attention.key_length": p.head_columns, "attention.value_length": p.head_columns,
        "rope.dimension_count": p.rotated, "expert_count": p.experts, "expert_used_count": p.used,
        "expert_feed_forward_length": p.hidden, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e7,
    }  # fmt: skip
    if p.is_mixed:
        keys |= {
            "expert_shared_feed_forward_length": p.hidden, "ssm.conv_kernel": p.taps,
            "ssm.state_size": p.state_columns, "ssm.group_count": p.key_heads, "ssm.time_step_rank": p.value_heads,
            "ssm.inner_size": p.value_heads * p.state_columns, "full_attention_interval": 4,
        }  # fmt: skip
    if p.architecture == "qwen35moe":
        keys["rope.dimension_sections"] = [11, 11, 10, 0]
    if p.architecture == "minimax-m2":
        keys |= {"feed_forward_length": p.hidden, "expert_gating_func": 2}
    if p.architecture == "glm4moe":
        keys |= {
            "feed_forward_length": p.dense_hidden, "expert_shared_count": 1, "expert_gating_func": 2,
            "expert_weights_scale": 1.0, "expert_weights_norm": True, "leading_dense_block_count": p.dense_layers,
        }  # fmt: skip
    if p.architecture == "gpt-oss":
        keys |= {
            "feed_forward_length": p.hidden, "attention.sliding_window": 128, "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        }  # fmt: skip
    return keys


PRE_TOKENIZERS = {"qwen35moe": "qwen35", "qwen3next": "qwen2", "minimax-m2": "minimax-m2", "glm4moe": "glm4",
                  "gpt-oss": "gpt-4o"}  # fmt: skip
