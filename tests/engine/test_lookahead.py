"""Reading the next layer's experts ahead never changes the text, and is counted as what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule

TOKENS = 120


def answer(model: Path, **settings: Any) -> tuple[bytes, dict[str, Any]]:
    """All logits of single tokens with batches between them, and the statistics."""
    random = np.random.default_rng(6)
    settings.setdefault("tiers", Tiers(0.2, 0.3))
    with Engine.open(model, EngineConfig(context_tokens=256, **settings)) as engine:
        session = engine.session()
        logits = [session.evaluate(random.integers(0, 8000, 9))]
        for i, token in enumerate(random.integers(0, 8000, TOKENS)):
            logits.append(session.decode(int(token))[None].copy())
            if i % 40 == 20:
                logits.append(session.evaluate(random.integers(0, 8000, 30)))
        return np.concatenate(logits).tobytes(), engine.statistics()


@pytest.fixture(scope="module")
def plain(demo_model: Path) -> tuple[bytes, dict[str, Any]]:
    return answer(demo_model)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"threads": 3}, {"reader": "pread"}, {"ring_depth": 1}, {"policy": "lru"}, {"tiers": Tiers(0, 0.2)}],
)
def test_the_text_stays_the_same(
    demo_model: Path, plain: tuple[bytes, dict[str, Any]], ranks: int, settings: dict[str, Any]
) -> None:
    logits, s = answer(demo_model, lookahead=ranks, **settings)
    assert logits == plain[0]
    assert s["expert_requests"] == plain[1]["expert_requests"] == sum(tier["hits"] for tier in s["tiers"].values())
    prefetch, nvme = s["prefetch"], s["tiers"]["nvme"]
    assert 0 <= prefetch["late"] <= prefetch["useful"] <= prefetch["issued"]
    # who was waited for was read: on demand, or ahead and too late
    assert nvme["reads"] == nvme["hits"] - prefetch["late"] + prefetch["issued"]
    assert (prefetch["bytes"] > 0) == (prefetch["issued"] > 0) and prefetch["bytes"] <= nvme["bytes"]
    assert (prefetch["wasted_bytes"] > 0) == (prefetch["useful"] < prefetch["issued"])
    if not settings:
        assert prefetch["useful"] > 0


def test_off_by_default_and_with_cache_aware_routing(demo_model: Path, plain: tuple[bytes, dict[str, Any]]) -> None:
    assert plain[1]["prefetch"] == {"issued": 0, "useful": 0, "late": 0, "bytes": 0, "wasted_bytes": 0}
    rule = CarRule("ratio", 0.4)
    logits, s = answer(demo_model, lookahead=4, car=rule)
    assert s["prefetch"]["issued"] == 0 and s["substitutions"] > 0
    assert logits == answer(demo_model, car=rule)[0]


def test_a_bad_setting() -> None:
    with pytest.raises(UsageError, match="lookahead"):
        EngineConfig(lookahead=99)
