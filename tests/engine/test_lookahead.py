"""Reading the next layer's experts ahead never changes the text, and is counted as what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from tests.fakes.ahead import drives

TOKENS = 60


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


OTHERS: list[dict[str, Any]] = [
    {"threads": 3}, {"reader": "pread"}, {"ring_depth": 1}, {"policy": "lru"}, {"tiers": Tiers(0, 0.2)}
]  # fmt: skip


def decisions(s: dict[str, Any]) -> list[Any]:
    """All that is counted of the experts but the reads."""
    names = ("expert_requests", "substitutions", "evictions", "promotions", "demotions")
    return [*(s[name] for name in names), *(tier["hits"] for tier in s["tiers"].values())]


def check(s: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Only reads have changed: those that were waited for were made on demand, or had begun ahead."""
    prefetch, nvme = s["prefetch"], s["tiers"]["nvme"]
    assert decisions(s) == decisions(plain)
    assert 0 <= prefetch["late"] <= prefetch["useful"] <= prefetch["issued"]
    assert nvme["reads"] >= nvme["hits"] - prefetch["useful"] + prefetch["issued"]
    assert prefetch["wasted_bytes"] <= prefetch["bytes"] <= nvme["bytes"]
    return prefetch


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, {}), ("on", {}), *((1 if i % 2 else "on", s) for i, s in enumerate(OTHERS)),
     *(pytest.param("on" if i % 2 else 1, s, marks=pytest.mark.slow) for i, s in enumerate(OTHERS))],
)  # fmt: skip
def test_the_text_stays_the_same(
    demo_model: Path, plain: tuple[bytes, dict[str, Any]], ranks: Any, settings: dict[str, Any]
) -> None:
    logits, s = answer(demo_model, lookahead=ranks, **settings)
    assert logits == plain[0]
    other = {"tiers", "policy"} & set(settings)
    prefetch, nvme = check(s, s if other else plain[1]), s["tiers"]["nvme"]
    assert nvme["reads"] == nvme["hits"] - prefetch["useful"] + prefetch["issued"]
    assert prefetch["useful"] > 0 and s["budgets"]["lookahead_bytes"] > 0
    assert prefetch["is_on"] and prefetch["recall"][0] is None
    assert all(0 < share < 1 for share in prefetch["recall"][1:])


@pytest.mark.parametrize("mode", ["hold", "spoil", "fail", "refuse"])
def test_whatever_becomes_of_reads_ahead(demo_model: Path, plain: tuple[bytes, dict[str, Any]], mode: str) -> None:
    with drives(mode):
        logits, s = answer(demo_model, lookahead=4)
    assert logits == plain[0]
    prefetch, nvme = check(s, plain[1]), s["tiers"]["nvme"]
    again = nvme["reads"] - (nvme["hits"] - prefetch["useful"] + prefetch["issued"])
    assert (again > 0) == (mode in ("spoil", "fail")) and again <= prefetch["useful"]
    if mode in ("hold", "spoil"):
        assert prefetch["late"] == prefetch["useful"] > 0 == prefetch["wasted_bytes"]
    else:
        assert prefetch["bytes"] == 0 and (prefetch["issued"] > 0) == (mode == "fail")


def test_off_by_default(plain: tuple[bytes, dict[str, Any]]) -> None:
    assert not any(plain[1]["prefetch"].values()) and plain[1]["budgets"]["lookahead_bytes"] == 0


def test_stand_ins_do_not_depend_on_guesses(demo_model: Path) -> None:
    for rule in (CarRule("ratio", 0.4), CarRule.parse("ratio:0.4,backfill=2")):
        expected, without = answer(demo_model, car=rule)
        logits, s = answer(demo_model, lookahead=4, car=rule)
        assert logits == expected and s["substitutions"] > 0
        assert check(s, without)["useful"] > 0


def test_a_trace_is_replayed_with_the_same_counts(demo_model: Path, tmp_path: Path) -> None:
    _, s = answer(demo_model, lookahead="on", trace=tmp_path / "t")
    trace = Trace.load(tmp_path / "t")
    c = replay(trace, np.array(trace.header.slots), decay=trace.header.decay, as_chosen=True).counters
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [tier["hits"] for tier in s["tiers"].values()]
    assert s["prefetch"]["useful"] > 0


def test_a_bad_setting() -> None:
    with pytest.raises(UsageError, match="lookahead"):
        EngineConfig(lookahead=99)
