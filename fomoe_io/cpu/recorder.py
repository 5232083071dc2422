"""What a model is recorded with on the CPU: weights, activation rows and steps of a native program.

A model calls the methods of :class:`CpuRecorder` once, in the order of its equations; the result is replayed
for every batch of tokens without touching a Python object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io import _cpu
from fomoe_io._cpu import Experts, Matrix, Rows
from fomoe_io.backend import StateParts
from fomoe_io.models.recorder import (
    Activation,
    Attention,
    Delta,
    KvCache,
    KvType,
    LatentAttention,
    Picks,
    Recorder,
    Router,
    ring_positions,
)
from fomoe_io.models.recorder import Experts as ExpertsOp

if TYPE_CHECKING:
    from fomoe_io.models.rope import Rope

F32 = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding, in memory, or read a row at a time from the `offset` of a `file` (a descriptor, else -1)."""

    matrix: Matrix
    file: int = -1
    offset: int = 0


class StateLayout:
    """Offsets of a session's memory, in the order in which the model asks for them."""

    def __init__(self) -> None:
        self.bytes = 0
        self.parts = StateParts()

    def take(self, nbytes: int, *, zeroed: bool) -> int:
        """Reserve memory on a cache line; return its offset."""
        offset = self.bytes
        size = (nbytes + 63) // 64 * 64
        self.bytes += size
        if zeroed:
            self.parts.recurrent.append((offset, size))
        return offset

    def take_cache(self, heads: int, positions: int, row_bytes: int) -> int:
        """Reserve keys or values, a stream of positions a head."""
        offset = self.take(heads * positions * row_bytes, zeroed=False)
        self.parts.streams += [(offset + head * positions * row_bytes, row_bytes) for head in range(heads)]
        return offset


class CpuRecorder:
    """Collects the steps of a model for batches of up to `batch_tokens` tokens.

    Parameters
    ----------
    team : _cpu.Team
        The threads that will replay the program.
    kernels : _cpu.Kernels
        What they multiply with; the weights' are the same.
    embedding : Embedding
    expert_inputs : mapping of int to (int, int)
        Per layer the activation types that the routed experts' gate and up matrices read.
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
    widest_batch : int
        Most tokens of any batch: what rings have room for, however small memory makes the batches; 0: `batch_tokens`.
    kv_type : KvType
    """

    def __init__(
        self,
        team: _cpu.Team,
        kernels: _cpu.Kernels,
        *,
        embedding: Embedding,
        expert_inputs: Mapping[int, tuple[int, int]],
        batch_tokens: int,
        context_tokens: int,
        scratch_floats: int,
        experts: Experts | None,
        lookahead: bool = False,
        kv_type: KvType = KvType.F32,
        widest_batch: int = 0,
    ) -> None:
        self.program = _cpu.Program(team, kernels, scratch_floats)
        self._kernels = kernels
        self.batch_tokens = batch_tokens
        self.context_tokens = context_tokens
        self._embedding = embedding
        self._expert_inputs = expert_inputs
        self._experts = experts
        self._looks_ahead, self._kv_type = lookahead, kv_type
        self._widest_batch = widest_batch or batch_tokens
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

    def _forms(self, name: str, columns: int, types: Sequence[int]) -> Activation[Rows]:
        return Activation({t: self.rows(name, columns, t) for t in dict.fromkeys(types)})

    # ---- dense ----

    def embed(self, output: Rows) -> None:
        """output = the tokens' rows of the embedding"""
        e = self._embedding
        self.program.embed(e.matrix, output, e.file, e.offset)

    def norm(
        self, x: Rows, weight: np.ndarray, epsilon: float, *, name: str, feeds: Sequence[Matrix],
        experts_of: int | None = None, of_outputs: bool = False,
    ) -> Activation[Rows]:  # fmt: skip
        """RMS norm of `x`, converted once to each activation type that its consumers read."""
        wanted = [m.activation_type for m in feeds]
        if experts_of is not None:
            wanted += self._expert_inputs[experts_of]
        result = self._forms(name, x.columns, wanted)
        self.program.norm(x, weight, epsilon, list(result.forms.values()), of_outputs)
        return result

    def convert(self, x: Rows, *, name: str, feeds: Sequence[Matrix]) -> Activation[Rows]:
        """`x` in the activation types that `feeds` read."""
        result = Activation({F32: x})
        for kind in dict.fromkeys(m.activation_type for m in feeds):
            if kind != F32:
                result.forms[kind] = self.rows(name, x.columns, kind)
                self.program.quantize(x, result.forms[kind])
        return result

    def silu_mul(self, gate: Rows, up: Rows, *, name: str, feeds: Sequence[Matrix]) -> Activation[Rows]:
        """silu(gate) * up, in the activation types that `feeds` read."""
        result = self._forms(name, gate.columns, [m.activation_type for m in feeds])
        for rows in result.forms.values():
            self.program.silu_mul(gate, up, rows)
        return result

    def mat_mul(self, products: Sequence[tuple[Matrix, Activation[Rows], Rows]]) -> None:
        """Products that depend on nothing but earlier steps, as one step: output = matrix @ input."""
        self.program.mat_mul([(m, x.forms[m.activation_type], y, False) for m, x, y in products])

    def mat_mul_add(self, matrix: Matrix, x: Activation[Rows], output: Rows, bias: np.ndarray | None = None) -> None:
        """output += matrix @ x [+ bias]"""
        self.program.mat_mul([(matrix, x.forms[matrix.activation_type], output, True)])
        if bias is not None:
            self.program.add_bias(output, bias)

    def logits(self, matrix: Matrix, x: Activation[Rows]) -> None:
        """The last product: into the caller's array, for the positions that want logits."""
        self.program.mat_mul([(matrix, x.forms[matrix.activation_type], None, False)], True, True)

    def ungroup(self, x: Rows, groups: int, first: int, length: int, output: Rows, at: int) -> None:
        """Parts of rows that come group by group, brought together."""
        self.program.ungroup(x, output, groups, first, length, at)

    # ---- attention ----

    def rope_table(self, rope: Rope, *, name: str = "rope") -> Rows:
        """cos and sin of every pair, for the batch's positions."""
        table = self.rows(name, 2 * len(rope.frequencies))
        self.program.rope_table(table, rope)
        return table

    def kv_cache(self, heads: int, columns: int, window: int = 0) -> KvCache:
        """Offsets in a session's memory.

        A ring is written twice, one copy behind the other, so that every window is one piece.
        """
        positions, row_bytes = self.context_tokens, columns * self._kv_type.bytes
        ring = ring_positions(window, positions, self._widest_batch)
        if ring:
            keys, values = (self.state.take(heads * 2 * ring * row_bytes, zeroed=True) for _ in range(2))
        else:
            keys, values = (self.state.take_cache(heads, positions, row_bytes) for _ in range(2))
        return KvCache(keys, values, heads, columns, self._kv_type, ring)

    def attention(
        self, query: Rows, key: Rows, value: Rows, table: Rows, cache: KvCache, op: Attention[np.ndarray]
    ) -> Rows:
        """A step that fills the cache, and one that reads it."""
        stride, positions = query.columns // op.heads, 2 * cache.ring or self.context_tokens
        query_norm, key_norm = op.query_norm, op.key_norm
        if op.norms_whole_rows:
            for rows, norm in ((query, query_norm), (key, key_norm)):
                self.program.norm(rows, norm, op.epsilon, [rows], False)
            query_norm = key_norm = None
        self.program.kv(
            query, key, value, table, query_norm, key_norm, cache.keys, cache.values, positions, cache.ring,
            cache.type.value, op.heads, cache.heads, cache.columns, stride, op.rotated, op.epsilon,
            (op.query_bias, op.key_bias, op.value_bias),
        )  # fmt: skip
        attended = self.rows("attended", op.heads * cache.columns)
        self.program.attention(
            query, attended, cache.keys, cache.values, positions, cache.type.value, op.heads, cache.heads,
            cache.columns, stride, op.gated, op.sinks, op.window, 0, 0, cache.ring,
        )  # fmt: skip
        return attended

    def latent_attention(
        self, query: Rows, latent: Rows, key: Rows, table: Rows, w_key: Matrix, w_value: Matrix,
        op: LatentAttention[np.ndarray],
    ) -> Rows:  # fmt: skip
        """A position's key is its value, too: the columns behind those that turn."""
        columns, kv_type = op.rotated + latent.columns, self._kv_type
        keys = self.state.take_cache(1, self.context_tokens, columns * kv_type.bytes)
        self.program.norm(latent, op.norm, op.epsilon, [latent], False)
        absorbed = self.rows("absorbed", op.heads * columns)
        self.program.head_mul(w_key, query, absorbed, op.heads, op.rotated)
        self.program.latent(query, latent, key, table, absorbed, keys, kv_type.value, op.heads, op.rotated)
        sums = self.rows("latent_sums", op.heads * latent.columns)
        self.program.attention(
            absorbed, sums, keys, keys + op.rotated * kv_type.bytes, self.context_tokens, kv_type.value, op.heads, 1,
            columns, columns, False, None, 0, latent.columns, op.scale,
        )  # fmt: skip
        attended = self.rows("attended", op.heads * op.value_columns)
        self.program.head_mul(w_value, sums, attended, op.heads, 0)
        return attended

    # ---- gated delta rule ----

    def conv(self, x: Rows, weight: np.ndarray, taps: int, *, name: str) -> Rows:
        """Causal convolution over each channel, then silu; the last inputs stay in the session's memory."""
        state = self.state.take(4 * (taps - 1) * x.columns, zeroed=True)
        output = self.rows(name, x.columns)
        self.program.conv(x, output, weight, state, taps)
        return output

    def delta(self, qkv: Rows, beta: Rows, alpha: Rows, gate: Rows, op: Delta[np.ndarray], *, name: str) -> Rows:
        """The gated delta rule, then the norm of each head times silu(gate)."""
        state = self.state.take(4 * op.value_heads * op.head_columns**2, zeroed=True)
        output = self.rows(name, op.value_heads * op.head_columns)
        self.program.delta(
            qkv, beta, alpha, gate, output, op.decay_rate, op.decay_bias, op.norm, state, op.key_heads, op.value_heads,
            op.head_columns, op.grouped, op.epsilon,
        )  # fmt: skip
        return output

    # ---- experts ----

    def route(self, layer: int, logits: Rows, router: Router[np.ndarray]) -> Picks[np.ndarray, Rows]:
        """The picks and their weights, and their records."""
        ids, weights = self.rows("experts", router.used), self.rows("weights", router.used)
        self.program.route(logits, ids, weights, layer, router)
        return Picks(layer, router, logits, ids, weights)

    def experts_begin(self, picks: Picks[np.ndarray, Rows], x: Activation[Rows], op: ExpertsOp[np.ndarray]) -> None:
        """Begin to read those that are missing; experts of a single token may stand in for others."""
        if self._experts is None:
            return
        self.program.experts_begin(self._experts, picks.logits, picks.ids, picks.weights, picks.layer, picks.router)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is recorded inside is computed while the drive reads; the steps still follow one another."""
        yield

    def experts_end(
        self, picks: Picks[np.ndarray, Rows], x: Activation[Rows], op: ExpertsOp[np.ndarray], output: Rows,
        shared: Rows | None, shared_gate: Rows | None,
    ) -> None:  # fmt: skip
        """Compute them as they come; then add them, in the router's order, and the shared expert."""
        if self._experts is None:
            return
        gate_type, up_type = self._expert_inputs[picks.layer]
        self.program.experts(
            self._experts, picks.ids, x.forms[gate_type], x.forms[up_type], picks.layer, op.biases, op.is_clamped
        )
        self.program.combine(self._experts, picks.weights, output, picks.router.used, shared, shared_gate)

    def lookahead(
        self,
        layer: int,
        ahead: int,
        x: Rows,
        weight: np.ndarray,
        epsilon: float,
        matrix: Matrix,
        router: Router[np.ndarray],
    ) -> None:
        """Read what the next layer would pick, where that is asked for: guesses take the time of the products here."""
        if self._experts is not None and self._looks_ahead and ahead == 1:
            key = "lookahead", router.experts, F32
            if key not in self._rows:
                self._rows[key] = Rows(self._kernels, router.experts, 1)  # of a token alone: beside what is budgeted
            self.program.lookahead(self._experts, x, weight, epsilon, matrix, self._rows[key], layer, router)

    def layer_end(self, layer: int, x: Rows) -> None:
        """Record what the layer leaves, when that is asked for."""
        self.program.layer_end(x, layer)


def _implements(recorder: CpuRecorder) -> Recorder[Matrix, np.ndarray, Rows]:
    return recorder
