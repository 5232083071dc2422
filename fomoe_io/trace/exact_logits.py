"""Logits of an exact run, kept in a file so that approximate runs can be held against them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from fomoe_io.errors import UsageError

_HEAD_BYTES = 64


class ExactLogits:
    """A file of float32 logits [chunks, scored positions, vocabulary], written chunk by chunk.

    Parameters
    ----------
    path : Path or None
        None keeps them in a temporary file that goes away with the object.
    fingerprint : str
        ASCII, of model, text, chunk size and kernels.
    positions, vocabulary : int
        Of one chunk.

    Raises
    ------
    UsageError
        The file belongs to something else.
    """

    def __init__(self, path: Path | None, fingerprint: str, positions: int, vocabulary: int) -> None:
        self._shape = positions, vocabulary
        self._record_bytes = positions * vocabulary * 4
        head = fingerprint.encode().ljust(_HEAD_BYTES, b"\0")
        self._stream: IO[bytes]
        if path is None:
            self._stream = tempfile.TemporaryFile(prefix="fomoe-ppl-")  # noqa: SIM115 - closed by close()
        else:
            path.touch()
            self._stream = path.open("r+b")
        found = self._stream.read(_HEAD_BYTES)
        if found and found != head:
            self._stream.close()
            raise UsageError(f"{path} holds the logits of another model, text or chunk size", hint=f"rm {path}")
        if not found:
            self._stream.write(head)

    @property
    def chunks(self) -> int:
        """How many are whole."""
        return (self._stream.seek(0, 2) - _HEAD_BYTES) // self._record_bytes

    def append(self, rows: Iterable[np.ndarray]) -> None:
        """The next chunk; takes the place of one that an interrupted run left half written."""
        self._stream.seek(_HEAD_BYTES + self.chunks * self._record_bytes)
        for logits in rows:
            self._stream.write(np.ascontiguousarray(logits, np.float32).data)
        self._stream.flush()

    def rows(self, chunk: int) -> Iterator[np.ndarray]:
        """float32 [vocabulary] of each position of a chunk; nothing else may use the file meanwhile."""
        positions, vocabulary = self._shape
        self._stream.seek(_HEAD_BYTES + chunk * self._record_bytes)
        for _ in range(positions):
            yield np.frombuffer(self._stream.read(4 * vocabulary), np.float32)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
