"""Launches of what both recorders know: their grids and arguments."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fomoe_io.experts.car import NativeCar
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import DeviceMatrix, DeviceRows, LaunchSpec, length
from fomoe_io.models.recorder import Attention, Experts, KvCache, Picks, Router, Score

CAR_BYTES = ctypes.sizeof(NativeCar)
"""gpu/kernels/car_rule.h, fomoe_car."""

FORM = "@4Pi4x"
"""gpu/kernels/experts.h, expert_form."""


@dataclass(frozen=True, slots=True)
class Product:
    """y = matrix x, or some rows of it: their sums are made in the order of the whole product's.

    Attributes
    ----------
    x, y : int
        Addresses of one token's vectors, y's of all rows.
    own : slice, optional
        The rows; None: all.
    """

    matrix: DeviceMatrix
    x: int
    y: int
    own: slice | None = None

    @property
    def first(self) -> int:
        """The first of the rows."""
        return self.own.start if self.own else 0

    @property
    def rows(self) -> int:
        """How many."""
        return length(self.own) if self.own else self.matrix.rows

    @property
    def weights(self) -> int:
        """Where they begin."""
        return self.matrix.address + self.first * self.matrix.row_bytes

    @property
    def output(self) -> int:
        """Where their sums go."""
        return self.y + 4 * self.first


def mat_vec(product: Product, tokens: int = 1) -> LaunchSpec:
    """One token's product with a matrix; of several tokens with all its rows."""
    m, rows = product.matrix, product.rows
    split = kernels.split_of(m.kernel, m.columns, m.rows)
    grid = kernels.mat_vec_grid(m.kernel, rows, split, tokens)
    arguments = [product.weights, product.x, product.output, rows, m.columns, split]
    return LaunchSpec(f"mat_vec_{m.kernel}", grid, arguments)


def mat_vec_many(products: Sequence[Product]) -> LaunchSpec:
    """One launch for one token's products of several matrices of one format with one input."""
    first, x = products[0].matrix, products[0].x
    split = kernels.split_of(first.kernel, first.columns, max(p.matrix.rows for p in products))
    blocks = sum(kernels.mat_vec_grid(first.kernel, p.rows, split)[0] for p in products)
    unused = kernels.MAT_VEC_MANY - len(products)
    weights = [p.weights for p in products] + [None] * unused
    outputs = [p.output for p in products] + [None] * unused
    rows = [p.rows for p in products] + [0] * unused
    return LaunchSpec(
        f"mat_vec_many_{first.kernel}", (blocks, 1, 1), [*weights, *outputs, *rows, x, first.columns, split]
    )


def mat_mul(matrix: DeviceMatrix, x: int, y: int, tokens: int) -> LaunchSpec:
    """Many tokens' product with a matrix, by tiles; x and y are addresses of their rows."""
    arguments = [matrix.address, x, y, matrix.rows, matrix.columns, tokens]
    return LaunchSpec(f"mat_mul_{matrix.kernel}", kernels.mat_mul_grid(matrix.rows, tokens), arguments)


def attend(
    turned: int, parts: int, positions: int, states: int | None, tokens: int, splits: int, cache: KvCache,
    op: Attention[int],
) -> LaunchSpec:  # fmt: skip
    """What each range of positions adds to so many tokens' attention."""
    return LaunchSpec(
        f"attention_{cache.type.suffix}_{cache.columns}",
        kernels.attention_grid(op.heads, cache.heads, splits, tokens),
        [
            turned, cache.keys, cache.values, positions, states, parts, op.heads, cache.heads, splits,
            cache.columns**-0.5, op.window, cache.ring,
        ],
    )  # fmt: skip


def merge(
    parts: int, positions: int, query: tuple[int, int], output: int, q8: str | None, tokens: int, splits: int,
    cache: KvCache, op: Attention[int],
) -> LaunchSpec:  # fmt: skip
    """The ranges together; `query` is an address and the columns of a row."""
    address, columns = query
    gate = address + 4 * cache.columns if op.gated else None
    return LaunchSpec(
        "attention_merge",
        (op.heads, tokens, 1),
        [
            parts, positions, gate, output, q8, op.heads, cache.columns, splits, columns // op.heads, op.sinks,
            op.window,
        ],
    )  # fmt: skip


def attend_prompt(
    query: DeviceRows, turned: DeviceRows, output: DeviceRows, positions: int, states: int | None, tokens: int,
    cache: KvCache, op: Attention[int],
) -> LaunchSpec:  # fmt: skip
    """The attention of so many tokens, and what their gates make of it."""
    return LaunchSpec(
        f"attention_prompt_{cache.type.suffix}_{cache.columns}",
        kernels.attention_prompt_grid(op.heads, cache.heads, tokens),
        [
            turned.address, cache.keys, cache.values, positions, states,
            query.address + 4 * cache.columns if op.gated else None, op.sinks, output.address, tokens, op.heads,
            cache.heads, query.columns // op.heads, cache.columns**-0.5, op.window, cache.ring,
        ],
    )  # fmt: skip


def is_plain(r: Router[int]) -> bool:
    """Whether it is softmax alone, for which routing and resolving are one launch."""
    return r.score == Score.SOFTMAX and r.bias is None and r.logit_bias is None and r.groups == 1


def route(picks: Picks[int, DeviceRows], tokens: int, chosen_by: int | None) -> LaunchSpec:
    """The picks; `chosen_by` is where a router of another kind leaves what it chose by."""
    r, grid = picks.router, (tokens, 1, 1)
    rows = (picks.ids.address, picks.weights.address, r.experts, r.used)
    if is_plain(r):
        return LaunchSpec("route", grid, [picks.logits.address, *rows, int(r.normalise), r.scale])
    biases = (r.logit_bias, r.bias)
    more = (int(r.score), int(r.normalise), r.scale, chosen_by)
    arguments = [picks.logits.address, *biases, *rows, *more]
    if r.groups > 1:
        return LaunchSpec("route_in_groups", grid, [*arguments, r.groups, r.groups_used])
    return LaunchSpec("route_by", grid, arguments)


def expert_form(picks: Picks[int, DeviceRows], op: Experts[int]) -> bytes | None:
    """What experts compute beside their products (gpu/kernels/experts.h); None: nothing."""
    if op == Experts():
        return None
    return struct.pack(FORM, picks.ids.address, *(bias or 0 for bias in op.biases), op.is_clamped)


def finished(specs: list[Any]) -> list[Any]:
    """The launches, where "q8" arguments that nobody reads are none."""
    for spec in specs:
        if isinstance(spec, LaunchSpec):
            spec.arguments = [None if isinstance(a, str) else a for a in spec.arguments]
    return specs
