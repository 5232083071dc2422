"""What a backend has on one of its devices: memory, the words that host and device share, the recorded model."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io import _gpu
from fomoe_io.errors import DeviceError
from fomoe_io.gpu.launches import CAR_BYTES
from fomoe_io.gpu.products import WORKSPACE_BYTES, DenseProducts
from fomoe_io.gpu.recordings import Addresses
from fomoe_io.gpu.shared import STAGING_BYTES, SharedWords, part_sizes
from fomoe_io.gpu.state_copies import StateCopies

if TYPE_CHECKING:
    from fomoe_io._hip import Buffer, Event, Stream
    from fomoe_io.gpu.device import Gpu
    from fomoe_io.gpu.sharing import Sharing
    from fomoe_io.open_model import OpenModel


class OnDevice:
    """Taken as a whole or not at all.

    Parameters
    ----------
    gpu : Gpu
    opened : OpenModel
    sharing : Sharing
        The sizes of everything.
    index : int
        Which device of those that compute a layer together.
    boxes : (int, int)
        Where it leaves what the others want, and finds what they have left.

    Attributes
    ----------
    shared : SharedWords
    held_bytes : int
        Of its memory.
    vram : int
        Address of the slots of experts.
    states : int
        Address of the sessions' memory.
    recorded : Recordings
    products : DenseProducts or None
    copies : list of Stream
        Of experts, up and down.
    """

    def __init__(
        self, gpu: Gpu, opened: OpenModel, sharing: Sharing, index: int = 0, boxes: tuple[int, int] = (0, 0)
    ) -> None:
        self.gpu, self._opened, self._index, self._boxes = gpu, opened, index, boxes
        self._buffers: list[Buffer] = []
        self.shared = SharedWords(gpu, part_sizes(sharing.sketch, opened.shape, sharing.batch_tokens))
        try:
            self._take(sharing)
        except BaseException:
            self.close()
            raise

    def _take(self, sharing: Sharing) -> None:
        gpu = self.gpu
        sizes = (*sharing.sketch.fixed_bytes, sharing.vram_pool_bytes)
        for size in sizes:
            self._buffers.append(gpu.allocate(max(size, 256)))
        self.held_bytes = sum(buffer.nbytes for buffer in self._buffers)
        weights, activations, self.states, self.vram = (buffer.pointer for buffer in self._buffers)
        outbox, inbox = self._boxes
        places = Addresses(weights, activations, self.states, mail=self.shared.device, outbox=outbox, inbox=inbox)
        self.recorded = r = sharing.recordings(places, device=self._index)
        self.products: DenseProducts | None = None
        if sharing.scratch_bytes:
            tiles = r.products_address + WORKSPACE_BYTES
            self.products = DenseProducts(gpu, r.products_address, tiles, sharing.scratch_bytes)
        self.copies = [gpu.new_stream(is_urgent=True) for _ in range(_gpu.STREAMS)]

    def events(self) -> list[list[Event]]:
        """Those that tell how far each lane is."""
        return [[self.gpu.event() for _ in range(_gpu.LANE_EVENTS)] for _ in range(_gpu.EVENT_RINGS)]

    def fill(self) -> None:
        """The positions' tables, constants and the rule of cache-aware routing go to the device."""
        r, stream, opened = self.recorded, self.gpu.stream, self._opened
        for address, rope in r.memory.ropes.items():
            table = rope.table(opened.context_tokens)
            stream.copy_in(address, table.ctypes.data, table.nbytes)
            stream.synchronize()
        for address, data in r.memory.constants.items():
            words = np.frombuffer(data, np.uint8)
            stream.copy_in(address, words.ctypes.data, words.nbytes)
        if opened.config.car is not None:
            rule = opened.config.car.native()
            stream.copy_in(r.memory.words("car", CAR_BYTES), ctypes.addressof(rule), CAR_BYTES)
        stream.synchronize()

    def state_copies(self) -> StateCopies:
        """Between a session's memory here and arrays."""
        staging = self.shared.part("staging", 0, STAGING_BYTES)
        return StateCopies(self.gpu.stream, self.recorded.token.state.parts, staging)

    def state_at(self, place: int) -> int:
        """Address of a session's memory."""
        return self.states + place * self.recorded.token.state.bytes

    def is_settled(self) -> bool:
        """Whether the device has done with all that is ours; waits for it while there is progress."""
        self.shared.part("mail", 0, 4).view(np.uint32)[0] = 1  # a kernel that still waits for the host goes on
        return all(_has_ended(stream) for stream in (self.gpu.stream, *self.copies))

    def close(self) -> None:
        """Give everything back; a lost device gives nothing back, and has been reported."""
        for name in ("recorded", "products"):
            self.__dict__.pop(name, None)
        for buffer in self._buffers:
            with suppress(DeviceError):
                buffer.free()
        self._buffers.clear()
        self.__dict__.pop("copies", None)
        self.shared.close()


def _has_ended(stream: Stream) -> bool:
    try:
        stream.synchronize()
    except DeviceError:
        with suppress(DeviceError):  # lost: it uses nothing any more
            return stream.is_done()
    return True
