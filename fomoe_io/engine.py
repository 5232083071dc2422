"""The engine: a loaded model on a backend, with what was read and counted.  Sessions are timelines on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from fomoe_io import _cpu
from fomoe_io._gate import Gate
from fomoe_io.backend import Backend, Budgets, Counters
from fomoe_io.backends import open_backend
from fomoe_io.config import EngineConfig
from fomoe_io.errors import UsageError
from fomoe_io.experts import learned_profile
from fomoe_io.experts.residency import DECAY
from fomoe_io.experts.slots import slot_layout
from fomoe_io.experts.warm_start import seeds
from fomoe_io.kept.folder import Folder
from fomoe_io.kept.store import Form, KeptSessions, form_fingerprint
from fomoe_io.kept.timeline import Timeline
from fomoe_io.open_model import OpenModel
from fomoe_io.session import Session, Usage
from fomoe_io.storage.reader import Reader
from fomoe_io.storage.store import Store
from fomoe_io.system.memory import peak_resident_bytes
from fomoe_io.text.tokenizer import Tokenizer
from fomoe_io.trace.trace import TraceFile, TraceHeader

T = TypeVar("T")


class Engine:
    """A model opened from a store directory or a GGUF file.  Use :meth:`open`.

    One thread at a time: what another asks meanwhile is a UsageError, and so is everything after :meth:`close` or in a
    fork of the process.  Only :meth:`close` may come at any time, from any thread.

    Attributes
    ----------
    store : Store
    config : EngineConfig
    shape : Shape
    tokenizer : Tokenizer
    context_tokens : int
        Positions of a session.
    reader : Reader
    backend : Backend
        Where it is computed.
    usage : Usage
        What its sessions have read since :meth:`reset_statistics`.
    """

    def __init__(self, store: Store, config: EngineConfig, peak_bytes_before: int = 0) -> None:
        started = time.monotonic()
        self.gate = Gate()
        self.kept_counts: dict[int, np.ndarray] = {}  # what a learned profile has of this run already
        self.store, self.config = store, config
        self.metadata, self.model_name = store.metadata, store.model_name
        self._opened = OpenModel(store, config, self.gate, peak_bytes_before)
        self._backend: Backend | None = None
        self.usage = Usage()
        self._trace: _cpu.Trace | None = None
        self._trace_file: TraceFile | None = None
        self.shape, self.context_tokens = self._opened.shape, self._opened.context_tokens
        self.reader: Reader = self._opened.reader
        try:
            self.tokenizer = Tokenizer.from_metadata(store.metadata)
            self.profile = learned_profile.for_warm_start(config.profile, store)
            with self.gate:
                self._backend = open_backend(self._opened)
                self._open_trace()
                self._warm()
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
        peak_bytes_before = peak_resident_bytes()
        return cls(Store.open(Path(path)), config or EngineConfig(), peak_bytes_before)

    @property
    def backend(self) -> Backend:
        """Where it is computed."""
        if self._backend is None:
            raise UsageError("the engine is closed")
        return self._backend

    @property
    def budgets(self) -> Budgets:
        """What the memory was shared into."""
        return self.backend.budgets

    @property
    def kernels(self) -> str:
        """Whose arithmetic it is: results of the same kernels are the same."""
        return self.backend.kernels

    def memory_lines(self) -> list[str]:
        """Where the memory goes, for the banner; with how to ask for the same budget where nobody did."""
        mib = -(-self.budgets.ram_bytes // (1 << 20))
        return self.backend.memory_lines(f" (--ram {mib}M{'' if self.config.ram_bytes is not None else ' repeats it'})")

    # ---- opening ----

    def _open_trace(self) -> None:
        if self.config.trace is None:
            return
        s, experts = self.shape, self._opened.model.experts
        layouts = {i: slot_layout(layer, self.reader.block_bytes) for i, layer in experts.items()}
        header = TraceHeader(
            model=self.model_name,
            fingerprint=self.store.fingerprint,
            experts=tuple(s.experts if i in experts else 0 for i in range(s.layers)),
            used=s.used,
            slots=self.budgets.slots,
            policy=self.config.policy,
            decay=DECAY,
            car=str(self.config.car or "off"),
            expert_bytes=tuple(layouts[i].slot_bytes if i in layouts else 0 for i in range(s.layers)),
        )
        self._trace_file = TraceFile(self.config.trace, header)
        self._trace = _cpu.Trace(self._trace_file.descriptor, self.budgets.batch_tokens, s.used, s.experts)
        self.backend.record(self._trace)

    def _discard_trace(self) -> None:
        """An engine that never opened has nothing to say: an older trace of that name stays."""
        self._trace = None
        if self._trace_file is not None:
            self._trace_file.discard()

    def _warm(self) -> None:
        """Fill free slots with the hottest experts of the profile, or with all when all fit."""
        for layer, experts, scores in seeds(self.store, self.profile, self.budgets.slot_table.sum(1)):
            if self.config.progress is not None:
                self.config.progress("experts", layer, self.shape.layers)
            self.backend.warm(layer, experts, scores)
            if self._trace is not None:
                self._trace.seeds(layer, experts, scores)

    # ---- running ----

    def session(self) -> Session:
        """A new, empty timeline.

        Raises
        ------
        BudgetError
            The memory that was set aside for `EngineConfig.sessions` is in use.
        """
        self.gate.check()
        return Session(self.backend, self.gate, self.shape, self.context_tokens, self.usage)

    def timeline(self, note: Callable[[str], None] = lambda text: None, *, beside: Timeline | None = None) -> Timeline:
        """A session that goes on from what earlier ones have read, as far as `EngineConfig.cache_bytes` and
        `cache_disk_bytes` keep it.

        Parameters
        ----------
        note : callable, optional
            Takes what is wrong with kept files, a line each: they cost reading a prompt again at worst.
        beside : Timeline, optional
            Another of this engine, with which what is kept is shared.
        """
        session = self.session()
        if beside is not None:
            return Timeline(session, beside.kept, self.tokenizer)
        fingerprint = form_fingerprint(
            self.store.fingerprint, self.kernels, self.config.activations, self.config.kv_type, self.config.car,
            session.row_bytes, session.recurrent_bytes,
        )  # fmt: skip
        form = Form(session.row_bytes, session.recurrent_bytes, fingerprint)
        folder = None
        if self.config.cache_disk_bytes:
            folder = Folder(self.config.sessions_folder, self.config.cache_disk_bytes, fingerprint, note)
        kept = KeptSessions(form, self.budgets.kept_bytes, folder)
        if folder is not None and not kept.is_enough:
            note(f"sessions are not kept: that needs --cache-ram {-(-kept.least_bytes >> 20)}M at least")
        return Timeline(session, kept, self.tokenizer)

    def _ask(self, question: Callable[[], T]) -> T:
        """What the native side says while it stands still: between the batches of this thread's own run, or alone."""
        if self.gate.is_mine:
            return question()
        with self.gate:
            return question()

    def expert_counts(self) -> dict[int, np.ndarray]:
        """How often the router has picked each expert since the engine was opened: layer -> int64 [experts]."""
        picks = self._ask(self.backend.picks)
        return {layer: picks[layer, : self.shape.experts].copy() for layer in self.shape.expert_layers}

    def expert_tiers(self) -> dict[int, np.ndarray]:
        """Where each expert is now: layer -> int8 [experts], 0 VRAM, 1 DRAM, 2 the drive."""
        tiers = self._ask(self.backend.tiers)
        return {layer: tiers[layer, : self.shape.experts].copy() for layer in self.shape.expert_layers}

    def _counters(self) -> Counters:
        """The experts' counters; while a run is at work in another thread, as they were before it."""
        self.gate.check()
        with suppress(UsageError):
            self._last_counters = self._ask(self.backend.counters)
        return self._last_counters

    def reset_statistics(self) -> None:
        """Start the counters of :meth:`statistics` afresh."""
        self._base = self._last_counters = self._ask(self.backend.counters)
        self.backend.reset_statistics()
        self.usage.clear()

    def statistics(self) -> dict[str, Any]:
        """Counters since opening or :meth:`reset_statistics`, with the stable keys of docs/design.md, section 9."""
        c, u, b, r = self._counters().since(self._base), self.usage, self.budgets, self.reader
        tokens = u.prompt_tokens + u.generated_tokens
        result = {
            "model": self.model_name,
            "store": self.store.kind,
            "device": self.backend.device_name,
            "exact": self.config.car is None,
            "car": str(self.config.car or "off"),
            "prompt_tokens": u.prompt_tokens,
            "generated_tokens": u.generated_tokens,
            "load_seconds": self.load_seconds,
            "prompt_seconds": u.prompt_seconds,
            "decode_seconds": u.decode_seconds,
            "prompt_tokens_per_second": _rate(u.prompt_tokens, u.prompt_seconds),
            "tokens_per_second": _rate(u.generated_tokens, u.decode_seconds),
            "expert_requests": c.requests,
            "tiers": {
                "vram": {"hits": c.vram_hits},
                "dram": {"hits": c.dram_hits},
                "nvme": {"hits": c.nvme_hits, "reads": c.nvme_reads, "bytes": c.nvme_bytes},
            },
            "substitutions": c.substitutions,
            "prefetch": {
                "issued": c.prefetches,
                "useful": c.prefetch_useful,
                "late": c.prefetch_late,
                "bytes": c.prefetch_bytes,
                "wasted_bytes": c.prefetch_wasted_bytes,
                "is_on": False,
            },
            "evictions": c.evictions,
            "promotions": c.promotions,
            "demotions": c.demotions,
            "nvme_bytes_per_token": c.nvme_bytes / tokens if tokens else 0.0,
            "stall_seconds": {"nvme": c.stall_ns / 1e9},
            "peak_rss_bytes": peak_resident_bytes(),
            "budgets": {
                "ram_bytes": b.ram_bytes,
                "resident_bytes": b.resident_bytes,
                "state_bytes": b.state_bytes,
                "pool_bytes": b.pool_bytes,
                "kept_bytes": b.kept_bytes,
                "lookahead_bytes": b.lookahead_bytes,
                "batch_tokens": b.batch_tokens,
                "slots_per_layer": min(sum(b.slots[layer]) for layer in self.shape.expert_layers),
            },
            "threads": self.backend.threads,
            "kernels": self.backend.kernels,
            "reader": {
                "engine": r.name,
                "mode": r.mode,
                "direct": r.direct,
                "depth": r.depth,
                "sub_read_bytes": r.sub_read_bytes,
                "failovers": r.counters["failovers"],
            },
        }
        self.backend.add_statistics(result, c)
        return result

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
        """The copy that a fork of the process has: its files alone are closed, nothing native is touched."""
        self._opened.close()
        if self._trace_file is not None:
            self._trace_file.leave()

    def _release(self) -> None:
        """Nobody is inside, and nobody will be."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._opened.close()
        trace, self._trace = self._trace, None
        if trace is not None and self._trace_file is not None:
            self._trace_file.finish(trace.flush())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
