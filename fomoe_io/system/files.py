"""Writing files so that a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from fomoe_io.errors import UsageError


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


def check_targets(paths: Iterable[Path | None]) -> None:
    """Refuse what can't become a file before the work whose result it should hold; None is skipped.

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)
