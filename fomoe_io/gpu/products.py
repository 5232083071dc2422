"""Dense products of many tokens by hipBLASLt or cuBLASLt: of weights expanded to halves by matrix units, of floats.

What a token's row becomes does not depend on its batch: every product has TOKENS rows of activations, whatever their
number (the last ones are filled up with what lies there), and the algorithm belongs to the matrix's shape.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from contextlib import suppress
from typing import TYPE_CHECKING

from fomoe_io import _blaslt, _hip
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import compiler, kernels
from fomoe_io.gpu.launches import mat_mul

if TYPE_CHECKING:
    from fomoe_io._blaslt import Product
    from fomoe_io._hip import Launch
    from fomoe_io.gpu.arena import DeviceMatrix
    from fomoe_io.gpu.device import Gpu

TOKENS = 128
"""Rows of activations of every product."""

WORKSPACE_BYTES = 32 << 20
"""Device memory for the library: what cuBLAS takes of itself on Hopper (its manual, "cublasSetWorkspace")."""

SCRATCH_BYTES = 64 << 20
"""Device memory for a tile of expanded weights: 8192 rows of 4096, enough to fill a device."""

TILE_ROWS = 128
"""Tiles are multiples of it, so that each begins at an aligned column of the result."""

ALIGNMENT_BYTES = 256
"""Of all addresses; cuBLASLt chooses algorithms that rely on it."""


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
    if provider == "hip-python":
        with suppress(DeviceError):  # hip-python has these entry points since version 10
            _blaslt.use_blas_library("hip", _hip.open_capsules(["rocm.bindings.cyhipblaslt"]))
            return
    try:
        if provider == "cuda":
            hint = "pip install 'fomoe_io[cuda]'"
            _blaslt.use_blas_library("cuda", _hip.open_library(_cuda_libraries()))
        else:
            hint = "install ROCm's hipblaslt"
            names = [*compiler.rocm_libraries("libhipblaslt"), "libhipblaslt.so.1", "libhipblaslt.so.0"]
            _blaslt.use_blas_library("hip", _hip.open_library(names))
    except DeviceError as problem:
        raise DeviceError(f"matrix products are not available ({problem.message})", hint=hint) from None


def _cuda_libraries() -> list[str]:
    """The pip wheel's, ``$CUDA_HOME``'s, the system's."""
    site, home = sysconfig.get_paths()["purelib"], os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [*sorted(glob.glob(f"{site}/nvidia/*/lib")), f"{home}/lib64"]
    paths = [path for folder in folders for path in sorted(glob.glob(f"{folder}/libcublasLt.so.*"))]
    return [*paths, "libcublasLt.so.13", "libcublasLt.so.12"]


def padded(tokens: int) -> int:
    """Rows that activations and results of so many tokens must have room for."""
    return kernels.up(tokens, TOKENS) * TOKENS


class DenseProducts:
    """Products of activations with weight matrices, float16 with float32 sums, or float32 where the weights are.

    A quantized matrix is expanded a tile of rows at a time into scratch memory that all products share, so the
    products of one object must follow one another on a stream.  What the library allocates it allocates here.

    Parameters
    ----------
    gpu : Gpu
    workspace, scratch : int
        Addresses of WORKSPACE_BYTES and of `scratch_bytes` of device memory, which must outlive the launches.
    scratch_bytes : int, optional
        Room for a tile.  The library's choice of algorithm, and so the last bits, may depend on it.

    Raises
    ------
    DeviceError
        The library is not there, or it failed.

    Examples
    --------
    >>> products = DenseProducts(gpu, arena.pointer, arena.pointer + WORKSPACE_BYTES)
    >>> for launch in products.launches(matrix, x_halves, y, tokens=512):
    ...     launch.run(gpu.stream)
    """

    def __init__(self, gpu: Gpu, workspace: int, scratch: int, scratch_bytes: int = SCRATCH_BYTES) -> None:
        open_blas(gpu.info.provider)
        self.gpu, self.scratch, self.scratch_bytes = gpu, scratch, scratch_bytes
        self._blas = _blaslt.Blas(gpu.info.ordinal, workspace, WORKSPACE_BYTES)
        self._shapes: dict[tuple[int, int, int, bool], _blaslt.MatMul] = {}

    def launches(self, matrix: DeviceMatrix, x: int, y: int, tokens: int) -> list[Launch | Product]:
        """The launches of y = x W^T: our own kernel's for floats where the library has none for them.

        Parameters
        ----------
        matrix : DeviceMatrix
            Of a format in ``kernels.PRODUCT_TYPES``.
        x : int
            Address of rows, [padded(tokens)][matrix.columns]: float32 for a matrix of those, else float16 (kernel
            ``to_halves``).
        y : int
            Address of float32 rows, [padded(tokens)][matrix.rows]; those behind the last token become anything.
        tokens : int
        """
        if matrix.kernel not in kernels.PRODUCT_TYPES:
            raise DeviceError(f"the library multiplies no {matrix.kernel} weights")
        if (matrix.address | x | y | self.scratch) % ALIGNMENT_BYTES:
            raise DeviceError(f"the library's products need addresses that are multiples of {ALIGNMENT_BYTES}")
        try:
            return self._by_library(matrix, x, y, tokens)
        except _blaslt.NoProductError:
            if matrix.kernel in kernels.HALF_TYPES:
                raise
        own = mat_mul(matrix, x, y, tokens)
        return [self.gpu.prepare(own.kernel, own.grid, *own.arguments)]

    def _by_library(self, matrix: DeviceMatrix, x: int, y: int, tokens: int) -> list[Launch | Product]:
        steps: list[Launch | Product] = []
        is_float32 = matrix.kernel == "f32"
        row_bytes = (4 if is_float32 else 2) * matrix.columns
        for first, rows in self.tiles(matrix):
            weights = matrix.address
            if matrix.kernel in kernels.EXPANDED_TYPES:
                steps.append(self._expand(matrix, first, rows))
                weights = self.scratch
            shape = self._shape(rows, matrix.columns, matrix.rows, is_float32)
            for token in range(0, tokens, TOKENS):
                result = y + 4 * (token * matrix.rows + first)
                steps.append(_blaslt.Product(shape, x + token * row_bytes, weights, result))
        return steps

    def tiles(self, matrix: DeviceMatrix) -> list[tuple[int, int]]:
        """(first row, rows) of each tile: as few as fit the scratch memory; floats are used where they lie."""
        most = self.scratch_bytes // (2 * matrix.columns) // TILE_ROWS * TILE_ROWS
        if matrix.kernel not in kernels.EXPANDED_TYPES:
            most = matrix.rows
        if most < 1:
            raise DeviceError(f"{self.scratch_bytes} bytes do not hold {TILE_ROWS} rows of {matrix.columns} halves")
        return [(first, min(most, matrix.rows - first)) for first in range(0, matrix.rows, most)]

    def _expand(self, matrix: DeviceMatrix, first: int, rows: int) -> Launch:
        weights = matrix.address + first * matrix.row_bytes
        elements = rows * matrix.columns
        grid = kernels.expand_half_grid(matrix.kernel, elements)
        return self.gpu.prepare(f"expand_half_{matrix.kernel}", grid, weights, self.scratch, elements)

    def _shape(self, rows: int, columns: int, y_stride: int, is_float32: bool) -> _blaslt.MatMul:
        key = (rows, columns, y_stride, is_float32)
        if key not in self._shapes:
            self._shapes[key] = _blaslt.MatMul(self._blas, TOKENS, *key)
        return self._shapes[key]
