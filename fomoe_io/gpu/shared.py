"""Host memory that the device sees: posts and answers, tables, a run's header, logits, a batch's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.errors import DeviceError
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, round_up

if TYPE_CHECKING:
    from fomoe_io.gpu.device import Gpu
    from fomoe_io.gpu.recordings import Recordings
    from fomoe_io.models.shape import Shape


STAGING_BYTES = 1 << 20
"""Of a state on its way from or to the device."""


def part_sizes(sketch: Recordings, s: Shape, batch_tokens: int) -> dict[str, int]:
    """Bytes of each part, by name."""
    return {
        "mail": sketch.mail.bytes,
        "tables": 8 * s.layers * s.experts,
        "changed": 4 * s.layers,
        "header": sketch.header.bytes,
        "logits": 4 * s.vocabulary,
        "inputs": sketch.inputs.bytes if batch_tokens > 1 else 0,
        "staging": STAGING_BYTES,
    }


def shared_bytes(sizes: Mapping[str, int]) -> int:
    """What the parts take; each begins a page."""
    return sum(round_up(size, LEAST_BLOCK_BYTES) for size in sizes.values())


class SharedMemory:
    """Zeroed memory of the host that devices reach.

    Parameters
    ----------
    gpu : Gpu
        It is registered with this one, for all.
    nbytes : int

    Attributes
    ----------
    words : numpy.ndarray
        uint8 [nbytes]
    host, device : int
        Where it begins for either.
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._memory = aligned_memory(nbytes)
        self.words = np.frombuffer(self._memory.view, np.uint8)
        self.words[:] = 0
        self._registration = gpu.register(self.words)
        self.host, self.device = self._memory.address, self._registration.pointer

    def pointer_on(self, gpu: Gpu) -> int:
        """Where it begins for another device."""
        return self._registration.pointer_on(gpu.info.ordinal)

    def close(self) -> None:
        """Give it back; a lost device can't, and has been reported."""
        with suppress(DeviceError):
            self._registration.close()
        del self.words
        self._memory.close()


class SharedWords(SharedMemory):
    """Such memory in parts by name.

    Parameters
    ----------
    gpu : Gpu
    sizes : mapping of str to int
        See `part_sizes`.
    """

    def __init__(self, gpu: Gpu, sizes: Mapping[str, int]) -> None:
        self._offsets, end = {}, 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end += round_up(size, LEAST_BLOCK_BYTES)
        super().__init__(gpu, end)

    def offset(self, name: str) -> int:
        """Where a part begins."""
        return self._offsets[name]

    def part(self, name: str, offset: int, size: int) -> np.ndarray:
        """uint8 [size] of a part."""
        start = self._offsets[name] + offset
        return self.words[start : start + size]
