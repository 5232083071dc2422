"""Every architecture against llama.cpp's logits, experts and weights, and against itself whatever the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.experts.car import CarRule
from layout_tool.main import main as layout
from tests.tiny_model import Tiny, Type, write_tiny

FLOATS = (
    "qwen3next",
    "qwen3next-legacy",
    "minimax-m2",
    "glm4moe",
    "glm4moe-air",
    "gpt-oss",
    "deepseek2",
    "qwen35moe-yarn-mtp",
)
EXACT = {"activations": "float32", "context_tokens": 128}

TOKENS = np.random.default_rng(9).integers(0, 300, 40)
GROUPS: dict[str, Any] = {
    "used": 3, "experts": 8, "keys": (("expert_group_count", 4), ("expert_group_used_count", 2)),
}  # fmt: skip
SHAPES = {
    "qwen3next": Tiny(architecture="qwen3next", weights=Type.Q8_0),
    "minimax-m2": Tiny(architecture="minimax-m2", weights=Type.Q8_0),
    "glm4moe": Tiny(architecture="glm4moe", dense_layers=1, biased=True, weights=Type.Q8_0),
    "gpt-oss": Tiny(architecture="gpt-oss", biased=True, rotated=32, dense=Type.Q8_0, weights=Type.MXFP4),
    "deepseek2": Tiny(architecture="deepseek2", dense_layers=1, weights=Type.Q8_0, query_rank=32, **GROUPS),
}


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


@pytest.fixture(scope="module", params=SHAPES)
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quantized model as it is, packed and indexed."""
    root = tmp_path_factory.mktemp("stores")
    path = write_tiny(root / "model.gguf", SHAPES[request.param], 4)
    assert layout(["plan", str(path)]) == 0
    for command in ("pack", "index"):
        assert layout([command, str(path), "--to", str(root / command)]) == 0
    assert layout(["verify", str(root / "pack"), "--against", str(path)]) == 0
    return {"gguf": path, "pack": root / "pack", "index": root / "index"}


WAYS: dict[str, dict[str, Any]] = {
    "one thread": {"threads": 1},
    "three threads": {"threads": 3},
    "one by one": {"batch_tokens": 1},
    "seven at once": {"batch_tokens": 7},
    "as few slots as may be": {"slots": 3},
    "two tiers": {"tiers": Tiers(0.2, 0.3), "policy": "lfru"},
    "lookahead": {"slots": 4, "lookahead": 2, "batch_tokens": 1},
}


def test_bits_do_not_depend_on_store_memory_batch_and_threads(stores: dict[str, Path]) -> None:
    expected = evaluate(stores["gguf"], TOKENS, context_tokens=64)[0].tobytes()
    for way in WAYS.values():
        for store in ("gguf", "pack") if "slots" in way else ("gguf",):
            assert evaluate(stores[store], TOKENS, context_tokens=64, **way)[0].tobytes() == expected, (store, way)
    for store in ("pack", "index"):
        assert decode(stores[store], TOKENS, context_tokens=64, slots=3).tobytes() == expected


def test_a_trace_and_a_profile_of_every_architecture(stores: dict[str, Path], tmp_path: Path) -> None:
    """Layers without experts stand in neither."""
    trace = tmp_path / "run.trace"
    evaluate(stores["pack"], TOKENS, context_tokens=64, slots=3, trace=trace)
    assert trace.stat().st_size > 0
    text = tmp_path / "text"
    text.write_text("It was a dark and stormy night. " * 8)
    assert layout(["profile", str(stores["gguf"]), "-f", str(text), "-o", str(tmp_path / "profile")]) == 0
    args = ["pack", str(stores["gguf"]), "--to", str(tmp_path / "sorted"), "--profile", str(tmp_path / "profile")]
    assert layout(args) == 0
    expected = evaluate(stores["gguf"], TOKENS, context_tokens=64)[0]
    assert np.array_equal(evaluate(tmp_path / "sorted", TOKENS, context_tokens=64, slots=3)[0], expected)


def test_a_window_keeps_no_more_than_its_ring(tmp_path: Path) -> None:
    """In a long context: the bits of the whole cache, whatever the batches, also past a snapshot; and less memory."""
    path = write_tiny(tmp_path / "model.gguf", SHAPES["gpt-oss"], 2)
    tokens = np.random.default_rng(5).integers(0, 300, 100)
    whole = {batch: EngineConfig(context_tokens=128, batch_tokens=batch) for batch in (1, 4, 7)}
    ring = {batch: EngineConfig(context_tokens=256, batch_tokens=batch) for batch in (1, 4, 7)}
    with Engine.open(path, whole[7]) as engine:
        assert engine.session().recurrent_bytes == 0
        expected, whole_bytes = engine.session().evaluate(tokens), engine.statistics()["budgets"]["state_bytes"]
    for batch, config in ring.items():
        with Engine.open(path, config) as engine:
            assert engine.statistics()["budgets"]["state_bytes"] < 1.5 * whole_bytes  # twice the context
            session = engine.session()
            logits = [session.evaluate(tokens[:61])]
            assert session.recurrent_bytes == 2 * 2 * 2 * 2 * (5 + batch - 1) * 32 * 4  # layers, K and V, heads, copies
            kept = session.snapshot()
            session.evaluate(tokens[:30])
            session.restore(kept)
            logits.append(session.evaluate(tokens[61:]))
            assert np.concatenate(logits).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["minimax-m2", "glm4moe", "gpt-oss", "deepseek2"])
def test_cache_aware_routing_of_every_router(tmp_path: Path, name: str) -> None:
    """Where a bias chooses, too; a rule that gives up nothing changes nothing."""
    path = write_tiny(tmp_path / "model.gguf", SHAPES[name], 1)
    found = []
    for text in ("off", "regret:0.0", "regret:1.0,keep=0"):
        config = EngineConfig(car=CarRule.parse(text), slots=4, context_tokens=64)
        with Engine.open(path, config) as engine:
            session = engine.session()
            logits = np.stack([session.decode(int(token)).copy() for token in TOKENS])
            s = engine.statistics()
        found.append((logits.tobytes(), s["substitutions"], s["tiers"]["nvme"]["hits"]))
    assert found[0] == found[1] and found[0][1] == 0
    assert found[2][1] > 30 and found[2][2] < found[0][2] - 30
