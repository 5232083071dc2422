"""The engine: a loaded model with its memory, threads and reader.  Sessions are timelines on it."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np

from fomoe_io import _cpu
from fomoe_io._gate import Gate
from fomoe_io.config import EngineConfig
from fomoe_io.cpu import dot_library
from fomoe_io.cpu.recorder import Recorder
from fomoe_io.cpu.weights import Weights
from fomoe_io.errors import BudgetError, FormatError, ReadError, UsageError
from fomoe_io.experts import learned_profile
from fomoe_io.experts.residency import DECAY, policy_number
from fomoe_io.experts.slots import SlotLayout, hottest_first, native_layers, share_slots, slot_layout, tier_slots
from fomoe_io.models import check_model
from fomoe_io.models.tensors import EMBEDDING
from fomoe_io.session import Session
from fomoe_io.storage.calibration import Calibration
from fomoe_io.storage.read_files import read_fault
from fomoe_io.storage.reader import Reader, aligned_memory, open_reader
from fomoe_io.storage.store import Store
from fomoe_io.system.memory import available_bytes, peak_resident_bytes, process_bytes, rounded_budget
from fomoe_io.text.tokenizer import Tokenizer
from fomoe_io.trace.trace import TraceFile, TraceHeader, slot_pairs
from fomoe_io.units import format_bytes

RESERVE_BYTES = 24 << 20
"""Left free of a budget for what Python still allocates after opening: logits, sampling, prompt history.
Measured on fomoe-run and fomoe-ppl with 8k and 248k vocabularies (tests/engine/test_budget.py holds it)."""

RAM_SHARE = 0.8
"""Of what is available, for an engine that is not told how much it may take."""

DEFAULT_DEPTH = 64
"""Reads in flight, for each drive, without a calibration: more than any drive needs for reads of an expert's size."""

WARM_START_WEIGHT = 0.1
"""Of a profile's picks per token beside those that follow.  At full weight a profile of another kind of text costs more
misses than it saves; at a tenth it costs none and a fitting one saves as many (docs/caching.md)."""

DEFAULT_CONTEXT_TOKENS = 4096
"""When neither the user nor the model says less: as llama.cpp's examples use; KV memory grows with it."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the memory was shared into; `slots` is per layer."""

    ram_bytes: int
    resident_bytes: int
    state_bytes: int
    workspace_bytes: int
    pool_bytes: int
    batch_tokens: int
    slots: dict[int, int]


class Engine:
    """A model opened from a store directory or a GGUF file.  Use :meth:`open`.

    One thread at a time: what another asks meanwhile is a UsageError, and so is everything after :meth:`close` or in a
    fork of the process.  Only :meth:`close` may come at any time, from any thread.
    """

    def __init__(self, store: Store, config: EngineConfig) -> None:
        started = time.monotonic()
        self.gate = Gate()
        self.kept_counts: dict[int, np.ndarray] = {}  # what a learned profile has of this run already
        self.store = store
        self.config = config
        self._kernels = dot_library.open_kernels(config.kernels)
        self.kernels = self._kernels.name
        self.metadata = store.metadata
        self.model_name = store.model_name
        self.model = check_model(store)
        self.shape = self.model.shape
        self._check_types()
        self.tokenizer = Tokenizer.from_metadata(store.metadata)
        self._trace: _cpu.Trace | None = None
        self._trace_file: TraceFile | None = None
        self.profile = learned_profile.for_warm_start(config.profile, store)
        self.threads = config.threads or len(os.sched_getaffinity(0))
        self.context_tokens = config.context_tokens or min(self.shape.context_tokens, DEFAULT_CONTEXT_TOKENS)
        self.reader: Reader = self._open_reader()
        try:
            self._team = _cpu.Team(self.threads)
            self._files = [os.open(path, os.O_RDONLY) for path in store.paths]
            with self.gate:
                self._open(self.model.architecture.build)
        except BaseException:
            self._discard_trace()
            self.close()
            raise
        self.load_seconds = time.monotonic() - started
        self.reset_statistics()

    @classmethod
    def open(cls, path: str | Path, config: EngineConfig | None = None) -> Self:
        """Open a store directory or a GGUF file.

        Parameters
        ----------
        path : str or Path
        config : EngineConfig, optional

        Raises
        ------
        FomoeError
            FormatError or StoreError for a bad model, BudgetError when `ram_bytes` is too small.
        """
        store, config = Store.open(Path(path)), config or EngineConfig()
        if config.device != "cpu":
            from fomoe_io.gpu import device  # a machine without a GPU never gets here
            from fomoe_io.gpu import engine as gpu_engine

            gpu = device.open_gpu(config.device)
            if gpu is not None:
                return cast(Self, gpu_engine.DeviceEngine(store, config, gpu))
        if config.vram_bytes is not None:
            raise UsageError("a bound of device memory was given, and there is no GPU in use", hint="drop --vram")
        return cls(store, config)

    @property
    def device_name(self) -> str:
        """Where the model is computed."""
        return "cpu"

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""
        return f"{self.threads} threads, {self.kernels} kernels"

    def memory_lines(self) -> list[str]:
        """Where the memory goes, for the banner."""
        b, s = self.budgets, self.shape
        return [
            f"{self._ram_text()}: weights {format_bytes(b.resident_bytes)}, "
            f"experts {format_bytes(b.pool_bytes)} ({_slots_text(b.slots.values())} of {s.experts} a layer), "
            f"state {format_bytes(b.state_bytes)}, batch {b.batch_tokens}"
        ]

    def _ram_text(self) -> str:
        """The budget, and how to ask for the same one again where nobody did."""
        ram_bytes = self.budgets.ram_bytes
        again = "" if self.config.ram_bytes is not None else f" (--ram {-(-ram_bytes // (1 << 20))}M repeats it)"
        return f"memory {format_bytes(ram_bytes)}{again}"

    # ---- opening ----

    def _open_reader(self) -> Reader:
        """A reader of all data files and their mirrors, as the calibration says where there is one."""
        config = self.config
        depth, sub_read_bytes = DEFAULT_DEPTH, 0
        if config.calibration is not None:
            largest = max(int(slot_layout(layer).extents["bytes"].max()) for layer in self.store.experts.values())
            depth, sub_read_bytes = Calibration.load(config.calibration).reads(largest)
        paths, mirrors = self.store.copies()
        return open_reader(
            paths,
            engine=config.reader,
            depth=config.ring_depth or depth,
            direct=config.direct,
            sub_read_bytes=sub_read_bytes,
            mirrors=mirrors,
            pace=config.pace,
        )

    def _check_types(self) -> None:
        for layer, found in self.model.experts.items():
            for part in found.parts:
                if self._kernels.type_info(int(part.type)) is None:
                    raise FormatError(
                        f"blk.{layer} expert {part.name} has type number {int(part.type)}, "
                        f"which the {self.kernels} kernels do not know"
                    )

    def _open(self, build: Callable[..., None]) -> None:
        s = self.shape
        self._float = self.config.activations == "float32"
        block_bytes = self.reader.block_bytes
        self._weights = Weights(
            self.model.resident, self._kernels, float_activations=self._float, block_bytes=block_bytes
        )
        layers = self.model.experts
        layouts = {i: slot_layout(layer, block_bytes) for i, layer in layers.items()}
        self._expert_inputs = {
            i: tuple(self._activation_type(int(part.type)) for part in layer.parts[:2]) for i, layer in layers.items()
        }
        self._build = build
        self.budgets = self._share_memory(layouts)
        self._weights.load(self.reader, self.config.progress)
        self._pool = aligned_memory(self.budgets.pool_bytes)
        native, _ = native_layers(s.layers, layers, layouts, self.budgets.slots, self._pool.address)
        self.reader.register_buffers(self._pool.address, self.budgets.pool_bytes)
        tiers = self._tier_slots()
        self._experts = _cpu.Experts(
            self._kernels,
            self._experts_shape(self.budgets.batch_tokens),
            native,
            tiers,
            policy_number(self.config.policy),
            DECAY,
            self.reader.address,
            (self.reader, self._pool),
        )
        self._experts.set_lookahead(min(self.config.lookahead, s.used))
        if self.config.car is not None:
            car = self.config.car.native()
            self._experts.set_car(ctypes.addressof(car))
        self._recorder = self._record(self.budgets.batch_tokens, self._experts)
        self._open_trace(tiers, layouts)
        self._warm()

    def _activation_type(self, weight_type: int) -> int:
        """What a product with weights of this type reads: its own activation type, or floats (0)."""
        info = self._kernels.type_info(weight_type)
        return 0 if self._float or info is None else info[0]

    def _tier_slots(self) -> np.ndarray:
        tiers = self.config.tiers
        vram = None if tiers is None else {i: round(tiers.vram * self.shape.experts) for i in self.budgets.slots}
        return tier_slots(self.shape.layers, self.budgets.slots, vram)

    def _open_trace(self, tiers: np.ndarray, layouts: dict[int, SlotLayout]) -> None:
        if self.config.trace is None:
            return
        s = self.shape
        header = TraceHeader(
            model=self.model_name,
            fingerprint=self.store.fingerprint,
            experts=(s.experts,) * s.layers,
            used=s.used,
            slots=slot_pairs(tiers),
            policy=self.config.policy,
            decay=DECAY,
            car=str(self.config.car or "off"),
            expert_bytes=tuple(layouts[i].slot_bytes for i in range(s.layers)),
        )
        self._trace_file = TraceFile(self.config.trace, header)
        self._trace = _cpu.Trace(self._trace_file.descriptor, self.budgets.batch_tokens, s.used, s.experts)
        self._recorder.program.trace(self._trace)

    def _discard_trace(self) -> None:
        """An engine that never opened has nothing to say: an older trace of that name stays."""
        self._trace = None
        if self._trace_file is not None:
            self._trace_file.discard()

    def _experts_shape(self, batch_tokens: int) -> dict[str, int]:
        s = self.shape
        return {
            "columns": s.columns,
            "hidden": s.hidden,
            "used": s.used,
            "batch": batch_tokens,
            "float_activations": int(self._float),
        }

    def _record(self, batch_tokens: int, experts: _cpu.Experts | None) -> Recorder:
        s = self.shape
        channels = (2 * s.key_heads + s.value_heads) * s.state_columns
        widest = max(s.columns, s.hidden, s.shared_hidden, s.experts, channels, s.heads * s.head_columns)
        recorder = Recorder(
            self._team,
            self._kernels,
            batch_tokens=batch_tokens,
            context_tokens=self.context_tokens,
            # attention scores of a whole context, or the widest row (twice: normalised q and k)
            scratch_floats=max(2 * widest, self.context_tokens),
            experts=experts,
            lookahead=self.config.lookahead > 0,
        )
        self._build(recorder, self._weights, s, self._expert_inputs, self._files)
        return recorder

    def _share_memory(self, layouts: dict[int, SlotLayout]) -> Budgets:
        """Share the budget: process, resident weights, state and activations first, slots get the rest."""
        s = self.shape
        sketch = self._record(1, None)
        state = sketch.state.bytes
        per_token = sketch.activation_bytes + _cpu.Experts.workspace_bytes(self._experts_shape(1))
        del sketch
        least = self._wanted_slots() or s.used
        process = self._process_bytes()
        base = process + self._weights.bytes + state + RESERVE_BYTES
        row_bytes = sum(layout.slot_bytes for layout in layouts.values())
        smallest = base + per_token + least * row_bytes
        limit = self._ram_limit(process, smallest)
        everything = (self._wanted_slots() or s.experts) * row_bytes
        batch = self.config.batch_tokens
        # An eighth of what is left at most for activations: a smaller batch costs prompt speed, fewer slots cost reads.
        while batch > 1 and batch * per_token > max((limit - smallest) // 8, limit - base - everything):
            batch //= 2
        room = limit - base - batch * per_token
        most = self._wanted_slots() or s.experts
        if self.config.tiers is not None:
            most = max(least, round((self.config.tiers.vram + self.config.tiers.dram) * s.experts))
        slots = share_slots(layouts, most, room, least)
        if slots is None:
            raise self._too_small(limit, smallest)
        pool = sum(slots[i] * layout.slot_bytes for i, layout in layouts.items())
        return Budgets(limit, self._weights.bytes, state, batch * per_token, pool, batch, slots)

    def _process_bytes(self) -> int:
        s = self.shape
        return process_bytes(s.vocabulary, s.layers * s.experts)

    def _wanted_slots(self) -> int | None:
        """Slots a layer that the configuration asks for.

        Raises
        ------
        UsageError
            More than there are experts, or fewer than a token needs.
        """
        slots, s = self.config.slots, self.shape
        if slots is not None and not s.used <= slots <= s.experts:
            raise UsageError(
                f"slots is {slots}, and {self.model_name} uses {s.used} of {s.experts} experts a layer",
                hint=f"--slots {min(max(slots, s.used), s.experts)}",
            )
        return slots

    def _ram_limit(self, process: int, smallest: int) -> int:
        """The budget: as configured, or a share of what is available, rounded so that it repeats.

        Raises
        ------
        BudgetError
            It is too small.
        """
        limit = self.config.ram_bytes
        if limit is None:
            available = process + int(RAM_SHARE * available_bytes())
            limit = max(rounded_budget(available), min(smallest, available))
        least = max(smallest, peak_resident_bytes())
        if limit < least:
            raise self._too_small(limit, least)
        return limit

    def _too_small(self, limit: int, smallest: int) -> BudgetError:
        mib = -(-smallest // (1 << 20)) + 1
        what = "" if self.config.slots is None else f" with {self.config.slots} slots a layer"
        hint = f"--ram {mib}M" if self.config.slots is None else f"--ram {mib}M, or fewer --slots"
        return BudgetError(
            f"a memory budget of {format_bytes(limit)} is too small for {self.model_name}{what}", hint=hint
        )

    def _slots_of(self, layer: int) -> int:
        return self.budgets.slots[layer]

    def _warm(self) -> None:
        """Fill free slots with the hottest experts of the profile, or with all when all fit."""
        experts = {layer: found.n_experts for layer, found in self.store.experts.items()}
        frequencies = self.profile.frequencies(experts) if self.profile else {}
        for layer in self.store.experts:
            if layer >= self.shape.layers:
                continue
            slots = self._slots_of(layer)
            if self.config.progress is not None:
                self.config.progress("experts", layer, self.shape.layers)
            if layer in frequencies:
                order = hottest_first(frequencies[layer])[:slots]
                scores = WARM_START_WEIGHT * frequencies[layer][order]
            elif slots == self.shape.experts:
                order = np.arange(slots, dtype=np.int32)
                scores = np.zeros(slots)
            else:
                continue
            self._check(self._warm_layer(layer, order, scores))
            if self._trace is not None:
                self._trace.seeds(layer, order, scores)

    def _warm_layer(self, layer: int, order: np.ndarray, scores: np.ndarray) -> int:
        return self._experts.warm(layer, order, scores, self.gate)

    # ---- running ----

    def _check(self, error: int) -> None:
        if not error:
            return
        if error == -errno.ECANCELED or self.gate.was_interrupted:
            self.gate.raise_end()
        layer, expert = self._experts.failure()
        detail, fix = self.reader.last_error or os.strerror(-error), self.reader.last_fix
        raise ReadError(f"reading expert {expert} of layer {layer} failed: {detail}", hint=fix or None)

    def _has_every_expert(self) -> bool:
        """Whether all reads of experts have succeeded, if not from the first copy."""
        reads = self.reader.counters
        return bool(reads["errors"] == reads["failovers"])

    def _embedding_error(self, code: int) -> ReadError:
        """What a failed read of a row of the token embeddings means."""
        tensor = self.store.resident[EMBEDDING]
        now = os.lseek(self._files[tensor.file], 0, os.SEEK_END)
        fault = read_fault(code, self.store.file_bytes[tensor.file], now)
        path = self.store.paths[tensor.file]
        return ReadError(f"reading the token embeddings from {path} failed: {fault.reason}", hint=fault.fix)

    def session(self) -> Session:
        """A new, empty timeline."""
        self.gate.check()
        return Session(self)

    def _run(self, ids: np.ndarray, logits: np.ndarray, outputs: int, **how: Any) -> None:
        """One batch of a session, whose turn it is."""
        error = self._recorder.program.run(ids, outputs, logits=logits, gate=self.gate, **how)
        if error not in (0, -errno.ECANCELED) and self._has_every_expert():
            raise self._embedding_error(-error)
        self._check(error)

    def _ask(self, question: Callable[[], T]) -> T:
        """What the native side says while it stands still: between the batches of this thread's own run, or alone."""
        if self.gate.is_mine:
            return question()
        with self.gate:
            return question()

    def expert_counts(self) -> dict[int, np.ndarray]:
        """How often the router has picked each expert since the engine was opened: layer -> int64 [experts]."""
        picks = self._ask(lambda: self._experts.picks())
        return {layer: picks[layer, : self.shape.experts].copy() for layer in range(self.shape.layers)}

    def _counters(self) -> dict[str, int]:
        """The experts' counters; while a run is at work in another thread, as they were before it."""
        self.gate.check()
        with suppress(UsageError):
            self._last_counters = self._ask(lambda: self._experts.counters())
        return self._last_counters

    def reset_statistics(self) -> None:
        """Start the counters of :meth:`statistics` afresh."""
        self._base = self._last_counters = self._ask(lambda: self._experts.counters())
        self.prompt_tokens = self.generated_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0

    def statistics(self) -> dict[str, Any]:
        """Counters since opening or :meth:`reset_statistics`, with the stable keys of docs/design.md, section 9."""
        now = self._counters()
        c = {key: now[key] - self._base[key] for key in now}
        tokens = self.prompt_tokens + self.generated_tokens
        return {
            "model": self.model_name,
            "store": self.store.kind,
            "device": self.device_name,
            "exact": self.config.car is None,
            "car": str(self.config.car or "off"),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "load_seconds": self.load_seconds,
            "prompt_seconds": self.prompt_seconds,
            "decode_seconds": self.decode_seconds,
            "prompt_tokens_per_second": _rate(self.prompt_tokens, self.prompt_seconds),
            "tokens_per_second": _rate(self.generated_tokens, self.decode_seconds),
            "expert_requests": c["requests"],
            "tiers": {
                "vram": {"hits": c["vram_hits"]},
                "dram": {"hits": c["dram_hits"]},
                "nvme": {"hits": c["nvme_hits"], "reads": c["nvme_reads"], "bytes": c["nvme_bytes"]},
            },
            "substitutions": c.get("substitutions", 0),
            "prefetch": {
                "issued": c.get("prefetches", 0),
                "useful": c.get("prefetch_useful", 0),
                "late": c.get("prefetch_late", 0),
                "bytes": c.get("prefetch_bytes", 0),
            },
            "evictions": c["evictions"],
            "promotions": c["promotions"],
            "demotions": c["demotions"],
            "nvme_bytes_per_token": c["nvme_bytes"] / tokens if tokens else 0.0,
            "stall_seconds": {"nvme": c["stall_ns"] / 1e9},
            "peak_rss_bytes": peak_resident_bytes(),
            "budgets": {
                "ram_bytes": self.budgets.ram_bytes,
                "resident_bytes": self.budgets.resident_bytes,
                "state_bytes": self.budgets.state_bytes,
                "pool_bytes": self.budgets.pool_bytes,
                "batch_tokens": self.budgets.batch_tokens,
                "slots_per_layer": min(self._slots_of(layer) for layer in range(self.shape.layers)),
            },
            "threads": self.threads,
            "kernels": self.kernels,
            "reader": {
                "engine": self.reader.name,
                "mode": self.reader.mode,
                "direct": self.reader.direct,
                "depth": self.reader.depth,
                "sub_read_bytes": self.reader.sub_read_bytes,
                "failovers": self.reader.counters["failovers"],
            },
        }

    def close(self) -> None:
        """End the run at work, stop reading and give the memory back.  Idempotent, and from any thread.

        A run of another thread leaves at its next step, with a UsageError there.  In a fork of the process that opened
        the engine only its copies of the files are closed.

        Raises
        ------
        UsageError
            From inside a run of the same thread: a progress callback, a signal handler.
        OSError
            When the trace could not be written.
        """
        if not self.gate.shut():
            return
        if self.gate.is_foreign:
            self._leave()
        else:
            self._release()

    def _leave(self) -> None:
        for descriptor in self.__dict__.pop("_files", []):
            os.close(descriptor)
        self.reader.close()
        if self._trace_file is not None:
            self._trace_file.leave()

    def _release(self) -> None:
        """Nobody is inside, and nobody will be."""
        for descriptor in self.__dict__.pop("_files", []):
            os.close(descriptor)
        for name in ("_recorder", "_experts", "_team"):
            self.__dict__.pop(name, None)
        self.reader.close()
        for name in ("_weights", "_pool"):
            owner = self.__dict__.pop(name, None)
            if owner is not None:
                owner.close()
        trace, self._trace = self._trace, None
        if trace is not None and self._trace_file is not None:
            self._trace_file.finish(trace.flush())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _slots_text(slots: Iterable[int]) -> str:
    """`12`, or `12 to 13` where the first layers have one more."""
    counts = sorted(set(slots))
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
