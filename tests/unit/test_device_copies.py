"""Copies between host and devices: whatever order they are asked for in, no two touch the same bytes at once."""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.fakes import HERE, ROOT, compile_library

UP, DOWN = 0, 1
COPY_IN, COPY_OUT, RECORD, WAIT = range(4)
MOST_DEVICES = 8


class Entry(ctypes.Structure):
    """Of tests/fakes/copies_log.c."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("kind", "stream", "event", "begin", "end", "buffer"))
    kind: int
    stream: int
    event: int
    begin: int
    end: int
    buffer: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("copies") / "copies_log.so"
    return ctypes.CDLL(os.fspath(compile_library(path, [HERE / "copies_log.c"], f"-I{ROOT / 'fomoe_io/csrc'}")))


@dataclass
class Order:
    """What is known to be over when an entry begins: the streams' clocks, carried from one to another by events."""

    known: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    of_event: dict[int, dict[int, int]] = field(default_factory=dict)
    copies: list[tuple[int, Entry]] = field(default_factory=list)
    seen: int = 0

    def follow(self, entries: list[Entry]) -> list[str]:
        """What may run at the same time and must not, of the entries that are new."""
        found = []
        for at, e in list(enumerate(entries))[self.seen :]:
            clock = self.known[e.stream]
            if e.kind == RECORD:
                self.of_event[e.event] = {**clock, e.stream: at}
            elif e.kind == WAIT:
                for stream, then in self.of_event[e.event].items():
                    clock[stream] = max(clock.get(stream, -1), then)
            else:
                found += [
                    f"{before} and {at}" for before, other in self.copies
                    if e.stream != other.stream and clock.get(other.stream, -1) < before and conflict(e, other)
                ]  # fmt: skip
                self.copies.append((at, e))
        self.seen = len(entries)
        return found

    def complete(self) -> None:
        """The host has seen that all is done."""
        self.copies.clear()


def conflict(one: Entry, other: Entry) -> bool:
    """The same bytes of the host, or the same buffer of one device; and one of the two writes there."""
    device = one.stream % MOST_DEVICES
    on_host = one.begin < other.end and other.begin < one.end and COPY_OUT in (one.kind, other.kind)
    on_device = (
        device == other.stream % MOST_DEVICES and one.buffer == other.buffer and COPY_IN in (one.kind, other.kind)
    )
    return on_host or on_device


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_no_two_copies_meet(library: ctypes.CDLL, devices: int) -> None:
    """Experts do not begin at the same place of a buffer, so one's share of a device overlaps another's of the next."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        library.copies_open(devices)
        order, log = Order(), (Entry * 4096)()
        for _ in range(60):
            lane, host, device = int(rng.integers(2)), int(rng.integers(3)), int(rng.integers(3))
            if rng.random() < 0.1:
                library.copies_complete()
                order.complete()
            assert library.copies_copy(lane, host, device, int(rng.integers(64)) * 16, 4096)
            entries = list(log[: library.copies_log(log)])
            assert order.follow(entries) == []
        assert sum(e.kind in (COPY_IN, COPY_OUT) for e in entries) == 60 * devices


def test_shares_of_other_devices_are_waited_for(library: ctypes.CDLL) -> None:
    """What the test above rests on, alone: an expert leaves a buffer for the devices while the next one comes into it
    from them."""
    library.copies_open(2)
    log = (Entry * 64)()
    assert library.copies_copy(UP, 0, 0, 0, 4096) and library.copies_copy(DOWN, 0, 1, 512, 4096)
    entries = list(log[: library.copies_log(log)])
    waits = {(e.stream, entries[i].stream) for e in entries if e.kind == WAIT
             for i in range(len(entries)) if entries[i].kind == RECORD and entries[i].event == e.event}  # fmt: skip
    up, down = ([lane * MOST_DEVICES + d for d in range(2)] for lane in (UP, DOWN))
    assert waits == {(d, u) for d in down for u in up}


def test_the_check_sees_copies_that_meet() -> None:
    """Its own teeth."""
    one = Entry(COPY_IN, UP * MOST_DEVICES, -1, 0, 4096, 0)
    other = Entry(COPY_OUT, DOWN * MOST_DEVICES + 1, -1, 2048, 6144, 1)
    record, wait = Entry(RECORD, one.stream, 5, 0, 0, -1), Entry(WAIT, other.stream, 5, 0, 0, -1)
    assert Order().follow([one, record, other]) == ["0 and 2"]
    assert Order().follow([one, record, wait, other]) == []
