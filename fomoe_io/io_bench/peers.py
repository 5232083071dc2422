"""The Python package `liburing` driven from Python, to compare with in `fomoe-bench io`.

Its calls hold the GIL, and its plain and fixed reads take nothing but bytearrays, which O_DIRECT refuses for their
alignment: vectored reads into our aligned buffers are the best it can do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io._io_load import LATENCY_BINS, LATENCY_STEP_BITS
from fomoe_io.errors import UsageError
from fomoe_io.storage.reader import Memory


def _bin(ns: int) -> int:
    """csrc/read/io_load.c, latency_bin."""
    if ns < 1 << LATENCY_STEP_BITS:
        return ns
    octave = ns.bit_length() - 1 - LATENCY_STEP_BITS
    return ((octave + 1) << LATENCY_STEP_BITS) + ((ns >> octave) & ((1 << LATENCY_STEP_BITS) - 1))


class LiburingLoad:
    """The loop of csrc/read/io_load.c in Python over package `liburing`; parameters and results of `_io_load.Load`.

    Raises
    ------
    UsageError
        The package is not installed.
    """

    def __init__(
        self,
        plan: np.ndarray,
        paths: Sequence[Path],
        *,
        direct: bool,
        depth: int,
        buffers: int,
        buffer_bytes: int,
        memory: Memory,
        most_reads: int,
        duration_seconds: float,
        ramp_seconds: float,
    ) -> None:
        try:
            import liburing
        except ImportError as error:
            raise UsageError(f"package liburing: {error}", hint="pip install 'liburing>=2026.3'") from None
        if ramp_seconds:
            raise UsageError("python-liburing has no ramp", hint="leave out --ramp_time")
        self._api = liburing
        self._plan = [(int(p["offset"]), int(p["bytes"]), int(p["file"])) for p in plan]
        self._flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._paths = paths
        self._depth, self._most, self._duration = depth, most_reads, duration_seconds
        start = buffers - memory.address
        self._views = [memory.view[start + i * buffer_bytes :][:buffer_bytes] for i in range(depth)]
        self._stop = False
        self.error = 0
        self._reads = self._bytes = 0
        self._latency = np.zeros(LATENCY_BINS, np.int64)
        self._in_flight = np.zeros(depth + 1, np.int64)
        self._times: list[int] = []
        self._span = (0, 0)

    def stop(self) -> None:
        """Start nothing more."""
        self._stop = True

    def progress(self) -> tuple[int, int]:
        """(reads, bytes) so far."""
        return self._reads, self._bytes

    def run(self) -> int:
        """Run to the end."""
        api = self._api
        descriptors = [os.open(path, self._flags) for path in self._paths]
        ring, cqe = api.Ring(), api.Cqe()
        api.io_uring_queue_init(self._depth, ring)
        try:
            self._loop(ring, cqe, descriptors)
        except OSError as error:
            self.error = -(error.errno or 5)
        finally:
            api.io_uring_queue_exit(ring)
            for descriptor in descriptors:
                os.close(descriptor)
        return self.error

    def _loop(self, ring: Any, cqe: Any, descriptors: list[int]) -> None:
        api, plan, views = self._api, self._plan, self._views
        idle = list(range(self._depth))
        submitted, sizes = [0] * self._depth, [0] * self._depth
        vectors: dict[tuple[int, int], Any] = {}  # made once: the package asks to keep them alive anyway
        begin = time.monotonic_ns()
        end = begin + int(1e9 * self._duration) if self._duration else None
        issued = 0
        while True:
            now = time.monotonic_ns()
            more = not self._stop and (end is None or now < end)
            while more and idle and (not self._most or issued < self._most):
                slot = idle.pop()
                offset, size, file = plan[issued % len(plan)]
                issued += 1
                if (slot, size) not in vectors:
                    vectors[slot, size] = api.Iovec([views[slot][:size]])
                sizes[slot], submitted[slot] = size, now
                sqe = api.io_uring_get_sqe(ring)
                api.io_uring_prep_readv(sqe, descriptors[file], vectors[slot, size], offset)
                sqe.user_data = slot
                self._in_flight[self._depth - len(idle)] += 1
            if len(idle) == self._depth:
                break
            api.io_uring_submit_and_wait(ring, 1)
            now = time.monotonic_ns()
            got = 0
            for slot in api.CqeIter(ring, cqe):
                if cqe[0].res != sizes[slot]:
                    raise OSError(5, "short read")
                got += 1
                idle.append(slot)
                self._reads += 1
                self._bytes += sizes[slot]
                self._times.append(now - submitted[slot])
            api.io_uring_cq_advance(ring, got)
        self._span = (begin, time.monotonic_ns())

    def result(self) -> dict[str, Any]:
        """Counters, as `_io_load.Load.result` has them."""
        times = np.array(self._times, np.float64)
        bins, counts = np.unique([_bin(t) for t in self._times], return_counts=True)
        self._latency[:] = 0
        self._latency[bins.astype(np.int64)] = counts
        least = int(times.min()) if len(times) else 0
        spans = (least, int(times.max(initial=0)), float(times.sum()), float((times**2).sum()))
        return {
            "reads": self._reads,
            "bytes": self._bytes,
            "issued": self._reads,
            "started_ns": self._span[0],
            "ended_ns": self._span[1],
            "latency_min_ns": spans[0],
            "latency_max_ns": spans[1],
            "latency_sum_ns": spans[2],
            "latency_square_sum": spans[3],
            "submission": (0, 0, 0.0, 0.0),  # submitted and waited for in one call
            "total": spans,
            "latency": self._latency,
            "in_flight": self._in_flight,
        }
