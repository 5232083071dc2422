"""Checks of products by matrix units against float64 numpy: on the double in CI, on a card with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import DeviceMatrix
from fomoe_io.gpu.device import Gpu, Step
from fomoe_io.gpu.products import SCRATCH_BYTES, WORKSPACE_BYTES, DenseProducts, padded
from tests.gpu_shim import reference as ref


@contextmanager
def opened(gpu: Gpu, scratch_bytes: int = SCRATCH_BYTES) -> Iterator[DenseProducts]:
    """Products with memory of their own."""
    memory = gpu.allocate(WORKSPACE_BYTES + scratch_bytes)
    yield DenseProducts(gpu, memory.pointer, memory.pointer + WORKSPACE_BYTES, scratch_bytes)
    gpu.stream.synchronize()
    memory.free()


def multiply(products: DenseProducts, matrix: DeviceMatrix, x: np.ndarray, *, is_captured: bool = False) -> np.ndarray:
    """The product with float32 rows; the rows behind them are NaN."""
    gpu, tokens = products.gpu, len(x)
    floats = gpu.upload(np.concatenate([x, np.full((padded(tokens) - tokens, matrix.columns), np.nan, np.float32)]))
    halves = gpu.upload(np.full((padded(tokens), matrix.columns), np.nan, np.float16))
    is_float32 = matrix.kernel == "f32"
    y = gpu.upload(np.full((padded(tokens), matrix.rows), np.nan, np.float32))
    steps = [
        gpu.prepare("to_halves", kernels.to_halves_grid(x.size), floats, halves, x.size),
        *products.launches(matrix, (floats if is_float32 else halves).pointer, y.pointer, tokens),
    ]
    if is_captured:
        gpu.capture_steps([Step(step) for step in steps]).launch(gpu.stream)
    else:
        for step in steps:
            step.run(gpu.stream)
    return gpu.download(y, (tokens, matrix.rows), np.float32)


def check_product(gpu: Gpu, rng: np.random.Generator, name: str, rows: int, columns: int, tokens: int) -> None:
    """Whole and in tiles; captured before the library has ever run the shape, and launched."""
    columns = ref.fitting(name, columns)
    data, weights = ref.random_weights(rng, name, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[-1] *= 1e3
    kept = np.float32 if name == "f32" else np.float16
    kept_x, kept_weights = (v.astype(kept).astype(np.float64) for v in (x, weights.astype(np.float32)))
    want, summed = kept_x @ kept_weights.T, np.abs(kept_x) @ np.abs(kept_weights).T
    stored = gpu.upload(data)
    matrix = DeviceMatrix(stored.pointer, name, rows, columns)
    for scratch_bytes in (SCRATCH_BYTES, 2 * columns * 128):
        with opened(gpu, scratch_bytes) as products:
            for is_captured in (True, False):
                found = multiply(products, matrix, x, is_captured=is_captured)
                assert (np.abs(found - want) <= 2**-17 * summed).all()


def check_independence(gpu: Gpu, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    """The same rows at other places, with other neighbours, in batches of other sizes: the same bits."""
    data, _ = ref.random_weights(rng, name, rows, columns)
    stored = gpu.upload(data)
    matrix = DeviceMatrix(stored.pointer, name, rows, columns)
    mine = rng.standard_normal((40, columns)).astype(np.float32)
    with opened(gpu) as products:
        alone = multiply(products, matrix, mine)
        for before, after in ((1, 0), (31, 60), (88, 0), (100, 300), (471, 1)):
            others = 1e3 * rng.standard_normal((before + after, columns)).astype(np.float32)
            found = multiply(products, matrix, np.concatenate([others[:before], mine, others[before:]]))
            np.testing.assert_array_equal(found[before : before + len(mine)].view(np.uint32), alone.view(np.uint32))
