"""Readers: aligned reads of a list of files straight into memory, many at a time.

Two of one interface: io_uring (`_uring`), and a pool of pread threads (`_pread`) where io_uring is forbidden.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fomoe_io._io_load import PacedReader
from fomoe_io._pread import PreadReader
from fomoe_io._uring import MODES, UringReader
from fomoe_io.errors import ReadError, UsageError
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.read_files import ReadFiles, read_fault
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, round_up

HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT = LEAST_BLOCK_BYTES
"""Of offsets, sizes and targets, unless a file's drive has larger blocks (`Reader.block_bytes`)."""
MOST_DEPTH = 4096
TRIED_BYTES = 1 << 20
"""Of a file without a drive behind it, to see what a ring makes of it: as much as any file system answers at once."""
UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES}
"""Answers to a read that speak of the ring, not of the drive."""
IO_URING_FIX = "sudo sysctl -w kernel.io_uring_disabled=0"

ReadRequest = tuple[int, int, int, int]
"""(file index, offset, address of the target, bytes); offset and bytes multiples of `Reader.block_bytes`, address of
4096."""


class NativeReader(Protocol):
    """What `_uring.UringReader` and `_pread.PreadReader` have in common."""

    name: str
    mode: str
    files: ReadFiles
    buffers_registered: bool
    registration_error: str

    @property
    def address(self) -> int: ...
    @property
    def last_error(self) -> str: ...
    @property
    def last_fix(self) -> str: ...
    @property
    def counters(self) -> dict[str, Any]: ...
    def register_buffers(self, address: int, size: int) -> bool: ...
    def close(self) -> None: ...


class _Read(ctypes.Structure):
    """csrc/read/reader.h, fomoe_read."""

    _fields_ = (
        ("tag", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("bytes", ctypes.c_uint32),
        ("file", ctypes.c_uint16),
        ("priority", ctypes.c_uint16),
    )


class _Completion(ctypes.Structure):
    """csrc/read/reader.h, fomoe_completion."""

    _fields_ = (("tag", ctypes.c_uint64), ("error", ctypes.c_int32))


class _Table(ctypes.Structure):
    """csrc/read/reader.h, fomoe_reader.  ctypes releases the GIL during the calls."""

    _fields_ = (
        ("self", ctypes.c_void_p),
        ("submit", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)),
        ("reap", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
        ("promote", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)),
        ("cancel", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)),
        ("wait", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)),
    )


class Reader:
    """A native reader and the Python calls on it.

    Attributes
    ----------
    name : {"uring", "pread"}
    mode : str
        How the ring was set up (a key of `_uring.MODES`), or "threads".
    direct : bool
        Reads of all files bypass the page cache.
    block_bytes : int
        What offsets and sizes of reads must be multiples of.
    notes : list of str
        What is not as it was asked for, and why: pread instead of io_uring, reads through the page cache.
    depth : int
        Reads in flight at most, for each drive.
    sub_read_bytes : int
        Longer reads are cut into pieces of this size; 0: not cut.
    drives : int
        Drives that the files lie on.
    paths : list of str
    sizes : list of int
        Bytes of each file when it was opened.
    fallback_reason : str or None
        Why `auto` took pread.
    """

    PIECE_BYTES = 4 << 20
    """Blocking reads are cut into pieces of this size, so that several are in flight."""

    WAIT_MS = 100
    """Of one native wait: signal handlers run between them."""

    def __init__(
        self, native: NativeReader, depth: int, sub_read_bytes: int = 0, fallback_reason: str | None = None
    ) -> None:
        self._native = native
        self._table = _Table.from_address(native.address)
        self._open = True
        self.fallback_reason = fallback_reason
        self.name = native.name
        self.mode = native.mode
        self.depth = depth
        self.sub_read_bytes = sub_read_bytes
        self.direct = native.files.direct
        self.block_bytes = native.files.block_bytes
        self.notes = list(native.files.notes)
        if fallback_reason is not None:
            self.notes.append(f"{fallback_reason}; reading with pread threads instead")
        self.drives = native.files.drive_count
        self.paths = native.files.paths
        self.sizes = native.files.sizes

    @property
    def address(self) -> int:
        """Address of the C function table, for the engine."""
        return self._native.address

    @property
    def last_error(self) -> str:
        """File, offset and cause of the last failed read; empty when none has failed."""
        return self._native.last_error

    @property
    def last_fix(self) -> str:
        """What mends the last failed read."""
        return self._native.last_fix

    @property
    def counters(self) -> dict[str, Any]:
        """So far: reads, sub_reads, bytes, short_reads, retries, cancelled, errors, failovers.

        io_uring also has submits and waits (system calls), and depths: how often the ring was left with so
        many sub-reads in flight.
        """
        return self._native.counters

    @property
    def buffers_registered(self) -> bool:
        """Whether the kernel has pinned the slots once for all reads."""
        return self._native.buffers_registered

    def register_buffers(self, address: int, size: int) -> bool:
        """Register memory that reads will land in; False, and `registration_error`, when the kernel refuses."""
        return self._native.register_buffers(address, size)

    @property
    def registration_error(self) -> str:
        """Why memory is not registered: the limit of locked memory, or a reader that has no use for it."""
        return self._native.registration_error

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
            raise ReadError(self.last_error or os.strerror(-error), hint=self.last_fix or None)

    def reap(self, most: int = 64, *, wait: bool = True) -> list[tuple[int, int]]:
        """Completions as (tag, 0 or negative errno); empty when nothing is in flight (or ready)."""
        done = (_Completion * most)()
        while wait and not self._table.wait(self._table.self, self.WAIT_MS):
            pass
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
            Names the file and offset; no read is in flight any more, nor after an interrupt.
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
        try:
            while left:
                done = self.reap()
                left -= len(done)
                failed = failed or next((error for _, error in done if error), 0)
        except BaseException:
            for tag in range(len(pieces)):
                self.cancel(tag)
            while self.reap():
                pass
            raise
        if failed:
            raise ReadError(self.last_error or read_fault(-failed, 0, 0).reason, hint=self.last_fix or None)

    def close(self) -> None:
        """Wait for what is in flight and close the files.  Idempotent."""
        self._open = False
        self._native.close()
        self._native.files.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            warnings.warn(f"unclosed reader of {self.paths}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def open_reader(
    paths: Sequence[str | Path],
    *,
    engine: str = "auto",
    depth: int = 64,
    direct: bool = True,
    sub_read_bytes: int = 0,
    mirrors: Mapping[int, int] | None = None,
    mode: str = "auto",
    write: bool = False,
    pace: Pace | None = None,
    beside: Reader | None = None,
) -> Reader:
    """Open files for reading.

    Parameters
    ----------
    paths : sequence of path
    engine : {"auto", "uring", "pread"}
        `auto` takes io_uring, or pread where the kernel refuses it (`Reader.fallback_reason` says why).
    depth : int
        Reads in flight at most, for each drive.
    direct : bool
        O_DIRECT, where direct reads of the files work (`Reader.notes` says where they do not).
    sub_read_bytes : int
        Longer reads are cut into pieces of this size, a multiple of 4096, which are read side by side; 0: not cut.
        Rounded up to blocks of the files.
    mirrors : mapping of int to int, optional
        file index -> index of a file of `paths` with the same bytes.  A read takes the copy whose drive has less
        to do, and the other when it fails.
    mode : str
        How to set up the ring: "auto" (coop, or plain on kernels before 5.19), or a key of `_uring.MODES`.  A page
        is read with it first, and `auto` goes on to pread when that is refused.
        In mode "defer" a reader belongs to the thread that first submits to it.
    write : bool
        Write the targets to the files instead of reading them (benchmarks only).
    pace : Pace, optional
        Hold completions back as a drive of that bandwidth and latency would (benchmarks only).
    beside : Reader, optional
        Another reader of the same drive: with a pace, they share its bandwidth.

    Raises
    ------
    UsageError
        Options that do not go together, or io_uring was asked for by name and is not available.
    OSError
        A file can't be opened.
    """
    _check_options(paths, engine, depth, sub_read_bytes, mode)
    files = ReadFiles(paths, direct=direct, mirrors=mirrors, write=write)
    sub_read_bytes = round_up(sub_read_bytes, files.block_bytes)
    try:
        if engine == "pread":
            native: NativeReader = PreadReader(files, depth=depth, sub_read_bytes=sub_read_bytes, write=write)
            return Reader(_paced(native, pace, depth, beside), depth, sub_read_bytes)
        try:
            ring = _open_ring(files, depth, sub_read_bytes, mode, write)
            return Reader(_paced(ring, pace, depth, beside), depth, sub_read_bytes)
        except OSError as error:
            fix = ring_fix(error.errno or 0)
            if engine == "uring" or mode != "auto":
                hint = f"{fix}, or --reader pread" if fix else "--reader pread"
                raise UsageError(error.strerror or str(error), hint=hint) from None
            reason = f"{error.strerror} ({fix})" if fix else error.strerror
        native = PreadReader(files, depth=depth, sub_read_bytes=sub_read_bytes, write=write)
        return Reader(_paced(native, pace, depth, beside), depth, sub_read_bytes, reason)
    except BaseException:
        files.close()
        raise


def ring_fix(code: int) -> str:
    """The command that mends a ring refused with this errno; empty where none does."""
    if code in (errno.EPERM, errno.EACCES):
        return IO_URING_FIX if io_uring_disabled() else "allow io_uring in the container (seccomp profile)"
    return {errno.ENOMEM: "ulimit -l unlimited", errno.EMFILE: "ulimit -n 4096"}.get(code, "")


def io_uring_disabled() -> bool:
    """Whether the system forbids io_uring, to all or to all but a group."""
    try:
        return Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() in ("1", "2")
    except OSError:
        return False


def _check_options(paths: Sequence[str | Path], engine: str, depth: int, sub_read_bytes: int, mode: str) -> None:
    if not paths:
        raise UsageError("a reader was opened without files")
    if engine not in ("auto", "uring", "pread"):
        raise UsageError(f"{engine!r} is no reader", hint="auto, uring or pread")
    if not 1 <= depth <= MOST_DEPTH:
        raise UsageError(f"depth is {depth}, expected 1 to {MOST_DEPTH}")
    if sub_read_bytes % ALIGNMENT or not 0 <= sub_read_bytes < 1 << 31:
        raise UsageError(f"sub-reads of {sub_read_bytes} bytes: expected a multiple of {ALIGNMENT} below 2 GiB, or 0")
    if mode != "auto" and (mode not in MODES or engine == "pread"):
        raise UsageError(f"{mode!r} is no mode of {engine}", hint=f"uring has {', '.join(MODES)}")


def _paced(native: NativeReader, pace: Pace | None, depth: int, beside: Reader | None) -> NativeReader:
    if pace is None:
        return native
    other = None if beside is None else beside._native
    assert other is None or isinstance(other, PacedReader)
    return PacedReader(native, pace.bandwidth, pace.latency_seconds, depth, other)


def _open_ring(files: ReadFiles, depth: int, sub_read_bytes: int, mode: str, write: bool) -> UringReader:
    """A ring in a mode that has made a real read of the first file.

    Raises
    ------
    OSError
        No such mode works here.
    """
    for candidate in ("coop", "plain") if mode == "auto" else (mode,):
        try:
            if not write:
                _try_mode(files, candidate)
            return UringReader(files, depth=depth, sub_read_bytes=sub_read_bytes, mode=candidate, write=write)
        except OSError as error:
            if error.errno != errno.EINVAL or candidate in ("plain", mode):
                raise
    raise AssertionError("the loop returns or raises")


def _try_mode(files: ReadFiles, mode: str) -> None:
    """Read the first file of each drive with a ring of its own.

    A set-up call that succeeds proves nothing: a drive without polled queues answers EOPNOTSUPP to the read, and a
    container may forbid io_uring_enter alone.  Nor does a read that succeeds, where no drive is behind the file: of a
    FUSE file system that answers with less than was asked for, kernels read the rest from a wrong place.

    Raises
    ------
    OSError
        The mode does not work here.  What only says that the drive or the file is damaged is left to the first read
        that somebody wants.
    """
    native = UringReader(files, depth=1, mode=mode)
    memory = aligned_memory(TRIED_BYTES, huge_pages=False)
    try:
        table = _Table.from_address(native.address)
        for file in [files.drives.index(drive) for drive in range(files.drive_count)]:
            if not files.sizes[file]:
                continue
            has_drive = _has_drive(files.descriptors[file])
            size = files.block_bytes if has_drive else TRIED_BYTES
            read, done = _Read(0, 0, memory.address, size, file, 0), _Completion()
            code = table.submit(table.self, ctypes.addressof(read), 1)
            if not code:
                count = table.reap(table.self, ctypes.addressof(done), 1, 1)
                code = done.error if count > 0 else count
            if -code in UNSUPPORTED:
                raise OSError(-code, f"io_uring ({mode}) is not available: {os.strerror(-code)}")
            expected = None if code or has_drive else _first_bytes(files.paths[file], size)
            if expected is not None and memory.view[: files.sizes[file]] != expected:
                raise OSError(errno.EILSEQ, f"io_uring ({mode}) returns wrong bytes from {files.paths[file]}")
    finally:
        native.close()


def _has_drive(descriptor: int) -> bool:
    """Whether a file is a block device or lies on one: others have a major number of 0."""
    status = os.fstat(descriptor)
    return stat.S_ISBLK(status.st_mode) or os.major(status.st_dev) != 0


def _first_bytes(path: str, size: int) -> bytes | None:
    """Of a file, read in the plainest way; None where that fails."""
    data = b""
    try:
        with Path(path).open("rb", buffering=0) as stream:
            while len(data) < size and (more := os.pread(stream.fileno(), size - len(data), len(data))):
                data += more
    except OSError:
        return None
    return data


def probe_modes(path: str | Path, *, direct: bool = True) -> dict[str, str]:
    """Try every way to set up the ring with a real read of a file.

    Returns
    -------
    dict of str to str
        Mode -> "" when it works, else the reason.
    """
    found = {}
    for mode in MODES:
        try:
            open_reader([path], engine="uring", depth=1, mode=mode, direct=direct).close()
            found[mode] = ""
        except UsageError as error:
            found[mode] = error.message.rpartition(": ")[2]
    return found


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
