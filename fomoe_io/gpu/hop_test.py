"""Whether two devices hand rows to one another inside their graphs, and how long it takes: a check of self_test.py."""

from __future__ import annotations

import statistics
import time

import numpy as np

from fomoe_io import _hip
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import device
from fomoe_io.gpu.arena import hop_bytes
from fomoe_io.gpu.device import Gpu
from fomoe_io.storage.reader import aligned_memory

HOPS, ROUNDS = 40, 5
COLUMNS = 4096


def partner_of(gpu: Gpu) -> Gpu | None:
    """Another device of the same kind, if there is one."""
    kind, own = gpu.info.option.split(":")[0], gpu.info.ordinal
    others = [d for d in device.list_devices(kind) if d.ordinal != own and not d.is_integrated]
    return Gpu(others[0].option) if others else None


def hop_us(gpu: Gpu, other: Gpu, seconds: float) -> tuple[float, int]:
    """Microseconds of one way, kernels and all, and how many of the rows that went there and back arrived damaged.

    Raises
    ------
    DeviceError
        Nothing arrives within `seconds`.
    """
    memory = aligned_memory(2 * HOPS * hop_bytes(COLUMNS) + 4096)
    words = np.frombuffer(memory.view, np.uint8)
    words[:] = 0
    registration = gpu.register(words)
    gpus, damaged, times = (gpu, other), 0, []
    at = [registration.pointer_on(each.info.ordinal) for each in gpus]
    stop = 2 * HOPS * hop_bytes(COLUMNS)
    random = np.random.default_rng(5)
    data = random.standard_normal((2, COLUMNS)).astype(np.float32)
    runs = [each.upload(np.zeros(1, np.uint32)) for each in gpus]
    rows = [each.upload(data if each is gpu else np.zeros_like(data)) for each in gpus]
    graphs = []
    for side, each in enumerate(gpus):
        x, steps = rows[side].pointer, []
        for number in range(2 * HOPS):
            place = at[side] + number * hop_bytes(COLUMNS)
            ends = (x, x + 4 * COLUMNS, place, place + 8 * COLUMNS, runs[side])
            if number % 2 == side:
                steps.append(each.prepare("hand_over", (1, 1, 1), *ends, COLUMNS))
            else:
                steps.append(each.prepare("take_over", (1, 1, 1), *ends, at[side] + stop, COLUMNS))
        graphs.append(each.capture(steps))
    try:
        for number in range(1, ROUNDS + 1):
            for each, run in zip(gpus, runs, strict=True):
                word = np.array([number], np.uint32)
                each.stream.copy_in(run.pointer, word.ctypes.data, 4)
                each.stream.synchronize()
            started = time.perf_counter()
            for each, graph in zip(gpus, graphs, strict=True):
                graph.launch(each.stream)
            while not all(each.stream.is_done() for each in gpus):
                if time.perf_counter() - started > seconds:
                    raise DeviceError(f"rows for another device did not arrive within {seconds:g} s")
            times.append((time.perf_counter() - started) / (2 * HOPS))
            damaged += not all(np.array_equal(each.download(at, data.shape, np.float32), data)
                               for each, at in zip(gpus, rows, strict=True))  # fmt: skip
    except DeviceError:
        _hip.abandon(memory, registration, runs, rows, graphs, other)
        raise
    finally:
        words[stop] = 1  # what still waits goes on
    for each in gpus:
        each.stream.synchronize()
    registration.close()
    del words
    memory.close()
    return 1e6 * statistics.median(times), damaged
