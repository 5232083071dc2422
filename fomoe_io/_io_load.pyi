from typing import Any

import numpy as np

from fomoe_io.storage.read_files import ReadFiles

LATENCY_STEP_BITS: int
LATENCY_BINS: int
PLAN: np.dtype[np.void]
"""One planned read: offset and bytes (multiples of 4096 for direct reads), file index."""

class MmapReader:
    """Reads as copies out of a memory map: the table of csrc/read/reader.h, for comparisons."""

    name: str
    mode: str
    files: ReadFiles
    buffers_registered: bool
    registration_error: str
    last_error: str

    def __init__(self, files: ReadFiles, *, depth: int = 64, random_access: bool = True) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def counters(self) -> dict[str, Any]: ...
    def register_buffers(self, address: int, size: int) -> bool: ...
    def close(self) -> None: ...

class PacedReader:
    """Another native reader at the pace of a drive (csrc/read/paced_reader.h); what is not here is the other's.

    Parameters
    ----------
    inner : NativeReader
        Faster than the pace; its counters gain `paced_late` and `paced_late_seconds`, which say whether it was.
    bandwidth : float
        Bytes a second.
    latency_seconds : float
    depth : int
        Reads in the drive at most, as in the other reader's.
    beside : PacedReader, optional
        Another reader of the same drive: they share its bandwidth.
    """

    name: str
    files: ReadFiles
    buffers_registered: bool
    registration_error: str
    last_error: str
    last_fix: str
    mode: str

    def __init__(
        self, inner: Any, bandwidth: float, latency_seconds: float, depth: int, beside: PacedReader | None = None
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def counters(self) -> dict[str, Any]: ...
    def register_buffers(self, address: int, size: int) -> bool: ...
    def close(self) -> None: ...

class Load:
    """Keeps a reader at a depth with reads from a plan and counts latencies (csrc/read/io_load.h).

    Parameters
    ----------
    plan : numpy.ndarray
        PLAN records, walked again and again.
    depth : int
        Reads in flight, 1 to FOMOE_MOST_LOAD_DEPTH (csrc/read/io_load.h).
    buffers : int
        Address of `depth` buffers of `buffer_bytes`.
    memory : object
        What owns the buffers.
    most_reads : int
        Stop after so many; 0: no limit.
    duration_seconds, ramp_seconds : float
        Stop after so long (0: no limit); nothing is counted during the ramp before.
    """

    plan: np.ndarray
    memory: object
    error: int

    def __init__(
        self,
        plan: np.ndarray,
        *,
        depth: int,
        buffers: int,
        buffer_bytes: int,
        memory: object = None,
        most_reads: int = 0,
        duration_seconds: float = 0,
        ramp_seconds: float = 0,
    ) -> None: ...
    def run(self, reader: int) -> int:
        """Run to the end, without the GIL; 0 or the negative errno of the first read that failed."""
    def stop(self) -> None:
        """Start nothing more; from any thread."""
    def progress(self) -> tuple[int, int]:
        """(reads, bytes) counted so far; from any thread."""
    def result(self) -> dict[str, Any]:
        """Counters, in ns and bytes; `latency` by bin and `in_flight` by depth as int64 arrays."""
