"""Dense products of many tokens by the GPU's matrix units: weights expanded to halves, then hipBLASLt or cuBLASLt."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf

from fomoe_io import _blaslt, _hip, gpu_compile, kernels
from fomoe_io.errors import DeviceError

if TYPE_CHECKING:
    from fomoe_io._blaslt import Product
    from fomoe_io._hip import Buffer, Launch
    from fomoe_io.device import Gpu
    from fomoe_io.device_program import DeviceMatrix

WORKSPACE_BYTES = 32 << 20
"""What cuBLAS itself takes on Hopper (docs.nvidia.com/cuda/cublas, "cublasSetWorkspace")."""

SCRATCH_BYTES = 64 << 20
"""A tile of expanded weights: it need not stay in the last cache, and a few thousand rows fill the device."""


def open_blas(provider: str) -> None:
    """Find a provider's library of matrix products; it is in use afterwards.

    Parameters
    ----------
    provider : {"hip-python", "hip", "cuda"}

    Raises
    ------
    DeviceError
        It is not there, or too old.
    """
    if provider == "cuda":
        site, home = sysconfig.get_paths()["purelib"], os.environ.get("CUDA_HOME", "/usr/local/cuda")
        folders = [*sorted(glob.glob(f"{site}/nvidia/*/lib")), f"{home}/lib64"]
        paths = [path for folder in folders for path in sorted(glob.glob(f"{folder}/libcublasLt.so.*"))]
        names, hint = [*paths, "libcublasLt.so.13", "libcublasLt.so.12"], "pip install 'fomoe_io[cuda]'"
    else:
        names = [*gpu_compile.rocm_libraries("libhipblaslt"), "libhipblaslt.so.1", "libhipblaslt.so.0"]
        hint = "install ROCm's hipblaslt"
    try:
        _blaslt.use_blas_library(provider, _open(provider, names))
    except DeviceError as problem:
        raise DeviceError(f"matrix products are not available ({problem.message})", hint=hint) from None


def _open(provider: str, names: list[str]) -> _hip.Library:
    if provider == "hip-python":
        try:
            return _hip.open_capsules(["rocm.bindings.cyhipblaslt"])
        except DeviceError:
            pass  # hip-python has these since version 10
    return _hip.open_library(names)


@dataclass(frozen=True, slots=True)
class _Tile:
    first: int
    rows: int


class DensePrefill:
    """Products of `tokens` activation rows with weight matrices, float16 with float32 sums.

    A matrix is expanded a tile of rows at a time into scratch memory that all products share, so the products of one
    object must follow one another on a stream.  Everything is allocated, and the library warmed, before a capture:
    hipBLASLt allocates when its handle is made.

    Parameters
    ----------
    gpu : Gpu
    tokens : int
        Rows of every product.
    columns : int
        The longest row of activations.
    scratch_bytes : int, optional
        Room for a tile.  Results do not depend on the matrix's tiling as far as the library's choice of algorithm
        does not: keep it constant where bits must be the same.

    Raises
    ------
    DeviceError
        The library is not there, or the memory is not.
    """

    def __init__(self, gpu: Gpu, tokens: int, columns: int, scratch_bytes: int = SCRATCH_BYTES) -> None:
        assert _hip.provider is not None
        open_blas(_hip.provider)
        self.gpu, self.tokens, self.columns = gpu, tokens, columns
        self._blas = _blaslt.Blas(gpu.info.ordinal, WORKSPACE_BYTES)
        self._shapes: dict[tuple[int, int, int], _blaslt.MatMul] = {}
        self._scratch = gpu.allocate(scratch_bytes)
        self._halves = gpu.allocate(2 * tokens * columns)
        self._scale = gpu.allocate(4 * tokens)

    def tiles(self, rows: int, columns: int) -> list[_Tile]:
        """How a matrix is cut: as few tiles of whole rows as fit the scratch memory."""
        most = self._scratch.nbytes // (2 * columns)
        if most < 1:
            raise DeviceError(f"{self._scratch.nbytes} bytes do not hold a row of {columns} halves")
        return [_Tile(first, min(most, rows - first)) for first in range(0, rows, most)]

    def multiply(self, matrix: DeviceMatrix, x: Buffer | int, y: Buffer | int) -> list[Launch | Product]:
        """The launches of y[tokens, rows] = x[tokens, columns] W^T; x and y are float32.

        Parameters
        ----------
        matrix : DeviceMatrix
            Of a format in ``kernels.HALF_TYPES``.
        x, y : Buffer or int
            Memory or an address.
        """
        if matrix.kernel not in kernels.HALF_TYPES or matrix.columns > self.columns:
            raise DeviceError(f"no product by halves of {matrix.kernel} weights with rows of {matrix.columns}")
        base = y if isinstance(y, int) else y.pointer
        prepare, columns = self.gpu.prepare, matrix.columns
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[matrix.kernel.upper()]]
        row_bytes = columns // elements * size
        steps: list[Launch | Product] = [
            prepare("half_rows", (self.tokens, 1, 1), x, self._halves, self._scale, columns)
        ]
        for tile in self.tiles(matrix.rows, columns):
            grid = (kernels.up(tile.rows * columns // kernels.UNIT_ELEMENTS[matrix.kernel], 256), 1, 1)
            weights = matrix.address + tile.first * row_bytes
            steps.append(prepare(f"expand_half_{matrix.kernel}", grid, weights, self._scratch, tile.rows, columns))
            shape = self._shape(tile.rows, columns, matrix.rows)
            steps.append(shape.bind(self._halves, self._scratch, base + 4 * tile.first))
        grid = (kernels.up(matrix.rows, 1024), self.tokens, 1)
        steps.append(prepare("scale_rows", grid, y, self._scale, matrix.rows))
        return steps

    def _shape(self, rows: int, columns: int, y_stride: int) -> _blaslt.MatMul:
        key = (rows, columns, y_stride)
        if key not in self._shapes:
            self._shapes[key] = _blaslt.MatMul(self._blas, self.tokens, *key)
        return self._shapes[key]
