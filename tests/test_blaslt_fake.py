"""Products by matrix units against doubles of libamdhip64 and libhipblaslt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fomoe_io import _blaslt, device, gpu_compile, kernels
from fomoe_io.device import Gpu
from fomoe_io.device_prefill import DensePrefill, open_blas
from fomoe_io.device_program import DeviceMatrix
from fomoe_io.errors import DeviceError
from tests.fake_hip.build import Fake, installed_fake
from tests.gpu_shim.products import check_product


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    with installed_fake(tmp_path_factory.mktemp("rocm"), delay_us=100) as found:
        yield found


@pytest.fixture
def gpu(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setitem(device.PROVIDERS, "hip", ("hip",))
    return Gpu("hip")


@pytest.mark.parametrize("name", kernels.HALF_TYPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(7, 256, 3), (70, 512, 16)])
def test_product(gpu: Gpu, name: str, rows: int, columns: int, tokens: int) -> None:
    check_product(gpu, np.random.default_rng(rows + len(name)), name, rows, columns, tokens)


def test_everything_is_given_back(gpu: Gpu, fake: Fake) -> None:
    before = fake.live()
    check_product(gpu, np.random.default_rng(1), "q4_k", 9, 256, 2)
    assert fake.live() == before


@pytest.mark.parametrize("call", [name for name in _blaslt.NAMES if "Destroy" not in name])
def test_a_failing_library_ends_in_one_line(gpu: Gpu, fake: Fake, call: str) -> None:
    before = fake.live()
    fake.fail(f"hipblasLt{call}", 6)
    with pytest.raises(DeviceError, match=rf"hipblasLt{call} failed: INTERNAL_ERROR \(6\)") as caught:
        check_product(gpu, np.random.default_rng(1), "q8_0", 9, 256, 2)
    assert "\n" not in caught.value.message
    del caught
    assert fake.live() == before


def test_without_the_library(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_compile, "rocm_libraries", lambda name: ["/nowhere/libhipblaslt.so"])
    with pytest.raises(DeviceError, match="matrix products are not available") as caught:
        open_blas("hip")
    assert caught.value.hint == "install ROCm's hipblaslt"


def test_what_it_cannot_multiply(gpu: Gpu) -> None:
    prefill = DensePrefill(gpu, 4, 256, 4096)
    x = gpu.allocate(4096)
    for matrix in (DeviceMatrix(x.pointer, "f32", 4, 256), DeviceMatrix(x.pointer, "q4_k", 4, 512)):
        with pytest.raises(DeviceError, match="no product by halves"):
            prefill.multiply(matrix, x, x)
    with pytest.raises(DeviceError, match="do not hold a row"):
        prefill.tiles(4, 4096)
