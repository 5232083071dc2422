"""Launches of products: their grids and arguments."""

from __future__ import annotations

from collections.abc import Sequence

from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import DeviceMatrix, LaunchSpec


def mat_vec(matrix: DeviceMatrix, x: int, y: int) -> LaunchSpec:
    """One token's product with a matrix."""
    split = kernels.split_of(matrix.kernel, matrix.columns, matrix.rows)
    grid = kernels.mat_vec_grid(matrix.kernel, matrix.rows, split)
    return LaunchSpec(f"mat_vec_{matrix.kernel}", grid, [matrix.address, x, y, matrix.rows, matrix.columns, 1, split])


def mat_vec_many(products: Sequence[tuple[DeviceMatrix, int, int]]) -> LaunchSpec:
    """One launch for one token's products of several matrices of one format with one input."""
    first, x, _ = products[0]
    split = kernels.split_of(first.kernel, first.columns, max(m.rows for m, _, _ in products))
    blocks = sum(kernels.mat_vec_grid(m.kernel, m.rows, split)[0] for m, _, _ in products)
    unused = kernels.MAT_VEC_MANY - len(products)
    weights = [m.address for m, _, _ in products] + [None] * unused
    outputs = [y for _, _, y in products] + [None] * unused
    rows = [m.rows for m, _, _ in products] + [0] * unused
    return LaunchSpec(
        f"mat_vec_many_{first.kernel}", (blocks, 1, 1), [*weights, *outputs, *rows, x, first.columns, 1, split]
    )
