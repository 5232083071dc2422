"""Drives that misbehave in every way at once, on a seeded fake: never a wrong byte, never a lost completion."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from fomoe_io.config import EngineConfig, Tiers
from fomoe_io.engine import Engine
from fomoe_io.errors import ReadError
from fomoe_io.storage.reader import Reader, aligned_memory
from tests.fakes import FakeRing, Faults, load_fake_ring

PAGE = 4096
FILE_BYTES = 600 * PAGE + 1234


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_fake_ring(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, FILE_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def copies(data: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same bytes on two drives."""
    paths = [tmp_path_factory.mktemp("drive") / "data" for _ in range(2)]
    for path in paths:
        data.tofile(path)
    return paths


def requests(seed: int, count: int, address: int, stride: int) -> list[tuple[int, int, int, int]]:
    random = np.random.default_rng(seed)
    pages = -(-FILE_BYTES // PAGE)
    result = []
    for i in range(count):
        first = int(random.integers(pages))
        size = int(random.integers(1, min(stride // PAGE, pages - first) + 1)) * PAGE
        result.append((0, first * PAGE, address + i * stride, size))
    return result


def wrong(wanted: list[tuple[int, int, int, int]], data: np.ndarray, found: np.ndarray, base: int) -> list[int]:
    return [
        i
        for i, (_, offset, address, size) in enumerate(wanted)
        if not np.array_equal(
            found[address - base :][: len(data[offset : offset + size])], data[offset : offset + size]
        )
    ]


@pytest.mark.parametrize("seed", range(12))
def test_storm(library: ctypes.CDLL, copies: list[Path], data: np.ndarray, seed: int) -> None:
    """Short, interrupted, refused and reordered answers, sub-reads or not, with promotions and cancels."""
    random = np.random.default_rng(100 + seed)
    faults = Faults(seed=seed + 1, short=0.3, interrupted=0.2, refused=0.2)
    sub = int(random.choice([0, 4096, 12288]))
    stride, count = 40 * PAGE, 120
    memory = aligned_memory(count * stride)
    native = FakeRing(library, copies[:1], faults=faults, depth=int(random.integers(1, 9)), sub_read_bytes=sub)
    with Reader(native, 8) as reader:
        wanted = requests(seed, count, memory.address, stride)
        done: dict[int, int] = {}
        asked_to_cancel: set[int] = set()
        for start in range(0, count, 20):
            reader.submit(wanted[start : start + 20], first_tag=start, priority=int(random.integers(2)))
            for tag in random.integers(0, count, 4):
                reader.promote(int(tag))
            for tag in random.integers(0, start + 20, 2):
                reader.cancel(int(tag))
                asked_to_cancel.add(int(tag))
            for tag, error in reader.reap(most=5, wait=bool(random.integers(2))):
                assert tag not in done
                done[tag] = error
        while batch := reader.reap():
            assert not set(done) & {tag for tag, _ in batch}
            done.update(batch)
        counters = reader.counters
    assert sorted(done) == list(range(count))
    dropped = {tag for tag, error in done.items() if error}
    assert dropped <= asked_to_cancel and counters["cancelled"] == len(dropped)
    found = np.frombuffer(memory.view, np.uint8)
    assert set(wrong(wanted, data, found, memory.address)) <= dropped
    assert counters["short_reads"] and counters["retries"] and not counters["errors"]


def test_a_bad_sector(library: ctypes.CDLL, copies: list[Path], data: np.ndarray) -> None:
    """One page that cannot be read fails the reads over it, with its place, and no other."""
    faults = Faults(bad_file=0, bad_offset=100 * PAGE, bad_bytes=512)
    memory = aligned_memory(200 * PAGE)
    with Reader(FakeRing(library, copies[:1], faults=faults, sub_read_bytes=4 * PAGE), 8) as reader:
        with pytest.raises(ReadError, match=f"at offset {100 * PAGE}: Input/output error"):
            reader.read_into([(0, 0, memory.address, 200 * PAGE)])
        reader.read_into([(0, 0, memory.address, 100 * PAGE)])
        assert np.array_equal(np.frombuffer(memory.view, np.uint8)[: 100 * PAGE], data[: 100 * PAGE])


@pytest.mark.parametrize("bad_bytes", [512, 1 << 62])
def test_a_mirror_takes_over(library: ctypes.CDLL, copies: list[Path], data: np.ndarray, bad_bytes: int) -> None:
    """One bad sector, and a dead drive: the copy on the other drive is read instead."""
    faults = Faults(short=0.2, bad_file=0, bad_offset=0, bad_bytes=bad_bytes)
    native = FakeRing(
        library, copies, faults=faults, drives=[0, 1], page_time=[1, 1], mirrors={0: 1, 1: 0}, sub_read_bytes=4 * PAGE
    )
    memory = aligned_memory(300 * 8 * PAGE)
    with Reader(native, 8) as reader:
        for batch in range(0, 300, 20):
            wanted = [(0, i % 50 * PAGE, memory.address + i * 8 * PAGE, 8 * PAGE) for i in range(batch, batch + 20)]
            reader.read_into(wanted)
            assert not wrong(wanted, data, np.frombuffer(memory.view, np.uint8), memory.address)
        counters = reader.counters
        assert counters["failovers"] == counters["errors"] > 0
        assert str(copies[0]) in reader.last_error
        if bad_bytes > 512:  # a dead drive is not asked again and again
            assert counters["failovers"] < 60


def test_both_copies_bad(library: ctypes.CDLL, copies: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(copies[0].read_bytes())
    native = FakeRing(
        library, [copies[0], cut], faults=Faults(bad_file=0), drives=[0, 1], page_time=[1, 1], mirrors={0: 1, 1: 0}
    )
    memory = aligned_memory(PAGE)
    with Reader(native, 8) as reader:
        with cut.open("r+b") as stream:
            stream.truncate(0)
        with pytest.raises(ReadError, match=r"at offset 0: (Input/output error|the file ends before)"):
            reader.read_into([(0, 0, memory.address, PAGE)])


def test_a_slow_drive_does_not_hold_back_a_fast_one(library: ctypes.CDLL, copies: list[Path]) -> None:
    """Reads of the fast drive end when they would have ended without the slow one."""

    def when_done(with_slow: bool) -> float:
        native = FakeRing(library, copies, faults=Faults(), drives=[0, 1], page_time=[50, 1], depth=4)
        memory = aligned_memory(128 * PAGE)
        with Reader(native, 4) as reader:
            if with_slow:
                reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(64)], first_tag=1000)
            reader.submit([(1, i * PAGE, memory.address + (64 + i) * PAGE, PAGE) for i in range(64)])
            left = 64
            while left:
                left -= sum(tag < 1000 for tag, _ in reader.reap(most=1))
            clock = native.clock
            while reader.reap():
                pass
            return clock

    assert when_done(True) < 1.2 * when_done(False)


def test_mirrored_reads_go_where_there_is_less_to_do(library: ctypes.CDLL, copies: list[Path]) -> None:
    """A drive four times as fast serves most reads of a mirrored file, and both beat the fast one alone."""

    def duration(mirrors: dict[int, int]) -> float:
        native = FakeRing(library, copies, faults=Faults(), drives=[0, 1], page_time=[1, 4], mirrors=mirrors, depth=4)
        memory = aligned_memory(8 * PAGE)
        with Reader(native, 4) as reader:
            submitted = finished = 0
            while finished < 400:
                while submitted - finished < 8 and submitted < 400:
                    place = submitted % 8
                    reader.submit([(0, submitted * PAGE, memory.address + place * PAGE, PAGE)], first_tag=submitted)
                    submitted += 1
                finished += len(reader.reap(most=1))
            return native.clock

    assert duration({0: 1, 1: 0}) < 0.92 * duration({})


MIB = 1 << 20


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "data"
    with path.open("wb") as stream:
        stream.truncate(8 * MIB)
    return path


def arrivals(
    library: ctypes.CDLL, path: Path, prefetches: int, *, promote: int | None = None, sub_read_bytes: int = 0
) -> tuple[dict[int, float], int]:
    """When each of some prefetches of 8 MiB and then a demand of 1 MiB (tag 99) arrive, in MiB's times of the drive;
    how many pieces were read."""
    memory = aligned_memory(8 * MIB)
    native = FakeRing(library, [path], faults=Faults(), depth=64, page_time=[PAGE / MIB], sub_read_bytes=sub_read_bytes)
    done: dict[int, float] = {}
    with Reader(native, 64) as reader:
        reader.submit([(0, 0, memory.address, 8 * MIB)] * prefetches, priority=1)
        if promote is not None:
            reader.promote(promote)
        reader.submit([(0, 0, memory.address, MIB)], first_tag=99)
        while batch := reader.reap(most=1):
            assert batch[0][1] == 0
            done[batch[0][0]] = native.clock
        return done, reader.counters["sub_reads"]


@pytest.mark.parametrize("sub_read_bytes", [0, 256 << 10, 2 * MIB])
def test_a_demand_waits_for_few_prefetched_bytes(library: ctypes.CDLL, long_file: Path, sub_read_bytes: int) -> None:
    """Of ten prefetches of 8 MiB, 2 MiB are before it in the drive, however long the reads are."""
    done, pieces = arrivals(library, long_file, 10, sub_read_bytes=sub_read_bytes)
    assert min(done, key=lambda tag: done[tag]) == 99
    assert 2 < done[99] <= 2 + 2  # the fake adds up to one time of a piece
    assert pieces == 10 * 8 * MIB // (MIB // 4) + -(-MIB // (sub_read_bytes or MIB))
    assert max(done.values()) <= 81 + 2  # and the drive has never idled


@pytest.mark.parametrize("promoted", [0, 5])
def test_what_waits_of_a_promoted_prefetch_is_a_demand(library: ctypes.CDLL, long_file: Path, promoted: int) -> None:
    """The rest of a read whose first pieces are in the drive, and a whole one, start at once, before the others."""
    done, _ = arrivals(library, long_file, 10, promote=promoted)
    assert set(sorted(done, key=lambda tag: done[tag])[:2]) == {99, promoted}
    begun = 2 if promoted == 0 else 0
    in_the_drive = 2 + 8 - begun + 1
    assert max(done[promoted], done[99]) <= in_the_drive + 8


@pytest.mark.parametrize("seed", [1, 2])
def test_the_engine_under_the_storm(
    library: ctypes.CDLL, demo_model: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Reordered, cut and interrupted reads of experts do not change a bit of the logits."""
    config = EngineConfig(context_tokens=64, threads=2, tiers=Tiers(0, 0.125))

    def logits() -> bytes:
        with Engine.open(demo_model, config) as engine:
            session = engine.session()
            answer = [
                session.evaluate(np.arange(100, 120)),
                *(session.decode(token)[None] for token in range(200, 210)),
            ]
            assert engine.statistics()["tiers"]["nvme"]["hits"] > 100
            return np.concatenate(answer).tobytes()

    expected = logits()
    faults = Faults(seed=seed, short=0.3, interrupted=0.2, refused=0.1)

    def open_fake(paths: list[Path], **_: object) -> Reader:
        return Reader(FakeRing(library, paths, faults=faults, sub_read_bytes=8 * PAGE), 8)

    monkeypatch.setattr("fomoe_io.open_model.open_reader", open_fake)
    assert logits() == expected
