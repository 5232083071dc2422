"""What only the io_uring reader has: modes of the ring, registered buffers, and a kernel that refuses it."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fomoe_io._uring import MODES
from fomoe_io.errors import ReadError, UsageError
from fomoe_io.storage.read_files import ReadFiles
from fomoe_io.storage.reader import IO_URING_FIX, aligned_memory, io_uring_disabled, open_reader, probe_modes, ring_fix
from tests.fakes import ROOT, compile_library

PAGE = 4096
FILE_PAGES = 256


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    data = np.random.default_rng(8).integers(0, 256, FILE_PAGES * PAGE, dtype=np.uint8)
    path = tmp_path_factory.mktemp("ring") / "data"
    data.tofile(path)
    return path, data


def test_every_mode_that_works_reads_right(file: tuple[Path, np.ndarray]) -> None:
    path, data = file
    modes = probe_modes(path)
    assert set(modes) == set(MODES) and modes["plain"] == ""
    for mode in (mode for mode, problem in modes.items() if not problem):
        memory = aligned_memory(len(data))
        with open_reader([path], engine="uring", depth=8, mode=mode) as reader:
            assert reader.mode == mode
            reader.register_buffers(memory.address, len(data))
            reader.read_into([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(FILE_PAGES)])
            assert np.array_equal(np.frombuffer(memory.view, np.uint8), data), mode


def test_a_mode_that_does_not_work_says_so(file: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="is no mode"):
        open_reader([file[0]], mode="turbo")
    with pytest.raises(UsageError, match="is no mode of pread"):
        open_reader([file[0]], engine="pread", mode="coop")


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_sub_reads(file: tuple[Path, np.ndarray], engine: str) -> None:
    path, data = file
    memory = aligned_memory(len(data))
    with open_reader([path], engine=engine, depth=4, sub_read_bytes=10 * PAGE) as reader:
        reader.submit([(0, 0, memory.address, FILE_PAGES * PAGE)], first_tag=77)
        assert reader.reap() == [(77, 0)] and reader.reap() == []
        assert reader.counters["sub_reads"] == -(-FILE_PAGES // 10) and reader.counters["reads"] == 1
    assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
    with pytest.raises(UsageError, match="sub-reads of 5000"):
        open_reader([path], engine=engine, sub_read_bytes=5000)


def test_each_read_is_under_way_before_the_next_is_prepared(file: tuple[Path, np.ndarray]) -> None:
    """A system call a read (docs/io.md says why), and all of them in flight at once."""
    memory = aligned_memory(FILE_PAGES * PAGE)
    with open_reader([file[0]], engine="uring", depth=64) as reader:
        reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(64)])
        assert reader.counters["submits"] == 64
        while reader.reap():
            pass
        assert reader.counters["depths"][64] == 1


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_a_cancelled_read_that_has_not_started_is_not_made(file: tuple[Path, np.ndarray], engine: str) -> None:
    memory = aligned_memory(200 * PAGE)
    with open_reader([file[0]], engine=engine, depth=1) as reader:
        reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(200)])
        for tag in range(199, 99, -1):
            reader.cancel(tag)
        done: dict[int, int] = {}
        while batch := reader.reap():
            done.update(batch)
        counters = reader.counters
    assert sorted(done) == list(range(200))
    dropped = sum(error != 0 for error in done.values())
    assert 0 < dropped <= 100 and counters["cancelled"] == dropped
    assert counters["bytes"] == (200 - dropped) * PAGE


def test_registered_in_part(file: tuple[Path, np.ndarray]) -> None:
    """Reads inside, outside and across the end of registered memory."""
    path, data = file
    memory = aligned_memory(len(data))
    with open_reader([path], engine="uring", depth=8) as reader:
        assert reader.register_buffers(memory.address + 50 * PAGE, 100 * PAGE)
        assert reader.buffers_registered
        reader.read_into([(0, i * 8 * PAGE, memory.address + i * 8 * PAGE, 8 * PAGE) for i in range(FILE_PAGES // 8)])
        assert reader.register_buffers(memory.address, len(data))  # in place of the first
        reader.read_into([(0, 0, memory.address, len(data))])
    assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)


@pytest.mark.slow
def test_registered_memory_of_several_pieces(file: tuple[Path, np.ndarray]) -> None:
    """The kernel takes 1 GiB a buffer; a read over the seam is a plain one."""
    path, data = file
    seam = 1 << 30
    memory = aligned_memory(seam + (64 << 20))
    with open_reader([path], engine="uring") as reader:
        assert reader.register_buffers(memory.address, seam + (64 << 20)), reader.registration_error
        for start in (seam - 2 * PAGE, seam, seam + PAGE, 0):
            reader.submit([(0, 0, memory.address + start, FILE_PAGES * PAGE)])
            assert reader.reap() == [(0, 0)]
            assert np.array_equal(np.frombuffer(memory.view, np.uint8)[start:][: len(data)], data)


MEMORY_LIMIT = """
import os, resource, sys
import numpy as np
from fomoe_io._uring import UringReader
from fomoe_io.storage.read_files import ReadFiles
from fomoe_io.storage.reader import Reader, aligned_memory
data = np.fromfile(sys.argv[1], np.uint8)
memory = aligned_memory(len(data))
files = ReadFiles([sys.argv[1]])
os.setuid(65534)  # before the ring is made: the kernel looks at who made it
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 18, 1 << 18))
with Reader(UringReader(files, depth=4), 4) as reader:
    print(reader.register_buffers(memory.address, len(data)), reader.registration_error)
    reader.read_into([(0, 0, memory.address, len(data))])
assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user with a small limit")
def test_the_limit_of_locked_memory(file: tuple[Path, np.ndarray]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_LIMIT, str(file[0])], env=environment, capture_output=True, text=True, timeout=60
    )
    if "is not available: Cannot allocate memory" in result.stderr:
        pytest.skip("this user's locked memory is taken by other processes: not even the ring fits")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False the limit of locked memory (ulimit -l) is below 1,048,576 bytes")


FORBIDDEN = """
import sys
from fomoe_io.errors import UsageError
from fomoe_io.storage.reader import open_reader
with open_reader([sys.argv[1]]) as reader:
    print(reader.name, "|", reader.fallback_reason)
try:
    open_reader([sys.argv[1]], engine="uring")
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("fault", "reason", "fix"),
    [
        ("forbidden", "Operation not permitted", "  fix: allow io_uring in the container"),
        ("unsupported", "Operation not supported", "  fix: --reader pread"),
    ],
)
def test_a_kernel_without_io_uring(
    file: tuple[Path, np.ndarray], tmp_path: Path, fault: str, reason: str, fix: str
) -> None:
    """Refused when the ring is set up, or only when it reads."""
    shim = compile_library(tmp_path / "shim.so", [ROOT / "tests/fault_shim.c"], "-ldl")
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULT": fault, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(file[0])], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"pread | io_uring (coop) is not available: {reason}"), result.stderr
    assert lines[1] == f"io_uring (coop) is not available: {reason}"
    assert lines[2].startswith(fix) or io_uring_disabled()


def test_the_system_or_the_container_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for disabled, fix in ((True, IO_URING_FIX), (False, "seccomp")):
        monkeypatch.setattr("fomoe_io.storage.reader.io_uring_disabled", lambda disabled=disabled: disabled)
        assert fix in ring_fix(errno.EPERM)
    assert "ulimit -l" in ring_fix(errno.ENOMEM) and ring_fix(errno.EOPNOTSUPP) == ""


def test_a_deferring_ring_belongs_to_one_thread(file: tuple[Path, np.ndarray]) -> None:
    """Another thread's submission is refused by the kernel: an error, and close does not hang."""
    if probe_modes(file[0])["defer"]:
        pytest.skip("this kernel has no such mode")
    memory = aligned_memory(PAGE)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            reader.read_into([(0, 0, memory.address, PAGE)])
        except ReadError as error:
            caught.append(error)

    with open_reader([file[0]], engine="uring", mode="defer") as reader:
        reader.read_into([(0, 0, memory.address, PAGE)])
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive() and len(caught) == 1


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_files_on_two_drives(file: tuple[Path, np.ndarray], engine: str) -> None:
    """A file of a second file system has queues of its own, and mirrors may lie there."""
    memory_drive = Path("/dev/shm")
    path, data = file
    if not memory_drive.is_dir() or memory_drive.stat().st_dev == path.stat().st_dev:
        pytest.skip("no second file system here")
    copy = memory_drive / f"fomoe-test-{os.getpid()}"
    try:
        data.tofile(copy)
        memory = aligned_memory(2 * len(data))
        with open_reader([path, copy], engine=engine, depth=4, mirrors={0: 1}) as reader:
            assert reader.drives == 2
            wanted = [
                (f, i * PAGE, memory.address + (f * FILE_PAGES + i) * PAGE, PAGE)
                for i in range(FILE_PAGES)
                for f in (0, 1)
            ]
            reader.read_into(wanted)
        assert np.array_equal(np.frombuffer(memory.view, np.uint8), np.concatenate([data, data]))
        with pytest.raises(UsageError, match="no mirrors"):
            ReadFiles([path, copy, ROOT / "setup.py"], mirrors={0: 2})
    finally:
        copy.unlink(missing_ok=True)


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_a_forgotten_reader_is_reported(file: tuple[Path, np.ndarray], engine: str) -> None:
    with pytest.warns(ResourceWarning, match="unclosed reader"):
        open_reader([file[0]], engine=engine)
        gc.collect()


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_nothing_is_left_behind(file: tuple[Path, np.ndarray], engine: str) -> None:
    """Neither descriptors nor threads, also when reads are under way at the end."""
    memory = aligned_memory(FILE_PAGES * PAGE)

    def count() -> tuple[int, int]:
        descriptors, tasks = Path("/proc/self/fd"), Path("/proc/self/task")
        return len(list(descriptors.iterdir())), len(list(tasks.iterdir()))

    for _ in range(3):
        before = count()
        with open_reader([file[0]], engine=engine, depth=8) as reader:
            reader.submit([(0, i * PAGE, memory.address + i * PAGE, PAGE) for i in range(FILE_PAGES)])
    assert count() == before
