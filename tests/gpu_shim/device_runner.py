"""Runs the kernel checks on whatever device is open: the double in CI, a card with -m gpu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fomoe_io.gpu.device import Gpu


class DeviceArray:
    """An array in device memory."""

    def __init__(self, gpu: Gpu, array: np.ndarray) -> None:
        self.gpu, self.shape, self.dtype = gpu, array.shape, array.dtype
        self.buffer = gpu.upload(array)

    @property
    def pointer(self) -> int:
        return self.buffer.pointer

    def get(self) -> np.ndarray:
        return self.gpu.download(self.buffer, self.shape, self.dtype)


class DeviceRunner:
    """Same interface as CpuRunner."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.table = gpu, gpu.table

    def put(self, array: np.ndarray) -> DeviceArray:
        return DeviceArray(self.gpu, array)

    def launch(self, name: str, grid: Sequence[int], *arguments: object) -> None:
        self.gpu.prepare(name, tuple(int(g) for g in grid), *arguments).run(self.gpu.stream)
        self.gpu.stream.synchronize()
