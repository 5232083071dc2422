"""Direct I/O on a file: what its offsets must be multiples of, and whether it works at all.

The kernel is asked (statx since Linux 6.1, or the drive's logical block), and then believed only after real reads:
some file systems let O_DIRECT be opened and refuse every read, others know nothing of their drive.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path
from typing import NamedTuple

LEAST_BLOCK_BYTES = 4096
"""What we read in multiples of anyway: the format's page, and the block of common drives."""
MOST_BLOCK_BYTES = 64 << 10
"""Of the logical blocks of today's drives; what over-reads must find room for."""

REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
"""Answers to a direct read that speak of the file system, not of the drive."""

_AT_EMPTY_PATH, _STATX_DIOALIGN, _STATX_BYTES = 0x1000, 0x2000, 256
_DIO_MEMORY_ALIGN, _DIO_OFFSET_ALIGN = 152, 156
"""Places of both in struct statx."""


class Opened(NamedTuple):
    """An open file.

    Attributes
    ----------
    descriptor : int
    block_bytes : int
        What offsets and sizes of direct reads must be multiples of, at least LEAST_BLOCK_BYTES; 0: not direct.
    reason : str
        Why it is not direct; empty when it is.
    """

    descriptor: int
    block_bytes: int
    reason: str


def round_down(value: int, unit: int) -> int:
    """To a multiple of `unit`."""
    return value // unit * unit


def round_up(value: int, unit: int) -> int:
    """To a multiple of `unit`."""
    return -(-value // unit) * unit


def aligned_window(offset: int, size: int, block_bytes: int = LEAST_BLOCK_BYTES) -> tuple[int, int]:
    """The (offset, bytes) of the whole blocks that cover a range of a file."""
    start = round_down(offset, block_bytes)
    return start, round_up(offset + size, block_bytes) - start


def open_direct(path: str | Path, flags: int) -> Opened:
    """Open a file with O_DIRECT where direct reads of it work, else without.

    Raises
    ------
    OSError
        It can't be opened in either way.
    """
    flags |= os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return Opened(os.open(path, flags, 0o644), 0, "the file system has no direct I/O")
    try:
        block_bytes, reason = _working_block(path, descriptor, flags)
        if block_bytes:
            return Opened(descriptor, block_bytes, "")
        buffered = os.open(path, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return Opened(buffered, 0, reason)


def _working_block(path: str | Path, descriptor: int, flags: int) -> tuple[int, str]:
    """(block that direct reads of the file work with, ""), or (0, why there is none)."""
    stated = stated_block_bytes(descriptor)
    if stated == 0:
        return 0, "the file system has no direct I/O for it"
    block_bytes = max(LEAST_BLOCK_BYTES, stated or 0)
    if block_bytes > MOST_BLOCK_BYTES:
        return 0, f"its drive has blocks of {block_bytes:,} bytes"
    readable = descriptor
    if flags & os.O_ACCMODE == os.O_WRONLY:
        try:
            readable = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return block_bytes, ""
    try:
        while block_bytes <= MOST_BLOCK_BYTES:
            if _reads(readable, block_bytes):
                return block_bytes, ""
            block_bytes *= 2
    finally:
        if readable != descriptor:
            os.close(readable)
    return 0, "the file system opens files for direct I/O and then refuses direct reads"


def stated_block_bytes(descriptor: int) -> int | None:
    """What the kernel says that direct reads must be multiples of; 0: it has none of them; None: it does not say."""
    found = _statx_alignment(descriptor)
    if found is None:
        return _logical_block_bytes(descriptor)
    memory, offset = found
    if memory > LEAST_BLOCK_BYTES:
        return 0  # no drive asks that of memory: its reads would need targets that we do not have
    return offset


def _statx_alignment(descriptor: int) -> tuple[int, int] | None:
    """(of memory, of offsets), or None where the C library, the kernel or the file system has no answer."""
    try:
        statx = ctypes.CDLL(None).statx
    except AttributeError:
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(descriptor, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), buffer):
        return None

    def word(place: int) -> int:
        return int.from_bytes(buffer.raw[place : place + 4], "little")

    if not word(0) & _STATX_DIOALIGN:
        return None
    return word(_DIO_MEMORY_ALIGN), word(_DIO_OFFSET_ALIGN)


def _logical_block_bytes(descriptor: int) -> int | None:
    """Of the drive under a file, or of the drive that the file is."""
    status = os.fstat(descriptor)
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for folder in (device, device / ".."):  # a partition has its queue one level up
        try:
            return int((folder / "queue/logical_block_size").read_text())
        except (OSError, ValueError):
            continue
    return None


def _reads(descriptor: int, block_bytes: int) -> bool:
    """Whether direct reads of a block are answered: the first, the second, and what the file ends with.

    A drive's error is no refusal: it is left to the first read that somebody wants.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    places = {0, block_bytes, round_down(max(0, end - 1), block_bytes)}
    memory = mmap.mmap(-1, block_bytes)
    for place in sorted(place for place in places if place <= end):
        try:
            os.preadv(descriptor, [memory], place)
        except OSError as error:
            if error.errno in REFUSALS:
                return False
    return True
