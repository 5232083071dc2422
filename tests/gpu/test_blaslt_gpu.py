"""Products by cuBLASLt or hipBLASLt on a real device.  Run with -m gpu."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe_io import kernels
from fomoe_io.device import Gpu
from fomoe_io.errors import DeviceError
from tests.gpu_shim.products import check_product

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    try:
        return Gpu()
    except DeviceError as problem:
        pytest.skip(problem.message)


@pytest.mark.parametrize("name", kernels.HALF_TYPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(16, 256, 8), (517, 4096, 64), (4096, 1024, 200)])
def test_product(gpu: Gpu, name: str, rows: int, columns: int, tokens: int) -> None:
    check_product(gpu, np.random.default_rng(rows + len(name)), name, rows, columns, tokens)
