"""Products by matrix units against doubles of libamdhip64 and libhipblaslt: by dlopen, then through hip-python.

hip-python looks for its libraries once a process, so its turn is a second pytest of this file (the last test)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import _blaslt, _hip
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import compiler, device, kernels
from fomoe_io.gpu.arena import DeviceMatrix
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.products import TOKENS, open_blas, padded
from tests.fake_hip.build import Fake, installed_fake
from tests.gpu_shim.products import check_independence, check_product, opened

PROVIDER = os.environ.get("FOMOE_TEST_PROVIDER", "hip")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    if "FOMOE_TEST_PROVIDER" in os.environ:
        yield Fake(Path(os.environ["ROCM_PATH"]))
        return
    with installed_fake(tmp_path_factory.mktemp("rocm"), delay_us=100) as found:
        yield found


@pytest.fixture
def gpu(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setitem(device.PROVIDERS, "hip", (PROVIDER,))
    return Gpu("hip")


@pytest.mark.parametrize("name", kernels.PRODUCT_TYPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(7, 256, 3), (300, 512, 130)])
def test_product(gpu: Gpu, name: str, rows: int, columns: int, tokens: int) -> None:
    check_product(gpu, np.random.default_rng(rows + len(name)), name, rows, columns, tokens)


@pytest.mark.parametrize("name", ["q4_k", "f32"])
def test_results_do_not_depend_on_the_batch(gpu: Gpu, name: str) -> None:
    check_independence(gpu, np.random.default_rng(3), name, 40, 256)


@pytest.mark.parametrize("code", [3, 7, 8])
def test_floats_that_the_library_has_nothing_for_are_multiplied_all_the_same(gpu: Gpu, fake: Fake, code: int) -> None:
    """As on cards for which it was built without float32: our own kernel's, whose rows are other halves' or none's."""
    before = fake.live()
    fake.fail("hipblasLtMatmulAlgoGetHeuristic", code)
    with opened(gpu) as products:
        [launch] = products.launches(DeviceMatrix(0, "f32", 20, 256), 0, 0, 130)
        assert not hasattr(launch, "shape")
        fake.fail("hipblasLtMatmulAlgoGetHeuristic", code)
        with pytest.raises(DeviceError, match="hipblasLtMatmulAlgoGetHeuristic failed"):
            products.launches(DeviceMatrix(0, "f16", 20, 256), 0, 0, 130)
    del products, launch
    assert fake.live() == before
    fake.fail("hipblasLtMatmulAlgoGetHeuristic", code)
    check_product(gpu, np.random.default_rng(code), "f32", 20, 256, 130)


@pytest.mark.parametrize(
    ("name", "tokens", "launches"), [("q4_k", 1, 6), ("q4_k", 257, 12), ("f16", 257, 3), ("f32", 257, 3)]
)
def test_a_tile_is_expanded_once(gpu: Gpu, name: str, tokens: int, launches: int) -> None:
    with opened(gpu, 128 * 2 * 256) as products:
        matrix = DeviceMatrix(1 << 20, name, 300, 256)
        assert len(products.launches(matrix, 1 << 21, 1 << 22, tokens)) == launches
        shapes = {step.shape for step in products.launches(matrix, 1 << 21, 1 << 22, tokens) if hasattr(step, "shape")}
        assert sorted(shape.rows for shape in shapes) == ([44, 128] if name == "q4_k" else [300])
        assert {(shape.tokens, shape.columns, shape.y_stride) for shape in shapes} == {(TOKENS, 256, 300)}


def test_padding() -> None:
    assert [padded(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_everything_is_given_back(gpu: Gpu, fake: Fake) -> None:
    before = fake.live()
    with opened(gpu) as products:
        products.launches(DeviceMatrix(0, "f16", 9, 256), 0, 0, 2)
        assert fake.live()["blas"] == before["blas"] + 5  # the handle, a product's description, three layouts
    del products
    assert fake.live() == before


@pytest.mark.parametrize("call", [name for name in _blaslt.NAMES if "Destroy" not in name])
def test_a_failing_library_ends_in_one_line(gpu: Gpu, fake: Fake, call: str) -> None:
    before = fake.live()
    # open_blas() makes one preference to see that the library is there.
    fake.fail(f"hipblasLt{call}", 5, after=call == "MatmulPreferenceCreate")
    with pytest.raises(DeviceError, match=rf"hipblasLt{call} failed: EXECUTION_FAILED \(5\)") as caught:
        check_product(gpu, np.random.default_rng(1), "q8_0", 9, 256, 2)
    assert "\n" not in caught.value.message
    del caught
    assert fake.live() == before


def open_nothing(paths: list[str]) -> _hip.Library:
    raise DeviceError(f"cannot open {paths[0]}")


@pytest.mark.skipif(PROVIDER != "hip", reason="hip-python keeps the library that it found")
@pytest.mark.parametrize(
    ("provider", "hint"), [("hip", "install ROCm's hipblaslt"), ("cuda", "pip install 'fomoe_io[cuda]'")]
)
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, provider: str, hint: str) -> None:
    monkeypatch.setattr(_hip, "open_library", open_nothing)
    with pytest.raises(DeviceError, match=r"matrix products are not available \(cannot open .*[Ll]t\.so") as caught:
        open_blas(provider)
    assert caught.value.hint == hint


@pytest.mark.skipif(PROVIDER == "hip", reason="there is nothing but dlopen")
def test_hip_pythons_own_entry_points_are_used(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hip, "open_library", open_nothing)
    open_blas(PROVIDER)


@pytest.mark.skipif(PROVIDER != "hip", reason="hip-python has no missing entry points")
def test_a_library_that_is_too_old(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "rocm_libraries", lambda name: [str(fake.rocm / "lib" / "libamdhip64.so")])
    with pytest.raises(DeviceError, match="has no hipblasLtCreate: the library is too old"):
        open_blas("hip")


def test_what_it_cannot_multiply(gpu: Gpu) -> None:
    with opened(gpu, 4096) as products:
        for name in ("bf16", "mxfp4"):
            with pytest.raises(DeviceError, match=f"the library multiplies no {name} weights"):
                products.launches(DeviceMatrix(0, name, 4, 256), 0, 0, 1)
        with pytest.raises(DeviceError, match="4096 bytes do not hold 128 rows of 256 halves"):
            products.launches(DeviceMatrix(0, "q4_k", 4, 256), 0, 0, 1)
        with pytest.raises(DeviceError, match="multiples of 256"):
            products.launches(DeviceMatrix(128, "f16", 4, 256), 0, 0, 1)


def test_numbers_are_the_vendors(fake: Fake) -> None:
    if importlib.util.find_spec("rocm") is None:
        pytest.skip("hip-python is not installed (pip install hip-python)")
    from rocm.bindings import hip, hipblas, hipblaslt

    open_blas("hip")
    want = {
        "R_32F": hip.hipDataType.HIP_R_32F.value,
        "R_16F": hip.hipDataType.HIP_R_16F.value,
        "MATMUL_DESC_TRANSA": hipblaslt.hipblasLtMatmulDescAttributes_t.HIPBLASLT_MATMUL_DESC_TRANSA.value,
        "OP_T": hipblas.hipblasOperation_t.HIPBLAS_OP_T.value,
        "COMPUTE_32F": hipblas.hipblasComputeType_t.HIPBLAS_COMPUTE_32F.value,
        "MATMUL_PREF_MAX_WORKSPACE_BYTES": (
            hipblaslt.hipblasLtMatmulPreferenceAttributes_t.HIPBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES.value
        ),
    }
    numbers = _blaslt.numbers()
    assert {name: numbers[name] for name in want} == want
    names = ("INVALID_VALUE", "NOT_SUPPORTED", "ARCH_MISMATCH")
    known = tuple(getattr(hipblas.hipblasStatus_t, f"HIPBLAS_STATUS_{name}").value for name in names)
    assert _blaslt.KNOWS_NONE["hipblasLt"] == known
    assert numbers["result_bytes"] >= hipblaslt._hipblasLtMatmulHeuristicResult_t().c_sizeof()


@pytest.mark.skipif(PROVIDER != "hip", reason="this is that run")
def test_all_of_this_through_hip_python(fake: Fake) -> None:
    if importlib.util.find_spec("rocm") is None:
        pytest.skip("hip-python is not installed (pip install hip-python)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    setting = {"FOMOE_TEST_PROVIDER": "hip-python", "FOMOE_CACHE": str(fake.path / "cache-hip-python")}
    child = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
