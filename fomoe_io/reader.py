"""Readers: aligned reads of a list of files straight into memory, many at a time.

Two of one interface: io_uring (`_uring`), and a pool of pread threads (`_pread`) where io_uring is forbidden.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fomoe_io._pread import PreadReader
from fomoe_io._uring import UringReader
from fomoe_io.errors import ReadError, UsageError

HUGE_PAGE_BYTES = 2 << 20

ReadRequest = tuple[int, int, int, int]
"""(file index, offset, address of the target, bytes); offset, address and bytes multiples of 4096."""


class NativeReader(Protocol):
    """What `_uring.UringReader` and `_pread.PreadReader` have in common."""

    name: str
    paths: list[str]
    file_sizes: list[int]
    direct: bool
    address: int
    buffers_registered: bool
    last_error: str
    counters: dict[str, Any]

    def register_buffers(self, address: int, size: int) -> bool: ...
    def close(self) -> None: ...


class _Read(ctypes.Structure):
    """csrc/reader.h, fomoe_read."""

    _fields_ = (
        ("tag", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("bytes", ctypes.c_uint32),
        ("file", ctypes.c_uint16),
        ("priority", ctypes.c_uint16),
    )


class _Completion(ctypes.Structure):
    """csrc/reader.h, fomoe_completion."""

    _fields_ = (("tag", ctypes.c_uint64), ("error", ctypes.c_int32))


class _Table(ctypes.Structure):
    """csrc/reader.h, fomoe_reader.  ctypes releases the GIL during the calls."""

    _fields_ = (
        ("self", ctypes.c_void_p),
        ("submit", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)),
        ("reap", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
        ("promote", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)),
        ("cancel", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)),
    )


class Reader:
    """A native reader and the Python calls on it.

    Attributes
    ----------
    name : str
        "uring" or "pread".
    direct : bool
        Reads bypass the page cache.
    fallback_reason : str or None
        Why `auto` took pread.
    """

    PIECE_BYTES = 4 << 20
    """Blocking reads are cut into pieces of this size, so that several are in flight."""

    def __init__(self, native: NativeReader, fallback_reason: str | None = None) -> None:
        self._native = native
        self._table = _Table.from_address(native.address)
        self.fallback_reason = fallback_reason
        self.name = native.name
        self.direct = native.direct
        self.paths = native.paths
        self.file_sizes = native.file_sizes

    @property
    def address(self) -> int:
        """Address of the C function table, for the engine."""
        return self._native.address

    @property
    def last_error(self) -> str:
        """File, offset and cause of the last failed read; empty when none has failed."""
        return self._native.last_error

    @property
    def counters(self) -> dict[str, Any]:
        """Reads, bytes, short reads, retries and errors so far."""
        return self._native.counters

    @property
    def buffers_registered(self) -> bool:
        """Whether the kernel has pinned the slots once for all reads."""
        return self._native.buffers_registered

    def register_buffers(self, address: int, size: int) -> bool:
        """Register memory that reads will land in; False when the memory limit (ulimit -l) forbids it."""
        return self._native.register_buffers(address, size)

    def submit(self, requests: Sequence[ReadRequest], *, first_tag: int = 0, priority: int = 0) -> None:
        """Start reads, tagged `first_tag`, `first_tag` + 1, ...

        Raises
        ------
        ReadError
            A request lies outside its file, or memory ran out; none was started.
        """
        reads = (_Read * len(requests))()
        for i, (file, offset, address, size) in enumerate(requests):
            if not (0 <= file < len(self.paths)):
                raise ReadError(f"there is no file number {file} ({len(self.paths)} are open)")
            reads[i] = _Read(first_tag + i, offset, address, size, file, priority)
        error = self._table.submit(self._table.self, ctypes.addressof(reads), len(requests))
        if error:
            raise ReadError(self.last_error or os.strerror(-error))

    def reap(self, most: int = 64, *, wait: bool = True) -> list[tuple[int, int]]:
        """Completions as (tag, 0 or negative errno); empty when nothing is in flight (or ready)."""
        done = (_Completion * most)()
        count = self._table.reap(self._table.self, ctypes.addressof(done), most, int(wait))
        if count < 0:
            raise ReadError(f"waiting for reads failed: {os.strerror(-count)}")
        return [(done[i].tag, done[i].error) for i in range(count)]

    def promote(self, tag: int) -> None:
        """Turn a waiting prefetch into a demand."""
        self._table.promote(self._table.self, tag)

    def cancel(self, tag: int) -> None:
        """Ask for a read to be dropped; its completion still arrives."""
        self._table.cancel(self._table.self, tag)

    def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """Read everything and wait.

        Raises
        ------
        ReadError
            Names the file and offset; no read is in flight any more.
        """
        pieces = [
            (file, offset + start, address + start, min(self.PIECE_BYTES, size - start))
            for file, offset, address, size in requests
            for start in range(0, size, self.PIECE_BYTES)
        ]
        if not pieces:
            return
        self.submit(pieces)
        left, failed = len(pieces), 0
        while left:
            done = self.reap()
            left -= len(done)
            failed = failed or next((error for _, error in done if error), 0)
        if failed:
            raise ReadError(self.last_error or os.strerror(-failed), hint="check the drive (dmesg, smartctl)")

    def close(self) -> None:
        """Wait for what is in flight and close the files.  Idempotent."""
        self._native.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(
    paths: Sequence[str | Path], *, engine: str = "auto", depth: int = 64, direct: bool = True
) -> Reader:
    """Open files for reading.

    Parameters
    ----------
    paths : sequence of path
    engine : {"auto", "uring", "pread"}
        `auto` takes io_uring, or pread where the kernel refuses it (`Reader.fallback_reason` says why).
    depth : int
        Reads in flight at most.
    direct : bool
        O_DIRECT, where the file system has it.

    Raises
    ------
    UsageError
        io_uring was asked for by name and is not available.
    OSError
        A file can't be opened.
    """
    names = [os.fspath(path) for path in paths]
    if engine == "pread":
        return Reader(PreadReader(names, depth=depth, direct=direct))
    try:
        return Reader(UringReader(names, depth=depth, direct=direct))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.ENOMEM) or error.filename is not None:
            raise
        if engine == "uring":
            raise UsageError(str(error), hint="sudo sysctl -w kernel.io_uring_disabled=0, or --reader pread") from None
        return Reader(PreadReader(names, depth=depth, direct=direct), str(error))


@dataclass(slots=True)
class Memory:
    """Anonymous memory; `view` is a writable buffer of all of it."""

    address: int
    view: memoryview
    _map: mmap.mmap

    def close(self) -> None:
        """Give it back, unless something still looks at it (then with the last view)."""
        self.view = memoryview(b"")


def aligned_memory(size: int, *, huge_pages: bool = True) -> Memory:
    """Zeroed memory that starts on a 2 MiB boundary, in huge pages where the system gives them.

    Anonymous rather than from an allocator, so that io_uring and a GPU can register it.
    """
    area = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            area.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
                raise
    start = np.frombuffer(area, np.uint8).ctypes.data
    skip = -start % HUGE_PAGE_BYTES
    return Memory(start + skip, memoryview(area)[skip : skip + size], area)
