"""Cache-aware routing: each rule against a plain reference, and the engine under it."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cli import run as run_cli
from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.residency import LIBRARY, NVME, address

RULES = ["ratio:0.5", "ratio:0.7,keep=0", "prior:0.15", "prior:0.3,keep=3", "regret:0.03", "regret:0.1,swaps=2",
         "budget:0.05", "budget:0.2,keep=2,handicap=0.7"]  # fmt: skip


def choose(
    rule: CarRule,
    values: np.ndarray,
    tiers: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    normalise: bool = True,
    p: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The C code's decision for one token: ids, weights, replaced picks (-1 none)."""
    k = len(ids)
    chosen, replaced, scaled = np.empty(k, np.int32), np.empty(k, np.int32), np.empty(k, np.float32)
    car = rule.native()
    LIBRARY.fomoe_car_choose_many(
        ctypes.byref(car), ctypes.c_int64(1), 1, len(values), k, int(normalise), address(values),
        None if p is None else address(p), address(tiers),
        address(ids), address(weights), address(chosen), address(scaled), address(replaced),
    )  # fmt: skip
    return chosen, scaled, replaced


def picks(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The router's true picks and their weights of sum 1, best first, ties to the lower id."""
    ids = np.argsort(-logits, kind="stable")[:k].astype(np.int32)
    p = np.exp(logits[ids].astype(np.float64) - logits.max())
    return ids, (p / p.sum()).astype(np.float32)


def reference(rule: CarRule, logits: np.ndarray, tiers: np.ndarray, k: int) -> dict[int, int]:
    """Rank -> stand-in, from the rules as docs/car.md words them, over the true softmax."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    ids, _ = picks(logits, k)
    mass = p[ids].sum()
    others = [e for e in range(len(logits)) if e not in set(ids.tolist()) and tiers[e] != NVME]
    others.sort(key=lambda e: (-(np.float32(logits[e]) - np.float32(rule.handicap if tiers[e] else 0)), e))
    missing = [i for i in range(k) if i >= rule.keep and tiers[ids[i]] == NVME][::-1]
    swaps: dict[int, int] = {}
    lost = 0.0
    for rank, candidate in list(zip(missing, others, strict=False))[: rule.swaps]:
        pick = ids[rank]
        lost += (p[pick] - p[candidate]) / mass
        if not {
            "ratio": p[candidate] / p[pick] >= rule.parameter,
            "prior": logits[candidate] + rule.parameter * (logits.max() - logits.min()) > logits[pick],
            "regret": (p[pick] - p[candidate]) / mass <= rule.parameter,
            "budget": lost <= rule.parameter,
        }[rule.rule]:
            break
        swaps[rank] = candidate
    return swaps


def check_swaps(swaps: dict[int, int], ids: np.ndarray, chosen: np.ndarray, replaced: np.ndarray) -> None:
    """The picks are the router's but for the swaps (rank -> stand-in), and who was replaced is told."""
    ranks = range(len(ids))
    assert chosen.tolist() == [swaps.get(i, int(ids[i])) for i in ranks]
    assert replaced.tolist() == [int(ids[i]) if i in swaps else -1 for i in ranks]


@pytest.mark.parametrize("text", RULES)
def test_a_rule_against_the_reference(text: str) -> None:
    rule, random = CarRule.parse(text), np.random.default_rng(5)
    assert rule is not None
    swapped = whole = 0
    for _ in range(400):
        n = int(random.integers(12, 300))
        k = int(random.integers(1, 11))
        logits = (random.standard_normal(n) * random.uniform(0.5, 2)).astype(np.float32)
        tiers = random.choice(np.array([0, 1, 2], np.int8), n, p=[0.2, 0.15, 0.65]).astype(np.int8)
        ids, weights = picks(logits, k)
        swaps = reference(rule, logits, tiers, k)
        chosen, scaled, replaced = choose(rule, logits, tiers, ids, weights)
        check_swaps(swaps, ids, chosen, replaced)
        if not swaps:
            assert scaled.tobytes() == weights.tobytes()
        # the weights are those the router would give the new set
        p = np.exp(logits[chosen].astype(np.float64))
        np.testing.assert_allclose(scaled, p / p.sum(), rtol=2e-5)
        # the shield and the cap
        assert all(rank >= rule.keep for rank in swaps) and len(swaps) <= rule.swaps
        assert len(set(chosen.tolist())) == k
        swapped += len(swaps)
        whole += not swaps
    assert swapped > 50 and whole > 5


def biased_reference(
    rule: CarRule, p: np.ndarray, values: np.ndarray, tiers: np.ndarray, ids: np.ndarray
) -> dict[int, int]:
    """As `reference`, where the experts are the greatest `values`, and `p` are their weights."""
    mass = p[ids].sum()
    others = [e for e in range(len(p)) if e not in set(ids.tolist()) and tiers[e] != NVME and values[e] > -np.inf]
    others.sort(key=lambda e: (-(values[e] - (rule.handicap * p[e] if tiers[e] else 0)), e))
    missing = [i for i in range(len(ids)) if i >= rule.keep and tiers[ids[i]] == NVME][::-1]
    finite = values[values > -np.inf]
    swaps: dict[int, int] = {}
    lost = 0.0
    for rank, candidate in list(zip(missing, others, strict=False))[: rule.swaps]:
        ahead = values[ids[rank]] - values[candidate]
        lost += ahead / mass
        if not {
            "ratio": 1 - ahead / p[ids[rank]] >= rule.parameter,
            "prior": ahead < rule.parameter * (finite.max() - finite.min()),
            "regret": ahead / mass <= rule.parameter,
            "budget": lost <= rule.parameter,
        }[rule.rule]:
            break
        swaps[rank] = candidate
    return swaps


@pytest.mark.parametrize("text", RULES)
def test_a_rule_where_a_bias_chooses(text: str) -> None:
    """By what the router chooses by; a stand-in has its own weight, without the bias."""
    rule, random = CarRule.parse(text), np.random.default_rng(6)
    assert rule is not None
    swapped = 0
    for case in range(300):
        n, k = int(random.integers(12, 300)), int(random.integers(1, 11))
        p = (1 / (1 + np.exp(-random.standard_normal(n)))).astype(np.float32)
        values = (p + random.uniform(-0.6, 0.1, n)).astype(np.float32)
        if case % 2:
            values[n // 2 :] = -np.inf if k <= n // 2 else values[n // 2 :]
        tiers = random.choice(np.array([0, 1, 2], np.int8), n, p=[0.2, 0.15, 0.65]).astype(np.int8)
        ids = np.argsort(-values, kind="stable")[:k].astype(np.int32)
        weights = (2.5 * p[ids] / p[ids].sum()).astype(np.float32)
        swaps = biased_reference(rule, p.astype(np.float64), values.astype(np.float64), tiers, ids)
        chosen, scaled, replaced = choose(rule, values, tiers, ids, weights, p=p)
        check_swaps(swaps, ids, chosen, replaced)
        np.testing.assert_allclose(scaled, 2.5 * p[chosen] / p[chosen].sum(), rtol=2e-5)
        swapped += len(swaps)
    assert swapped > 50


def test_unnormalised_weights_keep_the_softmax_scale() -> None:
    random = np.random.default_rng(2)
    logits = random.standard_normal(64).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    ids, _ = picks(logits, 6)
    tiers = np.where(np.isin(np.arange(64), ids[3:]), NVME, 0).astype(np.int8)
    weights = (p[ids] * 2.5).astype(np.float32)
    chosen, scaled, replaced = choose(CarRule("ratio", 0.0), logits, tiers, ids, weights, normalise=False)
    assert (replaced >= 0).sum() == 3
    np.testing.assert_allclose(scaled, p[chosen] * 2.5, rtol=2e-5)


def test_equal_logits_never_choose_an_expert_twice() -> None:
    logits = np.zeros(40, np.float32)
    ids = np.arange(8, dtype=np.int32)
    weights = np.full(8, 0.125, np.float32)
    tiers = np.full(40, NVME, np.int8)
    tiers[[0, 3, 20, 30]] = 0
    chosen, _, replaced = choose(CarRule("regret", 0.0, keep=0), logits, tiers, ids, weights)
    assert chosen.tolist() == [0, 1, 2, 3, 4, 5, 30, 20] and replaced.tolist() == [-1] * 6 + [6, 7]


def test_a_slower_candidate_must_be_clearly_better() -> None:
    logits = np.array([3, 2, 1.5, 1.45, 0], np.float32)
    ids, weights = picks(logits, 2)
    for second_tier, handicap, stands_in in ((1, 0.1, 3), (1, 0.0, 2), (0, 0.1, 2)):
        tiers = np.array([0, NVME, second_tier, 0, 0], np.int8)
        chosen, _, _ = choose(CarRule("ratio", 0.3, handicap=handicap), logits, tiers, ids, weights)
        assert chosen[1] == stands_in


@pytest.mark.parametrize("text", [*RULES, "on"])
def test_a_rule_reads_as_it_is_written(text: str) -> None:
    rule = CarRule.parse(text)
    assert rule is not None and CarRule.parse(str(rule)) == rule
    assert text == "on" or str(rule) == text
    assert CarRule.parse("off") is None


@pytest.mark.parametrize(
    "rule",
    [
        CarRule("ratio", 1e-7), CarRule("prior", 0.0341234567, handicap=1e300), CarRule("budget", 5e-324),
        CarRule("regret", 1 / 3, keep=256, warmup=1 << 24, handicap=1e-9), CarRule("regret", 1, warmup=10_000_000),
    ],
)  # fmt: skip
def test_any_rule_survives_being_written(rule: CarRule) -> None:
    assert CarRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "best", "ratio", "ratio:", "ratio:2", "ratio:-1", "guess:0.1", "regret:0.1.2", "regret:0.1,swaps=99",
     "regret:0.1,swap=1", "regret:0.1,keep=1.5", "regret:0.1,handicap=..", "regret:0.1,warmup=1e3",
     "regret:e5", "regret:1e", "regret:0.1,handicap=1e999"],
)  # fmt: skip
def test_bad_rules(text: str) -> None:
    with pytest.raises(UsageError, match="--car"):
        CarRule.parse(text)


# ---- in the engine ----

CONTEXT, TOKENS = 128, 60
TIERS = Tiers(0.25, 0.15)


def answer(model: Path, rule: str, **settings: Any) -> tuple[bytes, dict[str, Any]]:
    """All logits of a random prompt and of random tokens after it, and the statistics of the latter."""
    random = np.random.default_rng(8)
    prompt, tokens = random.integers(0, 8000, 20), random.integers(0, 8000, TOKENS)
    settings.setdefault("tiers", TIERS)
    with Engine.open(model, EngineConfig(context_tokens=CONTEXT, car=CarRule.parse(rule), **settings)) as engine:
        session = engine.session()
        logits = [session.prefill(prompt).copy()]
        engine.reset_statistics()
        logits += [session.decode(int(token)).copy() for token in tokens]
        return np.concatenate(logits).tobytes(), engine.statistics()


@pytest.mark.parametrize("rule", ["ratio:0.4", "prior:0.2", "regret:0.05", "budget:0.1"])
def test_counters_add_up(demo_model: Path, rule: str) -> None:
    logits, s = answer(demo_model, rule)
    hits = [s["tiers"][name]["hits"] for name in ("vram", "dram", "nvme")]
    assert s["expert_requests"] == sum(hits) + s["substitutions"] == TOKENS * 8 * 4
    assert s["substitutions"] > 0 and min(hits) > 0 and not s["exact"] and s["car"] == rule
    exact, without = answer(demo_model, "off")
    assert exact != logits and without["exact"] and without["substitutions"] == 0
    assert s["tiers"]["nvme"]["hits"] < without["tiers"]["nvme"]["hits"]


@pytest.mark.parametrize("settings", [{"threads": 2}, {"reader": "pread"}, {"ring_depth": 1}])
def test_the_text_does_not_depend_on_threads_or_drive(demo_model: Path, settings: dict[str, Any]) -> None:
    logits, s = answer(demo_model, "on", threads=1)
    other, t = answer(demo_model, "on", **settings)
    assert logits == other
    assert [s[key] for key in ("substitutions", "evictions")] == [t[key] for key in ("substitutions", "evictions")]
    assert s["substitutions"] > 0


def test_off_and_all_resident_are_exact(demo_model: Path) -> None:
    exact, _ = answer(demo_model, "off", tiers=None)
    assert answer(demo_model, "off")[0] == exact
    logits, s = answer(demo_model, "ratio:0.1", tiers=None)
    assert logits == exact and s["substitutions"] == 0


def test_prompts_and_the_warm_up_are_exact(demo_model: Path) -> None:
    exact, _ = answer(demo_model, "off")
    logits, s = answer(demo_model, f"regret:0.1,warmup={20 + TOKENS}")
    assert logits == exact and s["substitutions"] == 0
    logits, s = answer(demo_model, f"regret:0.1,warmup={20 + TOKENS // 2}")
    row = len(exact) // (TOKENS + 1)
    assert logits[: row * (1 + TOKENS // 2)] == exact[: row * (1 + TOKENS // 2)] and logits != exact
    with Engine.open(demo_model, EngineConfig(context_tokens=CONTEXT, tiers=TIERS, car=CarRule("ratio", 0))) as engine:
        prompt = np.random.default_rng(8).integers(0, 8000, 20)
        assert engine.session().prefill(prompt).tobytes() == exact[:row]
        assert engine.session().prefill(prompt[:1]).size and engine.statistics()["substitutions"] == 0


def test_true_picks_are_what_is_counted(demo_model: Path) -> None:
    """The profile learns from the router, not from what happened to be in memory: first-layer picks are the same."""
    counts = []
    for rule in (None, CarRule("ratio", 0)):
        with Engine.open(demo_model, EngineConfig(context_tokens=CONTEXT, tiers=TIERS, car=rule)) as engine:
            session = engine.session()
            for token in np.random.default_rng(4).integers(0, 8000, 40):
                session.decode(int(token))
            counts.append(engine.expert_counts())
            assert all(layer.sum() == 160 for layer in counts[-1].values())
    assert counts[0][0].tolist() == counts[1][0].tolist()


def test_a_run_says_that_it_is_not_exact(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(demo_model), "-p", "It was", "-n", "30", "-s", "1", "--tiers", "vram=25%,dram=15%"]
    assert run_cli.main([*command, "--car", "ratio:0.2", "--json", str(tmp_path / "run.json")]) == 0
    err = capsys.readouterr().err
    saved = json.loads((tmp_path / "run.json").read_text())
    assert "not exact: resident experts may stand in for missing ones (--car ratio:0.2)" in err
    assert f"not exact: {100 * saved['substitutions'] / saved['expert_requests']:.1f} % substituted" in err
    assert saved["substitutions"] > 0
    assert run_cli.main(command) == 0
    assert "not exact" not in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"threads": 3}, {"reader": "pread"}, {"ring_depth": 1}])
def test_back_fill_is_deterministic(demo_model: Path, settings: dict[str, Any]) -> None:
    logits, s = answer(demo_model, "regret:0.05,backfill=4", threads=1, lookahead="off")
    other, t = answer(demo_model, "regret:0.05,backfill=4", lookahead="off", **settings)
    assert logits == other and s["tiers"] == t["tiers"]
    hits = sum(s["tiers"][name]["hits"] for name in ("vram", "dram", "nvme"))
    assert s["expert_requests"] == hits + s["substitutions"] == TOKENS * 8 * 4
    # some reads are nobody's request
    assert s["tiers"]["nvme"]["reads"] > s["tiers"]["nvme"]["hits"]
    without, _ = answer(demo_model, "regret:0.05")
    assert without != logits
