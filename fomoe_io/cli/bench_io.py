"""fomoe-bench io: fio-style jobs on files, or on the records of a store."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fomoe_io.cli.common import note, run_command
from fomoe_io.cli.parser import Foreign, Parser, checked, new_parser, package_version
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import UsageError, printable
from fomoe_io.io_bench.calibrate import DEPTHS, POINT_SECONDS, calibrate, sizes_within
from fomoe_io.io_bench.job import DIRECTIONS, ENGINES, IOJob, IOResult, Share
from fomoe_io.io_bench.job_file import parse_engine, parse_flag, parse_seconds, read_job_file
from fomoe_io.io_bench.report import format_result, json_results
from fomoe_io.io_bench.run import file_bytes, run_jobs
from fomoe_io.storage.reader import MODES
from fomoe_io.storage.store import Store
from fomoe_io.system.files import check_targets, write_atomically
from fomoe_io.system.system_card import format_card, system_card
from fomoe_io.units import format_rate, parse_bytes

PROGRAM = "fomoe-bench io"
FIO = [
    Foreign(("--group_reporting", "--thread"), "0", "each job is reported once, and its jobs are threads"),
    Foreign(("--verify", "--rwmixread", "--fsync", "--rate"), "1", "this is not measured", "fio"),
]
"""fio's options that a job here does not have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PROGRAM, _main, argv)


def parser() -> Parser:
    """The command line."""
    p = new_parser(PROGRAM, "Measure a drive in fio's terms. --name value and --name=value both work.")
    p.add_argument("job_file", nargs="?", type=Path, metavar="JOBFILE", help="an fio job file (its common keys)")
    what = p.add_argument_group("what to read")
    what.add_argument("--filename", action="append", type=Path, metavar="FILE", help="file or device, repeatable")
    what.add_argument("--store", type=Path, metavar="STORE", help="the expert records of a store or GGUF")
    what.add_argument(
        "--trace", type=Path, metavar="TRACE", help="the order of the records: file of fomoe-run --trace, or CSV"
    )
    what.add_argument("--rw", "--readwrite", choices=DIRECTIONS, default="randread")
    what.add_argument("--bs", "--blocksize", type=checked(parse_bytes), default=4096, metavar="SIZE", help="block size")
    what.add_argument("--size", type=checked(Share.parse), default=Share(), metavar="SIZE",
        help="bytes to use, or a share such as 50%%; lays out a file (default: all)")  # fmt: skip
    what.add_argument("--offset", type=checked(Share.parse), default=Share(), metavar="SIZE",
        help="where to begin, also as a share (default: 0)")  # fmt: skip
    _add_flag(what, "--overwrite", "let a job write to a file that exists")
    how = p.add_argument_group("how")
    how.add_argument("--iodepth", type=int, default=1, metavar="N", help="reads in flight")
    how.add_argument("--numjobs", type=int, default=1, metavar="N", help="threads, each with a reader of its own")
    how.add_argument("--runtime", type=checked(parse_seconds), default=0.0, metavar="TIME", help="stop after so long")
    _add_flag(how, "--time_based", "go on until --runtime is over, whatever --size is")
    how.add_argument("--ramp_time", type=checked(parse_seconds), default=0.0, metavar="TIME", help="do not count it")
    how.add_argument("--direct", type=checked(parse_flag), default=True, metavar="0|1", help="O_DIRECT")
    engines = ", ".join(ENGINES)
    how.add_argument("--engine", "--ioengine", type=checked(parse_engine), default="auto", metavar="NAME", help=engines)
    how.add_argument("--mode", choices=("auto", *MODES), default="auto", help="set-up of the ring")
    how.add_argument("--sub-read", type=checked(parse_bytes), default=0, metavar="SIZE", help="cut longer reads")
    how.add_argument("--fixedbufs", type=checked(parse_flag), default=True, metavar="0|1", help="register buffers")
    how.add_argument("--randseed", type=int, default=1, metavar="N")
    how.add_argument("--name", default="job", help="name of the job in the output")
    out = p.add_argument_group("output")
    out.add_argument("--output-format", choices=("normal", "json"), default="normal")
    out.add_argument("--output", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    out.add_argument("--eta", choices=("always", "never", "auto"), default="auto", help="the live line on stderr")
    out.add_argument("--calibrate", type=Path, metavar="FILE", help="measure all sizes and depths into FILE")
    p.add_foreign(FIO)
    return p


def _add_flag(group: Any, name: str, about: str) -> None:
    """As fio has them: alone, or with 0 or 1."""
    group.add_argument(name, nargs="?", choices=("0", "1"), const="1", default="0", metavar="0|1",
        help=f"{about} (default: 0; alone: 1)")  # fmt: skip


def _job(options: argparse.Namespace) -> IOJob:
    return IOJob(
        name=options.name,
        rw=options.rw,
        filenames=tuple(options.filename or ()),
        store=options.store,
        trace=options.trace,
        block_bytes=options.bs,
        depth=options.iodepth,
        jobs=options.numjobs,
        size=options.size,
        offset=options.offset,
        runtime_seconds=options.runtime,
        ramp_seconds=options.ramp_time,
        time_based=options.time_based == "1",
        direct=options.direct,
        fixed_buffers=options.fixedbufs,
        overwrite=options.overwrite == "1",
        engine=options.engine,
        mode=options.mode,
        sub_read_bytes=options.sub_read,
        seed=options.randseed,
    )


class _LiveLine:
    """One line on stderr that is written over."""

    def __init__(self, choice: str) -> None:
        self._on = choice == "always" or (choice == "auto" and sys.stderr.isatty())
        self._last = (0.0, 0, 0)

    def __call__(self, seconds: float, reads: int, count: int) -> None:
        if not self._on:
            return
        span = max(1e-9, seconds - self._last[0])
        iops, rate = (reads - self._last[1]) / span, (count - self._last[2]) / span
        self._last = (seconds, reads, count)
        print(f"\r[{seconds:5.1f} s] {format_rate(rate)}, {iops:,.0f} IOPS\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _main(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    for text in options.notes:
        note(f"note: {text}")
    if options.job_file and (options.filename or options.store or options.calibrate):
        raise UsageError("a job file names its own files", hint="leave out --filename, --store and --calibrate")
    check_targets([options.output, options.calibrate])
    if options.calibrate:
        return _calibrate(options)
    groups = read_job_file(options.job_file) if options.job_file else [[_job(options)]]
    results: list[IOResult] = []
    line = _LiveLine(options.eta)
    try:
        for group in groups:
            results += run_jobs(group, line)
    finally:
        line.clear()
    jobs = [job for group in groups for job in group]
    card = system_card(_data_files(jobs))
    if options.output_format == "json":
        text = json.dumps(json_results(results, package_version(), card), indent=2)
    else:
        lines = "\n".join([*map(format_result, results), *format_card(card)]).split("\n")
        text = "\n".join(map(printable, lines))
    if options.output:
        write_atomically(options.output, (text + "\n").encode())
    else:
        print(text)
    return 0


def _data_files(jobs: Sequence[IOJob]) -> list[Path]:
    return [path for job in jobs for path in (Store.open(job.store).paths if job.store else job.filenames)]


def _calibrate(options: argparse.Namespace) -> int:
    """Measure every size and depth on one file, or on the largest data file of a store."""
    if bool(options.filename) == bool(options.store) or len(options.filename or ()) > 1:
        raise UsageError("--calibrate needs one --filename or a --store")
    paths = options.filename or Store.open(options.store).paths
    path = max(paths, key=file_bytes)
    points = len(sizes_within(path, direct=options.direct)) * len(DEPTHS)
    note(f"measuring {path}: about {points * POINT_SECONDS:.0f} s")
    with Progress("calibrate", points, unit="points") as bar:
        result = calibrate(path, engine=options.engine, direct=options.direct, progress=bar.to)
    if options.direct and not result.direct:
        note(f"note: direct reads of {path} do not work: this is the page cache, not the drive")
    result.save(options.calibrate)
    for point in result.points:
        print(
            f"{point.block_bytes // 1024:6} KiB x QD {point.depth:3}: {point.bytes_per_second / 2**20:8.0f} MiB/s  "
            f"p50 {point.p50_us:8.0f} us  p99 {point.p99_us:8.0f} us  cpu {point.cpu_us_per_read:6.1f} us a read"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
