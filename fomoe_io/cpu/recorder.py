"""What a model file composes: weights, activation rows and steps, recorded into a native program.

A model calls the methods of :class:`Recorder` once, in the order of its equations; the result is replayed
for every batch of tokens without touching a Python object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fomoe_io import _cpu
from fomoe_io._cpu import Experts, Matrix, Rows

F32 = 0


@dataclass(slots=True)
class Activation:
    """One value a token, in every type that its consumers want (float32 is type 0)."""

    forms: dict[int, Any] = field(default_factory=dict)

    def form(self, matrix: Matrix) -> Rows:
        """The rows a product with `matrix` reads."""
        rows: Rows = self.forms[matrix.activation_type]
        return rows


class StateLayout:
    """Offsets of a session's memory: recurrent state (zero at the start) first come, KV caches after."""

    def __init__(self) -> None:
        self.bytes = 0
        self.zeroed: list[tuple[int, int]] = []

    def take(self, floats: int, *, zeroed: bool) -> int:
        """Reserve float32 elements on a cache line; return their offset in bytes."""
        offset = self.bytes
        size = (floats * 4 + 63) // 64 * 64
        self.bytes += size
        if zeroed:
            self.zeroed.append((offset, size))
        return offset


class Recorder:
    """Collects the steps of a model for batches of up to `batch_tokens` tokens.

    Parameters
    ----------
    team : _cpu.Team
        The threads that will replay the program.
    kernels : _cpu.Kernels
        What they multiply with; the weights' are the same.
    batch_tokens : int
        Rows of every activation.
    context_tokens : int
        Positions of the KV cache.
    scratch_floats : int
        Size of each thread's scratch area.
    experts : _cpu.Experts or None
        The routed experts; None records a program that can't run but whose size is known
        (`activation_bytes`, `state.bytes`).
    lookahead : bool
        Whether layers end with a guess at the next one's experts.
    """

    def __init__(
        self,
        team: _cpu.Team,
        kernels: _cpu.Kernels,
        *,
        batch_tokens: int,
        context_tokens: int,
        scratch_floats: int,
        experts: Experts | None,
        lookahead: bool = False,
    ) -> None:
        self.program = _cpu.Program(team, kernels, scratch_floats)
        self._kernels = kernels
        self.batch_tokens = batch_tokens
        self.context_tokens = context_tokens
        self.experts_pool = experts
        self.lookahead = lookahead
        self.state = StateLayout()
        self.activation_bytes = 0
        self._rows: dict[tuple[str, int, int], Rows] = {}

    def rows(self, name: str, columns: int, type: int = F32) -> Rows:
        """Activation rows by name; layers that ask for the same name, width and type share them."""
        key = (name, columns, type)
        if key not in self._rows:
            self._rows[key] = Rows(self._kernels, columns, self.batch_tokens, type)
            self.activation_bytes += self._rows[key].stride_bytes * self.batch_tokens
        return self._rows[key]

    def _forms(self, name: str, columns: int, types: Sequence[int]) -> Activation:
        return Activation({t: self.rows(name, columns, t) for t in dict.fromkeys(types)})

    def embed(self, matrix: Matrix, output: Rows, *, file: int = -1, offset: int = 0) -> None:
        """output = rows of the token embedding, read from `file` (a descriptor) when it is not in memory."""
        self.program.embed(matrix, output, file, offset)

    def norm(
        self,
        x: Rows,
        weight: np.ndarray,
        epsilon: float,
        *,
        name: str,
        feeds: Sequence[Matrix] = (),
        types: Sequence[int] = (),
        of_outputs: bool = False,
    ) -> Activation:
        """RMS norm of `x`, converted once to each activation type that `feeds` (and `types`) read."""
        wanted = [m.activation_type for m in feeds] + list(types)
        result = self._forms(name, x.columns, wanted)
        self.program.norm(x, weight, epsilon, list(result.forms.values()), of_outputs)
        return result

    def convert(self, x: Rows, *, name: str, feeds: Sequence[Matrix]) -> Activation:
        """`x` in the activation types that `feeds` read."""
        result = Activation({F32: x})
        for kind in dict.fromkeys(m.activation_type for m in feeds):
            if kind != F32:
                result.forms[kind] = self.rows(name, x.columns, kind)
                self.program.quantize(x, result.forms[kind])
        return result

    def silu_mul(self, gate: Rows, up: Rows, *, name: str, feeds: Sequence[Matrix]) -> Activation:
        """silu(gate) * up, in the activation types that `feeds` read."""
        result = self._forms(name, gate.columns, [m.activation_type for m in feeds])
        for rows in result.forms.values():
            self.program.silu_mul(gate, up, rows)
        return result

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is recorded inside depends on the last norm alone; here the steps still follow one another."""
        yield

    def mat_mul(self, products: Sequence[tuple[Matrix, Activation, Rows]]) -> None:
        """Products that depend on nothing but earlier steps, as one step: output = matrix @ input."""
        self.program.mat_mul([(m, x.form(m), y, False) for m, x, y in products])

    def mat_mul_add(self, matrix: Matrix, x: Activation, output: Rows) -> None:
        """output += matrix @ x"""
        self.program.mat_mul([(matrix, x.form(matrix), output, True)])

    def logits(self, matrix: Matrix, x: Activation) -> None:
        """The last product: into the caller's array, for the positions that want logits."""
        self.program.mat_mul([(matrix, x.form(matrix), None, False)], True, True)
