"""What a model file composes for a GPU: the calls of :class:`fomoe_io.program.Recorder`, as kernel launches.

Addresses come from an :class:`Arena`, so that a model recorded once on an arena without memory tells how much it
needs, and once more on the device gives its launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fomoe_io import kernels
from fomoe_io.car import NativeCar
from fomoe_io.kernels import up
from fomoe_io.program import Activation

F32, Q8 = 0, 1
"""Forms of an activation: floats, or a row of ``kernels/activations.h``."""

ALIGNMENT_BYTES = 256

CAR_BYTES = ctypes.sizeof(NativeCar)
"""kernels/car_rule.h, fomoe_car."""


class Arena:
    """A bump allocator over one device buffer; without one (base 0) it only counts."""

    def __init__(self, base: int = 0) -> None:
        self.base, self.bytes = base, 0

    def take(self, nbytes: int) -> int:
        """An aligned address."""
        address = self.base + self.bytes
        self.bytes += up(nbytes, ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return address


@dataclass(slots=True)
class DeviceRows:
    """One activation row a token: floats, or Q8 rows."""

    address: int
    columns: int
    type: int = F32

    @property
    def stride_bytes(self) -> int:
        """From one token to the next."""
        return kernels.q8_row_bytes(self.columns) if self.type == Q8 else 4 * self.columns


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A [rows, columns] weight matrix in device memory; `kernel` names its format."""

    address: int
    kernel: str
    rows: int
    columns: int

    @property
    def activation_type(self) -> int:
        """What a product with it reads."""
        return Q8 if self.kernel in kernels.QUANTIZED_TYPES else F32


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Token embeddings in a file.

    Attributes
    ----------
    kernel : the format in which rows are sent to the device
    type : ggml's number of the file's format; the host expands rows to floats when the device does not know it
    row_bytes, file_row_bytes : of a row as it is sent, and in the file
    """

    kernel: str
    type: int
    columns: int
    row_bytes: int
    file_row_bytes: int


@dataclass(slots=True)
class LaunchSpec:
    """A launch that has not been bound to a device yet; the last three are those of :class:`device.Step`."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: list[Any]
    beside: bool = False
    forks: bool = False
    joins: bool = False


@dataclass(frozen=True, slots=True)
class DeviceExpertLayer:
    """What the kernels must know of a layer's routed experts.

    Attributes
    ----------
    gate_kernel, down_kernel : formats of gate and up, and of down
    device_offset : where gate, up and down stand in a record
    table, post, answer : addresses as the device sees them (kernels/router.h)
    """

    gate_kernel: str
    down_kernel: str
    device_offset: tuple[int, int, int]
    table: int
    post: int
    answer: int


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Words that every layer's kernels share: the run's number (device), the word that stops a wait (host)."""

    run: int
    stop: int


class DeviceState:
    """Addresses of a session's memory; `zeroed` lists (address, bytes) that a new session clears."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.zeroed: list[tuple[int, int]] = []

    def take(self, floats: int, *, zeroed: bool) -> int:
        """Reserve float32 elements; return their address."""
        address = self._arena.take(4 * floats)
        if zeroed:
            self.zeroed.append((address, 4 * floats))
        return address


@dataclass(slots=True)
class Memory:
    """The arenas of a recording: shared by the programs of all batch sizes, so they are laid out once.

    `rows` has room for `batch_tokens` tokens.  Once `is_complete`, nothing new may be asked for: the device's buffer
    ends with what was.
    """

    arena: Arena
    state_arena: Arena
    batch_tokens: int
    context_tokens: int
    rows: dict[tuple[str, int, int], DeviceRows] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)
    is_complete: bool = False

    def row(self, name: str, columns: int, type: int) -> DeviceRows:
        """Rows by name; who asks for the same name, width and form shares them."""
        key = (name, columns, type)
        if key not in self.rows:
            assert not self.is_complete, name
            rows = DeviceRows(0, columns, type)
            rows.address = self.arena.take(rows.stride_bytes * self.batch_tokens)
            self.rows[key] = rows
        return self.rows[key]

    def row_at(self, name: str, columns: int, address: int) -> None:
        """Float rows that have a place already."""
        self.rows[(name, columns, F32)] = DeviceRows(address, columns)

    def words(self, name: str, nbytes: int) -> int:
        """Other device memory by name."""
        if name not in self.scratch:
            assert not self.is_complete, name
            self.scratch[name] = self.arena.take(nbytes)
        return self.scratch[name]


class DeviceRecorder:
    """Collects the launches of a model for exactly `tokens` tokens; the interface is that of `program.Recorder`.

    Parameters
    ----------
    memory : Memory
    tokens : int
        At most ``memory.batch_tokens``.
    experts : mapping of int to DeviceExpertLayer
    mailbox : Mailbox
    vocabulary : int
        Columns of the logits.
    hidden : int
        Width of a routed expert.
    substitutes : bool
        Single tokens go through cache-aware routing.

    Attributes
    ----------
    body : list of LaunchSpec
        All but the logits.
    tails : dict of int to list of LaunchSpec
        By number of outputs (1: the last token, `tokens`: all): final norm and logits.
    """

    lookahead = False

    def __init__(
        self,
        memory: Memory,
        *,
        tokens: int,
        experts: dict[int, DeviceExpertLayer],
        mailbox: Mailbox,
        vocabulary: int,
        hidden: int,
        substitutes: bool = False,
    ) -> None:
        self._substitutes = substitutes
        self.memory, self.tokens, self.hidden = memory, tokens, hidden
        self.batch_tokens, self.context_tokens = memory.batch_tokens, memory.context_tokens
        self.state = DeviceState(memory.state_arena)
        self.experts_pool = experts
        self.program = self
        self.body: list[LaunchSpec] = []
        self.tails: dict[int, list[LaunchSpec]] = {0: []}
        self._mailbox = mailbox
        self._pending: dict[int, int] = {}  # rows' address -> address of what is to be added to them
        self._makers: dict[int, LaunchSpec] = {}  # rows' address -> the launch that can write them as Q8 too
        self._final: Callable[[int], list[LaunchSpec]] | None = None
        self._rotated_query: dict[int, DeviceRows] = {}
        self._layer = -1
        self.positions = memory.words("positions", 4 * memory.batch_tokens)
        self.logits_address = memory.words("logits", 4 * vocabulary * memory.batch_tokens)
        self.embedding: tuple[EmbeddingTable, int, int, int] | None = None  # table, file, offset, address

    def _add(self, kernel: str, grid: tuple[int, int, int], *arguments: Any) -> LaunchSpec:
        spec = LaunchSpec(kernel, grid, list(arguments))
        self.body.append(spec)
        return spec

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is recorded inside reads the last norm alone, and may run beside all that follows until `combine`."""
        norm = next(spec for spec in reversed(self.body) if spec.kernel == "rms_norm")
        norm.forks = True
        first = len(self.body)
        yield
        for spec in self.body[first:]:
            spec.beside = True

    # ---- dense ----

    def rows(self, name: str, columns: int, type: int = F32) -> DeviceRows:
        """Activation rows by name."""
        return self.memory.row(name, columns, type)

    def embed(self, table: EmbeddingTable, output: DeviceRows, *, file: int = -1, offset: int = 0) -> None:
        """output = the tokens' embeddings, whose rows the host sends with the header."""
        address = self.memory.words("embedding", table.row_bytes * self.batch_tokens)
        self.embedding = (table, file, offset, address)
        grid = (up(table.columns, 1024), self.tokens, 1)
        self._add(f"expand_{table.kernel}", grid, address, None, output.address, table.columns)

    def norm(
        self,
        x: DeviceRows,
        weight: int,
        epsilon: float,
        *,
        name: str,
        feeds: Sequence[DeviceMatrix] = (),
        types: Sequence[int] = (),
        of_outputs: bool = False,
    ) -> Activation:
        """RMS norm of `x`, after what was to be added to it, in each form that is read."""
        wanted = dict.fromkeys([m.activation_type for m in feeds] + list(types))
        forms: dict[int, DeviceRows] = {form: self.rows(name, x.columns, form) for form in wanted}
        residual = self._pending.pop(x.address, None)
        floats, q8 = (forms[form].address if form in forms else None for form in (F32, Q8))

        def launch(tokens: int) -> LaunchSpec:
            skip = 4 * x.columns * (self.tokens - tokens)
            after = None if residual is None else residual + skip
            return LaunchSpec(
                "rms_norm", (tokens, 1, 1), [x.address + skip, after, weight, floats, q8, x.columns, epsilon]
            )

        if of_outputs:
            self._final = lambda tokens: [launch(tokens)]
        else:
            self.body.append(launch(self.tokens))
        return Activation(forms)

    def convert(self, x: DeviceRows, *, name: str, feeds: Sequence[DeviceMatrix]) -> Activation:
        """`x` in the forms that `feeds` read; written by the launch that made `x` where that can."""
        forms = {F32: x}
        if any(m.activation_type == Q8 for m in feeds):
            forms[Q8] = self.rows(name, x.columns, Q8)
            maker = self._makers.pop(x.address, None)
            if maker is None:
                self._add("quantize_q8", (up(x.columns, 256), self.tokens, 1), x.address, forms[Q8].address, x.columns)
            else:
                maker.arguments[maker.arguments.index("q8")] = forms[Q8].address
        return Activation(forms)

    def silu_mul(
        self, gate: DeviceRows, up_rows: DeviceRows, *, name: str, feeds: Sequence[DeviceMatrix]
    ) -> Activation:
        """silu(gate) * up."""
        columns = gate.columns
        forms = {form: self.rows(name, columns, form) for form in (F32, Q8)}
        floats = forms[F32].address if any(m.activation_type == F32 for m in feeds) else None
        grid = (up(columns, 256), self.tokens, 1)
        self._add("silu_mul", grid, gate.address, up_rows.address, floats, forms[Q8].address, columns)
        return Activation(forms)

    def _product(self, matrix: DeviceMatrix, x: int, y: int, tokens: int) -> LaunchSpec:
        split = kernels.split_of(matrix.kernel, matrix.columns, matrix.rows)
        # one token's rows and several tokens' are summed alike, so results do not depend on the batch
        family = "mat_vec" if tokens == 1 else "mat_mul"
        grid = (
            kernels.mat_vec_grid(matrix.kernel, matrix.rows, split)
            if tokens == 1
            else kernels.mat_mul_grid(matrix.rows, split, tokens)
        )
        arguments = [matrix.address, x, y, matrix.rows, matrix.columns, tokens, split]
        return LaunchSpec(f"{family}_{matrix.kernel}", grid, arguments)

    def mat_mul(self, products: Sequence[tuple[DeviceMatrix, Activation, DeviceRows]]) -> None:
        """output = matrix @ input, for each; one token's products of one format and input share a launch."""
        alike: dict[tuple[str, int], list[tuple[DeviceMatrix, int, int]]] = {}
        for matrix, activation, y in products:
            x = activation.forms[matrix.activation_type].address
            alike.setdefault((matrix.kernel, x), []).append((matrix, x, y.address))
        for group in alike.values():
            for i in range(0, len(group), kernels.MAT_VEC_MANY):
                part = group[i : i + kernels.MAT_VEC_MANY]
                if self.tokens > 1 or len(part) == 1:
                    self.body += [self._product(matrix, x, y, self.tokens) for matrix, x, y in part]
                else:
                    self.body.append(_many(part))

    def mat_mul_add(self, matrix: DeviceMatrix, x: Activation, output: DeviceRows) -> None:
        """output += matrix @ x; the sum is made by the norm that reads it next."""
        product = self.rows("added", output.columns)
        self.mat_mul([(matrix, x, product)])
        self._add_later(output, product)

    def _add_later(self, output: DeviceRows, added: DeviceRows) -> None:
        if output.address in self._pending:
            raise AssertionError("two sums without a norm between them")
        self._pending[output.address] = added.address

    def logits(self, matrix: DeviceMatrix, x: Activation) -> None:
        """The last product, for the positions that want logits."""
        assert self._final is not None
        for outputs in {1, self.tokens}:
            row = x.forms[matrix.activation_type].address
            self.tails[outputs] = [*self._final(outputs), self._product(matrix, row, self.logits_address, outputs)]

    # ---- attention ----

    def rope_table(self, table: DeviceRows, base: float, rotated: int) -> None:
        """(cos, sin) of every position; the engine fills the table once."""

    def kv(
        self, query: DeviceRows, key: DeviceRows, value: DeviceRows, table: DeviceRows, query_norm: int, key_norm: int,
        key_cache: int, value_cache: int, context: int, heads: int, kv_heads: int, head_columns: int,
        query_stride: int, rotated: int, epsilon: float,
    ) -> None:  # fmt: skip
        """Queries and keys normalised and rotated; keys and values into the cache."""
        turned = self.rows("rotated_query", heads * head_columns)
        self._rotated_query[query.address] = turned
        self._add(
            "attention_prepare_f32", (heads + 2 * kv_heads, self.tokens, 1), query.address, key.address, value.address,
            query_norm, key_norm, table.address, self.positions, turned.address, key_cache, value_cache, heads,
            kv_heads, head_columns, query_stride, rotated, epsilon,
        )  # fmt: skip

    def attention(
        self, query: DeviceRows, output: DeviceRows, key_cache: int, value_cache: int, context: int, heads: int,
        kv_heads: int, head_columns: int, query_stride: int, gated: bool,
    ) -> None:  # fmt: skip
        """output = softmax(q k^T / sqrt(d)) v, times sigmoid(gate) where the query rows carry one."""
        splits = kernels.attention_splits(context)
        parts = self.memory.words("attention", 4 * self.batch_tokens * heads * splits * (head_columns + 2))
        self._add(
            f"attention_f32_{head_columns}", kernels.attention_grid(heads, kv_heads, splits, self.tokens),
            self._rotated_query[query.address].address, key_cache, value_cache, self.positions, parts, heads, kv_heads,
            splits, head_columns**-0.5,
        )  # fmt: skip
        gate = query.address + 4 * head_columns if gated else None
        self._makers[output.address] = self._add(
            "attention_merge", (heads, self.tokens, 1), parts, self.positions, gate, output.address, "q8", heads,
            head_columns, splits, query_stride,
        )  # fmt: skip

    # ---- gated delta rule ----

    def conv(self, x: DeviceRows, output: DeviceRows, weight: int, state: int, taps: int) -> None:
        """Causal convolution over each channel, then silu."""
        grid = (up(x.columns, 128), 1, 1)
        self._add("conv_step", grid, weight, x.address, state, output.address, x.columns, taps, self.tokens)

    def delta(
        self, qkv: DeviceRows, beta: DeviceRows, alpha: DeviceRows, gate: DeviceRows, output: DeviceRows,
        decay_rate: int, decay_bias: int, norm_weight: int, state: int, key_heads: int, value_heads: int,
        head_columns: int, grouped: bool, epsilon: float,
    ) -> None:  # fmt: skip
        """The gated delta rule, then the norm of each head times silu(gate)."""
        recalled = self.rows("recalled", output.columns)
        self._add(
            f"delta_step_{head_columns}", (head_columns // 16, value_heads, 1), qkv.address, alpha.address,
            beta.address, decay_bias, decay_rate, state, recalled.address, key_heads, value_heads, head_columns,
            int(grouped), self.tokens, epsilon,
        )  # fmt: skip
        self._makers[output.address] = self._add(
            "gated_norm", (up(value_heads, 4), self.tokens, 1), recalled.address, gate.address, norm_weight,
            output.address, "q8", value_heads, head_columns, epsilon,
        )  # fmt: skip

    # ---- experts ----

    def route(
        self, logits: DeviceRows, ids: DeviceRows, weights: DeviceRows, layer: int, experts: int, used: int,
        normalise: bool, scale: float,
    ) -> None:  # fmt: skip
        """The picks, their records, and word of them to the host."""
        e, pairs = self.experts_pool[layer], self.tokens * used
        resolved = [e.table, self._records(used), e.post, self._mailbox.run, self.memory.words("misses", 4)]
        if self.tokens == 1 and not self._substitutes:
            self._add(
                "route_and_resolve", (1, 1, 1), logits.address, ids.address, weights.address, *resolved, experts, used,
                int(normalise), scale,
            )  # fmt: skip
            return
        self._add(
            "route", (self.tokens, 1, 1), logits.address, ids.address, weights.address, experts, used, int(normalise),
            scale,
        )  # fmt: skip
        if self.tokens == 1:
            rule = self.memory.words("car", CAR_BYTES)
            self._add(
                "substitute_and_resolve", (1, 1, 1), logits.address, ids.address, weights.address, *resolved, rule,
                experts, used, int(normalise),
            )  # fmt: skip
        else:
            self._add("resolve_picks", (1, 1, 1), ids.address, *resolved, pairs)

    def _records(self, used: int) -> int:
        return self.memory.words("records", 8 * self.batch_tokens * used)

    def _late(self, used: int) -> int:
        return self.memory.words("late", 8 * self.batch_tokens * used)

    def _gate_and_up(self, layer: int, records: int, x: DeviceRows, used: int, hidden: int, columns: int) -> None:
        e = self.experts_pool[layer]
        floats = self.rows("hidden", used * hidden).address if e.down_kernel in kernels.FLOAT_TYPES else None
        q8 = self.memory.words("hidden_q8", self.batch_tokens * used * kernels.q8_row_bytes(hidden))
        self._add(
            f"experts_gate_up_{e.gate_kernel}", kernels.gate_up_grid(hidden, self.tokens * used), records,
            e.device_offset[0], e.device_offset[1], x.address, q8, floats, hidden, columns, used,
        )  # fmt: skip

    def experts_begin(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Gate and up of the picks that are on the device."""
        self._gate_and_up(layer, self._records(ids.columns), gate_input, ids.columns, self.hidden, gate_input.columns)

    def experts(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Wait for the others, if there are any; their gate and up."""
        used, pairs = ids.columns, self.tokens * ids.columns
        late = self._late(used)
        self._add(
            "wait_for_misses", (1, 1, 1), self.memory.words("misses", 4), experts[layer].answer, self._mailbox.run,
            self._mailbox.stop, late, pairs,
        )  # fmt: skip
        self._gate_and_up(layer, late, gate_input, used, self.hidden, gate_input.columns)
        self._layer = layer

    def combine(
        self, experts: dict[int, DeviceExpertLayer], weights: DeviceRows, output: DeviceRows, used: int,
        shared: DeviceRows | None, shared_gate: DeviceRows | None,
    ) -> None:  # fmt: skip
        """output += the experts' weighted sum (+ the shared expert); the sum is made by the next norm."""
        e, hidden, total = experts[self._layer], self.hidden, self.rows("added", output.columns)
        floats = e.down_kernel in kernels.FLOAT_TYPES
        x = self.rows("hidden", used * hidden).address if floats else self.memory.words("hidden_q8", 0)
        down = self._add(
            f"experts_down_{e.down_kernel}", kernels.down_grid(output.columns, self.tokens), self._records(used),
            self._late(used), e.device_offset[2], x, weights.address, shared and shared.address,
            shared_gate and shared_gate.address, total.address, output.columns, hidden, used,
        )  # fmt: skip
        down.joins = True
        self._add_later(output, total)

    def layer_end(self, x: DeviceRows, layer: int) -> None:
        """Nothing to do: layer outputs are recorded on the CPU alone."""

    # ---- the result ----

    def launches(self, outputs: int) -> list[LaunchSpec]:
        """All launches of a run that wants so many logits; "q8" arguments that nobody reads are none."""
        specs = [*self.body, *self.tails[outputs]]
        for spec in specs:
            spec.arguments = [None if isinstance(a, str) else a for a in spec.arguments]
        return specs


def _many(products: Sequence[tuple[DeviceMatrix, int, int]]) -> LaunchSpec:
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
