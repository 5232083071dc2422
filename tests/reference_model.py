"""The models in float64 numpy, written from their equations and from nothing of the engine.

Slow and plain on purpose: one token after the other, no caches but lists.  Weights are dequantized by package gguf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray
YARN_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


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


def without_groups(scores: Array, groups: int, left: int) -> Array:
    """-inf for the experts of all groups but those `left` whose two best have the greatest sums."""
    each = scores.reshape(groups, -1)
    best = np.sort(each, 1)[:, -2:].sum(1)
    kept = np.argsort(-best, kind="stable")[:left]
    return np.where(np.isin(np.arange(groups), kept)[:, None], each, -np.inf).reshape(-1)


def route_by(
    logits: Array, used: int, score: str, bias: Array | float = 0.0, normalise: bool = True, scale: float = 1.0,
    groups: int = 1, left: int = 1,
) -> tuple[Array, Array]:  # fmt: skip
    """(ids, weights); `score` is softmax, sigmoid or logits."""
    p = {"softmax": softmax, "sigmoid": sigmoid, "logits": lambda x: x}[score](logits)
    ids = np.argsort(-without_groups(p + bias, groups, left), kind="stable")[:used]
    weights = softmax(p[ids]) if score == "logits" else p[ids]
    if normalise:
        weights = weights / max(weights.sum(), 2.0**-14)
    return ids, weights * scale


def clamped_swiglu(gate: Array, up: Array) -> Array:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


class ReferenceModel:
    """A GGUF of any architecture that runs, one shard or several."""

    def __init__(self, *paths: Path) -> None:
        readers = [gguf.GGUFReader(path) for path in paths]
        self.fields = readers[0].fields
        self.tensors: dict[str, Array] = {}
        for reader in readers:
            for t in reader.tensors:
                values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
                self.tensors[t.name] = values.reshape(tuple(int(n) for n in reversed(t.shape)))
        self.architecture = str(self._field("general.architecture"))
        self.layers = self._key("block_count") - self._or("nextn_predict_layers", 0)
        self.eps = float(self._key("attention.layer_norm_rms_epsilon"))
        self.reset()

    def _field(self, name: str) -> Any:
        return self.fields[name].contents()

    def _key(self, name: str) -> Any:
        return self._field(f"{self.architecture}.{name}")

    def _has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.fields

    def _or(self, name: str, default: Any) -> Any:
        return self._key(name) if self._has(name) else default

    def _heads(self, name: str) -> int:
        count = self._key(name)
        return int(max(count) if isinstance(count, list) else count)

    def _window(self, layer: int) -> int:
        pattern = self._or("attention.sliding_window_pattern", 2)
        return self._or("attention.sliding_window", 0) if layer % pattern < pattern - 1 else 0

    def _rope(self, x: Array, layer: int) -> Array:
        rotated, base = self._or("rope.dimension_count", x.shape[1]), self._key("rope.freq_base")
        if self._window(layer):
            base = self._or("rope.freq_base_swa", base)
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
        hybrid = self.architecture in ("qwen35moe", "qwen3next")
        self.picked.append([])
        for layer in range(self.layers):
            h = rms_norm(x, self.w(layer, "attn_norm.weight"), self.eps)
            if f"blk.{layer}.ssm_a" in self.tensors:
                x = x + self.delta(layer, h)
            elif self.architecture == "deepseek2":
                x = x + self.latent_attention(layer, h)
            else:
                x = x + self.attention(layer, h, gated=hybrid)
            has_post = f"blk.{layer}.post_attention_norm.weight" in self.tensors
            norm = "post_attention_norm.weight" if has_post else "ffn_norm.weight"
            h = rms_norm(x, self.w(layer, norm), self.eps)
            if layer < self._or("leading_dense_block_count", 0):
                self.picked[-1].append(np.full(self._key("expert_used_count"), -1))
                x = x + self.network(layer, h, "")
            else:
                x = x + self.experts(layer, h)
        self.position += 1
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return np.asarray(output @ rms_norm(x, self.tensors["output_norm.weight"], self.eps))

    def attention(self, layer: int, h: Array, *, gated: bool) -> Array:
        heads, kv_heads = self._heads("attention.head_count"), self._heads("attention.head_count_kv")
        d = self._key("attention.key_length")
        q, k, v = self._query_key_value(layer, h, [heads * d * (2 if gated else 1), kv_heads * d, kv_heads * d])
        norms = [self.tensors.get(f"blk.{layer}.attn_{part}_norm.weight") for part in "qk"]
        if self.architecture == "minimax-m2":
            q, k = (rms_norm(x, w, self.eps) for x, w in zip((q, k), norms, strict=True))
        q, k, v = q.reshape(heads, -1), k.reshape(kv_heads, d), v.reshape(kv_heads, d)
        q, gate = q[:, :d], q[:, d:]
        if self.architecture != "minimax-m2" and norms[0] is not None:
            q, k = (rms_norm(x, w, self.eps) for x, w in zip((q, k), norms, strict=True))
        q, k = self._rope(q, layer), self._rope(k, layer)
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        seen = slice(-self._window(layer), None) if self._window(layer) else slice(None)
        keys, values = np.stack(self.keys[layer][seen]), np.stack(self.values[layer][seen])
        sinks = self.tensors.get(f"blk.{layer}.attn_sinks.weight")
        out = np.empty((heads, d))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[:, kv] @ q[head] / np.sqrt(d)
            if sinks is not None:
                scores = np.append(scores, sinks[head])
            out[head] = softmax(scores)[: len(values)] @ values[:, kv]
        if gated:
            out = out * sigmoid(gate)
        bias = self.tensors.get(f"blk.{layer}.attn_output.bias", 0.0)
        return np.asarray(self.w(layer, "attn_output.weight") @ out.reshape(-1) + bias)

    def latent_attention(self, layer: int, h: Array) -> Array:
        """As plain attention: each head's keys and values are made of the latent for every position."""
        heads, latent = self._heads("attention.head_count"), self._key("attention.kv_lora_rank")
        rotated, d = self._key("rope.dimension_count"), self._key("attention.key_length_mla")
        if f"blk.{layer}.attn_q_a.weight" in self.tensors:
            low = rms_norm(self.w(layer, "attn_q_a.weight") @ h, self.w(layer, "attn_q_a_norm.weight"), self.eps)
            q = (self.w(layer, "attn_q_b.weight") @ low).reshape(heads, d)
        else:
            q = (self.w(layer, "attn_q.weight") @ h).reshape(heads, d)
        both = self.w(layer, "attn_kv_a_mqa.weight") @ h
        low = rms_norm(both[:latent], self.w(layer, "attn_kv_a_norm.weight"), self.eps)
        k = np.einsum("hlo,l->ho", self.w(layer, "attn_k_b.weight"), low)
        v = np.einsum("hvl,l->hv", self.w(layer, "attn_v_b.weight"), low)
        turned = self._rope_adjacent(both[None, latent:])
        k = np.concatenate([k, np.repeat(turned, heads, 0)], 1)
        q = np.concatenate([q[:, : d - rotated], self._rope_adjacent(q[:, d - rotated :])], 1)
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        factor, multiplier = self._or("rope.scaling.factor", 1.0), self._or(YARN_MULTIPLIER, 0.0)
        scale = (self._sharper() * (1 + multiplier * np.log(factor))) ** 2 / np.sqrt(d)
        out = [softmax(scale * (keys[:, i] @ q[i])) @ values[:, i] for i in range(heads)]
        return np.asarray(self.w(layer, "attn_output.weight") @ np.concatenate(out))

    def _sharper(self) -> float:
        """What cos and sin are multiplied with."""
        is_yarn = self._or("rope.scaling.type", "") == "yarn" and not self._or(YARN_MULTIPLIER, 0.0)
        by_length = 1 + 0.1 * np.log(self._key("rope.scaling.factor")) if is_yarn else 1.0
        return float(by_length * self._or("rope.scaling.attn_factor", 1.0))

    def _rope_adjacent(self, x: Array) -> Array:
        rotated, base = self._key("rope.dimension_count"), self._key("rope.freq_base")
        frequencies = base ** (-2.0 * np.arange(rotated // 2) / rotated)
        if self._or("rope.scaling.type", "") == "yarn":
            context = self._or("rope.scaling.original_context_length", self._key("context_length"))
            frequencies, _ = yarn(base, rotated, self._key("rope.scaling.factor"), context)
        turn = np.exp(1j * self.position * frequencies) * (x[:, ::2] + 1j * x[:, 1::2]) * self._sharper()
        return np.stack([turn.real, turn.imag], -1).reshape(len(x), rotated)

    def delta(self, layer: int, h: Array) -> Array:
        key_heads, value_heads = self._key("ssm.group_count"), self._key("ssm.time_step_rank")
        s, taps = self._key("ssm.state_size"), self._key("ssm.conv_kernel")
        each = value_heads // key_heads
        if f"blk.{layer}.ssm_in.weight" in self.tensors:
            fused = (self.w(layer, "ssm_in.weight") @ h).reshape(key_heads, -1)
            parts = np.split(fused, [s, 2 * s, (2 + each) * s], 1)
            u, z = np.concatenate([part.reshape(-1) for part in parts[:3]]), parts[3].reshape(value_heads, s)
        else:
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
        if self.architecture == "qwen3next":
            beta, alpha = np.split((self.w(layer, "ssm_ba.weight") @ h).reshape(key_heads, -1), 2, 1)
            beta, alpha, key_head = beta.reshape(-1), alpha.reshape(-1), np.arange(value_heads) // each
        else:
            beta, alpha = (self.w(layer, f"ssm_{name}.weight") @ h for name in ("beta", "alpha"))
            key_head = np.arange(value_heads) % key_heads
        beta = sigmoid(beta)
        rate = softplus(alpha + self.w(layer, "ssm_dt.bias"))
        decay = np.exp(rate * self.w(layer, "ssm_a"))
        memory = self.memory.setdefault(layer, np.zeros((value_heads, s, s)))
        out = np.empty((value_heads, s))
        for head in range(value_heads):
            kk, qq, m = k[key_head[head]], q[key_head[head]], memory[head] * decay[head]
            m = m + np.outer(kk, beta[head] * (v[head] - kk @ m))
            memory[head] = m
            out[head] = qq @ m
        mixed = rms_norm(out, self.w(layer, "ssm_norm.weight"), self.eps) * silu(z)
        return np.asarray(self.w(layer, "ssm_out.weight") @ mixed.reshape(-1))

    def network(self, layer: int, h: Array, kind: str) -> Array:
        gate, up = (self.w(layer, f"ffn_{part}{kind}.weight") @ h for part in ("gate", "up"))
        return np.asarray(self.w(layer, f"ffn_down{kind}.weight") @ (silu(gate) * up))

    def route(self, layer: int, h: Array) -> tuple[Array, Array]:
        logits = self.w(layer, "ffn_gate_inp.weight") @ h + self.tensors.get(f"blk.{layer}.ffn_gate_inp.bias", 0.0)
        score = {"minimax-m2": "sigmoid", "glm4moe": "sigmoid", "gpt-oss": "logits"}.get(self.architecture, "softmax")
        if self.architecture in ("minimax-m2", "glm4moe", "deepseek2"):
            score = {1: "softmax", 2: "sigmoid"}[self._or("expert_gating_func", 2)]
        scales = self.architecture in ("glm4moe", "deepseek2")
        return route_by(
            logits,
            self._key("expert_used_count"),
            score,
            self.tensors.get(f"blk.{layer}.exp_probs_b.bias", 0.0),
            normalise=self._or("expert_weights_norm", False) if scales else self.architecture != "gpt-oss",
            scale=(self._or("expert_weights_scale", 1.0) or 1.0) if scales else 1.0,
            groups=self._or("expert_group_count", 1),
            left=self._or("expert_group_used_count", 1),
        )

    def expert(self, layer: int, i: int, h: Array) -> Array:
        fused = self.tensors.get(f"blk.{layer}.ffn_gate_up_exps.weight")
        bias = {p: self.tensors.get(f"blk.{layer}.ffn_{p}_exps.bias") for p in ("gate", "up", "down")}
        if fused is not None:
            gate, up = (half @ h for half in np.split(fused[i], 2))
        else:
            gate, up = (self.w(layer, f"ffn_{part}_exps.weight")[i] @ h for part in ("gate", "up"))
        if bias["gate"] is None or bias["up"] is None or bias["down"] is None:
            return np.asarray(self.w(layer, "ffn_down_exps.weight")[i] @ (silu(gate) * up))
        hidden = clamped_swiglu(gate + bias["gate"][i], up + bias["up"][i])
        return np.asarray(self.w(layer, "ffn_down_exps.weight")[i] @ hidden + bias["down"][i])

    def experts(self, layer: int, h: Array) -> Array:
        ids, weights = self.route(layer, h)
        self.picked[-1].append(ids)
        y = np.zeros(len(h))
        for i, weight in zip(ids, weights, strict=True):
            y = y + weight * self.expert(layer, int(i), h)
        if f"blk.{layer}.ffn_gate_shexp.weight" in self.tensors:
            gate = self.tensors.get(f"blk.{layer}.ffn_gate_inp_shexp.weight")
            y = y + (1.0 if gate is None else sigmoid(gate.reshape(-1) @ h)) * self.network(layer, h, "_shexp")
        return y
