"""A reader at the pace of a drive: the bytes of the file, and never before their time."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from fomoe_io.errors import ReadError, UsageError
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.reader import aligned_memory, open_reader

READS, READ_BYTES = 24, 64 << 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paced") / "data"
    path.write_bytes(random.Random(5).randbytes(READS * READ_BYTES))
    return path


@pytest.mark.parametrize("engine", ["auto", "pread"])
def test_bytes_arrive_in_order_and_not_early(data: Path, engine: str) -> None:
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
        assert reader.reap() == [] and arrived == list(range(READS))
        assert bytes(memory.view[: READS * READ_BYTES]) == data.read_bytes()
        counters = reader.counters
    assert counters["reads"] == READS and counters["paced_late"] <= READS


def test_latency_is_hidden_by_reads_in_flight(data: Path) -> None:
    """By count: one at a time each waits for its own latency, together they wait for one."""
    memory = aligned_memory(8 * 4096)
    with open_reader([data], pace=Pace(1e12, 20e-3)) as reader:
        reader.submit([(0, i * 4096, memory.address + i * 4096, 4096) for i in range(8)])
        assert reader.reap(wait=False) == []
        started = time.monotonic()
        left = 8
        while left:
            left -= len(reader.reap())
        assert time.monotonic() - started < 8 * 20e-3


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
