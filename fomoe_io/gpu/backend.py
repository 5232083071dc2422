"""A model on a GPU: weights and state in its memory, experts where they were last useful."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_io import _gpu, _hip
from fomoe_io.backend import Batch, Counters, Joined, PooledState, Span, StatePool, kept_text, lookahead_text
from fomoe_io.errors import DeviceError, UsageError
from fomoe_io.experts.lookahead import Lookahead, recall_of
from fomoe_io.experts.residency import DECAY, policy_number
from fomoe_io.experts.slots import slot_layout
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.arena import F32, Q8, WHOLE, Part
from fomoe_io.gpu.budget import check_shape, native_device_layers, pool_places, record_layout, size_classes
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.embedding import EmbeddingReader
from fomoe_io.gpu.launches import CAR_BYTES
from fomoe_io.gpu.products import WORKSPACE_BYTES, DenseProducts
from fomoe_io.gpu.prompts import Handed, PromptRunner
from fomoe_io.gpu.recordings import Addresses, ModelSource
from fomoe_io.gpu.runs import run_batch
from fomoe_io.gpu.shared import STAGING_BYTES, SharedWords, part_sizes
from fomoe_io.gpu.sharing import DRAM, VRAM, Sharing
from fomoe_io.gpu.state_copies import StateCopies
from fomoe_io.gpu.token import TokenRunner
from fomoe_io.models.recorder import KvType
from fomoe_io.open_model import OpenModel
from fomoe_io.ram_budget import RamBudget, RamPart
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io._cpu import Trace

PRODUCT_PROMPT_TOKENS = 32
"""Prompts from so many tokens on use the vendor's library."""


class GpuState(PooledState):
    """A session's memory on the device.

    Attributes
    ----------
    address : int
        Where it begins.
    """

    is_clear = False

    def __init__(self, pool: StatePool, copies: StateCopies, address: int, nbytes: int) -> None:
        self.row_bytes, self.recurrent_bytes = copies.parts.row_bytes, copies.parts.recurrent_bytes
        super().__init__(pool)
        self._copies, self.address = copies, address + self.place * nbytes

    def clear(self) -> None:
        """Before its next token: the device may be at work for another session now."""
        self.is_clear = False

    def save_rows(self, first: int, count: int) -> np.ndarray:
        """KV of tokens."""
        return self._copies.rows_out(self.address, first, count)

    def load_rows(self, first: int, rows: np.ndarray) -> None:
        """Put KV back."""
        self._copies.rows_in(self.address, first, rows)

    def save_recurrent(self) -> np.ndarray:
        """All that is recurrent."""
        return self._copies.recurrent_out(self.address) if self.is_clear else np.zeros(self.recurrent_bytes, np.uint8)

    def load_recurrent(self, saved: np.ndarray) -> None:
        """Put it back."""
        self._copies.recurrent_in(self.address, saved)
        self.is_clear = True


class GpuBackend:
    """See :class:`fomoe_io.backend.Backend`.

    Parameters
    ----------
    opened : OpenModel
    gpu : Gpu
    part : Part
        What this device computes of the model.
    ram : RamPart, optional
        Its part of the host's memory, where several devices share it.
    """

    threads = 1
    """The one that serves the experts."""

    def __init__(self, opened: OpenModel, gpu: Gpu, part: Part = WHOLE, ram: RamPart | None = None) -> None:
        self._opened, self.gpu, self._number = opened, gpu, 0
        self._refuse()
        check_shape(opened.shape)
        block_bytes, layers = opened.reader.block_bytes, opened.model.experts
        layouts = {i: slot_layout(layer, block_bytes) for i, layer in layers.items()}
        records = {i: record_layout(i, layer, layouts[i]) for i, layer in layers.items()}
        self.layouts, self.records = ({i: layouts[i] for i in opened.experts}, {i: records[i] for i in opened.experts})
        forms = {i: Q8 if r.kernels[0] in kernels.QUANTIZED_TYPES else F32 for i, r in records.items()}
        inputs = {i: (form, form) for i, form in forms.items()}
        source = ModelSource(
            opened.shape, opened.model.architecture.build, opened.model.resident, opened.files, records, inputs,
            opened.context_tokens, opened.config.car is not None, opened.config.sessions,
            KvType[opened.config.kv_type.upper()], part, opened.config.guesses_of(opened.shape.used),
        )  # fmt: skip
        budget = ram or RamBudget(opened.store.model_name, opened.shape, opened.config, opened.peak_bytes_before)
        self.sharing = Sharing(gpu, opened, source, self.layouts, budget)
        self.budgets = self.sharing.budgets
        self._states, self._lookahead = StatePool(opened.config.sessions), Lookahead(opened.config.lookahead_mode)
        try:
            self._allocate()
            self._fill()
        except BaseException:
            self.close()
            raise
        self.reset_statistics()

    def _refuse(self) -> None:
        """What only the CPU can do."""
        config = self._opened.config
        if config.activations != "quantized":
            raise UsageError("float activations are computed on the CPU alone", hint="--device cpu")

    @property
    def device_name(self) -> str:
        """For the banner and the statistics."""
        return f"{self.gpu.info.provider}:{self.gpu.info.ordinal} {self.gpu.info.name}"

    joins_tokens = False  # prompts have other kernels

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return self.device_name

    @property
    def kernels(self) -> str:
        """Whose arithmetic."""
        return self.gpu.info.provider

    def memory_lines(self, again: str) -> list[str]:
        """Where the memory goes, for the banner."""
        b, s = self.budgets, self._opened.shape
        least = b.slot_table[list(self.records)].min(0)
        return [
            f"VRAM at most {format_bytes(b.vram_bytes)}, in it weights {format_bytes(b.resident_bytes)}, experts "
            f"{format_bytes(b.vram_pool_bytes)} ({least[VRAM]} of {s.experts} a layer), "
            f"state {format_bytes(b.state_bytes)}, batch {b.batch_tokens}",
            f"memory at most {format_bytes(b.ram_bytes)}{again}, in it experts {format_bytes(b.pool_bytes)} "
            f"({least[DRAM]} a layer){lookahead_text(b)}{kept_text(b)}",
        ]

    # ---- opening ----

    def _allocate(self) -> None:
        """Take the memory and make the programs."""
        b, gpu, sharing, opened = self.budgets, self.gpu, self.sharing, self._opened
        self._shared = SharedWords(gpu, part_sizes(sharing.sketch, opened.shape, b.batch_tokens))
        self.pool = aligned_memory(max(b.pool_bytes, LEAST_BLOCK_BYTES))
        self._pool_registration = gpu.register(np.frombuffer(self.pool.view, np.uint8))
        opened.reader.register_buffers(self.pool.address, max(b.pool_bytes, LEAST_BLOCK_BYTES))
        buffers = [gpu.allocate(max(n, 256)) for n in sharing.sketch.fixed_bytes]
        vram = gpu.allocate(max(b.vram_pool_bytes, 256))
        self.buffers = [*buffers, vram]
        weights, activations, self._states_address = (buffer.pointer for buffer in buffers)
        self.recorded = r = sharing.recordings(
            Addresses(weights, activations, self._states_address, mail=self._shared.device)
        )
        self._products: DenseProducts | None = None
        if sharing.scratch_bytes:
            tiles = r.products_address + WORKSPACE_BYTES
            self._products = DenseProducts(gpu, r.products_address, tiles, sharing.scratch_bytes)
        self._streams = [gpu.new_stream(is_urgent=True) for _ in range(_gpu.STREAMS)]
        events = [[gpu.event() for _ in range(_gpu.LANE_EVENTS)] for _ in range(_gpu.EVENT_RINGS)]
        self._experts = self._device_experts(vram.pointer, events)
        tuning, words = opened.config.tuning, self._shared
        by_stream = tuning.signals_by_stream
        self._experts.signal_by_stream(gpu.info.provider == "cuda" if by_stream is None else by_stream)
        self._experts.read_in_place(tuning.reads_in_place, self._pool_registration.pointer - self.pool.address)
        self._experts.bind(
            changed=words.host + words.offset("changed"), stop=words.host, logits_from=r.token.logits_address,
            logits_to=words.host + words.offset("logits"),
        )  # fmt: skip
        if sharing.guesses:
            self._experts.look_ahead(sharing.guesses, sharing.guesses)
        if opened.config.car is not None:
            self._experts.back_fill(opened.config.car.backfill)
        if tuning.piece_bytes is not None:
            self._experts.set_piece_bytes(tuning.piece_bytes)
        embedding = EmbeddingReader(opened, r.embedding, r.token.embedding_file, r.token.embedding_offset)
        self.tokens = TokenRunner(gpu, self._experts, r, self._shared, embedding, opened.shape, opened.config)
        self._prompts = PromptRunner(
            gpu, self._experts, r.layers, opened.shape, r.inputs, self._shared.part("inputs", 0, r.inputs.bytes),
            r.inputs_address, r.batch, embedding.read, self._products, opened.gate,
            self.check,
        ) if b.batch_tokens > 1 else None  # fmt: skip

    def _device_experts(self, vram_address: int, events: list[list[_hip.Event]]) -> _gpu.DeviceExperts:
        s, b, config, reader = self._opened.shape, self.budgets, self._opened.config, self._opened.reader
        spares = self.sharing.spares
        places = [pool_places(self.records, b.slot_table, spares, tier) for tier in (VRAM, DRAM)]
        bases = (vram_address, self.pool.address)
        pools = tuple({layer: bases[t] + offset for layer, offset in places[t][0].items()} for t in (VRAM, DRAM))
        classes = [
            {"slot_bytes": sizes, "spare": [bases[t] + places[t][1][number] for t in (VRAM, DRAM)], "spares": spares}
            for sizes, number in size_classes(self.records).items()
        ]
        layers = native_device_layers(
            s.layers, self.records, self.layouts, self._opened.experts, (pools[VRAM], pools[DRAM]),
            self._shared.host + self._shared.offset("tables"), (self._shared.host, self._shared.device),
            self.recorded.mail,
        )  # fmt: skip
        return _gpu.DeviceExperts(
            layers, classes, b.slot_table, s.used, policy_number(config.policy), DECAY, reader.address, self._streams,
            events, self._opened.gate, (reader, self.pool, self._shared, self.buffers),
        )  # fmt: skip

    def _fill(self) -> None:
        """Weights, the positions' tables and the rule of cache-aware routing go to the device."""
        r, stream, opened = self.recorded, self.gpu.stream, self._opened
        r.weights.load(opened.reader, self.gpu, opened.config.progress)
        for address, rope in r.memory.ropes.items():
            table = rope.table(opened.context_tokens)
            stream.copy_in(address, table.ctypes.data, table.nbytes)
            stream.synchronize()
        for address, data in r.memory.constants.items():
            words = np.frombuffer(data, np.uint8)
            stream.copy_in(address, words.ctypes.data, words.nbytes)
        if opened.config.car is not None:
            rule = opened.config.car.native()
            stream.copy_in(r.memory.words("car", CAR_BYTES), ctypes.addressof(rule), CAR_BYTES)
        stream.synchronize()

    def record(self, trace: Trace) -> None:
        """Write what runs from now on do into a trace."""
        self._experts.trace(trace, self.budgets.batch_tokens)

    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Bring experts into a layer's free slots."""
        self.check(self._experts.warm(layer, experts, scores))

    # ---- running ----

    def check(self, error: int) -> None:
        """ReadError, or what has ended the run."""
        if error:
            self._opened.raise_failure(error, *self._experts.failure())

    def new_state(self) -> GpuState:
        """Memory for another session."""
        state, staging = self.recorded.token.state, self._shared.part("staging", 0, STAGING_BYTES)
        copies = StateCopies(self.gpu.stream, state.parts, staging)
        return GpuState(self._states, copies, self._states_address, state.bytes)

    def run(self, batch: Batch, logits: np.ndarray) -> None:
        """See :func:`run_batch`."""
        run_batch(self, batch, logits)

    def run_token(self, span: Span, may_substitute: bool, logits: np.ndarray, picks: np.ndarray | None) -> None:
        """One token."""
        self._number = self._number % 0xFFFFFFFF + 1  # 0 is what posts and answers hold before the first run
        self.allow()
        error, found = self.token(self._number, span, may_substitute, self._lookahead.begin())
        self.check(error)
        self._lookahead.end()
        logits[:] = found
        if picks is not None:
            picks[:, 0] = self.tokens.posted_picks()

    def token(self, number: int, span: Span, may_substitute: bool, looks_ahead: bool) -> tuple[int, np.ndarray]:
        """(error, logits), as :meth:`TokenRunner.run` has them."""
        return self.tokens.run(
            number, span.ids, span.position, self._enter(span.state), span.outputs, may_substitute=may_substitute,
            looks_ahead=looks_ahead,
        )  # fmt: skip

    def allow(self) -> None:
        """Before a run: its kernels wait for the host, and for other devices; a run that was given up has ended."""
        self.check(self._experts.allow(self.gpu.stream))

    def pass_on(self) -> None:
        """From any thread: kernels of the run at work wait no more."""
        self._experts.pass_on()

    def end_run(self) -> None:
        """From another thread: nothing waits any more, and the run ends."""
        self._opened.gate.end()
        self._experts.pass_on()

    def go_on(self) -> None:
        """After `end_run`."""
        self._opened.gate.go_on()

    def run_prompt(self, spans: list[Span], logits: np.ndarray, uses_products: bool, picks: np.ndarray | None) -> None:
        """Spans of different sessions at once."""
        for _ in self.prompt(Joined(spans), logits, uses_products, picks, {}):
            raise AssertionError("no other device has rows")

    def prompt(
        self,
        joined: Joined,
        logits: np.ndarray,
        uses_products: bool,
        picks: np.ndarray | None,
        handed: Handed,
        piece: tuple[int, int] = (0, 1),
    ) -> Iterator[int]:
        """This device's layers of a batch, as :meth:`PromptRunner.run`."""
        assert self._prompts is not None
        states = joined.of_tokens([self._enter(span.state) for span in joined.spans])
        return self._prompts.run(
            joined, states, logits, uses_products=uses_products, picks=picks, handed=handed, piece=piece
        )

    def reader_counters(self) -> dict[str, int]:
        """Of the reader of this device's experts."""
        return self._opened.reader.counters

    def _enter(self, state: object) -> int:
        """Where the state's memory begins; what a new session sees of it is zero."""
        assert isinstance(state, GpuState)
        if not state.is_clear:
            for offset, size in self.recorded.token.state.parts.recurrent:
                self.gpu.stream.fill(state.address + offset, 0, size)
            state.is_clear = True
        return state.address

    def uses_products(self, prompt_tokens: int) -> bool:
        """Whether the vendor's library makes the dense products of a prompt of so many tokens.

        That depends on the prompt's length alone, not on how memory or options cut it.
        """
        return self._products is not None and prompt_tokens >= PRODUCT_PROMPT_TOKENS

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
        """Bytes over the link, launches, synchronisations."""
        calls = device.counts()
        not_sent = change.prefetch_wasted_bytes + change.back_filled_bytes
        result["tiers"]["dram"]["bytes"] = max(0, change.up_bytes - (change.nvme_bytes - not_sent))
        result["link"] = {"up_bytes": change.up_bytes, "down_bytes": change.down_bytes}
        result["layers_served"] = {"all": change.layers, "with_misses": change.served_layers}
        stalls = {
            "h2d": change.copy_stall_ns,
            "before_reads": change.before_reads_ns,
            "after_reads": change.after_reads_ns,
            "device": change.post_stall_ns,
        }
        result["stall_seconds"] |= {name: ns / 1e9 for name, ns in stalls.items()}
        if self.sharing.guesses:
            result["prefetch"] |= {"is_on": self._lookahead.is_on, "recall": recall_of(self.guessed)}
        result["host_us_per_miss"] = change.host_ns / 1e3 / change.misses if change.misses else 0.0
        result["device_calls"] = {key: calls[key] - self._calls[key] for key in calls}

    @property
    def guessed(self) -> np.ndarray:
        """int64 [layers, 2]: picks of layers that were guessed in time, and those that were guessed rightly."""
        return self._experts.recall() - self._recall

    def reset_statistics(self) -> None:
        """Counts of calls and of guesses begin anew."""
        self._calls, self._recall = device.counts(), self._experts.recall()

    # ---- closing ----

    def close(self) -> None:
        """Give device and host memory back; what a device that hangs may still use is left to it."""
        if "_experts" in self.__dict__ and not self._is_settled():
            graphs = list(self.tokens.graphs.values()) if "tokens" in self.__dict__ else []
            _hip.abandon(*(self.__dict__.pop(name, None) for name in ("gpu", *_ON_DEVICE)), *graphs)
        for name in ("tokens", "_prompts", "recorded", "_products", "_experts"):
            self.__dict__.pop(name, None)
        self._opened.reader.close()
        registration = self.__dict__.pop("_pool_registration", None)
        if registration is not None:
            with suppress(DeviceError):  # a lost device gives nothing back, and has been reported
                registration.close()
        for buffer in self.__dict__.pop("buffers", []):
            with suppress(DeviceError):
                buffer.free()
        self.__dict__.pop("_streams", None)
        for name in ("_shared", "pool"):
            owner = self.__dict__.pop(name, None)
            if owner is not None:
                owner.close()

    def _is_settled(self) -> bool:
        """Whether the device has done with all that is ours; waits for it while there is progress."""
        self._shared.part("mail", 0, 4).view(np.uint32)[0] = 1  # a kernel that still waits for the host goes on
        for stream in (self.gpu.stream, *self._streams):
            try:
                stream.synchronize()
            except DeviceError:
                with suppress(DeviceError):  # lost: it uses nothing any more
                    if not stream.is_done():
                        return False
        return True


_ON_DEVICE = (
    "_experts", "tokens", "_prompts", "recorded", "_products", "_pool_registration", "buffers", "_streams", "pool",
    "_shared",
)  # fmt: skip
