"""What an unfinished pack has already written, so that the same command continues after a kill or a full drive.

One JSON object a line.  A line is written only after the data it speaks of was synced to the drive; a last line
cut short by a kill is ignored.  The journal is locked while a pack runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from fomoe_io.errors import StoreError
from fomoe_io.storage.manifest import JOURNAL
from layout_tool.direct import write_error

FORMAT, VERSION = "fomoe-journal", 1


def journal_header(directory: Path) -> dict[str, Any] | None:
    """First line of a directory's journal: what pack it belongs to; None without a journal that can be continued."""
    try:
        with (directory / JOURNAL).open("rb") as stream:
            header = json.loads(stream.readline(1 << 20))
    except (OSError, ValueError):
        return None
    usable = isinstance(header, dict) and (header.get("format"), header.get("version")) == (FORMAT, VERSION)
    return header if usable else None


class Journal:
    """The journal of one pack, open for appending and locked.

    Parameters
    ----------
    directory : Path
    store_id : str
    weights : tuple of int
        Of the striping, which a measurement may have chosen.

    Attributes
    ----------
    entries : list of dict
        What an earlier run has completed.
    """

    def __init__(self, directory: Path, store_id: str, weights: tuple[int, ...]) -> None:
        self._path = directory / JOURNAL
        header = {"format": FORMAT, "version": VERSION, "id": store_id, "weights": list(weights)}
        try:
            self._stream = self._path.open("a+b")
        except OSError as error:
            raise write_error(error, self._path) from error
        _lock(self._stream, directory)
        self.entries, size = _complete_lines(self._path)
        if self.entries and self.entries[0] != header:
            self._stream.close()
            raise StoreError(
                f"{directory} holds an unfinished pack of another model, profile or set of targets",
                hint="repeat the command that was interrupted, or start over with --overwrite",
            )
        os.ftruncate(self._stream.fileno(), size)
        self._header = header
        if self.entries:
            self.entries.pop(0)
        else:
            self.append([header])

    def restart(self) -> None:
        """Forget all entries: the data they speak of is gone."""
        self.entries = []
        os.ftruncate(self._stream.fileno(), 0)
        self.append([self._header])

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Add lines and have them on the drive."""
        try:
            self._stream.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise write_error(error, self._path) from error

    def remove(self) -> None:
        """The pack is complete."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the lock; idempotent."""
        with contextlib.suppress(OSError):  # a full drive has been reported already
            self._stream.close()


def check_idle(directory: Path) -> None:
    """Raise StoreError when another pack is writing to the directory."""
    with contextlib.suppress(FileNotFoundError), (directory / JOURNAL).open("rb") as stream:
        _lock(stream, directory)


def _lock(stream: BinaryIO, directory: Path) -> None:
    """Lock until the stream is closed, by whatever end the process meets."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise StoreError(f"{directory} is being written by another pack", hint="wait until it is done") from None


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(objects of all complete lines, their bytes)"""
    entries: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            entries.append(entry)
            size += len(line)
    return entries, size
