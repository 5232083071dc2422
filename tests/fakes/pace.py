"""The paced reader on a clock that only its users move."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tests.fakes import HERE, ROOT, compile_library

MS = 1e6


class FakePace:
    """The calls of csrc/read/reader.h over tests/fakes/fake_pace.c; one at a time."""

    def __init__(
        self, library: ctypes.CDLL, *, bandwidth: float, latency_ns: int, depth: int = 64, slow_ns: int = 0
    ) -> None:
        self._library = library
        assert library.fake_pace_open(ctypes.c_double(bandwidth), ctypes.c_uint64(latency_ns), depth,
                                      ctypes.c_uint64(slow_ns))  # fmt: skip

    def submit(self, tag: int, size: int, *, priority: int = 0, offset: int = 0) -> None:
        error = self._library.fake_pace_submit(ctypes.c_uint64(tag), size, priority, ctypes.c_uint64(offset))
        if error:
            raise OSError(-error, "refused")

    def promote(self, tag: int) -> None:
        self._library.fake_pace_promote(ctypes.c_uint64(tag))

    def cancel(self, tag: int) -> None:
        self._library.fake_pace_cancel(ctypes.c_uint64(tag))

    def pass_ms(self, ms: float) -> None:
        """Nobody looks for so long."""
        self._library.fake_pace_pass(ctypes.c_uint64(int(ms * MS)))

    def reap(self, *, wait: bool = True) -> tuple[int, int] | None:
        """A tag and its error; None: nothing is in flight, or ready."""
        tag, error = ctypes.c_uint64(), ctypes.c_int32()
        count = self._library.fake_pace_reap(wait, ctypes.byref(tag), ctypes.byref(error))
        assert count >= 0
        return (tag.value, error.value) if count else None

    def reap_all(self, *, wait: bool = True) -> dict[int, int]:
        done = {}
        while one := self.reap(wait=wait):
            assert one[0] not in done
            done[one[0]] = one[1]
        return done

    def arrivals(self, *, wait: bool = True) -> dict[int, float]:
        """When each read came, in ms of the clock."""
        times: dict[int, float] = {}
        while one := self.reap(wait=wait):
            assert one[1] == 0 and one[0] not in times
            times[one[0]] = self.clock_ms
        return times

    @property
    def clock_ms(self) -> float:
        return float(self._library.fake_pace_clock() / MS)

    @property
    def cancels(self) -> int:
        """Those that the other reader was asked for."""
        return int(self._library.fake_pace_cancels())

    @property
    def late(self) -> int:
        return int(self._library.fake_pace_late())

    def close(self) -> None:
        self._library.fake_pace_close()


def load_fake_pace(folder: Path) -> ctypes.CDLL:
    """Compile and load the fake."""
    sources = [HERE / "fake_pace.c", ROOT / "fomoe_io/csrc/read/read_table.c"]
    include = f"-I{ROOT / 'fomoe_io/csrc'}"
    library = ctypes.CDLL(os.fspath(compile_library(folder / "fake_pace.so", sources, include)))
    library.fake_pace_clock.restype = library.fake_pace_late.restype = ctypes.c_uint64
    return library
