"""Every architecture against llama.cpp's logits, experts and weights, and against itself whatever the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig

FLOATS = ("qwen3next", "qwen3next-legacy", "minimax-m2", "glm4moe", "glm4moe-air", "gpt-oss", "qwen35moe-yarn-mtp")
EXACT = {"activations": "float32", "context_tokens": 128}


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


def fixture(shared: Path, name: str) -> tuple[Path, Any]:
    directory = shared / "reference/architectures"
    return directory / f"{name}.gguf", np.load(directory / f"{name}-ref.npz")


def evaluate(path: Path, tokens: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, experts, weights) of all tokens in one batch."""
    with Engine.open(path, EngineConfig(**settings)) as engine:
        session = engine.session()
        logits = session.evaluate(tokens, record=("experts", "weights"))
        return logits, session.records["experts"], session.records["weights"]


def decode(path: Path, tokens: np.ndarray, **settings: Any) -> np.ndarray:
    """Logits, token by token."""
    with Engine.open(path, EngineConfig(**settings)) as engine:
        session = engine.session()
        return np.stack([session.decode(int(token)).copy() for token in tokens])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kernels", ["ggml", "portable"])
def test_logits_and_experts_are_those_of_llama_cpp(shared: Path, name: str, kernels: str) -> None:
    path, expected = fixture(shared, name)
    logits, experts, weights = evaluate(path, expected["tokens"], kernels=kernels, **EXACT)
    assert np.array_equal(experts, expected["experts"])
    assert np.abs(weights - expected["expert_weights"])[experts >= 0].max() < 1e-4
    assert nmse(logits, expected["logits_batch"]) < 1e-9
    assert np.array_equal(decode(path, expected["tokens"], kernels=kernels, **EXACT), logits)


@pytest.mark.parametrize("kernels", ["ggml", "portable"])
def test_mxfp4_experts(shared: Path, kernels: str) -> None:
    """The decoded weights with float activations; llama.cpp's own rounding of activations within its noise."""
    path, expected = fixture(shared, "gpt-oss-mxfp4")
    logits, experts, _ = evaluate(path, expected["tokens"], kernels=kernels, **EXACT)
    assert np.array_equal(experts, expected["experts_decoded"])
    assert nmse(logits, expected["logits_decoded"]) < 1e-9
    rounded, _, _ = evaluate(path, expected["tokens"], kernels=kernels, context_tokens=128)
    assert nmse(rounded, expected["logits_batch"]) < 1e-3
