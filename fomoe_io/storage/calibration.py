"""What a drive gives at each block size and depth: measured once (io_bench/calibrate.py), read by whoever plans reads.

The engine takes its sub-reads and depth from it, `fomoe-layout pack` the striping.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fomoe_io.errors import FormatError
from fomoe_io.system.files import write_atomically

FORMAT, VERSION = "fomoe-calibration", 1
LIMIT_BYTES = 1 << 20
MOST_BLOCK_BYTES, MOST_DEPTH, MOST_BYTES_PER_SECOND = 1 << 31, 1 << 12, 1e15
"""Beyond these a file is damaged: no read is as long, no queue as deep, no drive as fast."""
SPLIT_GAIN = 1.1
"""Sub-reads must promise so much over whole reads: less is within what a drive's speed wanders."""
SMALLEST_SUB_READ_BYTES = 64 << 10
SATURATED = 0.95
"""Share of the best bandwidth from which on more depth brings nothing but waiting: prefetches in the drive's queue hold
up the demands behind them."""
AGAIN = "fomoe-bench io --filename FILE --calibrate CALIBRATION"


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of random reads.

    Attributes
    ----------
    block_bytes, depth : int
    bytes_per_second, p50_us, p99_us, cpu_us_per_read : float
    """

    block_bytes: int
    depth: int
    bytes_per_second: float
    p50_us: float
    p99_us: float
    cpu_us_per_read: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measurements of one drive.

    Attributes
    ----------
    points : tuple of Point
    engine : str
        Reader that measured.
    direct : bool
    card : dict
        The system they were made on (system_card).
    """

    points: tuple[Point, ...]
    engine: str
    direct: bool
    card: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "engine": self.engine,
            "direct": self.direct,
            "points": [asdict(point) for point in self.points],
            "system": self.card,
        }
        write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        FormatError
            When it is none, or damaged.
        """
        path = Path(path)
        try:
            if path.stat().st_size > LIMIT_BYTES:
                raise ValueError("too large")
            body = json.loads(path.read_bytes())
            if body["format"] != FORMAT or body["version"] != VERSION:
                raise ValueError(f"format {body['format']!r}, version {body['version']!r}")
            points = tuple(_point(fields) for fields in body["points"])
            places = {(point.block_bytes, point.depth) for point in points}
            if not points or len(places) != len({s for s, _ in places}) * len({d for _, d in places}):
                raise ValueError("measurements are missing")
            return cls(points, str(body["engine"]), bool(body["direct"]), dict(body["system"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise FormatError(f"{path} is no calibration file: {error}", hint=AGAIN) from None

    def bytes_per_second(self, block_bytes: float, depth: float) -> float:
        """Bandwidth at a size and depth: interpolated between measurements, flat outside of them.

        Parameters
        ----------
        block_bytes, depth : float
        """
        grid = {(point.block_bytes, point.depth): point.bytes_per_second for point in self.points}
        sizes = sorted({size for size, _ in grid})
        depths = sorted({depth for _, depth in grid})
        small, large, s = _between(sizes, block_bytes)
        shallow, deep, d = _between(depths, depth)
        rows = [(1 - d) * math.log(grid[size, shallow]) + d * math.log(grid[size, deep]) for size in (small, large)]
        return math.exp((1 - s) * rows[0] + s * rows[1])

    def read_seconds(self, record_bytes: int, records: int = 1, sub_read_bytes: int = 0) -> float:
        """Time until so many records are in memory when nothing else reads.

        Parameters
        ----------
        record_bytes : int
        records : int
        sub_read_bytes : int
            0: whole records.
        """
        block = min(sub_read_bytes or record_bytes, record_bytes)
        return records * record_bytes / self.bytes_per_second(block, records * math.ceil(record_bytes / block))

    def sub_read_bytes(self, record_bytes: int) -> int:
        """Size of sub-reads that brings in a single missing record soonest; 0 when cutting it gains too little.

        Parameters
        ----------
        record_bytes : int
        """
        sizes = {point.block_bytes for point in self.points}
        candidates = [size for size in sorted(sizes) if SMALLEST_SUB_READ_BYTES <= size < record_bytes]
        best = min(candidates, key=lambda size: self.read_seconds(record_bytes, 1, size), default=0)
        if not best or self.read_seconds(record_bytes) < SPLIT_GAIN * self.read_seconds(record_bytes, 1, best):
            return 0
        return best

    def depth(self, block_bytes: int) -> int:
        """The least measured depth that gives reads of this size all the bandwidth there is.

        Parameters
        ----------
        block_bytes : int
        """
        rates = {depth: self.bytes_per_second(block_bytes, depth) for depth in {point.depth for point in self.points}}
        return min(depth for depth, rate in rates.items() if rate >= SATURATED * max(rates.values()))

    def reads(self, record_bytes: int) -> tuple[int, int]:
        """Depth and size of sub-reads (0: none) that suit records of this size."""
        sub_read = self.sub_read_bytes(record_bytes)
        block = sub_read or record_bytes
        return max(self.depth(block), math.ceil(record_bytes / block)), sub_read

    def best_bytes_per_second(self, block_bytes: int) -> float:
        """Bandwidth of reads of this size at the depth that suits them."""
        return self.bytes_per_second(block_bytes, self.depth(block_bytes))


def _point(fields: Any) -> Point:
    point = Point(**{name: fields[name] for name in Point.__dataclass_fields__})
    numbers = asdict(point).values()
    if not all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("a measurement is no number")
    if type(point.block_bytes) is not int or type(point.depth) is not int:
        raise ValueError("a size or depth is not whole")
    if not (1 <= point.block_bytes <= MOST_BLOCK_BYTES and 1 <= point.depth <= MOST_DEPTH):
        raise ValueError("a size or depth makes no sense")
    if not 0 < point.bytes_per_second <= MOST_BYTES_PER_SECOND:
        raise ValueError("a bandwidth makes no sense")
    return point


def _between(values: Sequence[int], value: float) -> tuple[int, int, float]:
    """The neighbours of a value, and how far it is from the first to the second on a logarithmic scale (0..1)."""
    if value <= values[0]:
        return values[0], values[0], 0.0
    if value >= values[-1]:
        return values[-1], values[-1], 0.0
    above = next(i for i, candidate in enumerate(values) if candidate >= value)
    low, high = values[above - 1], values[above]
    return low, high, math.log(value / low) / math.log(high / low)
