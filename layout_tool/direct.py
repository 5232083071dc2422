"""Direct I/O in plain Python: aligned buffers, reads and writes of whole blocks, with a buffered way out.

O_DIRECT keeps a copy of hundreds of gigabytes from sweeping everything else out of the page cache.  Some file
systems refuse it; then the same calls run buffered, and `direct` says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from fomoe_io.errors import ReadError, StoreError
from fomoe_io.storage.manifest import PAGE_BYTES, page_up
from fomoe_io.storage.read_files import CHECK_DRIVE, read_fault
from fomoe_io.system.direct_io import MOST_BLOCK_BYTES, REFUSALS, open_direct, round_down, round_up
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


def scratch_buffer(size: int) -> np.ndarray:
    """With room for a block before and after `size` bytes, whatever the blocks of the drive."""
    return aligned_buffer(size + 2 * MOST_BLOCK_BYTES)


class DirectFile:
    """A file opened with O_DIRECT where that works.

    Parameters
    ----------
    path : Path
    size : int, optional
        Create or open for writing, and give the file this size with its blocks reserved.
    unit : int
        Writes begin and end at multiples of this.

    Attributes
    ----------
    direct : bool
    block_bytes : int
        What reads are multiples of.
    reason : str
        Why it is not direct.
    """

    def __init__(self, path: Path, size: int | None = None, *, unit: int = PAGE_BYTES) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        opened = open_direct(path, os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT)
        self._descriptor = opened.descriptor
        self.direct, self.reason = opened.block_bytes > 0, opened.reason
        self.block_bytes = opened.block_bytes or PAGE_BYTES
        if size is None:
            self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
            return
        self.size = size
        if unit % self.block_bytes:
            self._go_buffered(f"written in units of {unit:,} bytes, and the drive has blocks of {self.block_bytes:,}")
        self._reserve(size)

    def _go_buffered(self, reason: str) -> None:
        """Go on through the page cache, under the same descriptor: other threads may be using it."""
        with self._lock:
            if not self.direct:
                return
            access = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_ACCMODE
            buffered = os.open(self.path, access | os.O_CLOEXEC)
            os.dup2(buffered, self._descriptor, inheritable=False)
            os.close(buffered)
            self.direct, self.reason = False, reason

    def _reserve(self, size: int) -> None:
        """Reserve all blocks now: a full drive shows before the first record, and the file lies in few fragments."""
        try:
            reserve(self._descriptor, size)
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.close()
            raise write_error(error, self.path) from error

    def read(self, offset: int, size: int, buffer: np.ndarray) -> np.ndarray:
        """Read a range by whole blocks; returns the view of `buffer` that holds it.

        Raises
        ------
        ReadError
            On an I/O error, or when the file ends before the range does.
        """
        start = round_down(offset, self.block_bytes)
        wanted, least = round_up(offset + size - start, self.block_bytes), offset + size - start
        done = 0
        while True:
            try:
                count = os.preadv(self._descriptor, [buffer[done:wanted].data], start + done)
            except OSError as error:
                if self.direct and error.errno in REFUSALS:
                    self._go_buffered("the file system refuses direct reads")
                    continue
                raise self._read_error(start + done, error.errno or errno.EIO, offset + size) from error
            if done + count >= least:
                return buffer[offset - start : offset - start + size]
            # a direct read that was cut short goes on from a whole block
            more = round_down(count, self.block_bytes) if self.direct else count
            if not more and not self._is_cut(start + done + count) and self.direct:
                self._go_buffered("the file system answers direct reads with less than a block")
            elif not more:
                raise self._read_error(start + done, errno.ENODATA, offset + size)
            done += more

    def _is_cut(self, end: int) -> bool:
        return os.lseek(self._descriptor, 0, os.SEEK_END) <= end

    def _read_error(self, offset: int, code: int, end: int) -> ReadError:
        fault = read_fault(code, max(self.size, end), os.lseek(self._descriptor, 0, os.SEEK_END))
        return ReadError(f"reading {self.path} at {offset:,} failed: {fault.reason}", hint=fault.fix)

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
                if self.direct and error.errno in REFUSALS:
                    self._go_buffered("the file system refuses direct writes")
                    continue
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
    if error.errno == errno.EIO:
        return StoreError(f"writing {path} failed: {error.strerror}: the drive can't write it", hint=CHECK_DRIVE)
    return StoreError(
        f"writing {path} failed: {error.strerror}: the file system refuses it", hint="another file system: --to DIR"
    )


def reserve(descriptor: int, size: int) -> None:
    """fallocate, where the file system has it.

    Not posix_fallocate: where there is none it writes into every block, which takes hours over a network, and into an
    O_DIRECT file not at all.

    Raises
    ------
    OSError
        Such as ENOSPC.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or libc.fallocate
    if size and call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code not in REFUSALS:
            raise OSError(code, os.strerror(code))


def buffered_notes(files: Iterable[DirectFile]) -> list[str]:
    """Why files are read or written through the page cache: a line for each directory and reason."""
    reasons = dict.fromkeys((file.path.parent, file.reason) for file in files if not file.direct)
    return [f"note: {folder}: {reason}; through the page cache" for folder, reason in reasons]


def gather(files: Sequence[DirectFile], pieces: Sequence[Piece], scratch: np.ndarray, out: np.ndarray) -> int:
    """Read pieces to their places in `out`, neighbours by one read through `scratch`.

    Parameters
    ----------
    files : sequence of DirectFile
    pieces : sequence of Piece
    scratch : numpy.ndarray
        Page-aligned uint8; at least two blocks larger than the largest piece (`scratch_buffer`).
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
        end, last, unit = start + size, first + 1, files[file].block_bytes
        while last < len(ordered):
            piece = ordered[last]
            grown = max(end, piece.offset + piece.size)
            if piece.file != file or piece.offset - end > MERGE_GAP_BYTES or _blocks(start, grown, unit) > len(scratch):
                break
            end, last = grown, last + 1
        assert _blocks(start, end, unit) <= len(scratch), f"{format_bytes(size)} do not fit the scratch buffer"
        window = files[file].read(start, end - start, scratch)
        reads += 1
        for piece in ordered[first:last]:
            at = piece.offset - start
            out[piece.place : piece.place + piece.size] = window[at : at + piece.size]
        first = last
    return reads


def _blocks(start: int, end: int, unit: int) -> int:
    return round_up(end, unit) - round_down(start, unit)
