"""Checks of the router's kernels (gpu/kernels/router.h) against float64 numpy and the host's cache-aware routing."""

from __future__ import annotations

import numpy as np

from fomoe_io.experts.car import CarRule
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import Runner, normal, poison
from tests.reference_model import route_by, without_groups
from tests.unit.test_car import choose


def route_reference(logits: np.ndarray, picks: int, normalise: bool, scale: float) -> tuple[np.ndarray, np.ndarray]:
    p = softmax(logits)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :picks]
    weights = np.take_along_axis(p, ids, axis=1)
    if normalise:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 2.0**-14)
    return ids, weights * scale


def check_route(runner: Runner, rng: np.random.Generator, experts: int, picks: int, tokens: int) -> None:
    logits = 3 * normal(rng, tokens, experts)
    logits[0] = np.round(logits[0])  # ties: the lower id first
    for normalise, scale in ((1, 1.0), (0, 2.5)):
        ids = runner.put(np.full((tokens, picks), -1, np.int32))
        weights = runner.put(poison(tokens, picks))
        runner.launch("route", (tokens, 1, 1), runner.put(logits), ids, weights, experts, picks, normalise, scale)
        want_ids, want_weights = route_reference(logits.astype(np.float64), picks, bool(normalise), scale)
        np.testing.assert_array_equal(ids.get(), want_ids)
        np.testing.assert_allclose(weights.get(), want_weights, rtol=1e-5)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def check_route_by(
    runner: Runner, rng: np.random.Generator, experts: int, picks: int, tokens: int, score: str, is_biased: bool,
    groups: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Against the float64 model's router; the biased logits stay."""
    kernel, more = ("route_by", ()) if groups is None else ("route_in_groups", groups)
    scores = ("softmax", "sigmoid", "logits")
    logits, bias, logit_bias = 3 * normal(rng, tokens, experts), normal(rng, experts), normal(rng, experts)
    for normalise, scale in ((1, 1.0), (0, 2.5)):
        ids, weights = runner.put(np.full((tokens, picks), -1, np.int32)), runner.put(poison(tokens, picks))
        device_logits = runner.put(logits)
        biases = (runner.put(logit_bias), runner.put(bias)) if is_biased else (None, None)
        runner.launch(kernel, (tokens, 1, 1), device_logits, *biases, ids, weights, experts, picks,
                      scores.index(score), normalise, scale, None, *more)  # fmt: skip
        seen = logits + logit_bias if is_biased else logits
        np.testing.assert_array_equal(device_logits.get(), seen)
        values = runner.put(poison(tokens, experts))
        again = runner.put(logits), *biases, runner.put(ids.get()), runner.put(weights.get())
        runner.launch(kernel, (tokens, 1, 1), *again, experts, picks, scores.index(score), normalise, scale,
                      values, *more)  # fmt: skip
        p = {"softmax": softmax, "sigmoid": ref.sigmoid, "logits": np.array}[score](seen.astype(np.float64))
        np.testing.assert_allclose(again[0].get(), p, rtol=1e-5)
        chosen_by = [without_groups(row, *(groups or (1, 1))) for row in (p + bias if is_biased else p)]
        np.testing.assert_allclose(values.get(), chosen_by, rtol=1e-5, atol=1e-6)
        for token in range(tokens):
            want, expected = route_by(
                seen[token].astype(np.float64), picks, score, bias if is_biased else 0.0,
                bool(normalise) and score != "logits", scale, *(groups or (1, 1)),
            )  # fmt: skip
            np.testing.assert_array_equal(ids.get()[token], want)
            np.testing.assert_allclose(weights.get()[token], expected, rtol=2e-5)


def check_resolve(runner: Runner, rng: np.random.Generator, experts: int, picks: int) -> None:
    """Hits resolved, all picks posted, misses counted; experts that lie in DRAM are misses (table value 1), or are read
    there (an odd address)."""
    table = 16 * rng.integers(1, 1 << 56, experts).astype(np.uint64)
    absent = rng.random(experts)
    table[absent < 0.5] = 0
    table[absent < 0.2] = 1
    table[absent > 0.8] |= np.uint64(1)
    logits = 3 * normal(rng, 1, experts)
    want, weight = route_reference(logits.astype(np.float64), picks, True, 1.0)
    is_odd, found = table[want[0]] % 2 == 1, table[want[0]]
    here, there = (np.where(where, found, np.uint64(0)) for where in (~is_odd, is_odd & (found > 1)))
    misses = int(((here == 0) & (there == 0)).sum())
    assert 0 < misses < picks
    ids, weights = runner.put(np.full(picks, -1, np.int32)), runner.put(poison(picks))
    row, run = runner.put(table), runner.put(np.array([41, 0], np.uint32))
    records, post = runner.put(np.full(picks, 77, np.uint64)), runner.put(np.zeros(1 + 2 * picks, np.uint64))
    count, late = runner.put(np.array([99], np.uint32)), runner.put(np.full(picks, 88, np.uint64))
    runner.launch("route_and_resolve", (1, 1, 1), runner.put(logits), ids, weights, row, records, late, post, run,
                  count, experts, picks, 1, 1.0)  # fmt: skip
    np.testing.assert_array_equal(late.get(), there)
    np.testing.assert_array_equal(ids.get(), want[0])
    np.testing.assert_array_equal(records.get(), here)
    posted, words = np.split(post.get(), [1 + picks])
    np.testing.assert_array_equal(posted, (41 << 32) + np.array([misses, *(want[0] * 65537)], np.uint64))
    np.testing.assert_array_equal(words >> np.uint64(32), 41)
    np.testing.assert_allclose(words.astype(np.uint32).view(np.float32), weight[0], rtol=1e-5)
    assert count.get()[0] == misses


def check_guesses(runner: Runner) -> None:
    """Each with the run's number; what stands behind them stays."""
    ids, post = runner.put(np.arange(40, 56, dtype=np.int32)), runner.put(np.full(17, 5, np.uint64))
    runner.launch("post_guesses", (1, 1, 1), ids, post, runner.put(np.array([41, 0], np.uint32)), 16)
    assert post.get().tolist() == [*((41 << 32) + np.arange(40, 56)).tolist(), 5]


def check_substitution(
    runner: Runner, rng: np.random.Generator, experts: int, picks: int, rule: CarRule, is_biased: bool = False
) -> int:
    """The device's stand-ins are those of csrc/experts/car.h; returns how many there were.

    Whether random logits have any is chance: so the last pick is on NVMe, and the runner-up, in VRAM, as good as it.
    """
    logits = (2 * normal(rng, 1, experts)).astype(np.float32)
    where = rng.integers(0, 3, experts).astype(np.int8)  # VRAM, DRAM, NVMe
    table = np.select([where == 0, where == 1], [16 * rng.integers(1, 1 << 56, experts), 1], 0).astype(np.uint64)
    true, weight = route_reference(logits.astype(np.float64), picks, True, 1.0)
    p = None
    if is_biased:
        p = ref.sigmoid(logits[0].astype(np.float64)).astype(np.float32)
        logits = p[None] + rng.uniform(-0.5, 0.1, (1, experts)).astype(np.float32)
        logits[0, experts - 9 :] = -np.inf
        true = np.argsort(-logits, axis=1, kind="stable")[:, :picks]
        weight = p[true] / p[true].sum()
    last, next_best = np.argsort(-logits[0], kind="stable")[picks - 1 : picks + 1]
    logits[0, next_best] = logits[0, last] - np.float32(1e-3)
    where[last], where[next_best] = 2, 0
    table[last], table[next_best] = 0, 16
    true_ids, true_weights = true[0].astype(np.int32), weight[0].astype(np.float32)
    want, want_weight, replaced = choose(rule, logits[0], where, true_ids, true_weights, p=p)
    ids, weights = runner.put(true[0].astype(np.int32)), runner.put(weight[0].astype(np.float32))
    records, post = runner.put(np.full(picks, 77, np.uint64)), runner.put(np.zeros(1 + 2 * picks, np.uint64))
    run, count = runner.put(np.array([3, 1], np.uint32)), runner.put(np.zeros(1, np.uint32))
    native = runner.put(np.frombuffer(bytes(rule.native()), np.uint8))
    scores = None if p is None else runner.put(p)
    late, row, values = runner.put(np.zeros(picks, np.uint64)), runner.put(table), runner.put(logits)
    for may, marked in ((1, replaced >= 0), (0, np.zeros(picks, bool))):  # guesses first: nothing of theirs is changed
        guesses, marks = runner.put(np.zeros(picks + 1, np.uint64)), np.uint64(1 << 31) * marked.astype(np.uint64)
        runner.launch("substitute_and_post", (1, 1, 1), values, scores, ids, weights, row, guesses,
                      runner.put(np.array([3, may], np.uint32)), native, experts, picks, 1)  # fmt: skip
        expected = (np.uint64(3) << np.uint64(32)) + true[0].astype(np.uint64) + marks
        np.testing.assert_array_equal(guesses.get(), [*expected, 0])
    runner.launch("substitute_and_resolve", (1, 1, 1), values, scores, ids, weights, row,
                  records, late, post, run, count, native, experts, picks, 1)  # fmt: skip
    np.testing.assert_array_equal(ids.get(), want)
    np.testing.assert_allclose(weights.get(), want_weight, rtol=1e-5)
    posted = (post.get()[1:] & 0xFFFFFFFF).astype(np.uint32)
    np.testing.assert_array_equal(posted[:picks], true[0] + 65536 * want)
    np.testing.assert_array_equal(posted[picks:].view(np.float32), weight[0].astype(np.float32))
    assert count.get()[0] == (where[want] != 0).sum()
    return int((replaced >= 0).sum())


def check_nan_logits_show(runner: Runner, rng: np.random.Generator) -> None:
    logits = normal(rng, 1, 64)
    logits[0, 7] = np.nan
    ids, weights = runner.put(np.full((1, 8), -1, np.int32)), runner.put(np.zeros((1, 8), np.float32))
    runner.launch("route", (1, 1, 1), runner.put(logits), ids, weights, 64, 8, 1, 1.0)
    assert ids.get().min() >= 0 and ids.get().max() < 64
    assert np.isnan(weights.get()).all()
