"""Small GGUF models with random weights, written with package gguf, for tests of files and stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from fomoe_io.storage.store import Store

COLUMNS, HIDDEN, EXPERTS, USED = 256, 512, 6, 2
STATE, TAPS = 32, 4
F32, F16, Q4_K, Q6_K, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_K", "Q6_K", "Q8_0"))
TYPES = ((Q4_K, Q4_K, Q6_K), (Q4_K, Q4_K, Q4_K), (Q8_0, Q8_0, F16))
"""gate, up, down of each layer: no two layers alike."""


def _write_metadata(writer: gguf.GGUFWriter, name: str, layers: int, experts: int) -> None:
    writer.add_name(name)
    writer.add_block_count(layers)
    writer.add_embedding_length(COLUMNS)
    writer.add_context_length(4096)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(USED)
    writer.add_expert_feed_forward_length(HIDDEN)
    sizes = {"conv_kernel": TAPS, "state_size": STATE, "group_count": 1, "time_step_rank": 1, "inner_size": STATE}
    for key, value in sizes.items():
        writer.add_uint32(f"qwen35moe.ssm.{key}", value)
    writer.add_tokenizer_model("gpt2")
    mergeable = {1990: "a", 1995: "b", 1996: "ab"}
    writer.add_token_list([mergeable.get(i, f"token {i} ü") for i in range(2000)])
    writer.add_token_types([i % 5 for i in range(2000)])
    writer.add_token_merges(["a b"])


def _mixer_shapes() -> dict[str, tuple[int, ...]]:
    """Of a delta-rule layer with one head."""
    return {
        "attn_norm.weight": (COLUMNS,),
        "post_attention_norm.weight": (COLUMNS,),
        "attn_qkv.weight": (3 * STATE, COLUMNS),
        "attn_gate.weight": (STATE, COLUMNS),
        "ssm_beta.weight": (1, COLUMNS),
        "ssm_alpha.weight": (1, COLUMNS),
        "ssm_conv1d.weight": (3 * STATE, TAPS),
        "ssm_a": (1,),
        "ssm_dt.bias": (1,),
        "ssm_norm.weight": (STATE,),
        "ssm_out.weight": (COLUMNS, STATE),
    }


def write_model(
    path: Path,
    seed: int,
    *,
    types: Sequence[tuple[gguf.GGMLQuantizationType, ...]] = TYPES,
    experts: int = EXPERTS,
    fused: bool = False,
    shard_tensors: int = 0,
    name: str = "tiny",
) -> dict[str, np.ndarray]:
    """Write a model that runs and return the bytes of its tensors (uint8, [..., row bytes]).

    With `fused`, gate and up are one tensor; with `shard_tensors`, shards of so many tensors are written,
    NAME-00001-of-0000N.gguf beside `path`.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen35moe", split_max_tensors=shard_tensors)
    _write_metadata(writer, name, len(types), experts)
    tensors: dict[str, np.ndarray] = {}

    def add(tensor: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tensors[tensor] = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * block_bytes), np.uint8)
        writer.add_tensor(tensor, tensors[tensor], raw_dtype=kind)

    add("token_embd.weight", (2000, COLUMNS), Q4_K)
    add("output_norm.weight", (COLUMNS,), F32)
    for layer, (gate, up, down) in enumerate(types):
        prefix = f"blk.{layer}.ffn"
        for tensor, shape in _mixer_shapes().items():
            add(f"blk.{layer}.{tensor}", shape, F32)
        add(f"{prefix}_gate_inp.weight", (experts, COLUMNS), F32)
        add(f"{prefix}_down_exps.weight", (experts, COLUMNS, HIDDEN), down)
        if fused:
            add(f"{prefix}_gate_up_exps.weight", (experts, 2 * HIDDEN, COLUMNS), gate)
        else:
            add(f"{prefix}_gate_exps.weight", (experts, HIDDEN, COLUMNS), gate)
            add(f"{prefix}_up_exps.weight", (experts, HIDDEN, COLUMNS), up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def expert_bytes(tensors: dict[str, np.ndarray], layer: int, expert: int) -> list[bytes]:
    """gate, up and down of an expert, from what `write_model` returned."""
    fused = tensors.get(f"blk.{layer}.ffn_gate_up_exps.weight")
    if fused is not None:
        half = fused.shape[1] // 2
        gate, up = fused[expert, :half], fused[expert, half:]
    else:
        gate, up = (tensors[f"blk.{layer}.ffn_{part}_exps.weight"][expert] for part in ("gate", "up"))
    return [part.tobytes() for part in (gate, up, tensors[f"blk.{layer}.ffn_down_exps.weight"][expert])]


def read_expert(store: Store, layer: int, expert: int) -> list[bytes]:
    """gate, up and down of an expert, read where the store says they are."""
    parts = []
    for file, offset, size in store.experts[layer].extents[expert].tolist():
        with store.paths[file].open("rb") as stream:
            stream.seek(offset)
            parts.append(stream.read(size))
    return parts


def read_resident(store: Store, name: str) -> bytes:
    """A resident tensor, read where the store says it is."""
    info = store.resident[name]
    with store.paths[info.file].open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.bytes)
