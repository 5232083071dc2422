"""File systems and drives that are choosy about direct I/O: larger blocks, refused reads, short answers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from fomoe_io.cli import bench_io
from fomoe_io.config import EngineConfig
from fomoe_io.engine import Engine
from fomoe_io.errors import ReadError, StoreError, UsageError
from fomoe_io.experts.slots import slot_layout
from fomoe_io.io_bench.calibrate import calibrate
from fomoe_io.storage import read_files, reader
from fomoe_io.storage.read_files import ReadFiles, read_fault
from fomoe_io.storage.reader import aligned_memory, open_reader
from fomoe_io.storage.store import Store
from fomoe_io.system import direct_io
from layout_tool.direct import DirectFile, aligned_buffer
from tests.fakes import ROOT, compile_library

PAGE = 4096
GENERATE = ("-n", "30", "--temp", "0", "-c", "128", "--ram", "150M", "--slots", "6", "--no-profile", "-p", "A")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("shim") / "shim.so", [ROOT / "tests/direct_shim.c"], "-ldl")


def choosy(shim: Path, block: int, stated: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command where direct I/O takes multiples of a block (0: none) and statx says `stated` about it."""
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "DIRECT_BLOCK": str(block), "DIRECT_STATED": stated,
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def text(demo_model: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fomoe_io.cli.run", str(demo_model), *GENERATE]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


# ---- the same text ----


@pytest.mark.parametrize(
    ("engine", "block", "stated"),
    [("uring", 16384, "16384"), ("uring", 65536, "silent"), ("pread", 16384, "512"), ("pread", 65536, "65536")],
)
def test_larger_blocks(shim: Path, demo_model: Path, text: str, engine: str, block: int, stated: str) -> None:
    """Stated by the kernel, unknown to it, and stated wrongly."""
    result = choosy(shim, block, stated, "fomoe_io.cli.run", str(demo_model), *GENERATE, "--reader", engine)
    assert result.returncode == 0, result.stderr
    assert result.stdout == text and f"{engine} O_DIRECT" in result.stderr and "note:" not in result.stderr


@pytest.mark.parametrize(
    ("engine", "block", "stated", "reason"),
    [
        ("uring", 0, "silent", "opens files for direct I/O and then refuses direct reads"),
        ("pread", 0, "silent", "opens files for direct I/O and then refuses direct reads"),
        ("uring", 0, "0", "has no direct I/O for it"),
        ("pread", 1 << 20, "1048576", "its drive has blocks of 1,048,576 bytes"),
    ],
)
def test_no_direct_reads(
    shim: Path, demo_model: Path, text: str, engine: str, block: int, stated: str, reason: str
) -> None:
    result = choosy(shim, block, stated, "fomoe_io.cli.run", str(demo_model), *GENERATE, "--reader", engine)
    assert result.returncode == 0, result.stderr
    assert result.stdout == text and f"{engine}, page cache" in result.stderr
    assert f"note: {demo_model.parent}: " in result.stderr and reason in result.stderr


@pytest.mark.parametrize(("block", "stated"), [(16384, "16384"), (0, "silent")])
def test_a_store_there(shim: Path, demo_model: Path, text: str, tmp_path: Path, block: int, stated: str) -> None:
    """pack, mirror, verify and a run: where direct I/O does not do, the page cache does, and a note says why."""
    store, second = str(tmp_path / "store"), str(tmp_path / "second")
    for command in (["pack", str(demo_model), "--to", store], ["mirror", store, "--to", second]):
        done = choosy(shim, block, stated, "layout_tool.main", *command)
        assert done.returncode == 0, done.stderr
        assert ("units of 4,096 bytes, and the drive has blocks of 16,384" if block else "refuses") in done.stderr
    checked = choosy(shim, block, stated, "layout_tool.main", "verify", store, "--against", str(demo_model))
    assert checked.returncode == 0 and ("note:" in checked.stderr) == (not block), checked.stderr
    result = choosy(shim, block, stated, "fomoe_io.cli.run", store, *GENERATE)
    assert result.stdout == text, result.stderr


def test_measuring_there(shim: Path, demo_model: Path) -> None:
    def bench(block: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        stated = str(block) if block else "silent"
        return choosy(shim, block, stated, "fomoe_io.cli.bench_io", "--runtime", "100ms", "--time_based", *arguments)

    small = bench(16384, "--filename", str(demo_model), "--bs", "4k")
    assert small.returncode == 1 and "has blocks of 16,384 bytes" in small.stderr and "fix: --bs 16K" in small.stderr
    for what in (("--filename", str(demo_model), "--bs", "64k"), ("--store", str(demo_model))):
        for block, direct in ((16384, True), (0, False)):
            done = bench(block, *what, "--output-format", "json")
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)["jobs"][0]["fomoe"]
            assert found["direct"] == direct and len(found["notes"]) == (not direct)


@pytest.mark.parametrize("stated", [16384, 0])
def test_calibrating_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stated: int
) -> None:
    data = tmp_path / "data"
    data.write_bytes(bytes(40_000))
    monkeypatch.setattr(direct_io, "stated_block_bytes", lambda _: stated)
    monkeypatch.setattr(
        bench_io, "calibrate", lambda path, **options: calibrate(path, depths=(1, 2), seconds=0.02, **options)
    )
    assert bench_io.main(["--filename", str(data), "--calibrate", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["points"][0]["block_bytes"] == (stated or PAGE) and found["direct"] == bool(stated)
    assert ("this is the page cache, not the drive" in capsys.readouterr().err) == (not stated)


# ---- the pieces ----


@pytest.mark.parametrize("block", [4096, 16384, 65536])
def test_layouts_leave_room(demo_model: Path, block: int) -> None:
    """Extents are whole blocks that hold their parts, and slots hold their extents."""
    for layer in Store.open(demo_model).experts.values():
        layout = slot_layout(layer, block)
        for expert in range(layer.n_experts):
            extents = layout.extents[expert, : layout.extent_count[expert]]
            assert not (extents["offset"] % block).any() and not (extents["bytes"] % block).any()
            assert (extents["slot_offset"] + extents["bytes"] <= layout.slot_bytes).all()
            for part in range(3):
                place, (_, offset, size) = int(layout.part_offset[expert, part]), layer.extents[expert, part]
                holder = extents[extents["slot_offset"] <= place][-1]
                assert holder["offset"] + place - holder["slot_offset"] == offset
                assert offset + size <= holder["offset"] + holder["bytes"]


def test_the_kernel_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    with path.open("rb") as stream:
        for answer, expected in (((4, 16384), 16384), ((0, 0), 0), ((8192, 4096), 0)):
            monkeypatch.setattr(direct_io, "_statx_alignment", lambda _, answer=answer: answer)
            assert direct_io.stated_block_bytes(stream.fileno()) == expected
        monkeypatch.setattr(direct_io, "_statx_alignment", lambda _: None)
        monkeypatch.setattr(direct_io, "_logical_block_bytes", lambda _: 8192)
        assert direct_io.stated_block_bytes(stream.fileno()) == 8192
        opened = direct_io.open_direct(path, os.O_RDONLY)
        os.close(opened.descriptor)
        assert opened.block_bytes in (0, 8192)


def test_a_drives_error_is_left_to_the_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with closing(ReadFiles([path])) as files:
        if not files.direct:
            pytest.skip("no direct I/O on this file system")
    monkeypatch.setattr(direct_io.os, "preadv", broken)
    with closing(ReadFiles([path])) as files:
        assert files.direct and not files.notes


def test_a_file_that_answers_less_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools read on through the page cache; nothing is lost or doubled."""
    data = np.random.default_rng(4).integers(0, 256, 50_000, dtype=np.uint8)
    data.tofile(tmp_path / "file")
    original = os.preadv
    for most in (512, 5000, 12_000):
        with DirectFile(tmp_path / "file") as file, monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda fd, buffers, at, most=most: original(fd, [buffers[0][:most]], at))
            found = file.read(1000, 40_000, aligned_buffer(60_000))
            assert np.array_equal(found, data[1000:41_000])
            assert file.direct == (most > PAGE) or not file.reason.startswith("the file system answers")


@pytest.mark.parametrize("refusal", ["read", "write"])
def test_a_refusal_while_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    """An empty file proves nothing about direct I/O: the first refusal changes over."""
    call = {"read": "preadv", "write": "pwritev"}[refusal]
    original = getattr(os, call)
    with DirectFile(tmp_path / "file", 8 * PAGE) as file:
        if not file.direct:
            pytest.skip("no direct I/O on this file system")

        def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if file.direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(original(descriptor, buffers, offset))

        data = aligned_buffer(8 * PAGE)
        data[:] = 7
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            file.write(0, data)
            assert (file.read(0, 8 * PAGE, aligned_buffer(8 * PAGE)) == 7).all()
        assert not file.direct and f"refuses direct {refusal}s" in file.reason


def test_without_fallocate_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no fallocate the file gets its size, and no block is touched."""

    class LibC:
        code = errno.EOPNOTSUPP

        def fallocate64(self, *_: object) -> int:
            return -1

    monkeypatch.setattr("layout_tool.direct.ctypes.CDLL", lambda *_, **__: LibC())
    monkeypatch.setattr("layout_tool.direct.ctypes.get_errno", lambda: LibC.code)
    with DirectFile(tmp_path / "file", 1 << 20):
        status = (tmp_path / "file").stat()
        assert status.st_size == 1 << 20 and status.st_blocks < 64
    LibC.code = errno.ENOSPC
    with pytest.raises(StoreError, match="No space left"):
        DirectFile(tmp_path / "other", 1 << 20)


# ---- what messages say ----


@pytest.mark.parametrize("engine", ["uring", "pread"])
@pytest.mark.parametrize("end", [5 * PAGE, 5 * PAGE + 1000])
def test_a_cut_file_is_named_with_its_end(tmp_path: Path, engine: str, end: int) -> None:
    """Also within a page: there every direct read comes back short, for ever."""
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * PAGE))
    memory = aligned_memory(20 * PAGE)
    with open_reader([path], engine=engine) as opened:
        os.truncate(path, end)
        with pytest.raises(ReadError, match=rf"the file ends before, at byte {end:,} of {20 * PAGE:,}") as caught:
            opened.read_into([(0, 0, memory.address, 20 * PAGE)])
        assert "pack it again" in str(caught.value) and "drive" not in str(caught.value)


def test_a_cut_file_is_named_by_the_tools(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * PAGE))
    with DirectFile(path) as file:
        os.truncate(path, 5 * PAGE + 1000)
        with pytest.raises(ReadError, match=rf"at byte {5 * PAGE + 1000:,} of {20 * PAGE:,}"):
            file.read(0, 20 * PAGE, aligned_buffer(20 * PAGE))


@pytest.mark.parametrize("row", [0, 8000])
def test_cut_embeddings_are_named(demo_model: Path, tmp_path: Path, row: int) -> None:
    """Not as an expert of layer 0, whose reads have nothing to do with it."""
    path = Path(shutil.copy(demo_model, tmp_path))
    with Engine.open(path, EngineConfig(context_tokens=64, threads=1)) as engine:
        end = engine.store.resident["token_embd.weight"].offset + 10
        os.truncate(path, end)
        with pytest.raises(ReadError, match=rf"token embeddings from {path} failed: .* at byte {end:,} of") as caught:
            engine.session().decode(row)
        assert "expert" not in str(caught.value)


def test_causes_are_told_apart() -> None:
    found = {code: read_fault(code, 100, 100) for code in (*read_files._FAULTS, errno.ENODATA, errno.ENXIO)}
    assert len({fault.reason for fault in found.values()}) == len(found)
    assert "drive" in found[errno.EIO].reason and "smartctl" in found[errno.EIO].fix
    assert "refuses" in found[errno.EINVAL].reason and "ulimit -l" in found[errno.ENOMEM].fix
    assert all("smartctl" not in found[code].fix for code in (errno.EINVAL, errno.EAGAIN, errno.ENOMEM, errno.ENODATA))


def test_a_read_off_the_blocks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(direct_io, "stated_block_bytes", lambda _: 16384)
    memory = aligned_memory(16384)
    with open_reader([path], engine="pread") as opened:
        if not opened.direct:
            pytest.skip("no direct I/O on this file system")
        with pytest.raises(ReadError, match="no multiple of the drive's blocks of 16,384 bytes"):
            opened.read_into([(0, PAGE, memory.address, 16384)])


# ---- io_uring where no drive is behind the file ----


def test_a_ring_that_returns_wrong_bytes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_drive = Path("/dev/shm")
    if not memory_drive.is_dir() or os.major(memory_drive.stat().st_dev):
        pytest.skip("no file system without a drive here")
    path = memory_drive / f"fomoe-test-{os.getpid()}"
    path.write_bytes(os.urandom(3 << 20))
    try:
        open_reader([path], engine="uring").close()
        monkeypatch.setattr(reader, "_first_bytes", lambda *_: bytes(reader.TRIED_BYTES))
        with open_reader([path]) as opened:
            assert opened.name == "pread" and "returns wrong bytes" in opened.notes[0]
        with pytest.raises(UsageError, match="returns wrong bytes"):
            open_reader([path], engine="uring")
    finally:
        path.unlink()


# ---- the real ones ----

FUSE = """
import errno, os, sys
import mfusepy
class Through(mfusepy.Operations):
    use_ns = True
    def __init__(self, root, kind): self.root, self.kind = root, kind
    def getattr(self, path, fh=None):
        try: status = os.lstat(self.root + path)
        except OSError as error: raise mfusepy.FuseOSError(error.errno)
        return {name: getattr(status, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}
    def readdir(self, path, fh): return [".", "..", *os.listdir(self.root + path)]
    def open(self, path, flags): return os.open(self.root + path, flags & ~(os.O_DIRECT if self.kind == "short" else 0))
    def release(self, path, fh): os.close(fh); return 0
    def read(self, path, size, offset, fh):
        if self.kind == "short": size = min(size, 65536 - 512)
        try: return os.pread(fh, size, offset)
        except OSError as error: raise mfusepy.FuseOSError(error.errno)
kind = sys.argv[3]
mfusepy.FUSE(Through(sys.argv[1], kind), sys.argv[2], foreground=True, ro=True, direct_io=kind == "short")
"""


@contextmanager
def mounted(lower: Path, point: Path, kind: str) -> Iterator[Path]:
    """`lower` through FUSE: `refuse` gives direct reads an unaligned buffer, `short` answers 64 KiB - 512 at most."""
    point.mkdir()
    command = [sys.executable, "-c", FUSE, str(lower), str(point), kind]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if os.path.ismount(point) or server.poll() is not None:
                break
            time.sleep(0.05)
        if not os.path.ismount(point):
            pytest.skip("no FUSE here: it needs root, /dev/fuse, libfuse and package mfusepy")
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], capture_output=True)
        server.kill()
        server.wait()


@pytest.mark.parametrize("engine", ["auto", "pread"])
@pytest.mark.parametrize("kind", ["refuse", "short"])
def test_fuse(demo_model: Path, tmp_path: Path, kind: str, engine: str) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    shutil.copy(demo_model, lower)
    data = np.fromfile(demo_model, np.uint8)[: 8 << 20]
    memory = aligned_memory(len(data))
    with mounted(lower, tmp_path / "point", kind) as point, open_reader([point / demo_model.name], engine=engine) as r:
        assert r.direct == (kind == "short")
        r.read_into([(0, at, memory.address + at, 1 << 20) for at in range(0, len(data), 1 << 20)])
        assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
        assert (r.counters["short_reads"] > 0) == (kind == "short")
        assert any("refuses direct reads" in note for note in r.notes) == (kind == "refuse")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("losetup"), reason="needs root and losetup")
@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_a_device_with_larger_blocks(tmp_path: Path, engine: str) -> None:
    data = np.random.default_rng(6).integers(0, 256, 1 << 20, dtype=np.uint8)
    data.tofile(tmp_path / "backing")
    command = ["losetup", "--find", "--show", "-b", "16384", str(tmp_path / "backing")]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device with such blocks here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    memory = aligned_memory(len(data))
    try:
        with open_reader([device], engine=engine, sub_read_bytes=PAGE) as opened:
            assert opened.direct and opened.block_bytes == 16384 and opened.sub_read_bytes == 16384
            opened.read_into([(0, 0, memory.address, len(data))])
            assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
        with DirectFile(device) as file:
            assert np.array_equal(file.read(20_000, 50_000, aligned_buffer(100_000)), data[20_000:70_000])
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)
