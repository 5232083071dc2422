"""A batch of a prompt, for a GPU: the recorder's launches for many tokens, cut where the host serves experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fomoe_io.cpu.recorder import Activation
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import (
    F32,
    HALF,
    DeviceExpertLayer,
    DeviceMatrix,
    DeviceRows,
    EmbeddingTable,
    LaunchSpec,
    Memory,
)
from fomoe_io.gpu.kernels import up
from fomoe_io.gpu.recorder import DeviceRecorder

LOGITS_TOKENS = kernels.TILE_TOKENS
"""Tokens whose logits are computed at once: one reading of the output matrix."""


@dataclass(frozen=True, slots=True)
class DenseProduct:
    """y = x matrix^T through the vendor's library; x are halves, y floats."""

    matrix: DeviceMatrix
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class PostPicks:
    """The router's picks, int32 [tokens, used], and their weights go to the host."""

    ids: int
    weights: int


@dataclass(frozen=True, slots=True)
class ServeExperts:
    """The host brings a layer's experts, some at a time, and has their products computed.

    Attributes
    ----------
    input : activation rows, one a token
    hidden, hidden_floats : what gate and up make, a row a pair; floats where down reads those
    outputs : float32 [pairs, columns], what down makes
    """

    layer: int
    input: int
    hidden: int
    hidden_floats: int | None
    outputs: int
    columns: int
    used: int


class BatchRecorder(DeviceRecorder):
    """As :class:`DeviceRecorder`, for `tokens` tokens of a prompt; a token's results do not depend on those beside it.

    Parameters
    ----------
    memory : Memory
    tokens : int
        At most ``memory.batch_tokens``.
    uses_products : bool
        Dense products of quantized and half weights go through the vendor's library, whose launches are the runner's.
    **settings
        Those of :class:`DeviceRecorder`.
    """

    def __init__(self, memory: Memory, tokens: int, *, uses_products: bool, **settings: Any) -> None:
        self.tokens, self._uses_products = tokens, uses_products
        super().__init__(memory, **settings)

    def _take_inputs(self) -> None:
        self.positions = self.memory.words("batch_positions", 4 * self.memory.batch_tokens)
        self.logits_address = self.memory.words("batch_logits", 4 * self.vocabulary * LOGITS_TOKENS)

    def _embedding_rows(self, table: EmbeddingTable) -> int:
        self.embedding_address = self.memory.words("batch_embedding", table.row_bytes * self.memory.batch_tokens)
        return self.embedding_address

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is recorded inside runs while the host looks at the picks."""
        yield

    # ---- dense ----

    def form_of(self, matrix: DeviceMatrix) -> int:
        """Halves for what the library multiplies."""
        return HALF if self._uses_products and matrix.kernel in kernels.HALF_TYPES else matrix.activation_type

    def _forms(self, name: str, columns: int, wanted: Iterable[int]) -> dict[int, DeviceRows]:
        wanted = list(wanted)
        return super()._forms(name, columns, [*wanted, F32] if HALF in wanted else wanted)

    def _as_halves(self, forms: dict[int, DeviceRows], tokens: int) -> list[LaunchSpec]:
        if HALF not in forms:
            return []
        x, elements = forms[F32], forms[F32].columns * tokens
        return [LaunchSpec("to_halves", kernels.to_halves_grid(elements), [x.address, forms[HALF].address, elements])]

    def _tiled(self, matrix: DeviceMatrix, x: int, y: int, tokens: int) -> LaunchSpec:
        arguments = [matrix.address, x, y, matrix.rows, matrix.columns, tokens]
        return LaunchSpec(f"mat_mul_{matrix.kernel}", kernels.mat_mul_grid(matrix.rows, tokens), arguments)

    def mat_mul(self, products: Sequence[tuple[DeviceMatrix, Activation, DeviceRows]]) -> None:
        """output = matrix @ input, for each."""
        for matrix, activation, y in products:
            form = self.form_of(matrix)
            x = activation.forms[form].address
            if form == HALF:
                self.body.append(DenseProduct(matrix, x, y.address))
            else:
                self.body.append(self._tiled(matrix, x, y.address, self.tokens))

    def logits(self, matrix: DeviceMatrix, x: Activation) -> None:
        """The last product, for the tokens that want logits."""
        final, row = self._final, x.forms[matrix.activation_type].address
        assert final is not None
        self._tail = lambda first, tokens: [
            *final(first, tokens),
            self._tiled(matrix, row, self.logits_address, tokens),
        ]

    # ---- attention ----

    def attention(
        self, query: DeviceRows, output: DeviceRows, key_cache: int, value_cache: int, context: int, heads: int,
        kv_heads: int, head_columns: int, query_stride: int, gated: bool,
    ) -> None:  # fmt: skip
        """A few tokens at a time: the parts that are merged take room for each position range."""
        splits = kernels.attention_splits(context)
        parts, most = self._attention_parts(heads * splits * (head_columns + 2))
        turned = self._rotated_query[query.address]
        for first in range(0, self.tokens, most):
            tokens, positions = min(most, self.tokens - first), self.positions + 4 * first
            self._add(
                f"attention_f32_{head_columns}", kernels.attention_grid(heads, kv_heads, splits, tokens),
                turned.address + first * turned.stride_bytes, key_cache, value_cache, positions, parts, heads, kv_heads,
                splits, head_columns**-0.5,
            )  # fmt: skip
            gate = query.address + 4 * head_columns + first * query.stride_bytes if gated else None
            self._add(
                "attention_merge", (heads, tokens, 1), parts, positions, gate,
                output.address + first * output.stride_bytes, None, heads, head_columns, splits, query_stride,
            )  # fmt: skip

    # ---- experts ----

    def route(
        self, logits: DeviceRows, ids: DeviceRows, weights: DeviceRows, layer: int, experts: int, used: int,
        normalise: bool, scale: float,
    ) -> None:  # fmt: skip
        """The picks, and their way to the host."""
        self._add(
            "route", (self.tokens, 1, 1), logits.address, ids.address, weights.address, experts, used, int(normalise),
            scale,
        )  # fmt: skip
        self.body.append(PostPicks(ids.address, weights.address))

    def experts_begin(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Nothing: the host has not seen the picks yet."""

    def experts(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Where the host serves the layer."""
        used, columns = ids.columns, gate_input.columns
        hidden, floats = self._hidden(experts[layer], used, self.hidden)
        outputs = self._outputs(used, columns)
        self.body.append(ServeExperts(layer, gate_input.address, hidden, floats, outputs, columns, used))

    def _outputs(self, used: int, columns: int) -> int:
        return self.memory.words("pair_outputs", 4 * self.memory.batch_tokens * used * columns)

    def combine(
        self, experts: dict[int, DeviceExpertLayer], weights: DeviceRows, output: DeviceRows, used: int,
        shared: DeviceRows | None, shared_gate: DeviceRows | None,
    ) -> None:  # fmt: skip
        """output += the experts' weighted sum (+ the shared expert); the sum is made by the next norm."""
        total = self.rows("added", output.columns)
        self._add(
            "combine_picks", (up(output.columns, 256), self.tokens, 1), self._outputs(used, output.columns),
            weights.address, shared and shared.address, shared_gate and shared_gate.address, total.address,
            output.columns, used,
        )  # fmt: skip
        self._add_later(output, total)
