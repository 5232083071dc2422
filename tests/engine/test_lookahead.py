"""Reading the next layer's experts ahead never changes the text, and is counted as what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cpu.backend import CpuBackend
from fomoe_io.errors import BudgetError, UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from tests.fakes.ahead import drives
from tests.tiny_model import Tiny, write_tiny

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
    return answer(demo_model, lookahead="off")


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


def test_off(plain: tuple[bytes, dict[str, Any]]) -> None:
    assert not any(plain[1]["prefetch"].values()) and plain[1]["budgets"]["lookahead_bytes"] == 0


def test_measured_by_default(demo_model: Path, plain: tuple[bytes, dict[str, Any]]) -> None:
    """With the default some of these tokens look ahead, some do not, and nothing but reads tells them apart."""
    logits, s = answer(demo_model)
    assert logits == plain[0] and s["prefetch"]["is_on"] in (False, True)
    prefetch, nvme = check(s, plain[1]), s["tiers"]["nvme"]
    assert nvme["reads"] == nvme["hits"] - prefetch["useful"] + prefetch["issued"]
    assert prefetch["useful"] > 0 and prefetch["recall"][0] is None and all(prefetch["recall"][1:])
    asked_for = Engine.open(demo_model, EngineConfig(context_tokens=256, tiers=Tiers(0.2, 0.3), lookahead="on"))
    with asked_for as engine:  # there is room for as many
        assert engine.budgets.lookahead_bytes == s["budgets"]["lookahead_bytes"] > 0


def test_it_costs_nothing_where_nothing_is_missed(demo_model: Path) -> None:
    """Neither memory nor steps of a token: by default the engine is the one without it."""
    found = {}
    for mode in ("auto", "off", "on"):
        config = EngineConfig(context_tokens=256, lookahead=mode, ram_bytes=4 << 30)  # type: ignore[arg-type]
        with Engine.open(demo_model, config) as engine:
            assert isinstance(engine.backend, CpuBackend)
            found[mode] = engine.budgets, engine.backend._recorder.program.steps
            assert engine.statistics()["prefetch"]["is_on"] == (mode == "on")
    assert found["auto"] == found["off"] and found["on"][0].lookahead_bytes > 0 and found["on"][1] > found["off"][1]


def smallest_bytes(model: Path, **how: Any) -> int:
    """What the error names, of a budget of nearly nothing."""
    with pytest.raises(BudgetError) as caught:
        Engine.open(model, EngineConfig(context_tokens=256, ram_bytes=1 << 20, **how))
    return caught.value.smallest_bytes


def test_it_yields_where_memory_is_short(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest budget stays what it is, and slots come first: at most one part in 32 goes to buffers."""
    # pytest's process holds more from one moment to the next
    monkeypatch.setattr("fomoe_io.ram_budget.held_since", lambda _: 0)
    monkeypatch.setattr("fomoe_io.ram_budget.process_bytes", lambda *_: 96 << 20)
    least = smallest_bytes(demo_model, lookahead="off")
    assert smallest_bytes(demo_model) == least
    asked_for = smallest_bytes(demo_model, lookahead="on")
    with Engine.open(demo_model, EngineConfig(context_tokens=256, lookahead="on", ram_bytes=asked_for)) as engine:
        assert engine.budgets.lookahead_bytes == asked_for - least
    for how in ({}, {"slots": 4}, {"tiers": Tiers(0.0, 0.125)}, {"slots": 9}):
        least = max(least, smallest_bytes(demo_model, **how))
        for more in (0, 1 << 20, 3 << 20, 12 << 20):
            found = []
            for mode in ("auto", "off"):
                config = EngineConfig(context_tokens=256, ram_bytes=least + more, lookahead=mode, **how)  # type: ignore[arg-type]
                with Engine.open(demo_model, config) as engine:
                    found.append(engine.budgets)
            auto, off = found
            lost = sum(map(sum, off.slots)) - sum(map(sum, auto.slots))
            assert auto.batch_tokens == off.batch_tokens and 0 <= lost <= 1 + sum(map(sum, off.slots)) / 32
            assert auto.pool_bytes <= auto.lookahead_bytes + off.pool_bytes
            assert more or how.get("slots") == 9 or not auto.lookahead_bytes


def test_a_model_with_one_layer_of_experts(tmp_path: Path) -> None:
    """Nothing can be guessed."""
    for layers, dense in ((1, 0), (2, 1)):
        shape = Tiny(
            architecture="glm4moe" if dense else "qwen3moe", layers=layers, dense_layers=dense, experts=8, used=2
        )
        model = write_tiny(tmp_path / f"{layers}.gguf", shape, seed=1)
        with Engine.open(model, EngineConfig(context_tokens=64, tiers=Tiers(0, 0.5))) as engine:
            assert engine.budgets.lookahead_bytes == 0 and not engine.statistics()["prefetch"]["is_on"]


def test_stand_ins_do_not_depend_on_guesses(demo_model: Path) -> None:
    for rule in (CarRule("ratio", 0.4), CarRule.parse("ratio:0.4,backfill=2")):
        expected, without = answer(demo_model, car=rule, lookahead="off")
        logits, s = answer(demo_model, lookahead=4, car=rule)
        assert logits == expected and s["substitutions"] > 0
        assert check(s, without)["useful"] > 0


def test_what_others_stand_in_for_is_not_read(demo_model: Path) -> None:
    """Where every miss of a single token has a stand-in, nothing is read ahead, well as it is guessed."""
    for car, is_all in ((CarRule.parse("ratio:0.000001,swaps=16,keep=0"), True), (CarRule("ratio", 0.4), False)):
        _, s = answer(demo_model, lookahead="on", car=car)
        prefetch = s["prefetch"]
        assert s["substitutions"] > 0 and all(share > 0.1 for share in prefetch["recall"][1:])
        assert (prefetch["issued"] == 0) == is_all
        assert is_all or 3 * prefetch["useful"] > prefetch["issued"]  # less than a quarter, were all read


def test_a_trace_is_replayed_with_the_same_counts(demo_model: Path, tmp_path: Path) -> None:
    _, s = answer(demo_model, lookahead="on", trace=tmp_path / "t")
    trace = Trace.load(tmp_path / "t")
    c = replay(trace, np.array(trace.header.slots), decay=trace.header.decay, as_chosen=True).counters
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [tier["hits"] for tier in s["tiers"].values()]
    assert s["prefetch"]["useful"] > 0


def test_a_bad_setting() -> None:
    with pytest.raises(UsageError, match="lookahead"):
        EngineConfig(lookahead=99)
