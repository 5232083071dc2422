"""A model on a GPU: weights and state in its memory, experts where they were last useful."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fomoe_io.gpu.boxes import HostBox, PeerBoxes
from fomoe_io.gpu.budget import check_shape, native_device_layers, pool_places, record_layout, size_classes
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.embedding import EmbeddingReader
from fomoe_io.gpu.on_device import OnDevice
from fomoe_io.gpu.prompts import Handed, PromptRunner
from fomoe_io.gpu.recordings import ModelSource
from fomoe_io.gpu.runs import run_batch
from fomoe_io.gpu.sharing import DRAM, VRAM, Sharing
from fomoe_io.gpu.token import TokenRunner
from fomoe_io.gpu.token_logits import TokenLogits
from fomoe_io.gpu.weights import load_weights
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
    """A session's memory, the same on each device.

    Attributes
    ----------
    addresses : list of int
        Where it begins, by device.
    """

    is_clear = False
    _logits_address = 0

    def __init__(self, pool: StatePool, devices: Sequence[OnDevice], logits: TokenLogits) -> None:
        self._logits = logits
        self._copies = [device.state_copies() for device in devices]
        parts = self._copies[0].parts
        self.row_bytes, self.recurrent_bytes = parts.row_bytes, parts.recurrent_bytes
        super().__init__(pool)
        self.addresses = [device.state_at(self.place) for device in devices]

    def clear(self) -> None:
        """Before its next token: the device may be at work for another session now."""
        self.is_clear = False

    def token_logits(self, vocabulary: int) -> np.ndarray:
        """Memory that the device copies to; where it can't, the host copies as into any other."""
        with suppress(DeviceError):
            row = self._logits.row(self.place)
            self._logits_address = row.ctypes.data
            return row
        return super().token_logits(vocabulary)

    def reached(self, logits: np.ndarray) -> int:
        """The address of logits that the device may copy to by itself: those of `token_logits`.  0: others."""
        return self._logits_address if logits.size and logits.ctypes.data == self._logits_address else 0

    def save_rows(self, first: int, count: int) -> np.ndarray:
        """KV of tokens."""
        return self._copies[0].rows_out(self.addresses[0], first, count)

    def load_rows(self, first: int, rows: np.ndarray) -> None:
        """Put KV back."""
        for copies, address in zip(self._copies, self.addresses, strict=True):
            copies.rows_in(address, first, rows)

    def save_recurrent(self) -> np.ndarray:
        """All that is recurrent."""
        if not self.is_clear:
            return np.zeros(self.recurrent_bytes, np.uint8)
        return self._copies[0].recurrent_out(self.addresses[0])

    def load_recurrent(self, saved: np.ndarray) -> None:
        """Put it back."""
        for copies, address in zip(self._copies, self.addresses, strict=True):
            copies.recurrent_in(address, saved)
        self.is_clear = True


class GpuBackend:
    """See :class:`fomoe_io.backend.Backend`.

    Parameters
    ----------
    opened : OpenModel
    gpus : sequence of Gpu
        Several compute every layer together: each has an equal share of the rows of every product.
    part : Part
        The layers that are computed here.
    ram : RamPart, optional
        Their part of the host's memory, where other layers are computed elsewhere.

    Attributes
    ----------
    gpu : Gpu
        The first, whose picks are looked at.
    devices : list of OnDevice
    """

    threads = 1
    """The one that serves the experts."""

    def __init__(self, opened: OpenModel, gpus: Sequence[Gpu], part: Part = WHOLE, ram: RamPart | None = None) -> None:
        self._opened, self.gpu, self._gpus, self._number = opened, gpus[0], gpus, 0
        self._refuse()
        check_shape(opened.shape)
        block_bytes, layers = opened.reader.block_bytes, opened.model.experts
        layouts = {i: slot_layout(layer, block_bytes) for i, layer in layers.items()}
        records = {i: record_layout(i, layer, layouts[i], len(gpus)) for i, layer in layers.items()}
        self.layouts, self.records = ({i: layouts[i] for i in opened.experts}, {i: records[i] for i in opened.experts})
        forms = {i: Q8 if r.kernels[0] in kernels.QUANTIZED_TYPES else F32 for i, r in records.items()}
        inputs = {i: (form, form) for i, form in forms.items()}
        source = ModelSource(
            opened.shape, opened.model.architecture.build, opened.model.resident, opened.files, records, inputs,
            opened.context_tokens, opened.config.car is not None, opened.config.sessions,
            KvType[opened.config.kv_type.upper()], part, opened.config.guesses_of(opened.shape.used),
        )  # fmt: skip
        budget = ram or RamBudget(opened.store.model_name, opened.shape, opened.config, opened.peak_bytes_before)
        self.sharing = Sharing(gpus, opened, source, self.layouts, budget)
        self.budgets = self.sharing.budgets
        self._logits = TokenLogits(self.gpu, opened.shape.vocabulary)
        self._states = StatePool(opened.config.sessions)
        self._lookahead = Lookahead(opened.config.lookahead_mode if self.sharing.guesses else "off")
        self.devices: list[OnDevice] = []
        try:
            self._allocate()
            targets = [(device_.recorded.weights, device_.gpu) for device_ in self.devices]
            load_weights(targets, opened.reader, opened.config.progress)
            for device_ in self.devices:
                device_.fill()
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
        one = self.gpu.info
        return f"{one.provider}:{','.join(str(gpu.info.ordinal) for gpu in self._gpus)} {one.name}"

    joins_tokens = False  # prompts have other kernels

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return self.device_name + (" (tensor)" if len(self._gpus) > 1 else "")

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
        b, sharing, opened = self.budgets, self.sharing, self._opened
        self.pool = aligned_memory(max(b.pool_bytes, LEAST_BLOCK_BYTES))
        self._pool_registration = self.gpu.register(np.frombuffer(self.pool.view, np.uint8))
        opened.reader.register_buffers(self.pool.address, max(b.pool_bytes, LEAST_BLOCK_BYTES))
        if len(self._gpus) > 1:
            boxes = PeerBoxes if opened.config.peer_memory else HostBox
            self._boxes = boxes(self._gpus, sharing.sketch.exchange_bytes)
        for i, gpu in enumerate(self._gpus):
            places = self._boxes.places(i) if len(self._gpus) > 1 else (0, 0)
            self.devices.append(OnDevice(gpu, opened, sharing, i, places))
        self.recorded = r = self.devices[0].recorded
        self._experts = self._device_experts()
        self._set_up(self._experts)
        embedding = EmbeddingReader(opened, r.embedding, r.token.embedding_file, r.token.embedding_offset)
        self.tokens = TokenRunner(self.devices, self._experts, embedding, opened.shape, opened.config)
        self._prompts = PromptRunner(
            self.devices, self._experts, opened.shape, embedding.read, opened.gate, self.check,
        ) if b.batch_tokens > 1 else None  # fmt: skip

    def _set_up(self, experts: _gpu.DeviceExperts) -> None:
        """What is decided once."""
        tuning, config = self._opened.config.tuning, self._opened.config
        by_stream = tuning.signals_by_stream
        experts.signal_by_stream(self.gpu.info.provider == "cuda" if by_stream is None else by_stream)
        experts.read_in_place(tuning.reads_in_place, self._pool_registration.pointer - self.pool.address)
        logits = self.devices[0].shared
        for i, device_ in enumerate(self.devices):
            words, token = device_.shared, device_.recorded.token
            experts.bind(
                i, changed=words.host + words.offset("changed"), stop=words.host,
                logits_from=token.logits_address + 4 * token.own_logits.start,
                logits_to=logits.host + logits.offset("logits") + 4 * token.own_logits.start,
                logits_bytes=4 * (token.own_logits.stop - token.own_logits.start),
            )  # fmt: skip
        if self.sharing.guesses:
            sharing = self.sharing
            experts.look_ahead(sharing.guesses, sharing.staged, sharing.sent, sharing.is_in_turn)
        if config.car is not None:
            experts.back_fill(config.car.backfill)
        if tuning.piece_bytes is not None:
            experts.set_piece_bytes(tuning.piece_bytes)

    def _device_experts(self) -> _gpu.DeviceExperts:
        s, b, config, reader = self._opened.shape, self.budgets, self._opened.config, self._opened.reader
        spares, first = self.sharing.spares, self.devices[0]
        places = [pool_places(self.records, b.slot_table, spares, tier) for tier in (VRAM, DRAM)]
        bases = (first.vram, self.pool.address)
        pools = tuple({layer: bases[t] + offset for layer, offset in places[t][0].items()} for t in (VRAM, DRAM))
        classes = [
            {"slot_bytes": sizes, "spare": [bases[t] + places[t][1][number] for t in (VRAM, DRAM)], "spares": spares}
            for sizes, number in size_classes(self.records).items()
        ]
        words = [(d.shared.host + d.shared.offset("tables"), d.shared.host, d.shared.device) for d in self.devices]
        layers = native_device_layers(
            s.layers, self.records, self.layouts, self._opened.experts, (pools[VRAM], pools[DRAM]), words,
            self.recorded.mail,
        )  # fmt: skip
        devices = [(d.vram - first.vram, d.copies, d.events()) for d in self.devices]
        return _gpu.DeviceExperts(
            layers, classes, b.slot_table, s.used, policy_number(config.policy), DECAY, reader.address, devices,
            self._opened.gate, (reader, self.pool, self.devices),
        )  # fmt: skip

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
        return GpuState(self._states, self.devices, self._logits)

    def run(self, batch: Batch, logits: np.ndarray) -> None:
        """See :func:`run_batch`."""
        run_batch(self, batch, logits)

    def run_token(self, span: Span, may_substitute: bool, logits: np.ndarray, picks: np.ndarray | None) -> None:
        """One token."""
        self._number = self._number % 0xFFFFFFFF + 1  # 0 is what posts and answers hold before the first run
        self.allow()
        assert isinstance(span.state, GpuState)
        address = span.state.reached(logits)
        error, found = self.token(self._number, span, may_substitute, self._lookahead.begin(), address)
        self.check(error)
        self._lookahead.end()
        if not address:
            logits[:] = found
        if picks is not None:
            picks[:, 0] = self.tokens.posted_picks()

    def token(
        self, number: int, span: Span, may_substitute: bool, looks_ahead: bool, logits_address: int = 0
    ) -> tuple[int, np.ndarray]:
        """(error, logits), as :meth:`TokenRunner.run` has them."""
        return self.tokens.run(
            number, span.ids, span.position, self._enter(span.state), span.outputs, may_substitute=may_substitute,
            looks_ahead=looks_ahead and self.sharing.guesses > 0, logits_address=logits_address,
        )  # fmt: skip

    def allow(self) -> None:
        """Before a run: its kernels wait for the host, and for other devices; a run that was given up has ended."""
        self.check(self._experts.allow(self.tokens.streams))

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
        addresses = [self._enter(span.state) for span in joined.spans]
        states = [joined.of_tokens(places) for places in zip(*addresses, strict=True)]
        return self._prompts.run(
            joined, states, logits, uses_products=uses_products, picks=picks, handed=handed, piece=piece
        )

    def reader_counters(self) -> dict[str, int]:
        """Of the reader of this device's experts."""
        return self._opened.reader.counters

    def _enter(self, state: object) -> list[int]:
        """Where the state's memory begins on each device; what a new session sees of it is zero."""
        assert isinstance(state, GpuState)
        if not state.is_clear:
            for gpu, address in zip(self._gpus, state.addresses, strict=True):
                for offset, size in self.recorded.token.state.parts.recurrent:
                    gpu.stream.fill(address + offset, 0, size)
            state.is_clear = True
        return state.addresses

    def uses_products(self, prompt_tokens: int) -> bool:
        """Whether the vendor's library makes the dense products of a prompt of so many tokens.

        That depends on the prompt's length alone, not on how memory or options cut it.
        """
        return self.devices[0].products is not None and prompt_tokens >= PRODUCT_PROMPT_TOKENS

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
        in_vain = change.sent_ahead_wasted_bytes
        result["tiers"]["dram"]["bytes"] = max(0, change.up_bytes - in_vain - (change.nvme_bytes - not_sent))
        result["link"] = {"up_bytes": change.up_bytes, "down_bytes": change.down_bytes}
        result["layers_served"] = {"all": change.layers, "with_misses": change.served_layers}
        stalls = {
            "h2d": change.copy_stall_ns,
            "before_reads": change.before_reads_ns,
            "after_reads": change.after_reads_ns,
            "device": change.post_stall_ns,
        }
        result["stall_seconds"] |= {name: ns / 1e9 for name, ns in stalls.items()}
        result["prefetch"] |= {
            "sent": change.sent_ahead, "sent_useful": change.sent_ahead_useful, "sent_wasted_bytes": in_vain,
        }  # fmt: skip
        if self.sharing.guesses:
            result["prefetch"] |= {"is_on": self._lookahead.is_on, "recall": recall_of(self.guessed)}
        result["host_us_per_miss"] = change.host_ns / 1e3 / change.misses if change.misses else 0.0
        result["device_calls"] = {key: calls[key] - self._calls[key] for key in calls}
        if len(self._gpus) > 1:
            result["split"] = {"mode": "tensor", "devices": len(self._gpus)}

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
        devices = self.__dict__.get("devices", [])
        if "_experts" in self.__dict__ and not all(device_.is_settled() for device_ in devices):
            graphs = self.tokens.all_graphs() if "tokens" in self.__dict__ else []
            _hip.abandon(*(self.__dict__.pop(name, None) for name in ("gpu", "_gpus", *_ON_DEVICE)), *graphs)
            devices = []
        for name in ("tokens", "_prompts", "recorded", "_experts", "devices"):
            self.__dict__.pop(name, None)
        self._opened.reader.close()
        logits = self.__dict__.pop("_logits", None)
        if logits is not None:
            logits.close()
        registration = self.__dict__.pop("_pool_registration", None)
        if registration is not None:
            with suppress(DeviceError):  # a lost device gives nothing back, and has been reported
                registration.close()
        for device_ in devices:
            device_.close()
        for name in ("pool", "_boxes"):
            owner = self.__dict__.pop(name, None)
            if owner is not None:
                owner.close()


_ON_DEVICE = (
    "_experts", "tokens", "_prompts", "recorded", "_pool_registration", "_logits", "devices", "pool", "_boxes",
)  # fmt: skip
