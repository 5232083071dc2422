"""Running jobs of `fomoe-bench io`: a reader, buffers and a native loop for each thread."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io._io_load import Load, MmapReader
from fomoe_io.errors import ReadError, UsageError
from fomoe_io.io_bench.job import IOJob, IOResult, Spans
from fomoe_io.io_bench.plan import block_plan, random_picks, read_trace, record_plan
from fomoe_io.storage.read_files import ReadFault, ReadFiles, read_fault
from fomoe_io.storage.reader import ALIGNMENT, HUGE_PAGE_BYTES, Memory, Reader, aligned_memory, open_reader
from fomoe_io.storage.store import Store
from fomoe_io.units import format_bytes

SAMPLE_SECONDS = 0.5
"""fio's interval of bandwidth samples."""
LAYOUT_BYTES = 16 << 20

Progress = Callable[[float, int, int], None]
"""Called every half second with (seconds, reads, bytes) since the start."""


@dataclass(slots=True)
class _Thread:
    """One thread of a job with its reader, buffers and load."""

    reader: Reader | MmapReader | None
    files: ReadFiles | None
    memory: Memory
    load: Any

    def run(self) -> None:
        if self.reader is None:
            self.load.run()
        else:
            self.load.run(self.reader.address)

    def check(self) -> None:
        """Raise ReadError when a read failed."""
        if not self.load.error:
            return
        fault = read_fault(-self.load.error, 0, 0)
        if isinstance(self.reader, Reader) and self.reader.last_error:
            fault = ReadFault(self.reader.last_error, self.reader.last_fix)
        raise ReadError(fault.reason, hint=fault.fix)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
        if self.files is not None:
            self.files.close()
        self.memory.close()


def lay_out(job: IOJob) -> list[str]:
    """Make the files that are missing; lines that say so.

    Raises
    ------
    UsageError
        A missing file and no size, or a file that would be overwritten.
    """
    notes = []
    for path in job.filenames:
        if path.exists():
            if job.writes and not job.overwrite:
                raise UsageError(f"{path} exists; {job.rw} would overwrite it", hint="--overwrite, or another file")
            continue
        if not job.size.bytes:
            raise UsageError(f"{path} does not exist", hint="--size 1G lays it out")
        length = job.offset.bytes + job.size.bytes
        random = np.random.default_rng(job.seed)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as stream:
                for start in range(0, length, LAYOUT_BYTES):
                    stream.write(random.bytes(min(LAYOUT_BYTES, length - start)))
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        notes.append(f"{path}: laid out {format_bytes(length)} of random bytes")
    return notes


def _paths(job: IOJob) -> tuple[list[Path], dict[int, int]]:
    """The files to read, and which of them are mirrors of one another."""
    return Store.open(job.store).copies() if job.store else (list(job.filenames), {})


def _plan(job: IOJob, seed: int, files: ReadFiles | Reader) -> np.ndarray:
    """Reads, in multiples of what the files take.

    Raises
    ------
    UsageError
        The job's blocks are none.
    """
    if job.store:
        store = Store.open(job.store)
        picks = read_trace(job.trace) if job.trace else random_picks(store.experts, seed)
        return record_plan(store, picks, files.block_bytes)
    if files.block_bytes > ALIGNMENT and job.block_bytes % files.block_bytes:
        raise UsageError(
            f"{job.name}: bs is {job.block_bytes:,}, and the drive of {files.paths[0]} has blocks of "
            f"{files.block_bytes:,} bytes",
            hint=f"--bs {files.block_bytes >> 10}K, or --direct 0",
        )
    starts = [job.offset.of(size) // files.block_bytes * files.block_bytes for size in files.sizes]
    rooms = [max(0, size - start) for size, start in zip(files.sizes, starts, strict=True)]
    usable = [min(room, job.size.of(size) or room) for room, size in zip(rooms, files.sizes, strict=True)]
    plan = block_plan(usable, job.block_bytes, random=job.rw.startswith("rand"), seed=seed)
    plan["offset"] += np.array(starts, np.uint64)[plan["file"]]
    return plan


def file_bytes(path: Path) -> int:
    """Size of a file or of a block device, whose `st_size` is 0."""
    if path.is_file():
        return path.stat().st_size
    with path.open("rb") as stream:
        return stream.seek(0, os.SEEK_END)


def _prepare(job: IOJob, number: int) -> _Thread:
    paths, mirrors = _paths(job)
    if job.engine == "python-liburing":
        with closing(ReadFiles(paths, direct=job.direct)) as probed:
            return _liburing_thread(job, number, paths, probed)
    if job.engine == "mmap":
        files = ReadFiles(paths, direct=False)
        mapped = MmapReader(files, depth=job.depth, random_access=job.rw == "randread" or bool(job.store))
        memory, limits = _buffers(job, plan := _plan(job, job.seed + number, files))
        return _Thread(mapped, files, memory, Load(plan, **limits))
    reader = open_reader(
        paths,
        engine=job.engine,
        depth=job.depth,
        direct=job.direct,
        mode=job.mode,
        sub_read_bytes=job.sub_read_bytes,
        mirrors=mirrors,
        write=job.writes,
    )
    try:
        memory, limits = _buffers(job, plan := _plan(job, job.seed + number, reader))
    except BaseException:
        reader.close()
        raise
    if job.fixed_buffers:
        reader.register_buffers(memory.address, job.depth * limits["buffer_bytes"])
    return _Thread(reader, None, memory, Load(plan, **limits))


def _liburing_thread(job: IOJob, number: int, paths: list[Path], probed: ReadFiles) -> _Thread:
    from fomoe_io.io_bench.peers import LiburingLoad

    memory, limits = _buffers(job, plan := _plan(job, job.seed + number, probed))
    return _Thread(None, None, memory, LiburingLoad(plan, paths, direct=probed.direct, **limits))


def _buffers(job: IOJob, plan: np.ndarray) -> tuple[Memory, dict[str, Any]]:
    """Memory for a job's reads, and what `Load` is told beside the plan."""
    most = 0 if job.time_based else len(plan)
    if job.size.bytes and job.store and not job.time_based:
        most = int(np.searchsorted(np.cumsum(plan["bytes"]), job.size.bytes)) + 1
    stride = -(-int(plan["bytes"].max()) // ALIGNMENT) * ALIGNMENT
    # whole huge pages, though the buffers be small: pieces of small pages make a read cost more
    memory = aligned_memory(-(-job.depth * stride // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
    buffers = np.frombuffer(memory.view, np.uint8)
    if job.writes:
        buffers[:] = np.frombuffer(np.random.default_rng(job.seed).bytes(len(buffers)), np.uint8)
    else:
        buffers[::ALIGNMENT] = 1  # the first fault of a page is no part of a read
    return memory, {
        "depth": job.depth,
        "memory": memory,
        "buffers": memory.address,
        "buffer_bytes": stride,
        "most_reads": most,
        "duration_seconds": job.runtime_seconds,
        "ramp_seconds": job.ramp_seconds,
    }


def run_jobs(jobs: Sequence[IOJob], progress: Progress | None = None) -> list[IOResult]:
    """Run jobs side by side.

    Parameters
    ----------
    jobs : sequence of IOJob
    progress : Progress, optional

    Raises
    ------
    ReadError
        A read failed; names the file and offset.
    UsageError, OSError
        A job can't run.
    """
    notes = [lay_out(job) for job in jobs]
    threads: list[list[_Thread]] = []
    try:
        for job in jobs:
            threads.append([])
            for number in range(job.jobs):
                threads[-1].append(_prepare(job, number))
        flat = [thread for group in threads for thread in group]
        before = _processor_seconds()
        samples = _run_threads(flat, progress)
        after = _processor_seconds()
        for thread in flat:
            thread.check()
        results = [_result(job, group) for job, group in zip(jobs, threads, strict=True)]
    finally:
        for group in threads:
            for thread in group:
                thread.close()
    issued = sum(thread.load.result()["issued"] for thread in flat)
    for result, lines in zip(results, notes, strict=True):
        result.notes += lines
        result.cpu_reads = issued
        result.user_seconds = after[0] - before[0]
        result.system_seconds = after[1] - before[1]
        result.samples = samples
    return results


def _processor_seconds() -> tuple[float, float]:
    """(user, system) of the process without this thread: it shows progress and reads nothing."""
    everything, mine = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_THREAD))
    return everything.ru_utime - mine.ru_utime, everything.ru_stime - mine.ru_stime


def _run_threads(flat: Sequence[_Thread], progress: Progress | None) -> list[float]:
    """Run all to the end; bandwidth samples of all of them together."""
    workers = [threading.Thread(target=thread.run, name="fomoe-bench-io") for thread in flat]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    samples: list[float] = []
    last_time, last_bytes = started, 0
    try:
        while any(worker.is_alive() for worker in workers):
            next(worker for worker in workers if worker.is_alive()).join(last_time + SAMPLE_SECONDS - time.monotonic())
            now = time.monotonic()
            if now < last_time + SAMPLE_SECONDS:
                continue
            reads, count = (sum(values) for values in zip(*(thread.load.progress() for thread in flat), strict=True))
            samples.append((count - last_bytes) / (now - last_time))
            last_time, last_bytes = now, count
            if progress:
                progress(now - started, reads, count)
    finally:  # Ctrl-C included: nothing may be in flight when the buffers go
        for thread in flat:
            thread.load.stop()
        for worker in workers:
            worker.join()
    return samples


def _result(job: IOJob, threads: Sequence[_Thread]) -> IOResult:
    """The counters of a job's threads, added up."""
    counts = [thread.load.result() for thread in threads]
    reader = threads[0].reader
    result = IOResult(
        job=job,
        engine=reader.name if reader else job.engine,
        mode=reader.mode if reader else "prep_readv",
        direct=reader.direct if isinstance(reader, Reader) else job.direct and reader is None,
        buffers_registered=all(thread.reader is not None and thread.reader.buffers_registered for thread in threads),
    )
    if isinstance(reader, Reader):
        result.notes += reader.notes
    if job.fixed_buffers and reader and reader.name == "uring" and not result.buffers_registered:
        result.notes.append(f"buffers are not registered: {reader.registration_error}")
    result.reads = sum(count["reads"] for count in counts)
    result.bytes = sum(count["bytes"] for count in counts)
    result.seconds = max(max(0, count["ended_ns"] - count["started_ns"]) for count in counts) / 1e9
    result.latency_bins = np.sum([count["latency"] for count in counts], axis=0)
    result.in_flight = np.sum([count["in_flight"] for count in counts], axis=0)
    reads = [count["reads"] for count in counts]
    completion = [
        (c["latency_min_ns"], c["latency_max_ns"], c["latency_sum_ns"], c["latency_square_sum"]) for c in counts
    ]
    result.completion = Spans.of(completion, reads)
    result.submission = Spans.of([count["submission"] for count in counts], reads)
    result.total = Spans.of([count["total"] for count in counts], reads)
    return result
