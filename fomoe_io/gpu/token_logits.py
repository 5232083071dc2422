"""Where a session's single tokens find their logits: memory of the host that the device copies to by itself."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.errors import DeviceError

if TYPE_CHECKING:
    from fomoe_io._hip import Registration
    from fomoe_io.gpu.device import Gpu


class TokenLogits:
    """A row for each place of a session, made when it is first asked for; the host need not copy a megabyte a token.

    Whoever holds a row may go on reading it after `close`: what ends there is that the device reaches it.

    Parameters
    ----------
    gpu : Gpu
        The rows are registered with this one, for all.
    vocabulary : int
    """

    def __init__(self, gpu: Gpu, vocabulary: int) -> None:
        self._gpu: Gpu | None = gpu
        self._vocabulary = vocabulary
        self._rows: dict[int, tuple[np.ndarray, Registration]] = {}

    def row(self, place: int) -> np.ndarray:
        """float32 [1, vocabulary]

        Raises
        ------
        DeviceError
        """
        if place not in self._rows:
            assert self._gpu is not None
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a fork has its own
            memory = np.frombuffer(mmap.mmap(-1, 4 * self._vocabulary, flags=flags), np.uint8)
            self._rows[place] = memory, self._gpu.register(memory)
        return self._rows[place][0].view(np.float32).reshape(1, -1)

    def close(self) -> None:
        """The device has done with them; a lost one gives nothing back, and has been reported."""
        for _, registration in self._rows.values():
            with suppress(DeviceError):
                registration.close()
        self._rows.clear()
        self._gpu = None
