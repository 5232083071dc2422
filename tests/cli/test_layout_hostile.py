"""fomoe-layout when things go wrong: killed, full, read-only, damaged.

Always one line and exit code 1, and nothing left that a later run would trust.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io.errors import StoreError, UsageError
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.calibration import Calibration, Point
from fomoe_io.storage.manifest import JOURNAL, MANIFEST, PAGE_BYTES
from fomoe_io.storage.store import Store
from layout_tool import pack as pack_module
from layout_tool import striping
from layout_tool import targets as target_tools
from layout_tool.direct import DirectFile
from layout_tool.main import main
from tests.model_files import EXPERTS, TYPES, write_model

ROOT = Path(__file__).resolve().parent.parent.parent
Capture = pytest.CaptureFixture[str]
REPORTS = re.compile(r"(note|continuing|pack  |verify  |index  |expert |tensor )")
"""Lines that say how a job went, beside its error."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "tiny.gguf", 61)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def packed(model: Path, tmp_path: Path, capsys: Capture) -> Path:
    assert main(["pack", str(model), "--to", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    return tmp_path / "store"


def refused(argv: list[str], capsys: Capture, expected: str) -> None:
    """The command ends with exit code 1 and one line that matches, with at most a fix after it."""
    capsys.readouterr()
    assert main(argv) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not REPORTS.match(line)]
    assert lines[0].startswith("fomoe-layout: ")
    assert re.search(expected, lines[0]), lines[0]
    assert len(lines) <= 2 and all(line.startswith("  fix: ") for line in lines[1:])
    assert "Traceback" not in err and out == ""


def assert_no_store(directory: Path) -> None:
    with pytest.raises(StoreError):
        Store.open(directory)
    assert not (directory / MANIFEST).exists()


def assert_equal_stores(a: Path, b: Path) -> None:
    """Same files with the same bytes; the manifests may name other directories."""
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
    for path in a.glob("*.bin"):
        assert path.read_bytes() == (b / path.name).read_bytes()
    bodies = [json.loads((directory / MANIFEST).read_text()) for directory in (a, b)]
    for body in bodies:
        del body["targets"], body["xxh3_64"]
    assert bodies[0] == bodies[1]


def one_thread_small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is a task of its own and is journalled at once."""
    monkeypatch.setattr("layout_tool.workers.THREADS", 1)
    monkeypatch.setattr("layout_tool.placement.runs.__defaults__", (1,))
    monkeypatch.setattr(pack_module, "SYNC_SECONDS", 0.0)


class Writes:
    """Counts writes of payload, and fails or stops at a given one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1, error: BaseException | None = None) -> None:
        self.bytes = self.count = 0
        original = DirectFile.write

        def write(file: DirectFile, offset: int, data: np.ndarray) -> None:
            if offset:
                if self.count == fail_at and error is not None:
                    raise error
                self.count += 1
                self.bytes += len(data)
            original(file, offset, data)

        monkeypatch.setattr(DirectFile, "write", write)


# ---- interrupted ----

KILLED = """
import sys, time
from layout_tool import pack, direct, workers, placement
from layout_tool.main import main
pack.SYNC_SECONDS = 0.0
workers.THREADS = 1
placement.runs.__defaults__ = (1,)
original = direct.DirectFile.write
def write(file, offset, data):
    time.sleep(0.02)
    original(file, offset, data)
direct.DirectFile.write = write
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("lines", [2, 9])
def test_kill_9_and_resume(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, lines: int
) -> None:
    command = ["pack", str(model), "--to", str(tmp_path / "killed")]
    journal = tmp_path / "killed" / JOURNAL
    process = subprocess.Popen([sys.executable, "-c", KILLED, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_no_store(tmp_path / "killed")
    refused(["inspect", str(tmp_path / "killed")], capsys, "unfinished store")
    refused(["verify", str(tmp_path / "killed")], capsys, "unfinished store")
    refused(["index", str(model), "--to", str(tmp_path / "killed")], capsys, "unfinished pack")

    done = journal.read_bytes().count(b"\n") - 1
    writes = Writes(monkeypatch)
    one_thread_small_runs(monkeypatch)
    assert main(command) == 0
    everything = len(TYPES) * EXPERTS + len(Store.open(packed).resident)
    assert writes.count == everything - done < everything  # what was journalled was not written again
    assert "continuing" in capsys.readouterr().err
    assert_equal_stores(packed, tmp_path / "killed")
    assert main(["verify", str(tmp_path / "killed"), "--against", str(model)]) == 0


def test_ctrl_c_and_resume(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["pack", str(model), "--to", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        one_thread_small_runs(patch)
        Writes(patch, 9, KeyboardInterrupt())
        assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert_no_store(tmp_path / "stopped")
    assert main(command) == 0
    assert_equal_stores(packed, tmp_path / "stopped")


@pytest.mark.parametrize("moment", ["rename", "metadata", "manifest", "journal"])
def test_a_death_while_publishing(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Death(BaseException):
        pass

    def die_at(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def dying(path: Path, *rest: Any, **options: Any) -> Any:
            if name in str(path):
                raise Death
            return original(path, *rest, **options)

        return dying

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", die_at("experts-00", Path.rename))
        elif moment == "journal":
            patch.setattr(Path, "unlink", die_at(JOURNAL, Path.unlink))
        else:
            patch.setattr(pack_module, "write_atomically", die_at(moment, pack_module.write_atomically))
        with pytest.raises(Death):
            main(["pack", str(model), "--to", str(tmp_path / "dead")])
    if moment != "journal":
        assert_no_store(tmp_path / "dead")
    writes = Writes(monkeypatch)
    assert main(["pack", str(model), "--to", str(tmp_path / "dead")]) == 0
    assert writes.count == 0  # all data was there
    assert_equal_stores(packed, tmp_path / "dead")


def interrupted(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An unfinished pack, and the command that made it."""
    command = ["pack", str(model), "--to", str(target)]
    with monkeypatch.context() as patch:
        one_thread_small_runs(patch)
        Writes(patch, 12, OSError(errno.EIO, "Input/output error"))
        assert main(command) == 1
    assert (target / JOURNAL).read_bytes().count(b"\n") == 13
    return command


def tear_last_line(target: Path) -> None:
    with (target / JOURNAL).open("r+b") as stream:
        stream.truncate((target / JOURNAL).stat().st_size - 7)


def nonsense_entry(target: Path) -> None:
    with (target / JOURNAL).open("ab") as stream:
        stream.write(b'{"layer":77,"experts":[999],"xxh3_64":["0"]}\n{"resident":5,"xxh3_64":null}\n{"x":1}\n')


def cut_data_file(target: Path) -> None:
    os.truncate(target / "experts-00.bin.part", PAGE_BYTES)


def remove_data_file(target: Path) -> None:
    (target / "resident.bin.part").unlink()


def foreign_data_file(target: Path) -> None:
    size = (target / "experts-00.bin.part").stat().st_size
    (target / "experts-00.bin.part").write_bytes(bytes(size))


@pytest.mark.parametrize("damage", [tear_last_line, nonsense_entry, cut_data_file, remove_data_file, foreign_data_file])
def test_a_damaged_unfinished_pack_is_mended(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    command = interrupted(model, tmp_path / "half", monkeypatch)
    damage(tmp_path / "half")
    assert main(command) == 0
    assert_equal_stores(packed, tmp_path / "half")
    assert main(["verify", str(tmp_path / "half"), "--against", str(model)]) == 0


def test_a_pack_that_lost_its_data_and_was_interrupted_again(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = interrupted(model, tmp_path / "half", monkeypatch)
    for path in (tmp_path / "half").glob("*.part"):
        path.unlink()
    with monkeypatch.context() as patch:
        one_thread_small_runs(patch)
        Writes(patch, 3, OSError(errno.EIO, "Input/output error"))
        assert main(command) == 1
    assert main(command) == 0
    assert_equal_stores(packed, tmp_path / "half")


def test_an_unfinished_pack_of_something_else_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = interrupted(model, tmp_path / "half", monkeypatch)
    write_model(tmp_path / "other.gguf", 62)
    other = ["pack", str(tmp_path / "other.gguf"), "--to", str(tmp_path / "half")]
    refused(other, capsys, "unfinished pack of another model")
    refused([*command, "--to", str(tmp_path / "second")], capsys, "unfinished pack of another model")
    assert main([*other, "--overwrite"]) == 0
    assert main(["verify", str(tmp_path / "half"), "--against", str(tmp_path / "other.gguf")]) == 0


def test_an_unfinished_pack_keeps_its_striping(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another measurement of the drives must not make another store of what is half there."""
    command = ["pack", str(model), "--to", str(tmp_path / "a"), "--to", str(tmp_path / "b")]
    with monkeypatch.context() as patch:
        one_thread_small_runs(patch)
        patch.setattr(striping, "stripe_weights", lambda *_, **__: (3, 1))
        Writes(patch, 12, OSError(errno.EIO, "Input/output error"))
        assert main(command) == 1
    monkeypatch.setattr(striping, "stripe_weights", lambda *_, **__: (1, 7))
    writes = Writes(monkeypatch)
    assert main(command) == 0
    assert 0 < writes.bytes < sum(path.stat().st_size for path in tmp_path.glob("[ab]/*.bin"))
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["weights"] == [3, 1]
    assert main(command) == 0  # nor does it make the finished store another one
    assert main(["verify", str(tmp_path / "a"), "--against", str(model)]) == 0


def test_drives_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rate, read_rate = target_tools.probe(tmp_path / "not" / "yet")
    assert write_rate > 0 and read_rate > 0
    assert list(tmp_path.iterdir()) == []
    mount(["-t", "tmpfs", "-o", "size=40M", "tmpfs"], tmp_path / "other")
    try:
        rates = {tmp_path / "one": (1e9, 2e9), tmp_path / "other": (1e9, 8e9)}
        monkeypatch.setattr(target_tools, "probe", lambda target, **_: rates[target])
        assert striping.stripe_weights(list(rates)) == (2, 8)
        assert striping.stripe_weights([tmp_path / "one", tmp_path / "two"]) == (1, 1)
        slow, fast = (
            Calibration(
                tuple(Point(size, depth, rate * depth * size, 1, 1, 1) for size in (1, 1 << 22) for depth in (1, 2)),
                "uring", True, {},
            )
            for rate in (1, 4)
        )  # fmt: skip
        assert striping.stripe_weights(list(rates), [fast, slow], 1 << 20) == (8, 2)
        with pytest.raises(UsageError, match="1 calibrations for 2 directories"):
            striping.stripe_weights(list(rates), [fast], 1 << 20)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "other")], check=True)


def test_two_packs_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    original = DirectFile.write
    codes: list[int] = []

    def write(file: DirectFile, offset: int, data: np.ndarray) -> None:
        if offset and not codes:
            codes.append(0)
            codes[0] = subprocess.run(
                [sys.executable, "-m", "layout_tool.main", "pack", str(model), "--to", str(tmp_path / "s")],
                cwd=ROOT,
                stderr=subprocess.PIPE,
            ).returncode
        original(file, offset, data)

    monkeypatch.setattr("layout_tool.workers.THREADS", 1)
    monkeypatch.setattr(DirectFile, "write", write)
    assert main(["pack", str(model), "--to", str(tmp_path / "s")]) == 0
    assert codes == [1]
    assert main(["verify", str(tmp_path / "s"), "--against", str(model)]) == 0


# ---- no room, no right ----


def test_free_space_is_checked_before_the_first_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(target_tools, "free_bytes", lambda path: 1_000_000)
    refused(["pack", str(model), "--to", str(tmp_path / "s")], capsys, r"needs .* MB, its drive has 1 MB free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_a_file_system_that_reports_no_free_space(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Some network and overlay file systems always say 0: the message names the flag, and the flag helps."""
    original = os.statvfs
    store, flag = str(tmp_path / "s"), "--ignore-free-space"

    def full(path: Any) -> os.statvfs_result:
        fields = list(original(path))
        fields[2] = fields[3] = fields[4] = 0  # blocks, free, available
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", full)
    assert main(["pack", str(model), "--to", store]) == 1
    message = capsys.readouterr().err
    assert "its drive has 0 B free" in message and flag in message and len(message.splitlines()) == 2
    assert main(["plan", str(model), "--to", store]) == 1
    assert flag in capsys.readouterr().out
    assert main(["plan", str(model), "--to", store, flag]) == 0
    assert main(["pack", str(model), "--to", store, flag]) == 0
    assert_equal_stores(packed, tmp_path / "s")
    refused(["mirror", store, "--to", str(tmp_path / "m")], capsys, "0 B free")
    assert main(["mirror", store, "--to", str(tmp_path / "m"), flag]) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_failing_write(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, code: int, at: int
) -> None:
    command = ["pack", str(model), "--to", str(tmp_path / "s")]
    original, calls = os.pwritev, []

    def pwritev(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > at + 2:  # after the headers of the two files
            raise OSError(code, os.strerror(code))
        return original(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr("layout_tool.placement.runs.__defaults__", (1,))
        patch.setattr(os, "pwritev", pwritev)
        refused(command, capsys, f"writing .* failed: {os.strerror(code)}")
    assert_no_store(tmp_path / "s")
    assert main(command) == 0
    assert_equal_stores(packed, tmp_path / "s")


def test_a_full_drive_while_the_manifest_is_written(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_atomically", full)
        refused(["pack", str(model), "--to", str(tmp_path / "s")], capsys, "No space left")
    assert_no_store(tmp_path / "s")
    assert main(["pack", str(model), "--to", str(tmp_path / "s")]) == 0
    assert_equal_stores(packed, tmp_path / "s")


def test_a_limit_on_file_sizes(model: Path, tmp_path: Path) -> None:
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    script += "from layout_tool.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "pack", str(model), "--to", str(tmp_path / "s")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert_no_store(tmp_path / "s")


def mount(arguments: list[str], place: Path) -> None:
    place.mkdir()
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MiB."""
    mount(["-t", "tmpfs", "-o", "size=6M", "tmpfs"], tmp_path / "small")
    yield tmp_path / "small"
    subprocess.run(["umount", "--lazy", str(tmp_path / "small")], check=True)


def test_a_drive_that_fills_up(
    model: Path, packed: Path, small_drive: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["pack", str(model), "--to", str(small_drive / "s")]
    refused(command, capsys, r"needs .* free")
    assert list(small_drive.iterdir()) == []
    with monkeypatch.context() as patch:  # something else fills the drive after the check
        patch.setattr(target_tools, "free_bytes", lambda path: 1 << 40)
        refused(command, capsys, "No space left")
    assert_no_store(small_drive / "s")
    subprocess.run(["mount", "-o", "remount,size=60M", str(small_drive)], check=True)
    assert main(command) == 0
    assert_equal_stores(packed, small_drive / "s")


def test_a_read_only_target(model: Path, tmp_path: Path, capsys: Capture) -> None:
    mount(["-t", "tmpfs", "-o", "ro", "tmpfs"], tmp_path / "frozen")
    try:
        for target in (tmp_path / "frozen", tmp_path / "frozen" / "deeper"):
            refused(["pack", str(model), "--to", str(target)], capsys, "read-only")
            refused(["index", str(model), "--to", str(target)], capsys, "read-only")
        Profile(9, {0: np.arange(EXPERTS) + 1}, "p").save(tmp_path / "p.json")
        command = ["profile", str(model), "--from", str(tmp_path / "p.json"), "-o", str(tmp_path / "frozen" / "p")]
        refused(command, capsys, "read-only")
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "frozen")], check=True)


def test_targets_that_cannot_be(model: Path, packed: Path, tmp_path: Path, capsys: Capture) -> None:
    refused(["pack", str(model), "--to", "/proc/store"], capsys, "/proc")
    refused(["pack", str(model), "--to", str(model)], capsys, "not a directory")
    refused(["pack", str(model), "--to", str(model / "below")], capsys, "Not a directory|not a directory")
    twice = [f"--to={packed}", f"--to={packed.parent / '.' / packed.name}"]
    refused(["pack", str(model), *twice], capsys, "given twice")
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "experts-00.bin").write_bytes(b"precious")
    refused(["pack", str(model), "--to", str(tmp_path / "stray")], capsys, r"already holds experts-00\.bin")
    assert (tmp_path / "stray" / "experts-00.bin").read_bytes() == b"precious"
    refused(["pack", str(model), "--to", str(tmp_path / "new"), "--to", str(packed)], capsys, "already holds")
    assert Store.open(packed).kind == "packed"


# ---- damaged input ----


def test_packing_a_truncated_model_leaves_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    whole = model.read_bytes()
    cut = tmp_path / "cut.gguf"
    for percent in range(0, 100, 9):
        cut.write_bytes(whole[: len(whole) * percent // 100])
        for command in (["pack", str(cut), "--to", str(tmp_path / "s")], ["plan", str(cut)], ["inspect", str(cut)]):
            refused(command, capsys, r"cut\.gguf")
        refused(["index", str(cut), "--to", str(tmp_path / "s")], capsys, r"cut\.gguf")
        assert not (tmp_path / "s").exists()


def test_a_model_cut_while_it_is_packed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    original = pack_module._Pack._copy

    def cut_and_copy(pack: Any, journal: Any) -> None:
        os.truncate(model, model.stat().st_size // 2)
        original(pack, journal)

    monkeypatch.setattr(pack_module._Pack, "_copy", cut_and_copy)
    refused(["pack", str(model), "--to", str(tmp_path / "s")], capsys, "was cut while in use")
    assert_no_store(tmp_path / "s")


def test_verify_finds_every_flipped_bit(model: Path, tmp_path: Path, capsys: Capture) -> None:
    to = [f"--to={tmp_path / 'a'}", f"--to={tmp_path / 'b'}"]
    assert main(["pack", str(model), *to]) == 0
    store = Store.open(tmp_path / "a")
    rng = np.random.default_rng(63)
    extents = np.concatenate([layer.extents.reshape(-1, 3) for layer in store.experts.values()]).tolist()
    extents += [[info.file, info.offset, info.bytes] for info in store.resident.values()]
    for number in rng.choice(len(extents), 25, replace=False):
        file, offset, size = extents[number]
        at = offset + int(rng.choice([0, size - 1, rng.integers(size)]))
        with store.paths[file].open("r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
            stream.flush()
            refused(["verify", str(tmp_path / "a")], capsys, "1 damaged")
            stream.seek(at)
            stream.write(bytes([byte]))
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_verify_names_what_is_damaged(model: Path, packed: Path, capsys: Capture) -> None:
    store = Store.open(packed)
    file, offset, size = store.experts[1].extents[4, 2].tolist()
    raw = bytearray(store.paths[file].read_bytes())
    raw[offset + size - 1] ^= 0x10
    store.paths[file].write_bytes(raw)
    capsys.readouterr()
    assert main(["verify", str(packed), "--against", str(model)]) == 1
    assert "expert 4 of layer 1" in capsys.readouterr().err


def test_a_source_that_gives_read_errors(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    original, calls = os.preadv, []

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 8:
            raise OSError(errno.EIO, "Input/output error")
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    refused(["pack", str(model), "--to", str(tmp_path / "s")], capsys, "reading .* failed: Input/output error")
    assert_no_store(tmp_path / "s")


def test_short_reads_and_writes_are_continued(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(64)
    preadv, pwritev = os.preadv, os.pwritev

    def part(buffers: Any) -> Any:
        pages = len(buffers[0]) // PAGE_BYTES
        return [buffers[0][: PAGE_BYTES * int(rng.integers(1, pages + 1))]] if pages > 1 else buffers

    monkeypatch.setattr("layout_tool.workers.THREADS", 1)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, part(buffers), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, part(buffers), at))
    assert main(["pack", str(model), "--to", str(tmp_path / "s")]) == 0
    assert main(["verify", str(tmp_path / "s"), "--against", str(model)]) == 0
    assert_equal_stores(packed, tmp_path / "s")


def test_without_direct_io(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    original = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    assert main(["pack", str(model), "--to", str(tmp_path / "s")]) == 0
    assert "no direct I/O" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "s"), "--against", str(model)]) == 0
    assert_equal_stores(packed, tmp_path / "s")


def test_stores_given_where_models_belong(model: Path, packed: Path, capsys: Capture, tmp_path: Path) -> None:
    refused(["pack", str(packed), "--to", str(tmp_path / "x")], capsys, "is a directory")
    refused(["verify", str(model)], capsys, "not a store directory")
    refused(["inspect", str(tmp_path / "absent")], capsys, "does not exist")
    refused(["verify", str(packed), "--against", str(packed)], capsys, "is a directory")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    refused(["inspect", str(text)], capsys, "not a GGUF")
