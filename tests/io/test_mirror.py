"""fomoe-layout mirror: two copies of a store, of which one is enough."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cli.bench import main as bench
from fomoe_io.errors import ReadError
from fomoe_io.storage.manifest import MANIFEST
from fomoe_io.storage.reader import aligned_memory, open_reader
from fomoe_io.storage.store import Store
from layout_tool.main import main
from tests.model_files import write_model

Capture = pytest.CaptureFixture[str]
NAMES = ("resident.bin", "experts-00.bin", "experts-01.bin")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Striped over `a` and `b`, mirrored in `m`."""
    write_model(tmp_path / "tiny.gguf", 71)
    targets = [argument for name in "ab" for argument in ("--to", str(tmp_path / name))]
    assert main(["pack", str(tmp_path / "tiny.gguf"), *targets]) == 0
    assert main(["mirror", str(tmp_path / "a"), "--to", str(tmp_path / "m")]) == 0
    return tmp_path / "a"


def refused(command: list[str], capsys: Capture, words: str) -> None:
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_mirror_holds_the_same_bytes(store: Path, tmp_path: Path, capsys: Capture) -> None:
    opened = Store.open(store)
    assert opened.mirrors == [tmp_path / "m" / name for name in NAMES] and not opened.lost_copies
    for path, mirror in zip(opened.paths, opened.mirrors, strict=True):
        assert mirror is not None and mirror.read_bytes() == path.read_bytes()
    paths, other = opened.copies()
    assert len(paths) == 6 and all(paths[other[i]].name == paths[i].name and other[other[i]] == i for i in range(6))
    before = (tmp_path / "m" / NAMES[1]).stat().st_mtime_ns
    assert main(["mirror", str(store), "--to", str(tmp_path / "m")]) == 0  # again: nothing to do
    assert (tmp_path / "m" / NAMES[1]).stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(["verify", str(store)]) == 0
    assert capsys.readouterr().err.count("all good") == 2
    assert main(["inspect", str(store)]) == 0
    assert str(tmp_path / "m" / "experts-01.bin") in capsys.readouterr().out
    assert bench(["io", "--store", str(store), "--size", "64k"]) == 0


def damage(change: Callable[[Path], object], *names: str) -> Callable[[Path], list[Path]]:
    def apply(root: Path) -> list[Path]:
        for name in names:
            change(root / name)
        return [root / name for name in names]

    return apply


@pytest.mark.parametrize(
    "hurt",
    [
        damage(Path.unlink, "m/experts-00.bin"),
        damage(Path.unlink, "b/experts-01.bin", "m/resident.bin"),
        damage(lambda path: path.write_bytes(b"x" * path.stat().st_size), "a/experts-00.bin"),
        damage(lambda path: path.write_bytes(b""), "m/experts-01.bin"),
        damage(shutil.rmtree, "m"),
    ],
)
def test_one_copy_is_enough(store: Path, tmp_path: Path, capsys: Capture, hurt: Callable[[Path], list[Path]]) -> None:
    """A drive that is not there, another store's file, a cut one: the other copy is the store, and that is said."""
    places = hurt(tmp_path)
    opened = Store.open(store)
    lost = [path for path in places if path.suffix] or [tmp_path / "m" / name for name in NAMES]
    assert len(opened.lost_copies) == len(lost)
    assert all(any(str(path) in problem for problem in opened.lost_copies) for path in lost)
    assert not set(lost) & {*opened.paths, *opened.mirrors} and len(opened.paths) == 3
    refused(["verify", str(store)], capsys, opened.lost_copies[0])


def test_both_copies_lost(store: Path, tmp_path: Path, capsys: Capture) -> None:
    for folder in "bm":
        (tmp_path / folder / "experts-01.bin").unlink()
    refused(["inspect", str(store)], capsys, f"{tmp_path / 'b' / 'experts-01.bin'}, a part of the store, is missing")


def test_damage_of_the_mirror_alone_is_found(store: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "m" / "experts-00.bin"
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(bytes(8))
    refused(["verify", str(store)], capsys, f"in {path} at ")


def test_what_is_refused(store: Path, tmp_path: Path, capsys: Capture) -> None:
    before = (store / MANIFEST).read_bytes()
    refused(["mirror", str(store), "--to", str(tmp_path / "b")], capsys, "holds the store itself")
    write_model(tmp_path / "other.gguf", 72)
    assert main(["pack", str(tmp_path / "other.gguf"), "--to", str(tmp_path / "o")]) == 0
    refused(["mirror", str(store), "--to", str(tmp_path / "o")], capsys, "belongs to another store")
    assert main(["index", str(tmp_path / "other.gguf"), "--to", str(tmp_path / "i")]) == 0
    refused(["mirror", str(tmp_path / "i"), "--to", str(tmp_path / "x")], capsys, "points into a GGUF")
    assert (store / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_a_file_that_dies_while_it_is_read(tmp_path: Path, engine: str) -> None:
    """Cut under a running reader: every byte comes from the other copy; without one it is an error."""
    data = np.random.default_rng(5).integers(0, 256, 1 << 20, dtype=np.uint8)
    copies = [tmp_path / "one", tmp_path / "two"]
    for path in copies:
        data.tofile(path)
    memory = aligned_memory(len(data))
    requests = [(0, i * 4096, memory.address + i * 4096, 4096) for i in range(256)]
    with open_reader(copies, engine=engine, depth=8, mirrors={0: 1, 1: 0}, sub_read_bytes=8192) as reader:
        with copies[0].open("r+b") as stream:
            stream.truncate(4096)
        reader.read_into(requests)
        reader.read_into([(0, 0, memory.address, len(data))])
        assert reader.counters["failovers"] > 0
    assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
    with open_reader(copies[1:], engine=engine) as reader:
        with copies[1].open("r+b") as stream:
            stream.truncate(4096)
        with pytest.raises(ReadError, match=r"two at offset \d+: the file ends before"):
            reader.read_into(requests)


def test_the_engine_goes_on_without_a_file(demo_model: Path, tmp_path: Path) -> None:
    """Experts of a file that is cut while the engine runs come from the mirror; the logits are the same."""
    assert main(["pack", str(demo_model), "--to", str(tmp_path / "store")]) == 0
    assert main(["mirror", str(tmp_path / "store"), "--to", str(tmp_path / "second")]) == 0
    config = EngineConfig(context_tokens=64, threads=1, tiers=Tiers(0, 0.125))

    def logits(change: Callable[[], object]) -> tuple[bytes, int]:
        with Engine.open(tmp_path / "store", config) as engine:
            change()
            found = engine.session().evaluate(np.arange(100, 120)).tobytes()
            return found, engine.statistics()["reader"]["failovers"]

    expected, none = logits(lambda: None)
    records = tmp_path / "store" / "experts-00.bin"
    assert none == 0
    # half of it stays: with as little to do as its mirror, the first copy is asked first
    found, failovers = logits(lambda: records.write_bytes(records.read_bytes()[: records.stat().st_size // 2]))
    assert found == expected and failovers > 0


def test_the_error_names_expert_file_and_offset(demo_model: Path, tmp_path: Path) -> None:
    """Without a mirror, an expert that can't be read ends the answer, and says which one it was."""
    assert main(["pack", str(demo_model), "--to", str(tmp_path)]) == 0
    records = tmp_path / "experts-00.bin"
    config = EngineConfig(context_tokens=64, threads=1, tiers=Tiers(0, 0.125))
    with Engine.open(tmp_path, config) as engine:
        records.write_bytes(records.read_bytes()[:8192])
        with pytest.raises(ReadError, match=rf"expert \d+ of layer \d+ failed: {records} at offset \d+: the file ends"):
            engine.session().evaluate(np.arange(100, 120))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("losetup"), reason="needs root and losetup")
@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_a_block_device_with_bad_sectors(tmp_path: Path, engine: str) -> None:
    """The kernel's own EIO: sectors of a loop device whose file has been cut.  Good ones are read; a mirror helps."""
    data = np.random.default_rng(6).integers(0, 256, 1 << 20, dtype=np.uint8)
    backing, copy = tmp_path / "backing", tmp_path / "copy"
    for path in (backing, copy):
        data.tofile(path)
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device, half = Path(made.stdout.strip()), len(data) // 2
    memory = aligned_memory(len(data))
    found = np.frombuffer(memory.view, np.uint8)
    pages = [(0, i * 4096, memory.address + i * 4096, 4096) for i in range(256)]
    try:
        with backing.open("r+b") as stream:
            stream.truncate(half)
        with open_reader([device], engine=engine, depth=4) as reader:
            reader.read_into(pages[:128])
            assert np.array_equal(found[:half], data[:half])
            with pytest.raises(ReadError, match=rf"{device} at offset {200 * 4096}: Input/output error"):
                reader.read_into(pages[200:201])
        with open_reader([device, copy], engine=engine, depth=4, mirrors={0: 1}) as reader:
            reader.read_into(pages)
            assert np.array_equal(found, data) and reader.counters["failovers"] > 0
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_all_reads_of_a_drive_move_to_another(tmp_path: Path, engine: str) -> None:
    """A drive that fails at once fills the other's queue: what still waits behind it is read, too."""
    other_drive = Path("/dev/shm")
    if not other_drive.is_dir() or other_drive.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    data = np.random.default_rng(9).integers(0, 256, 1 << 20, dtype=np.uint8)
    dying, copy = other_drive / f"fomoe-test-{os.getpid()}", tmp_path / "copy"
    memory = aligned_memory(len(data))
    try:
        for path in (dying, copy):
            data.tofile(path)
        with open_reader([dying, copy], engine=engine, depth=2, mirrors={0: 1}) as reader:
            assert reader.drives == 2
            with dying.open("r+b") as stream:
                stream.truncate(0)
            reader.read_into([(0, i * 4096, memory.address + i * 4096, 4096) for i in range(256)])
            assert reader.counters["failovers"] > 0
    finally:
        dying.unlink(missing_ok=True)
    assert np.array_equal(np.frombuffer(memory.view, np.uint8), data)
