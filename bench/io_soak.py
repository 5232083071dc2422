"""A soak of the readers: hours of reads, promotions and cancels at full depth; every byte is checked, nothing may leak.

    python bench/io_soak.py --filename DATA --seconds 3600 --share 0.1 -o RESULTS.json

A file of records of many sizes is read in bursts that fill the queue several times over.  In each burst a part of the
reads are prefetches, some of which are promoted, and some reads are cancelled.  Each record that arrives is checked
against its xxh3_64, and each read must be answered exactly once.  Every so many bursts the reader is closed and
another is opened: every way to set up a ring that works here, pread threads, several depths, whole reads and
sub-reads, registered memory and not.  Resident memory, descriptors and threads are counted between readers.
`--share` bounds the processor's time: after a burst the soak sleeps, so that it can run beside other work.

Exit code 1, and the reason in the last line, when anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle, product
from pathlib import Path

import numpy as np
import xxhash

from fomoe_io.storage.reader import ALIGNMENT, Memory, Reader, aligned_memory, open_reader, probe_modes
from fomoe_io.system.memory import resident_bytes
from fomoe_io.system.system_card import system_card
from fomoe_io.units import parse_bytes

RECORD_BYTES = (ALIGNMENT, 2 << 20)
"""Smallest and largest record; sizes are log-uniform in between."""
TARGETS_BYTES = 64 << 20
BURST_DEPTHS = 3
"""Reads of a burst, in depths of the queue: two thirds of them wait in our own queues and can be cancelled."""
PREFETCHES, PROMOTED = 0.5, 0.2
"""Shares of a burst's reads."""
CANCELS = 0.5
"""Chance of one before each wait."""
DEPTHS, SUB_READS = (1, 8, 64), (0, 64 << 10, 256 << 10)
GROWTH_LIMIT_BYTES = 8 << 20
"""Of resident memory after the first round of readers, which fills allocators and caches."""


@dataclass(frozen=True)
class Record:
    """A part of the file."""

    offset: int
    bytes: int
    checksum: int


@dataclass(frozen=True)
class Setting:
    """A way to open a reader; mode "pread" is the pool of threads."""

    mode: str
    depth: int
    sub_read_bytes: int
    registered: bool


@dataclass
class Counts:
    """What happened.

    `modes` has the bursts of each mode; `queue_full` how often a ring was left with its depth in flight; `samples` are
    taken between readers.
    """

    bursts: int = 0
    readers: int = 0
    reads: int = 0
    bytes: int = 0
    cancels_asked: int = 0
    cancelled: int = 0
    promotions_asked: int = 0
    queue_full: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)


def make_file(path: Path, size: int, seed: int) -> list[Record]:
    """Write random records; the last one does not end on a page."""
    random = np.random.default_rng(seed)
    records, offset = [], 0
    with path.open("wb") as stream:
        while offset < size:
            pages = int(np.exp(random.uniform(*np.log(RECORD_BYTES))) / ALIGNMENT)
            data = random.bytes(pages * ALIGNMENT if offset + pages * ALIGNMENT < size else pages * ALIGNMENT - 1234)
            records.append(Record(offset, len(data), xxhash.xxh3_64_intdigest(data)))
            offset += stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return records


def open_with(setting: Setting, path: Path, memory: Memory) -> Reader:
    """A reader of the file."""
    engine, mode = ("pread", "auto") if setting.mode == "pread" else ("uring", setting.mode)
    reader = open_reader([path], engine=engine, mode=mode, depth=setting.depth, sub_read_bytes=setting.sub_read_bytes)
    if setting.registered and not reader.register_buffers(memory.address, TARGETS_BYTES):
        reader.close()
        raise SystemExit(f"memory could not be registered: {reader.registration_error}")
    return reader


def burst(
    reader: Reader, records: list[Record], memory: Memory, random: np.random.Generator, first_tag: int, counts: Counts
) -> None:
    """Fill the queue, change our mind about some, await all, check all."""
    chosen: dict[int, tuple[Record, int]] = {}
    place = 0
    for index in random.integers(0, len(records), BURST_DEPTHS * reader.depth):
        record = records[index]
        room = -(-record.bytes // ALIGNMENT) * ALIGNMENT
        if place + room > TARGETS_BYTES:
            break
        chosen[first_tag + len(chosen)] = record, place
        place += room
    tags, cancelled = np.array(list(chosen)), set()
    np.frombuffer(memory.view, np.uint8)[:place:ALIGNMENT] = 0  # what an earlier burst left must not pass
    requests = [
        (0, record.offset, memory.address + start, -(-record.bytes // ALIGNMENT) * ALIGNMENT)
        for record, start in chosen.values()
    ]
    first = 0
    while first < len(requests):
        last = first + int(random.integers(1, reader.depth + 2))
        reader.submit(requests[first:last], first_tag=first_tag + first, priority=int(random.random() < PREFETCHES))
        first = last
    for tag in tags[random.random(len(tags)) < PROMOTED]:
        counts.promotions_asked += 1
        reader.promote(int(tag))
    answered: set[int] = set()
    while len(answered) < len(chosen):
        if random.random() < CANCELS:
            tag = int(random.choice(tags))
            cancelled.add(tag)
            counts.cancels_asked += 1
            reader.cancel(tag)
        batch = reader.reap(int(random.integers(1, 65)), wait=False) if random.random() < 0.2 else []
        batch = batch or reader.reap(int(random.integers(1, 65)))
        if not batch:
            raise SystemExit(f"lost completions: {len(chosen) - len(answered)} of {len(chosen)}")
        for tag, error in batch:
            check(tag, error, chosen, answered, cancelled, memory, counts)
            answered.add(tag)
    if reader.reap():
        raise SystemExit("more completions than reads")


def check(
    tag: int,
    error: int,
    chosen: dict[int, tuple[Record, int]],
    answered: set[int],
    cancelled: set[int],
    memory: Memory,
    counts: Counts,
) -> None:
    """One answer."""
    if tag not in chosen or tag in answered:
        raise SystemExit(f"tag {tag} was answered twice or never asked for")
    if error:
        if tag not in cancelled:
            raise SystemExit(f"read {tag} failed: {os.strerror(-error)}")
        counts.cancelled += 1
        return
    record, start = chosen[tag]
    if xxhash.xxh3_64_intdigest(memory.view[start : start + record.bytes]) != record.checksum:
        raise SystemExit(f"wrong bytes at offset {record.offset} ({record.bytes} bytes)")
    counts.reads += 1
    counts.bytes += record.bytes


def sample(seconds: float) -> dict[str, float]:
    """Of this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.append((task / "comm").read_text())
    return {
        "seconds": round(seconds, 1),
        "resident_bytes": resident_bytes(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": sum(not name.startswith("iou-") for name in names),  # the kernel's own workers come and go
    }


def settings(path: Path) -> list[Setting]:
    """Every combination that works here, in turns of the modes."""
    modes = [mode for mode, problem in probe_modes(path).items() if not problem]
    rings = product(DEPTHS, SUB_READS, (False, True), modes)
    found = [Setting(mode, depth, sub, registered) for depth, sub, registered, mode in rings]
    return found + [Setting("pread", depth, sub, False) for depth, sub in product(DEPTHS, SUB_READS)]


def leak(samples: list[dict[str, float]], warm: int) -> str:
    """What grew after the first `warm` readers; empty when nothing did."""
    later = samples[warm:]
    if not later:
        return ""
    for name in ("descriptors", "threads"):
        if len({one[name] for one in samples}) > 1:
            return f"{name} changed: {sorted({one[name] for one in samples})}"
    growth = later[-1]["resident_bytes"] - later[0]["resident_bytes"]
    return f"resident memory grew by {growth:,.0f} bytes" if growth > GROWTH_LIMIT_BYTES else ""


def soak(path: Path, records: list[Record], seconds: float, bursts: int, share: float, seed: int) -> tuple[Counts, str]:
    """Run; the counts, and what is wrong."""
    random, counts = np.random.default_rng(seed), Counts()
    memory = aligned_memory(TARGETS_BYTES, huge_pages=False)
    np.frombuffer(memory.view, np.uint8)[::ALIGNMENT] = 1
    ways = settings(path)
    started, tag = time.monotonic(), 0
    try:
        for setting in cycle(ways):
            with open_with(setting, path, memory) as reader:
                for _ in range(bursts):
                    before = time.monotonic()
                    burst(reader, records, memory, random, tag, counts)
                    tag += BURST_DEPTHS * reader.depth
                    time.sleep((time.monotonic() - before) * (1 / share - 1))
                counts.queue_full += reader.counters.get("depths", [0])[-1]
            counts.bursts += bursts
            counts.readers += 1
            counts.modes[setting.mode] = counts.modes.get(setting.mode, 0) + bursts
            counts.samples.append(sample(time.monotonic() - started))
            if time.monotonic() - started > seconds:
                break
    except SystemExit as problem:
        return counts, f"{problem} ({setting})"
    return counts, leak(counts.samples, len(ways))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filename", type=Path, required=True, help="is written; on the drive to soak")
    parser.add_argument("--size", type=parse_bytes, default=512 << 20)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--bursts", type=int, default=20, help="for each reader")
    parser.add_argument("--share", type=float, default=1.0, help="of the time not spent asleep")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    records = make_file(options.filename, options.size, options.seed)
    try:
        counts, problem = soak(options.filename, records, options.seconds, options.bursts, options.share, options.seed)
        used = resource.getrusage(resource.RUSAGE_SELF)
        values = {
            "problem": problem,
            **asdict(counts),
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_resident_bytes": used.ru_maxrss * 1024,
            "system": system_card([options.filename]),
        }
    finally:
        options.filename.unlink()
    if options.output:
        options.output.write_text(json.dumps(values, indent=1) + "\n")
    print(
        f"{counts.reads:,} reads, {counts.bytes / 1e9:.1f} GB, {counts.cancelled:,} cancelled, {counts.readers} readers"
    )
    print(problem or "nothing lost, nothing wrong, nothing left behind")
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
