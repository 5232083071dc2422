"""Text and logits do not depend on memory, store, reader, threads or batch size: the project's first promise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from layout_tool.main import main as layout

CONTEXT = 256
PROMPT_TOKENS, ANSWER_TOKENS = 60, 40


@pytest.fixture(scope="module")
def stores(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model as it is, packed, indexed, and packed over two directories."""
    root = tmp_path_factory.mktemp("stores")
    assert layout(["pack", str(demo_model), "--to", str(root / "packed")]) == 0
    assert layout(["pack", str(demo_model), "--to", str(root / "a"), "--to", str(root / "b")]) == 0
    assert layout(["index", str(demo_model), "--to", str(root / "index")]) == 0
    return {"gguf": demo_model, "packed": root / "packed", "two": root / "a", "index": root / "index"}


def run(path: Path, **settings: Any) -> tuple[bytes, list[int], dict[str, Any]]:
    """(all logits of prompt and answer, the greedy answer, statistics)."""
    prompt = np.random.default_rng(11).integers(0, 8000, PROMPT_TOKENS)
    with Engine.open(path, EngineConfig(context_tokens=CONTEXT, **settings)) as engine:
        session = engine.session()
        logits = [session.evaluate(prompt)]
        answer = []
        for _ in range(ANSWER_TOKENS):
            answer.append(int(logits[-1][-1].argmax()))
            logits.append(session.decode(answer[-1])[None].copy())
        return np.concatenate(logits).tobytes(), answer, engine.statistics()


FEWEST, HALF, ALL = Tiers(0, 0.125), Tiers(0, 0.5), None
"""Slots: as many as a token uses, half of the experts, all."""


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> tuple[bytes, list[int]]:
    logits, answer, statistics = run(demo_model, threads=1)
    assert statistics["tiers"]["nvme"]["hits"] == 0  # everything was resident
    return logits, answer


@pytest.mark.parametrize("store", ["gguf", "packed", "two", "index"])
@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_stores_and_readers(
    stores: dict[str, Path], expected: tuple[bytes, list[int]], store: str, reader: str
) -> None:
    for slots in (FEWEST, HALF, ALL):
        logits, answer, statistics = run(stores[store], tiers=slots, reader=reader)
        assert (answer, logits) == (expected[1], expected[0])
        assert statistics["reader"]["engine"] == reader
        nvme = statistics["tiers"]["nvme"]
        assert (nvme["hits"] > 0) == (slots is not ALL)
        assert statistics["expert_requests"] == sum(tier["hits"] for tier in statistics["tiers"].values())
        assert statistics["expert_requests"] == 8 * 4 * (PROMPT_TOKENS + ANSWER_TOKENS)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_threads_and_batches(demo_model: Path, expected: tuple[bytes, list[int]], threads: int, batch: int) -> None:
    logits, answer, _ = run(demo_model, threads=threads, batch_tokens=batch)
    assert (answer, logits) == (expected[1], expected[0])


@pytest.mark.parametrize("policy", ["lru", "lfu", "decayed", "lfru"])
def test_policies_and_tiers(stores: dict[str, Path], expected: tuple[bytes, list[int]], policy: str) -> None:
    logits, answer, statistics = run(stores["packed"], policy=policy, tiers=Tiers(0.2, 0.15))
    assert (answer, logits) == (expected[1], expected[0])
    tiers = statistics["tiers"]
    assert min(tiers[name]["hits"] for name in ("vram", "dram", "nvme")) > 0
    assert statistics["promotions"] > 0 and statistics["demotions"] > 0 and statistics["evictions"] > 0


def test_nvme_bytes_are_misses_times_record(stores: dict[str, Path]) -> None:
    _, _, statistics = run(stores["packed"], tiers=FEWEST, batch_tokens=1, lookahead="off")
    with Engine.open(stores["packed"], EngineConfig(context_tokens=CONTEXT)) as engine:
        sizes = {layer.record_bytes for layer in engine.store.experts.values()}
    nvme = statistics["tiers"]["nvme"]
    assert nvme["hits"] == nvme["reads"] > 0
    assert min(sizes) * nvme["reads"] <= nvme["bytes"] <= max(sizes) * nvme["reads"]
    assert nvme["bytes"] % 4096 == 0


def test_a_profile_changes_nothing_but_reads(
    stores: dict[str, Path], expected: tuple[bytes, list[int]], demo_model: Path, tmp_path: Path
) -> None:
    """Frequency-sorted records and a warm start: the same text."""
    text = tmp_path / "text"
    text.write_text("It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 5)
    assert layout(["profile", str(demo_model), "-f", str(text), "-o", str(tmp_path / "profile")]) == 0
    target = tmp_path / "sorted"
    assert layout(["pack", str(demo_model), "--to", str(target), "--profile", str(tmp_path / "profile")]) == 0
    logits, answer, statistics = run(target, tiers=FEWEST)
    assert (answer, logits) == (expected[1], expected[0])
    assert statistics["tiers"]["nvme"]["hits"] > 0
    shutil.rmtree(target)


def test_sessions_do_not_mix(demo_model: Path) -> None:
    """Two timelines on one engine, interleaved, and a third after a reset."""

    def steps(session: Any, tokens: list[int]) -> Iterator[bytes]:
        for token in tokens:
            yield session.decode(token).tobytes()

    with Engine.open(demo_model, EngineConfig(context_tokens=32, sessions=2)) as engine:
        random = np.random.default_rng(3)
        a, b = ([int(t) for t in random.integers(0, 8000, 12)] for _ in range(2))
        alone = [list(steps(engine.session(), tokens)) for tokens in (a, b)]
        first, second = engine.session(), engine.session()
        mixed = list(zip(steps(first, a), steps(second, b), strict=True))
        assert [list(column) for column in zip(*mixed, strict=True)] == alone
        first.reset()
        assert list(steps(first, b)) == alone[1]
