"""Kept pieces on a drive: files of one folder, within a bound of bytes, the least recently used leaving first."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.kept.piece_file import Head, PieceReader, write_piece
from fomoe_io.system.files import remove_stale

SUFFIX = ".kept"
COUNT_SECONDS = 60.0
"""Between looks at how much others have written."""
PAUSE_SECONDS = 60.0
"""Without further attempts, after a write has failed."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file of this model."""

    path: Path
    head: Head
    tokens: bytes
    seconds: float


class Folder:
    """The files of one model in a folder that several may share.

    What is wrong with it is noted, and costs reading a prompt again at worst: no method raises an OSError.

    Parameters
    ----------
    path : Path
        Made when it is not there.
    most_bytes : int
        Of all files of kept sessions in it.
    fingerprint : str
        Of what can use them.
    note : callable
        Takes a line for the user.
    """

    def __init__(self, path: Path, most_bytes: int, fingerprint: str, note: Callable[[str], None]) -> None:
        self._path, self._most_bytes, self._fingerprint, self._note = path, most_bytes, fingerprint, note
        self._paused_until = 0.0
        self._noted: set[str] = set()
        self.written_bytes = self.read_bytes = 0
        self._total_bytes, self._counted = most_bytes, -COUNT_SECONDS  # of all files, and when they were counted
        self.is_usable = self._prepare()

    def _prepare(self) -> bool:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            self._once(f"sessions are not kept in {self._path}: {error.strerror}")
            return False
        remove_stale(self._path, rf".*\{SUFFIX}")
        return True

    def _once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)

    def path_of(self, head: Head) -> Path:
        """The name of a piece's file."""
        kind = "state" if head.is_checkpoint else "rows"
        return self._path / f"{self._fingerprint[:16]}-{head.key}-{kind}{SUFFIX}"

    def scan(self) -> list[Found]:
        """The files that this model can use, those nearest to a beginning first; others are noted."""
        found = []
        for path in self._files() if self.is_usable else []:
            if path.name.startswith(self._fingerprint[:16]):
                try:
                    seconds = path.stat().st_mtime
                except OSError:
                    continue
                reader = self.open(path, is_direct=False)
                if reader is not None:
                    with reader:
                        found.append(Found(path, reader.head, reader.tokens, seconds))
        return sorted(found, key=lambda f: (f.head.end, f.head.is_checkpoint))

    def _files(self) -> list[Path]:
        try:
            return sorted(path for path in self._path.iterdir() if path.name.endswith(SUFFIX))
        except OSError as error:
            self._once(f"kept sessions in {self._path} can't be listed: {error.strerror}")
            return []

    def open(self, path: Path, *, is_direct: bool = True) -> PieceReader | None:
        """A file of this model; None, and a note, when it can't be used."""
        try:
            reader = PieceReader(path, is_direct=is_direct)
        except (OSError, FormatError) as error:
            self.cannot_use(path, error)
            return None
        if reader.head.fingerprint != self._fingerprint:
            reader.close()
            self._once(f"kept session {path.name} is of another model or other arithmetic, and is not used")
            return None
        return reader

    def cannot_use(self, path: Path, error: OSError | FormatError) -> None:
        """Note why a file is not used; one that is gone was another process's to remove."""
        if isinstance(error, FormatError):
            self._once(f"kept session {error.message}; it is not used")
        elif error.errno != errno.ENOENT:
            self._once(f"kept session {path.name} can't be read: {error.strerror}; it is not used")

    def write(
        self, head: Head, tokens: bytes, rows: Iterable[np.ndarray], recurrent: np.ndarray, keep: Iterable[Path]
    ) -> Path | None:
        """Write a piece, after making room for it; None when that is not possible.

        Parameters
        ----------
        keep : iterable of Path
            Files that must not make room.
        """
        size = head.tokens * head.row_bytes + head.recurrent_bytes
        if not self.is_usable or time.monotonic() < self._paused_until or not self._make_room(size, set(keep)):
            return None
        path = self.path_of(head)
        try:
            written = write_piece(path, head, tokens, rows, recurrent)
            self.written_bytes += written
            self._total_bytes += written
        except OSError as error:
            self._once(f"sessions are not kept in {self._path}: {error.strerror}")
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            return None
        return path

    def _make_room(self, size: int, keep: set[Path]) -> bool:
        """Remove what was used longest ago, of any model.  Others write to the folder, too: it is counted again."""
        if self._total_bytes + size <= self._most_bytes and time.monotonic() - self._counted < COUNT_SECONDS:
            return True
        found = []
        for path in self._files():
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, freed, path in sorted(found):
            if total + size <= self._most_bytes:
                break
            if path not in keep and self.remove(path):
                total -= freed
        self._total_bytes, self._counted = total, time.monotonic()
        if total + size <= self._most_bytes:
            return True
        self._once(f"a session is too large for the bound of kept sessions in {self._path}: a larger --cache-disk")
        return False

    def remove(self, path: Path) -> bool:
        """Whether it is gone."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._once(f"kept session {path.name} can't be removed: {error.strerror}")
            return False
        return True

    def touch(self, path: Path) -> bool:
        """It was useful now.  Whether it is still there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True
