"""A model on several GPUs: each computes some of the layers, in turn, with its own link, memory and experts.

The devices' graphs run at the same time and wait for one another where a layer of one follows a layer of another
(kernels/hop.h); each device's experts are served by a thread of their own.  A prompt's batches follow one another
through the devices (pipeline.py).  The bits are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fomoe_io import _cpu
from fomoe_io.backend import Batch, Budgets, Counters, Joined, PooledState, Span, StatePool
from fomoe_io.errors import UsageError
from fomoe_io.experts.lookahead import Lookahead, recall_of
from fomoe_io.gpu.arena import Part, hop_bytes
from fomoe_io.gpu.backend import GpuBackend, GpuState
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.pipeline import BATCHES_A_DEVICE, Piece, cut
from fomoe_io.gpu.runs import run_batch
from fomoe_io.gpu.shared import SharedMemory
from fomoe_io.open_model import OpenModel
from fomoe_io.ram_budget import RamBudget, RamPart
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io._cpu import Trace

T = TypeVar("T")
LOOK_SECONDS = 0.05
"""Between two looks whether a device whose run was given up has ended."""


def owners(layers: int, weights: Sequence[float], mode: str) -> tuple[int, ...]:
    """Which of the devices computes each layer.

    Parameters
    ----------
    layers : int
    weights : sequence of float
        How much of the model each device takes, one number a device.
    mode : {"layer", "pingpong"}
        Layers one after another on a device, which hands over once; or in turn.
    """
    total, owner, taken = sum(weights), [], [0.0] * len(weights)
    if mode == "layer":
        ends = np.cumsum(weights) / total * layers
        return tuple(int(np.searchsorted(ends, layer + 0.5)) for layer in range(layers))
    for layer in range(layers):
        behind = [(layer + 1) * weight / total - had for weight, had in zip(weights, taken, strict=True)]
        owner.append(int(np.argmax(behind)))
        taken[owner[-1]] += 1
    return tuple(owner)


class ChainState(PooledState):
    """A session's memory, a part on each device; the `last` one's makes logits."""

    def __init__(self, pool: StatePool, parts: list[GpuState], last: int) -> None:
        self.parts, self.last = parts, parts[last]
        self.row_bytes = sum(part.row_bytes for part in parts)
        self.recurrent_bytes = sum(part.recurrent_bytes for part in parts)
        super().__init__(pool)

    def clear(self) -> None:
        """Zero what the next token would see of earlier ones."""
        for part in self.parts:
            part.clear()

    def token_logits(self, vocabulary: int) -> np.ndarray:
        """Memory that the device copies to, whose logits they are."""
        return self.last.token_logits(vocabulary)

    def save_rows(self, first: int, count: int) -> np.ndarray:
        """KV of tokens, a device's after another's."""
        return np.concatenate([part.save_rows(first, count) for part in self.parts], axis=1)

    def load_rows(self, first: int, rows: np.ndarray) -> None:
        """Put KV back."""
        place = 0
        for part in self.parts:
            part.load_rows(first, rows[:, place : place + part.row_bytes])
            place += part.row_bytes

    def save_recurrent(self) -> np.ndarray:
        """All that is recurrent."""
        return np.concatenate([part.save_recurrent() for part in self.parts])

    def load_recurrent(self, saved: np.ndarray) -> None:
        """Put it back."""
        place = 0
        for part in self.parts:
            part.load_recurrent(saved[place : place + part.recurrent_bytes])
            place += part.recurrent_bytes

    def _release(self) -> None:
        for part in self.parts:
            part.close()


class ChainBackend:
    """See :class:`fomoe_io.backend.Backend`.

    Parameters
    ----------
    opened : OpenModel
    gpus : sequence of Gpu
        Two or more, of one provider; the same device may come twice.
    mode : {"layer", "pingpong"}
        See `owners`.
    """

    threads = 1

    def __init__(self, opened: OpenModel, gpus: Sequence[Gpu], mode: str) -> None:
        config, shape, self._mode = opened.config, opened.shape, mode
        weights = config.tensor_split or tuple(1.0 for _ in gpus)
        self._owner = owners(shape.layers, weights, mode)
        if len(weights) != len(gpus) or len(set(self._owner)) < len(gpus):
            raise UsageError(
                f"{len(gpus)} devices, and a split that gives layers to {len(set(self._owner))} of them",
                hint="-ts with a number a device, none of them 0",
            )
        self._opened, self.stages, self._number = opened, list[GpuBackend](), 0
        self._trace: Trace | None = None
        self._traces: list[Trace] = []
        # layers in turn: a device would need the rows of several batches at once
        self._batches = BATCHES_A_DEVICE * len(gpus) if mode == "layer" else 1
        self._states, self._failures = StatePool(config.sessions), list[BaseException]()
        self._threads = ThreadPoolExecutor(len(gpus) - 1, "fomoe-device")
        try:
            self._open(gpus)
        except BaseException:
            self.close()
            raise
        self.budgets = self._budgets()
        self._is_guessed = any(stage.sharing.guesses for stage in self.stages)
        self._lookahead = Lookahead(config.lookahead_mode if self._is_guessed else "off")

    def _open(self, gpus: Sequence[Gpu]) -> None:
        opened, shape, owner = self._opened, self._opened.shape, self._owner
        hops = sum(a != b for a, b in pairwise(owner))
        self._exchange = SharedMemory(gpus[0], hops * hop_bytes(shape.columns))
        ram = RamBudget(opened.store.model_name, shape, opened.config, opened.peak_bytes_before)
        limit = ram.limit(ram.fixed_bytes)
        sizes = {i: int(layer.extents[..., 2].sum()) for i, layer in opened.model.experts.items()}
        for i, gpu in enumerate(gpus):
            layers = [layer for layer in range(shape.layers) if owner[layer] == i]
            share = sum(sizes.get(layer, 0) for layer in layers) / sum(sizes.values())
            part = Part(owner, i, self._exchange.pointer_on(gpu), shape.columns)
            mine = opened.part(layers, is_first=i == 0)
            try:
                self.stages.append(GpuBackend(mine, [gpu], part, RamPart(ram, limit, max(share, 1e-9), i == 0)))
            except BaseException:
                mine.reader.close()
                raise
        self._ram_bytes = limit

    def _budgets(self) -> Budgets:
        """The sums, and each layer's slots where it is computed."""
        all_of = [stage.budgets for stage in self.stages]
        added = {
            f.name: sum(getattr(b, f.name) for b in all_of)
            for f in fields(Budgets)
            if f.name not in ("ram_bytes", "batch_tokens", "slots")
        }
        slots = tuple(all_of[i].slots[layer] for layer, i in enumerate(self._owner))
        added["kept_bytes"] -= (len(all_of) - 1) * (self._opened.config.cache_bytes or 0)  # each has counted it
        self._batch_tokens = min(b.batch_tokens for b in all_of)
        batch_tokens = self._batch_tokens * (self._batches if self._batch_tokens > 1 else 1)
        return replace(all_of[0], **added, ram_bytes=self._ram_bytes, batch_tokens=batch_tokens, slots=slots)

    @property
    def device_name(self) -> str:
        """For the banner and the statistics."""
        one = self.stages[0].gpu.info
        ordinals = ",".join(str(stage.gpu.info.ordinal) for stage in self.stages)
        return f"{one.provider}:{ordinals} {one.name}"

    joins_tokens = False  # prompts have other kernels

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return f"{self.device_name} ({self._mode})"

    @property
    def kernels(self) -> str:
        """Whose arithmetic."""
        return self.stages[0].kernels

    def memory_lines(self, again: str) -> list[str]:
        """Where the memory goes, for the banner."""
        lines = [stage.memory_lines("")[0] for stage in self.stages]
        b = self.budgets
        return [*lines, f"memory {format_bytes(b.ram_bytes)}{again}: experts {format_bytes(b.pool_bytes)}"]

    def record(self, trace: Trace) -> None:
        """Write what runs from now on do into a trace: each device keeps what it does until a run is over."""
        self._trace = trace
        for stage in self.stages:
            held = _cpu.Trace.held(len(stage.records) * self._batches, self._batch_tokens, self._opened.shape.used)
            stage.record(held)
            self._traces.append(held)

    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Bring experts into a layer's free slots."""
        self.stages[self._owner[layer]].warm(layer, experts, scores)

    def new_state(self) -> ChainState:
        """Memory for another session."""
        return ChainState(self._states, [stage.new_state() for stage in self.stages], self._owner[-1])

    # ---- running ----

    def run(self, batch: Batch, logits: np.ndarray) -> None:
        """See :func:`run_batch`."""
        run_batch(self, batch, logits)

    def uses_products(self, prompt_tokens: int) -> bool:
        """Whether the vendor's library makes the dense products: on all devices, or on none."""
        return all(stage.uses_products(prompt_tokens) for stage in self.stages)

    def _of_stage(self, span: Span, i: int) -> Span:
        assert isinstance(span.state, ChainState)
        return replace(span, state=span.state.parts[i])

    def run_token(self, span: Span, may_substitute: bool, logits: np.ndarray, picks: np.ndarray | None) -> None:
        """One token: the devices' graphs at the same time."""
        self._number = self._number % 0xFFFFFFFF + 1
        for stage in self.stages:
            stage.allow()
        assert isinstance(span.state, ChainState)
        looks_ahead, address = self._lookahead.begin(), span.state.last.reached(logits)

        def stage_token(i: int) -> np.ndarray:
            of_stage, place = self._of_stage(span, i), address if i == self._owner[-1] else 0
            error, found = self.stages[i].token(self._number, of_stage, may_substitute, looks_ahead, place)
            self.stages[i].check(error)
            return found

        found = self._at_once(stage_token)[self._owner[-1]]
        self._lookahead.end()
        if not address:
            logits[:] = found
        if picks is not None:
            for stage in self.stages:
                posted = stage.tokens.posted_picks()
                for layer in stage.records:
                    picks[layer, 0] = posted[layer]

    def run_prompt(self, spans: list[Span], logits: np.ndarray, uses_products: bool, picks: np.ndarray | None) -> None:
        """Batches; where each device has layers of its own one after another, at the same time."""
        pieces = cut(spans, self._batch_tokens, logits, picks, len(self.stages))
        if len(pieces) == 1 or self._batches == 1:
            for piece in pieces:
                self._in_turn(piece, uses_products)
        else:
            self._at_once(lambda i: self._stage_pieces(i, pieces, uses_products))

    def _stage_prompt(self, i: int, piece: Piece, uses_products: bool) -> Iterator[int]:
        joined = Joined([self._of_stage(span, i) for span in piece.spans])
        return self.stages[i].prompt(joined, piece.logits, uses_products, piece.picks, piece.handed, piece.place)

    def _in_turn(self, piece: Piece, uses_products: bool) -> None:
        """Each device's layers when the rows before them are there, in the caller's thread."""
        try:
            waiting = {i: self._stage_prompt(i, piece, uses_products) for i in range(len(self.stages))}
            while waiting:
                for i in list(waiting):
                    if next(waiting[i], None) is None:
                        del waiting[i]
        finally:
            self._take_traces()

    def _stage_pieces(self, i: int, pieces: list[Piece], uses_products: bool) -> None:
        """A device's layers of all batches, each when the device before has done with it."""
        for piece in pieces:
            while not (i == 0 or piece.is_done[i - 1].wait(LOOK_SECONDS)):
                if self._failures:
                    return
            if self._failures:
                return
            for _ in self._stage_prompt(i, piece, uses_products):
                raise AssertionError("the rows of the device before have come")
            piece.is_done[i].set()

    def _at_once(self, work: Callable[[int], T]) -> list[T]:
        """What `work` makes of each device, the caller's thread for the first; the first failure ends the others."""
        self._failures.clear()

        def guarded(i: int) -> T:
            try:
                return work(i)
            except BaseException as error:
                self._failures.append(error)
                for stage in self.stages:  # nobody waits for rows that do not come
                    stage.pass_on()
                raise

        others = [self._threads.submit(guarded, i) for i in range(1, len(self.stages))]
        try:
            first = guarded(0)
            while wait(others, LOOK_SECONDS).not_done and not self._failures:
                self._opened.gate.look()
        except BaseException as error:
            self._failures.append(error)
        if self._failures:
            self._give_up(others)
        self._take_traces()
        if self._failures:
            cause = self._failures[0]
            self._failures.clear()
            raise cause
        return [first, *(other.result() for other in others)]

    def _give_up(self, work: list[Future[T]]) -> None:
        """A device's run has failed: those of the others end, too."""
        while wait(work, LOOK_SECONDS).not_done:
            for stage in self.stages[1:]:
                stage.end_run()
        for stage in self.stages[1:]:
            stage.go_on()

    def _take_traces(self) -> None:
        if self._trace is not None:
            self._trace.take(self._traces)

    def picks(self) -> np.ndarray:
        """How often the router has picked each expert."""
        return self._by_layer([stage.picks() for stage in self.stages])

    def tiers(self) -> np.ndarray:
        """Where each expert is."""
        return self._by_layer([stage.tiers() for stage in self.stages])

    def _by_layer(self, found: list[np.ndarray]) -> np.ndarray:
        """Each layer's row from the device that computes it."""
        return np.stack([found[i][layer] for layer, i in enumerate(self._owner)])

    def counters(self) -> Counters:
        """What has been counted, on all devices."""
        found = [stage.counters() for stage in self.stages]
        return Counters(*(sum(getattr(c, f.name) for c in found) for f in fields(Counters)))

    def add_statistics(self, result: dict[str, Any], change: Counters) -> None:
        """Those of all devices, and how the model is split."""
        self.stages[0].add_statistics(result, change)
        if self._is_guessed:
            guessed = self._by_layer([stage.guessed for stage in self.stages])
            result["prefetch"] |= {"is_on": self._lookahead.is_on, "recall": recall_of(guessed)}
        counts = [sum(i == k for i in self._owner) for k in range(len(self.stages))]
        result["split"] = {"mode": self._mode, "layers": counts}
        for stage in self.stages[1:]:
            for name, value in stage.reader_counters().items():
                if isinstance(result["reader"].get(name), int):
                    result["reader"][name] += value

    def reset_statistics(self) -> None:
        """Counts of calls and of guesses begin anew."""
        for stage in self.stages:
            stage.reset_statistics()

    def close(self) -> None:
        """Give everything back."""
        self._threads.shutdown()
        for stage in self.stages:
            stage.close()
        exchange = self.__dict__.pop("_exchange", None)
        if exchange is not None:
            exchange.close()
