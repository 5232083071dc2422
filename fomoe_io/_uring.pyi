from typing import Any

from fomoe_io.storage.read_files import ReadFiles

LIBURING_VERSION: str
"""That this was built against."""

MODES: dict[str, int]
"""Names of ring set-ups and their IORING_SETUP_* flags."""

class UringReader:
    """io_uring over a list of files: the table of csrc/read/reader.h.

    Parameters
    ----------
    files : ReadFiles
        Open files; they must outlive the reader.
    depth : int
        Reads in flight at most, for each drive.
    sub_read_bytes : int
        Longer reads are cut into pieces of this size, a multiple of 4096; 0: not cut.
    mode : str
        A key of MODES.
    write : bool
        Write the targets to the files instead (benchmarks only).

    Raises
    ------
    OSError
        The kernel refuses the ring or the mode.
    """

    name: str
    files: ReadFiles
    mode: str
    buffers_registered: bool
    registration_error: str
    """Why register_buffers returned False."""

    def __init__(
        self, files: ReadFiles, *, depth: int = 64, sub_read_bytes: int = 0, mode: str = "coop", write: bool = False
    ) -> None: ...
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
        """Let the kernel pin this memory once; False (and plain reads) when it refuses."""
    def close(self) -> None:
        """Wait for what is in flight and close the ring.  Idempotent."""
