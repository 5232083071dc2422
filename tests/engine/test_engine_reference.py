"""The engine against the float64 model over shapes that the demo model does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from tests.reference_model import ReferenceModel
from tests.tiny_model import Tiny, write_tiny

Type = gguf.GGMLQuantizationType
TOKENS = 12


def scaled(kind: str, factor: float) -> tuple[tuple[str, Any], ...]:
    """Metadata of a rope scaling."""
    return ("rope.scaling.type", kind), ("rope.scaling.factor", factor)


MULTIPLIER = ("rope.scaling.yarn_log_multiplier", 0.1)
SHAPES = {
    "gqa 1": Tiny(heads=2, kv_heads=2),
    "gqa 8, wide heads": Tiny(heads=8, kv_heads=1, head_columns=64, rotated=64),
    "value heads = key heads": Tiny(key_heads=4, value_heads=4),
    "value heads 4x": Tiny(key_heads=2, value_heads=8, state_columns=32),
    "odd state, 3 taps": Tiny(state_columns=20, taps=3, head_columns=24, rotated=8),
    "no shared expert": Tiny(shared_hidden=0),
    "another shared width": Tiny(shared_hidden=96),
    "top-1": Tiny(used=1),
    "top-16 of 512": Tiny(experts=512, used=16, hidden=8, layers=2),
    "all experts": Tiny(experts=5, used=5),
    "fused gate and up": Tiny(fused=True),
    "tied output": Tiny(tied=True),
    "one column wider": Tiny(columns=72, hidden=40),
    "qwen3moe": Tiny(architecture="qwen3moe", rotated=32),
    "qwen3moe, gqa 4": Tiny(architecture="qwen3moe", heads=8, kv_heads=2, layers=2, rotated=32),
    "fused query, key and value": Tiny(fused_qkv=True),
    "qwen3moe, fused query, key and value": Tiny(architecture="qwen3moe", rotated=32, fused_qkv=True, layers=2),
    "biases": Tiny(architecture="qwen3moe", rotated=32, biased=True, layers=2),
    "a bias of the fused": Tiny(architecture="qwen3moe", rotated=32, fused_qkv=True, biased=True, layers=2),
    "yarn": Tiny(keys=scaled("yarn", 4.0), rotated=32),
    "yarn, a context of its own": Tiny(
        architecture="qwen3moe",
        rotated=32,
        layers=2,
        keys=(*scaled("yarn", 2.5), ("rope.scaling.original_context_length", 300), ("rope.scaling.attn_factor", 0.9)),
    ),
    "linear": Tiny(keys=scaled("linear", 8.0)),
    "linear by default": Tiny(keys=(("rope.scaling.factor", 3.0),)),
    "linear by the old key": Tiny(architecture="qwen3moe", rotated=32, layers=2, keys=(("rope.scale_linear", 4.0),)),
    "scaling none": Tiny(keys=scaled("none", 8.0)),
    "qwen3next": Tiny(architecture="qwen3next", key_heads=2, value_heads=6, state_columns=24),
    "qwen3next, one matrix": Tiny(architecture="qwen3next", legacy=True, key_heads=3, value_heads=3, tied=True),
    "qwen3next, yarn": Tiny(architecture="qwen3next", keys=scaled("yarn", 4.0), rotated=32, fused=True),
    "minimax-m2": Tiny(architecture="minimax-m2", heads=6, kv_heads=3, head_columns=40, rotated=24, experts=11, used=4),
    "minimax-m2, fused": Tiny(architecture="minimax-m2", fused_qkv=True, layers=2),
    "minimax-m2, softmax": Tiny(architecture="minimax-m2", layers=2, keys=(("expert_gating_func", 1),)),
    "glm4moe": Tiny(architecture="glm4moe", dense_layers=1, biased=True, shared_hidden=64, head_columns=24),
    "glm4moe, no norms": Tiny(architecture="glm4moe", dense_layers=3, normed=False, biased=True, used=2),
    "glm4moe, not scaled": Tiny(
        architecture="glm4moe",
        layers=3,
        shared_hidden=0,
        fused_qkv=True,
        biased=True,
        keys=(("expert_weights_scale", 0.0), ("expert_weights_norm", False)),
    ),
    "gpt-oss": Tiny(architecture="gpt-oss", rotated=32, biased=True, keys=scaled("yarn", 8.0)),
    "gpt-oss, a window of one": Tiny(
        architecture="gpt-oss", heads=8, kv_heads=1, head_columns=40, rotated=40, window=1
    ),
    "gpt-oss, a window in two layers of three": Tiny(
        architecture="gpt-oss",
        layers=6,
        window=7,
        fused_qkv=True,
        biased=True,
        hidden=40,
        keys=(("attention.sliding_window_pattern", 3), ("rope.freq_base_swa", 500.0)),
    ),
    "deepseek2": Tiny(
        architecture="deepseek2",
        dense_layers=1,
        query_rank=24,
        latent=40,
        value_columns=24,
        experts=12,
        used=3,
        keys=(("expert_group_count", 4), ("expert_group_used_count", 2), *scaled("yarn", 8.0), MULTIPLIER),
    ),
    "deepseek2, yarn of old": Tiny(
        architecture="deepseek2",
        layers=2,
        query_rank=20,
        head_columns=24,
        rotated=12,
        shared_hidden=64,
        keys=(*scaled("yarn", 3.0), ("rope.scaling.attn_factor", 1.2)),
    ),
    "deepseek2, as V2": Tiny(
        architecture="deepseek2",
        layers=3,
        dense_layers=2,
        query_rank=16,
        heads=3,
        fused=True,
        keys=(("expert_gating_func", 1), ("expert_weights_norm", False), ("expert_weights_scale", 16.0)),
    ),
    "deepseek2, lite": Tiny(
        architecture="deepseek2",
        layers=26,
        dense_layers=24,
        columns=32,
        hidden=16,
        shared_hidden=0,
        experts=4,
        heads=2,
        latent=24,
        tied=True,
    ),
    "head counts a layer": Tiny(keys=(("attention.head_count", [4] * 4), ("attention.head_count_kv", [0, 0, 0, 2]))),
}


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


def compare(path: Path, config: EngineConfig, seed: int) -> tuple[float, bool]:
    """(NMSE of all logits, whether all chosen experts are the same)."""
    reference = ReferenceModel(path)
    with Engine.open(path, config) as engine:
        tokens = np.random.default_rng(seed).integers(0, engine.shape.vocabulary, TOKENS)
        session = engine.session()
        ours = session.evaluate(tokens, record=("experts",))
        experts = session.records["experts"]
    theirs = np.stack([reference.forward(int(token)) for token in tokens])
    picked = np.array(reference.picked).transpose(1, 0, 2)
    return nmse(ours, theirs), bool(np.array_equal(np.sort(experts, -1), np.sort(picked, -1)))


@pytest.mark.parametrize("name", SHAPES)
def test_float_shapes(tmp_path: Path, name: str) -> None:
    seed = 100 + list(SHAPES).index(name)
    path = write_tiny(tmp_path / "tiny.gguf", SHAPES[name], seed)
    error, same = compare(path, EngineConfig(context_tokens=32), seed)
    assert same and error < 1e-10


@pytest.mark.parametrize(
    "name", ["gqa 1", "top-16 of 512", "qwen3moe", "qwen3next", "minimax-m2", "glm4moe", "gpt-oss", "deepseek2"]
)
def test_portable_kernels_and_few_slots(tmp_path: Path, name: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", SHAPES[name], 7)
    config = EngineConfig(
        context_tokens=32, kernels="portable", tiers=Tiers(0, SHAPES[name].used / SHAPES[name].experts)
    )
    error, same = compare(path, config, 7)
    assert same and error < 1e-10


QUANTIZED = [
    Type.F16,
    Type.BF16,
    Type.Q8_0,
    Type.Q4_0,
    Type.Q5_0,
    Type.IQ4_NL,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.Q3_K,
]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("activations", ["float32", "quantized"])
def test_types(tmp_path: Path, kind: Type, activations: str) -> None:
    """Exact with float activations; with quantized ones within what rounding activations to 8 bits may do."""
    shape = Tiny(columns=256, hidden=256, shared_hidden=256, state_columns=64, head_columns=64, weights=kind, experts=6)
    path = write_tiny(tmp_path / "tiny.gguf", shape, int(kind))
    error, same = compare(path, EngineConfig(context_tokens=32, activations=activations), int(kind))
    if activations == "float32":
        assert same and error < 1e-9
    else:
        assert error < 2e-2


@pytest.mark.parametrize("kernels", ["ggml", "portable"])
def test_mixed_types(tmp_path: Path, kernels: str) -> None:
    """Gate, up and down of different types, and down changing from layer to layer."""
    shape = Tiny(
        columns=256, hidden=256, shared_hidden=256, state_columns=64, head_columns=64,
        weights=Type.Q4_K, gate=Type.Q8_0, down=Type.Q6_K,
    )  # fmt: skip
    path = write_tiny(tmp_path / "tiny.gguf", shape, 5)
    error, _ = compare(path, EngineConfig(context_tokens=32, kernels=kernels), 5)
    assert error < 2e-2
    error, same = compare(path, EngineConfig(context_tokens=32, kernels=kernels, activations="float32"), 5)
    assert same and error < 1e-9


def test_reference_equals_llama_cpp(shared: Path) -> None:
    """The float64 model itself is right: it agrees with llama.cpp's logits to float32 rounding."""
    fixtures = shared / "reference/fixtures"
    expected = np.load(fixtures / "nano-f32-ref.npz")
    model = ReferenceModel(fixtures / "nano-f32.gguf")
    logits = np.stack([model.forward(int(token)) for token in expected["tokens"]])
    assert nmse(logits, expected["logits_step"]) < 1e-11


@pytest.mark.parametrize(
    "name", ["qwen3next", "qwen3next-legacy", "minimax-m2", "glm4moe", "glm4moe-air", "gpt-oss", "deepseek2"]
)
def test_reference_of_other_architectures_equals_llama_cpp(shared: Path, name: str) -> None:
    directory = shared / "reference/architectures"
    expected, model = np.load(directory / f"{name}-ref.npz"), ReferenceModel(directory / f"{name}.gguf")
    logits = np.stack([model.forward(int(token)) for token in expected["tokens"]])
    assert np.array_equal(np.array(model.picked).transpose(1, 0, 2), expected["experts"])
    assert nmse(logits, expected["logits_steps"]) < 1e-11
