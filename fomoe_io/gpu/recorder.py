"""What a model is recorded with on a GPU: the ops of :class:`fomoe_io.models.recorder.Recorder` as kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fomoe_io.gpu import kernels
from fomoe_io.gpu import launches as make
from fomoe_io.gpu.arena import (
    ALONE,
    F32,
    Q8,
    WHOLE,
    DeviceExpertLayer,
    DeviceMatrix,
    DeviceRows,
    DeviceState,
    EmbeddingTable,
    LaunchSpec,
    Mailbox,
    Memory,
    Part,
    Share,
    length,
)
from fomoe_io.gpu.exchange import Exchange
from fomoe_io.gpu.kernels import up
from fomoe_io.gpu.latent_recorder import LatentRecorder
from fomoe_io.models.recorder import (
    Activation,
    Attention,
    Delta,
    Experts,
    KvCache,
    Picks,
    Recorder,
    Router,
    Score,
    ring_positions,
)

if TYPE_CHECKING:
    from fomoe_io.models.rope import Rope


class DeviceRecorder(LatentRecorder):
    """Collects the launches of a model for one token; the interface is that of :class:`Recorder`.

    Parameters
    ----------
    memory : Memory
    embedding : (EmbeddingTable, int, int)
        The token embeddings, the descriptor of their file and where in it they are.
    expert_inputs : mapping of int to (int, int)
        Per layer the forms that the routed experts' gate and up matrices read.
    experts : mapping of int to DeviceExpertLayer
    mailbox : Mailbox
    vocabulary : int
        Columns of the logits.
    hidden : int
        Width of a routed expert.
    substitutes : bool
        Picks go through cache-aware routing.
    part : Part
        What this device computes of the model.
    share : Share
        Which rows of a product this device makes.

    Attributes
    ----------
    exchange : Exchange
        With the devices that make the others.
    tokens : int
    positions : int
        Address of int32 [tokens].
    states : int or None
        Address of uint64 [tokens]: where each token's session has its memory; None: places in it are addresses.
    """

    tokens = 1

    def __init__(
        self,
        memory: Memory,
        *,
        embedding: tuple[EmbeddingTable, int, int],
        expert_inputs: Mapping[int, tuple[int, int]],
        experts: dict[int, DeviceExpertLayer],
        mailbox: Mailbox,
        vocabulary: int,
        hidden: int,
        substitutes: bool = False,
        part: Part = WHOLE,
        share: Share = ALONE,
    ) -> None:
        super().__init__(DeviceState(memory.state_base), mailbox, part)  # every program's places are the same
        self._substitutes = substitutes
        self.exchange, self._is_beside = Exchange(share, mailbox), False
        self.memory, self.hidden, self.vocabulary = memory, hidden, vocabulary
        self.context_tokens = memory.context_tokens
        self._experts, self._expert_inputs = experts, expert_inputs
        self._makers: dict[int, LaunchSpec] = {}  # rows' address -> the launch that can write them as Q8 too
        self._tail: Callable[[int, int], list[LaunchSpec]] | None = None
        self._final: Callable[[int, int], list[LaunchSpec]] | None = None
        self.embedding, self.embedding_file, self.embedding_offset = embedding
        self._take_inputs()

    def _take_inputs(self) -> None:
        self.positions, self.states = self.memory.words("positions", 4), self.memory.states("states")
        self.logits_address = self.memory.words("logits", 4 * self.vocabulary)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is recorded inside reads the last norm alone, and may run beside all that follows until `combine`.

        Every device makes all of it: an exchange would hold up what it runs beside.
        """
        norm = next(spec for spec in reversed(self.body) if spec.kernel == "rms_norm")
        norm.forks = True
        first, self._is_beside = len(self.body), True
        yield
        self._is_beside = False
        for spec in self.body[first:]:
            spec.beside = True

    # ---- dense ----

    def rows(self, name: str, columns: int, type: int = F32) -> DeviceRows:
        """Activation rows by name."""
        return self.memory.row(name, columns, type)

    def embed(self, output: DeviceRows) -> None:
        """output = the tokens' embeddings, whose rows the host sends before the run."""
        table = self.embedding
        address = self._embedding_rows(table)
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
        self, x: DeviceRows, weight: int, epsilon: float, *, name: str, feeds: Sequence[DeviceMatrix],
        experts_of: int | None = None, of_outputs: bool = False,
    ) -> Activation[DeviceRows]:  # fmt: skip
        """RMS norm of `x`, after what was to be added to it, in each form that is read."""
        wanted = [m.activation_type if of_outputs else self.form_of(m) for m in feeds]
        if experts_of is not None:
            wanted += self._expert_inputs[experts_of]
        forms = self._forms(name, x.columns, wanted)
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
            self.body.extend(launches(0, self.tokens))
        return Activation(forms)

    def _as_halves(self, forms: dict[int, DeviceRows], tokens: int) -> list[LaunchSpec]:
        """What makes the third form of the first; only batches ask for it."""
        return []

    def convert(self, x: DeviceRows, *, name: str, feeds: Sequence[DeviceMatrix]) -> Activation[DeviceRows]:
        """`x` in the forms that `feeds` read; written by the launch that made `x` where that can."""
        forms = self._forms(name, x.columns, {self.form_of(m) for m in feeds} - {F32}) | {F32: x}
        if Q8 in forms:
            maker = self._makers.pop(x.address, None)
            if maker is None:
                self._add("quantize_q8", (up(x.columns, 256), self.tokens, 1), x.address, forms[Q8].address, x.columns)
            else:
                maker.arguments[maker.arguments.index("q8")] = forms[Q8].address
        self.body.extend(self._as_halves(forms, self.tokens))
        return Activation(forms)

    def silu_mul(
        self, gate: DeviceRows, up_rows: DeviceRows, /, *, name: str, feeds: Sequence[DeviceMatrix]
    ) -> Activation[DeviceRows]:
        """silu(gate) * up."""
        columns = gate.columns
        forms = self._forms(name, columns, [self.form_of(m) for m in feeds] + [Q8])
        floats = forms[F32].address if F32 in forms else None
        grid = (up(columns, 256), self.tokens, 1)
        self._add("silu_mul", grid, gate.address, up_rows.address, floats, forms[Q8].address, columns)
        self.body.extend(self._as_halves(forms, self.tokens))
        return Activation(forms)

    def mat_mul(self, products: Sequence[tuple[DeviceMatrix, Activation[DeviceRows], DeviceRows]]) -> None:
        """output = matrix @ input, for each; products of one format and input share a launch, and all an exchange."""
        matrices = [matrix for matrix, _, _ in products]
        rows = [slice(0, m.rows) for m in matrices] if self._is_beside else self.exchange.own_rows(matrices)
        alike: dict[tuple[str, int], list[make.Product]] = {}
        for (matrix, activation, y), own in zip(products, rows, strict=True):
            x = activation.forms[matrix.activation_type].address
            alike.setdefault((matrix.kernel, x), []).append(make.Product(matrix, x, y.address, own))
        for group in alike.values():
            for i in range(0, len(group), kernels.MAT_VEC_MANY):
                part = group[i : i + kernels.MAT_VEC_MANY]
                self.body.append(make.mat_vec(part[0]) if len(part) == 1 else make.mat_vec_many(part))
        divided = [p for group in alike.values() for p in group if p.rows < p.matrix.rows]
        self.body.extend(self.exchange.floats([(p.y, p.matrix.rows) for p in divided]))

    def mat_mul_add(
        self, matrix: DeviceMatrix, x: Activation[DeviceRows], output: DeviceRows, bias: int | None = None
    ) -> None:
        """output += matrix @ x [+ bias]; the sum is made by the norm that reads it next."""
        product = self.rows("added", output.columns)
        self.mat_mul([(matrix, x, product)])
        self._add_bias(product, bias)
        self._add_later(output, product)

    def _add_bias(self, rows: DeviceRows, bias: int | None) -> None:
        if bias is not None:
            self._add("add_bias", (up(rows.columns, 256), self.tokens, 1), rows.address, bias, rows.columns)

    def ungroup(self, x: DeviceRows, groups: int, first: int, length: int, output: DeviceRows, at: int) -> None:
        """Parts of rows that come group by group, brought together."""
        self._add(
            "ungroup", (up(groups * length, 256), self.tokens, 1), x.address, output.address, groups,
            x.columns // groups, first, length, output.columns, at,
        )  # fmt: skip

    def _add_later(self, output: DeviceRows, added: DeviceRows) -> None:
        if output.address in self._pending:
            raise AssertionError("two sums without a norm between them")
        self._pending[output.address] = added.address

    @property
    def own_logits(self) -> slice:
        """Those of the vocabulary that this device makes, at their places among all: nobody exchanges them."""
        return self.exchange.share.of(self.vocabulary)

    def logits(self, matrix: DeviceMatrix, x: Activation[DeviceRows]) -> None:
        """The last product, for the positions that want logits."""
        final, row = self._final, x.forms[matrix.activation_type].address
        assert final is not None
        product = make.Product(matrix, row, self.logits_address, self.own_logits)
        self._tail = lambda first, tokens: [*final(first, tokens), make.mat_vec(product)]

    # ---- attention ----

    def rope_table(self, rope: Rope, *, name: str = "rope") -> DeviceRows:
        """(cos, sin) of every position; the engine fills the table once."""
        return self.memory.rope_table(rope, name)

    def kv_cache(self, heads: int, columns: int, window: int = 0) -> KvCache:
        """Places in a session's memory."""
        kv_type = self.memory.kv_type
        row_bytes = heads * columns * kv_type.bytes
        ring = ring_positions(window, self.context_tokens, self.memory.batch_tokens)
        if ring:
            keys, values = (self._kept.take(ring * row_bytes, zeroed=True) for _ in range(2))
        else:
            keys, values = (self._kept.take_cache(self.context_tokens, row_bytes) for _ in range(2))
        return KvCache(keys, values, heads, columns, kv_type, ring)

    def attention(
        self, query: DeviceRows, key: DeviceRows, value: DeviceRows, table: DeviceRows, cache: KvCache,
        op: Attention[int],
    ) -> DeviceRows:  # fmt: skip
        """What fills the cache, and what reads it."""
        for rows, bias in ((query, op.query_bias), (key, op.key_bias), (value, op.value_bias)):
            self._add_bias(rows, bias)
        norms = [op.query_norm, op.key_norm]
        if op.norms_whole_rows:
            for rows, norm in ((query, op.query_norm), (key, op.key_norm)):
                at, columns = rows.address, rows.columns
                self._add("rms_norm", (self.tokens, 1, 1), at, None, norm, at, None, columns, op.epsilon)
            norms = [None, None]
        turned = self.rows("rotated_query", op.heads * cache.columns)
        stride = query.columns // op.heads
        self._add(
            f"attention_prepare_{cache.type.suffix}", (op.heads + 2 * cache.heads, self.tokens, 1), query.address,
            key.address, value.address, *norms, table.address, self.positions, self.states, turned.address,
            cache.keys, cache.values, op.heads, cache.heads, cache.columns, stride, op.rotated, op.epsilon,
            cache.ring,
        )  # fmt: skip
        output = self.rows("attended", op.heads * cache.columns)
        self._attend(query, turned, output, cache, op)
        return output

    def _attend(
        self, query: DeviceRows, turned: DeviceRows, output: DeviceRows, cache: KvCache, op: Attention[int]
    ) -> None:
        """output = softmax(turned k^T / sqrt(d)) v, times sigmoid(gate) where the query rows carry one."""
        splits = kernels.attention_splits(self.context_tokens)
        parts = self.memory.words("attention", 4 * op.heads * splits * (cache.columns + 2))
        shape = (self.tokens, splits, cache, op)
        self.body.append(make.attend(turned.address, parts, self.positions, self.states, *shape))
        asked = (query.address, query.columns)
        self._makers[output.address] = make.merge(parts, self.positions, asked, output.address, "q8", *shape)
        self.body.append(self._makers[output.address])

    # ---- gated delta rule ----

    def conv(self, x: DeviceRows, weight: int, taps: int, *, name: str) -> DeviceRows:
        """Causal convolution over each channel, then silu."""
        state = self._kept.take(4 * (taps - 1) * x.columns, zeroed=True)
        output = self.rows(name, x.columns)
        arguments = (weight, x.address, self.states, state, output.address, x.columns, taps)
        if self.tokens == 1:
            self._add("conv_token", (up(x.columns, 128), 1, 1), *arguments)
        else:
            self._add("conv_step", (up(x.columns, 32), 1, 1), *arguments, self.tokens)
        return output

    def delta(
        self, qkv: DeviceRows, beta: DeviceRows, alpha: DeviceRows, gate: DeviceRows, op: Delta[int], *, name: str
    ) -> DeviceRows:
        """The gated delta rule, then the norm of each head times silu(gate)."""
        columns = op.value_heads * op.head_columns
        state = self._kept.take(4 * columns * op.head_columns, zeroed=True)
        output, recalled = self.rows(name, columns), self.rows("recalled", columns)
        self._add(
            f"delta_step_{op.head_columns}", (op.head_columns // 16, op.value_heads, 1), qkv.address, alpha.address,
            beta.address, op.decay_bias, op.decay_rate, self.states, state, recalled.address, op.key_heads,
            op.value_heads, op.head_columns, int(op.grouped), self.tokens, op.epsilon,
        )  # fmt: skip
        self._makers[output.address] = self._add(
            "gated_norm", (up(op.value_heads, 4), self.tokens, 1), recalled.address, gate.address, op.norm,
            output.address, "q8", op.value_heads, op.head_columns, op.epsilon,
        )  # fmt: skip
        return output

    # ---- experts ----

    def _picks(self, layer: int, logits: DeviceRows, router: Router[int]) -> Picks[int, DeviceRows]:
        ids, weights = self.rows("experts", router.used), self.rows("weights", router.used)
        return Picks(layer, router, logits, ids, weights)

    def _chosen_by(self, r: Router[int], name: str = "chosen_by") -> int | None:
        """Where the router's kernel leaves what it chose by, for cache-aware routing; None: that is the logits."""
        wanted = self._substitutes and not r.follows_logits
        return self.rows(name, r.experts).address if wanted else None

    def _rule_of(self, r: Router[int], logits: DeviceRows, chosen_by: int | None) -> tuple[Any, ...]:
        """What cache-aware routing looks at: values, p; then where its rule is, experts, picks, whether they sum up."""
        values, p = (chosen_by, logits.address) if chosen_by is not None else (logits.address, None)
        rule, sums = self.memory.words("car", make.CAR_BYTES), r.normalise or r.score == Score.LOGITS
        return values, p, rule, r.experts, r.used, int(sums)

    def route(self, layer: int, logits: DeviceRows, router: Router[int]) -> Picks[int, DeviceRows]:
        """The picks, their records, and word of them to the host."""
        picks = self._picks(layer, logits, router)
        e, used = self._experts[layer], router.used
        rows = (logits.address, picks.ids.address, picks.weights.address)
        misses = self.memory.words("misses", 4)
        resolved = [e.table, self._records(used), self._late(used), e.post, self._mailbox.run, misses]
        if self._substitutes:
            chosen_by = self._chosen_by(router)
            self.body.append(make.route(picks, self.tokens, chosen_by))
            values, p, *more = self._rule_of(router, logits, chosen_by)
            self._add("substitute_and_resolve", (1, 1, 1), values, p, *rows[1:], *resolved, *more)
        elif make.is_plain(router):
            self._add(
                "route_and_resolve", (1, 1, 1), *rows, *resolved, router.experts, used, int(router.normalise),
                router.scale,
            )  # fmt: skip
        else:
            self.body.append(make.route(picks, self.tokens, None))
            self._add("resolve_picks", (1, 1, 1), picks.ids.address, picks.weights.address, *resolved, used)
        return picks

    def _records(self, used: int) -> int:
        return self.memory.words("records", 8 * used)

    def _late(self, used: int) -> int:
        return self.memory.words("late", 8 * used)

    def _expert_form(self, picks: Picks[int, DeviceRows], op: Experts[int]) -> int | None:
        """Address of what experts compute beside their products; None: nothing."""
        form = make.expert_form(picks, op)
        return None if form is None else self.memory.constant(f"form of {picks.layer}", form)

    def _hidden(self, e: DeviceExpertLayer, used: int, hidden: int) -> tuple[int, int | None]:
        """Where the experts' activations go, a row a pair: as Q8, and as floats where down reads those."""
        floats = self.rows("hidden", used * hidden).address if e.down_kernel in kernels.FLOAT_TYPES else None
        q8 = self.memory.words("hidden_q8", self.memory.batch_tokens * used * kernels.q8_row_bytes(hidden))
        return q8, floats

    def experts_begin(self, picks: Picks[int, DeviceRows], x: Activation[DeviceRows], op: Experts[int]) -> None:
        """Nothing: the launch that computes what is on the device waits for the rest, too."""

    def _gate_and_up(self, picks: Picks[int, DeviceRows], x: DeviceRows, op: Experts[int]) -> tuple[int, int | None]:
        """Of all picks, as they come; the launch awaits the rest of them, too, where nothing is to be done before."""
        e, hidden, used, mail = self._experts[picks.layer], self.hidden, picks.router.used, self._mailbox
        (q8, floats), own = self._hidden(e, used, hidden), self.exchange.share.of(hidden)
        late, records = self._late(used), self._records(used)
        exchanged = self.exchange.hidden(q8, floats, hidden, used)
        self._add(
            f"experts_gate_up_{e.gate_kernel}", kernels.gate_up_grid(length(own), used), records, late, e.answer,
            mail.run, mail.stop, e.device_offset[0], e.device_offset[1], x.address, q8, floats, hidden, x.columns, used,
            self._expert_form(picks, op), own.start, int(not exchanged),
        )  # fmt: skip
        if exchanged:  # while down is read
            self.body.extend(exchanged)
            misses = self.memory.words("misses", 4)
            self._add("wait_for_misses", (1, 1, 1), misses, records, e.answer, mail.run, mail.stop, late, used)
        return q8, floats

    def experts_end(
        self, picks: Picks[int, DeviceRows], x: Activation[DeviceRows], op: Experts[int], output: DeviceRows,
        shared: DeviceRows | None, shared_gate: DeviceRows | None,
    ) -> None:  # fmt: skip
        """Gate and up, of what is not here as it comes; then the sum, which the next norm adds."""
        e, used, hidden = self._experts[picks.layer], picks.router.used, self.hidden
        q8, floats = self._gate_and_up(picks, x.forms[self._expert_inputs[picks.layer][0]], op)
        total, own = self.rows("added", output.columns), self.exchange.share.of(output.columns)
        down = self._add(
            f"experts_down_{e.down_kernel}", kernels.down_grid(length(own)), self._records(used), self._late(used),
            e.device_offset[2], floats or q8, picks.weights.address, shared and shared.address,
            shared_gate and shared_gate.address, total.address, output.columns, hidden, used,
            self._expert_form(picks, op), own.start, length(own),
        )  # fmt: skip
        down.joins = True
        self.body.extend(self.exchange.floats([(total.address, output.columns)]))
        self._add_later(output, total)

    def lookahead(
        self, layer: int, ahead: int, x: DeviceRows, weight: int, epsilon: float, matrix: DeviceMatrix,
        router: Router[int],
    ) -> None:  # fmt: skip
        """Nothing: see :class:`fomoe_io.gpu.guess_recorder.GuessRecorder`."""

    # ---- the result ----

    def launches(self, outputs: int, guesses: bool = False) -> list[LaunchSpec]:
        """All launches of a run that wants so many logits (0 or 1), with or without lookahead."""
        body = [spec for spec in self.finished_body() if guesses or not spec.guesses]
        return [*body, *(self.tail(0, 1) if outputs and self.makes_logits else [])]

    def finished_body(self) -> list[Any]:
        """All but the logits."""
        return make.finished(self._body)

    def tail(self, first: int, tokens: int) -> list[LaunchSpec]:
        """Final norm and logits of so many tokens from the `first` on."""
        assert self._tail is not None
        return make.finished(self._tail(first, tokens))


def _implements(recorder: DeviceRecorder) -> Recorder[DeviceMatrix, int, DeviceRows]:
    return recorder
