"""Checks of products by matrix units against float64 numpy: on the double in CI, on a card with -m gpu."""

from __future__ import annotations

import numpy as np

from fomoe_io.device import Gpu, Step
from fomoe_io.device_prefill import DensePrefill
from fomoe_io.device_program import DeviceMatrix
from tests.gpu_shim import reference as ref


def check_product(gpu: Gpu, rng: np.random.Generator, name: str, rows: int, columns: int, tokens: int) -> None:
    """Whole and in tiles, launched and captured, with a token beyond the range of halves."""
    data, weights = ref.random_weights(rng, name, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[-1] *= 1e6
    want = x.astype(np.float64) @ weights.T
    summed = np.linalg.norm(np.abs(x).astype(np.float64) @ np.abs(weights).T, axis=1)
    matrix = gpu.upload(data)
    device_x = gpu.upload(x)
    for scratch_bytes in (2 * columns * rows, 2 * columns * (rows // 3 + 1)):
        prefill = DensePrefill(gpu, tokens, columns, scratch_bytes)
        for is_captured in (False, True):
            y = gpu.upload(np.full((tokens, rows), np.nan, np.float32))
            launches = prefill.multiply(DeviceMatrix(matrix.pointer, name, rows, columns), device_x, y)
            assert len(launches) == 2 + 2 * len(prefill.tiles(rows, columns))
            if is_captured:
                graph = gpu.capture_steps([Step(launch) for launch in launches])
                graph.launch(gpu.stream)
            else:
                for launch in launches:
                    launch.run(gpu.stream)
            found = gpu.download(y, (tokens, rows), np.float32)
            # Two roundings to 11 bits, whose errors are independent, of what is added up.
            assert (np.linalg.norm(found - want, axis=1) < 2**-10 * summed).all()
