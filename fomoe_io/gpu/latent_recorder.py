"""Attention over latents (MLA) on a GPU, as the CPU has it: the cache keeps latents and turned keys alone."""

from __future__ import annotations

from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import F32, Q8, DeviceMatrix, DeviceRows, Memory
from fomoe_io.gpu.kernels import up
from fomoe_io.gpu.part_recorder import PartRecorder
from fomoe_io.models.recorder import LatentAttention

ATTENTION_TOKENS, ATTENTION_BYTES = 8, 256 << 20
"""Tokens of a batch whose attention is computed at once, and room for what each position range has found until it is
merged: a long context takes fewer tokens at once, down to one."""


class LatentRecorder(PartRecorder):
    """The launches of gpu/kernels/latent.h.

    Attributes
    ----------
    memory : Memory
    tokens, positions, states
        See :class:`fomoe_io.gpu.recorder.DeviceRecorder`.
    """

    memory: Memory
    tokens: int
    positions: int
    states: int | None

    def latent_attention(
        self, query: DeviceRows, latent: DeviceRows, key: DeviceRows, table: DeviceRows, w_key: DeviceMatrix,
        w_value: DeviceMatrix, op: LatentAttention[int],
    ) -> DeviceRows:  # fmt: skip
        """Each head's query is multiplied with its key matrix, the latents' sum with its value matrix."""
        heads, columns, rotated, own = op.heads, latent.columns, op.rotated, w_key.columns
        kind, stride = self.memory.kv_type, op.rotated + latent.columns
        cache = self._kept.take_cache(self.memory.context_tokens, stride * kind.bytes)
        turned = self.memory.row("rotated_query", heads * rotated, F32)
        absorbed = self.memory.row("absorbed_query", heads * columns, F32)
        floats, q8 = self._head_rows("own_query", heads, w_key)
        self._add(
            f"latent_prepare_{kind.suffix}", (heads + 1, self.tokens, 1), query.address, latent.address, key.address,
            op.norm, table.address, self.positions, self.states, turned.address, floats, q8, cache, heads, own, rotated,
            columns, op.epsilon,
        )  # fmt: skip
        self._multiply_heads(w_key, heads, floats or q8, absorbed)
        sums = self._attend_latents(turned, absorbed, cache, w_value, op)
        output = self.memory.row("attended", heads * op.value_columns, F32)
        self._multiply_heads(w_value, heads, sums, output)
        return output

    def _head_rows(self, name: str, heads: int, matrix: DeviceMatrix) -> tuple[int | None, int | None]:
        """Where each head's input of a matrix goes, a row of its own: as floats or as Q8."""
        if matrix.activation_type != Q8:
            return self.memory.row(name, heads * matrix.columns, F32).address, None
        row_bytes = kernels.q8_row_bytes(matrix.columns)
        return None, self.memory.words(f"{name}_q8", self.memory.batch_tokens * heads * row_bytes)

    def _attend_latents(
        self, turned: DeviceRows, absorbed: DeviceRows, cache: int, w_value: DeviceMatrix, op: LatentAttention[int]
    ) -> int | None:
        """sum_t p_t l_t of each head, for a few tokens at a time."""
        heads, columns = op.heads, w_value.columns
        splits = kernels.latent_splits(self.memory.context_tokens)
        parts, most = attention_parts(self.memory, heads * splits * (columns + 2))
        floats, q8 = self._head_rows("summed_latents", heads, w_value)
        for first in range(0, self.tokens, most):
            tokens, positions = min(most, self.tokens - first), self.positions + 4 * first
            states = None if self.states is None else self.states + 8 * first
            queries = [rows.address + first * rows.stride_bytes for rows in (turned, absorbed)]
            self._add(
                f"latent_attention_{self.memory.kv_type.suffix}", kernels.latent_grid(heads, splits, tokens), *queries,
                cache, positions, states, parts, heads, splits, op.rotated, columns, op.scale,
            )  # fmt: skip
            y = None if floats is None else floats + 4 * first * heads * columns
            y_q8 = None if q8 is None else q8 + first * heads * kernels.q8_row_bytes(columns)
            grid = (up(columns, 256), heads, tokens)
            self._add("latent_merge", grid, parts, positions, y, y_q8, heads, columns, splits)
        return floats or q8

    def _multiply_heads(self, matrix: DeviceMatrix, heads: int, x: int | None, output: DeviceRows) -> None:
        """output_h = matrix_h x_h of each head: of one token."""
        rows = matrix.rows // heads
        split = kernels.split_of(matrix.kernel, matrix.columns, matrix.rows)
        grid = kernels.heads_mat_vec_grid(matrix.kernel, heads, rows, split)
        address = matrix.address
        self._add(f"heads_mat_vec_{matrix.kernel}", grid, address, x, output.address, rows, matrix.columns, split)


def attention_parts(memory: Memory, floats: int) -> tuple[int, int]:
    """Room for the parts of some tokens, and how many: those of a launch of a batch."""
    most = max(1, min(memory.batch_tokens, ATTENTION_TOKENS, ATTENTION_BYTES // (4 * floats)))
    return memory.words("attention", 4 * floats * most), most
