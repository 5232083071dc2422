"""The files that a reader reads: opened once, with the drive each lies on and its mirror."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fomoe_io.errors import UsageError


class ReadFiles:
    """Open files.

    Parameters
    ----------
    paths : sequence of path
    direct : bool
        O_DIRECT, where the file systems have it.
    mirrors : mapping of int to int, optional
        file index -> index of another file of the list that holds the same bytes.
    write : bool
        Open for writing (benchmarks only).

    Attributes
    ----------
    paths : list of str
    descriptors, sizes, drives, mirrors : list of int
        Of each file; sizes in bytes, as they were when the file was opened; drives count from 0 in order of
        appearance (files of one drive have the same `st_dev`); mirrors are -1 where there is none.
    direct : bool
        Whether all files were opened with O_DIRECT.

    Raises
    ------
    OSError
        A file can't be opened.
    UsageError
        A mirror has another size.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        direct: bool = True,
        mirrors: Mapping[int, int] | None = None,
        write: bool = False,
    ) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.direct = direct
        self.descriptors: list[int] = []
        self.sizes: list[int] = []
        devices: list[int] = []
        try:
            for path in self.paths:
                self.descriptors.append(self._open(path, os.O_WRONLY if write else os.O_RDONLY))
                status = os.fstat(self.descriptors[-1])
                devices.append(status.st_dev)
                self.sizes.append(os.lseek(self.descriptors[-1], 0, os.SEEK_END))  # block devices have no st_size
            order = list(dict.fromkeys(devices))
            self.drives = [order.index(device) for device in devices]
            self.drive_count = len(order)
            self.mirrors = [self._mirror(file, (mirrors or {}).get(file, -1)) for file in range(len(self.paths))]
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, access: int) -> int:
        if self.direct:
            try:
                return os.open(path, access | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False  # the file system has no direct I/O
        return os.open(path, access | os.O_CLOEXEC)

    def _mirror(self, file: int, other: int) -> int:
        if other < 0:
            return -1
        if other == file or other >= len(self.paths) or self.sizes[other] != self.sizes[file]:
            raise UsageError(f"{self.paths[file]} and file number {other} are no mirrors: they differ in size")
        return other

    def describe_error(self, file: int, offset: int, code: int) -> str:
        """`PATH at offset N: reason`."""
        if code == errno.ENODATA:
            reason = "the file ends before (cut since it was opened?)"
        elif code == errno.EINVAL and offset >= self.sizes[file]:
            reason = f"past the end of the file ({self.sizes[file]:,} bytes)"
        else:
            reason = os.strerror(code)
        return f"{self.paths[file]} at offset {offset}: {reason}"

    def close(self) -> None:
        """Close the files.  Idempotent."""
        descriptors, self.descriptors = self.descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)
