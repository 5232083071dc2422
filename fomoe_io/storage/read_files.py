"""The files that a reader reads: opened once, with the drive each lies on, its mirror and its alignment."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fomoe_io.errors import UsageError
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, Opened, open_direct


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
    restarts : list of int
        Of each file: a read that was cut short goes on from a multiple of this; 1 where reads are not direct.
    block_bytes : int
        What offsets and sizes of reads must be multiples of: the largest logical block of the files, at least 4096.
    direct : bool
        Whether reads of all files are direct.
    notes : list of str
        Why reads of some are not, though that was asked for; a line for each directory.

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
        self.descriptors: list[int] = []
        self.sizes: list[int] = []
        blocks: list[int] = []
        devices: list[int] = []
        reasons: dict[str, str] = {}
        try:
            for path in self.paths:
                opened = _open(path, os.O_WRONLY if write else os.O_RDONLY, direct)
                self.descriptors.append(opened.descriptor)
                blocks.append(opened.block_bytes)
                if opened.reason:
                    reasons.setdefault(str(Path(path).parent), opened.reason)
                devices.append(os.fstat(opened.descriptor).st_dev)
                self.sizes.append(os.lseek(opened.descriptor, 0, os.SEEK_END))  # block devices have no st_size
            order = list(dict.fromkeys(devices))
            self.drives = [order.index(device) for device in devices]
            self.drive_count = len(order)
            self.mirrors = [self._mirror(file, (mirrors or {}).get(file, -1)) for file in range(len(self.paths))]
        except BaseException:
            self.close()
            raise
        self.direct = all(blocks)
        self.block_bytes = max([LEAST_BLOCK_BYTES, *blocks])
        self.restarts = [self.block_bytes if block else 1 for block in blocks]
        self.notes = [f"{folder}: {reason}; reading through the page cache" for folder, reason in reasons.items()]

    def _mirror(self, file: int, other: int) -> int:
        if other < 0:
            return -1
        if other == file or other >= len(self.paths) or self.sizes[other] != self.sizes[file]:
            raise UsageError(f"{self.paths[file]} and file number {other} are no mirrors: they differ in size")
        return other

    def describe_error(self, file: int, offset: int, code: int) -> str:
        """`PATH at offset N: reason`."""
        return f"{self.paths[file]} at offset {offset}: {self._fault(file, offset, code).reason}"

    def mend_error(self, file: int, offset: int, code: int) -> str:
        """What mends such an error."""
        return self._fault(file, offset, code).fix

    def _fault(self, file: int, offset: int, code: int) -> ReadFault:
        now = os.lseek(self.descriptors[file], 0, os.SEEK_END) if self.descriptors else self.sizes[file]
        if code == errno.EINVAL and offset >= self.sizes[file]:
            return ReadFault(f"past the end of the file ({self.sizes[file]:,} bytes)", "fomoe-layout verify STORE")
        if code == errno.EINVAL and offset % self.restarts[file]:
            return ReadFault(f"no multiple of the drive's blocks of {self.block_bytes:,} bytes", "--reader pread")
        return read_fault(code, self.sizes[file], now)

    def close(self) -> None:
        """Close the files.  Idempotent."""
        descriptors, self.descriptors = self.descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


def _open(path: str, access: int, direct: bool) -> Opened:
    return open_direct(path, access) if direct else Opened(os.open(path, access | os.O_CLOEXEC), 0, "")


class ReadFault(NamedTuple):
    """Why a read failed, and what mends it."""

    reason: str
    fix: str


CHECK_DRIVE = "check the drive: dmesg | tail, smartctl -a"
_FAULTS = {
    errno.EINVAL: ReadFault(
        "the file system refuses this direct read (Invalid argument)", "copy the file to ext4 or xfs"
    ),
    errno.EOPNOTSUPP: ReadFault("the file system does not support this read", "copy the file to ext4 or xfs"),
    errno.EAGAIN: ReadFault("the kernel has put this read off again and again", "fewer reads at once: --reader pread"),
    errno.ENOMEM: ReadFault(
        "the kernel has no memory for this read (Cannot allocate memory)",
        "a smaller --ram; ulimit -l unlimited, where locked memory is what it lacks",
    ),
    errno.EIO: ReadFault("Input/output error: the drive can't read it", CHECK_DRIVE),
    errno.ESTALE: ReadFault("the network file system has lost the file (Stale file handle)", "mount it again"),
    errno.ENOTCONN: ReadFault("the program behind this file system has ended", "mount it again"),
    errno.EBADF: ReadFault("the file was closed while it was read", "open the model again"),
}


def read_fault(code: int, bytes_expected: int, bytes_now: int) -> ReadFault:
    """What a failed read means.

    Parameters
    ----------
    code : int
        A positive errno; ENODATA where bytes were missing.
    bytes_expected, bytes_now : int
        The size that the file should have, and has at this moment.
    """
    if code == errno.ENODATA and bytes_now < bytes_expected:
        return ReadFault(
            f"the file ends before, at byte {bytes_now:,} of {bytes_expected:,}: it was cut while in use",
            "copy or pack it again",
        )
    if code == errno.ENODATA:
        return ReadFault(
            "the file ends before, though its size says otherwise: the file system returns less than was asked for",
            "copy the file to ext4 or xfs",
        )
    return _FAULTS.get(code) or ReadFault(os.strerror(code), CHECK_DRIVE)
