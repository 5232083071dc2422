"""Several sessions on a GPU's double, and what they keep: the bits of each are those of a session alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, Tiers
from fomoe_io.errors import BudgetError
from fomoe_io.session import decode_together, read_together
from tests.gpu.test_device_engine import TOKENS, evaluate, nmse, settings, tiny
from tests.tiny_model import Type, write_tiny

pytestmark = pytest.mark.usefixtures("fake")

PARTS = [TOKENS[:3], TOKENS[2:9], TOKENS[5:6]]


CHANGES: dict[str, dict[str, Any]] = {
    "qwen35moe": {},
    "qwen3moe": {"shared_hidden": 0, "rotated": 64},
    "deepseek2": {"query_rank": 32, "layers": 2, "latent": 64, "dense": Type.F16},
}


@pytest.fixture(scope="module", params=list(CHANGES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with recurrent state, one without, one whose cache holds latents."""
    changes = {"weights": Type.Q4_K, "down": Type.Q6_K, "architecture": request.param} | CHANGES[request.param]
    shape = tiny(**changes)
    return write_tiny(tmp_path_factory.mktemp("models") / "model.gguf", shape, seed=3)


def read(engine: Engine, how: str) -> list[bytes]:
    """Logits after each part and after three more tokens, the sessions' steps in turn where there are several."""
    found: list[list[bytes]] = [[] for _ in PARTS]
    if how == "alone":
        for i, part in enumerate(PARTS):
            with_one = engine.session()
            found[i] = [with_one.prefill(part).tobytes(), *(with_one.decode(t).tobytes() for t in (7, 9, 11))]
            with_one.close()
    else:
        sessions = [engine.session() for _ in PARTS]
        for i, logits in enumerate(read_together(list(zip(sessions, PARTS, strict=True)))):
            found[i].append(logits.tobytes())
        for token in (7, 9):
            for i, session in enumerate(sessions):
                found[i].append(session.decode(token).tobytes())
        for i, logits in enumerate(decode_together([(session, 11) for session in sessions])):
            found[i].append(logits.tobytes())
        with pytest.raises(BudgetError, match="memory for 3 sessions"):
            engine.session()
        for session in sessions:
            session.close()
    return [b"".join(steps) for steps in found]


@pytest.mark.parametrize("kv_type", [pytest.param("f32", marks=pytest.mark.slow), "f16"])
def test_in_turn_and_together_as_alone(model: Path, kv_type: str) -> None:
    with Engine.open(model, settings(kv_type=kv_type)) as engine:
        alone = read(engine, "alone")
        one = engine.budgets.state_bytes
    with Engine.open(model, settings(kv_type=kv_type, sessions=3, tiers=Tiers(0.25, 0.25))) as engine:
        assert engine.budgets.state_bytes == 3 * one
        assert read(engine, "together") == alone
        assert read(engine, "together") == alone  # states that were used before
        graphs = len(engine.backend.tokens.all_graphs())  # type: ignore[attr-defined]
        assert graphs == 1  # one recording serves all sessions


def test_halves(model: Path) -> None:
    """Half the bytes a position, near the exact result, and the same bits whatever the memory."""
    exact, _ = evaluate(model, settings())
    halves, _ = evaluate(model, settings(kv_type="f16"))
    assert 0 < nmse(halves[1:], exact[1:]) < 1e-4
    less, statistics = evaluate(model, settings(kv_type="f16", tiers=Tiers(0.25, 0.25)))
    assert statistics["tiers"]["nvme"]["hits"] > 0
    np.testing.assert_array_equal(less, halves)
    on_cpu, _ = evaluate(model, settings(kv_type="f16", device="cpu"))
    assert nmse(halves, on_cpu) < 1e-2  # other activation types
    kept = []
    for kind in ("f32", "f16"):
        states = []
        for context in (64, 128):
            with Engine.open(model, settings(kv_type=kind, context_tokens=context)) as engine:
                states.append(engine.budgets.state_bytes)
        kept.append(states[1] - states[0])
    assert kept[0] == 2 * kept[1] > 0
