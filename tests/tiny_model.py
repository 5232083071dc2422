"""Tiny random GGUF models of any shape, written with package gguf; for tests of the engine and the tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fomoe_io.storage.gguf import tensor_bytes

Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Tiny:
    """Shape of a model; sizes are chosen per test, unlike the demo model's."""

    architecture: str = "qwen35moe"
    layers: int = 4
    columns: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_columns: int = 32
    rotated: int = 16
    key_heads: int = 2
    value_heads: int = 4
    state_columns: int = 16
    taps: int = 4
    experts: int = 8
    used: int = 3
    hidden: int = 32
    shared_hidden: int = 32
    vocabulary: int = 300
    tied: bool = False
    fused: bool = False
    weights: Type = Type.F32
    gate: Type | None = None
    down: Type | None = None
    dense: Type | None = None  # what is not an expert
    fused_qkv: bool = False  # query, key and value of attention layers in one matrix
    biased: bool = False  # query, key and value have biases
    dense_layers: int = 0  # leading layers without experts
    normed: bool = True  # queries and keys have norms (of glm4moe)
    legacy: bool = False  # ssm_in in one matrix (of qwen3next)
    window: int = 5
    query_rank: int = 0  # of deepseek2; 0: queries come straight from the stream
    latent: int = 32  # of deepseek2, whose heads have head_columns of their own, and rotated ones
    value_columns: int = 32
    keys: tuple[tuple[str, Any], ...] = ()  # more metadata of the architecture, or other values; None: without the key

    @property
    def is_mixed(self) -> bool:
        """Delta-rule layers between those of attention."""
        return self.architecture in ("qwen35moe", "qwen3next")


def random_blocks(kind: Type, shape: tuple[int, ...], deviation: float, random: np.random.Generator) -> np.ndarray:
    """Raw bytes of a tensor: quantized by package gguf where it can, else random blocks with sane scales."""
    values = (random.standard_normal(tuple(reversed(shape))) * deviation).astype(np.float32)
    if kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_1, Type.Q5_1):
        return np.frombuffer(gguf.quants.quantize(values, kind).tobytes(), np.uint8)
    size = tensor_bytes(kind, shape)
    block = gguf.GGML_QUANT_SIZES[kind][1]
    raw = random.integers(0, 256, (size // block, block), dtype=np.uint8)
    if kind == Type.MXFP4:  # a block's exponent: its values are up to 6 times 2^(e - 127)
        raw[:, 0] = 127 + round(np.log2(deviation / 3))
        return raw.reshape(-1)
    half = {  # (offset, value) of the float16 scales: a random block then has about the deviation asked for
        Type.Q4_K: [(0, deviation / 286), (2, 7.5 * deviation / 286)],
        Type.Q5_K: [(0, deviation / 580), (2, 15.5 * deviation / 580)],
        Type.Q6_K: [(208, deviation / 1367)],
        Type.IQ4_NL: [(0, deviation / 70)],
        Type.Q3_K: [(108, deviation / 41)],
    }[kind]
    for offset, value in half:
        raw[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    return raw.reshape(-1)


class _Writer:
    def __init__(self, path: Path, shape: Tiny, random: np.random.Generator) -> None:
        self.gguf = gguf.GGUFWriter(path, shape.architecture)
        self.random = random

    def add(self, name: str, shape: tuple[int, ...], kind: Type, deviation: float) -> None:
        raw = random_blocks(kind, shape, deviation, self.random)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind == Type.F32:
            self.gguf.add_tensor(name, raw.view(np.float32).reshape(tuple(reversed(shape))))
        else:
            rows = tuple(reversed(shape[1:]))
            self.gguf.add_tensor(name, raw.reshape(*rows, shape[0] // block * size), raw_dtype=kind)

    def vector(self, name: str, values: np.ndarray) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(values, np.float32))


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """The 256 byte tokens, fillers, and an end-of-text token; their types; a merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, "Ġt", *(f"<filler{i}>" for i in range(size - 258)), "<|endoftext|>"]
    return tokens, [1] * 257 + [5] * (size - 258) + [3], ["Ġ t"]


def _metadata(writer: gguf.GGUFWriter, s: Tiny) -> None:
    tokens, types, merges = vocabulary(s.vocabulary)
    writer.add_name("tiny")
    keys: dict[str, Any] = {
        "block_count": s.layers, "context_length": 4096, "embedding_length": s.columns,
        "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads,
        "attention.key_length": s.head_columns, "attention.value_length": s.head_columns,
        "rope.dimension_count": s.rotated, "expert_count": s.experts, "expert_used_count": s.used,
        "expert_feed_forward_length": s.hidden, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
    }  # fmt: skip
    if s.architecture == "gpt-oss":
        keys |= {"attention.sliding_window": s.window}
    if s.architecture == "minimax-m2":
        keys |= {"feed_forward_length": s.hidden, "expert_gating_func": 2}
    if s.architecture == "glm4moe":
        keys |= {
            "feed_forward_length": 2 * s.hidden, "leading_dense_block_count": s.dense_layers, "expert_gating_func": 2,
            "expert_weights_norm": True, "expert_weights_scale": 2.5,
            "expert_shared_count": s.shared_hidden // s.hidden,
        }  # fmt: skip
    if s.architecture == "deepseek2":
        keys |= {
            "feed_forward_length": 2 * s.hidden, "leading_dense_block_count": s.dense_layers, "expert_gating_func": 2,
            "expert_weights_norm": True, "expert_weights_scale": 2.5,
            "expert_shared_count": s.shared_hidden // s.hidden, "attention.head_count_kv": 1,
            "attention.kv_lora_rank": s.latent, "attention.key_length": s.latent + s.rotated,
            "attention.value_length": s.latent, "attention.key_length_mla": s.head_columns + s.rotated,
            "attention.value_length_mla": s.value_columns, "attention.q_lora_rank": s.query_rank or None,
        }  # fmt: skip
    if s.is_mixed:
        keys |= {
            "ssm.conv_kernel": s.taps, "ssm.state_size": s.state_columns, "ssm.group_count": s.key_heads,
            "ssm.time_step_rank": s.value_heads, "ssm.inner_size": s.value_heads * s.state_columns,
            "full_attention_interval": 4,
        }  # fmt: skip
        if s.shared_hidden:
            keys["expert_shared_feed_forward_length"] = s.shared_hidden
    for key, value in (keys | dict(s.keys)).items():
        if value is not None:
            add_key(writer, f"{s.architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Metadata of the type that its Python value suggests."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def write_tiny(path: Path, s: Tiny, seed: int) -> Path:
    """Write the model; the same seed gives the same file."""
    random = np.random.default_rng(seed)
    w = _Writer(path, s, random)
    _metadata(w.gguf, s)
    unit = s.columns**-0.5
    w.add("token_embd.weight", (s.columns, s.vocabulary), s.weights, 1.0)
    if not s.tied:
        w.add("output.weight", (s.columns, s.vocabulary), s.dense or s.weights, unit)
    w.vector("output_norm.weight", random.uniform(0.5, 1.5, s.columns))
    for layer in range(s.layers):
        _layer(w, s, layer, unit)
    w.gguf.write_header_to_file()
    w.gguf.write_kv_data_to_file()
    w.gguf.write_tensors_to_file()
    w.gguf.close()
    return path


def _layer(w: _Writer, s: Tiny, layer: int, unit: float) -> None:
    b, random, kind = f"blk.{layer}.", w.random, s.dense or s.weights
    d, hybrid = s.columns, s.is_mixed
    has_post = hybrid or s.architecture in ("glm4moe", "gpt-oss")
    w.vector(b + "attn_norm.weight", random.uniform(0.5, 1.5, d))
    w.vector(b + ("post_attention_norm.weight" if has_post else "ffn_norm.weight"), random.uniform(0.5, 1.5, d))
    if s.architecture == "deepseek2":
        _latent_attention(w, s, b, kind)
    elif not hybrid or (layer + 1) % 4 == 0:
        width = s.heads * s.head_columns
        queries, keys = 2 * width if hybrid else width, s.kv_heads * s.head_columns
        parts = {"qkv": queries + 2 * keys} if s.fused_qkv else {"q": queries, "k": keys, "v": keys}
        for part, rows in parts.items():
            w.add(b + f"attn_{part}.weight", (d, rows), kind, unit)
            if s.biased:
                w.vector(b + f"attn_{part}.bias", random.standard_normal(rows) / 2)
        w.add(b + "attn_output.weight", (width, d), kind, width**-0.5)
        whole = s.architecture == "minimax-m2"
        if s.normed and s.architecture != "gpt-oss":
            w.vector(b + "attn_q_norm.weight", random.uniform(0.5, 1.5, width if whole else s.head_columns))
            w.vector(b + "attn_k_norm.weight", random.uniform(0.5, 1.5, keys if whole else s.head_columns))
        if s.architecture == "gpt-oss":
            w.vector(b + "attn_sinks.weight", random.standard_normal(s.heads))
            w.vector(b + "attn_output.bias", random.standard_normal(d) / 4)
    else:
        keys, values = s.key_heads * s.state_columns, s.value_heads * s.state_columns
        if s.legacy:
            w.add(b + "ssm_in.weight", (d, 2 * keys + 2 * values), kind, unit)
        else:
            w.add(b + "attn_qkv.weight", (d, 2 * keys + values), kind, unit)
            w.add(b + "attn_gate.weight", (d, values), kind, unit)
        if s.architecture == "qwen3next":
            w.add(b + "ssm_ba.weight", (d, 2 * s.value_heads), kind, unit)
        else:
            w.add(b + "ssm_beta.weight", (d, s.value_heads), kind, unit)
            w.add(b + "ssm_alpha.weight", (d, s.value_heads), kind, unit)
        w.add(b + "ssm_conv1d.weight", (s.taps, 2 * keys + values), Type.F32, 0.5)
        w.vector(b + "ssm_dt.bias", random.standard_normal(s.value_heads))
        w.vector(b + "ssm_a", -random.uniform(0.1, 2, s.value_heads))
        w.vector(b + "ssm_norm.weight", random.uniform(0.5, 1.5, s.state_columns))
        w.add(b + "ssm_out.weight", (values, d), kind, values**-0.5)
    if layer < s.dense_layers:
        _network(w, b, "", d, 2 * s.hidden, kind)
        return
    if s.architecture in ("minimax-m2", "glm4moe", "deepseek2"):
        w.vector(b + "exp_probs_b.bias", random.standard_normal(s.experts) / 4)
    if s.architecture == "gpt-oss":
        w.vector(b + "ffn_gate_inp.bias", random.standard_normal(s.experts))
        for part, rows in (("gate", s.hidden), ("up", s.hidden), ("down", d)):
            w.vector(b + f"ffn_{part}_exps.bias", random.standard_normal((s.experts, rows)))
    w.add(b + "ffn_gate_inp.weight", (d, s.experts), Type.F32, 2 * unit)
    gate, up, down = s.gate or s.weights, s.weights, s.down or s.weights
    if s.fused:
        w.add(b + "ffn_gate_up_exps.weight", (d, 2 * s.hidden, s.experts), gate, unit)
    else:
        w.add(b + "ffn_gate_exps.weight", (d, s.hidden, s.experts), gate, unit)
        w.add(b + "ffn_up_exps.weight", (d, s.hidden, s.experts), up, unit)
    w.add(b + "ffn_down_exps.weight", (s.hidden, d, s.experts), down if layer % 2 else up, s.hidden**-0.5)
    if (hybrid or s.architecture in ("glm4moe", "deepseek2")) and s.shared_hidden:
        _network(w, b, "_shexp", d, s.shared_hidden, kind)
    if hybrid and s.shared_hidden:
        w.add(b + "ffn_gate_inp_shexp.weight", (d, 1), Type.F32, unit)


def _latent_attention(w: _Writer, s: Tiny, b: str, kind: Type) -> None:
    d, queries, random = s.columns, s.heads * (s.head_columns + s.rotated), w.random
    if s.query_rank:
        w.add(b + "attn_q_a.weight", (d, s.query_rank), kind, d**-0.5)
        w.vector(b + "attn_q_a_norm.weight", random.uniform(0.5, 1.5, s.query_rank))
        w.add(b + "attn_q_b.weight", (s.query_rank, queries), kind, s.query_rank**-0.5)
    else:
        w.add(b + "attn_q.weight", (d, queries), kind, d**-0.5)
    w.add(b + "attn_kv_a_mqa.weight", (d, s.latent + s.rotated), kind, d**-0.5)
    w.vector(b + "attn_kv_a_norm.weight", random.uniform(0.5, 1.5, s.latent))
    w.add(b + "attn_k_b.weight", (s.head_columns, s.latent, s.heads), kind, s.latent**-0.5)
    w.add(b + "attn_v_b.weight", (s.latent, s.value_columns, s.heads), kind, s.latent**-0.5)
    w.add(b + "attn_output.weight", (s.heads * s.value_columns, d), kind, (s.heads * s.value_columns) ** -0.5)


def _network(w: _Writer, b: str, name: str, columns: int, hidden: int, kind: Type) -> None:
    w.add(b + f"ffn_gate{name}.weight", (columns, hidden), kind, columns**-0.5)
    w.add(b + f"ffn_up{name}.weight", (columns, hidden), kind, columns**-0.5)
    w.add(b + f"ffn_down{name}.weight", (hidden, columns), kind, hidden**-0.5)
