from typing import Any

from fomoe_io.storage.read_files import ReadFiles

MOST_THREADS: int

class PreadReader:
    """A pool of pread threads for each drive: the table of csrc/read/reader.h.

    Parameters
    ----------
    files : ReadFiles
        Open files; they must outlive the reader.
    depth : int
        Reads in flight at most, for each drive; as many threads, at most MOST_THREADS.
    sub_read_bytes : int
        Longer reads are cut into pieces of this size, a multiple of 4096; 0: not cut.
    write : bool
        Write the targets to the files instead (benchmarks only).

    Raises
    ------
    OSError
        The threads could not be started.
    """

    name: str
    files: ReadFiles
    mode: str
    buffers_registered: bool
    registration_error: str

    def __init__(self, files: ReadFiles, *, depth: int = 64, sub_read_bytes: int = 0, write: bool = False) -> None: ...
    @property
    def address(self) -> int:
        """Address of the fomoe_reader table."""
    @property
    def last_error(self) -> str:
        """File, offset and cause of the last failed read; empty when none has failed."""
    @property
    def last_fix(self) -> str:
        """What mends it."""
    @property
    def counters(self) -> dict[str, Any]: ...
    def register_buffers(self, address: int, size: int) -> bool:
        """Nothing to register for pread: False."""
    def close(self) -> None:
        """Wait for what is in flight and stop the threads.  Idempotent."""
