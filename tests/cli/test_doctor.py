"""fomoe-doctor, the system card and the calibration file."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Store, Tiers
from fomoe_io.cli import doctor
from fomoe_io.cli.bench import main as bench
from fomoe_io.errors import FormatError, ReadError
from fomoe_io.experts.slots import slot_layout
from fomoe_io.io_bench.calibrate import calibrate
from fomoe_io.io_bench.run import file_bytes
from fomoe_io.storage import reader as reader_module
from fomoe_io.storage.calibration import Calibration, Point
from fomoe_io.storage.read_files import read_fault
from fomoe_io.system import direct_io
from fomoe_io.system import system_card as card_module
from fomoe_io.system.system_card import Drive, drive_of, system_card
from layout_tool.main import main as layout

# ---- doctor ----


@pytest.mark.parametrize(
    ("release", "status"),
    [("5.4.0-1", "WARN"), ("5.15.0", "WARN"), ("5.19.1", "OK"), ("6.8.0-31-generic", "OK"), ("?", "WARN")],
)
def test_kernel(release: str, status: str) -> None:
    check = doctor.check_kernel(release)
    assert check.status == status and bool(check.fix) == (status != "OK")


def test_io_uring() -> None:
    forbidden = {"plain": "not permitted", "coop": "not permitted"}
    check = doctor.check_io_uring("2", forbidden)
    assert check.status == "WARN" and "sysctl -w kernel.io_uring_disabled=0" in check.fix
    assert "seccomp" in doctor.check_io_uring("0", forbidden).fix
    check = doctor.check_io_uring("0", {"plain": "", "coop": "", "iopoll": "Operation not supported"})
    assert check.status == "OK" and "coop is used" in check.found and "iopoll: Operation not supported" in check.found
    assert "plain is used" in doctor.check_io_uring("", {"plain": "", "coop": "Invalid argument"}).found


@pytest.mark.parametrize(
    ("problem", "words", "fix"),
    [
        ("Operation not permitted", "forbidden", "seccomp"),
        ("Cannot allocate memory", "no memory may be locked", "ulimit -l"),
        ("Invalid argument", "does not read files of this file system", "ext4 or xfs"),
        ("io_uring (coop) returns wrong bytes from x", "reads files of this file system wrongly", "ext4 or xfs"),
    ],
)
def test_why_io_uring_does_not_work(problem: str, words: str, fix: str) -> None:
    """A file system that refuses reads is no forbidden io_uring, and locked memory is neither."""
    check = doctor.check_io_uring("0", {"plain": problem, "coop": problem})
    assert check.status == "WARN" and words in check.found and fix in check.fix


def test_memory_is_no_drive() -> None:
    if drive_of("/dev/shm").file_system != "tmpfs":
        pytest.skip("no tmpfs here")
    with doctor.probe_file(Path("/dev/shm")) as path:
        check = doctor.check_direct(path)
    assert check.status == "WARN" and "tmpfs keeps files in memory" in check.found and "ext4" in check.fix


def test_a_file_system_that_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a root of its own the kernel's list of mounts does not name it: the sentence still ends."""
    monkeypatch.setattr(doctor, "drive_of", lambda _: Drive("x"))
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    assert not doctor.check_direct(path).found.endswith(" ")


def test_a_broken_drive_is_no_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))

    def fail(*_: object) -> None:
        fault = read_fault(errno.EIO, 1, 1)
        raise ReadError(fault.reason, hint=fault.fix)

    monkeypatch.setattr("fomoe_io.storage.reader.Reader.read_into", fail)
    check = doctor.check_direct(path)
    assert check.status == "FAIL" and "the drive can't read it" in check.found and "smartctl" in check.fix


def test_larger_blocks_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    monkeypatch.setattr(direct_io, "stated_block_bytes", lambda _: 16384)
    assert "in blocks of 16,384 bytes" in doctor.check_direct(path).found or doctor.check_direct(path).status != "OK"
    monkeypatch.setattr(direct_io, "stated_block_bytes", lambda _: 0)
    check = doctor.check_direct(path)
    assert check.status == "WARN" and "no direct I/O for it" in check.found


def test_memory_and_pages() -> None:
    assert doctor.check_locked_memory(resource.RLIM_INFINITY, True, "").status == "OK"
    check = doctor.check_locked_memory(8 << 20, False, "too small")
    assert check.status == "WARN" and "too small" in check.found and "limits.d" in check.fix
    assert doctor.check_huge_pages("always [madvise] never").status == "OK"
    assert doctor.check_huge_pages("always madvise [never]").status == "WARN"
    assert doctor.check_huge_pages("").status == "WARN"


@pytest.mark.parametrize(
    ("drive", "status", "words"),
    [
        (Drive("x", "ext4", device="nvme0n1", scheduler="none", link="a", link_limit="a"), "OK", ""),
        (Drive("x", "ext4", device="nvme0n1", scheduler="bfq"), "WARN", "scheduler"),
        (Drive("x", "ext4", device="nvme0n1", scheduler="none", link="a", link_limit="b"), "WARN", "slot"),
        (Drive("x", "ext4", device="sda", rotational=True), "WARN", "NVMe"),
        (Drive("x", "ext4", device="vda", rotational=True), "OK", ""),
        (Drive("x", "xfs", device="loop0", rotational=True), "OK", ""),
        (Drive("x"), "OK", ""),
    ],
)
def test_drive(monkeypatch: pytest.MonkeyPatch, drive: Drive, status: str, words: str) -> None:
    monkeypatch.setattr(doctor, "drive_of", lambda _: drive)
    check = doctor.check_drive(Path("x"))
    assert check.status == status and words in check.fix


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("kernel", "io_uring", "O_DIRECT", "drive", "huge pages", "libraries"):
        assert name in out
    assert list(tmp_path.iterdir()) == []
    assert doctor.main([str(tmp_path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    names = {check["name"]: check["status"] for check in value["checks"]}
    assert names["O_DIRECT"] in ("OK", "WARN") and value["system"]["drives"]


def test_no_locked_memory_names_its_fix() -> None:
    """Without any, io_uring itself is refused: that there is nothing to register for is no reason to be content."""
    for limit in (0, 64 << 10):
        check = doctor.check_locked_memory(limit, False, "")
        assert check.status == "WARN" and "too little for io_uring" in check.found and "limits.d" in check.fix
    assert doctor.check_locked_memory(resource.RLIM_INFINITY, False, "").status == "OK"


def test_a_run_without_locked_memory_says_what_mends_it(demo_model: Path) -> None:
    if not shutil.which("setpriv") or not shutil.which("prlimit"):
        pytest.skip("no setpriv here")
    command = ["setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=0:0", sys.executable, "-c",
        "import sys; from fomoe_io.storage.reader import open_reader as o; print(o([sys.argv[1]]).notes)"]  # fmt: skip
    done = subprocess.run([*command, str(demo_model)], capture_output=True, text=True)
    if done.returncode or "io_uring" not in done.stdout:
        pytest.skip("this kernel locks no memory for io_uring")
    assert "ulimit -l unlimited" in done.stdout


def test_the_model_at_hand(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF, a store, one that does not run, one that does not fit."""
    found = {check.name: check for check in doctor.examine(demo_model)}
    assert (
        found["model"].status == "OK"
        and "of its experts" in found["model"].found
        and "fomoe plan" in found["model"].found
    )
    assert layout(["pack", str(demo_model), "--to", str(tmp_path / "s")]) == 0
    before = sorted((tmp_path / "s").iterdir())
    found = {check.name: check for check in doctor.examine(tmp_path / "s")}
    assert found["model"].status == "OK" and "packed" in found["model"].found
    assert sorted((tmp_path / "s").iterdir()) == before
    monkeypatch.setattr(doctor.memory, "available_bytes", lambda: 50 << 20)
    check = doctor.check_model(demo_model, Store.open(demo_model))
    assert check.status == "FAIL" and "are available" in check.found and "-c 1024" in check.fix
    (tmp_path / "cut.gguf").write_bytes(demo_model.read_bytes()[:5000])
    found = {check.name: check for check in doctor.examine(tmp_path / "cut.gguf")}
    assert found["model"].status == "FAIL" and "cut" in found["model"].found
    assert doctor.main([str(tmp_path / "cut.gguf")]) == 1


def test_a_drive_that_fails_is_no_fault_of_io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    submit = reader_module._Table.from_address

    class Failing:
        """Every read completes with EIO."""

        def __init__(self, address: int) -> None:
            self._table = submit(address)
            self.self = self._table.self

        def submit(self, *_: object) -> int:
            return -errno.EIO

        def reap(self, *_: object) -> int:
            raise AssertionError("nothing is in flight")

    monkeypatch.setattr(reader_module._Table, "from_address", Failing)
    modes = {mode: problem for mode, problem in reader_module.probe_modes(path).items() if mode in ("plain", "coop")}
    check = doctor.check_io_uring("0", modes)
    assert check.status == "OK" and "plain" in check.found


def test_a_failure_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "check_direct", lambda _: doctor.Check("O_DIRECT", "FAIL", "broken", "mend it"))
    assert doctor.main([str(tmp_path)]) == 1
    assert "FAIL O_DIRECT" in capsys.readouterr().out


def test_nothing_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main([str(tmp_path / "nothing")]) == 1
    assert "neither a directory nor a file" in capsys.readouterr().err


# ---- the card ----


def test_an_nvme_drive_in_sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A partition leads to its drive, the drive to its controller's link."""
    controller = tmp_path / "devices/pci0000:00/0000:01:00.0/nvme/nvme0"
    drive = controller / "nvme0n1"
    files = {
        controller.parent.parent / "current_link_speed": "16.0 GT/s PCIe",
        controller.parent.parent / "current_link_width": "4",
        controller.parent.parent / "max_link_speed": "32.0 GT/s PCIe",
        controller.parent.parent / "max_link_width": "4",
        controller / "model": "Fast Drive 9000 ",
        drive / "size": "2000000",
        drive / "queue/scheduler": "[none] mq-deadline",
        drive / "queue/rotational": "0",
        drive / "queue/io_poll": "1",
        drive / "nvme0n1p2/partition": "2",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (drive / "device").symlink_to(controller)
    number = tmp_path.stat().st_dev
    block = tmp_path / "dev/block"
    block.mkdir(parents=True)
    (block / f"{os.major(number)}:{os.minor(number)}").symlink_to(drive / "nvme0n1p2")
    monkeypatch.setattr(card_module, "SYSFS", tmp_path)
    found = drive_of(tmp_path)
    assert (found.device, found.model, found.scheduler) == ("nvme0n1", "Fast Drive 9000", "none")
    assert (found.link, found.link_limit) == ("PCIe 16.0 GT/s x4", "PCIe 32.0 GT/s x4")
    assert (found.size_bytes, found.rotational, found.polled) == (1_024_000_000, False, True)
    assert "Fast Drive 9000, nvme0n1, PCIe 16.0 GT/s x4" in found.describe()


def test_the_card(tmp_path: Path) -> None:
    card = system_card([tmp_path, tmp_path])
    assert len(card["drives"]) == 1 and card["drives"][0]["file_system"]
    assert card["memory_bytes"] > 1 << 28 and card["processor"]
    json.dumps(card)


# ---- calibration ----


def made_up(rate: dict[tuple[int, int], float]) -> Calibration:
    points = tuple(Point(size, depth, value, 1, 2, 3) for (size, depth), value in rate.items())
    return Calibration(points, "uring", True, {"kernel": "x"})


def test_interpolation() -> None:
    c = made_up({(1 << 12, 1): 1e8, (1 << 12, 16): 4e8, (1 << 20, 1): 1e9, (1 << 20, 16): 4e9})
    assert c.bytes_per_second(1 << 12, 1) == pytest.approx(1e8)
    assert c.bytes_per_second(1 << 20, 4) == pytest.approx(2e9)  # half way on both logarithmic scales
    assert c.bytes_per_second(1 << 16, 1) == pytest.approx(10**8.5)
    assert c.bytes_per_second(1, 1) == pytest.approx(1e8) and c.bytes_per_second(1 << 30, 99) == pytest.approx(4e9)
    assert c.read_seconds(1 << 20, 4) == pytest.approx((4 << 20) / 2e9)


def test_sub_reads() -> None:
    """Cut records where depth pays, and not where it does not."""
    sizes = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
    pays = made_up(
        {
            (size, depth): min(8e9, 1e9 * depth**0.9 * (size / (4 << 20)) ** 0.3)
            for size in sizes
            for depth in (1, 4, 16)
        }
    )
    chosen = pays.sub_read_bytes(4 << 20)
    assert chosen in sizes[:3] and pays.read_seconds(4 << 20, 1, chosen) < pays.read_seconds(4 << 20)
    flat = made_up({(size, depth): 2e9 for size in sizes for depth in (1, 4, 16)})
    assert flat.sub_read_bytes(4 << 20) == 0
    assert pays.sub_read_bytes(32 << 10) == 0


def test_depth() -> None:
    """As deep as bandwidth asks for, no deeper, and room for all pieces of one record."""
    rates = {1: 1e9, 4: 3e9, 8: 5.8e9, 16: 6e9, 32: 5.9e9}
    c = made_up({(size, depth): rate for size in (1 << 20, 4 << 20) for depth, rate in rates.items()})
    assert c.depth(4 << 20) == 8 and c.best_bytes_per_second(4 << 20) == pytest.approx(5.8e9)
    assert c.reads(16 << 20) == (16, 1 << 20)  # deeper than bandwidth asks for: all pieces at once
    shallow = made_up({(size, depth): 2e9 * min(depth, 4) for size in (64 << 10, 8 << 20) for depth in (1, 4)})
    assert shallow.reads(8 << 20) == (128, 64 << 10)


def test_the_engine_reads_as_calibrated(demo_model: Path, tmp_path: Path) -> None:
    """Sub-reads and depth of the file are used, and change nothing but the reads."""
    sizes = (4 << 10, 64 << 10, 1 << 20)
    made_up({(size, depth): 1e8 * depth for size in sizes for depth in (1, 4)}).save(tmp_path / "c.json")

    def logits(**options: object) -> tuple[bytes, dict[str, int]]:
        config = EngineConfig(context_tokens=32, threads=1, tiers=Tiers(0, 0.2), **options)  # type: ignore[arg-type]
        with Engine.open(demo_model, config) as engine:
            found = engine.session().evaluate(np.arange(50, 60)).tobytes()
            return found, {**engine.statistics()["reader"], **engine.reader.counters}

    plain, before = logits()
    cut, after = logits(calibration=str(tmp_path / "c.json"))
    assert cut == plain
    assert (before["depth"], before["sub_read_bytes"]) == (64, 0)
    largest = max(int(slot_layout(layer).extents["bytes"].max()) for layer in Store.open(demo_model).experts.values())
    depth, sub_read = Calibration.load(tmp_path / "c.json").reads(largest)
    assert (after["depth"], after["sub_read_bytes"]) == (depth, sub_read)
    if sub_read:
        assert after["sub_reads"] > before["sub_reads"]
    assert logits(calibration=str(tmp_path / "c.json"), ring_depth=3)[1]["depth"] == 3
    with pytest.raises(FormatError, match="is no calibration file"):
        logits(calibration=str(demo_model))


def test_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    original = made_up({(4096, 1): 1e8, (4096, 4): 2e8})
    original.save(path)
    assert Calibration.load(path) == original
    good = json.loads(path.read_text())
    for change in ({"format": "x"}, {"version": 2}, {"points": []}, {"points": [{"block_bytes": 1}]}, {"system": 3}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(FormatError, match="is no calibration file"):
            Calibration.load(path)
    for point in (
        {"bytes_per_second": 0}, {"bytes_per_second": 1e300}, {"depth": "4"}, {"depth": True}, {"depth": 10**9},
        {"block_bytes": 4096.0}, {"block_bytes": 1 << 40}, {"p50_us": float("inf")}, {"p99_us": 10**400},
    ):  # fmt: skip
        path.write_text(json.dumps({**good, "points": [{**good["points"][0], **point}]}))
        with pytest.raises(FormatError):
            Calibration.load(path)
    path.write_text(json.dumps({**good, "points": [*good["points"], {**good["points"][0], "block_bytes": 8192}]}))
    with pytest.raises(FormatError, match="measurements are missing"):
        Calibration.load(path)
    for damaged in (b"\x00\x01", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            Calibration.load(path)


def test_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tofile(data)
    found = calibrate(data, sizes=(4096, 1 << 16, 1 << 20), depths=(1, 2), seconds=0.02)
    assert [(p.block_bytes, p.depth) for p in found.points] == [(4096, 1), (4096, 2), (1 << 16, 1), (1 << 16, 2)]
    assert all(p.bytes_per_second > 0 and p.p99_us >= p.p50_us > 0 for p in found.points)
    monkeypatch.setattr("fomoe_io.cli.bench_io.calibrate", lambda path, **_: found)
    assert bench(["io", "--filename", str(data), "--calibrate", str(tmp_path / "c.json")]) == 0
    assert "64 KiB x QD   2" in capsys.readouterr().out
    assert Calibration.load(tmp_path / "c.json") == found


def test_nothing_to_measure_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"x" * 4095)
    for path, size in ((data, "4,095"), (Path("/dev/null"), "0")):
        assert bench(["io", "--filename", str(path), "--calibrate", str(tmp_path / "c.json")]) == 1
        error = capsys.readouterr().err
        assert f"{path} has {size} bytes" in error and "fix: " in error and len(error.splitlines()) == 2
    assert not (tmp_path / "c.json").exists()


def test_a_block_device_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its st_size is 0: what counts is where its end lies."""
    data = tmp_path / "device"
    data.write_bytes(bytes(20_000))
    assert file_bytes(data) == 20_000
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(Path, "stat", lambda path, **_: os.stat_result((stat.S_IFBLK, *[0] * 9)))
    assert file_bytes(data) == 20_000
    monkeypatch.setattr("fomoe_io.io_bench.calibrate.system_card", lambda _: {})
    found = calibrate(data, sizes=(4096, 1 << 20), depths=(1,), seconds=0.02, engine="pread")
    assert [point.block_bytes for point in found.points] == [4096]
