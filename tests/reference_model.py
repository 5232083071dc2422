"""The models in float64 numpy, written from their equations and from nothing of the engine.

Slow and plain on purpose: one token after the other, no caches but lists.  Weights are dequantized by package gguf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray


def rms_norm(x: Array, w: Array | float = 1.0, eps: float = 1e-6) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def l2_norm(x: Array, eps: float = 1e-6) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def rope(
    x: Array, position: int, rotated: int, base: float, frequencies: Array | None = None, magnitude: float = 1.0
) -> Array:
    """NEOX pairing of the first `rotated` columns of [heads, columns]."""
    half = rotated // 2
    if frequencies is None:
        frequencies = base ** (-2.0 * np.arange(half) / rotated)
    cos, sin = magnitude * np.cos(position * frequencies), magnitude * np.sin(position * frequencies)
    a, b = x[:, :half], x[:, half:rotated]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, x[:, rotated:]], 1)


def yarn(base: float, rotated: int, factor: float, context: int) -> tuple[Array, float]:
    """(frequencies, magnitude) of "YaRN: Efficient Context Window Extension", alpha 1, beta 32."""
    j = np.arange(rotated // 2)
    frequency = base ** (-2.0 * j / rotated)

    def pair_that_turns(times: float) -> float:
        """Where context * base^(-2 j / rotated) = 2 pi times."""
        return float(rotated * np.log(context / (2 * np.pi * times)) / (2 * np.log(base)))

    first, last = max(0, np.floor(pair_that_turns(32))), min(rotated - 1, np.ceil(pair_that_turns(1)))
    interpolated = np.clip((j - first) / (last - first), 0, 1)
    return frequency * (1 - interpolated) + frequency / factor * interpolated, 1 + 0.1 * np.log(factor)


def route(logits: Array, used: int) -> tuple[Array, Array]:
    """(ids, weights) of the top experts; equal ones by id."""
    p = softmax(logits)
    ids = np.argsort(-p, kind="stable")[:used]
    return ids, p[ids] / p[ids].sum()


class ReferenceModel:
    """A qwen35moe or qwen3moe GGUF, one shard or several."""

    def __init__(self, *paths: Path) -> None:
        readers = [gguf.GGUFReader(path) for path in paths]
        self.fields = readers[0].fields
        self.tensors: dict[str, Array] = {}
        for reader in readers:
            for t in reader.tensors:
                values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
                self.tensors[t.name] = values.reshape(tuple(int(n) for n in reversed(t.shape)))
        self.architecture = str(self._field("general.architecture"))
        self.layers = self._key("block_count")
        self.eps = float(self._key("attention.layer_norm_rms_epsilon"))
        self.reset()

    def _field(self, name: str) -> Any:
        return self.fields[name].contents()

    def _key(self, name: str) -> Any:
        return self._field(f"{self.architecture}.{name}")

    def _has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.fields

    def _heads(self, name: str) -> int:
        count = self._key(name)
        return int(max(count) if isinstance(count, list) else count)

    def _rope(self, x: Array) -> Array:
        rotated, base = self._key("rope.dimension_count"), self._key("rope.freq_base")
        frequencies, magnitude = base ** (-2.0 * np.arange(rotated // 2) / rotated), 1.0
        kind = self._key("rope.scaling.type") if self._has("rope.scaling.type") else "linear"
        old = self._key("rope.scale_linear") if self._has("rope.scale_linear") else 1.0
        factor = self._key("rope.scaling.factor") if self._has("rope.scaling.factor") else old
        if kind == "linear":
            frequencies = frequencies / factor
        if kind == "yarn":
            length = "rope.scaling.original_context_length"
            context = self._key(length if self._has(length) else "context_length")
            frequencies, magnitude = yarn(base, rotated, factor, context)
        if self._has("rope.scaling.attn_factor"):
            magnitude *= self._key("rope.scaling.attn_factor")
        return rope(x, self.position, rotated, base, frequencies, magnitude)

    def _query_key_value(self, layer: int, h: Array, rows: list[int]) -> list[Array]:
        if f"blk.{layer}.attn_qkv.weight" in self.tensors:
            parts = np.split(self.w(layer, "attn_qkv.weight") @ h, np.cumsum(rows)[:-1])
            bias = self.tensors.get(f"blk.{layer}.attn_qkv.bias", np.zeros(sum(rows)))
            biases = np.split(bias, np.cumsum(rows)[:-1])
        else:
            parts = [self.w(layer, f"attn_{part}.weight") @ h for part in "qkv"]
            biases = [self.tensors.get(f"blk.{layer}.attn_{part}.bias", np.zeros(1)) for part in "qkv"]
        return [part + bias for part, bias in zip(parts, biases, strict=True)]

    def reset(self) -> None:
        self.position = 0
        self.keys: dict[int, list[Array]] = {}
        self.values: dict[int, list[Array]] = {}
        self.convolution: dict[int, Array] = {}
        self.memory: dict[int, Array] = {}
        self.picked: list[list[Array]] = []

    def w(self, layer: int, name: str) -> Array:
        return self.tensors[f"blk.{layer}.{name}"]

    def forward(self, token: int) -> Array:
        """Logits after one more token."""
        x = self.tensors["token_embd.weight"][token]
        hybrid = self.architecture == "qwen35moe"
        self.picked.append([])
        for layer in range(self.layers):
            h = rms_norm(x, self.w(layer, "attn_norm.weight"), self.eps)
            if hybrid and (layer + 1) % self._key("full_attention_interval"):
                x = x + self.delta(layer, h)
            else:
                x = x + self.attention(layer, h, gated=hybrid)
            norm = "post_attention_norm.weight" if hybrid else "ffn_norm.weight"
            x = x + self.experts(layer, rms_norm(x, self.w(layer, norm), self.eps))
        self.position += 1
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return np.asarray(output @ rms_norm(x, self.tensors["output_norm.weight"], self.eps))

    def attention(self, layer: int, h: Array, *, gated: bool) -> Array:
        heads, kv_heads = self._heads("attention.head_count"), self._heads("attention.head_count_kv")
        d = self._key("attention.key_length")
        q, k, v = self._query_key_value(layer, h, [heads * d * (2 if gated else 1), kv_heads * d, kv_heads * d])
        q, k, v = q.reshape(heads, -1), k.reshape(kv_heads, d), v.reshape(kv_heads, d)
        q, gate = q[:, :d], q[:, d:]
        q = self._rope(rms_norm(q, self.w(layer, "attn_q_norm.weight"), self.eps))
        k = self._rope(rms_norm(k, self.w(layer, "attn_k_norm.weight"), self.eps))
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        out = np.empty((heads, d))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            out[head] = softmax(keys[:, kv] @ q[head] / np.sqrt(d)) @ values[:, kv]
        if gated:
            out = out * sigmoid(gate)
        return np.asarray(self.w(layer, "attn_output.weight") @ out.reshape(-1))

    def delta(self, layer: int, h: Array) -> Array:
        key_heads, value_heads = self._key("ssm.group_count"), self._key("ssm.time_step_rank")
        s, taps = self._key("ssm.state_size"), self._key("ssm.conv_kernel")
        u = self.w(layer, "attn_qkv.weight") @ h
        z = (self.w(layer, "attn_gate.weight") @ h).reshape(value_heads, s)
        history = self.convolution.get(layer, np.zeros((taps - 1, len(u))))
        window = np.vstack([history, u])
        self.convolution[layer] = window[1:]
        c = silu((self.w(layer, "ssm_conv1d.weight").T * window).sum(0))
        n = key_heads * s
        q = l2_norm(c[:n].reshape(key_heads, s), self.eps) / np.sqrt(s)
        k = l2_norm(c[n : 2 * n].reshape(key_heads, s), self.eps)
        v = c[2 * n :].reshape(value_heads, s)
        beta = sigmoid(self.w(layer, "ssm_beta.weight") @ h)
        rate = softplus(self.w(layer, "ssm_alpha.weight") @ h + self.w(layer, "ssm_dt.bias"))
        decay = np.exp(rate * self.w(layer, "ssm_a"))
        memory = self.memory.setdefault(layer, np.zeros((value_heads, s, s)))
        out = np.empty((value_heads, s))
        for head in range(value_heads):
            kk, qq, m = k[head % key_heads], q[head % key_heads], memory[head] * decay[head]
            m = m + np.outer(kk, beta[head] * (v[head] - kk @ m))
            memory[head] = m
            out[head] = qq @ m
        mixed = rms_norm(out, self.w(layer, "ssm_norm.weight"), self.eps) * silu(z)
        return np.asarray(self.w(layer, "ssm_out.weight") @ mixed.reshape(-1))

    def experts(self, layer: int, h: Array) -> Array:
        ids, weights = route(self.w(layer, "ffn_gate_inp.weight") @ h, self._key("expert_used_count"))
        self.picked[-1].append(ids)
        fused = self.tensors.get(f"blk.{layer}.ffn_gate_up_exps.weight")
        y = np.zeros(len(h))
        for i, weight in zip(ids, weights, strict=True):
            if fused is not None:
                gate, up = np.split(fused[i], 2)
            else:
                gate, up = self.w(layer, "ffn_gate_exps.weight")[i], self.w(layer, "ffn_up_exps.weight")[i]
            y = y + weight * (self.w(layer, "ffn_down_exps.weight")[i] @ (silu(gate @ h) * (up @ h)))
        if f"blk.{layer}.ffn_gate_shexp.weight" in self.tensors:
            shared = silu(self.w(layer, "ffn_gate_shexp.weight") @ h) * (self.w(layer, "ffn_up_shexp.weight") @ h)
            scale = sigmoid(self.w(layer, "ffn_gate_inp_shexp.weight").reshape(-1) @ h)
            y = y + scale * (self.w(layer, "ffn_down_shexp.weight") @ shared)
        return y
