"""Small GGUF models with random weights, written with package gguf, for tests of files and stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

COLUMNS, HIDDEN, EXPERTS, USED = 256, 512, 6, 2
F16, Q4_K, Q6_K, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "Q4_K", "Q6_K", "Q8_0"))
TYPES = ((Q4_K, Q4_K, Q6_K), (Q4_K, Q4_K, Q4_K), (Q8_0, Q8_0, F16))
"""gate, up, down of each layer: no two layers alike."""


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
    """Write a model and return the bytes of its tensors (uint8, [..., row bytes]).

    With `fused`, gate and up of the same random weights become one tensor; with `shard_tensors`, shards of so many
    tensors are written, NAME-00001-of-0000N.gguf beside `path`.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen35moe", split_max_tensors=shard_tensors)
    writer.add_name(name)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(USED)
    writer.add_context_length(4096)
    writer.add_token_list([f"token {i} ü" for i in range(2000)])
    writer.add_token_types([i % 5 for i in range(2000)])
    tensors: dict[str, np.ndarray] = {}

    def add(tensor: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, data: np.ndarray | None = None) -> None:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*shape[:-1], shape[-1] // block * block_bytes)
        data = rng.integers(0, 256, shape, np.uint8) if data is None else data
        tensors[tensor] = data
        writer.add_tensor(tensor, data, raw_dtype=kind)

    add("token_embd.weight", (2000, COLUMNS), Q4_K)
    for layer, (gate, up, down) in enumerate(types):
        prefix = f"blk.{layer}.ffn"
        add(f"blk.{layer}.attn_norm.weight", (COLUMNS,), gguf.GGMLQuantizationType.F32)
        add(f"{prefix}_gate_inp.weight", (experts, COLUMNS), gguf.GGMLQuantizationType.F32)
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
