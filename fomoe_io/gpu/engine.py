"""The engine on a GPU: weights and state in its memory, experts where they were last useful."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from fomoe_io import _cpu, _gpu, _hip
from fomoe_io.engine import RESERVE_BYTES, Engine
from fomoe_io.errors import BudgetError, DeviceError, UsageError
from fomoe_io.experts.residency import DECAY, policy_number
from fomoe_io.experts.slots import share_slots, slot_layout
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.arena import F32, Q8
from fomoe_io.gpu.budget import (
    check_shape,
    native_device_layers,
    pool_places,
    record_layout,
    size_classes,
)
from fomoe_io.gpu.device import Gpu, Step
from fomoe_io.gpu.products import SCRATCH_BYTES, TILE_ROWS, WORKSPACE_BYTES, DenseProducts, open_blas
from fomoe_io.gpu.prompts import PromptRunner
from fomoe_io.gpu.recorder import CAR_BYTES
from fomoe_io.gpu.recordings import Addresses, ModelSource, Recordings
from fomoe_io.gpu.session import DeviceSession
from fomoe_io.gpu.weights import kernel_of
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.system.direct_io import round_down
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io._hip import Graph, Launch
    from fomoe_io.config import EngineConfig
    from fomoe_io.storage.store import Store

FREE_SHARE = 16
"""One part in so many of the device's memory stays free (at most MOST_FREE_BYTES): the driver takes some later."""

MOST_FREE_BYTES = 256 << 20

FREE_UNIT_BYTES = 64 << 20
"""What is free is rounded down to this: it varies from run to run, and the slots should not."""

EXTRA_SPARES = 4
"""Spare buffers beyond a token's picks: victims still on their way down from the layer before."""

PRODUCT_PROMPT_TOKENS = 32
"""Prompts from so many tokens on use the vendor's library."""

VRAM, DRAM = 0, 1


@dataclass(frozen=True, slots=True)
class DeviceBudgets:
    """What the memory was shared into; `slots` is [layers, 2] in VRAM and DRAM."""

    ram_bytes: int
    vram_bytes: int
    resident_bytes: int
    state_bytes: int
    workspace_bytes: int
    vram_pool_bytes: int
    pool_bytes: int
    batch_tokens: int
    slots: np.ndarray
    spares: tuple[int, int]


class DeviceEngine(Engine):
    """A model on a GPU; opened by :meth:`Engine.open` when the configuration asks for one."""

    budgets: DeviceBudgets  # type: ignore[assignment]

    two_branches: bool | None = None
    """Whether the shared expert runs beside the routed ones; None: on CUDA.  HIP submits a graph of one branch in one
    piece, and one of two command by command, through a queue that it may share with other streams."""

    chained_launches = True
    """Whether a token's kernels may be started before the ones they follow have finished, where the device can."""

    reads_in_place = False
    """Whether a token's kernels read experts of DRAM where they lie, instead of waiting until they have been copied."""

    signals_by_stream: bool | None = None
    """Whether a copy's stream tells the waiting kernel that it has come, instead of the host; None: on CUDA.  HIP does
    it by a kernel of its own."""

    may_use_library = True
    """Whether the vendor's library makes the dense products of prompts, where it is found."""

    def __init__(self, store: Store, config: EngineConfig, gpu: Gpu) -> None:
        self.gpu = gpu
        self._graphs: dict[int, Graph] = {}
        self._run_number = 0
        self.live_session: DeviceSession | None = None
        self._products: DenseProducts | None = None
        super().__init__(store, config)

    @property
    def device_name(self) -> str:
        """For the banner and the statistics."""
        return f"{self.gpu.info.provider}:{self.gpu.info.ordinal} {self.gpu.info.name}"

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return self.device_name

    def memory_lines(self) -> list[str]:
        """Where the memory goes, for the banner."""
        b, s = self.budgets, self.shape
        least = b.slots[list(self._records)].min(0)
        return [
            f"VRAM {format_bytes(b.vram_bytes)}: weights {format_bytes(b.resident_bytes)}, experts "
            f"{format_bytes(b.vram_pool_bytes)} ({least[VRAM]} of {s.experts} a layer), "
            f"state {format_bytes(b.state_bytes)}, batch {b.batch_tokens}",
            f"{self._ram_text()}: experts {format_bytes(b.pool_bytes)} ({least[DRAM]} a layer)",
        ]

    def _open(self, build: Callable[..., None]) -> None:
        s = self.shape
        if self.config.activations != "quantized":
            raise UsageError("float activations are computed on the CPU alone", hint="--device cpu")
        unsupported = {
            "lookahead": self.config.lookahead > 0,
            "back-fill": self.config.car is not None and self.config.car.backfill > 0,
        }
        for name, is_wanted in unsupported.items():
            if is_wanted:
                raise UsageError(f"{name} is made on the CPU alone", hint="--device cpu")
        check_shape(s)
        self._layers = self.model.experts
        self._layouts = {i: slot_layout(layer, self.reader.block_bytes) for i, layer in self._layers.items()}
        self._records = {i: record_layout(i, layer, self._layouts[i]) for i, layer in self._layers.items()}
        forms = {i: Q8 if r.kernels[0] in kernels.QUANTIZED_TYPES else F32 for i, r in self._records.items()}
        inputs = {i: (form, form) for i, form in forms.items()}
        self._source = ModelSource(
            s, build, self.model.resident, self._files, self._records, inputs, self.context_tokens,
            substitutes=self.config.car is not None,
        )  # fmt: skip
        self._batch_tokens = min(self.config.batch_tokens, self.context_tokens)
        self._has_products = self._find_products()
        self._scratch_bytes = self._product_scratch_bytes()
        self.budgets = self._share_memory()
        self._allocate()
        self._recorded.weights.load(self.reader, self.gpu)
        rope = self.shape.rope.table(self.context_tokens)
        self.gpu.stream.copy_in(self._recorded.rope_address, rope.ctypes.data, rope.nbytes)
        if self.config.car is not None:
            rule = self.config.car.native()
            self.gpu.stream.copy_in(self._recorded.memory.words("car", CAR_BYTES), ctypes.addressof(rule), CAR_BYTES)
        self.gpu.stream.synchronize()
        self._open_trace(self.budgets.slots, self._layouts)
        self._warm()

    def _follow(self, trace: _cpu.Trace) -> None:
        self._experts.trace(trace, self.budgets.batch_tokens)  # type: ignore[attr-defined]

    # ---- memory ----

    def _recordings(self, addresses: Addresses, context_tokens: int | None = None) -> Recordings:
        """The model at these addresses, for a token and for batches; `context_tokens`: of another length."""
        product_bytes = WORKSPACE_BYTES + self._scratch_bytes if self._has_products else 0
        source = self._source if context_tokens is None else replace(self._source, context_tokens=context_tokens)
        return Recordings(source, self._batch_tokens, product_bytes, addresses)

    def _find_products(self) -> bool:
        """Whether the vendor's library of matrix products can be used."""
        if not self.may_use_library or self._batch_tokens == 1:
            return False
        try:
            open_blas(self.gpu.info.provider)
        except DeviceError:
            return False
        return True

    def _product_scratch_bytes(self) -> int:
        """Room for the expanded rows of the largest matrix, or for some of them."""
        names = [n for n, t in self._source.resident.items() if kernel_of(int(t.type)) in kernels.QUANTIZED_TYPES]
        largest = max((2 * int(np.prod(self._source.resident[n].shape)) for n in names), default=0)
        return min(SCRATCH_BYTES, up_page(largest + 2 * TILE_ROWS * self.shape.columns))

    def _vram_slots(self, room: int, spares: int, least: int) -> dict[int, int] | None:
        layouts = {i: _Sized(r.slot_bytes[VRAM]) for i, r in self._records.items()}
        spare_bytes = spares * sum(sizes[VRAM] for sizes in size_classes(self._records))
        most = self._most_slots(self.config.tiers.vram if self.config.tiers else 1.0, least)
        return share_slots(layouts, most, room - spare_bytes, least)  # type: ignore[arg-type]

    def _most_slots(self, share: float, least: int) -> int:
        return max(least, round(share * (self._wanted_slots() or self.shape.experts)))

    def _share_memory(self) -> DeviceBudgets:  # type: ignore[override]
        s, config = self.shape, self.config
        free = self.gpu.free_bytes()
        limit = config.vram_bytes
        if limit is None:
            limit = free - min(MOST_FREE_BYTES, self.gpu.info.memory_bytes // FREE_SHARE)
            limit = round_down(limit, FREE_UNIT_BYTES) or limit
        elif limit > free:
            raise BudgetError(
                f"a device budget of {format_bytes(limit)} is more than the {format_bytes(free)} that are free on "
                f"{self.gpu.info.name}",
                hint=f"--vram {free >> 20}M, or end what else uses the device",
            )
        spares = s.used + EXTRA_SPARES
        sketch = self._recordings(Addresses())
        fixed = sketch.fixed_bytes
        slots = self._vram_slots(limit - sum(fixed), spares, s.used)
        if slots is None:
            smallest = sum(fixed) + s.used * sum(r.slot_bytes[VRAM] for r in self._records.values())
            smallest += spares * sum(sizes[VRAM] for sizes in size_classes(self._records))
            raise BudgetError(
                f"a device budget of {format_bytes(limit)} is too small for {self.model_name} with batches of "
                f"{self._batch_tokens} tokens and a context of {self.context_tokens}",
                hint=self._what_fits(sum(fixed), smallest, limit, free),
            )
        table = np.zeros((s.layers, 2), np.int32)
        for layer, count in slots.items():
            table[layer, VRAM] = count
        ram_limit, host_bytes = self._share_host_memory(table, sketch, 2 * s.used)
        pools = [pool_places(self._records, table, (spares, 2 * s.used), tier)[2] for tier in (VRAM, DRAM)]
        return DeviceBudgets(
            ram_bytes=ram_limit, vram_bytes=limit, resident_bytes=fixed[0], state_bytes=fixed[2],
            workspace_bytes=fixed[1] + host_bytes, vram_pool_bytes=pools[0], pool_bytes=pools[1],
            batch_tokens=self._batch_tokens, slots=table, spares=(spares, 2 * s.used),
        )  # fmt: skip

    def _what_fits(self, fixed: int, smallest: int, limit: int, free: int) -> str:
        """What to ask for instead: more memory where there is some, else the longest context that fits."""
        if smallest <= free - (1 << 20):
            return f"--vram {-(-smallest // (1 << 20)) + 1}M"
        context = self.context_tokens
        while context > 256:
            context = context * 7 // 8 // 256 * 256
            if context and smallest - fixed + sum(self._recordings(Addresses(), context).fixed_bytes) <= limit:
                return f"-c {context}"
        return "-b 32 -c 1024, or --device cpu"

    def _share_host_memory(self, table: np.ndarray, sketch: Recordings, spares: int) -> tuple[int, int]:
        """Fill in the DRAM slots; returns the budget and what the words shared with the device take."""
        s, config = self.shape, self.config
        shared = self._shared_layout(sketch)["end"]
        process = self._process_bytes()
        base = process + shared + RESERVE_BYTES
        base += spares * sum(sizes[DRAM] for sizes in size_classes(self._records))
        limit = self._ram_limit(process, base)
        wanted = self._wanted_slots() or s.experts
        missing = max(0, wanted - int(table[list(self._records), VRAM].min()))
        most = missing if config.tiers is None else min(missing, self._most_slots(config.tiers.dram, 0))
        slots = share_slots(self._layouts, most, limit - base, 0) if most else {}
        for layer, count in (slots or {}).items():
            table[layer, DRAM] = min(count, max(0, wanted - table[layer, VRAM]))
        if config.slots is not None and (table[list(self._records)].sum(1) < wanted).any():
            rest = sum((wanted - table[i, VRAM]) * self._layouts[i].slot_bytes for i in self._records)
            raise self._too_small(limit, base + int(rest))
        return limit, shared

    def _allocate(self) -> None:
        """Take the memory and make the programs."""
        b, gpu = self.budgets, self.gpu
        sketch = self._recordings(Addresses())
        self._shared_offsets = self._shared_layout(sketch)
        self._shared = aligned_memory(self._shared_offsets["end"])
        self._shared_words = np.frombuffer(self._shared.view, np.uint8)
        self._shared_words[:] = 0
        self._registrations = [gpu.register(self._shared_words)]
        self._pool = aligned_memory(max(b.pool_bytes, 4096))
        self._registrations.append(gpu.register(np.frombuffer(self._pool.view, np.uint8)))
        self.reader.register_buffers(self._pool.address, max(b.pool_bytes, 4096))
        buffers = [gpu.allocate(max(n, 256)) for n in sketch.fixed_bytes]
        vram = gpu.allocate(max(b.vram_pool_bytes, 256))
        self._buffers = [*buffers, vram]
        weights, activations, state = (buffer.pointer for buffer in buffers)
        self._recorded = self._recordings(Addresses(weights, activations, state, mail=self._registrations[0].pointer))
        if self._has_products:
            workspace = self._recorded.products_address
            self._products = DenseProducts(gpu, workspace, workspace + WORKSPACE_BYTES, self._scratch_bytes)
        self._streams = [gpu.new_stream(is_urgent=True) for _ in range(_gpu.STREAMS)]
        events = [[gpu.event() for _ in range(_gpu.LANE_EVENTS)] for _ in range(_gpu.EVENT_RINGS)]
        self._experts = self._device_experts(vram.pointer, events)  # type: ignore[assignment]
        by_stream = gpu.info.provider == "cuda" if self.signals_by_stream is None else self.signals_by_stream
        self._experts.signal_by_stream(by_stream)  # type: ignore[attr-defined]
        self._experts.read_in_place(  # type: ignore[attr-defined]
            self.reads_in_place, self._registrations[1].pointer - self._pool.address
        )
        shared, offsets = self._shared.address, self._shared_offsets
        self._experts.bind(  # type: ignore[attr-defined]
            changed=shared + offsets["changed"], stop=shared, logits_from=self._recorded.token.logits_address,
            logits_to=shared + offsets["logits"],
        )  # fmt: skip
        self._prompts = self._prompt_runner() if b.batch_tokens > 1 else None

    def _shared_layout(self, sketch: Recordings) -> dict[str, int]:
        """Offsets in the memory that host and device share; each part begins a page."""
        s = self.shape
        sizes = {
            "mail": sketch.mail.bytes,
            "tables": 8 * s.layers * s.experts,
            "changed": 4 * s.layers,
            "header": sketch.header.bytes,
            "logits": 4 * s.vocabulary,
            "inputs": sketch.inputs.bytes if self._batch_tokens > 1 else 0,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += up_page(size)
        return offsets | {"end": end}

    def _prompt_runner(self) -> PromptRunner:
        r = self._recorded
        return PromptRunner(
            self.gpu, self._experts, r.layers, self.shape, r.inputs,  # type: ignore[arg-type]
            self._part("inputs", 0, r.inputs.bytes), r.inputs_address, r.batch, self._embed, self._products,
            self._check,
        )  # fmt: skip

    def _device_experts(self, vram_address: int, events: list[list[Any]]) -> _gpu.DeviceExperts:
        s, b = self.shape, self.budgets
        places = [pool_places(self._records, b.slots, b.spares, tier) for tier in (VRAM, DRAM)]
        bases = (vram_address, self._pool.address)
        pools = tuple({layer: bases[t] + offset for layer, offset in places[t][0].items()} for t in (VRAM, DRAM))
        classes = [
            {
                "slot_bytes": sizes,
                "spare": [bases[t] + places[t][1][number] for t in (VRAM, DRAM)],
                "spares": b.spares,
            }
            for sizes, number in size_classes(self._records).items()
        ]
        layers = native_device_layers(
            s.layers, self._records, self._layouts, self._layers, pools,  # type: ignore[arg-type]
            self._shared.address + self._shared_offsets["tables"],
            (self._shared.address, self._registrations[0].pointer), self._recorded.mail,
        )  # fmt: skip
        return _gpu.DeviceExperts(
            layers, classes, b.slots, s.used, policy_number(self.config.policy), DECAY, self.reader.address,
            self._streams, events, (self.reader, self._pool, self._shared, self._buffers),
        )  # fmt: skip

    def _slots_of(self, layer: int) -> int:
        return int(self.budgets.slots[layer].sum())

    def _warm_layer(self, layer: int, order: np.ndarray, scores: np.ndarray) -> int:
        return self._experts.warm(layer, order, scores)

    # ---- running ----

    def _graph(self, outputs: int) -> Graph:
        if outputs not in self._graphs:
            steps = [Step(self._begin_run())]
            steps += [
                Step(
                    self.gpu.prepare(s.kernel, s.grid, *s.arguments),
                    s.beside and self.has_two_branches,
                    s.forks,
                    s.joins,
                )
                for s in self._recorded.token.launches(outputs)
            ]
            self._graphs[outputs] = self.gpu.capture_steps(steps, is_chained=self.chained_launches)
        return self._graphs[outputs]

    @property
    def has_two_branches(self) -> bool:
        """What `two_branches` comes to on this device."""
        return self.gpu.info.provider == "cuda" if self.two_branches is None else self.two_branches

    def _begin_run(self) -> Launch:
        """What fetches a token's header and the tables that have changed, before all else."""
        r, s, offsets = self._recorded, self.shape, self._shared_offsets
        mapped = self._registrations[0].pointer
        header, changed, tables = (mapped + offsets[name] for name in ("header", "changed", "tables"))
        return self.gpu.prepare(
            "begin_run", kernels.begin_run_grid(r.header.bytes, s.layers), header, r.header_address, changed, tables,
            r.tables_address, r.header.bytes // 16, s.experts,
        )  # fmt: skip

    def _part(self, name: str, offset: int, size: int) -> np.ndarray:
        start = self._shared_offsets[name] + offset
        return self._shared_words[start : start + size]

    def _embed(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Read the tokens' embeddings as the device takes them: uint8 [tokens, row_bytes]."""
        recorder = self._recorded.token
        table, file = self._recorded.embedding, recorder.embedding_file
        for row, token in zip(rows, ids.tolist(), strict=True):
            place = recorder.embedding_offset + token * table.file_row_bytes
            try:
                raw = os.pread(file, table.file_row_bytes, place)
            except OSError as error:
                raise self._embedding_error(error.errno or errno.EIO) from error
            if len(raw) != table.file_row_bytes:
                raise self._embedding_error(errno.ENODATA)
            values = np.frombuffer(raw, np.uint8)
            if table.row_bytes != table.file_row_bytes:
                values = gguf.quants.dequantize(values, gguf.GGMLQuantizationType(table.type)).view(np.uint8)
            row[:] = values.reshape(-1)

    def _fill_header(self, token: int, position: int, substitute: bool) -> None:
        h = self._recorded.header
        self._run_number = self._run_number % 0xFFFFFFFF + 1  # 0 is what posts and answers hold before the first run
        car = self.config.car
        may_swap = substitute and car is not None and position >= car.warmup
        self._part("header", 0, 8).view(np.uint32)[:] = self._run_number, may_swap
        self._part("header", h.positions, 4).view(np.int32)[0] = position
        row_bytes = self._recorded.embedding.row_bytes
        self._embed(np.array([token]), self._part("header", h.embedding, row_bytes).reshape(1, -1))

    def run_token(self, token: int, position: int, outputs: int, *, substitute: bool = False) -> np.ndarray:
        """Replay a token's graph.

        Parameters
        ----------
        token : int
        position : int
            In the session.
        outputs : int
            1: with logits; 0: without.
        substitute : bool
            Cache-aware routing may act.

        Returns
        -------
        numpy.ndarray
            float32 [outputs, vocabulary], valid until the next run.
        """
        s, graph = self.shape, self._graph(outputs)
        self._fill_header(token, position, substitute)
        logits_bytes = 4 * s.vocabulary * outputs
        self._check(self._experts.run(self.gpu.stream, graph, self._run_number, logits_bytes))  # type: ignore[attr-defined]
        return self._part("logits", 0, logits_bytes).view(np.float32).reshape(outputs, s.vocabulary)

    def posted_picks(self) -> np.ndarray:
        """int32 [layers, used]: the router's picks in the last token's run."""
        mail, s = self._recorded.mail, self.shape
        rows = [self._part("mail", mail.post(i) + 8, 8 * s.used).view(np.uint16)[::4] for i in range(s.layers)]
        return np.stack(rows).astype(np.int32)

    def run_batch(
        self, ids: np.ndarray, position: int, logits: np.ndarray, *, prompt_tokens: int, picks: np.ndarray | None
    ) -> None:
        """Read a batch of a prompt of so many tokens; see :meth:`PromptRunner.run` for the others.

        Which arithmetic is used depends on the prompt's length alone, not on how memory or options cut it.
        """
        assert self._prompts is not None
        self._prompts.run(ids, position, logits, uses_products=self.uses_products(prompt_tokens), picks=picks)

    def uses_products(self, prompt_tokens: int) -> bool:
        """Whether the vendor's library makes the dense products of a prompt of so many tokens."""
        return self._products is not None and prompt_tokens >= PRODUCT_PROMPT_TOKENS

    def session(self) -> DeviceSession:
        """A new, empty timeline; the device holds one at a time.

        Raises
        ------
        UsageError
            Another one is open.
        """
        self.gate.check()
        if self.live_session is not None:
            raise UsageError("a GPU engine holds one session at a time; close() the other first")
        self.live_session = DeviceSession(self)
        return self.live_session

    @property
    def batch_tokens(self) -> int:
        """Tokens of a full batch."""
        return self.budgets.batch_tokens

    def clear_state(self) -> None:
        """Zero the session's recurrent state."""
        for address, size in self._recorded.token.state.zeroed:
            self.gpu.stream.fill(address, 0, size)

    def statistics(self) -> dict[str, Any]:
        """As :meth:`Engine.statistics`, with what a device adds: bytes over the link, launches, synchronisations."""
        result = super().statistics()
        now = self._counters()
        c = {key: now[key] - self._base[key] for key in now}
        calls = device.counts()
        result["device"] = self.device_name
        result["tiers"]["dram"]["bytes"] = c["up_bytes"] - c["nvme_bytes"] if c["up_bytes"] > c["nvme_bytes"] else 0
        result["link"] = {"up_bytes": c["up_bytes"], "down_bytes": c["down_bytes"]}
        result["layers_served"] = {"all": c["layers"], "with_misses": c["served_layers"]}
        names = {"h2d": "copy_stall_ns", "before_reads": "before_reads_ns", "after_reads": "after_reads_ns",
                 "device": "post_stall_ns"}  # fmt: skip
        result["stall_seconds"] |= {name: c[key] / 1e9 for name, key in names.items()}
        result["host_us_per_miss"] = c["host_ns"] / 1e3 / c["misses"] if c["misses"] else 0.0
        result["device_calls"] = {key: calls[key] - self._calls[key] for key in calls}
        return result

    def reset_statistics(self) -> None:
        """Start the counters of :meth:`statistics` afresh."""
        self._calls = device.counts()
        super().reset_statistics()

    def _release(self) -> None:
        """Give device and host memory back; what a device that hangs may still use is left to it."""
        if "_experts" in self.__dict__ and not self._is_settled():
            kept = [self.__dict__.pop(name, None) for name in ("gpu", *_ON_DEVICE, "_pool", "_shared")]
            _hip.abandon(*kept, *self._graphs.values())
        self._graphs.clear()
        for name in ("_recorded", "_prompts", "_products"):
            self.__dict__.pop(name, None)
        super()._release()
        for registration in self.__dict__.pop("_registrations", []):
            with suppress(DeviceError):  # a lost device gives nothing back, and has been reported
                registration.close()
        self.__dict__.pop("_shared_words", None)
        for buffer in self.__dict__.pop("_buffers", []):
            with suppress(DeviceError):
                buffer.free()
        self.__dict__.pop("_streams", None)
        shared = self.__dict__.pop("_shared", None)
        if shared is not None:
            shared.close()

    def _is_settled(self) -> bool:
        """Whether the device has done with all that is ours; waits for it while there is progress."""
        self._part("mail", 0, 4).view(np.uint32)[0] = 1  # a kernel that still waits for the host goes on
        for stream in (self.gpu.stream, *self._streams):
            try:
                stream.synchronize()
            except DeviceError:
                with suppress(DeviceError):  # lost: it uses nothing any more
                    if not stream.is_done():
                        return False
        return True


_ON_DEVICE = (
    "_experts", "_recorded", "_prompts", "_products", "_registrations", "_shared_words", "_buffers", "_streams",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sized:
    """What `share_slots` asks of a layout."""

    slot_bytes: int


def up_page(size: int) -> int:
    """Rounded up to a page."""
    return -(-size // 4096) * 4096
