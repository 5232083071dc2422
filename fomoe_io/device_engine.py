"""The engine on a GPU: weights and state in its memory, experts where they were last useful."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from fomoe_io import _gpu, device
from fomoe_io.device import Gpu, Step
from fomoe_io.device_memory import (
    MOST_BATCH_TOKENS,
    Header,
    Mail,
    check_shape,
    native_device_layers,
    pool_places,
    record_layout,
    rope_values,
    size_classes,
)
from fomoe_io.device_program import CAR_BYTES, Arena, DeviceExpertLayer, DeviceRecorder, Mailbox, Memory
from fomoe_io.device_session import DeviceSession
from fomoe_io.device_weights import DeviceWeights
from fomoe_io.engine import RESERVE_BYTES, Engine
from fomoe_io.errors import BudgetError, ReadError, UsageError
from fomoe_io.expert_slots import share_slots, slot_layout
from fomoe_io.memory import available_bytes, peak_resident_bytes, resident_bytes
from fomoe_io.reader import aligned_memory
from fomoe_io.residency import DECAY, policy_number
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io._hip import Graph
    from fomoe_io.config import EngineConfig
    from fomoe_io.store import Store

FREE_SHARE = 16
"""One part in so many of the device's memory stays free (at most MOST_FREE_BYTES): the driver takes some later."""

MOST_FREE_BYTES = 256 << 20

EXTRA_SPARES = 4
"""Spare buffers beyond a token's picks: victims still on their way down from the layer before."""

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

    two_branches = True
    """Whether the shared expert runs beside the routed ones."""

    def __init__(self, store: Store, config: EngineConfig, gpu: Gpu) -> None:
        self.gpu = gpu
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._run_number = 0
        self.live_session: DeviceSession | None = None
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
            f"RAM {format_bytes(b.ram_bytes)}: experts {format_bytes(b.pool_bytes)} ({least[DRAM]} a layer)",
        ]

    def _open(self, build: Callable[..., None]) -> None:
        s = self.shape
        if self.config.activations != "quantized":
            raise UsageError("float activations are computed on the CPU alone", hint="--device cpu")
        unsupported = {
            "a trace": self.config.trace is not None,
            "lookahead": self.config.lookahead > 0,
            "back-fill": self.config.car is not None and self.config.car.backfill > 0,
        }
        for name, is_wanted in unsupported.items():
            if is_wanted:
                raise UsageError(f"{name} is made on the CPU alone", hint="--device cpu")
        check_shape(s)
        self._build = build
        self._layers = {i: self.store.experts[i] for i in range(s.layers)}
        self._layouts = {i: slot_layout(layer) for i, layer in self._layers.items()}
        self._records = {i: record_layout(i, layer, self._layouts[i]) for i, layer in self._layers.items()}
        self._expert_inputs = {
            i: (int(r.kernels[0] in device.kernels.QUANTIZED_TYPES),) * 2 for i, r in self._records.items()
        }
        self.budgets = self._share_memory()
        self._allocate()
        self._device_weights.load(self.reader, self.gpu)
        rope = rope_values(self.shape.rope_base, self.shape.rotated, self.context_tokens)
        self.gpu.stream.copy_in(self._rope_address, rope.ctypes.data, rope.nbytes)
        if self.config.car is not None:
            rule = self.config.car.native()
            self.gpu.stream.copy_in(self._memory.words("car", CAR_BYTES), ctypes.addressof(rule), CAR_BYTES)
        self.gpu.stream.synchronize()
        self._warm()

    # ---- memory ----

    def _resident(self) -> dict[str, Any]:
        return {
            name: tensor
            for name, tensor in self.store.resident.items()
            if not name.startswith("blk.") or int(name.split(".")[1]) < self.shape.layers
        }

    def _record(  # type: ignore[override]
        self, bases: tuple[int, int, int], batch_tokens: int, mail_address: int
    ) -> dict[int, DeviceRecorder]:
        """Record the model for one token and for a batch, at these addresses of weights, activations and state."""
        s = self.shape
        self._weights_arena = Arena(bases[0])
        self._device_weights = DeviceWeights(self._resident(), self._weights_arena)
        memory = Memory(Arena(bases[1]), Arena(bases[2]), batch_tokens, self.context_tokens)
        self._embedding_table = self._device_weights.embedding(s.columns, s.vocabulary)[0]
        self._header = Header(batch_tokens, self._embedding_table.row_bytes)
        header = memory.arena.take(self._header.bytes)
        memory.scratch["positions"] = header + self._header.positions
        memory.scratch["embedding"] = header + self._header.embedding
        self._rope_address = memory.words("rope", 4 * self.context_tokens * s.rotated)
        memory.row_at("rope", s.rotated, self._rope_address)
        self._header_address = header
        self._mail = Mail(batch_tokens * s.used, s.layers)
        self._tables_address = memory.words("tables", 8 * s.layers * s.experts)
        experts = {
            i: DeviceExpertLayer(
                *record.kernels,
                record.device_offset,
                self._tables_address + 8 * s.experts * i,
                mail_address + self._mail.post(i),
                mail_address + self._mail.answer(i),
            )
            for i, record in self._records.items()
        }
        recorders = {}
        for tokens in dict.fromkeys((1, batch_tokens)):
            memory.state_arena.bytes = 0  # every program of a session shares its state
            recorder = DeviceRecorder(
                memory, tokens=tokens, experts=experts, mailbox=Mailbox(header, mail_address),
                vocabulary=s.vocabulary, hidden=s.hidden, substitutes=self.config.car is not None,
            )  # fmt: skip
            self._build(recorder, self._device_weights, s, self._expert_inputs, self._files)
            recorders[tokens] = recorder
        self._memory = memory
        return recorders

    def _fixed_bytes(self, batch_tokens: int) -> tuple[int, int, int]:
        """Device bytes of weights, activations and state."""
        self._record((0, 0, 0), batch_tokens, 0)
        return self._weights_arena.bytes, self._memory.arena.bytes, self._memory.state_arena.bytes

    def _vram_slots(self, room: int, spares: int, least: int) -> dict[int, int] | None:
        layouts = {i: _Sized(r.slot_bytes[VRAM]) for i, r in self._records.items()}
        spare_bytes = spares * sum(sizes[VRAM] for sizes in size_classes(self._records))
        most = self._most_slots(self.config.tiers.vram if self.config.tiers else 1.0, least)
        return share_slots(layouts, most, room - spare_bytes, least)  # type: ignore[arg-type]

    def _most_slots(self, share: float, least: int) -> int:
        return max(least, round(share * self.shape.experts))

    def _share_memory(self) -> DeviceBudgets:  # type: ignore[override]
        s, config = self.shape, self.config
        free = self.gpu.free_bytes()
        limit = config.vram_bytes
        if limit is None:
            limit = free - min(MOST_FREE_BYTES, self.gpu.info.memory_bytes // FREE_SHARE)
        elif limit > free:
            raise BudgetError(
                f"a device budget of {format_bytes(limit)} is more than the {format_bytes(free)} that are free on "
                f"{self.gpu.info.name}",
                hint=f"--vram {free >> 20}M, or end what else uses the device",
            )
        spares = s.used + EXTRA_SPARES
        fixed = self._fixed_bytes(1)
        slots = self._vram_slots(limit - sum(fixed), spares, s.used)
        if slots is None:
            smallest = sum(fixed) + s.used * sum(r.slot_bytes[VRAM] for r in self._records.values())
            smallest += spares * sum(sizes[VRAM] for sizes in size_classes(self._records))
            raise BudgetError(
                f"a device budget of {format_bytes(limit)} is too small for {self.model_name}",
                hint=f"--vram {-(-smallest // (1 << 20)) + 1}M",
            )
        batch = 1
        while 2 * batch <= min(MOST_BATCH_TOKENS, config.batch_tokens):
            wider = self._fixed_bytes(2 * batch)
            found = self._vram_slots(limit - sum(wider), spares, s.used)
            if found is None or min(found.values()) < min(2 * batch * s.used, s.experts):
                break
            batch, fixed, slots = 2 * batch, wider, found
        self._fixed_bytes(batch)  # the last sketch may have been of a wider batch
        table = np.zeros((s.layers, 2), np.int32)
        for layer, count in slots.items():
            table[layer, VRAM] = count
        ram_limit, host_bytes = self._share_host_memory(table, batch, 2 * s.used)
        pools = [pool_places(self._records, table, (spares, 2 * s.used), tier)[2] for tier in (VRAM, DRAM)]
        return DeviceBudgets(
            ram_bytes=ram_limit, vram_bytes=limit, resident_bytes=fixed[0], state_bytes=fixed[2],
            workspace_bytes=fixed[1] + host_bytes, vram_pool_bytes=pools[0], pool_bytes=pools[1], batch_tokens=batch,
            slots=table, spares=(spares, 2 * s.used),
        )  # fmt: skip

    def _share_host_memory(self, table: np.ndarray, batch: int, spares: int) -> tuple[int, int]:
        """Fill in the DRAM slots; returns the budget and what the words shared with the device take."""
        s, config = self.shape, self.config
        shared = Mail(batch * s.used, s.layers).bytes + 8 * s.layers * s.experts + 4 * s.vocabulary * batch
        base = resident_bytes() + shared + RESERVE_BYTES
        base += spares * sum(sizes[DRAM] for sizes in size_classes(self._records))
        limit = config.ram_bytes
        if limit is None:
            limit = resident_bytes() + int(0.8 * available_bytes())
        if limit < max(base, peak_resident_bytes()):
            raise self._too_small(limit, max(base, peak_resident_bytes()))
        missing = s.experts - int(table[list(self._records), VRAM].min())
        most = missing if config.tiers is None else min(missing, self._most_slots(config.tiers.dram, 0))
        slots = share_slots(self._layouts, most, limit - base, 0) if most else {}
        for layer, count in (slots or {}).items():
            table[layer, DRAM] = min(count, s.experts - table[layer, VRAM])
        return limit, shared

    def _allocate(self) -> None:
        """Take the memory and make the programs."""
        s, b, gpu = self.shape, self.budgets, self.gpu
        mail = Mail(b.batch_tokens * s.used, s.layers)
        self._shared_offsets = {"mail": 0, "tables": up_page(mail.bytes)}
        self._shared_offsets["header"] = self._shared_offsets["tables"] + up_page(8 * s.layers * s.experts)
        self._shared_offsets["logits"] = self._shared_offsets["header"] + up_page(self._header.bytes)
        total = self._shared_offsets["logits"] + up_page(4 * s.vocabulary * b.batch_tokens)
        self._shared = aligned_memory(total)
        self._shared_words = np.frombuffer(self._shared.view, np.uint8)
        self._shared_words[:] = 0
        start = self._shared_offsets["header"]
        self._header_view = self._shared.view[start : start + self._header.bytes]
        self._registrations = [gpu.register(self._shared_words)]
        self._pool = aligned_memory(max(b.pool_bytes, 4096))
        self._registrations.append(gpu.register(np.frombuffer(self._pool.view, np.uint8)))
        self.reader.register_buffers(self._pool.address, max(b.pool_bytes, 4096))
        buffers = [gpu.allocate(max(n, 256)) for n in (b.resident_bytes, self._memory.arena.bytes, b.state_bytes)]
        vram = gpu.allocate(max(b.vram_pool_bytes, 256))
        self._buffers = [*buffers, vram]
        bases = (buffers[0].pointer, buffers[1].pointer, buffers[2].pointer)
        self._programs = self._record(bases, b.batch_tokens, self._registrations[0].pointer)
        self._memory.is_complete = True
        self._streams = [gpu.new_stream() for _ in range(_gpu.LANES)]
        events = [[gpu.event() for _ in range(_gpu.LANE_EVENTS)] for _ in range(_gpu.LANES)]
        self._experts = self._device_experts(vram.pointer, events)  # type: ignore[assignment]

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
            self._shared.address + self._shared_offsets["tables"], self._shared.address, self._mail,
        )  # fmt: skip
        return _gpu.DeviceExperts(
            layers, classes, b.slots, s.used, b.batch_tokens * s.used, policy_number(self.config.policy), DECAY,
            self.reader.address, self._streams, events, (self.reader, self._pool, self._shared, self._buffers),
        )  # fmt: skip

    def _slots_of(self, layer: int) -> int:
        return int(self.budgets.slots[layer].sum())

    # ---- running ----

    def _graph(self, tokens: int, outputs: int) -> Graph:
        key = (tokens, outputs)
        if key not in self._graphs:
            specs = self._programs[tokens].launches(outputs)
            steps = [
                Step(self.gpu.prepare(s.kernel, s.grid, *s.arguments), s.beside and self.two_branches, s.forks, s.joins)
                for s in specs
            ]
            self._graphs[key] = self.gpu.capture_steps(steps)
        return self._graphs[key]

    def _part(self, name: str, offset: int, size: int) -> np.ndarray:
        start = self._shared_offsets[name] + offset
        return self._shared_words[start : start + size]

    def _fill_header(self, ids: np.ndarray, position: int, substitute: bool) -> None:
        h, view = self._header, self._header_view
        self._run_number = self._run_number % 0xFFFFFFFF + 1  # 0 is what posts and answers hold before the first run
        car = self.config.car
        may_swap = substitute and car is not None and len(ids) == 1 and position >= car.warmup
        struct.pack_into("<II", view, 0, self._run_number, may_swap)
        struct.pack_into(f"<{len(ids)}i", view, h.positions, *range(position, position + len(ids)))
        table, file, offset, _ = self._programs[1].embedding  # type: ignore[misc]
        for i, token in enumerate(ids.tolist()):
            row = view[h.embedding + i * table.row_bytes :][: table.row_bytes]
            place = offset + token * table.file_row_bytes
            if table.row_bytes == table.file_row_bytes:
                got = os.preadv(file, [row], place)
            else:
                raw = np.frombuffer(os.pread(file, table.file_row_bytes, place), np.uint8)
                got = len(raw)
                if got == table.file_row_bytes:
                    row[:] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(table.type)).tobytes()
            if got != table.file_row_bytes:
                raise ReadError(f"the token embeddings end early, at byte {place + got} of the model")

    def run_batch(self, ids: np.ndarray, position: int, outputs: int, *, substitute: bool = False) -> np.ndarray:
        """Replay the program for as many tokens as it was recorded for.

        Parameters
        ----------
        ids : numpy.ndarray
            int32 [tokens]
        position : int
            Of the first in the session.
        outputs : int
            How many of the last tokens get logits: 0, 1 or all.
        substitute : bool
            Cache-aware routing may act (on a single token).

        Returns
        -------
        numpy.ndarray
            float32 [outputs, vocabulary], valid until the next run.
        """
        s, offsets = self.shape, self._shared_offsets
        graph = self._graph(len(ids), outputs)
        self._fill_header(ids, position, substitute)
        base, logits_bytes = self._shared.address, 4 * s.vocabulary * outputs
        error = self._experts.run(  # type: ignore[attr-defined]
            self.gpu.stream, graph, self._run_number, len(ids),
            self._header_address, base + offsets["header"], self._header.bytes,
            self._tables_address, base + offsets["tables"], 8 * s.layers * s.experts,
            base + offsets["logits"], self._programs[1].logits_address, logits_bytes, base,
        )  # fmt: skip
        self._check(error)
        return self._part("logits", 0, logits_bytes).view(np.float32).reshape(outputs, s.vocabulary)

    def posted_picks(self, tokens: int) -> np.ndarray:
        """int32 [layers, tokens, used]: the router's picks in the last run."""
        s, pairs = self.shape, tokens * self.shape.used
        rows = [
            self._part("mail", self._mail.post(layer) + 8, 8 * pairs).view(np.uint16)[::4].reshape(tokens, s.used)
            for layer in range(s.layers)
        ]
        return np.stack(rows).astype(np.int32)

    def session(self) -> DeviceSession:
        """A new, empty timeline; the device holds one at a time.

        Raises
        ------
        UsageError
            Another one is open.
        """
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
        for address, size in self._programs[1].state.zeroed:
            self.gpu.stream.fill(address, 0, size)

    def statistics(self) -> dict[str, Any]:
        """As :meth:`Engine.statistics`, with what a device adds: bytes over the link, launches, synchronisations."""
        result = super().statistics()
        now = self._experts.counters()
        c = {key: now[key] - self._base[key] for key in now}
        calls = device.counts()
        result["device"] = self.device_name
        result["tiers"]["dram"]["bytes"] = c["up_bytes"] - c["nvme_bytes"] if c["up_bytes"] > c["nvme_bytes"] else 0
        result["link"] = {"up_bytes": c["up_bytes"], "down_bytes": c["down_bytes"]}
        result["layers_served"] = {"all": c["layers"], "with_misses": c["served_layers"]}
        result["stall_seconds"]["h2d"] = c["copy_stall_ns"] / 1e9
        result["device_calls"] = {key: calls[key] - self._calls[key] for key in calls}
        return result

    def reset_statistics(self) -> None:
        """Start the counters of :meth:`statistics` afresh."""
        self._calls = device.counts()
        super().reset_statistics()

    def close(self) -> None:
        """Give device and host memory back.  Idempotent."""
        gpu = self.__dict__.get("gpu")
        if gpu is not None and "_experts" in self.__dict__:
            gpu.stream.synchronize()
            self._experts.settle()  # type: ignore[attr-defined]
        self._graphs.clear()
        for name in ("_programs", "_memory", "_device_weights"):
            self.__dict__.pop(name, None)
        super().close()
        for registration in self.__dict__.pop("_registrations", []):
            registration.close()
        self.__dict__.pop("_shared_words", None)
        self.__dict__.pop("_header_view", None)
        for buffer in self.__dict__.pop("_buffers", []):
            buffer.free()
        self.__dict__.pop("_streams", None)
        shared = self.__dict__.pop("_shared", None)
        if shared is not None:
            shared.close()


@dataclass(frozen=True, slots=True)
class _Sized:
    """What `share_slots` asks of a layout."""

    slot_bytes: int


def up_page(size: int) -> int:
    """Rounded up to a page."""
    return -(-size // 4096) * 4096
