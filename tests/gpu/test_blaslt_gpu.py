"""Products by cuBLASLt or hipBLASLt on a real device.  Run with -m gpu."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe_io.errors import DeviceError
from fomoe_io.gpu import kernels
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.products import open_blas
from tests.gpu_shim.products import check_independence, check_product

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    try:
        gpu = Gpu()
        open_blas(gpu.info.provider)
    except DeviceError as problem:
        pytest.skip(problem.message)
    return gpu


@pytest.mark.parametrize("name", kernels.PRODUCT_TYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 256, 1), (16, 2048, 9), (517, 4096, 64), (4096, 1024, 200)]
)
def test_product(gpu: Gpu, name: str, rows: int, columns: int, tokens: int) -> None:
    check_product(gpu, np.random.default_rng(rows + len(name)), name, rows, columns, tokens)


@pytest.mark.parametrize("name", ["q4_k", "f16", "f32"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 4096), (512, 4096), (4096, 1024), (4096, 8192), (12288, 4096)])
def test_results_do_not_depend_on_the_batch(gpu: Gpu, name: str, rows: int, columns: int) -> None:
    check_independence(gpu, np.random.default_rng(rows + columns), name, rows, columns)
