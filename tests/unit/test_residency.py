"""Slots, tiers and policies: the C bookkeeping against small models of it in Python, on random requests."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe_io.errors import UsageError
from fomoe_io.experts.residency import COMING, DRAM, NVME, VRAM, Decay, Residency


def one_layer(experts: int, vram: int, dram: int, **options: object) -> Residency:
    return Residency([experts], np.array([[vram, dram]]), **options)  # type: ignore[arg-type]


def ask(r: Residency, experts: list[int], weights: list[int] | None = None) -> list[int]:
    """A token: true picks counted, placed, computed.  The sources."""
    r.tick()
    r.touch(0, experts)
    placements, _ = r.resolve(0, experts, weights)
    r.release(0, experts)
    return [source for _, source, _, _ in placements]


def random_requests(seed: int, tokens: int, experts: int, used: int) -> list[list[int]]:
    """Skewed picks whose favourites drift, so that recency and frequency both matter."""
    random = np.random.default_rng(seed)
    heat = random.gamma(0.3, size=experts)
    requests = []
    for t in range(tokens):
        if t % 50 == 0:
            heat = np.roll(heat, experts // 7)
        p = (heat + 1e-3) / (heat + 1e-3).sum()
        requests.append([int(e) for e in random.choice(experts, used, replace=False, p=p)])
    return requests


@pytest.mark.parametrize(("vram", "dram"), [(0, 9), (9, 0), (4, 5)])
def test_lru_of_any_tiering_is_one_lru(vram: int, dram: int) -> None:
    """Exclusive tiers lose nothing: an LRU cut in two misses exactly what one LRU of the whole size misses."""
    r = one_layer(32, vram, dram, policy="lru")
    recent: list[int] = []
    for picks in random_requests(1, 400, 32, 3):
        expected = [e not in recent for e in picks]
        assert [source == NVME for source in ask(r, picks)] == expected
        recent = [e for e in recent if e not in picks] + picks
        recent = recent[-9:]
    c = r.counters()
    assert c["nvme_hits"] > 100 and c["vram_hits"] + c["dram_hits"] > 100
    assert c["evictions"] == c["nvme_hits"] - 9


def frequency(policy: str, decay: Decay, history: list[list[int]], now: int, expert: int) -> tuple[float, int]:
    """What the policy compares: worth, then the place in history of the last pick."""
    times = [t for t, picks in enumerate(history) for e in picks if e == expert]
    order = max((t * 100 + picks.index(expert) for t, picks in enumerate(history) if expert in picks), default=-1)
    if policy == "lfu":
        return len(times), order
    if policy == "lfru":
        return (len(times) / (now - times[-1] + 1) if times else 0.0), order
    slow, fast = (sum((1 - d) * d ** (now - t) for t in times) for d in (decay.slow, decay.fast))
    return (1 - decay.fast_share) * slow + decay.fast_share * fast, order


@pytest.mark.parametrize("policy", ["lfu", "decayed", "lfru"])
def test_victims_of_a_frequency_policy(policy: str) -> None:
    decay, history, resident = Decay(0.95, 0.7, 0.3), [], set()
    r = one_layer(24, 0, 8, policy=policy, decay=decay)
    for now, picks in enumerate(random_requests(2, 150, 24, 3)):
        history.append(picks)
        sources = ask(r, picks)
        assert [source == NVME for source in sources] == [e not in resident for e in picks]
        for e in picks:
            if e not in resident and len(resident) == 8:
                worth = {v: frequency(policy, decay, history, now, v) for v in resident - set(picks)}
                resident.remove(min(worth, key=lambda v: (round(worth[v][0], 12), worth[v][1])))
            resident.add(e)
        assert set(np.flatnonzero(r.tiers(0) == DRAM)) == resident
    assert r.counters()["evictions"] > 50


@pytest.mark.parametrize("policy", ["lru", "decayed", "lfru"])
@pytest.mark.parametrize(("vram", "dram"), [(5, 6), (6, 3), (11, 0), (0, 7)])
def test_moves_carry_the_bytes(policy: str, vram: int, dram: int) -> None:
    """Played on real slots, the moves and reads leave every expert's bytes where the placements say."""
    random = np.random.default_rng(3)
    r = one_layer(40, vram, dram, policy=policy)
    content = {(tier, slot): None for tier, n in ((VRAM, vram), (DRAM, dram)) for slot in range(n)}
    moved = 0
    for picks in random_requests(4, 300, 40, min(5, vram + dram)):
        r.tick()
        r.touch(0, picks)
        weights = [int(w) for w in random.integers(1, 4, len(picks))]
        placements, moves = r.resolve(0, picks, weights)
        moved += len(moves)
        for expert, from_tier, from_slot, to_tier, to_slot in moves:
            # carried out as an exchange, as the engine does; a swap's second half is done by then
            if content[from_tier, from_slot] == expert:
                source, target = (from_tier, from_slot), (to_tier, to_slot)
                content[source], content[target] = content[target], content[source]
            assert content[to_tier, to_slot] == expert
        for expert, source, tier, slot in placements:
            if source == NVME:
                content[tier, slot] = expert
        for expert, _, tier, slot in placements:
            assert content[tier, slot] == expert
        assert len({(tier, slot) for _, _, tier, slot in placements}) == len(picks)
        if vram >= len(picks):
            assert all(tier == VRAM for _, _, tier, _ in placements)
        r.release(0, picks)
        tiers = r.tiers(0)
        assert np.count_nonzero(tiers == VRAM) <= vram and np.count_nonzero(tiers == DRAM) <= dram
    c = r.counters()
    assert c["requests"] == c["vram_hits"] + c["dram_hits"] + c["nvme_hits"]
    assert (moved > 0) == (vram > 0 and dram > 0)
    assert c["promotions"] + c["demotions"] == moved


def test_tiers_act_as_one_pool() -> None:
    """A VRAM victim that is worth less than all of DRAM is forgotten itself: two tiers miss as little as one."""
    requests = random_requests(5, 1500, 64, 4)
    whole, cut = one_layer(64, 0, 20), one_layer(64, 12, 8)
    for picks in requests:
        ask(whole, picks)
        ask(cut, picks)
    assert cut.counters()["nvme_hits"] == whole.counters()["nvme_hits"] > 500


def test_pinned_experts_stay() -> None:
    r = one_layer(16, 2, 3)
    r.resolve(0, [1, 2, 3])
    _, moves = r.resolve(0, [7, 8])
    assert not moves and sorted(np.flatnonzero(r.tiers(0) != NVME)) == [1, 2, 3, 7, 8]
    before = r.counters()
    with pytest.raises(UsageError, match="no room"):
        r.resolve(0, [9])
    assert r.counters() == before and r.tiers(0)[9] == NVME
    r.release(0, [2])
    (placement,), _ = r.resolve(0, [9])
    assert placement[1] == NVME and r.tiers(0)[2] == NVME
    with pytest.raises(UsageError, match="no room"):
        r.resolve(0, [10])


def test_weights_of_a_batch() -> None:
    """The first request counts for where it was found, the others as hits of where it is now; stand-ins count not."""
    r = one_layer(16, 2, 2)
    ask(r, [1, 2], [5, 1])
    assert r.counters() | {"evictions": 0} == {
        "requests": 6, "vram_hits": 4, "dram_hits": 0, "nvme_hits": 2, "evictions": 0, "promotions": 0, "demotions": 0,
        "substitutions": 0, "offers": 0,
    }  # fmt: skip
    ask(r, [3, 4])  # 1 and 2 go down
    ask(r, [1], [3])
    r.substituted(2)
    ask(r, [3], [0])
    c = r.counters()
    assert (c["requests"], c["vram_hits"], c["dram_hits"], c["nvme_hits"]) == (13, 6, 1, 4)
    assert c["substitutions"] == 2 and c["demotions"] >= 3 and c["promotions"] >= 1


def test_the_clock_runs_inside_a_batch() -> None:
    """Scores after one batch of n tokens are those after n batches of one."""
    whole, single = one_layer(8, 0, 8), one_layer(8, 0, 8)
    requests = random_requests(6, 40, 8, 2)
    whole.tick(len(requests))
    for t, picks in enumerate(requests):
        whole.touch(0, picks, age=len(requests) - 1 - t)
        ask(single, picks)
    np.testing.assert_allclose(whole.scores(0), single.scores(0), rtol=1e-12)
    assert np.ptp(whole.scores(0)) > 0.02


def test_offers() -> None:
    r = one_layer(16, 1, 2)
    ask(r, [1, 2, 3])
    assert r.offer(0, 9).tier == NVME  # never picked: worth less than anybody here
    for _ in range(3):
        r.tick()
        r.touch(0, [9])
    assert r.offer(0, 9, spare=3).tier == NVME  # would leave two
    given = r.offer(0, 9, spare=2)
    assert (given.source, given.tier) == (NVME, DRAM) and r.tiers(0)[9] == NVME
    assert r.offer(0, 9).tier == NVME  # already coming
    (placement,), moves = r.resolve(0, [9])
    assert placement == (9, COMING, DRAM, given.slot) and not moves
    assert r.counters()["nvme_hits"] == 4 and r.counters()["offers"] == 1
    r.release(0, [9])
    ask(r, [4, 5])  # coming experts are not evicted
    assert r.tiers(0)[9] == NVME
    r.arrived(0, 9)
    assert r.tiers(0)[9] == DRAM
    assert ask(r, [9]) == [DRAM]
    r.drop(0, 9)
    assert r.tiers(0)[9] == NVME and ask(r, [9]) == [NVME]


def test_a_failed_offer_frees_its_slot() -> None:
    r = one_layer(8, 0, 2)
    given = r.offer(0, 3)
    assert given.tier == DRAM
    r.drop(0, 3)
    (a, b), _ = r.resolve(0, [4, 5])
    assert {a[3], b[3]} == {0, 1}


@pytest.mark.parametrize("policy", ["lru", "lfu", "decayed", "lfru"])
def test_the_hottest_seed_goes_last(policy: str) -> None:
    r = one_layer(16, 2, 3, policy=policy)
    seeds = [7, 3, 11, 5, 2]
    placed = [r.seed(0, e, 1e-3 * (1 - 0.1 * i)) for i, e in enumerate(seeds)]  # rare ones: a single pick is more
    assert [p.tier for p in placed] == [VRAM, VRAM, DRAM, DRAM, DRAM]
    assert r.seed(0, 9, 1e-4).tier == NVME
    lost = []
    for new in (12, 13, 14):
        ask(r, [new])
        lost += [e for e in seeds if r.tiers(0)[e] == NVME and e not in lost]
    assert lost == [2, 5, 11]


def test_layers_are_apart() -> None:
    r = Residency([4, 8], np.array([[0, 2], [0, 3]]))
    r.resolve(0, [1, 2])
    r.resolve(1, [7, 6, 5])
    assert list(np.flatnonzero(r.tiers(0) == DRAM)) == [1, 2]
    assert list(np.flatnonzero(r.tiers(1) == DRAM)) == [5, 6, 7]


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="policy"):
        one_layer(4, 1, 1, policy="magic")
    with pytest.raises(UsageError, match="decay"):
        one_layer(4, 1, 1, decay=Decay(1.0, 0.9, 0.1))
    with pytest.raises(UsageError, match="slots"):
        Residency([4], np.array([[1, -1]]))
    r = one_layer(4, 1, 1)
    with pytest.raises(UsageError, match=r"0\.\.3"):
        r.touch(0, [4])
    with pytest.raises(UsageError, match="layer 1"):
        r.scores_of = r.offer(1, 0)  # type: ignore[attr-defined]
