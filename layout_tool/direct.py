"""Direct I/O in plain Python: aligned buffers, whole-page reads and writes, with a buffered way out.

O_DIRECT keeps a copy of hundreds of gigabytes from sweeping everything else out of the page cache.  Some file
systems refuse it; then the same calls run buffered, and `direct` says so.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from fomoe_io.errors import ReadError, StoreError
from fomoe_io.storage.manifest import PAGE_BYTES, page_up
from fomoe_io.units import format_bytes

MERGE_GAP_BYTES = 64 << 10
"""Two ranges closer than this are one read: 64 KiB take a drive less time than another request."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Piece(NamedTuple):
    """`size` bytes at `offset` of file number `file`, wanted at `place` of a buffer."""

    file: int
    offset: int
    size: int
    place: int


def aligned_buffer(size: int) -> np.ndarray:
    """uint8 [size rounded up to pages], page-aligned and zero."""
    return np.frombuffer(mmap.mmap(-1, page_up(max(size, 1))), np.uint8)


class DirectFile:
    """A file opened with O_DIRECT where possible.

    Parameters
    ----------
    path : Path
    size : int, optional
        Create or open for writing, and give the file this size with its blocks reserved.

    Attributes
    ----------
    direct : bool
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self._descriptor = -1
        flags = os.O_CLOEXEC | (os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT)
        self.direct = True
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
            os.preadv(self._descriptor, [aligned_buffer(PAGE_BYTES).data], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.close()
            self.direct = False
            self._descriptor = os.open(path, flags, 0o644)
        if size is not None:
            self._reserve(size)

    def _reserve(self, size: int) -> None:
        """Reserve all blocks now: a full drive shows before the first record, and the file lies in few fragments."""
        try:
            os.posix_fallocate(self._descriptor, 0, size)
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.close()
            raise write_error(error, self.path) from error

    def read(self, offset: int, size: int, buffer: np.ndarray) -> np.ndarray:
        """Read a range by whole pages; returns the view of `buffer` that holds it.

        Raises
        ------
        ReadError
            On an I/O error, or when the file ends before the range does.
        """
        start = offset // PAGE_BYTES * PAGE_BYTES
        wanted, least = page_up(offset + size - start), offset + size - start
        done = 0
        while True:
            try:
                count = os.preadv(self._descriptor, [buffer[done:wanted].data], start + done)
            except OSError as error:
                raise ReadError(
                    f"reading {self.path} at {start + done:,} failed: {error.strerror}",
                    hint="check the drive: dmesg | tail, smartctl -a",
                ) from error
            if done + count >= least:
                return buffer[offset - start : offset - start + size]
            # A short read is continued from a whole page; one of less than a page ends at the end of the file.
            if count < PAGE_BYTES:
                raise ReadError(f"{self.path} ends before byte {offset + size:,}: it was cut while in use")
            done += count // PAGE_BYTES * PAGE_BYTES

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write whole pages.

        Raises
        ------
        StoreError
            When the drive is full or refuses.
        """
        done = 0
        while done < len(data):
            try:
                done += os.pwritev(self._descriptor, [data[done:].data], offset + done)
            except OSError as error:
                raise write_error(error, self.path) from error

    def sync(self) -> None:
        """Have everything written so far on the drive."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise write_error(error, self.path) from error

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            if not self.direct:
                # Buffered after all: at least leave the page cache to others.
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_error(error: OSError, path: Path) -> StoreError:
    """What a failed write means to the user."""
    if error.errno in _NO_SPACE:
        return StoreError(
            f"writing {path} failed: {error.strerror}",
            hint=f"free space on the drive of {path.parent}, then run the same command again: it continues",
        )
    if error.errno == errno.EROFS:
        return StoreError(f"{path.parent} is read-only", hint="give a directory that can be written: --to DIR")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreError(f"{path} may not be written: {error.strerror}", hint=f"check the owner: ls -ld {path.parent}")
    return StoreError(f"writing {path} failed: {error.strerror}", hint="check the drive: dmesg | tail, smartctl -a")


def gather(files: Sequence[DirectFile], pieces: Sequence[Piece], scratch: np.ndarray, out: np.ndarray) -> int:
    """Read pieces to their places in `out`, neighbours by one read through `scratch`.

    Parameters
    ----------
    files : sequence of DirectFile
    pieces : sequence of Piece
    scratch : numpy.ndarray
        Page-aligned uint8; at least two pages larger than the largest piece.
    out : numpy.ndarray
        uint8

    Returns
    -------
    int
        Number of reads.
    """
    ordered = sorted(pieces)
    reads = first = 0
    while first < len(ordered):
        file, start, size, _ = ordered[first]
        end, last = start + size, first + 1
        while last < len(ordered):
            piece = ordered[last]
            grown = max(end, piece.offset + piece.size)
            if piece.file != file or piece.offset - end > MERGE_GAP_BYTES or _pages(start, grown) > len(scratch):
                break
            end, last = grown, last + 1
        assert _pages(start, end) <= len(scratch), f"{format_bytes(size)} do not fit the scratch buffer"
        window = files[file].read(start, end - start, scratch)
        reads += 1
        for piece in ordered[first:last]:
            at = piece.offset - start
            out[piece.place : piece.place + piece.size] = window[at : at + piece.size]
        first = last
    return reads


def _pages(start: int, end: int) -> int:
    return page_up(end) - start // PAGE_BYTES * PAGE_BYTES
