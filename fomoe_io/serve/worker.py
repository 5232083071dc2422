"""The engine's thread: it opens the model, does the jobs that come, and puts the model away."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError, printable
from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.errors import ApiError, internal_error, unavailable
from fomoe_io.serve.expert_map import ExpertMap
from fomoe_io.serve.generate import Answering, PieceSize, Steps, Unwanted
from fomoe_io.serve.jobs import Event, Job, JobQueue, Over, SlotWork, Started, Told, Work
from fomoe_io.serve.seats import Seat, Slot, read_group, rounds, seat_for
from fomoe_io.serve.slots import act

SNAPSHOT_SECONDS = 0.2

GRACE_SECONDS = 1.0
"""For what is in flight when an answer is no longer wanted: what ends by itself leaves a state to go on from."""


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
    most_at_work : int
        Jobs; each has a session of its own.

    Attributes
    ----------
    engine : Engine or None
        Once loaded; others than this thread may only look at what never changes (tokenizer, metadata, shape).
    seats : list of Seat
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
        most_at_work: int = 1,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._open_engine = open_engine
        self._queue = queue
        self._on_loaded = on_loaded
        self._on_end = on_end
        self._before_close = before_close
        self._piece_tokens, self._most_at_work = piece_tokens, most_at_work
        self._stopping_since = math.inf
        self._snapshot_time = 0.0
        self.state: Literal["loading", "ready", "stopped"] = "loading"
        self.engine: Engine | None = None
        self.error: Exception | None = None
        self.statistics: dict[str, Any] = {}
        self.experts: ExpertMap | None = None
        self.watched_until = 0.0  # by the clock of time.monotonic(): whether `experts` is worth its copies
        self.seats: list[Seat] = []
        self._inside: list[Seat] = []
        self._jobs = 0
        self.outcomes: Counter[str] = Counter()
        self.cached_tokens = self.kept_bytes = 0
        self.most_tokens = 0

    def stop(self) -> None:
        """From any thread: end after the token or batch in flight, or within it when that takes long."""
        self._stopping_since = min(self._stopping_since, time.monotonic())
        self._queue.close()

    @property
    def slot(self) -> Slot:
        """Of the seats: one that is at work, else the last that was."""
        slots = [seat.slot for seat in self.seats] or [Slot()]
        return max(slots, key=lambda slot: (slot.is_processing, slot.job_number))

    def run(self) -> None:
        """The thread."""
        try:
            with self._open_engine() as engine:
                first = engine.timeline(_note_kept)
                others = [engine.timeline(beside=first) for _ in range(1, self._most_at_work)]
                self.seats = [Seat(timeline) for timeline in (first, *others)]
                try:
                    self._loaded(engine)
                    self._work(engine)
                    if self._before_close is not None:
                        self._before_close(engine)
                    self.statistics = engine.statistics()
                finally:
                    for seat in self.seats:
                        seat.timeline.close()
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

    # ---- jobs and their seats ----

    def _work(self, engine: Engine) -> None:
        engine.gate.on_look = self._look
        try:
            while self._fill(engine):
                for group in rounds([seat for seat in self.seats if seat.job]):
                    self._read(engine, group)
        finally:
            engine.gate.on_look = None

    def _fill(self, engine: Engine) -> bool:
        """Give free seats to those that wait; whether anybody is at work.  Without anybody it waits."""
        while True:
            free = [seat for seat in self.seats if seat.job is None]
            is_idle = len(free) == len(self.seats)
            job = self._queue.take(waits=is_idle) if free else None
            if job is None:
                return not is_idle
            self._seat(engine, job, free)

    def _seat(self, engine: Engine, job: Job, free: list[Seat]) -> None:
        work = job.work
        seat = self.seats[work.slot] if isinstance(work, SlotWork) else seat_for(job, free)
        started = time.monotonic()
        if isinstance(work, SlotWork):
            self._over(job, self._attempt(lambda: job.emit(Told(self._act(seat, work)))), seat, started)
            return
        seat.job, seat.started, self._jobs = job, started, self._jobs + 1
        answers = self._answers(engine, seat, job, work, self._jobs)
        self._go_on([seat], lambda: seat.begin(answers))

    def _act(self, seat: Seat, work: SlotWork) -> dict[str, Any]:
        if seat.job is not None:
            raise ApiError(503, "unavailable_error", f"slot {work.slot} is at work")
        return act(seat.timeline, work)

    def _answers(self, engine: Engine, seat: Seat, job: Job, work: Work, number: int) -> Steps:
        """All that is to be read for a job."""

        def check() -> None:
            if self._unwanted_seconds(job) >= 0:
                raise Unwanted

        def emit(event: Event) -> None:
            self._note(seat, event, number)
            job.emit(event)

        for run in range(len(work.runs)):
            check()
            if run:
                seat.timeline.end()
            yield from Answering(engine.tokenizer, work, run, emit, check).steps(seat.timeline, self._piece)

    def _read(self, engine: Engine, group: list[Seat]) -> None:
        """What the seats of a group are to read next, and what comes of it."""
        group = [seat for seat in group if seat.job is not None]
        self._inside = group
        found: list[Any] = []
        self._go_on(group, lambda: found.extend(read_group(group, self._piece)))
        self._inside = []
        for seat, logits in zip(group, found, strict=False):
            self._go_on([seat], lambda seat=seat, logits=logits: seat.go_on(logits))  # type: ignore[misc]

    def _go_on(self, seats: list[Seat], do: Callable[[], None]) -> None:
        """Do something for the jobs of seats, and let those go that are over, or that went wrong."""
        failed, error = self._attempt(do)
        for seat in seats:
            if failed or seat.step is None:
                job, started = seat.job, seat.started
                assert job is not None
                seat.leave()
                self._over(job, (failed, error), seat, started)

    def _over(self, job: Job, outcome: tuple[str, ApiError | None], seat: Seat, started: float) -> None:
        self.outcomes[outcome[0] or "finished"] += 1
        if seat.job is None:  # else it was asked for in vain: its session goes on
            self._keep(seat.timeline)
        self._take_snapshot(at_once=True)
        self._queue.done(time.monotonic() - started)
        job.emit(Over(outcome[1]))

    def _keep(self, timeline: Timeline) -> None:
        """What was read stays known, also when the process is killed as soon as the client has its answer."""
        try:
            timeline.end()
        except FomoeError as error:
            print(printable(f"fomoe-serve: {error.message}"), file=sys.stderr)
        self.kept_bytes = timeline.kept.held_bytes

    def _attempt(self, do: Callable[[], None]) -> tuple[str, ApiError | None]:
        """Do something for a job; how it ended when it went wrong, and what the client has to be told."""
        try:
            do()
        except Unwanted:
            return "cancelled", unavailable("the server is shutting down") if self._is_stopping else None
        except ApiError as error:
            return "failed", error
        except FomoeError as error:
            print(printable(f"fomoe-serve: {error.message}"), file=sys.stderr)
            return "failed", ApiError(500, "server_error", error.message)
        except Exception:  # the server outlives a fault of its own
            traceback.print_exc()
            return "failed", internal_error()
        return "", None

    # ---- who is still there ----

    @property
    def _is_stopping(self) -> bool:
        return self._stopping_since < math.inf

    def _unwanted_seconds(self, job: Job) -> float:
        """How long nobody has waited for an answer; negative while somebody does."""
        return time.monotonic() - min(job.unwanted_since, self._stopping_since)

    def _look(self) -> None:
        """Within a run, now and then: whether anybody still waits for what it is for."""
        jobs = [seat.job for seat in self._inside if seat.job is not None]
        if jobs and all(self._unwanted_seconds(job) >= GRACE_SECONDS for job in jobs):
            raise Unwanted

    def _note(self, seat: Seat, event: Event, number: int) -> None:
        """Keep the slot and the statistics up to date."""
        seat.note(event, number)
        if isinstance(event, Started):
            self.cached_tokens += event.cached_tokens
        self.most_tokens = max(self.most_tokens, seat.slot.prompt_tokens + seat.slot.generated_tokens)
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
