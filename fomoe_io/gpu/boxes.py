"""Memory by which devices that compute a layer together exchange what each has made (kernels/gather.h)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io import _hip
from fomoe_io.errors import DeviceError, UsageError
from fomoe_io.gpu.shared import SharedMemory

if TYPE_CHECKING:
    from fomoe_io.gpu.device import Gpu

TRIED_FLOATS = 8192
"""Of a vector that is sent to try the way."""


class HostBox:
    """The host's memory, which every device reaches on every machine.

    Parameters
    ----------
    gpus : sequence of Gpu
    nbytes : int
    """

    def __init__(self, gpus: Sequence[Gpu], nbytes: int) -> None:
        self._gpus, self._memory = gpus, SharedMemory(gpus[0], nbytes)

    def places(self, index: int) -> tuple[int, int]:
        """Where a device leaves what others want, and finds what they have left, as it sees them."""
        at = self._memory.pointer_on(self._gpus[index])
        return at, at

    def close(self) -> None:
        """Give it back."""
        self._memory.close()


class PeerBoxes:
    """Memory of each of two devices, into which the other writes: faster where it can be relied upon.

    Parameters
    ----------
    gpus : sequence of Gpu
        Two; the same one twice, too.
    nbytes : int
        Of each.

    Raises
    ------
    UsageError
        There are more than two.
    DeviceError
        One does not reach the other's memory, or what it writes there arrives damaged.
    """

    def __init__(self, gpus: Sequence[Gpu], nbytes: int) -> None:
        if len(gpus) != 2:
            raise UsageError(f"devices write into each other's memory by twos, not by {len(gpus)}", hint=_WITHOUT)
        for gpu, other in (gpus, (gpus[1], gpus[0])):
            here, there = gpu.info.ordinal, other.info.ordinal
            if here != there and not _hip.can_reach(here, there):
                raise DeviceError(f"{gpu.info.option} does not reach the memory of {other.info.option}", hint=_WITHOUT)
        size = max(nbytes, 8 * TRIED_FLOATS)
        self._buffers = [gpu.allocate(size) for gpu in gpus]
        for i, gpu in enumerate(gpus):
            self._try(gpu, gpus[1 - i], self._buffers[1 - i])
        for gpu, buffer in zip(gpus, self._buffers, strict=True):
            gpu.stream.fill(buffer.pointer, 0, size)
            gpu.stream.synchronize()

    @staticmethod
    def _try(gpu: Gpu, other: Gpu, there: _hip.Buffer) -> None:
        """What a kernel writes into the other's memory is what arrives."""
        sent = np.random.default_rng(gpu.info.ordinal).standard_normal(TRIED_FLOATS).astype(np.float32)
        x, run = gpu.upload(sent), gpu.upload(np.ones(1, np.uint32))
        flag = there.pointer + sent.nbytes
        gpu.prepare("hand_over", (1, 1, 1), x, None, there.pointer, flag, run, TRIED_FLOATS).run(gpu.stream)
        gpu.stream.synchronize()
        if not np.array_equal(other.download(there, sent.shape, np.float32), sent):
            raise DeviceError(
                f"what {gpu.info.option} writes into the memory of {other.info.option} arrives damaged", hint=_WITHOUT
            )

    def places(self, index: int) -> tuple[int, int]:
        """The other's memory, and this one's own."""
        return self._buffers[1 - index].pointer, self._buffers[index].pointer

    def close(self) -> None:
        """Give them back; a lost device gives nothing back, and has been reported."""
        for buffer in self._buffers:
            with suppress(DeviceError):
                buffer.free()
        self._buffers.clear()


_WITHOUT = "leave --peer-memory out"
