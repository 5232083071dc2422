"""Measuring a calibration: random reads of a file at every size and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from fomoe_io.errors import UsageError
from fomoe_io.io_bench.job import IOJob
from fomoe_io.io_bench.run import file_bytes, run_jobs
from fomoe_io.storage.calibration import Calibration, Point
from fomoe_io.storage.read_files import ReadFiles
from fomoe_io.system.direct_io import round_up
from fomoe_io.system.system_card import system_card

SIZES_BYTES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 4, 8, 16, 32)
POINT_SECONDS = 1.0


def sizes_within(path: Path, sizes: Sequence[int] = SIZES_BYTES, *, direct: bool = True) -> list[int]:
    """The sizes of reads that a file or a device has room for, in blocks of its drive.

    Raises
    ------
    UsageError
        There is none, and so nothing to measure.
    """
    found = file_bytes(path)
    with closing(ReadFiles([path], direct=direct)) as files:
        sizes = sorted({round_up(size, files.block_bytes) for size in sizes})
    fitting = [size for size in sizes if size <= found]
    if not fitting:
        raise UsageError(
            f"{path} has {found:,} bytes, the smallest read to measure {min(sizes):,}",
            hint="--filename FILE of a file much larger than any cache of the drive",
        )
    return fitting


def calibrate(
    path: Path,
    *,
    engine: str = "auto",
    direct: bool = True,
    sizes: Sequence[int] = SIZES_BYTES,
    depths: Sequence[int] = DEPTHS,
    seconds: float = POINT_SECONDS,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure random reads of a file at every size and depth.

    Parameters
    ----------
    path : Path
        The drive's block device, or a file of it, much larger than any cache of it.
    engine : str
    direct : bool
    sizes, depths : sequence of int
        Sizes larger than the file are left out.
    seconds : float
        For each point.
    progress : callable, optional
        Called with the number of points that are done, after each.

    Raises
    ------
    UsageError
        The file is smaller than every size.
    """
    points, used, is_direct = [], engine, direct
    for size in sizes_within(path, sizes, direct=direct):
        for depth in depths:
            job = IOJob(
                filenames=(path,),
                block_bytes=size,
                depth=depth,
                runtime_seconds=seconds,
                time_based=True,
                direct=direct,
                engine=engine,
            )
            result = run_jobs([job])[0]
            used, is_direct = result.engine, result.direct
            p50, p99 = (result.percentile_ns(p) / 1e3 for p in (50, 99))
            points.append(Point(size, depth, result.bytes_per_second, p50, p99, result.cpu_us_per_read))
            if progress is not None:
                progress(len(points))
    return Calibration(tuple(points), used, is_direct, system_card([path]))
