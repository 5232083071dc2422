"""The engine's thread: it opens the model, does one job after the other, and puts the model away."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError, printable
from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.errors import ApiError, internal_error, unavailable
from fomoe_io.serve.expert_map import ExpertMap
from fomoe_io.serve.generate import Answering, PieceSize, Unwanted
from fomoe_io.serve.jobs import (
    Ended,
    Event,
    Job,
    JobQueue,
    Over,
    Piece,
    Progress,
    SlotWork,
    Started,
    Timings,
    Told,
    Work,
)
from fomoe_io.serve.slots import act

SNAPSHOT_SECONDS = 0.2

GRACE_SECONDS = 1.0
"""For what is in flight when an answer is no longer wanted: what ends by itself leaves a state to go on from."""


@dataclass(slots=True)
class Slot:
    """What the engine is doing, for /slots: written by its thread, read by any."""

    job_number: int = 0
    is_processing: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    processed_tokens: int = 0
    generated_tokens: int = 0
    timings: Timings | None = None


class EngineWorker(threading.Thread):
    """Owns the engine.

    Parameters
    ----------
    open_engine : callable
        Opens the model; called on this thread.
    queue : JobQueue
    on_loaded : callable
        Called with the engine, on this thread, once the model is there.
    on_end : callable
        Called on this thread when it ends, for whatever reason.
    before_close : callable, optional
        Called with the engine before it is closed.
    piece_tokens : int or None

    Attributes
    ----------
    engine : Engine or None
        Once loaded; others than this thread may only look at what never changes (tokenizer, metadata, shape).
    statistics : dict
        The engine's, as of a moment ago.
    experts : ExpertMap or None
        Likewise, while somebody watches.
    outcomes : Counter
        Jobs by how they ended.
    kept_bytes : int
        Of sessions beside the open one, in memory.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        queue: JobQueue,
        on_loaded: Callable[[Engine], None],
        on_end: Callable[[], None],
        *,
        before_close: Callable[[Engine], None] | None = None,
        piece_tokens: int | None = None,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._open_engine = open_engine
        self._queue = queue
        self._on_loaded = on_loaded
        self._on_end = on_end
        self._before_close = before_close
        self._piece_tokens = piece_tokens
        self._stopping_since = math.inf
        self._snapshot_time = 0.0
        self.state: Literal["loading", "ready", "stopped"] = "loading"
        self.engine: Engine | None = None
        self.error: Exception | None = None
        self.statistics: dict[str, Any] = {}
        self.experts: ExpertMap | None = None
        self.watched_until = 0.0  # by the clock of time.monotonic(): whether `experts` is worth its copies
        self.slot = Slot()
        self.outcomes: Counter[str] = Counter()
        self.cached_tokens = self.kept_bytes = 0
        self.most_tokens = 0

    def stop(self) -> None:
        """From any thread: end after the token or batch in flight, or within it when that takes long."""
        self._stopping_since = min(self._stopping_since, time.monotonic())
        self._queue.close()

    def run(self) -> None:
        """The thread."""
        try:
            with self._open_engine() as engine:
                timeline = engine.timeline(_note_kept)
                try:
                    self._loaded(engine)
                    self._work(engine, timeline)
                    if self._before_close is not None:
                        self._before_close(engine)
                    self.statistics = engine.statistics()
                finally:
                    timeline.close()
        except Exception as error:
            self.error = error
        self.state = "stopped"
        self.engine = None
        self._queue.close()
        self._on_end()

    def _loaded(self, engine: Engine) -> None:
        batch = engine.budgets.batch_tokens
        self._piece = PieceSize(min(self._piece_tokens or batch, batch), is_fixed=self._piece_tokens is not None)
        self.engine = engine
        self._take_snapshot(at_once=True)
        self._on_loaded(engine)
        self.state = "ready"

    def _work(self, engine: Engine, timeline: Timeline) -> None:
        while (job := self._queue.take()) is not None:
            started = time.monotonic()
            error = self._outcome(job, lambda job=job: self._do(engine, timeline, job))  # type: ignore[misc]
            self._keep(timeline)
            self.slot.is_processing = False
            self._take_snapshot(at_once=True)
            self._queue.done(time.monotonic() - started)
            job.emit(Over(error))

    def _keep(self, timeline: Timeline) -> None:
        """What was read stays known, also when the process is killed as soon as the client has its answer."""
        try:
            timeline.end()
        except FomoeError as error:
            print(printable(f"fomoe-serve: {error.message}"), file=sys.stderr)
        self.kept_bytes = timeline.kept.held_bytes

    def _outcome(self, job: Job, do: Callable[[], None]) -> ApiError | None:
        """Do a job; what the client has to be told when it went wrong."""
        try:
            do()
        except Unwanted:
            self.outcomes["cancelled"] += 1
            return unavailable("the server is shutting down") if self._stopping_since < math.inf else None
        except ApiError as error:
            self.outcomes["failed"] += 1
            return error
        except FomoeError as error:
            self.outcomes["failed"] += 1
            print(printable(f"fomoe-serve: {error.message}"), file=sys.stderr)
            return ApiError(500, "server_error", error.message)
        except Exception:  # the server outlives a fault of its own
            self.outcomes["failed"] += 1
            traceback.print_exc()
            return internal_error()
        self.outcomes["finished"] += 1
        return None

    def _do(self, engine: Engine, timeline: Timeline, job: Job) -> None:
        if isinstance(job.work, SlotWork):
            job.emit(Told(act(timeline, job.work)))
        else:
            with self._looking(engine, job):
                self._answer_all(engine, timeline, job, job.work)

    def _unwanted_seconds(self, job: Job) -> float:
        """How long nobody has waited for an answer; negative while somebody does."""
        return time.monotonic() - min(job.unwanted_since, self._stopping_since)

    @contextmanager
    def _looking(self, engine: Engine, job: Job) -> Iterator[None]:
        """Whether the answer is still wanted is asked within a batch, too."""

        def look() -> None:
            if self._unwanted_seconds(job) >= GRACE_SECONDS:
                raise Unwanted

        engine.gate.on_look = look
        try:
            yield
        finally:
            engine.gate.on_look = None

    def _answer_all(self, engine: Engine, timeline: Timeline, job: Job, work: Work) -> None:
        def check() -> None:
            if self._unwanted_seconds(job) >= 0:
                raise Unwanted

        def emit(event: Event) -> None:
            self._note(event)
            job.emit(event)

        for number in range(len(work.runs)):
            check()
            if number:
                timeline.end()
            Answering(engine.tokenizer, work, number, emit, check).answer(timeline, self._piece)

    def _note(self, event: Event) -> None:
        """Keep the slot and the statistics up to date."""
        slot = self.slot
        if isinstance(event, Started):
            self.cached_tokens += event.cached_tokens
            self.slot = Slot(slot.job_number + 1, True, event.prompt_tokens, event.cached_tokens, event.cached_tokens)
        elif isinstance(event, Progress):
            slot.processed_tokens = event.processed
        elif isinstance(event, Piece | Ended):
            slot.generated_tokens, slot.timings = event.timings.predicted, event.timings
        self.most_tokens = max(self.most_tokens, slot.prompt_tokens + slot.generated_tokens)
        self._take_snapshot()

    def _take_snapshot(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.engine is not None and (at_once or now - self._snapshot_time >= SNAPSHOT_SECONDS):
            self._snapshot_time = now
            self.statistics = self.engine.statistics()
            if at_once or now < self.watched_until:
                self.experts = ExpertMap.of(self.engine)


def _note_kept(text: str) -> None:
    print(printable(f"fomoe-serve: note: {text}"), file=sys.stderr, flush=True)
