"""A session's memory on its way from and to a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fomoe_io.backend import StateParts
    from fomoe_io.gpu.device import Stream


class StateCopies:
    """Copies between a state on the device and arrays, through memory that the device reaches.

    Parameters
    ----------
    stream : Stream
        The one that computes: a copy comes after what was computed before.
    parts : StateParts
        Offsets in a state's memory.
    staging : numpy.ndarray
        uint8, registered with the device.
    """

    def __init__(self, stream: Stream, parts: StateParts, staging: np.ndarray) -> None:
        self._stream, self.parts, self._staging = stream, parts, staging

    def rows_out(self, base: int, first: int, count: int) -> np.ndarray:
        """KV of tokens of the state at `base`, as :meth:`State.save_rows` has it."""
        rows, place = np.empty((count, self.parts.row_bytes), np.uint8), 0
        for offset, width in self.parts.streams:
            stream = self._out(base + offset + first * width, count * width)
            rows[:, place : place + width] = stream.reshape(count, width)
            place += width
        return rows

    def rows_in(self, base: int, first: int, rows: np.ndarray) -> None:
        """The other way."""
        place = 0
        for offset, width in self.parts.streams:
            self._in(base + offset + first * width, np.ascontiguousarray(rows[:, place : place + width]).reshape(-1))
            place += width

    def recurrent_out(self, base: int) -> np.ndarray:
        """All that is recurrent."""
        parts = [self._out(base + offset, size) for offset, size in self.parts.recurrent]
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def recurrent_in(self, base: int, saved: np.ndarray) -> None:
        """The other way."""
        place = 0
        for offset, size in self.parts.recurrent:
            self._in(base + offset, saved[place : place + size])
            place += size

    def _out(self, address: int, size: int) -> np.ndarray:
        found, piece = np.empty(size, np.uint8), len(self._staging)
        for at in range(0, size, piece):
            part = found[at : at + piece]
            self._stream.copy_out(self._staging.ctypes.data, address + at, len(part))
            self._stream.synchronize()
            part[:] = self._staging[: len(part)]
        return found

    def _in(self, address: int, data: np.ndarray) -> None:
        piece = len(self._staging)
        for at in range(0, len(data), piece):
            part = data[at : at + piece]
            self._staging[: len(part)] = part
            self._stream.copy_in(address + at, self._staging.ctypes.data, len(part))
            self._stream.synchronize()
