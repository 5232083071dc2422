"""The readers' contract (csrc/read/reader.h), the same for io_uring and for the pread pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fomoe_io.errors import ReadError
from fomoe_io.storage.reader import Memory, Reader, aligned_memory, open_reader

PAGE = 4096
SIZES = (3_000_123, 512, 4096 * 7)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, np.ndarray]]:
    """Files of random bytes; the lengths are no multiples of a page."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(5)
    result = []
    for i, size in enumerate(SIZES):
        data = random.integers(0, 256, size, dtype=np.uint8)
        path = folder / f"{i}.bin"
        data.tofile(path)
        result.append((path, data))
    return result


@pytest.fixture(params=["uring", "pread"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(engine: str, files: list[tuple[Path, np.ndarray]]) -> Iterator[Reader]:
    with open_reader([path for path, _ in files], engine=engine, depth=8) as opened:
        assert opened.name == engine
        yield opened


def buffer(memory: Memory) -> np.ndarray:
    return np.frombuffer(memory.view, np.uint8)


@pytest.mark.parametrize("registered", [False, True])
def test_random_batches(reader: Reader, files: list[tuple[Path, np.ndarray]], registered: bool, seed: int = 17) -> None:
    """More reads than the depth, of random places and sizes, over the ends of files: every byte is right."""
    random = np.random.default_rng(seed)
    memory = aligned_memory(300 * 40 * PAGE)
    if registered:
        reader.register_buffers(memory.address, 300 * 40 * PAGE)
    requests, expected = [], []
    for i in range(300):
        file = int(random.integers(len(files)))
        pages = -(-len(files[file][1]) // PAGE)
        first = int(random.integers(pages))
        count = int(random.integers(1, min(40, pages - first) + 1))
        requests.append((file, first * PAGE, memory.address + i * 40 * PAGE, count * PAGE))
        expected.append(files[file][1][first * PAGE : (first + count) * PAGE])
    reader.read_into(requests)
    found = buffer(memory)
    for i, data in enumerate(expected):
        assert np.array_equal(found[i * 40 * PAGE :][: len(data)], data)
    counters = reader.counters
    assert counters["reads"] == 300 and counters["errors"] == 0
    assert counters["bytes"] >= sum(len(data) for data in expected)


def test_depth_holds(files: list[tuple[Path, np.ndarray]]) -> None:
    memory = aligned_memory(64 * PAGE)
    with open_reader([files[0][0]], engine="uring", depth=4) as reader:
        reader.read_into([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(64)])
        assert sum(reader.counters["depths"][1:]) > 0 and len(reader.counters["depths"]) == 5


@pytest.mark.parametrize(("file", "offset", "size"), [(9, 0, PAGE), (1, PAGE, PAGE), (0, 1 << 40, PAGE), (0, 0, 0)])
def test_impossible_reads_are_refused(reader: Reader, file: int, offset: int, size: int) -> None:
    memory = aligned_memory(PAGE)
    with pytest.raises(ReadError):
        reader.submit([(0, 0, memory.address, PAGE), (file, offset, memory.address, size)])
    assert reader.reap(wait=True) == []  # nothing was started
    reader.read_into([(0, 0, memory.address, PAGE)])


def test_tags_come_back_once(reader: Reader) -> None:
    memory = aligned_memory(100 * PAGE)
    requests = [(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(100)]
    reader.submit(requests[:50], first_tag=1000)
    reader.submit(requests[50:], first_tag=1050, priority=1)
    reader.promote(1099)
    reader.cancel(1098)
    reader.cancel(1000)
    reader.promote(7)  # nobody's
    done: list[tuple[int, int]] = []
    while batch := reader.reap(most=7):
        done += batch
    assert sorted(tag for tag, _ in done) == list(range(1000, 1100))
    assert all(error == 0 or tag in (1000, 1098) for tag, error in done)


def test_demand_goes_before_prefetch(files: list[tuple[Path, np.ndarray]]) -> None:
    """With one read in flight at a time, queued demands overtake queued prefetches."""
    memory = aligned_memory(40 * PAGE)
    with open_reader([files[0][0]], engine="uring", depth=1) as reader:
        reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(20)], priority=1)
        reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(20, 40)], first_tag=20)
        reader.promote(19)
        order = []
        while batch := reader.reap(most=1):
            order += [tag for tag, _ in batch]
    assert order[0] == 0  # was in flight already
    assert order[1:22] == [*range(20, 40), 19]


def test_a_file_cut_under_us(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(b"x" * 20 * PAGE)
    memory = aligned_memory(20 * PAGE)
    with open_reader([path], engine=engine) as reader:
        with path.open("r+b") as stream:
            stream.truncate(5 * PAGE)
        reader.read_into([(0, 0, memory.address, 5 * PAGE)])
        with pytest.raises(ReadError, match=r"cut at offset \d+: the file ends before"):
            reader.read_into([(0, 0, memory.address, 20 * PAGE)])
        reader.read_into([(0, 0, memory.address, 5 * PAGE)])  # and it goes on working


def test_a_file_replaced_under_us(reader: Reader, files: list[tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    """Opened is opened: another file under the name changes nothing."""
    other = tmp_path / "other"
    other.write_bytes(b"y" * SIZES[2])
    saved = files[2][0].read_bytes()
    other.replace(files[2][0])
    memory = aligned_memory(SIZES[2])
    reader.read_into([(2, 0, memory.address, SIZES[2])])
    assert np.array_equal(buffer(memory), files[2][1])
    files[2][0].write_bytes(saved)


def test_waiting_releases_the_gil(reader: Reader) -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0001)

    thread = threading.Thread(target=tick)
    thread.start()
    memory = aligned_memory(700 * PAGE)
    before = ticks[0]
    for _ in range(20):
        reader.read_into([(0, 0, memory.address, 700 * PAGE)])
    after = ticks[0]
    stop.set()
    thread.join()
    assert after > before


def test_close_twice_and_missing_file(files: list[tuple[Path, np.ndarray]], engine: str, tmp_path: Path) -> None:
    reader = open_reader([files[0][0]], engine=engine)
    reader.close()
    reader.close()
    with pytest.raises(FileNotFoundError):
        open_reader([tmp_path / "nothing"], engine=engine)
