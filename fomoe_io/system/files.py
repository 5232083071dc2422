"""Writing files so that a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

from fomoe_io.errors import UsageError

TEMPORARY = ".tmp"
"""Files that are being written are called .NAME.PROCESS-RANDOM.tmp."""


def cache_folder() -> Path:
    """What can be made again: ``$FOMOE_CACHE``, or ``fomoe_io`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises
    ------
    UsageError
        No variable is set and the user has no home directory, as in some containers.
    """
    if chosen := os.environ.get("FOMOE_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fomoe_io"
    except RuntimeError:
        raise UsageError("there is no home directory to keep a cache in", hint="FOMOE_CACHE=DIR") from None


def check_targets(paths: Iterable[Path | None], *, makes_directories: bool = False) -> None:
    """Refuse what can't become a file before the work whose result it should hold; None is skipped.

    Parameters
    ----------
    paths : iterable of Path or None
    makes_directories : bool
        Directories above it that are missing will be made.

    Raises
    ------
    OSError
        A path is a directory, or would lie in a directory that does not exist or may not be written.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise _os_error(errno.EISDIR, path)
        if makes_directories:
            above = next(p for p in path.absolute().parents if p.exists())
            if not above.is_dir():
                raise _os_error(errno.ENOTDIR, above)
            if above != path.absolute().parent:
                if not os.access(above, os.W_OK):
                    raise _os_error(errno.EACCES, above)
                continue
        if not path.exists() and not path.parent.is_dir():
            raise _os_error(errno.ENOENT, path)
        if not os.access(path.parent if _is_replaced(path) else path, os.W_OK):
            raise _os_error(errno.EACCES, path)


def _is_replaced(path: Path) -> bool:
    """Whether a new file takes the name; devices and pipes are written into.

    /dev/stdout and /proc/self/fd/1 may lead to a file, and must not be replaced by another.
    """
    return (path.is_file() or not path.exists()) and path.absolute().parts[1] not in ("dev", "proc")


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename; straight into a device or a pipe.

    Temporary files that killed writers of the same path have left are removed.

    Raises
    ------
    OSError
        After removing the temporary file.
    """
    if path.is_dir():
        raise _os_error(errno.EISDIR, path)
    if not _is_replaced(path):
        path.write_bytes(data)
        return
    _remove_stale(path)
    stream = _open_temporary(path)
    temporary = Path(stream.name)
    try:
        with stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)  # still locked
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def _open_temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked for as long as it is open: what is not locked is nobody's any more."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
        stream = cast(BinaryIO, temporary.open("xb"))
        try:
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is ever removed
                fcntl.flock(stream, fcntl.LOCK_EX)
            if os.fstat(stream.fileno()).st_nlink:
                return stream
            stream.close()  # somebody took it for left behind before it was locked
        except BaseException:
            stream.close()
            temporary.unlink(missing_ok=True)
            raise


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are gone.

    A process id would not tell, as containers that share a directory have each their own.
    """
    remove_stale(path.parent, re.escape(path.name))


def remove_stale(folder: Path, name: str) -> None:
    """The same of all files of a folder whose names this expression matches."""
    ours = re.compile(rf"\.{name}\.\d+(-[0-9a-f]+)?{re.escape(TEMPORARY)}")
    with contextlib.suppress(OSError):
        for temporary in [entry for entry in folder.iterdir() if ours.fullmatch(entry.name)]:
            with contextlib.suppress(OSError), temporary.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
