"""A piece of a session as a file: a header with the tokens, KV rows, what is recurrent; each with its checksum.

Sections begin at multiples of 4096 bytes and are written and read with O_DIRECT where the file system has it.  A file
is written under another name, synced and renamed: whoever finds it finds all of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import secrets
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from fomoe_io.errors import FormatError
from fomoe_io.ram_budget import KEPT_BUFFER_BYTES
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, open_direct, round_up
from fomoe_io.system.files import TEMPORARY, sync_directory

MAGIC = b"fomoekv1"
BUFFER_BYTES = KEPT_BUFFER_BYTES
MOST_TOKENS = 1 << 24
_PREFIX_BYTES = len(MAGIC) + 8 + 4
"""Before the header's text: the magic, the header's checksum, the text's length."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a file says of itself.

    Attributes
    ----------
    fingerprint : str
        Of what can use it: weights, arithmetic, the form of KV and of what is recurrent.
    key, parent : str
        Of all tokens up to its end, and up to its beginning.
    first : int
        Position of its first token.
    tokens : int
        Its own.
    row_bytes, recurrent_bytes : int
        KV of a token; 0 where there is nothing recurrent in it.
    is_checkpoint : bool
    text_end : (int, int) or None
        See :class:`fomoe_io.kept.pieces.Piece`.
    rows_hash, recurrent_hash : str
        xxh3_64
    """

    fingerprint: str
    key: str
    parent: str
    first: int
    tokens: int
    row_bytes: int
    recurrent_bytes: int
    is_checkpoint: bool
    text_end: tuple[int, int] | None = None
    rows_hash: str = ""
    recurrent_hash: str = ""

    @property
    def end(self) -> int:
        """Position after its tokens."""
        return self.first + self.tokens


def _section(size: int) -> int:
    return round_up(size, LEAST_BLOCK_BYTES)


def _head_bytes(text: bytes, tokens: int) -> int:
    return _section(_PREFIX_BYTES + len(text) + 4 * tokens)


class _Writer:
    """Sequential writes of whole blocks through an aligned buffer."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor, self._offset = descriptor, offset
        self._memory = mmap.mmap(-1, BUFFER_BYTES)
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._filled = 0

    def add(self, data: np.ndarray) -> None:
        """Bytes, in order."""
        flat, place = np.ascontiguousarray(data).reshape(-1).view(np.uint8), 0
        while place < len(flat):
            part = flat[place : place + BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            place += len(part)
            if self._filled == BUFFER_BYTES:
                self._flush()

    def pad(self) -> None:
        """To the end of a section."""
        end = _section(self._filled)
        self._buffer[self._filled : end] = 0
        self._filled = end

    def finish(self, head: bytes) -> None:
        """The rest, then the header at the file's beginning."""
        self._flush()
        self._offset = 0
        self.add(np.frombuffer(head, np.uint8))
        self._flush()

    def _flush(self) -> None:
        view = memoryview(self._memory)[: self._filled]
        while view:
            written = os.pwrite(self._descriptor, view, self._offset)
            self._offset += written
            view = view[written:]
        self._filled = 0


def write_piece(path: Path, head: Head, tokens: bytes, rows: Iterable[np.ndarray], recurrent: np.ndarray) -> int:
    """Write a file whole or not at all; returns its bytes.

    Parameters
    ----------
    path : Path
    head : Head
        Without hashes.
    tokens : bytes
        int32
    rows : iterable of numpy.ndarray
        KV in order; looked at one after the other.
    recurrent : numpy.ndarray

    Raises
    ------
    OSError
        After the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    descriptor = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = _write(descriptor, head, tokens, rows, recurrent)
            os.fsync(descriptor)
            temporary.replace(path)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)
    return size


def _write(descriptor: int, head: Head, tokens: bytes, rows: Iterable[np.ndarray], recurrent: np.ndarray) -> int:
    blank = {**asdict(head), "rows_hash": "0" * 16, "recurrent_hash": "0" * 16}
    head_bytes = _head_bytes(json.dumps(blank).encode(), head.tokens)
    writer, digest = _Writer(descriptor, head_bytes), xxhash.xxh3_64()
    for part in rows:
        digest.update(np.ascontiguousarray(part).data)
        writer.add(part)
    writer.pad()
    writer.add(recurrent)
    writer.pad()
    hashes = {"rows_hash": digest.hexdigest(), "recurrent_hash": xxhash.xxh3_64_hexdigest(recurrent.data)}
    text = json.dumps({**blank, **hashes}).encode()
    body = len(text).to_bytes(4, "little") + text + tokens
    body += bytes(head_bytes - len(MAGIC) - 8 - len(body))
    writer.finish(MAGIC + xxhash.xxh3_64_digest(body) + body)
    return head_bytes + _section(head.tokens * head.row_bytes) + _section(head.recurrent_bytes)


def _open(path: Path, flags: int) -> int:
    """With O_DIRECT where blocks of 4096 bytes will do."""
    opened = open_direct(path, flags)
    if opened.block_bytes in (0, LEAST_BLOCK_BYTES):
        return opened.descriptor
    os.close(opened.descriptor)
    return os.open(path, flags & ~(os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC)


class PieceReader:
    """An open file of a piece.

    Parameters
    ----------
    path : Path
    is_direct : bool
        False where the header is all that is wanted: looking whether direct reads work takes longer than reading it.

    Attributes
    ----------
    head : Head
    tokens : bytes
        int32

    Raises
    ------
    OSError
        It can't be read.
    FormatError
        It is damaged, or no such file.
    """

    def __init__(self, path: Path, *, is_direct: bool = True) -> None:
        self._path = path
        self._descriptor = _open(path, os.O_RDONLY) if is_direct else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.head, self.tokens, self._rows_offset = self._read_head()
        except BaseException:
            self.close()
            raise

    def _damaged(self, what: str) -> FormatError:
        return FormatError(f"{self._path.name} {what}")

    def _read(self, offset: int, size: int) -> np.ndarray:
        """Bytes from the beginning of a section on."""
        memory = mmap.mmap(-1, max(_section(size), LEAST_BLOCK_BYTES))
        view, done = memoryview(memory)[: _section(size)], 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], offset + done)
            if count <= 0:
                raise self._damaged("ends early")
            done += count
        return np.frombuffer(memory, np.uint8, size)

    def _read_head(self) -> tuple[Head, bytes, int]:
        start = self._read(0, LEAST_BLOCK_BYTES).tobytes()
        if not start.startswith(MAGIC):
            raise self._damaged("is no kept session")
        length = int.from_bytes(start[_PREFIX_BYTES - 4 : _PREFIX_BYTES], "little")
        text = start[_PREFIX_BYTES : _PREFIX_BYTES + length]
        try:
            found: dict[str, Any] = json.loads(text)
            head = Head(**{**found, "text_end": tuple(found["text_end"]) if found["text_end"] else None})
            sizes = (head.first, head.tokens, head.row_bytes, head.recurrent_bytes)
            if not all(isinstance(n, int) and n >= 0 for n in sizes) or head.tokens > MOST_TOKENS:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._damaged("is damaged: its header can't be read") from None
        head_bytes = _head_bytes(text, head.tokens)
        whole = start if head_bytes == len(start) else self._read(0, head_bytes).tobytes()
        body = whole[len(MAGIC) + 8 :]
        if xxhash.xxh3_64_digest(body) != whole[len(MAGIC) : len(MAGIC) + 8]:
            raise self._damaged("is damaged: its header's checksum is wrong")
        size = head_bytes + _section(head.tokens * head.row_bytes) + _section(head.recurrent_bytes)
        if os.fstat(self._descriptor).st_size != size:
            raise self._damaged(f"has {os.fstat(self._descriptor).st_size:,} bytes, not {size:,}")
        first = _PREFIX_BYTES + length
        return head, whole[first : first + 4 * head.tokens], head_bytes

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """KV in pieces of up to about `most` tokens; when all have come, their checksum is known to be right.

        Raises
        ------
        OSError, FormatError
        """
        width, digest = self.head.row_bytes, xxhash.xxh3_64()
        step = round_up(most, LEAST_BLOCK_BYTES // math.gcd(width, LEAST_BLOCK_BYTES))  # each begins at a whole block
        for first in range(0, self.head.tokens, step):
            count = min(step, self.head.tokens - first)
            part = self._read(self._rows_offset + first * width, count * width).reshape(count, width)
            digest.update(part.data)
            yield part
        if digest.hexdigest() != self.head.rows_hash:
            raise self._damaged("is damaged: the checksum of its KV is wrong")

    def recurrent(self) -> np.ndarray:
        """What is recurrent.

        Raises
        ------
        OSError, FormatError
        """
        offset = self._rows_offset + _section(self.head.tokens * self.head.row_bytes)
        found = self._read(offset, self.head.recurrent_bytes)
        if xxhash.xxh3_64_hexdigest(found.data) != self.head.recurrent_hash:
            raise self._damaged("is damaged: the checksum of its recurrent state is wrong")
        return found

    def token_array(self) -> Any:
        """The tokens as an array."""
        found = array("i")
        found.frombytes(self.tokens)
        return found

    def close(self) -> None:
        """Close it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
