"""fomoe-bench io: what it reads, what it counts, what it prints, and what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import lzma
import os
import shutil
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io._io_load import LATENCY_BINS, PLAN, Load
from fomoe_io.cli.bench import main as bench
from fomoe_io.errors import FormatError, UsageError
from fomoe_io.io_bench import peers as io_peers
from fomoe_io.io_bench.job import IOJob, IOResult, Share, Spans, bin_ns
from fomoe_io.io_bench.job_file import read_job_file
from fomoe_io.io_bench.plan import block_plan, random_picks, read_trace, record_plan
from fomoe_io.io_bench.report import depth_shares
from fomoe_io.io_bench.run import _plan, run_jobs
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.read_files import ReadFiles
from fomoe_io.storage.reader import aligned_memory, open_reader
from fomoe_io.storage.store import Store

PAGE = 4096
PAGES = 300


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "data"
    np.random.default_rng(1).integers(0, 256, PAGES * PAGE + 77, dtype=np.uint8).tofile(path)
    return path


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert bench(["io", "--output-format", "json", *arguments]) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


# ---- plans ----


def test_random_blocks_cover_the_file_once() -> None:
    plan = block_plan([10 * PAGE, 7 * PAGE + 100], PAGE, random=True, seed=3)
    places = list(zip(plan["file"].tolist(), plan["offset"].tolist(), strict=True))
    assert sorted(places) == [(0, i * PAGE) for i in range(10)] + [(1, i * PAGE) for i in range(7)]
    assert places != sorted(places)
    assert np.array_equal(plan, block_plan([10 * PAGE, 7 * PAGE + 100], PAGE, random=True, seed=3))
    assert not np.array_equal(plan, block_plan([10 * PAGE, 7 * PAGE + 100], PAGE, random=True, seed=4))
    ordered = block_plan([10 * PAGE, 7 * PAGE + 100], PAGE, random=False, seed=3)
    assert sorted(places) == list(zip(ordered["file"].tolist(), ordered["offset"].tolist(), strict=True))
    with pytest.raises(UsageError, match="does not fit"):
        block_plan([100], PAGE, random=True, seed=1)


def test_records_of_a_store(demo_model: Path) -> None:
    """Each pick brings in exactly the pages that hold the expert's three matrices."""
    store = Store.open(demo_model)
    picks = random_picks(store.experts, 5)
    assert len({layer for layer, _ in picks}) == len(store.experts)
    plan = record_plan(store, picks[:50])
    covered = {
        (int(p["file"]), page) for p in plan for page in range(p["offset"] // PAGE, (p["offset"] + p["bytes"]) // PAGE)
    }
    needed = set()
    for layer, expert in picks[:50]:
        for number, offset, size in store.experts[layer].extents[expert].tolist():
            needed |= {(number, page) for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1)}
    assert covered == needed
    assert (plan["offset"] % PAGE == 0).all() and (plan["bytes"] % PAGE == 0).all()
    with pytest.raises(UsageError, match="picks expert 9999 of layer 0"):
        record_plan(store, [(0, 9999)])


def test_traces(tmp_path: Path) -> None:
    text = "# made up\nstep,layer,expert\n0,0,5\n0,1,3\n1,0,2\n"
    plain, packed = tmp_path / "t.csv", tmp_path / "t.csv.xz"
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed) == [(0, 5), (1, 3), (0, 2)]
    for bad in (
        "",
        "layer,expert\n",
        "a,b\n1,2\n",
        "layer,expert\n1\n",
        "layer,expert\n1,x\n",
        "layer,expert\n" + "1" * 200_000 + "\n",
    ):
        plain.write_text(bad)
        with pytest.raises(FormatError):
            read_trace(plain)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(FormatError, match="is no routing trace"):
        read_trace(packed)


# ---- counting ----


def test_latency_bins() -> None:
    """The bins of C and of the peer's loop are one; their middles are within 1 % of every value in them."""
    random = np.random.default_rng(2)
    values = [int(v) for v in np.exp(random.uniform(0, np.log(2.0**50), 2000))] + list(range(200))
    for value in values:
        index = io_peers._bin(value)
        assert 0 <= index < LATENCY_BINS
        assert abs(bin_ns(index) - value) <= max(0.5, 0.01 * value)


def test_percentiles() -> None:
    random = np.random.default_rng(4)
    times = np.exp(random.normal(12, 1, 5000)).astype(int)
    bins = np.bincount([io_peers._bin(int(t)) for t in times], minlength=LATENCY_BINS)
    result = IOResult(IOJob(filenames=(Path("x"),)), "uring", "coop", True, True, latency_bins=bins)
    result.completion = Spans(most=float(times.max()))
    for percent in (1, 50, 90, 99, 99.9):
        assert result.percentile_ns(percent) == pytest.approx(
            np.percentile(times, percent, method="inverted_cdf"), rel=0.01
        )


def test_depth_levels() -> None:
    in_flight = np.zeros(101, np.int64)
    in_flight[[1, 2, 3, 4, 32, 33, 64, 100]] = [10, 10, 5, 5, 20, 30, 10, 10]
    assert depth_shares(in_flight) == {"1": 10, "2": 10, "4": 10, "8": 0, "16": 0, "32": 20, ">=64": 50}


# ---- running ----


@pytest.mark.parametrize("engine", ["auto", "uring", "pread", "mmap", "python-liburing"])
def test_one_pass_reads_everything_once(capsys: pytest.CaptureFixture[str], file: Path, engine: str) -> None:
    if engine == "python-liburing" and not importlib.util.find_spec("liburing"):
        pytest.skip("package liburing is not installed")
    value = results(capsys, "--filename", str(file), "--engine", engine, "--iodepth", "8", "--bs", "4k")
    job = value["jobs"][0]
    assert job["read"]["total_ios"] == PAGES and job["read"]["io_bytes"] == PAGES * PAGE
    assert sum(job["fomoe"]["in_flight"]) == PAGES and job["fomoe"]["in_flight"][8] > 0
    latency = job["read"]["clat_ns"]
    assert (
        0 < latency["min"] <= latency["percentile"]["50.000000"] <= latency["percentile"]["99.900000"] <= latency["max"]
    )
    assert latency["N"] == PAGES and latency["min"] <= latency["mean"] <= latency["max"]
    assert job["read"]["iops"] > 0 and job["fomoe"]["cpu_us_per_read"] > 0
    assert job["fomoe"]["direct"] == (engine != "mmap")


def test_size_time_and_threads(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    two = results(capsys, "--filename", str(file), "--numjobs", "3", "--size", str(50 * PAGE), "--rw", "read")
    assert two["jobs"][0]["read"]["total_ios"] == 150
    limits = ("--runtime", "100ms", "--time_based", "--ramp_time", "50ms", "--iodepth=4", "--size", str(PAGE))
    timed = results(capsys, "--filename", str(file), *limits)
    assert timed["jobs"][0]["read"]["total_ios"] > 1  # more than once around
    assert 100 <= timed["jobs"][0]["read"]["runtime"] <= 5000
    assert timed["jobs"][0]["job options"]["runtime"] == "0.1"


def test_a_ramp_that_ends_late_shortens_nothing(file: Path) -> None:
    """The first read comes 200 ms after its ramp and what would be measured behind it were over."""
    memory, plan = aligned_memory(PAGE), np.zeros(1, PLAN)
    plan["bytes"] = PAGE
    with open_reader([file], pace=Pace(1e9, 0.2)) as reader:
        load = Load(plan, depth=1, buffers=memory.address, buffer_bytes=PAGE, duration_seconds=0.1, ramp_seconds=0.05)
        assert load.run(reader.address) == 0
    counts = load.result()
    assert counts["ended_ns"] - counts["started_ns"] >= 100_000_000 and counts["reads"] >= 1


def test_shares_of_a_file(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    half = results(capsys, "--filename", str(file), "--size=50%", "--offset=75%", "--readwrite=read")["jobs"][0]
    assert half["read"]["total_ios"] == PAGES // 4  # to its end
    assert half["job options"]["size"] == "50%" and half["job options"]["offset"] == "75%"
    assert results(capsys, "--filename", str(file), "--size=100%")["jobs"][0]["read"]["total_ios"] == PAGES
    job = IOJob(filenames=(file,), rw="read", size=Share.parse("8k"), offset=Share.parse("41k"))
    with closing(ReadFiles([file], direct=True)) as files:
        plan = _plan(job, 1, files)
    first = 41 * 1024 // files.block_bytes * files.block_bytes
    assert plan["offset"].tolist() == [first, first + PAGE]
    (tmp_path / "o.fio").write_text(f"[a]\nfilename={file}\ndirect=1\noffset=50%\nsize=25%\nthread\n")
    assert results(capsys, str(tmp_path / "o.fio"))["jobs"][0]["read"]["total_ios"] == PAGES // 4
    for wrong in (["--size=101%"], ["--offset=100%"], ["--store", "x", "--size=5%"]):
        with suppress(SystemExit):
            assert bench(["io", *wrong, *([] if "--store" in wrong else ["--filename", str(file)])]) == 1
        assert "fix: " in capsys.readouterr().err


def test_flags_as_fio_has_them(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    """Alone or with a value; what is always so is accepted with a note."""
    options = ["--filename", str(file), "--blocksize=8k", "--group_reporting=1", "--thread", "--runtime=20ms"]
    assert results(capsys, *options, "--time_based=1")["jobs"][0]["read"]["runtime"] >= 19
    assert results(capsys, *options, "--time_based")["jobs"][0]["read"]["runtime"] >= 19
    assert results(capsys, *options[:-1], "--time_based=0", "--overwrite", "0")["jobs"][0]["read"]["total_ios"] == 150


def test_what_a_reader_waits_is_told(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    """A direct read that was complete when its submission returned took as long as that: lat says so, clat can not."""
    arguments = ["--filename", str(file), "--bs", "64k", "--iodepth", "4"]
    read = results(capsys, *arguments)["jobs"][0]["read"]
    slat, clat, lat = (read[f"{name}_ns"] for name in ("slat", "clat", "lat"))
    assert slat["N"] == clat["N"] == lat["N"] > 0 and slat["min"] > 0
    assert abs(lat["mean"] - slat["mean"] - clat["mean"]) < 1
    assert lat["min"] >= slat["min"] + clat["min"] and lat["max"] <= slat["max"] + clat["max"]
    assert lat["min"] > 1000  # no drive and no page cache copies 64 KiB faster
    assert bench(["io", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["latency", "min", "mean", "max", "stdev"] in rows
    assert {row[0] for row in rows if len(row) > 4 and row[1][0].isdigit()} >= {"slat", "clat", "lat"}


def test_a_store_by_trace(capsys: pytest.CaptureFixture[str], demo_model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    picks = [(layer, expert) for layer in (0, 3, 1) for expert in (5, 0, 31)]
    trace.write_text("layer,expert\n" + "".join(f"{layer},{expert}\n" for layer, expert in picks))
    job = results(capsys, "--store", str(demo_model), "--trace", str(trace), "--iodepth", "4")["jobs"][0]
    plan = record_plan(Store.open(demo_model), picks)
    assert job["read"]["total_ios"] == len(plan) and job["read"]["io_bytes"] == plan["bytes"].sum()
    drawn = results(capsys, "--store", str(demo_model), "--size", "1M", "--iodepth", "4", "--sub-read", "16k")["jobs"][
        0
    ]
    assert 1 << 20 <= drawn["read"]["io_bytes"] < 2 << 20


def test_a_trace_of_our_own(capsys: pytest.CaptureFixture[str], demo_model: Path, tmp_path: Path) -> None:
    """What the recorded run read from the drive is read again: as many experts, the same bytes."""
    path = tmp_path / "routing.trace"
    config = EngineConfig(context_tokens=64, threads=1, trace=path, tiers=Tiers(0, 0.2), lookahead="off")
    with Engine.open(demo_model, config) as engine:
        session = engine.session()
        for token in range(300, 312):
            session.evaluate(np.array([token]))
        nvme = engine.statistics()["tiers"]["nvme"]
    picks = read_trace(path)
    assert len(picks) == nvme["hits"] > 0
    layers = [layer for layer, _ in picks]
    passes = 1 + sum(after < before for before, after in itertools.pairwise(layers))
    assert passes <= 12  # layer after layer, token after token
    job = results(capsys, "--store", str(demo_model), "--trace", str(path), "--iodepth", "4")["jobs"][0]
    assert job["read"]["io_bytes"] == nvme["bytes"]
    whole = EngineConfig(context_tokens=64, threads=1, trace=tmp_path / "all.trace", tiers=Tiers(0, 1))
    with Engine.open(demo_model, whole) as engine:
        engine.session().evaluate(np.array([1]))
    with pytest.raises(FormatError, match="read no expert from the drive"):
        read_trace(tmp_path / "all.trace")


def test_the_text(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    assert bench(["io", "--filename", str(file), "--iodepth", "2", "--eta", "always"]) == 0
    out = capsys.readouterr().out
    for expected in ("job: randread, bs 4,096, iodepth 2", "IOPS ", " MiB/s (", "p99.9 ", "us a read", "in flight: "):
        assert expected in out
    assert bench(["io", "--filename", str(file), "--output", str(tmp_path / "o.json"), "--output-format=json"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "o.json").read_text())["jobs"]


def test_writing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "new"
    job = results(capsys, "--filename", str(path), "--size", "1M", "--rw", "write", "--bs", "64k", "--iodepth", "4")[
        "jobs"
    ][0]
    assert job["write"]["total_ios"] == 16 and "read" not in job
    before = path.read_bytes()
    assert len(before) == 1 << 20
    assert bench(["io", "--filename", str(path), "--rw", "randwrite", "--bs", "64k"]) == 1
    assert "would overwrite it" in capsys.readouterr().err
    assert path.read_bytes() == before
    results(
        capsys,
        "--filename",
        str(path),
        "--rw",
        "randwrite",
        "--bs",
        "64k",
        "--overwrite",
        "--randseed",
        "9",
        "--engine=pread",
    )
    assert path.read_bytes() != before and path.stat().st_size == 1 << 20


# ---- beside fio ----


def test_names_are_fios(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    """Every field that has fio's name has fio's type, and the same job counts the same reads and bytes."""
    fio = shutil.which("fio")
    if fio is None:
        pytest.skip("fio is not installed")
    options = ["--rw=randread", "--bs=4k", f"--filename={file}", f"--size={PAGES * PAGE}", "--direct=1"]
    command = [fio, "--name=job", "--readonly", "--ioengine=psync", "--output-format=json", *options]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)["jobs"][
        0
    ]
    ours = results(capsys, *options)["jobs"][0]
    own = {"fomoe"}
    assert set(ours) - own <= set(theirs)
    assert set(ours["read"]) <= set(theirs["read"])
    assert set(ours["iodepth_level"]) == set(theirs["iodepth_level"])
    for mine, other in (
        (ours, theirs),
        (ours["read"], theirs["read"]),
        (ours["read"]["clat_ns"], theirs["read"]["clat_ns"]),
    ):
        for name in set(mine) - own:
            number = isinstance(mine[name], int | float)
            assert isinstance(other[name], int | float) if number else isinstance(other[name], type(mine[name])), name
    assert set(ours["read"]["clat_ns"]["percentile"]) == set(theirs["read"]["clat_ns"]["percentile"])
    for name in ("total_ios", "io_bytes", "io_kbytes"):
        assert ours["read"][name] == theirs["read"][name]


JOB_FILE = """
; a comment
[global]
ioengine=io_uring
direct=1
bs=4k
filename={file}
group_reporting

[first]
rw=randread
iodepth=4
size=400k

[beside]
rw=read
size=200k

[later]
stonewall
rw=randread
bs=8k
runtime=100ms
time_based
"""


def test_job_files(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    path = tmp_path / "jobs.fio"
    path.write_text(JOB_FILE.format(file=file))
    groups = read_job_file(path)
    assert [[job.name for job in group] for group in groups] == [["first", "beside"], ["later"]]
    assert groups[0][0].engine == "uring" and groups[1][0].block_bytes == 8192 and groups[1][0].time_based
    value = results(capsys, str(path))
    assert [job["jobname"] for job in value["jobs"]] == ["first", "beside", "later"]
    assert [job["read"]["total_ios"] for job in value["jobs"][:2]] == [100, 50]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nfilename=x\nverify=crc32c\n", "unknown key 'verify'"),
        ("[a]\nfilename=x\nbs=four\n", "bs: 'four' is no size"),
        ("[a]\nfilename=x\niodepth=-1\n", "iodepth: '-1' is no number"),
        ("[a]\nfilename=x\nioengine=libaio\n", "ioengine 'libaio' is unknown"),
        ("[a]\nfilename=x\nrw=trim\n", "rw=trim is unknown"),
        ("[global]\nbs=4k\n", "has no jobs"),
        ("bs=4k\n", "is no job file"),
        ("[a]\nbs=4k\n", "name either files to read or a store"),
    ],
)
def test_bad_job_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.fio"
    path.write_text(text)
    assert bench(["io", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either files to read or a store"),
        (["--filename", "/nonexistent/file"], "does not exist"),
        (["--filename", "{file}", "--bs", "1000"], "bs is 1000"),
        (["--filename", "{file}", "--iodepth", "0"], "iodepth is 0"),
        (["--filename", "{file}", "--time_based"], "time_based needs a runtime"),
        (["--filename", "{file}", "--trace", "x"], "a trace needs a store"),
        (["--filename", "{file}", "--store", "x"], "name either"),
        (["--store", "{file}"], "not a GGUF"),
        (["--filename", "{file}", "--bs", "1G"], "does not fit"),
        (["--filename", "{file}", "--rw", "write", "--engine", "mmap"], "writing is not possible"),
        (["--filename", "{file}", "--randseed", "-1"], "randseed is -1"),
        (["--filename", "{file}", "--output", "{folder}"], "Is a directory"),
        (["--filename", "{file}", "--calibrate", "{folder}"], "Is a directory"),
        (["--calibrate", "x"], "--calibrate needs"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], file: Path, arguments: list[str], message: str) -> None:
    assert bench(["io", *(argument.format(file=file, folder=file.parent) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) <= 2


def test_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["--help"]) == 0 and "io " in capsys.readouterr().out
    assert bench(["nothing"]) == 2 and "is no verb" in capsys.readouterr().err
    assert bench([]) == 2


def test_a_failing_read_is_an_error(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cut while the job runs: the error names it, and nothing is left in flight."""
    path = tmp_path / "cut"
    path.write_bytes(file.read_bytes())
    from fomoe_io.io_bench import run as io_run

    opened = io_run.open_reader

    def open_and_cut(*arguments: Any, **options: Any) -> Any:
        reader = opened(*arguments, **options)
        os.truncate(path, 10 * PAGE)
        return reader

    monkeypatch.setattr(io_run, "open_reader", open_and_cut)
    with pytest.raises(Exception, match=r"cut at offset \d+: the file ends before"):
        run_jobs([IOJob(filenames=(path,), depth=4)])


def test_plan_type() -> None:
    assert PLAN.itemsize == 16  # csrc/read/io_load.h, fomoe_planned_read


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_no_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is forbidden")
    try:
        assert bench(["io", "--filename", str(place / "data"), "--size", "1M"]) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)
