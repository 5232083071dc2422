"""What a model file composes for a GPU: the calls of :class:`fomoe_io.cpu.recorder.Recorder`, as kernel launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fomoe_io.cpu.recorder import Activation
from fomoe_io.experts.car import NativeCar
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import (
    F32,
    Q8,
    DeviceExpertLayer,
    DeviceMatrix,
    DeviceRows,
    DeviceState,
    EmbeddingTable,
    LaunchSpec,
    Mailbox,
    Memory,
)
from fomoe_io.gpu.kernels import up

if TYPE_CHECKING:
    from fomoe_io.models.rope import Rope

ATTENTION_TOKENS, ATTENTION_BYTES = 8, 256 << 20
"""Tokens of a batch whose attention is computed at once, and room for what each position range has found until it is
merged: a long context takes fewer tokens at once, down to one."""

CAR_BYTES = ctypes.sizeof(NativeCar)
"""gpu/kernels/car_rule.h, fomoe_car."""


class DeviceRecorder:
    """Collects the launches of a model for one token; the interface is that of `program.Recorder`.

    Parameters
    ----------
    memory : Memory
    experts : mapping of int to DeviceExpertLayer
    mailbox : Mailbox
    vocabulary : int
        Columns of the logits.
    hidden : int
        Width of a routed expert.
    substitutes : bool
        Picks go through cache-aware routing.

    Attributes
    ----------
    tokens : int
    positions : int
        Address of int32 [tokens].
    body : list of LaunchSpec
        All but the logits.
    """

    lookahead = False
    tokens = 1

    def __init__(
        self,
        memory: Memory,
        *,
        experts: dict[int, DeviceExpertLayer],
        mailbox: Mailbox,
        vocabulary: int,
        hidden: int,
        substitutes: bool = False,
    ) -> None:
        self._substitutes = substitutes
        self.memory, self.hidden, self.vocabulary = memory, hidden, vocabulary
        self.context_tokens = memory.context_tokens
        memory.state_arena.bytes = 0  # every program of a session shares its state
        self.state = DeviceState(memory.state_arena)
        self.experts_pool = experts
        self.program = self
        self.body: list[Any] = []
        self._mailbox = mailbox
        self._pending: dict[int, int] = {}  # rows' address -> address of what is to be added to them
        self._makers: dict[int, LaunchSpec] = {}  # rows' address -> the launch that can write them as Q8 too
        self._tail: Callable[[int, int], list[LaunchSpec]] | None = None
        self._final: Callable[[int, int], list[LaunchSpec]] | None = None
        self._rotated_query: dict[int, DeviceRows] = {}
        self._layer = -1
        self.embedding: EmbeddingTable | None = None
        self._take_inputs()

    def _take_inputs(self) -> None:
        self.positions = self.memory.words("positions", 4)
        self.logits_address = self.memory.words("logits", 4 * self.vocabulary)

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
        """output = the tokens' embeddings, whose rows the host sends before the run."""
        address = self._embedding_rows(table)
        self.embedding, self.embedding_file, self.embedding_offset = table, file, offset
        grid = (up(table.columns, 1024), self.tokens, 1)
        self._add(f"expand_{table.kernel}", grid, address, None, output.address, table.columns)

    def _embedding_rows(self, table: EmbeddingTable) -> int:
        return self.memory.words("embedding", table.row_bytes)

    def form_of(self, matrix: DeviceMatrix) -> int:
        """The form of the activations that a product with it reads."""
        return matrix.activation_type

    def _forms(self, name: str, columns: int, wanted: Iterable[int]) -> dict[int, DeviceRows]:
        return {form: self.rows(name, columns, form) for form in dict.fromkeys(wanted)}

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
        wanted = [m.activation_type if of_outputs else self.form_of(m) for m in feeds]
        forms = self._forms(name, x.columns, [*wanted, *types])
        residual = self._pending.pop(x.address, None)
        floats, q8 = (forms[form].address if form in forms else None for form in (F32, Q8))

        def launches(first: int, tokens: int) -> list[LaunchSpec]:
            skip = 4 * x.columns * first
            after = None if residual is None else residual + skip
            arguments = [x.address + skip, after, weight, floats, q8, x.columns, epsilon]
            return [LaunchSpec("rms_norm", (tokens, 1, 1), arguments), *self._as_halves(forms, tokens)]

        if of_outputs:
            self._final = launches
        else:
            self.body += launches(0, self.tokens)
        return Activation(forms)

    def _as_halves(self, forms: dict[int, DeviceRows], tokens: int) -> list[LaunchSpec]:
        """What makes the third form of the first; only batches ask for it."""
        return []

    def convert(self, x: DeviceRows, *, name: str, feeds: Sequence[DeviceMatrix]) -> Activation:
        """`x` in the forms that `feeds` read; written by the launch that made `x` where that can."""
        forms = self._forms(name, x.columns, {self.form_of(m) for m in feeds} - {F32}) | {F32: x}
        if Q8 in forms:
            maker = self._makers.pop(x.address, None)
            if maker is None:
                self._add("quantize_q8", (up(x.columns, 256), self.tokens, 1), x.address, forms[Q8].address, x.columns)
            else:
                maker.arguments[maker.arguments.index("q8")] = forms[Q8].address
        self.body += self._as_halves(forms, self.tokens)
        return Activation(forms)

    def silu_mul(
        self, gate: DeviceRows, up_rows: DeviceRows, *, name: str, feeds: Sequence[DeviceMatrix]
    ) -> Activation:
        """silu(gate) * up."""
        columns = gate.columns
        forms = self._forms(name, columns, [self.form_of(m) for m in feeds] + [Q8])
        floats = forms[F32].address if F32 in forms else None
        grid = (up(columns, 256), self.tokens, 1)
        self._add("silu_mul", grid, gate.address, up_rows.address, floats, forms[Q8].address, columns)
        self.body += self._as_halves(forms, self.tokens)
        return Activation(forms)

    def _product(self, matrix: DeviceMatrix, x: int, y: int) -> LaunchSpec:
        split = kernels.split_of(matrix.kernel, matrix.columns, matrix.rows)
        grid = kernels.mat_vec_grid(matrix.kernel, matrix.rows, split)
        return LaunchSpec(
            f"mat_vec_{matrix.kernel}", grid, [matrix.address, x, y, matrix.rows, matrix.columns, 1, split]
        )

    def mat_mul(self, products: Sequence[tuple[DeviceMatrix, Activation, DeviceRows]]) -> None:
        """output = matrix @ input, for each; products of one format and input share a launch."""
        alike: dict[tuple[str, int], list[tuple[DeviceMatrix, int, int]]] = {}
        for matrix, activation, y in products:
            x = activation.forms[matrix.activation_type].address
            alike.setdefault((matrix.kernel, x), []).append((matrix, x, y.address))
        for group in alike.values():
            for i in range(0, len(group), kernels.MAT_VEC_MANY):
                part = group[i : i + kernels.MAT_VEC_MANY]
                self.body.append(self._product(*part[0]) if len(part) == 1 else _many(part))

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
        final, row = self._final, x.forms[matrix.activation_type].address
        assert final is not None
        self._tail = lambda first, tokens: [*final(first, tokens), self._product(matrix, row, self.logits_address)]

    # ---- attention ----

    def rope_table(self, table: DeviceRows, rope: Rope) -> None:
        """(cos, sin) of every position; the engine fills the table once."""

    def kv(
        self, query: DeviceRows, key: DeviceRows, value: DeviceRows, table: DeviceRows, query_norm: int, key_norm: int,
        key_cache: int, value_cache: int, context: int, heads: int, kv_heads: int, head_columns: int,
        query_stride: int, rotated: int, epsilon: float, biases: Sequence[int | None],
    ) -> None:  # fmt: skip
        """Queries and keys normalised and rotated; keys and values into the cache."""
        for rows, bias in zip((query, key, value), biases, strict=True):
            if bias is not None:
                self._add("add_bias", (up(rows.columns, 256), self.tokens, 1), rows.address, bias, rows.columns)
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
        parts = self._attention_parts(heads * splits * (head_columns + 2))[0]
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

    def _attention_parts(self, floats: int) -> tuple[int, int]:
        """Room for the parts of some tokens, and how many: those of a launch of a batch."""
        most = max(1, min(self.memory.batch_tokens, ATTENTION_TOKENS, ATTENTION_BYTES // (4 * floats)))
        return self.memory.words("attention", 4 * floats * most), most

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
        e = self.experts_pool[layer]
        resolved = [
            e.table, self._records(used), self._late(used), e.post, self._mailbox.run, self.memory.words("misses", 4),
        ]  # fmt: skip
        if not self._substitutes:
            self._add(
                "route_and_resolve", (1, 1, 1), logits.address, ids.address, weights.address, *resolved, experts, used,
                int(normalise), scale,
            )  # fmt: skip
            return
        self._add(
            "route", (1, 1, 1), logits.address, ids.address, weights.address, experts, used, int(normalise), scale
        )
        rule = self.memory.words("car", CAR_BYTES)
        self._add(
            "substitute_and_resolve", (1, 1, 1), logits.address, ids.address, weights.address, *resolved, rule,
            experts, used, int(normalise),
        )  # fmt: skip

    def _records(self, used: int) -> int:
        return self.memory.words("records", 8 * used)

    def _late(self, used: int) -> int:
        return self.memory.words("late", 8 * used)

    def _hidden(self, e: DeviceExpertLayer, used: int, hidden: int) -> tuple[int, int | None]:
        """Where the experts' activations go, a row a pair: as Q8, and as floats where down reads those."""
        floats = self.rows("hidden", used * hidden).address if e.down_kernel in kernels.FLOAT_TYPES else None
        q8 = self.memory.words("hidden_q8", self.memory.batch_tokens * used * kernels.q8_row_bytes(hidden))
        return q8, floats

    def experts_begin(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Gate and up of the picks that are on the device."""
        self._gate_and_up("", layer, [self._records(ids.columns)], gate_input, ids.columns)

    def _gate_and_up(self, kind: str, layer: int, where: list[Any], x: DeviceRows, used: int) -> None:
        e, hidden = self.experts_pool[layer], self.hidden
        q8, floats = self._hidden(e, used, hidden)
        self._add(
            f"experts_gate_up_{kind}{e.gate_kernel}", kernels.gate_up_grid(hidden, used), *where, e.device_offset[0],
            e.device_offset[1], x.address, q8, floats, hidden, x.columns, used,
        )  # fmt: skip

    def experts(
        self, experts: dict[int, DeviceExpertLayer], ids: DeviceRows, gate_input: DeviceRows, up_input: DeviceRows,
        layer: int,
    ) -> None:  # fmt: skip
        """Gate and up of the others as they come, if there are any; then a wait for the rest of them."""
        used, mail = ids.columns, self._mailbox
        records, late, reply = self._records(used), self._late(used), experts[layer].answer
        self._gate_and_up("late_", layer, [records, late, reply, mail.run, mail.stop], gate_input, used)
        misses = self.memory.words("misses", 4)
        self._add("wait_for_misses", (1, 1, 1), misses, records, reply, mail.run, mail.stop, late, used)
        self._layer = layer

    def combine(
        self, experts: dict[int, DeviceExpertLayer], weights: DeviceRows, output: DeviceRows, used: int,
        shared: DeviceRows | None, shared_gate: DeviceRows | None,
    ) -> None:  # fmt: skip
        """output += the experts' weighted sum (+ the shared expert); the sum is made by the next norm."""
        e, hidden, total = experts[self._layer], self.hidden, self.rows("added", output.columns)
        q8, floats = self._hidden(e, used, hidden)
        down = self._add(
            f"experts_down_{e.down_kernel}", kernels.down_grid(output.columns), self._records(used),
            self._late(used), e.device_offset[2], floats or q8, weights.address, shared and shared.address,
            shared_gate and shared_gate.address, total.address, output.columns, hidden, used,
        )  # fmt: skip
        down.joins = True
        self._add_later(output, total)

    def layer_end(self, x: DeviceRows, layer: int) -> None:
        """Nothing to do: layer outputs are recorded on the CPU alone."""

    # ---- the result ----

    def launches(self, outputs: int) -> list[LaunchSpec]:
        """All launches of a run that wants so many logits (0 or 1)."""
        return [*self.finished_body(), *(self.tail(0, 1) if outputs else [])]

    def finished_body(self) -> list[Any]:
        """All but the logits."""
        return _finished(self.body)

    def tail(self, first: int, tokens: int) -> list[LaunchSpec]:
        """Final norm and logits of so many tokens from the `first` on."""
        assert self._tail is not None
        return _finished(self._tail(first, tokens))


def _finished(specs: list[Any]) -> list[Any]:
    """The launches, where "q8" arguments that nobody reads are none."""
    for spec in specs:
        if isinstance(spec, LaunchSpec):
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
