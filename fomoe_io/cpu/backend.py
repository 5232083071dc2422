"""A model on the CPU: weights, activations, sessions' states and experts in one bounded piece of memory."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fomoe_io import _cpu
from fomoe_io.backend import (
    Batch,
    Budgets,
    Counters,
    Joined,
    PooledState,
    Span,
    StatePool,
    kept_text,
    lookahead_text,
    together,
)
from fomoe_io.cpu import dot_library
from fomoe_io.cpu.recorder import CpuRecorder, Embedding, StateLayout
from fomoe_io.cpu.weights import Weights
from fomoe_io.errors import FormatError, UsageError
from fomoe_io.experts.lookahead import Lookahead, recall_of, spare_buffers
from fomoe_io.experts.residency import DECAY, policy_number
from fomoe_io.experts.slots import SlotLayout, native_layers, share_slots, slot_layout, slot_pairs, tier_slots
from fomoe_io.models.recorder import KvType
from fomoe_io.open_model import OpenModel
from fomoe_io.ram_budget import RamBudget
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES
from fomoe_io.units import format_bytes


class CpuState(PooledState):
    """A session's memory in host memory."""

    def __init__(self, layout: StateLayout, pool: StatePool) -> None:
        self._parts = layout.parts
        self.row_bytes, self.recurrent_bytes = layout.parts.row_bytes, layout.parts.recurrent_bytes
        self._memory = aligned_memory(max(layout.bytes, LEAST_BLOCK_BYTES))  # address space alone, until it is used
        super().__init__(pool)

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._memory.address

    def clear(self) -> None:
        """Zero what the next token would see of earlier ones."""
        for offset, size in self._parts.recurrent:
            self._bytes(offset, size)[:] = 0

    def _bytes(self, offset: int, size: int) -> np.ndarray:
        return np.frombuffer(self._memory.view, np.uint8, size, offset)

    def _columns(self, first: int, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Where each stream stands in a row, and its positions."""
        place = 0
        for offset, width in self._parts.streams:
            yield slice(place, place + width), self._bytes(offset + first * width, count * width).reshape(count, width)
            place += width

    def save_rows(self, first: int, count: int) -> np.ndarray:
        """KV of tokens."""
        rows = np.empty((count, self.row_bytes), np.uint8)
        for columns, stream in self._columns(first, count):
            rows[:, columns] = stream
        return rows

    def load_rows(self, first: int, rows: np.ndarray) -> None:
        """Put KV back."""
        for columns, stream in self._columns(first, len(rows)):
            stream[:] = rows[:, columns]

    def save_recurrent(self) -> np.ndarray:
        """All that is recurrent."""
        parts = [self._bytes(offset, size) for offset, size in self._parts.recurrent]
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def load_recurrent(self, saved: np.ndarray) -> None:
        """Put it back."""
        place = 0
        for offset, size in self._parts.recurrent:
            self._bytes(offset, size)[:] = saved[place : place + size]
            place += size

    def _release(self) -> None:
        self._memory.close()


class CpuBackend:
    """See :class:`fomoe_io.backend.Backend`.

    Parameters
    ----------
    opened : OpenModel
    """

    def __init__(self, opened: OpenModel) -> None:
        config = opened.config
        if config.vram_bytes is not None:
            raise UsageError("a bound of device memory was given, and there is no GPU in use", hint="drop --vram")
        self._opened, self._config, self._shape = opened, config, opened.shape
        self._kernels = dot_library.open_kernels(config.kernels)
        self._check_types()
        self._float = config.activations == "float32"
        self.threads = config.threads or len(os.sched_getaffinity(0))
        self._team = _cpu.Team(self.threads)
        block_bytes = opened.reader.block_bytes
        self._weights = Weights(
            opened.model.resident, self._kernels, float_activations=self._float, block_bytes=block_bytes
        )
        layers = opened.model.experts
        layouts = {i: slot_layout(layer, block_bytes) for i, layer in layers.items()}
        self._expert_inputs = {
            i: (self._activation_type(int(layer.parts[0].type)), self._activation_type(int(layer.parts[1].type)))
            for i, layer in layers.items()
        }
        self.budgets = self._share_memory(layouts)
        self._states = StatePool(config.sessions)
        try:
            self._fill(layouts)
        except BaseException:
            self.close()
            raise

    device_name = "cpu"

    @property
    def kernels(self) -> str:
        """Whose dot products."""
        return self._kernels.name

    @property
    def joins_tokens(self) -> bool:
        """Unless each may be substituted."""
        return self._config.car is None

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return f"{self.threads} threads, {self.kernels} kernels"

    def memory_lines(self, again: str) -> list[str]:
        """Where the memory goes, for the banner."""
        b = self.budgets
        return [
            f"memory at most {format_bytes(b.ram_bytes)}{again}, in it weights {format_bytes(b.resident_bytes)}, "
            f"experts {format_bytes(b.pool_bytes)} ({_slots_text(self._slots().values())} of {self._shape.experts} a "
            f"layer), state {format_bytes(b.state_bytes)}, batch {b.batch_tokens}"
            f"{lookahead_text(b)}{kept_text(b)}"
        ]

    # ---- opening ----

    def _check_types(self) -> None:
        for layer, found in self._opened.model.experts.items():
            for part in found.parts:
                if self._kernels.type_info(int(part.type)) is None:
                    raise FormatError(
                        f"blk.{layer} expert {part.name} has type number {int(part.type)}, "
                        f"which the {self.kernels} kernels do not know"
                    )

    def _activation_type(self, weight_type: int) -> int:
        """What a product with weights of this type reads: its own activation type, or floats (0)."""
        info = self._kernels.type_info(weight_type)
        return 0 if self._float or info is None else info[0]

    def _slots(self) -> dict[int, int]:
        """Of each layer that has experts."""
        return {i: sum(self.budgets.slots[i]) for i in self._opened.model.experts}

    def _fill(self, layouts: dict[int, SlotLayout]) -> None:
        """Take the memory, read the weights, record the program."""
        s, config, b, reader = self._shape, self._config, self.budgets, self._opened.reader
        self._weights.load(reader, config.progress)
        self._pool = aligned_memory(b.pool_bytes)
        native, staging = native_layers(
            s.layers, self._opened.model.experts, layouts, self._slots(), self._pool.address
        )
        reader.register_buffers(self._pool.address, b.pool_bytes)
        self._experts = _cpu.Experts(
            self._kernels,
            self._experts_shape(b.batch_tokens),
            native,
            b.slot_table,
            policy_number(config.policy),
            DECAY,
            reader.address,
            (reader, self._pool),
        )
        self._lookahead = Lookahead(config.lookahead_mode if b.lookahead_bytes else "off")
        if b.lookahead_bytes:
            each = b.lookahead_bytes // sum({layout.slot_bytes for layout in layouts.values()})
            self._experts.stage(self._pool.address + staging, each)
        if config.car is not None:
            car = config.car.native()
            self._experts.set_car(ctypes.addressof(car))
        self._recorder = self._record(b.batch_tokens, self._experts)
        self.reset_statistics()

    def _experts_shape(self, batch_tokens: int) -> dict[str, int]:
        s = self._shape
        return {
            "columns": s.columns,
            "hidden": s.hidden,
            "used": s.used,
            "batch": batch_tokens,
            "float_activations": int(self._float),
        }

    def _record(self, batch_tokens: int, experts: _cpu.Experts | None) -> CpuRecorder:
        s, opened = self._shape, self._opened
        matrix, file, offset = self._weights.embedding(s.columns, s.vocabulary)
        recorder = CpuRecorder(
            self._team,
            self._kernels,
            embedding=Embedding(matrix, -1 if file < 0 else opened.files[file], offset),
            expert_inputs=self._expert_inputs,
            batch_tokens=batch_tokens,
            context_tokens=opened.context_tokens,
            # attention scores of a whole context, or the widest row (twice: normalised q and k)
            scratch_floats=max(2 * s.widest_row, opened.context_tokens),
            experts=experts,
            lookahead=experts is not None and self.budgets.lookahead_bytes > 0,
            kv_type=KvType[self._config.kv_type.upper()],
            widest_batch=self._config.least_batch_tokens,
        )
        opened.model.architecture.build(recorder, self._weights, s)
        return recorder

    def _share_memory(self, layouts: dict[int, SlotLayout]) -> Budgets:
        """Share the budget: process, resident weights, state and activations first, slots get the rest."""
        s, config = self._shape, self._config
        ram = RamBudget(self._opened.store.model_name, s, config, self._opened.peak_bytes_before)
        sketch = self._record(1, None)
        state, parts = config.sessions * sketch.state.bytes, sketch.state.parts
        per_token = sketch.activation_bytes + _cpu.Experts.workspace_bytes(self._experts_shape(1))
        del sketch
        least = ram.slots or s.used
        base = ram.fixed_bytes + self._weights.bytes + state
        slot_bytes = {i: layout.slot_bytes for i, layout in layouts.items()}
        row_bytes = sum(slot_bytes.values())
        ranks, ahead_bytes, mode = config.guesses_of(s.used), sum(set(slot_bytes.values())), config.lookahead_mode
        asked = 0 if mode == "auto" else ranks * ahead_bytes
        smallest = base + per_token + least * row_bytes + asked
        limit = ram.limit(smallest)
        kept = ram.kept_bytes(limit - smallest, limit, parts, self._opened.context_tokens)
        base, smallest = base + kept, smallest + kept
        most = ram.slots or s.experts
        batch = config.least_batch_tokens
        # An eighth of what is left at most for activations: a smaller batch costs prompt speed, fewer slots cost reads.
        while batch > 1 and batch * per_token > max((limit - smallest) // 8, limit - base - asked - most * row_bytes):
            batch //= 2
        room = limit - base - batch * per_token
        if config.tiers is not None:
            most = max(least, round((config.tiers.vram + config.tiers.dram) * s.experts))
        ahead = ahead_bytes * spare_buffers(
            mode, ranks, slot_bytes, ahead_bytes, room,
            least=least * row_bytes, most=most * row_bytes, is_all=most >= s.experts,
        )  # fmt: skip
        slots = share_slots(slot_bytes, most, room - ahead, least)
        if slots is None:
            raise ram.too_small(limit, smallest)
        pool = sum(slots[i] * size for i, size in slot_bytes.items())
        vram = None if config.tiers is None else dict.fromkeys(slots, round(config.tiers.vram * s.experts))
        return Budgets(
            ram_bytes=limit,
            resident_bytes=self._weights.bytes,
            state_bytes=state,
            workspace_bytes=batch * per_token,
            pool_bytes=pool + ahead,
            lookahead_bytes=ahead,
            batch_tokens=batch,
            slots=slot_pairs(tier_slots(s.layers, slots, vram)),
            kept_bytes=kept + (config.cache_bytes or 0),
        )

    def record(self, trace: _cpu.Trace) -> None:
        """Write what runs from now on do into a trace."""
        self._recorder.program.trace(trace)

    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Bring experts into a layer's free slots."""
        self._check(self._experts.warm(layer, experts, scores, self._opened.gate))

    # ---- running ----

    def _check(self, error: int) -> None:
        if error:
            self._opened.raise_failure(error, *self._experts.failure())

    def new_state(self) -> CpuState:
        """Memory for another session."""
        return CpuState(self._recorder.state, self._states)

    def run(self, batch: Batch, logits: np.ndarray) -> None:
        """Read tokens, of as many sessions at once as a batch holds; tokens that may be substituted one by one."""
        most, place = 1 if batch.may_substitute else self.budgets.batch_tokens, 0
        for spans in together(batch.spans, most):
            joined = Joined(spans)
            self._run(joined, batch, logits[place : place + len(joined.output_rows)])
            place += len(joined.output_rows)

    def _run(self, joined: Joined, batch: Batch, logits: np.ndarray) -> None:
        is_token = len(joined.ids) == 1
        if is_token:
            self._experts.set_lookahead(self._config.guesses_of(self._shape.used) if self._lookahead.begin() else 0)
        error = self._recorder.program.run(
            joined.ids,
            joined.positions,
            joined.of_tokens([_address(span) for span in joined.spans]),
            joined.output_rows,
            logits,
            substitute=batch.may_substitute,
            gate=self._opened.gate,
            **batch.records,
        )
        if error not in (0, -errno.ECANCELED) and self._opened.has_every_expert():
            raise self._opened.embedding_error(-error)
        self._check(error)
        if is_token:
            self._lookahead.end()

    def picks(self) -> np.ndarray:
        """How often the router has picked each expert."""
        return self._experts.picks()

    def tiers(self) -> np.ndarray:
        """Where each expert is."""
        return self._experts.tiers()

    def counters(self) -> Counters:
        """What has been counted."""
        return Counters(**self._experts.counters())

    def add_statistics(self, result: dict[str, Any], change: Counters) -> None:
        """How well layers were guessed."""
        if self.budgets.lookahead_bytes:
            guessed = self._experts.recall() - self._recall
            result["prefetch"] |= {"is_on": self._lookahead.is_on, "recall": recall_of(guessed)}

    def reset_statistics(self) -> None:
        """Counts of guesses begin anew."""
        self._recall = self._experts.recall()

    def close(self) -> None:
        """Give everything back."""
        for name in ("_recorder", "_experts", "_team"):
            self.__dict__.pop(name, None)
        self._opened.reader.close()
        for name in ("_weights", "_pool"):
            owner = self.__dict__.pop(name, None)
            if owner is not None:
                owner.close()


def _address(span: Span) -> int:
    assert isinstance(span.state, CpuState)
    return span.state.address


def _slots_text(slots: Iterable[int]) -> str:
    """`12`, or `12 to 13` where the first layers have one more."""
    counts = sorted(set(slots))
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
