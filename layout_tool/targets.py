"""The directories a store is written to: are they free, is there room, how fast are their drives?"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fomoe_io.errors import StoreError, UsageError
from fomoe_io.storage.manifest import JOURNAL, MANIFEST, METADATA
from fomoe_io.units import format_bytes
from layout_tool.direct import DirectFile, aligned_buffer, write_error
from layout_tool.placement import Placement

PARTIAL = ".part"
MANIFEST_ROOM_BYTES, MANIFEST_ROOM_EXPERT_BYTES = 1 << 20, 256
"""For manifest and journal: measured 70 to 110 bytes an expert in each, and 200 a resident tensor."""

IGNORE_FREE_SPACE = "--ignore-free-space"
"""Option of pack, plan and mirror: some network and overlay file systems report no free space, ever."""

PROBE_BLOCK_BYTES = 4 << 20
PROBE_SECONDS = 0.5
PROBE_LIMIT_BYTES = 1 << 30

_DATA_NAME = re.compile(r"(resident|experts-\d\d)\.bin(\.part)?")


def resolve(directories: Sequence[Path]) -> list[Path]:
    """Absolute paths of the targets, each given once.

    Raises
    ------
    UsageError
    """
    paths = [path.absolute() for path in directories]
    if len({path.resolve() for path in paths}) != len(paths):
        raise UsageError("a directory is given twice with --to", hint="one --to DIR for each drive")
    if len(paths) > 100:
        raise UsageError(f"{len(paths)} targets, at most 100 make sense")
    for path in paths:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is not a directory", hint="give a directory: --to DIR")
    return paths


def existing_parent(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write on the drive of a directory that need not exist yet."""
    status = os.statvfs(existing_parent(path))
    return status.f_bavail * status.f_frsize


def no_room(short: Sequence[str], hint: str) -> StoreError:
    """What a shortage means to the user: `hint`, or a file system that does not know what it has."""
    unknown = any(line.endswith(" 0 B free") for line in short)
    return StoreError(
        "; ".join(short),
        hint=f"{hint}; {IGNORE_FREE_SPACE}, where the file system says 0 and has room" if unknown else hint,
    )


def shortages(targets: Sequence[Path], needs: Sequence[int]) -> list[str]:
    """One line for each drive that cannot hold what its targets need; targets of one drive count together."""
    drives: dict[int, tuple[Path, int]] = {}
    for target, need in zip(targets, needs, strict=True):
        device = existing_parent(target).stat().st_dev
        first, sum_ = drives.get(device, (target, 0))
        drives[device] = first, sum_ + need
    return [
        f"{target} needs {format_bytes(need)}, its drive has {format_bytes(free_bytes(target))} free"
        for target, need in drives.values()
        if need > free_bytes(target)
    ]


def data_files(target: Path) -> list[Path]:
    """Data files of a store, finished or not, in a directory."""
    if not target.is_dir():
        return []
    return sorted(path for path in target.iterdir() if _DATA_NAME.fullmatch(path.name))


def allocated_bytes(target: Path) -> int:
    """What such files occupy already."""
    return sum(path.stat().st_blocks * 512 for path in data_files(target))


def still_needed(targets: Sequence[Path], placement: Placement, metadata_bytes: int) -> list[int]:
    """Bytes that each target must still find room for; what an interrupted pack has reserved counts as there."""
    needs = [max(0, placement.target_bytes(i) - allocated_bytes(target)) for i, target in enumerate(targets)]
    n_experts = sum(layer.n_experts for layer in placement.experts.values())
    needs[0] += metadata_bytes + MANIFEST_ROOM_BYTES + MANIFEST_ROOM_EXPERT_BYTES * n_experts
    return needs


def check_unused(targets: Sequence[Path]) -> None:
    """Refuse directories that hold a store or parts of one.

    Raises
    ------
    StoreError
    """
    for target in targets:
        found = [target / MANIFEST] if (target / MANIFEST).exists() else data_files(target)
        if found:
            raise StoreError(
                f"{target} already holds {found[0].name} of another store",
                hint="choose an empty directory, or replace what is there with --overwrite",
            )


def clear(targets: Sequence[Path]) -> None:
    """Remove the stores in the directories: the manifest first, so that nothing half-removed passes for a store.

    Raises
    ------
    StoreError
    """
    for target in targets:
        for path in [target / MANIFEST, target / METADATA, target / JOURNAL, *data_files(target)]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(error, path) from error


def make(targets: Sequence[Path]) -> None:
    """Create the directories.

    Raises
    ------
    StoreError
    """
    for target in targets:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, target) from error


def probe(target: Path, *, ignore_free_space: bool = False) -> tuple[float, float]:
    """(write, read) bytes per second of a target's drive, with direct I/O and 4 MiB blocks, in about a second.

    Raises
    ------
    StoreError
    """
    path = existing_parent(target) / f".fomoe-probe-{os.getpid()}"
    block = aligned_buffer(PROBE_BLOCK_BYTES)
    # Not zeros: some drives store those as nothing.
    block[:] = np.frombuffer(os.urandom(PROBE_BLOCK_BYTES), np.uint8)
    room = 4 * PROBE_LIMIT_BYTES if ignore_free_space else free_bytes(target)
    limit = min(PROBE_LIMIT_BYTES, room // 4) // PROBE_BLOCK_BYTES * PROBE_BLOCK_BYTES
    if limit == 0:
        short = f"{target} has no room to measure its drive, which has {format_bytes(room)} free"
        raise no_room([short], "free some space")
    try:
        with DirectFile(path, limit, unit=PROBE_BLOCK_BYTES) as file:
            written, write_rate = _rate(lambda at: file.write(at, block), limit)
            _, read_rate = _rate(lambda at: file.read(at, PROBE_BLOCK_BYTES, block), written)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return write_rate, read_rate


def read_rate(source: Path) -> float:
    """Bytes per second that a file is read at with direct I/O, measured in half a second."""
    block = aligned_buffer(PROBE_BLOCK_BYTES)
    size = min(PROBE_BLOCK_BYTES, source.stat().st_size)
    with DirectFile(source) as file:
        return _rate(lambda at: file.read(at, size, block), source.stat().st_size)[1]


def foreign_files(target: Path) -> list[str]:
    """Names of what lies in a directory and is no part of a store."""
    if not target.is_dir():
        return []
    own = {MANIFEST, METADATA, JOURNAL, "lost+found", *(path.name for path in data_files(target))}
    return sorted(path.name for path in target.iterdir() if path.name not in own)


def copy_seconds(
    source: Path, targets: Sequence[Path], needs: Sequence[int], *, ignore_free_space: bool = False
) -> float:
    """How long a pack will take, its drives measured by writing: reading and writing overlap, but share one drive."""
    reading = read_rate(source)
    devices = {existing_parent(target).stat().st_dev for target in targets}
    rates = [probe(target, ignore_free_space=ignore_free_space)[0] for target in targets]
    writing = sum(need / rate for need, rate in zip(needs, rates, strict=True)) / len(devices)
    shared = source.stat().st_dev in devices
    return sum(needs) / reading + writing if shared else max(sum(needs) / reading, writing)


def _rate(step: Callable[[int], object], limit: int) -> tuple[int, float]:
    """(bytes, bytes per second) of steps of a block each, until the time or `limit` is reached."""
    started, done = time.monotonic(), 0
    while done == 0 or (done + PROBE_BLOCK_BYTES <= limit and time.monotonic() - started < PROBE_SECONDS):
        step(done)
        done += PROBE_BLOCK_BYTES
    return done, min(done, limit) / (time.monotonic() - started)
