"""A reader at the pace of a drive: the bytes of the file, and never before their time."""

from __future__ import annotations

import ctypes
import errno
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fomoe_io.errors import ReadError, UsageError
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.reader import aligned_memory, open_reader
from tests.fakes.pace import FakePace, load_fake_pace

READS, READ_BYTES = 24, 64 << 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paced") / "data"
    path.write_bytes(random.Random(5).randbytes(READS * READ_BYTES))
    return path


@pytest.mark.parametrize("engine", ["auto", "pread"])
def test_bytes_arrive_whole_and_not_early(data: Path, engine: str) -> None:
    """One after another at the pace; where threads read, one that is held up may be overtaken."""
    pace = Pace(bandwidth=32e6, latency_seconds=2e-3)
    memory = aligned_memory(READS * READ_BYTES)
    with open_reader([data], engine=engine, pace=pace) as reader:
        started = time.monotonic()
        reader.submit([(0, i * READ_BYTES, memory.address + i * READ_BYTES, READ_BYTES) for i in range(READS)])
        arrived: list[int] = []
        while len(arrived) < READS:
            for tag, error in reader.reap():
                assert not error
                arrived.append(tag)
                least = pace.latency_seconds + (tag + 1) * READ_BYTES / pace.bandwidth
                assert time.monotonic() - started >= least
        assert reader.reap() == [] and sorted(arrived) == list(range(READS))
        assert bytes(memory.view[: READS * READ_BYTES]) == data.read_bytes()
        counters = reader.counters
    assert counters["reads"] == READS and counters["paced_late"] <= READS


def test_readers_of_one_drive_share_its_bandwidth(data: Path) -> None:
    """No reader has its last byte before the drive has served the bytes of both that entered before it."""
    pace, memory = Pace(bandwidth=32e6, latency_seconds=1e-3), aligned_memory(2 * READS * READ_BYTES)
    with open_reader([data], pace=pace) as first, open_reader([data], pace=pace, beside=first) as second:
        started = time.monotonic()
        for i in range(READS):
            for k, reader in enumerate((first, second)):
                reader.submit([(0, i * READ_BYTES, memory.address + (2 * i + k) * READ_BYTES, READ_BYTES)])
        left = {first: READS, second: READS}
        while any(left.values()):
            for reader, count in left.items():
                left[reader] = count - len(reader.reap(wait=False))
        assert time.monotonic() - started >= 2 * READS * READ_BYTES / pace.bandwidth
        assert bytes(memory.view[: 2 * READS * READ_BYTES]) == b"".join(
            2 * data.read_bytes()[i * READ_BYTES : (i + 1) * READ_BYTES] for i in range(READS)
        )


def test_latency_is_hidden_by_reads_in_flight(data: Path) -> None:
    """By count: one at a time each waits for its own latency, together they wait for one."""
    memory = aligned_memory(8 * 4096)
    with open_reader([data], pace=Pace(1e12, latency := 0.2)) as reader:
        reader.submit([(0, i * 4096, memory.address + i * 4096, 4096) for i in range(8)])
        assert reader.reap(wait=False) == []
        started = time.monotonic()
        left = 8
        while left:
            left -= len(reader.reap())
        assert time.monotonic() - started < 8 * latency


def test_errors_pass(data: Path) -> None:
    memory = aligned_memory(4096)
    with open_reader([data], pace=Pace(1e9, 0)) as reader, pytest.raises(ReadError):
        reader.submit([(0, 1 << 40, memory.address, 4096)])


def test_parsing() -> None:
    pace = Pace.parse("14.5G,80us")
    assert (pace.bandwidth, pace.latency_seconds) == (14.5e9, pytest.approx(80e-6))
    assert str(Pace.parse("500M,1ms")) == "0.5G,1000us"
    for text in ("", "14.5G", "0G,80us", "14.5,80us", "1G,-1us", "nan,1us"):
        with pytest.raises(UsageError):
            Pace.parse(text)


# ---- the model, on a clock of its own: a MiB takes a ms ----

MIB, MS = 1 << 20, 1_000_000
LATENCY, IN_DRIVE = 1, 2  # ms; MiB of prefetches that a demand finds before it (csrc/read/read_table.c)

Open = Callable[..., FakePace]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_fake_pace(tmp_path_factory.mktemp("pace"))


@pytest.fixture
def paced(library: ctypes.CDLL) -> Iterator[Open]:
    opened: list[FakePace] = []

    def open_one(**options: int) -> FakePace:
        opened.append(FakePace(library, bandwidth=1000 * MIB, latency_ns=LATENCY * MS, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_a_demand_overtakes_guesses(paced: Open) -> None:
    """It comes within latency, the bytes that are in the drive, and its own; guesses go on behind it."""
    pace = paced()
    for tag in range(10):
        pace.submit(tag, 2 * MIB, priority=1)
    pace.submit(99, MIB)
    times = pace.arrivals()
    assert times[99] == pytest.approx(LATENCY + IN_DRIVE + 1, rel=0.01)
    assert max(times.values()) == pytest.approx(LATENCY + 20 + 1, rel=0.01)


def test_without_demands_the_drive_never_idles(paced: Open) -> None:
    """Guesses enter when there is room for them, though nobody looks until all could be there."""
    pace = paced()
    for tag in range(10):
        pace.submit(tag, 2 * MIB, priority=1)
    pace.pass_ms(LATENCY + 20)
    assert sorted(pace.arrivals(wait=False)) == list(range(10))
    for tag in range(10):
        pace.submit(tag, 2 * MIB, priority=1)
    pace.pass_ms(LATENCY + 9)  # four whole ones, and half of the fifth
    pace.submit(99, MIB)
    times = pace.arrivals()
    assert times[99] == pytest.approx(2 * LATENCY + 20 + 9 + IN_DRIVE + 1, abs=1.1)
    assert max(times.values()) == pytest.approx(2 * LATENCY + 20 + 21, rel=0.01)


def test_cancelled_guesses_cost_nothing(paced: Open) -> None:
    pace = paced()
    for tag in range(10):
        pace.submit(tag, 2 * MIB, priority=1)
    for tag in range(9, -1, -1):
        pace.cancel(tag)  # 2 MiB are in the drive: the first stays
    pace.submit(99, MIB)
    dropped = pace.reap_all(wait=False)
    assert dropped == dict.fromkeys(range(1, 10), -errno.ECANCELED) and pace.clock_ms < 0.1
    assert pace.cancels == 9  # the reader of the bytes may drop no read that the drive has
    times = pace.arrivals()
    assert sorted(times) == [0, 99] and times[99] == pytest.approx(LATENCY + IN_DRIVE + 1, rel=0.01)


def test_the_part_of_a_guess_that_waits_is_dropped(paced: Open) -> None:
    pace = paced()
    pace.submit(0, 10 * MIB, priority=1)
    pace.cancel(0)
    assert pace.reap_all() == {0: -errno.ECANCELED}
    assert pace.clock_ms == pytest.approx(LATENCY + IN_DRIVE, rel=0.01)


@pytest.mark.parametrize("promoted", [0, 7])
def test_a_promoted_guess_is_a_demand(paced: Open, promoted: int) -> None:
    """One of which a part is in the drive, and one that waits: behind 2 MiB, before the other guesses."""
    pace = paced()
    for tag in range(10):
        pace.submit(tag, 6 * MIB, priority=1)
    pace.promote(promoted)
    times = pace.arrivals()
    begun = IN_DRIVE if promoted == 0 else 0
    assert times[promoted] == pytest.approx(LATENCY + IN_DRIVE + 6 - begun, rel=0.01)
    assert min(times.values()) == times[promoted]


def test_the_depth_bounds_what_is_in_the_drive(paced: Open) -> None:
    """One at a time: each demand waits for its own latency."""
    pace = paced(depth=1)
    for tag in range(4):
        pace.submit(tag, MIB)
    assert max(pace.arrivals().values()) == pytest.approx(4 * (LATENCY + 1), rel=0.01)


@pytest.mark.parametrize(("slow_ms", "late"), [(LATENCY, 0), (20, 1)])
def test_a_reader_that_is_too_slow_is_told_of(paced: Open, slow_ms: int, late: int) -> None:
    """Only what was looked for in vain after its time is late: nobody knows when it came while nobody looked."""
    pace = paced(slow_ns=slow_ms * MS)
    pace.submit(0, MIB)
    pace.pass_ms(LATENCY + 2)
    pace.arrivals()
    assert pace.late == late


def test_a_refused_read_leaves_nothing_behind(paced: Open) -> None:
    pace = paced()
    with pytest.raises(OSError, match="22"):
        pace.submit(5, MIB, offset=4096)
    pace.submit(5, MIB)
    assert pace.arrivals()[5] == pytest.approx(LATENCY + 1, rel=0.01)
