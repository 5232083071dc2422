"""A reader between the experts and their own, for what becomes of reads that nobody waits for yet."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fomoe_io.storage import reader as storage_reader

GUESS_TAG = 1 << 41
"""Of reads ahead: csrc/gpu/device_experts_state.h, FOMOE_GUESS_TAG, and csrc/cpu/experts_state.h, FOMOE_AHEAD_TAG."""


class Drive:
    """Between the experts and their reader: what is read ahead may fail, be refused, or take until it is asked for.

    `early` counts what was read ahead while demands were under way.
    """

    def __init__(self, native: int, mode: str) -> None:
        self.real, self.mode = storage_reader._Table.from_address(native), mode
        self.held: dict[int, storage_reader._Read] = {}
        self.answers: list[tuple[int, int]] = []
        self.demands, self.ahead, self.early, self.is_behind = 0, 0, 0, False
        kinds = dict(storage_reader._Table._fields_)
        self.table = storage_reader._Table(
            self.real.self, kinds["submit"](self.submit), kinds["reap"](self.reap), kinds["promote"](self.promote),
            kinds["cancel"](self.cancel), kinds["wait"](self.wait),
        )  # fmt: skip

    def submit(self, _: int, reads: int, count: int) -> int:
        each = (storage_reader._Read * count).from_address(reads)
        if not each[0].priority and not each[0].tag & GUESS_TAG:  # a batch's guesses are as urgent as what it waits for
            self.demands += count
            self.is_behind = False
            return self.real.submit(self.real.self, reads, count)
        self.early += self.demands > 0
        self.is_behind = True
        if self.mode == "refuse":
            return -errno.EIO
        self.ahead += count
        if self.mode == "fail":
            self.answers += [(read.tag, -errno.EIO) for read in each]
        elif self.mode in ("hold", "spoil"):
            self.held |= {read.tag: storage_reader._Read.from_buffer_copy(read) for read in each}
        else:
            return self.real.submit(self.real.self, reads, count)
        return 0

    def reap(self, _: int, done: int, most: int, wait: int) -> int:
        if self.mode == "behind" and self.demands and not self.is_behind and not wait:
            return 0
        each = (storage_reader._Completion * most).from_address(done)
        found, self.answers = self.answers[:most], self.answers[most:]
        for i, (tag, error) in enumerate(found):
            each[i].tag, each[i].error = tag, error
        count = len(found) or self.real.reap(self.real.self, done, most, wait)
        for i in range(count):
            self.demands -= each[i].tag < 1 << 40
        return count

    def wait(self, _: int, milliseconds: int) -> int:
        return 1 if self.answers else self.real.wait(self.real.self, milliseconds)

    def promote(self, _: int, tag: int) -> None:
        read = self.held.pop(tag, None)
        if read is None:
            self.real.promote(self.real.self, tag)
        elif self.mode == "spoil" and len(self.held) % 2:
            self.answers.append((tag, -errno.EIO))
        else:
            self.real.submit(self.real.self, ctypes.addressof(read), 1)

    def cancel(self, _: int, tag: int) -> None:
        if self.held.pop(tag, None) is None:
            self.real.cancel(self.real.self, tag)
        else:
            self.answers.append((tag, -errno.ECANCELED))


@contextmanager
def drives(mode: str) -> Iterator[list[Drive]]:
    """Those of the engines that are opened meanwhile.

    mode: "pass", "hold" until somebody waits, "spoil" some of those then, "fail" at once, "refuse", or "behind": what
    is asked for takes until something is read ahead, or somebody sleeps.
    """
    made: list[Drive] = []

    def address(self: storage_reader.Reader) -> int:
        made.append(Drive(self._native.address, mode))
        return ctypes.addressof(made[-1].table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_reader.Reader, "address", property(address))
        yield made
