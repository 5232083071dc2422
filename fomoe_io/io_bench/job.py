"""Jobs of `fomoe-bench io`: what to read, how, for how long; and what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from fomoe_io._io_load import LATENCY_STEP_BITS
from fomoe_io.errors import UsageError
from fomoe_io.storage.reader import ALIGNMENT, MOST_DEPTH
from fomoe_io.units import parse_bytes

ENGINES = ("auto", "uring", "pread", "mmap", "python-liburing")
DIRECTIONS = ("randread", "read", "randwrite", "write")


@dataclass(frozen=True, slots=True)
class Share:
    """A size, or a part of a file's."""

    bytes: int = 0
    percent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of `64M` or `25%`.

        Raises
        ------
        UsageError
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
        if match is None:
            return cls(bytes=parse_bytes(text))
        if float(match[1]) > 100:
            raise UsageError(f"{text} is more than there is", hint="100%")
        return cls(percent=float(match[1]))

    def of(self, whole: int) -> int:
        """In bytes, of a file of so many."""
        return int(whole * self.percent / 100) if self.percent else self.bytes

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.percent else str(self.bytes)


@dataclass(frozen=True, slots=True)
class IOJob:
    """One job, in fio's terms.

    Attributes
    ----------
    name : str
    rw : {"randread", "read", "randwrite", "write"}
    filenames : tuple of Path
        Files to read; one that is missing is made with `size` random bytes.
    store : Path or None
        Read the records of this store's experts instead.
    trace : Path or None
        In the order of this routing trace; None draws experts by the store's profile.
    block_bytes, depth, jobs : int
        Block size; reads in flight; threads with a reader each.
    size : Share
        Of each file to use, and to transfer unless time_based; nothing: all.
    offset : Share
        Where in each file to begin, rounded down to whole blocks of the drive.
    runtime_seconds, ramp_seconds : float
        Stop after so long (0: when `size` is done); nothing is counted during the ramp.
    time_based : bool
        Go on until the runtime is over.
    direct, fixed_buffers, overwrite : bool
        O_DIRECT; registered buffers (io_uring); write to files that exist.
    engine : str
        One of ENGINES.
    mode : str
        Set-up of the ring (reader.open_reader).
    sub_read_bytes : int
        Cut longer reads.
    seed : int
    """

    name: str = "job"
    rw: str = "randread"
    filenames: tuple[Path, ...] = ()
    store: Path | None = None
    trace: Path | None = None
    block_bytes: int = 4096
    depth: int = 1
    jobs: int = 1
    size: Share = Share()
    offset: Share = Share()
    runtime_seconds: float = 0
    ramp_seconds: float = 0
    time_based: bool = False
    direct: bool = True
    fixed_buffers: bool = True
    overwrite: bool = False
    engine: str = "auto"
    mode: str = "auto"
    sub_read_bytes: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if bool(self.filenames) == bool(self.store):
            raise UsageError(f"{self.name}: name either files to read or a store", hint="--filename or --store")
        if self.engine not in ENGINES:
            raise UsageError(f"{self.name}: engine {self.engine!r} is unknown", hint=", ".join(ENGINES))
        if self.rw not in DIRECTIONS:
            raise UsageError(f"{self.name}: rw={self.rw} is unknown", hint=", ".join(DIRECTIONS))
        if self.store and (self.size.percent or self.offset != Share()):
            raise UsageError(
                f"{self.name}: parts of a file are no parts of a store", hint="--size 1G, without --offset"
            )
        if self.trace and not self.store:
            raise UsageError(f"{self.name}: a trace needs a store", hint="--store DIR")
        if self.writes and (self.store or self.engine in ("mmap", "python-liburing")):
            raise UsageError(f"{self.name}: writing is not possible with {self.store or self.engine}")
        for what, value, most in (("iodepth", self.depth, MOST_DEPTH), ("numjobs", self.jobs, 256)):
            if not 1 <= value <= most:
                raise UsageError(f"{self.name}: {what} is {value}, expected 1 to {most}")
        multiple = ALIGNMENT if self.direct else 1
        if self.block_bytes % multiple or not 1 <= self.block_bytes < 1 << 31:
            raise UsageError(f"{self.name}: bs is {self.block_bytes}, expected a multiple of {multiple} below 2 GiB")
        if self.time_based and not self.runtime_seconds:
            raise UsageError(f"{self.name}: time_based needs a runtime", hint="--runtime SECONDS")
        if min(self.runtime_seconds, self.ramp_seconds) < 0:
            raise UsageError(f"{self.name}: a negative time")
        if self.seed < 0:
            raise UsageError(f"{self.name}: randseed is {self.seed}, expected 0 or more")

    @property
    def writes(self) -> bool:
        """Whether it writes."""
        return self.rw.endswith("write")


@dataclass(frozen=True, slots=True)
class Spans:
    """Times of many reads, ns."""

    least: float = 0.0
    most: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of(cls, parts: Sequence[tuple[float, float, float, float]], reads: Sequence[int]) -> Self:
        """Of threads: (min, max, sum, sum of squares) each, and how many reads."""
        count = sum(reads)
        if not count:
            return cls()
        found = [part for part, n in zip(parts, reads, strict=True) if n]
        mean = sum(part[2] for part in found) / count
        square = sum(part[3] for part in found) / count
        return cls(
            min(part[0] for part in found), max(part[1] for part in found), mean, max(0.0, square - mean**2) ** 0.5
        )


@dataclass(slots=True)
class IOResult:
    """What a job did, its threads together.

    Attributes
    ----------
    job : IOJob
    engine, mode : str
        What really read.
    direct, buffers_registered : bool
    reads, bytes : int
    seconds : float
        Counted time (without ramp).
    latency_bins : numpy.ndarray
        int64; bin -> completions (see `bin_ns`).
    submission, completion, total : Spans
        fio's slat, clat and lat: the call that submitted a read, from its return to the completion, and both.  What
        the kernel finished inside that call was complete at once: only `total` tells how long a read took.
    in_flight : numpy.ndarray
        int64 [depth + 1]: reads in flight when a read was started.
    user_seconds, system_seconds : float
        Processor time of all threads that read (the kernel's for this process, too) while the group of jobs ran.
    cpu_reads : int
        Reads that this time was spent on.
    samples : list of float
        Bytes per second of the group, every half second.
    notes : list of str
    """

    job: IOJob
    engine: str
    mode: str
    direct: bool
    buffers_registered: bool
    reads: int = 0
    bytes: int = 0
    seconds: float = 0.0
    latency_bins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    submission: Spans = Spans()
    completion: Spans = Spans()
    total: Spans = Spans()
    in_flight: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    cpu_reads: int = 0
    samples: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def iops(self) -> float:
        """Reads per second."""
        return self.reads / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def cpu_us_per_read(self) -> float:
        """Processor time, kernel's included, for a read."""
        return 1e6 * (self.user_seconds + self.system_seconds) / self.cpu_reads if self.cpu_reads else 0.0

    def percentile_ns(self, percent: float) -> float:
        """Completion latency that this share of the reads did not exceed."""
        total = int(self.latency_bins.sum())
        if not total:
            return 0.0
        rank = np.searchsorted(np.cumsum(self.latency_bins), max(1, np.ceil(total * percent / 100)))
        return min(float(bin_ns(int(rank))), self.completion.most)


def bin_ns(index: int) -> float:
    """Middle of a latency bin, ns (csrc/read/io_load.c, latency_bin)."""
    steps = 1 << LATENCY_STEP_BITS
    if index < steps:
        return float(index)
    octave = index // steps - 1
    return ((steps + index % steps + 0.5) * 2.0**octave) if octave else float(steps + index % steps)
