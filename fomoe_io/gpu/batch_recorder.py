"""A batch of a prompt, for a GPU: the recorder's launches for many tokens, cut where the host serves experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
    length,
)
from fomoe_io.gpu.kernels import up
from fomoe_io.gpu.launches import Product, attend_prompt, mat_mul, mat_vec, route
from fomoe_io.gpu.recorder import DeviceRecorder
from fomoe_io.models.recorder import Activation, Attention, Experts, KvCache, Picks, Router

LOGITS_TOKENS = 16
"""Tokens whose logits are computed at once, by one reading of the output matrix: 16 MB of a vocabulary of 248,320."""


@dataclass(frozen=True, slots=True)
class DenseProduct:
    """y = x matrix^T through the vendor's library; x are halves, floats for a matrix of floats; y floats."""

    matrix: DeviceMatrix
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class PostPicks:
    """The router's picks, int32 [tokens, used], and their weights go to the host."""

    ids: int
    weights: int


@dataclass(frozen=True, slots=True)
class Hop:
    """Rows go to another device, or come from one: the residual stream's and those that the next norm adds to it.

    Attributes
    ----------
    number : int
        Of the change of devices.
    comes : bool
    rows : tuple of int
        Addresses of float32 [tokens, columns].
    columns : int
    """

    number: int
    comes: bool
    rows: tuple[int, ...]
    columns: int


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts that have come: addresses of their `count` tiles and of the pairs' order (gpu/kernels/tile.h)."""

    tiles: int
    order: int
    count: int


@dataclass(frozen=True, slots=True)
class ServeExperts:
    """The host brings a layer's experts, some at a time, and has their products computed.

    Where several devices compute a layer together, all of them a wave's `leave` is done before any one's `fetch`, and
    that before its `down`.

    Attributes
    ----------
    input : activation rows, one a token
    hidden, hidden_floats : what gate and up make, a row a pair; floats where down reads those
    outputs : float32 [pairs, columns], what down makes
    form : address of an expert_form (gpu/kernels/experts.h), or None
    experts : the layer's kernels and where its records' parts are
    width : columns of `hidden`
    own_hidden, own_columns : those of `hidden` and of `outputs` that this device makes
    common : addresses of where it leaves its columns of `hidden` and finds the others', alike where all see one memory
    """

    layer: int
    input: int
    hidden: int
    hidden_floats: int | None
    outputs: int
    columns: int
    used: int
    form: int | None
    experts: DeviceExpertLayer
    width: int
    own_hidden: slice
    own_columns: slice
    common: tuple[int, int]

    def gate_up(self, wave: Wave) -> LaunchSpec:
        """This device's columns of the pairs' activations."""
        e, own = self.experts, self.own_hidden
        return LaunchSpec(
            f"group_gate_up_{e.gate_kernel}",
            kernels.group_gate_up_grid(length(own), wave.count),
            [
                wave.tiles, wave.order, e.device_offset[0], e.device_offset[1], self.input, self.hidden,
                self.hidden_floats, self.width, self.columns, self.used, self.form, own.start,
            ],
        )  # fmt: skip

    def leave(self, wave: Wave) -> LaunchSpec:
        """They go where other devices find them."""
        return self._exchange("leave_hidden", wave, self.common[0])

    def fetch(self, wave: Wave) -> LaunchSpec:
        """The others' come."""
        return self._exchange("fetch_hidden", wave, self.common[1])

    def _exchange(self, kernel: str, wave: Wave, common: int) -> LaunchSpec:
        own = (self.own_hidden.start, length(self.own_hidden))
        rows = (self.hidden, self.hidden_floats, common)
        return LaunchSpec(kernel, (wave.count, 1, 1), [wave.tiles, wave.order, *rows, self.width, *own])

    def down(self, wave: Wave) -> LaunchSpec:
        """This device's columns of the pairs' outputs."""
        e, own = self.experts, self.own_columns
        return LaunchSpec(
            f"group_down_{e.down_kernel}",
            kernels.group_down_grid(length(own), wave.count),
            [
                wave.tiles, wave.order, e.device_offset[2], self.hidden_floats or self.hidden, self.outputs,
                self.columns, self.width, own.start, length(own),
            ],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExchangeRows:
    """Every device has made its `own` columns of float rows: all leave theirs, then each fetches the others'.

    Attributes
    ----------
    rows : address of float32 [tokens, columns]
    common : as in ServeExperts
    """

    rows: int
    columns: int
    own: slice
    common: tuple[int, int]
    tokens: int

    def leave(self) -> LaunchSpec:
        """This device's columns go where others find them."""
        return self._exchange("leave_floats", self.common[0])

    def fetch(self) -> LaunchSpec:
        """The others' come."""
        return self._exchange("fetch_floats", self.common[1])

    def _exchange(self, kernel: str, common: int) -> LaunchSpec:
        grid = (up(self.columns, 256), self.tokens, 1)
        return LaunchSpec(kernel, grid, [self.rows, common, self.columns, self.own.start, length(self.own)])


class BatchRecorder(DeviceRecorder):
    """As :class:`DeviceRecorder`, for `tokens` tokens of a prompt; a token's results do not depend on those beside it.

    Parameters
    ----------
    memory : Memory
    tokens : int
        At most ``memory.batch_tokens``.
    uses_products : bool
        Dense products go through the vendor's library where it takes their weights; its launches are the runner's.
    **settings
        Those of :class:`DeviceRecorder`.
    """

    def __init__(self, memory: Memory, tokens: int, *, uses_products: bool, **settings: Any) -> None:
        self.tokens, self._uses_products = tokens, uses_products
        super().__init__(memory, **settings)

    def _take_inputs(self) -> None:
        self.positions = self.memory.words("batch_positions", 4 * self.memory.batch_tokens)
        self.states = self.memory.states("batch_states")
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
        """Halves for what the library multiplies as halves."""
        return HALF if self._uses_products and matrix.kernel in kernels.HALF_TYPES else matrix.activation_type

    def _forms(self, name: str, columns: int, wanted: Iterable[int]) -> dict[int, DeviceRows]:
        wanted = list(wanted)
        return super()._forms(name, columns, [*wanted, F32] if HALF in wanted else wanted)

    def _as_halves(self, forms: dict[int, DeviceRows], tokens: int) -> list[LaunchSpec]:
        if HALF not in forms:
            return []
        x, elements = forms[F32], forms[F32].columns * tokens
        return [LaunchSpec("to_halves", kernels.to_halves_grid(elements), [x.address, forms[HALF].address, elements])]

    def mat_mul(self, products: Sequence[tuple[DeviceMatrix, Activation[DeviceRows], DeviceRows]]) -> None:
        """output = matrix @ input, for each."""
        for matrix, activation, y in products:
            x = activation.forms[self.form_of(matrix)].address
            is_small = matrix.kernel in kernels.FLOAT_TYPES and matrix.rows < kernels.FEW_ROWS
            if self.form_of(matrix) == HALF:
                self.body.append(DenseProduct(matrix, x, y.address))
            elif is_small:
                self.body.append(mat_vec(Product(matrix, x, y.address), self.tokens))
            elif self._uses_products and matrix.kernel in kernels.PRODUCT_TYPES:
                self.body.append(DenseProduct(matrix, x, y.address))
            else:
                self.body.append(mat_mul(matrix, x, y.address, self.tokens))

    @property
    def own_logits(self) -> slice:
        """All: every device makes a batch's dense products, whose sums' order depends on the whole matrix."""
        return slice(0, self.vocabulary)

    def logits(self, matrix: DeviceMatrix, x: Activation[DeviceRows]) -> None:
        """The last product, for the tokens that want logits."""
        final, row = self._final, x.forms[matrix.activation_type].address
        assert final is not None
        self._tail = lambda first, tokens: [
            *final(first, tokens),
            mat_mul(matrix, row, self.logits_address, tokens),
        ]

    # ---- attention ----

    def _attend(
        self, query: DeviceRows, turned: DeviceRows, output: DeviceRows, cache: KvCache, op: Attention[int]
    ) -> None:
        """All tokens at once, and no parts to merge."""
        batch = (self.positions, self.states, self.tokens)
        self.body.append(attend_prompt(query, turned, output, *batch, cache, op))

    def _multiply_heads(self, matrix: DeviceMatrix, heads: int, x: int | None, output: DeviceRows) -> None:
        rows, columns = matrix.rows // heads, matrix.columns
        grid = kernels.heads_mat_mul_grid(heads, rows, self.tokens)
        sizes = (heads, rows, columns, self.tokens)
        self._add(f"heads_mat_mul_{matrix.kernel}", grid, matrix.address, x, output.address, *sizes)

    # ---- experts ----

    def _hand_over(self, hop: int, x: DeviceRows, added: int | None) -> None:
        self.body.append(Hop(hop, False, (x.address, *([] if added is None else [added])), x.columns))

    def _take_over(self, hop: int, x: DeviceRows, added: int | None) -> None:
        self.body.append(Hop(hop, True, (x.address, *([] if added is None else [added])), x.columns))

    def route(self, layer: int, logits: DeviceRows, router: Router[int]) -> Picks[int, DeviceRows]:
        """The picks, and their way to the host."""
        picks = self._picks(layer, logits, router)
        self.body.append(route(picks, self.tokens, None))
        self.body.append(PostPicks(picks.ids.address, picks.weights.address))
        return picks

    def experts_begin(self, picks: Picks[int, DeviceRows], x: Activation[DeviceRows], op: Experts[int]) -> None:
        """Nothing: the host has not seen the picks yet."""

    def experts_end(
        self, picks: Picks[int, DeviceRows], x: Activation[DeviceRows], op: Experts[int], output: DeviceRows,
        shared: DeviceRows | None, shared_gate: DeviceRows | None,
    ) -> None:  # fmt: skip
        """Where the host serves the layer; then the sum, which the next norm adds."""
        rows, used = x.forms[self._expert_inputs[picks.layer][0]], picks.router.used
        e, form, most = self._experts[picks.layer], self._expert_form(picks, op), self.memory.batch_tokens
        hidden, floats = self._hidden(e, used, self.hidden)
        outputs = self.memory.words("pair_outputs", 4 * most * used * rows.columns)
        row_bytes = kernels.q8_row_bytes(self.hidden) if floats is None else 4 * self.hidden
        own_hidden, own = (self.exchange.share.of(columns) for columns in (self.hidden, output.columns))
        step = ServeExperts(
            picks.layer, rows.address, hidden, floats, outputs, rows.columns, used, form, e, self.hidden, own_hidden,
            own, self._common(f"hidden {row_bytes}", most * used * row_bytes),
        )  # fmt: skip
        self.body.append(step)
        total = self.rows("added", output.columns)
        self._add(
            "combine_picks", (up(length(own), 256), self.tokens, 1), outputs, picks.weights.address,
            shared and shared.address, shared_gate and shared_gate.address, total.address, output.columns, used,
            form, own.start, length(own),
        )  # fmt: skip
        if self.exchange.share.count > 1:
            common = self._common("totals", 4 * most * output.columns)
            self.body.append(ExchangeRows(total.address, output.columns, own, common, self.tokens))
        self._add_later(output, total)

    def _common(self, name: str, nbytes: int) -> tuple[int, int]:
        return self.exchange.common(name, nbytes) if self.exchange.share.count > 1 else (0, 0)
