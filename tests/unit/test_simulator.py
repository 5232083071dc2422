"""The simulator counts what the engine counts, and its bound is the bound."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.residency import DECAY, NVME, POLICIES, Decay
from fomoe_io.trace.simulator import belady, even_slots, replay, single_tokens, static_dram
from fomoe_io.trace.trace import LayerTrace, Trace, TraceHeader
from tests.tiny_model import Tiny, write_tiny

TOKENS = np.random.default_rng(31).integers(0, 8000, 150)
COUNTED = ("expert_requests", "evictions", "promotions", "demotions")


def engine_run(model: Path, path: Path, pieces: list[np.ndarray], **settings: object) -> dict:
    config = EngineConfig(context_tokens=256, trace=path, **settings)  # type: ignore[arg-type]
    with Engine.open(model, config) as engine:
        session = engine.session()
        for piece in pieces:
            session.prefill(piece)
        return engine.statistics()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(
    ("tiers", "sizes"),
    [
        (Tiers(0.25, 0.25), [1] * 150),
        (Tiers(0.5, 0.375), [4] * 30),  # batches whose experts fit
        (Tiers(0.2, 0.15), [64, 1, 1, 64, 20]),  # batches in waves
        (Tiers(0, 0.125), [150]),  # as few slots as a token needs
    ],
    ids=["decode", "fitting", "waves", "fewest"],
)
def test_the_simulator_counts_what_the_engine_counts(
    demo_model: Path, tmp_path: Path, policy: str, tiers: Tiers, sizes: list[int]
) -> None:
    pieces = np.split(TOKENS, np.cumsum(sizes)[:-1])
    said = engine_run(demo_model, tmp_path / "t", [p for p in pieces if len(p)], policy=policy, tiers=tiers)
    trace = Trace.load(tmp_path / "t")
    played = replay(trace, np.array(trace.header.slots), policy=policy, decay=trace.header.decay, as_chosen=True)
    c = played.counters
    assert [c["requests"], c["evictions"], c["promotions"], c["demotions"]] == [said[key] for key in COUNTED]
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [said["tiers"][t]["hits"] for t in said["tiers"]]
    for number, layer in trace.layers.items():
        np.testing.assert_array_equal(played.found[number], layer.found)
    assert c["nvme_hits"] > 200 and c["evictions"] > 50


GROUPS = (("expert_group_count", 4), ("expert_group_used_count", 2))
ROUTERS = {
    "biased": Tiny(architecture="minimax-m2", layers=2, experts=16),
    "biased, a dense layer": Tiny(architecture="glm4moe", layers=3, dense_layers=1, experts=16, biased=True),
    "in groups": Tiny(architecture="deepseek2", layers=3, dense_layers=1, experts=16, query_rank=32, keys=GROUPS),
}


@pytest.mark.parametrize("router", ["softmax", *ROUTERS])
def test_cache_aware_routing_is_replayed(demo_model: Path, tmp_path: Path, router: str) -> None:
    """As it was computed: substitutions are requests of their own kind, stand-ins are hits of nobody."""
    model = demo_model if router == "softmax" else write_tiny(tmp_path / "m.gguf", ROUTERS[router], seed=1)
    config = EngineConfig(
        context_tokens=256, trace=tmp_path / "t", tiers=Tiers(0.25, 0.25), car=CarRule.parse("ratio:0.5")
    )
    with Engine.open(model, config) as engine:
        tokens = TOKENS % engine.shape.vocabulary
        session = engine.session()
        session.prefill(tokens[:40])
        for token in tokens[40:].tolist():
            session.decode(token)
        said = engine.statistics()
    trace = Trace.load(tmp_path / "t")
    assert trace.header.car.startswith("ratio:0.5")
    played = replay(trace, np.array(trace.header.slots), decay=trace.header.decay, as_chosen=True)
    c = played.counters
    assert [c["requests"], c["evictions"], c["promotions"], c["demotions"]] == [said[key] for key in COUNTED]
    assert c["substitutions"] == said["substitutions"] > 50
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [said["tiers"][t]["hits"] for t in said["tiers"]]
    differing = sum(np.count_nonzero(layer.picks != layer.chosen) for layer in trace.layers.values())
    assert differing == c["substitutions"]
    exact = replay(trace, np.array(trace.header.slots), decay=trace.header.decay)
    assert exact.counters["nvme_hits"] > c["nvme_hits"] and exact.counters["requests"] == c["requests"]


def test_a_warm_start_is_replayed(demo_model: Path, tmp_path: Path) -> None:
    """With the seeds that the trace names, from a store that was packed with a profile."""
    from layout_tool.main import main as layout

    text = tmp_path / "text"
    text.write_text("The old man went down to the sea and looked at the ships. " * 12)
    assert layout(["profile", str(demo_model), "-f", str(text), "-o", str(tmp_path / "p")]) == 0
    assert layout(["pack", str(demo_model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p")]) == 0
    said = engine_run(tmp_path / "s", tmp_path / "t", list(TOKENS[:, None]), tiers=Tiers(0.25, 0.25))
    trace = Trace.load(tmp_path / "t")
    seeds = {number: (layer.seeds, layer.seed_scores) for number, layer in trace.layers.items()}
    assert all(len(ids) == 16 for ids, _ in seeds.values())
    warm = replay(trace, np.array(trace.header.slots), seeds=seeds, as_chosen=True)
    cold = replay(trace, np.array(trace.header.slots), as_chosen=True)
    assert warm.counters["nvme_hits"] == said["tiers"]["nvme"]["hits"] != cold.counters["nvme_hits"]
    assert warm.counters["evictions"] == said["evictions"]


# ---- traces made up ----


def made_up(seed: int, tokens: int, experts: int, used: int, layers: int = 1, batch: int = 1) -> Trace:
    """Skewed picks whose favourites drift."""
    random, rows = np.random.default_rng(seed), {}
    batches = np.full(-(-tokens // batch), batch)
    batches[-1] = tokens - batch * (len(batches) - 1)
    for layer in range(layers):
        heat, picks = random.gamma(0.4, size=experts), []
        for t in range(tokens):
            heat = np.roll(heat, 3) if t % 40 == 39 else heat
            p = (heat + 1e-3) / (heat + 1e-3).sum()
            picks.append(random.choice(experts, used, replace=False, p=p))
        ids = np.array(picks, np.uint16)
        rows[layer] = LayerTrace(batches, ids, np.ones(ids.shape, np.float32), ids, None)
    header = TraceHeader("m", "", (experts,) * layers, used, ((0, 0),) * layers, "lru", DECAY, "off", (1,) * layers)
    return Trace(header, batches, rows)


def fewest_misses(batches: list[set[int]], slots: int) -> int:
    """By trying every way to keep experts: Belady's rule is not used."""

    @cache
    def least(n: int, kept: frozenset[int]) -> int:
        if n == len(batches):
            return 0
        wanted = batches[n]
        missed = len(wanted - kept)
        everything = sorted(wanted | kept)
        must = wanted if len(wanted) <= slots else set()
        choices = {frozenset(everything)} if len(everything) <= slots else combinations_with(everything, must, slots)
        return missed + min(least(n + 1, choice) for choice in choices)

    return least(0, frozenset())


def combinations_with(values: list[int], must: set[int], size: int) -> set[frozenset[int]]:
    from itertools import combinations

    rest = [v for v in values if v not in must]
    return {frozenset(must) | frozenset(c) for c in combinations(rest, size - len(must))}


@pytest.mark.parametrize(("seed", "used", "slots", "batch"), [(1, 2, 3, 1), (2, 2, 4, 1), (3, 1, 2, 1), (4, 2, 3, 3)])
def test_belady_is_the_minimum(seed: int, used: int, slots: int, batch: int) -> None:
    trace = made_up(seed, 24, 7, used, batch=batch)
    picks, ends = trace.layers[0].picks, np.cumsum(trace.batch_tokens)
    batches = [set(rows.ravel().tolist()) for rows in np.split(picks, ends[:-1])]
    found = belady(trace, np.array([[0, slots]]))
    assert found.counters["nvme_hits"] == fewest_misses(batches, slots)
    assert found.counters["requests"] == picks.size


@pytest.mark.parametrize("batch", [1, 5])
def test_no_policy_beats_belady(batch: int) -> None:
    trace = made_up(7, 600, 48, 4, layers=3, batch=batch)
    for slots in (6, 9, 20, 48):
        table = np.array([[slots // 2, slots - slots // 2]] * 3)
        bound = belady(trace, table).counters["nvme_hits"]
        for policy in POLICIES:
            misses = replay(trace, table, policy=policy).counters["nvme_hits"]
            assert misses >= bound and (misses == bound) == (slots == 48)


def test_single_tokens() -> None:
    """Batches played token by token are the trace of the tokens; a layer that computed less keeps its last ones."""
    batches, tokens = made_up(9, 60, 32, 3, layers=2, batch=7), made_up(9, 60, 32, 3, layers=2)
    cut = single_tokens(batches)
    slots = even_slots(batches, 0.2, 0.2)
    assert replay(cut, slots).counters == replay(tokens, slots).counters != replay(batches, slots).counters
    last = batches.layers[1]
    ends = np.cumsum(last.tokens) - 1
    kept = (array[ends] for array in (last.picks, last.weights, last.chosen))
    batches.layers[1] = LayerTrace(np.ones_like(last.tokens), *kept, None)
    cut = single_tokens(batches)
    assert np.flatnonzero(cut.layers[1].tokens).tolist() == ends.tolist()
    assert replay(cut, slots).counters["requests"] == 60 * 3 + len(ends) * 3


def test_both_averages_count() -> None:
    """Without a share, an average does not matter; with one, it does."""
    trace = made_up(11, 1000, 64, 4, layers=2)
    slots = even_slots(trace, 0, 0.25)

    def misses(slow: float, fast: float, share: float) -> int:
        return replay(trace, slots, decay=Decay(slow, fast, share)).counters["nvme_hits"]

    assert misses(0.99, 0.5, 0.0) == misses(0.99, 0.9, 0.0) != misses(0.95, 0.9, 0.0)
    assert misses(0.99, 0.9, 1.0) == misses(0.95, 0.9, 1.0) != misses(0.95, 0.5, 1.0)
    assert misses(0.99, 0.9, 0.0) != misses(0.99, 0.9, 0.3) != misses(0.99, 0.9, 1.0)


def test_the_static_list() -> None:
    """VRAM alone is an LRU; what it misses and the list holds is a DRAM hit; nothing else changes."""
    trace = made_up(13, 400, 40, 3)
    lru = replay(trace, np.array([[8, 0]]), policy="lru")
    listed = static_dram(trace, np.array([[8, 6]]))
    assert listed.counters["vram_hits"] == lru.counters["vram_hits"]
    assert listed.counters["dram_hits"] + listed.counters["nvme_hits"] == lru.counters["nvme_hits"]
    hottest = np.argsort(-np.bincount(trace.layers[0].picks.ravel(), minlength=40), kind="stable")
    in_list = np.isin(trace.layers[0].picks, hottest[8:14])
    assert listed.counters["dram_hits"] == np.count_nonzero((lru.found[0] == NVME) & in_list) > 0


def test_miss_curve() -> None:
    trace = made_up(15, 205, 32, 4, layers=2)
    played = replay(trace, even_slots(trace, 0.1, 0.2))
    curve = played.miss_curve(100)
    first = np.mean([played.found[layer][:100] == NVME for layer in (0, 1)])
    assert len(curve) == 3 and curve[0] == pytest.approx(first)
    assert np.average(curve, weights=[100, 100, 5]) == pytest.approx(played.share(NVME))


def test_bad_slots() -> None:
    trace = made_up(17, 10, 8, 2)
    with pytest.raises(UsageError, match="2 tiers"):
        replay(trace, np.array([3]))
    with pytest.raises(UsageError, match="no slot"):
        belady(trace, np.array([[0, 0]]))
    with pytest.raises(UsageError, match="magic"):
        replay(trace, np.array([[1, 1]]), policy="magic")
